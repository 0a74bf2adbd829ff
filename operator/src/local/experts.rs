//! Who holds which experts in local mode: what this process tells of it, and how `modelfleet experts` asks.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{net::TcpStream, time::timeout};
use wire::admin::Page;

use super::crew::member_name;
use crate::{
    control::{Fleet, ReplicaFacts, WorkerFacts, WorkerView},
    experts::{ModelExperts, NoSuchModel, ReplicaExperts, Told, WorkerExperts},
};

/// Where the experts of all models are told.
const PATH: &str = "/experts";
/// An answer may be this long.
const MAX_BYTES: usize = 64 << 20;
/// Where all workers are.
const NODE: &str = "127.0.0.1";

/// What local mode tells whoever asks: nothing until every model can answer.
#[derive(Clone, Default)]
pub struct Board(Arc<OnceLock<Shown>>);

/// The models that run, and who hears of them.
pub(super) struct Shown {
    pub(super) fleet: Fleet,
    pub(super) models: Vec<(String, Vec<ReplicaFacts>)>,
}

impl Board {
    pub(super) fn fill(&self, shown: Shown) {
        drop(self.0.set(shown)); // it is filled once
    }

    /// Whether all models could answer.
    ///
    /// # Errors
    /// Why not, for a person.
    pub fn ready(&self) -> Result<(), String> {
        self.shown().map(drop)
    }

    /// The page of the experts.
    pub fn page(&self) -> Page {
        let board = self.clone();
        Page { path: PATH, read: Arc::new(move || board.shown().map(|shown| json!(shown.experts()))) }
    }

    fn shown(&self) -> Result<&Shown, String> {
        self.0.get().ok_or_else(|| "the models are being started".to_owned())
    }
}

impl Shown {
    fn experts(&self) -> Vec<ModelExperts> {
        let model = |(name, replicas): &(String, Vec<ReplicaFacts>)| {
            let (seen, rows) = (self.fleet.seen(name).workers, self.fleet.rows(name));
            let replicas = replicas.iter().map(|replica| replica_experts(name, replica, &seen, &rows));
            ModelExperts { model: name.clone(), status: String::new(), replicas: replicas.collect() }
        };
        self.models.iter().map(model).collect()
    }
}

fn replica_experts(
    model: &str,
    replica: &ReplicaFacts,
    seen: &[WorkerView],
    rows: &BTreeMap<String, BTreeMap<u32, Vec<u64>>>,
) -> ReplicaExperts {
    let worker = |worker: &WorkerFacts| WorkerExperts {
        ordinal: worker.ordinal,
        pod: Some(member_name(model, replica.replica, worker.ordinal)),
        node: Some(NODE.to_owned()),
        live: seen.iter().any(|view| view.id == worker.id && view.holds()),
        ..WorkerExperts::default()
    };
    let told = |worker: &WorkerFacts| {
        let told: Told = rows.get(&worker.id).cloned().ok_or_else(|| "it has told nothing yet".to_owned());
        (worker.ordinal, told)
    };
    let told = replica.workers.iter().map(told).collect();
    ReplicaExperts {
        revision: replica.revision.clone(),
        replica: replica.replica,
        shards: replica.placement.shards,
        draining: replica.draining,
        workers: replica.workers.iter().map(worker).collect(),
        ..ReplicaExperts::default()
    }
    .with(Some(&replica.placement), told)
}

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing listens there.
    #[error("no `modelfleet local` is at {address}; another address is asked with --local=HOST:PORT")]
    Connect {
        /// Who was asked.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("ask {address} for {PATH}")]
    Http {
        /// Who was asked.
        address: SocketAddr,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It says that it cannot tell.
    #[error("{address} answers {status}: {said}")]
    Refused {
        /// Who was asked.
        address: SocketAddr,
        /// The status.
        status: StatusCode,
        /// The reason.
        said: String,
    },
    /// Something else than local mode listens there.
    #[error("the answer of {address} cannot be read: is it the --admin of a `modelfleet local`?")]
    Malformed {
        /// Who was asked.
        address: SocketAddr,
        /// Why.
        source: serde_json::Error,
    },
    /// No answer.
    #[error("{address} did not answer within {} s", .after.as_secs_f32())]
    Late {
        /// Who was asked.
        address: SocketAddr,
        /// How long it had.
        after: Duration,
    },
    /// There is no such model.
    #[error(transparent)]
    Unknown(NoSuchModel),
}

/// Reads the experts of a model that a `modelfleet local` runs, which tells them at `address`.
///
/// # Errors
/// See [`Error`].
pub async fn read(address: SocketAddr, namespace: &str, name: &str, patience: Duration) -> Result<ModelExperts, Error> {
    let answer = timeout(patience, ask(address)).await.map_err(|_| Error::Late { address, after: patience })?;
    let models: Vec<ModelExperts> =
        serde_json::from_slice(&answer?).map_err(|source| Error::Malformed { address, source })?;
    let there = |model: &ModelExperts| model.model.strip_prefix(&format!("{namespace}/")).map(str::to_owned);
    let found = models.iter().position(|model| there(model).as_deref() == Some(name));
    match found.and_then(|at| models.get(at)) {
        Some(model) => Ok(model.clone()),
        None => Err(Error::Unknown(NoSuchModel {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            there: models.iter().filter_map(there).collect(),
        })),
    }
}

async fn ask(address: SocketAddr) -> Result<Bytes, Error> {
    let broken = |source: Box<dyn std::error::Error + Send + Sync>| Error::Http { address, source };
    let stream = TcpStream::connect(address).await.map_err(|source| Error::Connect { address, source })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(error.into()))?;
    let connection = tokio::spawn(connection);
    let request = Request::get(PATH).header(header::HOST, address.to_string());
    let request = request.body(Empty::<Bytes>::new()).expect("the parts are valid");
    let response = sender.send_request(request).await.map_err(|error| broken(error.into()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BYTES).collect().await.map_err(broken)?.to_bytes();
    connection.abort();
    if status == StatusCode::OK {
        return Ok(body);
    }
    let said = String::from_utf8_lossy(&body).lines().next().unwrap_or_default().to_owned();
    Err(Error::Refused { address, status, said })
}
