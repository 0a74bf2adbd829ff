//! How our programs are started: program, arguments, environment, ports and files, as values.
//!
//! The cluster renders these into containers, local mode into child processes; a worker's flags exist only here.
//!
//! Architecture Invariant: pure, and knows neither Kubernetes nor processes.

use std::time::Duration;

use planner::Placement;
use serde::Serialize;

/// Port of a router's HTTP in a cluster.
pub const ROUTER_HTTP_PORT: u16 = 8080;
/// Port of a router's gRPC in a cluster.
pub const ROUTER_GRPC_PORT: u16 = 9090;
/// Port of a worker's gRPC in a cluster.
pub const WORKER_PORT: u16 = 9000;
/// Port of the control stream in a cluster.
pub const FLEET_PORT: u16 = 9100;
/// Port of health and metrics in a cluster, on all programs.
pub const ADMIN_PORT: u16 = 9400;
/// Sequences that a worker runs at once.
pub const MAX_SEQUENCES: u32 = 64;
/// The attributes of a pod's telemetry, in Kubernetes' spelling of variables.
const SENDER: &str =
    "service.instance.id=$(MODELFLEET_ID),k8s.namespace.name=$(POD_NAMESPACE),k8s.pod.name=$(POD_NAME)";

/// One process to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// What is started.
    pub program: Program,
    /// Its arguments, without the program's name.
    pub arguments: Vec<String>,
    /// Variables beside those it inherits, in the order they are set.
    pub environment: Vec<Variable>,
    /// What it listens on; empty where the system picks.
    pub ports: Vec<Port>,
    /// What must lie there before it starts.
    pub files: Vec<File>,
}

/// Our programs, without the one that starts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `modelfleet-router`
    Router,
    /// `modelfleet-worker`
    Worker,
}

impl Program {
    /// The name of the executable.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Router => "modelfleet-router",
            Self::Worker => "modelfleet-worker",
        }
    }
}

/// One environment variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// As the program reads it.
    pub name: String,
    /// What it is set to.
    pub value: Value,
}

/// What an environment variable is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// This text.
    Text(String),
    /// A field of the program's own pod, by its path (`metadata.uid`).
    PodField(String),
}

/// One port that a program listens on in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// At most 15 characters.
    pub name: &'static str,
    /// Its number.
    pub number: u16,
}

/// One file that a program reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Absolute.
    pub path: String,
    /// Text.
    pub content: String,
}

/// Where a process runs, and how it proves who it is.
#[derive(Clone, Copy, Debug)]
pub enum Site<'a> {
    /// In a pod of its own: fixed ports on all addresses, its id is the pod's UID, its ordinal the pod's index.
    Pod,
    /// A child process on loopback: ephemeral ports, and it ends with its parent.
    Child {
        /// The random token that its hello carries.
        id: &'a str,
    },
}

/// The model files' way in: what `fetch` and `describe` need beside the source. Empty: the program's defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hub {
    /// Instead of `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// A file with the hub's token; waited for if it is absent.
    pub token_file: Option<String>,
    /// A file with certificates to trust beside the usual ones.
    pub ca_file: Option<String>,
    /// A proxy for the hub.
    pub proxy: Option<String>,
    /// Hosts that are reached without it, separated by commas.
    pub no_proxy: Option<String>,
}

/// A worker that serves.
#[derive(Clone, Debug)]
pub struct Serve<'a> {
    /// Where it runs.
    pub site: Site<'a>,
    /// NAMESPACE/NAME.
    pub model: &'a str,
    /// The folder with the model's files.
    pub model_dir: &'a str,
    /// What runs.
    pub revision: &'a str,
    /// Of the model's files.
    pub content_hash: &'a str,
    /// Its replica.
    pub replica: u32,
    /// Its place in the replica, on loopback; a pod has its index instead.
    pub ordinal: u32,
    /// Where the placement lies, absolute.
    pub placement_path: &'a str,
    /// Which ordinals hold which experts.
    pub placement: &'a Placement,
    /// Room in the key-value cache, in tokens.
    pub kv_cache_tokens: u64,
    /// Longest context in tokens; 0: the model's own.
    pub max_context_tokens: u64,
    /// How long it may finish its work when it is told to end.
    pub drain_timeout: Duration,
    /// HOST:PORT of each control stream.
    pub operators: &'a [String],
    /// `OTEL_*`, as they are to be set.
    pub telemetry: &'a [(String, String)],
}

/// The reading of a model's files: a download, or the description of what they weigh.
#[derive(Clone, Debug)]
pub struct Read<'a> {
    /// Where it runs.
    pub site: Site<'a>,
    /// `hf://OWNER/NAME`, `pvc://CLAIM/PATH` or `file://PATH`.
    pub source: &'a str,
    /// The hub's branch, tag or commit; `None`: its default.
    pub revision: Option<&'a str>,
    /// NAMESPACE/NAME.
    pub model: &'a str,
    /// HOST:PORT of each control stream; empty: progress is told to nobody.
    pub operators: &'a [String],
    /// How the hub is reached.
    pub hub: &'a Hub,
    /// `OTEL_*`, as they are to be set.
    pub telemetry: &'a [(String, String)],
}

/// A router on loopback. In a cluster the chart starts it.
#[derive(Clone, Debug)]
pub struct Route<'a> {
    /// The random token that its hello carries.
    pub id: &'a str,
    /// Where it serves HTTP.
    pub http: &'a str,
    /// Where it serves gRPC.
    pub grpc: &'a str,
    /// HOST:PORT of each control stream.
    pub operators: &'a [String],
}

/// The value of a flag that is among the arguments.
pub fn flag<'a>(arguments: &'a [String], flag: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|argument| argument == flag)?;
    arguments.get(at + 1).map(String::as_str)
}

/// Gives a flag that is among the arguments another value.
pub fn set_flag(arguments: &mut [String], flag: &str, value: String) {
    let at = arguments.iter().position(|argument| argument == flag);
    if let Some(old) = at.and_then(|at| arguments.get_mut(at + 1)) {
        *old = value;
    }
}

/// `modelfleet-worker serve`
pub fn serve(serve: &Serve<'_>) -> Launch {
    let mut arguments = vec!["serve".to_owned()];
    let mut flag = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
    flag("model", serve.model.to_owned());
    flag("model-dir", serve.model_dir.to_owned());
    flag("revision", serve.revision.to_owned());
    flag("content-hash", serve.content_hash.to_owned());
    flag("replica", serve.replica.to_string());
    flag("ordinal", ordinal(serve));
    flag("placement", serve.placement_path.to_owned());
    flag("kv-cache-tokens", serve.kv_cache_tokens.to_string());
    flag("max-context-tokens", serve.max_context_tokens.to_string());
    flag("max-sequences", MAX_SEQUENCES.to_string());
    flag("drain-timeout", serve.drain_timeout.as_secs().to_string());
    flag("listen", listen(serve.site, WORKER_PORT));
    flag("admin", listen(serve.site, ADMIN_PORT));
    for operator in serve.operators {
        flag("operator", operator.clone());
    }
    arguments.extend(ends_with_parent(serve.site));
    let mut environment = identity(serve.site);
    if matches!(serve.site, Site::Pod) {
        environment.push(pod_field("MODELFLEET_ORDINAL", "metadata.labels['apps.kubernetes.io/pod-index']"));
        environment.push(pod_field("POD_IP", "status.podIP"));
    }
    environment.extend(telemetry(serve.site, serve.telemetry));
    Launch {
        program: Program::Worker,
        arguments,
        environment,
        ports: ports(serve.site, &[("grpc", WORKER_PORT), ("admin", ADMIN_PORT)]),
        files: vec![File { path: serve.placement_path.to_owned(), content: placement_json(serve.placement) }],
    }
}

/// `modelfleet-worker fetch`: the model's files, verified, into `to`.
pub fn fetch(read: &Read<'_>, to: &str) -> Launch {
    reading("fetch", read, &["--to".to_owned(), to.to_owned()])
}

/// `modelfleet-worker describe`: what the model weighs, as JSON on standard output.
pub fn describe(read: &Read<'_>) -> Launch {
    reading("describe", read, &[])
}

/// `modelfleet-router`
pub fn router(route: &Route<'_>) -> Launch {
    let site = Site::Child { id: route.id };
    let mut arguments = Vec::new();
    let mut flag = |name: &str, value: &str| arguments.extend([format!("--{name}"), value.to_owned()]);
    flag("http", route.http);
    flag("grpc", route.grpc);
    flag("admin", &listen(site, ADMIN_PORT));
    for operator in route.operators {
        flag("operator", operator);
    }
    arguments.extend(ends_with_parent(site));
    Launch { program: Program::Router, arguments, environment: identity(site), ports: Vec::new(), files: Vec::new() }
}

fn reading(command: &str, read: &Read<'_>, more: &[String]) -> Launch {
    let mut arguments = vec![command.to_owned(), read.source.to_owned()];
    arguments.extend_from_slice(more);
    let mut flag = |name: &str, value: &str| arguments.extend([format!("--{name}"), value.to_owned()]);
    if let Some(revision) = read.revision {
        flag("revision", revision);
    }
    flag("model", read.model);
    for operator in read.operators {
        flag("operator", operator);
    }
    arguments.extend(ends_with_parent(read.site));
    let mut environment = identity(read.site);
    let hub = [
        ("HF_ENDPOINT", &read.hub.endpoint),
        ("HF_TOKEN_PATH", &read.hub.token_file),
        ("SSL_CERT_FILE", &read.hub.ca_file),
        ("HTTPS_PROXY", &read.hub.proxy),
        ("NO_PROXY", &read.hub.no_proxy),
    ];
    environment.extend(hub.iter().filter_map(|(name, value)| value.as_deref().map(|value| text(name, value))));
    environment.extend(telemetry(read.site, read.telemetry));
    Launch { program: Program::Worker, arguments, environment, ports: Vec::new(), files: Vec::new() }
}

/// Kubernetes replaces the variable in a container's arguments.
fn ordinal(serve: &Serve<'_>) -> String {
    match serve.site {
        Site::Pod => "$(MODELFLEET_ORDINAL)".to_owned(),
        Site::Child { .. } => serve.ordinal.to_string(),
    }
}

fn listen(site: Site<'_>, port: u16) -> String {
    match site {
        Site::Pod => format!("[::]:{port}"),
        Site::Child { .. } => "127.0.0.1:0".to_owned(),
    }
}

fn ends_with_parent(site: Site<'_>) -> Option<String> {
    matches!(site, Site::Child { .. }).then(|| "--exit-with-stdin".to_owned())
}

fn identity(site: Site<'_>) -> Vec<Variable> {
    match site {
        Site::Pod => vec![pod_field("MODELFLEET_ID", "metadata.uid")],
        Site::Child { id } => vec![text("MODELFLEET_ID", id)],
    }
}

/// `variables`, and which pod it is that sends.
fn telemetry(site: Site<'_>, variables: &[(String, String)]) -> Vec<Variable> {
    let mut all: Vec<Variable> = variables.iter().map(|(name, value)| text(name, value)).collect();
    if matches!(site, Site::Pod) && !all.is_empty() {
        all.push(pod_field("POD_NAME", "metadata.name"));
        all.push(pod_field("POD_NAMESPACE", "metadata.namespace"));
        all.push(text("OTEL_RESOURCE_ATTRIBUTES", SENDER));
    }
    all
}

fn ports(site: Site<'_>, ports: &[(&'static str, u16)]) -> Vec<Port> {
    match site {
        Site::Pod => ports.iter().map(|&(name, number)| Port { name, number }).collect(),
        Site::Child { .. } => Vec::new(),
    }
}

fn text(name: &str, value: &str) -> Variable {
    Variable { name: name.to_owned(), value: Value::Text(value.to_owned()) }
}

fn pod_field(name: &str, path: &str) -> Variable {
    Variable { name: name.to_owned(), value: Value::PodField(path.to_owned()) }
}

/// The file that a worker reads when no operator tells it its placement.
pub fn placement_json(placement: &Placement) -> String {
    #[derive(Serialize)]
    struct File<'a> {
        version: Version,
        #[serde(flatten)]
        placement: &'a Placement,
    }
    /// Below that of every snapshot.
    #[derive(Serialize)]
    struct Version {
        epoch: u64,
        sequence: u64,
    }
    let version = Version { epoch: 0, sequence: 0 };
    serde_json::to_string(&File { version, placement }).expect("numbers and lists always serialise")
}

#[cfg(test)]
mod tests {
    use planner::placement::LayerPlacement;

    use super::*;

    fn placement() -> Placement {
        Placement { shards: 2, layers: vec![LayerPlacement { layer: 1, experts: vec![vec![0], vec![1]] }] }
    }

    fn worker(site: Site<'_>) -> Launch {
        serve(&Serve {
            site,
            model: "team/tiny",
            model_dir: "/models",
            revision: "0a1b2c3d",
            content_hash: "ab12",
            replica: 3,
            ordinal: 1,
            placement_path: "/etc/modelfleet/placement.json",
            placement: &placement(),
            kv_cache_tokens: 8192,
            max_context_tokens: 1024,
            drain_timeout: Duration::from_secs(60),
            operators: &["one:9100".to_owned(), "two:9100".to_owned()],
            telemetry: &[("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), "http://collector:4317".to_owned())],
        })
    }

    /// One line an argument, variable, port and file.
    fn text(launch: &Launch) -> String {
        let mut lines = vec![launch.program.file_name().to_owned()];
        lines.extend(launch.arguments.iter().map(|argument| format!("  {argument}")));
        lines.extend(launch.environment.iter().map(|variable| match &variable.value {
            Value::Text(text) => format!("{}={text}", variable.name),
            Value::PodField(path) => format!("{}<{path}", variable.name),
        }));
        lines.extend(launch.ports.iter().map(|port| format!("{} {}", port.name, port.number)));
        lines.extend(launch.files.iter().map(|file| format!("{}: {}", file.path, file.content)));
        lines.join("\n")
    }

    const PLACED: &str = r#"/etc/modelfleet/placement.json: {"version":{"epoch":0,"sequence":0},"shards":2,"layers":[{"layer":1,"experts":[[0],[1]]}]}"#;

    #[test]
    fn worker_in_a_pod() {
        let expected = "modelfleet-worker
  serve
  --model
  team/tiny
  --model-dir
  /models
  --revision
  0a1b2c3d
  --content-hash
  ab12
  --replica
  3
  --ordinal
  $(MODELFLEET_ORDINAL)
  --placement
  /etc/modelfleet/placement.json
  --kv-cache-tokens
  8192
  --max-context-tokens
  1024
  --max-sequences
  64
  --drain-timeout
  60
  --listen
  [::]:9000
  --admin
  [::]:9400
  --operator
  one:9100
  --operator
  two:9100
MODELFLEET_ID<metadata.uid
MODELFLEET_ORDINAL<metadata.labels['apps.kubernetes.io/pod-index']
POD_IP<status.podIP
OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317
POD_NAME<metadata.name
POD_NAMESPACE<metadata.namespace
OTEL_RESOURCE_ATTRIBUTES=service.instance.id=$(MODELFLEET_ID),k8s.namespace.name=$(POD_NAMESPACE),k8s.pod.name=$(POD_NAME)
grpc 9000
admin 9400
";
        assert_eq!(text(&worker(Site::Pod)), format!("{expected}{PLACED}"));
    }

    #[test]
    fn worker_as_a_child_differs_only_in_its_site() {
        let (pod, child) = (text(&worker(Site::Pod)), text(&worker(Site::Child { id: "token" })));
        let differs = |one: &str, other: &str| -> Vec<String> {
            one.lines().filter(|line| !other.lines().any(|same| same == *line)).map(str::to_owned).collect()
        };
        assert_eq!(
            differs(&child, &pod),
            ["  1", "  127.0.0.1:0", "  127.0.0.1:0", "  --exit-with-stdin", "MODELFLEET_ID=token"]
        );
        assert_eq!(differs(&pod, &child).len(), 11, "ordinal, addresses, six variables, two ports");
    }

    #[test]
    fn describe_and_fetch_know_the_hub() {
        let hub = Hub {
            endpoint: Some("https://hub".to_owned()),
            token_file: Some("/token/hf".to_owned()),
            ca_file: Some("/ca.crt".to_owned()),
            proxy: Some("http://proxy".to_owned()),
            no_proxy: Some("inside".to_owned()),
        };
        let read = Read {
            site: Site::Pod,
            source: "hf://a/b",
            revision: Some("main"),
            model: "team/tiny",
            operators: &["one:9100".to_owned()],
            hub: &hub,
            telemetry: &[],
        };
        let flags = "  --revision\n  main\n  --model\n  team/tiny\n  --operator\n  one:9100\n";
        let variables = "MODELFLEET_ID<metadata.uid\nHF_ENDPOINT=https://hub\nHF_TOKEN_PATH=/token/hf\n\
                         SSL_CERT_FILE=/ca.crt\nHTTPS_PROXY=http://proxy\nNO_PROXY=inside";
        assert_eq!(text(&describe(&read)), format!("modelfleet-worker\n  describe\n  hf://a/b\n{flags}{variables}"));
        let expected = format!("modelfleet-worker\n  fetch\n  hf://a/b\n  --to\n  /models\n{flags}{variables}");
        assert_eq!(text(&fetch(&read, "/models")), expected);
    }

    #[test]
    fn router_as_a_child() {
        let operators = ["127.0.0.1:9100".to_owned()];
        let route = Route { id: "token", http: "127.0.0.1:8080", grpc: "127.0.0.1:9090", operators: &operators };
        let expected = "modelfleet-router\n  --http\n  127.0.0.1:8080\n  --grpc\n  127.0.0.1:9090\n  --admin\n  \
                        127.0.0.1:0\n  --operator\n  127.0.0.1:9100\n  --exit-with-stdin\nMODELFLEET_ID=token";
        assert_eq!(text(&router(&route)), expected);
    }
}
