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
        environment.push(pod_field(
            "MODELFLEET_ORDINAL",
            "metadata.labels['apps.kubernetes.io/pod-index']",
        ));
        environment.push(pod_field("POD_IP", "status.podIP"));
    }
    environment.extend(
        serve
            .telemetry
            .iter()
            .map(|(name, value)| text(name, value)),
    );
    Launch {
        program: Program::Worker,
        arguments,
        environment,
        ports: ports(serve.site, &[("grpc", WORKER_PORT), ("admin", ADMIN_PORT)]),
        files: vec![File {
            path: serve.placement_path.to_owned(),
            content: placement_json(serve.placement),
        }],
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
    let mut flag =
        |name: &str, value: &str| arguments.extend([format!("--{name}"), value.to_owned()]);
    flag("http", route.http);
    flag("grpc", route.grpc);
    flag("admin", &listen(site, ADMIN_PORT));
    for operator in route.operators {
        flag("operator", operator);
    }
    arguments.extend(ends_with_parent(site));
    Launch {
        program: Program::Router,
        arguments,
        environment: identity(site),
        ports: Vec::new(),
        files: Vec::new(),
    }
}

fn reading(command: &str, read: &Read<'_>, more: &[String]) -> Launch {
    let mut arguments = vec![command.to_owned(), read.source.to_owned()];
    arguments.extend_from_slice(more);
    let mut flag =
        |name: &str, value: &str| arguments.extend([format!("--{name}"), value.to_owned()]);
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
    environment.extend(
        hub.iter()
            .filter_map(|(name, value)| value.as_deref().map(|value| text(name, value))),
    );
    environment.extend(read.telemetry.iter().map(|(name, value)| text(name, value)));
    Launch {
        program: Program::Worker,
        arguments,
        environment,
        ports: Vec::new(),
        files: Vec::new(),
    }
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

fn ports(site: Site<'_>, ports: &[(&'static str, u16)]) -> Vec<Port> {
    match site {
        Site::Pod => ports
            .iter()
            .map(|&(name, number)| Port { name, number })
            .collect(),
        Site::Child { .. } => Vec::new(),
    }
}

fn text(name: &str, value: &str) -> Variable {
    Variable {
        name: name.to_owned(),
        value: Value::Text(value.to_owned()),
    }
}

fn pod_field(name: &str, path: &str) -> Variable {
    Variable {
        name: name.to_owned(),
        value: Value::PodField(path.to_owned()),
    }
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
    let version = Version {
        epoch: 0,
        sequence: 0,
    };
    serde_json::to_string(&File { version, placement }).expect("numbers and lists always serialise")
}
