//! A worker that serves: loads its share of a model, answers routers and peers, and drains when told to.
//!
//! [`generate`] is the service for routers, [`crate::experts::service`] the one for peers; [`control`] speaks with the
//! operator, [`state`] is what they all share.

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use engine::{Engine as _, ModelEngine};
use prometheus::Registry;
use serde_json::json;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tonic::service::Routes;
use tonic_health::server::HealthReporter;
use tracing::{error, info, warn};
use wire::{
    Services,
    admin::{self, Admin, Page},
    proto::{Failure, Progress, Report, experts_server::ExpertsServer, progress, report, worker_server::WorkerServer},
};

use crate::{
    drive::Driver,
    experts::{
        exchange::{MeshExchange, Own},
        keep::{Keeper, Keeping},
        pool::Pool,
        room,
        service::ExpertsService,
        standing::Board,
    },
    fetch::record,
    mesh::Mesh,
    metrics::Metrics,
    prepare::{self, Model},
};

pub mod control;
pub mod generate;
pub mod state;

use generate::GenerateService;
use state::{Serving, State};

/// Prompt tokens in one step: other sequences get a token at least this often while a long prompt is read.
const PREFILL_CHUNK: usize = 256;
/// Requests that wait in a worker for each that may run; routers hold the long queue.
const WAITING_PER_RUNNING: usize = 4;
/// Experts that nobody answers for and that wait to be looked at; those that do not fit are told again.
const UNHELD: usize = 1024;
/// How long a failing worker stays, so that the operator hears why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What a worker is told to serve.
#[derive(Debug, Clone)]
pub struct Options {
    /// NAMESPACE/NAME.
    pub model: String,
    /// The model's files.
    pub model_dir: PathBuf,
    /// Name of what runs, for the operator.
    pub revision: String,
    /// Of the model files.
    pub content_hash: String,
    /// Index of the replica.
    pub replica: u32,
    /// Index in the replica.
    pub ordinal: u32,
    /// What the placement file says.
    pub placement: Vec<u8>,
    /// Tokens of KV cache.
    pub kv_cache_tokens: usize,
    /// `None`: the model's.
    pub max_context_tokens: Option<usize>,
    /// Sequences that run at once.
    pub max_sequences: usize,
    /// Where routers and peers reach this worker.
    pub advertise: String,
    /// Control streams are held to all of them.
    pub operators: Vec<String>,
    /// The pod's UID, or the local token.
    pub id: String,
    /// How long requests may go on after the shutdown.
    pub drain_timeout: Duration,
}

/// Why a worker does not serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The placement is none.
    #[error("cannot use the placement")]
    Placement(#[from] serde_json::Error),
    /// What `fetch` wrote beside the model's files.
    #[error("cannot use the model's files")]
    Files(#[from] record::Error),
    /// The weights.
    #[error("cannot load the weights")]
    Weights(#[from] engine::Error),
    /// Tokenizer, template, defaults.
    #[error("cannot load tokenizer and template")]
    Model(#[from] prepare::LoadError),
    /// The system has no more threads, or a socket failed.
    #[error("the system refused a thread or a socket")]
    System(#[from] io::Error),
    /// The engine's thread ended by a fault; the log says which.
    #[error("the engine has ended")]
    Engine,
    /// What loads and forgets experts ended by a fault; the log says which.
    #[error("nothing keeps the experts as the operator says any more")]
    Keeper,
}

impl Error {
    /// The stable reason for the operator.
    fn reason(&self) -> &'static str {
        match self {
            Self::Placement(_) | Self::System(_) | Self::Engine | Self::Keeper => "WorkerFailed",
            Self::Files(record::Error::OtherContent { .. }) => "ChecksumMismatch",
            Self::Files(_) => "SourceNotFound",
            Self::Weights(engine::Error::File { .. } | engine::Error::Tensor { .. }) | Self::Model(_) => {
                "InvalidModelFile"
            }
            Self::Weights(_) => "UnsupportedModel",
        }
    }
}

/// The sockets of a worker, bound by its caller.
pub struct Listeners {
    /// For routers and peers.
    pub grpc: TcpListener,
    /// For probes and metrics.
    pub admin: TcpListener,
}

/// How a worker is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Requests may finish, and peers get their experts, up to the drain timeout.
    Drain,
    /// The parent is gone: all of that within this time.
    Within(Duration),
}

impl Shutdown {
    /// How long requests may go on, and then how long connections may take to close.
    fn times(self, drain_timeout: Duration) -> (Duration, Duration) {
        match self {
            Self::Drain => (drain_timeout, wire::connections::GRACE),
            Self::Within(within) => {
                let running = within.mul_f64(0.7);
                (running, within.saturating_sub(running))
            }
        }
    }
}

/// Serves until `shutdown`, then drains.
///
/// 1. Health and metrics are there at once; ready means that this worker's experts are in memory.
/// 2. Reports to the operators from the beginning; works without any.
/// 3. On shutdown: refuses new requests, lets running ones finish, serves experts until no peer runs any.
///
/// # Errors
/// What kept it from serving, told to the operators before; or that the engine ended by a fault.
pub async fn serve(
    options: Options,
    listeners: Listeners,
    registry: Registry,
    metrics: Arc<Metrics>,
    shutdown: impl Future<Output = Shutdown>,
) -> Result<(), Error> {
    let mesh = Mesh::from_json(&options.placement)?;
    let state = State::new(mesh, &options);
    let (reports, receiver) = mpsc::channel(256);
    tokio::spawn(control::follow(control::stream(&options, receiver), state.clone(), reports.clone()));
    let (ready, told) = (state.clone(), state.clone());
    let read = move || told.expert_load().map(|load| json!(load)).ok_or_else(|| "no experts are in memory".to_owned());
    let pages = vec![Page { path: admin::EXPERTS, read: Arc::new(read) }];
    let admin = Admin { ready: move || ready.ready(), registry, pages };
    tokio::spawn(admin::serve(listeners.admin, admin, std::future::pending()));

    let served = run(&options, listeners.grpc, &state, metrics, &reports, shutdown).await;
    if let Err(error) = &served {
        let failure = Failure { reason: error.reason().to_owned(), message: chain(error) };
        let _ = reports.send(Report { report: Some(report::Report::Failure(failure)) }).await; // best effort
        tokio::time::sleep(LAST_WORDS).await;
    }
    served
}

async fn run(
    options: &Options,
    listener: TcpListener,
    state: &Arc<State>,
    metrics: Arc<Metrics>,
    reports: &mpsc::Sender<Report>,
    shutdown: impl Future<Output = Shutdown>,
) -> Result<(), Error> {
    let mut shutdown = std::pin::pin!(shutdown);
    let loaded = tokio::select! {
        loaded = load(options, state, reports) => loaded?,
        _ = &mut shutdown => return Ok(()), // nothing to drain
    };
    metrics.dense_weights(loaded.dense_bytes);
    metrics.experts(loaded.experts.weight());
    let own = Own {
        replica: options.replica,
        ordinal: options.ordinal,
        content_hash: options.content_hash.clone(),
        hidden: loaded.experts.hidden(),
        dtype: loaded.experts.dtype(),
    };
    let (wanted, unheld) = mpsc::channel(UNHELD);
    let board = Board::new(metrics.clone());
    metrics.routed(&loaded.experts);
    let promised = loaded.engine.cache_bytes();
    let keeper = Keeper::new(Keeping {
        replica: options.replica,
        ordinal: options.ordinal,
        meshes: state.meshes.clone(),
        experts: loaded.experts.clone(),
        loaded: state.loaded.clone(),
        board: board.clone(),
        wanted: unheld,
        room: Box::new(move || room::left(promised)),
        metrics: metrics.clone(),
    });
    let suspects = board.suspects();
    let exchange = MeshExchange::new(own, state.meshes.clone(), board, Some(wanted), metrics.clone());
    let driver = Driver::start(loaded.engine, exchange, metrics.clone())?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let pool = Pool::start(&loaded.experts, threads, metrics.clone())?;
    let experts = ExpertsService::new(loaded.experts.clone(), pool, &options.content_hash);
    let asked = experts.asked();
    let service = GenerateService::new(loaded.model, driver.clone(), state.clone(), metrics);
    let (services, health) = services(service, experts).await;
    let mut keeping = tokio::spawn(keeper.follow());
    let mut placed = state.loaded.subscribe();
    tokio::select! {
        _ = placed.wait_for(Option::is_some) => {} // a snapshot may have come meanwhile
        ended = until_ended(&mut shutdown, driver.ended(), &mut keeping) => return ended.map(drop),
    }
    let (experts, dense_bytes) = (Some(loaded.experts), loaded.dense_bytes);
    state.serving(Serving { driver: driver.clone(), experts, asked, dense_bytes, suspects });
    info!(model = options.model, replica = options.replica, ordinal = options.ordinal, "serving");

    let (stop, mut stopped) = watch::channel(None);
    let closing = async move {
        let _ = stopped.wait_for(Option::is_some).await;
    };
    let server = tokio::spawn(wire::serve(listener, services, closing));
    let (ended, grace) = match until_ended(shutdown, driver.ended(), &mut keeping).await {
        Ok(how) => {
            health.set_not_serving::<WorkerServer<GenerateService>>().await;
            let (running, closing) = how.times(options.drain_timeout);
            drain(state, running, how).await;
            (Ok(()), closing)
        }
        Err(fault) => {
            state.cut(); // not ready, and whatever is here goes on elsewhere
            (Err(fault), Duration::ZERO)
        }
    };
    stop.send_replace(Some(()));
    let _ = tokio::time::timeout(grace, server).await; // what is open then is closed with the process
    ended
}

/// Waits until the worker is told to end, or has lost what it cannot go on without.
///
/// # Errors
/// The engine ended, or the keeper, which goes on for ever unless it panics.
async fn until_ended(
    shutdown: impl Future<Output = Shutdown>,
    engine: impl Future<Output = ()>,
    keeping: &mut JoinHandle<()>,
) -> Result<Shutdown, Error> {
    tokio::select! {
        how = shutdown => Ok(how),
        () = engine => Err(Error::Engine),
        kept = keeping => {
            if let Err(panic) = kept {
                error!(%panic, "the keeper of the experts panicked");
            }
            Err(Error::Keeper)
        }
    }
}

/// The services of a worker: requests, experts, health; experts in frames too.
pub async fn services(generate: GenerateService, experts: ExpertsService) -> (Services, HealthReporter) {
    let limit = wire::MAX_MESSAGE_BYTES;
    let (health, health_service) = tonic_health::server::health_reporter();
    let worker = WorkerServer::new(generate).max_decoding_message_size(limit).max_encoding_message_size(limit);
    let frames = Arc::new(experts.frames());
    let experts = ExpertsServer::new(experts).max_decoding_message_size(limit).max_encoding_message_size(limit);
    health.set_serving::<WorkerServer<GenerateService>>().await;
    health.set_serving::<ExpertsServer<ExpertsService>>().await;
    let routes = Routes::new(health_service).add_service(worker).add_service(experts);
    (Services::from(routes).with_frames(frames), health)
}

struct Loaded {
    engine: ModelEngine,
    experts: Arc<engine::Experts>,
    model: Model,
    dense_bytes: u64,
}

/// Loads on a thread that may block, and tells the operators how far it is.
async fn load(options: &Options, state: &Arc<State>, reports: &mpsc::Sender<Report>) -> Result<Loaded, Error> {
    let (options, reports) = (options.clone(), reports.clone());
    let held = state.meshes.newest().held(options.ordinal);
    let loading = tokio::task::spawn_blocking(move || {
        record::check(&options.model_dir, &options.content_hash)?;
        let engine_options = engine::Options {
            kv_cache_tokens: options.kv_cache_tokens,
            max_context_tokens: options.max_context_tokens,
            max_sequences: options.max_sequences,
            prefill_chunk: PREFILL_CHUNK,
        };
        let mut told = Instant::now();
        let mut total_bytes = 0;
        let mut progress = |done, total| {
            total_bytes = total;
            if told.elapsed() >= Duration::from_millis(500) {
                told = Instant::now();
                let _ = reports.try_send(loading_report(done, total)); // the next one says more
            }
        };
        let (engine, experts) = engine::load(&options.model_dir, &held, &engine_options, &mut progress)?;
        let limits = engine.limits();
        let model = Model::load(&options.model_dir, limits)?;
        let dense_bytes = total_bytes.saturating_sub(experts.weight().1);
        Ok(Loaded { engine, experts, model, dense_bytes })
    });
    loading.await.unwrap_or_else(|panic| {
        warn!(%panic, "loading the model panicked");
        Err(Error::Engine)
    })
}

fn loading_report(done_bytes: u64, total_bytes: u64) -> Report {
    let progress = Progress { phase: progress::Phase::Loading.into(), done_bytes, total_bytes };
    Report { report: Some(report::Report::Progress(progress)) }
}

/// 1. No new requests from here on.
/// 2. Running ones finish, or are cut when the time is over.
/// 3. Experts are served until no peer of the mesh needs them, or the time is over.
async fn drain(state: &State, timeout: Duration, how: Shutdown) {
    let deadline = tokio::time::Instant::now() + timeout;
    state.drain();
    info!(seconds = timeout.as_secs(), "draining");
    if tokio::time::timeout_at(deadline, state.finished()).await.is_err() {
        warn!("cut requests that did not finish in time");
        state.cut();
        return;
    }
    if how == Shutdown::Drain && tokio::time::timeout_at(deadline, state.unneeded()).await.is_err() {
        info!("peers may still need experts of this worker; the time is over");
    }
}

/// An error with its sources, for a person.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
