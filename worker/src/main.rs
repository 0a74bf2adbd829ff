//! The program `modelfleet-worker`: `serve`, `fetch` or `describe`. Knows arguments, environment and signals.

use std::{
    env, fs,
    io::{self, BufRead as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use tracing::error;
use wire::{proto::hello::Role, telemetry::Telemetry};
use worker::{
    fetch::{self, Source, hub::Hub, report::Reporter},
    memory,
    metrics::Metrics,
    serve::{self, Listeners, Shutdown},
};

/// How long a worker stays once its parent is gone.
const ORPHANED: Duration = Duration::from_secs(2);

/// Serves a model, or its share of one; fetches a model's files; says what a model weighs.
#[derive(Parser)]
#[command(name = "modelfleet-worker", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers requests and holds experts for peers
    Serve(Box<ServeArguments>),
    /// Brings a model's files here, verified
    Fetch(FetchArguments),
    /// Prints what a model weighs, as JSON
    Describe(DescribeArguments),
}

#[derive(Args)]
struct ServeArguments {
    /// NAMESPACE/NAME
    #[arg(long)]
    model: String,
    /// Folder with the model's files
    #[arg(long)]
    model_dir: PathBuf,
    /// Name of what runs, for the operator
    #[arg(long, default_value = "")]
    revision: String,
    /// Content hash of the files that are to be served
    #[arg(long, default_value = "")]
    content_hash: String,
    /// Index of the replica
    #[arg(long, default_value_t = 0)]
    replica: u32,
    /// Index of this worker in its replica
    #[arg(long, env = "MODELFLEET_ORDINAL", default_value_t = 0)]
    ordinal: u32,
    /// File that says which ordinals hold which experts; `-`: the first line of standard input
    #[arg(long)]
    placement: PathBuf,
    /// Tokens of KV cache
    #[arg(long)]
    kv_cache_tokens: usize,
    /// Longest context in tokens; 0: the model's own
    #[arg(long, default_value_t = 0)]
    max_context_tokens: usize,
    /// Sequences that run at once
    #[arg(long, default_value_t = 64)]
    max_sequences: usize,
    /// Where routers and peers connect
    #[arg(long, default_value = "[::]:9000")]
    listen: SocketAddr,
    /// Where they are told to connect; if not given, what is bound
    #[arg(long)]
    advertise: Option<String>,
    /// Health and metrics
    #[arg(long, default_value = "[::]:9400")]
    admin: SocketAddr,
    /// Operators to hold a control stream to
    #[arg(long = "operator")]
    operators: Vec<String>,
    /// Seconds that requests may go on after SIGTERM
    #[arg(long, default_value_t = 60)]
    drain_timeout: u64,
    /// End when standard input closes
    #[arg(long)]
    exit_with_stdin: bool,
}

#[derive(Args)]
struct SourceArguments {
    /// hf://OWNER/NAME, file://PATH or pvc://CLAIM/PATH
    source: String,
    /// Branch, tag or commit of a hub's repository
    #[arg(long, default_value = "")]
    revision: String,
    /// Where claims are mounted
    #[arg(long, default_value = "/pvc")]
    pvc_root: PathBuf,
    /// NAMESPACE/NAME, for the operator
    #[arg(long, default_value = "")]
    model: String,
    /// Operators to tell
    #[arg(long = "operator")]
    operators: Vec<String>,
    /// End when standard input closes
    #[arg(long)]
    exit_with_stdin: bool,
}

#[derive(Args)]
struct FetchArguments {
    #[command(flatten)]
    source: SourceArguments,
    /// Folder for the files
    #[arg(long)]
    to: PathBuf,
}

#[derive(Args)]
struct DescribeArguments {
    #[command(flatten)]
    source: SourceArguments,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    memory::keep_freed();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("modelfleet-worker: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(run(arguments));
    runtime.shutdown_background(); // a load that is given up must not hold the process
    code
}

async fn run(arguments: Arguments) -> ExitCode {
    let telemetry = match wire::telemetry::start("modelfleet-worker") {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("modelfleet-worker: {:#}", anyhow::Error::from(error));
            return ExitCode::FAILURE;
        }
    };
    let ended = match arguments.command {
        Command::Serve(arguments) => serve(*arguments, &telemetry).await,
        Command::Fetch(arguments) => read(&arguments.source, Role::Fetch, Some(&arguments.to)).await,
        Command::Describe(arguments) => read(&arguments.source, Role::Describe, None).await,
    };
    if let Err(error) = &ended {
        error!("{error:#}");
    }
    telemetry.shutdown().await;
    if ended.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn serve(arguments: ServeArguments, telemetry: &Telemetry) -> anyhow::Result<()> {
    let bind = |address: SocketAddr| async move {
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
    };
    let listeners = Listeners { grpc: bind(arguments.listen).await?, admin: bind(arguments.admin).await? };
    let bound = listeners.grpc.local_addr()?;
    let options = serve::Options {
        model: arguments.model,
        model_dir: arguments.model_dir,
        revision: arguments.revision,
        content_hash: arguments.content_hash,
        replica: arguments.replica,
        ordinal: arguments.ordinal,
        placement: placement(&arguments.placement)?,
        kv_cache_tokens: arguments.kv_cache_tokens,
        max_context_tokens: Some(arguments.max_context_tokens).filter(|&tokens| tokens > 0),
        max_sequences: arguments.max_sequences,
        advertise: arguments.advertise.unwrap_or_else(|| advertise(bound)),
        operators: arguments.operators,
        id: id(),
        drain_timeout: Duration::from_secs(arguments.drain_timeout),
    };
    let metrics = Metrics::new(&telemetry.meter());
    let shutdown = shutdown(arguments.exit_with_stdin)?;
    Ok(serve::serve(options, listeners, telemetry.registry(), metrics, shutdown).await?)
}

/// The placement file, or what a parent says instead, which keeps standard input open and leaves no file behind.
fn placement(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path != Path::new("-") {
        return fs::read(path).with_context(|| format!("cannot read the placement file {}", path.display()));
    }
    let mut line = Vec::new();
    io::stdin().lock().read_until(b'\n', &mut line).context("cannot read the placement from standard input")?;
    Ok(line)
}

/// Fetches to a folder, or describes on standard output if there is none.
async fn read(arguments: &SourceArguments, role: Role, to: Option<&Path>) -> anyhow::Result<()> {
    let operators = arguments.operators.clone();
    let reporter = Reporter::open(operators, role, id(), arguments.model.clone(), revision());
    let shutdown = shutdown(arguments.exit_with_stdin)?;
    let result = tokio::select! {
        result = fetch_or_describe(arguments, to, &reporter) => result,
        _ = shutdown => anyhow::bail!("told to end"),
    };
    if let Err(error) = &result {
        reporter.failure(error.reason(), serve::chain(error)).await;
    }
    if to.is_none() || result.is_err() {
        reporter.heard().await; // files that are here need no words
    }
    Ok(result?)
}

async fn fetch_or_describe(
    arguments: &SourceArguments,
    to: Option<&Path>,
    reporter: &Reporter,
) -> Result<(), fetch::Error> {
    let source = Source::parse(&arguments.source, &arguments.pvc_root)?;
    let hub = Hub::new(&hub_options(&source, reporter).await?)?;
    if let Some(to) = to {
        fetch::fetch(&source, &arguments.revision, to, &hub, reporter.on_progress()).await?;
        return Ok(());
    }
    let description = fetch::describe(&source, &arguments.revision, &hub).await?;
    let json = serde_json::to_vec(&description).map_err(|error| fetch::Error::UnsupportedModel(error.to_string()))?;
    println!("{}", String::from_utf8_lossy(&json));
    reporter.description(json).await;
    Ok(())
}

/// The hub of the environment. Its token is read from a file, or from the variable, and only for a hub.
async fn hub_options(source: &Source, reporter: &Reporter) -> Result<fetch::hub::Options, fetch::Error> {
    let variable = |name| env::var(name).ok().filter(|value: &String| !value.is_empty());
    let token = match (variable("HF_TOKEN"), variable("HF_TOKEN_PATH")) {
        _ if !matches!(source, Source::Hub(_)) => None,
        (Some(token), _) => Some(token),
        (None, Some(path)) => Some(fetch::report::token(Path::new(&path), reporter).await?),
        (None, None) => None,
    };
    let certificates = match variable("SSL_CERT_FILE") {
        Some(path) if matches!(source, Source::Hub(_)) => {
            fs::read(&path).map_err(|source| fetch::Error::File { path, source })?
        }
        _ => Vec::new(),
    };
    let endpoint = variable("HF_ENDPOINT").unwrap_or_default();
    Ok(fetch::hub::Options { endpoint, token, certificates, pause: None })
}

/// Who this is to the operator: the pod's UID, or the token that local mode gave.
fn id() -> String {
    env::var("MODELFLEET_ID").unwrap_or_default()
}

/// Which revision this reads files for, by the operator's name. The hub's is an argument.
fn revision() -> String {
    env::var("MODELFLEET_REVISION").unwrap_or_default()
}

/// What is bound, or the pod's address where all addresses are.
fn advertise(bound: SocketAddr) -> String {
    let pod = env::var("POD_IP").ok().and_then(|ip| ip.parse().ok());
    match pod {
        Some(ip) if bound.ip().is_unspecified() => SocketAddr::new(ip, bound.port()).to_string(),
        _ => bound.to_string(),
    }
}

/// SIGTERM, an interrupt, or (with `stdin`) the end of standard input.
fn shutdown(stdin: bool) -> anyhow::Result<impl Future<Output = Shutdown>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let (open, closed) = oneshot::channel::<()>();
    if stdin {
        // a thread of its own: a read of standard input cannot be given up
        thread::spawn(move || {
            let _open = open;
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink()); // however it ends, it ended
        });
    }
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => Shutdown::Drain,
            _ = interrupt.recv() => Shutdown::Drain,
            _ = closed, if stdin => Shutdown::Within(ORPHANED),
        }
    })
}
