//! Workers are killed, frozen and cut off while streams run: no client loses, doubles or changes a token.
//!
//! Each request is asked undisturbed first. Under faults the same requests are asked again and again, and each answer
//! must be the same, piece by piece, log probabilities included. Every fault is shown to have bitten.

mod ask;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use tests::{
    fault::{Fault, Faults},
    local::{Fleet, Process, metrics, runs, signal},
    poll,
};
use tokio::task::JoinHandle;

use self::ask::{Answer, Ask};
use crate::http::chat;

/// Streams at once.
const COMPANY: usize = 12;
/// Faults in the tests; by command as many as `SOAK_FAULTS` says.
const FAULTS: usize = 300;
/// The longest that one fault may take, and that no client may read anything.
const PATIENCE: Duration = Duration::from_secs(90);
/// As many pieces as clients may read, all together, while one of them waits for one answer. A fair share of them is
/// many answers, however slow the machine is.
const MEANWHILE: u64 = 10_000;
/// Workers that are told to end, one after the other.
const DRAINS: usize = 6;
/// A fault comes when clients have read up to so many more pieces.
const APART: u64 = 24;

fn deployment(replicas: u32, shards: u32) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.yaml");
    let model = tests::root().join("manifests/models/tiny-r1");
    let yaml = format!(
        "apiVersion: modelfleet.io/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: tiny}}\nspec:\n  \
         model: {{source: \"file://{}\"}}\n  replicas: {replicas}\n  parallelism: {{expert: {{shards: {shards}}}}}\n  \
         routing: {{migration: {{maxAttempts: 100}}}}\n",
        model.display()
    );
    std::fs::write(&file, yaml).unwrap();
    (folder, file)
}

/// A fleet, and what clients ask of it, undisturbed so far.
async fn started(replicas: u32, shards: u32) -> (tempfile::TempDir, Fleet, Arc<Load>) {
    let (folder, file) = deployment(replicas, shards);
    let fleet = tokio::task::block_in_place(|| {
        let mut fleet = Fleet::start(&file, &[]).unwrap();
        fleet.ready().unwrap();
        fleet
    });
    let load = Load::new(fleet.url().unwrap(), fleet.grpc().await.unwrap()).await.unwrap();
    (folder, fleet, Arc::new(load))
}

/// What clients do until they are told to stop, and what went wrong.
struct Load {
    asks: Vec<(Ask, Answer)>,
    url: String,
    grpc: String,
    /// Pieces that clients have read.
    read: AtomicU64,
    answers: AtomicU64,
    stops: AtomicBool,
}

impl Load {
    /// Asks each request undisturbed.
    async fn new(url: String, grpc: String) -> anyhow::Result<Self> {
        let read = AtomicU64::new(0);
        let mut asks = Vec::new();
        for ask in ask::all() {
            let answer = ask.send(&url, &grpc, &read).await.with_context(|| format!("{ask:?}"))?;
            asks.push((ask, answer));
        }
        Ok(Self { asks, url, grpc, read, answers: AtomicU64::new(0), stops: AtomicBool::new(false) })
    }

    async fn client(&self, first: usize) -> anyhow::Result<()> {
        for (ask, expected) in self.asks.iter().cycle().skip(first) {
            if self.stops.load(Relaxed) {
                return Ok(());
            }
            let answer = tokio::select! {
                answer = ask.send(&self.url, &self.grpc, &self.read) => answer,
                hangs = self.hangs() => Err(hangs),
            };
            let answer = answer.with_context(|| format!("{ask:?}"));
            if answer.is_err() {
                self.stops.store(true, Relaxed);
            }
            let answer = answer?;
            if answer != *expected {
                self.stops.store(true, Relaxed);
                anyhow::bail!("{ask:?}\n{}", ask::difference(&answer, expected));
            }
            self.answers.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    /// Ends when an answer that was asked for now should have come long ago.
    async fn hangs(&self) -> anyhow::Error {
        let begun = self.read.load(Relaxed);
        let (mut read, mut since) = (begun, Instant::now());
        loop {
            let now = self.read.load(Relaxed);
            if now != read {
                (read, since) = (now, Instant::now());
            }
            if read - begun > MEANWHILE {
                return anyhow!("it hangs: other clients read {MEANWHILE} pieces meanwhile");
            }
            if since.elapsed() > PATIENCE {
                return anyhow!("it hangs: no client read anything for {PATIENCE:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await; // polls
        }
    }

    fn begin(self: &Arc<Self>) -> Vec<JoinHandle<anyhow::Result<()>>> {
        let client = |first| {
            let load = self.clone();
            tokio::spawn(async move { load.client(first).await })
        };
        (0..COMPANY).map(client).collect()
    }

    /// Waits for clients to finish what they read; the first thing that went wrong for one.
    async fn end(&self, clients: Vec<JoinHandle<anyhow::Result<()>>>) -> anyhow::Result<()> {
        self.stops.store(true, Relaxed);
        for client in clients {
            client.await.context("a client panicked").flatten()?;
        }
        Ok(())
    }

    /// Waits until clients have read so many more pieces, while `faults` pass.
    async fn go_on(&self, pieces: u64, faults: &mut Faults) -> anyhow::Result<()> {
        let (begun, until) = (Instant::now(), self.read.load(Relaxed) + pieces);
        while self.read.load(Relaxed) < until && !self.stops.load(Relaxed) {
            ensure!(begun.elapsed() < PATIENCE, "no stream goes on");
            faults.thaw(Instant::now());
            tokio::time::sleep(Duration::from_millis(2)).await; // polls
        }
        Ok(())
    }
}

async fn inject(fleet: &Fleet, load: &Load, count: usize, draw: &mut fastrand::Rng) -> anyhow::Result<Faults> {
    let mut faults = Faults::new();
    while faults.bitten() < count && !load.stops.load(Relaxed) {
        load.go_on(draw.u64(1..=APART), &mut faults).await?;
        let worker = draw.choice(fleet.workers()).context("there are workers")?;
        let fault = Fault::drawn(draw, faults.can_reset());
        tokio::task::block_in_place(|| faults.inject(fault, &worker))?;
    }
    Ok(faults)
}

/// The router's metrics.
async fn told(fleet: &Fleet) -> String {
    let router = fleet.processes().into_iter().find(|process| process.name == "router").unwrap();
    metrics(&router.admin().await.unwrap()).await.unwrap()
}

/// The value of a counter with this reason, summed over its other labels.
fn counted(text: &str, name: &str, reason: &str) -> f64 {
    let reason = format!("reason=\"{reason}");
    let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(&reason));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Tells a worker to end, and waits until it has and another process has taken its place.
async fn drain(fleet: &Fleet, load: &Load, worker: &Process) -> anyhow::Result<()> {
    signal(worker.pid, "TERM")?;
    let is_back = || fleet.workers().iter().any(|other| other.name == worker.name && other.pid != worker.pid);
    let ended = poll::eventually("another process is in its place", PATIENCE, async || {
        ensure!(load.stops.load(Relaxed) || !runs(worker.pid) && is_back(), "{worker:?}");
        Ok(())
    });
    ended.await
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_are_told_to_end_hand_their_streams_over() {
    let (_folder, fleet, load) = started(2, 1).await;
    let clients = load.begin();
    let mut drained = Ok(());
    for number in 0..DRAINS {
        drained = load.go_on(APART, &mut Faults::new()).await;
        let worker = &fleet.workers()[number % 2];
        drained = drained.and(drain(&fleet, &load, worker).await);
        if drained.is_err() {
            break;
        }
    }
    let ended = load.end(clients).await.and(drained);
    ended.unwrap_or_else(|error| panic!("{error:#}\n{:#?}", fleet.printed()));
    let told = told(&fleet).await;
    assert!(counted(&told, "modelfleet_router_resumed_streams_total", "draining") > 0.0, "streams ran there:\n{told}");
    assert_eq!(counted(&told, "modelfleet_router_resumed_streams_total", "lost"), 0.0, "none was cut:\n{told}");
    fleet.stop().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_cost_no_client_a_token() {
    let count = std::env::var("SOAK_FAULTS").map_or(FAULTS, |count| count.parse().expect("SOAK_FAULTS is a number"));
    let seed = std::env::var("SOAK_SEED").map_or(20_261_124, |seed| seed.parse().expect("SOAK_SEED is a number"));
    let (_folder, fleet, load) = started(2, 4).await;
    let clients = load.begin();
    let begun = Instant::now();
    let injected = inject(&fleet, &load, count, &mut fastrand::Rng::with_seed(seed)).await;
    let ended = load.end(clients).await.and(injected);
    let faults = ended.unwrap_or_else(|error| panic!("seed {seed}: {error:#}\n{:#?}", fleet.printed()));
    let told = told(&fleet).await;
    let resumed = |reason| counted(&told, "modelfleet_router_resumed_streams_total", reason);
    eprintln!(
        "seed {seed}: {faults:?} in {:?}; {} answers, none lost or different; resumed: {} lost, {} silent, {} draining",
        begun.elapsed(),
        load.answers.load(Relaxed),
        resumed("lost"),
        resumed("silent"),
        resumed("draining"),
    );
    assert!(resumed("lost") > 0.0, "streams ran where the faults came:\n{told}");
    assert_eq!(counted(&told, "modelfleet_router_unresumed_streams_total", ""), 0.0);
    assert_eq!(chat(&load.url, "tiny", "What is 47 + 85?").await.unwrap().content, "132");
    drop(faults);
    fleet.stop().unwrap();
}
