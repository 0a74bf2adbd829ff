//! The command `modelfleet`: arguments, telemetry, sockets and signals, and one call for each command.

mod check;

use std::{
    future::Future,
    io::{IsTerminal as _, Write as _, stderr, stdout},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kube::config::{KubeConfigOptions, Kubeconfig};
use operator::{
    control::Fleet,
    controller::{self, Settings},
    experts::{self, Canvas},
    lease::Timing,
    local::{self, Board, Output, Tools},
    preview,
    render::{HubAccess, Install},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use wire::{
    admin::{self, Admin},
    telemetry::{self, Telemetry},
};

/// How long one answer of the cluster may take where a person waits.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where local mode tells health, metrics and experts, unless told otherwise.
const LOCAL_ADMIN: &str = "127.0.0.1:9400";

/// Serves models, in a cluster or on this machine.
#[derive(Parser)]
#[command(name = "modelfleet", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the operator, in a cluster
    Run(Box<RunArguments>),
    /// Runs models on this machine, as child processes
    Local(LocalArguments),
    /// Prints what a model would be made of
    Plan(PlanArguments),
    /// Draws the experts of a model: who holds them, and how many rows each gets
    Experts(ExpertsArguments),
    /// Prints the custom resource definition
    Crd,
    /// Asks a router whether it serves
    Check {
        /// HOST:PORT of its gRPC
        router: String,
    },
}

#[derive(Args)]
struct RunArguments {
    /// The operator's own namespace, where the routers and the Lease are
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// A namespace to watch; may be given more than once. All, if none is given
    #[arg(long = "watch-namespace")]
    watch_namespaces: Vec<String>,
    /// Where routers and workers connect
    #[arg(long, default_value = "[::]:9100")]
    listen: SocketAddr,
    /// Health and metrics
    #[arg(long, default_value = "[::]:9400")]
    admin: SocketAddr,
    /// HOST:PORT at which workers find every operator
    #[arg(long)]
    fleet: String,
    /// The image of workers
    #[arg(long)]
    image: String,
    /// When the image of workers is pulled
    #[arg(long, default_value = "IfNotPresent")]
    image_pull_policy: String,
    /// A Secret of the model's namespace to pull the image with; may be given more than once
    #[arg(long = "image-pull-secret")]
    image_pull_secrets: Vec<String>,
    /// Host of the routers' Service, for the status; modelfleet-router.NAMESPACE.svc if not given
    #[arg(long)]
    router: Option<String>,
    /// Selects the pods of the routers
    #[arg(long, default_value = "app.kubernetes.io/name=modelfleet,app.kubernetes.io/component=router")]
    router_selector: String,
    /// Name of the Lease that the leader holds
    #[arg(long, default_value = "modelfleet-operator")]
    lease: String,
    /// Name of this process in the election
    #[arg(long, env = "POD_NAME")]
    identity: String,
    /// Instead of the hub of Hugging Face.
    #[arg(long)]
    hub_endpoint: Option<String>,
    /// A file with certificates to trust beside the usual ones
    #[arg(long)]
    hub_ca_file: Option<PathBuf>,
    /// A proxy for the hub
    #[arg(long)]
    hub_proxy: Option<String>,
    /// Hosts that are reached without the proxy, separated by commas
    #[arg(long)]
    hub_no_proxy: Option<String>,
}

#[derive(Args)]
struct LocalArguments {
    /// YAML with ModelDeployments
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Asks the first model, prints the answer, and ends
    #[arg(long)]
    prompt: Option<String>,
    /// Where OpenAI's HTTP is served [default: 127.0.0.1:8080, or any port with --prompt]
    #[arg(long)]
    http: Option<SocketAddr>,
    /// Where gRPC is served [default: 127.0.0.1:9090, or any port with --prompt]
    #[arg(long)]
    grpc: Option<SocketAddr>,
    /// Where health, metrics and experts are told [default: 127.0.0.1:9400, or nowhere with --prompt]
    #[arg(long)]
    admin: Option<SocketAddr>,
}

#[derive(Args)]
struct PlanArguments {
    /// YAML with ModelDeployments
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

#[derive(Args)]
struct ExpertsArguments {
    /// Name of the ModelDeployment
    name: String,
    /// Its namespace [default: the context's, or `default` with --local]
    #[arg(short, long)]
    namespace: Option<String>,
    /// One layer as a table, expert by expert
    #[arg(long)]
    layer: Option<u32>,
    /// All of it as data
    #[arg(short, long)]
    output: Option<Format>,
    /// A context of the kubeconfig [default: the current one]
    #[arg(long)]
    context: Option<String>,
    /// Where the kubeconfig is [default: as for kubectl]
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Asks a `modelfleet local` instead of a cluster, at its --admin [default: 127.0.0.1:9400]
    #[arg(
        long, value_name = "HOST:PORT", num_args = 0..=1, require_equals = true,
        default_missing_value = LOCAL_ADMIN, conflicts_with_all = ["context", "kubeconfig"]
    )]
    local: Option<SocketAddr>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Json,
}

#[tokio::main]
async fn main() -> ExitCode {
    let ended = match Arguments::parse().command {
        Command::Run(arguments) => with_telemetry(async |telemetry| run(*arguments, telemetry).await).await,
        Command::Local(arguments) => with_telemetry(async |telemetry| run_local(arguments, telemetry).await).await,
        Command::Plan(arguments) => print_plan(&arguments).await,
        Command::Experts(arguments) => print_experts(arguments).await,
        Command::Crd => print_definition(),
        Command::Check { router } => check::check(&router).await,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("modelfleet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command between the start and the flush of telemetry.
async fn with_telemetry(command: impl AsyncFnOnce(&Telemetry) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let telemetry = telemetry::start("modelfleet")?;
    let ended = command(&telemetry).await;
    telemetry.shutdown().await;
    ended
}

async fn run(arguments: RunArguments, telemetry: &Telemetry) -> anyhow::Result<()> {
    let listener = bind(arguments.listen).await?;
    let admin_listener = bind(arguments.admin).await?;
    let settings = settings(arguments)?;
    let client = kube::Client::try_default().await.context("find the cluster")?;
    let fleet = Fleet::new();
    let served = tokio::spawn({
        let fleet = fleet.clone();
        async move { fleet.serve(listener, std::future::pending()).await }
    });
    let admin = Admin { ready: || Ok(()), registry: telemetry.registry(), pages: Vec::new() };
    let admin = tokio::spawn(admin::serve(admin_listener, admin, std::future::pending()));
    let ended = tokio::select! {
        () = controller::run(client, settings, fleet, terminated()?) => Ok(()),
        served = served => served?.context("serve the control stream"),
        served = admin => served?.context("serve health and metrics"),
    };
    ended
}

fn settings(arguments: RunArguments) -> anyhow::Result<Settings> {
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let certificates = arguments
        .hub_ca_file
        .map(|file| std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display())));
    let router = given(arguments.router).unwrap_or_else(|| format!("modelfleet-router.{}.svc", arguments.namespace));
    Ok(Settings {
        namespaces: arguments.watch_namespaces,
        namespace: arguments.namespace,
        router_selector: arguments.router_selector,
        lease: arguments.lease,
        identity: arguments.identity,
        timing: Timing::default(),
        install: Install {
            image: arguments.image,
            image_pull_policy: arguments.image_pull_policy,
            image_pull_secrets: arguments.image_pull_secrets,
            operator: arguments.fleet,
            router,
            hub: HubAccess {
                endpoint: given(arguments.hub_endpoint),
                certificates: certificates.transpose()?,
                proxy: given(arguments.hub_proxy),
                no_proxy: given(arguments.hub_no_proxy),
            },
            telemetry: worker_telemetry(),
        },
    })
}

/// The `OTEL_*` variables that workers get too.
fn worker_telemetry() -> Vec<(String, String)> {
    let mut variables: Vec<_> = std::env::vars().filter(|(name, _)| is_for_workers(name)).collect();
    variables.sort();
    variables
}

/// Not those that say who this process is, that may hold a secret (it would stand in every pod and in the record of each
/// revision), or that name files of this pod.
fn is_for_workers(name: &str) -> bool {
    let own = ["OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"];
    let kept_back = ["_HEADERS", "_CERTIFICATE", "_CLIENT_KEY"];
    name.starts_with("OTEL_") && !own.contains(&name) && !kept_back.iter().any(|end| name.ends_with(end))
}

async fn run_local(arguments: LocalArguments, telemetry: &Telemetry) -> anyhow::Result<()> {
    let port = |usual: u16| if arguments.prompt.is_some() { 0 } else { usual };
    let loopback = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let usual = arguments.prompt.is_none().then(|| LOCAL_ADMIN.parse()).transpose()?;
    let admin_listener = match arguments.admin.or(usual) {
        Some(address) => Some(bind(address).await.context("serve --admin")?),
        None => None,
    };
    let admin = admin_listener.as_ref().map(TcpListener::local_addr).transpose()?;
    let options = local::Options {
        http: arguments.http.unwrap_or_else(|| loopback(port(8080))),
        grpc: arguments.grpc.unwrap_or_else(|| loopback(port(9090))),
        admin,
        files: arguments.files,
        prompt: arguments.prompt,
        programs: programs()?,
        cache: cache()?,
    };
    let output = Output { words: &mut stdout(), notes: &mut stderr() };
    let board = Board::default();
    let told = async {
        let Some(listener) = admin_listener else { return std::future::pending().await };
        let ready = {
            let board = board.clone();
            move || board.ready()
        };
        let admin = Admin { ready, registry: telemetry.registry(), pages: vec![board.page()] };
        admin::serve(listener, admin, std::future::pending()).await
    };
    tokio::select! {
        ended = local::run(&options, &board, output, terminated()?) => Ok(ended?),
        served = told => served.context("serve --admin"),
    }
}

async fn print_plan(arguments: &PlanArguments) -> anyhow::Result<()> {
    let (programs, cache) = (programs()?, cache()?);
    let tools = Tools { programs: &programs, cache: &cache };
    let text = preview::preview(&arguments.files, tools).await?;
    stdout().write_all(text.as_bytes()).context("write the plan")
}

async fn print_experts(arguments: ExpertsArguments) -> anyhow::Result<()> {
    let name = &arguments.name;
    let mut seen = match arguments.local {
        Some(address) => {
            let namespace = arguments.namespace.as_deref().unwrap_or("default");
            local::read_experts(address, namespace, name, PATIENCE).await?
        }
        None => {
            let client = cluster(arguments.kubeconfig.as_deref(), arguments.context).await;
            let client = client.context("find the cluster")?;
            let namespace = arguments.namespace.unwrap_or_else(|| client.default_namespace().to_owned());
            experts::read(&client, &namespace, name, PATIENCE).await?
        }
    };
    if let Some(layer) = arguments.layer {
        seen = seen.only(layer)?;
    }
    let text = match (arguments.output, arguments.layer) {
        (Some(Format::Json), _) => serde_json::to_string_pretty(&seen).context("write the experts as JSON")? + "\n",
        (None, Some(_)) => experts::table(&seen),
        (None, None) => experts::draw(&seen, canvas()),
    };
    stdout().write_all(text.as_bytes()).context("write the drawing")
}

/// The cluster that kubectl would ask.
async fn cluster(kubeconfig: Option<&Path>, context: Option<String>) -> anyhow::Result<kube::Client> {
    let options = KubeConfigOptions { context, ..KubeConfigOptions::default() };
    let config = match kubeconfig {
        Some(file) => kube::Config::from_custom_kubeconfig(Kubeconfig::read_from(file)?, &options).await?,
        None if options.context.is_some() => kube::Config::from_kubeconfig(&options).await?,
        None => kube::Config::infer().await?,
    };
    Ok(kube::Client::try_from(config)?)
}

/// The terminal, or what a pipe can take.
fn canvas() -> Canvas {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let terminal = rustix::termios::tcgetwinsize(stdout()).ok().map(|size| usize::from(size.ws_col));
    let columns = set("COLUMNS").and_then(|columns| columns.parse().ok()).or(terminal).filter(|columns| *columns > 0);
    Canvas { columns: columns.unwrap_or(80), colour: stdout().is_terminal() && set("NO_COLOR").is_none() }
}

fn print_definition() -> anyhow::Result<()> {
    stdout().write_all(crds::yaml().as_bytes()).context("write the definition")
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))
}

/// Our programs lie side by side.
fn programs() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("find the folder of this program")?;
    Ok(own.parent().unwrap_or(Path::new("/")).to_owned())
}

/// `$XDG_CACHE_HOME/modelfleet`, or `~/.cache/modelfleet`.
fn cache() -> anyhow::Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    Ok(folder.context("find a folder for fetched models: neither XDG_CACHE_HOME nor HOME is set")?.join("modelfleet"))
}

/// SIGTERM or an interrupt. A second one ends the process at once, and its children with it.
fn terminated() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut next = async move || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(async move {
        next().await;
        tokio::spawn(async move {
            next().await;
            std::process::exit(130);
        });
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_get_no_secret_no_name_and_no_file_of_the_operator() {
        for name in ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_TRACES_SAMPLER"] {
            assert!(is_for_workers(name), "{name}");
        }
        for name in [
            "OTEL_EXPORTER_OTLP_HEADERS",
            "OTEL_EXPORTER_OTLP_LOGS_HEADERS",
            "OTEL_EXPORTER_OTLP_CLIENT_KEY",
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
            "OTEL_SERVICE_NAME",
            "RUST_LOG",
        ] {
            assert!(!is_for_workers(name), "{name}");
        }
    }
}
