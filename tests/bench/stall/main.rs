//! `stalls FAULTS`: how long streams stand still when a worker is lost, as `tests/bench/stalls` describes it.
//!
//! For each fault a few streams are begun, one after the other, so that it is known where each runs. Once all of them are
//! well under way the fault comes; each is read to its end and compared with the undisturbed answer.

mod rows;
mod stream;

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use reqwest::Client;
use tests::{
    fault::{Fault, Faults},
    local::{Fleet, Process, client, metrics_over},
    poll::eventually,
};

use self::{
    rows::Rows,
    stream::{Pieces, Stream},
};

/// Workers; one more than there are streams, so that one holds experts and runs nothing.
const SHARDS: usize = 4;
const STREAMS: usize = SHARDS - 1;
/// Of all layers of the model.
const EXPERTS: u32 = 48;
/// A frozen process is frozen until the streams have ended, and longer than that never.
const FROZEN: Duration = Duration::from_secs(60);
/// The longest that one step of the benchmark may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// What happens to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Kind {
    /// Of each expert, beside the one.
    copies: u32,
    is_frozen: bool,
    /// Whether the measured streams run at the victim; else they only need its experts.
    runs_them: bool,
}

impl Kind {
    /// Without a copy a frozen holder is waited for as long as it is frozen, which measures nothing.
    const ALL: [Self; 6] = [
        Self { copies: 1, is_frozen: false, runs_them: false },
        Self { copies: 1, is_frozen: false, runs_them: true },
        Self { copies: 1, is_frozen: true, runs_them: false },
        Self { copies: 1, is_frozen: true, runs_them: true },
        Self { copies: 0, is_frozen: false, runs_them: false },
        Self { copies: 0, is_frozen: false, runs_them: true },
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.is_frozen { "frozen" } else { "killed" };
        let who = if self.runs_them { "runs the stream" } else { "holds experts" };
        f.pad(&format!("{how}, {who}"))
    }
}

/// One stream that a fault hit.
pub(crate) struct Hit {
    /// The longest gap after the fault, beyond the median gap before it.
    stall: Duration,
    /// What was left of that gap when a killed process was back.
    after_back: Option<Duration>,
    is_same: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let faults = std::env::args().nth(1).context("usage: stalls FAULTS")?;
    let faults: usize = faults.parse().context("FAULTS is a number")?;
    let mut rows = Rows::default();
    for copies in [1, 0] {
        let kinds = Kind::ALL.into_iter().filter(|kind| kind.copies == copies);
        let measured = measure(copies, &kinds.collect::<Vec<_>>(), faults, &mut rows).await;
        measured.inspect_err(|_| rows.print())?;
    }
    rows.print();
    ensure!(rows.are_same(), "an answer was not the undisturbed one");
    Ok(())
}

/// All kinds in turn, `faults` times.
async fn measure(copies: u32, kinds: &[Kind], faults: usize, rows: &mut Rows) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.yaml");
    let model = tests::root().join("manifests/models/tiny-r1");
    let yaml = format!(
        "apiVersion: modelfleet.io/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: tiny-r1}}\nspec:\n  \
         model: {{source: \"file://{}\"}}\n  parallelism: {{expert: {{shards: {SHARDS}, redundancy: {copies}}}}}\n",
        model.display()
    );
    std::fs::write(&file, yaml)?;
    let mut fleet = tokio::task::block_in_place(|| Fleet::start(&file, &[]))?;
    tokio::task::block_in_place(|| fleet.ready())?;
    let url = fleet.url()?;
    let mut undisturbed = Vec::new();
    for number in 0..STREAMS {
        undisturbed.push(Stream::begin(&url, number).await?.end().await?.text());
    }
    for _ in 0..faults {
        for &kind in kinds {
            let hits = strike(&fleet, &url, kind, &undisturbed).await.with_context(|| format!("{kind}"));
            let hits = hits.with_context(|| format!("{:#?}", fleet.printed()))?;
            rows.add(kind, hits);
        }
    }
    tokio::task::block_in_place(|| fleet.stop())
}

/// One fault, from whole fleet to whole fleet. No stream is hit by a fault that struck after its end.
async fn strike(fleet: &Fleet, url: &str, kind: Kind, undisturbed: &[String]) -> anyhow::Result<Vec<Hit>> {
    let begun = async || begin(fleet, kind.copies, url, undisturbed.len()).await;
    let (workers, streams, homes) = eventually("all streams run at once", PATIENCE, begun).await?;
    let runs_any = |worker: &&Process| homes.contains(&worker.name);
    let victim = workers.iter().find(|worker| runs_any(worker) == kind.runs_them).context("there are such workers")?;
    let mut faults = Faults::new();
    let fault = if kind.is_frozen { Fault::Freeze(FROZEN) } else { Fault::Kill };
    let struck = Instant::now();
    tokio::task::block_in_place(|| faults.inject(fault, victim))?;
    ensure!(faults.bitten() == 1, "{} was gone before", victim.name);
    let back = async { if kind.is_frozen { Ok(None) } else { is_back(fleet, victim).await.map(Some) } };
    let ended = async {
        let mut ended = Vec::new();
        for stream in streams {
            ended.push(stream.end().await?);
        }
        anyhow::Ok(ended)
    };
    let (back, ended) = tokio::try_join!(back, ended)?;
    let hit = |(number, (pieces, home)): (usize, (Pieces, String))| {
        let (from, until) = pieces.longest_gap_after(struck)?;
        let stall = (until - from).saturating_sub(pieces.usual_gap_before(struck)?);
        let after_back = back.map(|back| until.saturating_duration_since(back.max(from)));
        let counts = !kind.runs_them || home == victim.name;
        counts.then(|| Hit { stall, after_back, is_same: pieces.text() == undisturbed[number] })
    };
    Ok(ended.into_iter().zip(homes).enumerate().filter_map(hit).collect())
}

/// Begins so many streams at a fleet at rest: its workers, the streams once they are under way, and the name of the worker
/// that runs each. Fails if one ends before the last is under way.
async fn begin(
    fleet: &Fleet,
    copies: u32,
    url: &str,
    count: usize,
) -> anyhow::Result<(Vec<Process>, Vec<Stream>, Vec<String>)> {
    let workers = at_rest(fleet, copies).await?;
    let (client, mut seen) = (client()?, Vec::new());
    for worker in &workers {
        seen.push((worker.name.clone(), worker.admin().await?));
    }
    let (mut streams, mut homes) = (Vec::new(), Vec::new());
    for number in 0..count {
        let before = running(&client, &seen).await?;
        let stream = Stream::begin(url, number).await?;
        homes.push(joined(&client, &seen, &before, &stream).await?);
        streams.push(stream);
    }
    for stream in &streams {
        stream.is_under_way().await?;
    }
    ensure!(!streams.iter().any(Stream::has_ended), "a stream ended before the last was under way");
    Ok((workers, streams, homes))
}

/// The workers, once each holds all that it is to hold, and nothing else, suspects nobody, and runs nothing.
async fn at_rest(fleet: &Fleet, copies: u32) -> anyhow::Result<Vec<Process>> {
    let client = client()?;
    let gauges = ["experts_held", "suspect_peers", "running_sequences"];
    let rest = eventually("the fleet comes to rest", PATIENCE, async || {
        let (workers, mut seen) = (fleet.workers(), Vec::new());
        for worker in &workers {
            seen.push(told(&client, &worker.admin().await?, &gauges).await?);
        }
        let held: f64 = seen.iter().filter_map(|told| told.first()).sum();
        let is_calm = seen.iter().all(|told| matches!(told[..], [_, suspects, running] if suspects + running == 0.0));
        ensure!(held == f64::from(EXPERTS * (1 + copies)) && is_calm, "{seen:?}");
        Ok(workers)
    });
    rest.await
}

/// The values of a worker's gauges.
async fn told(client: &Client, admin: &str, gauges: &[&str]) -> anyhow::Result<Vec<f64>> {
    let text = metrics_over(client, admin).await?;
    let value = |gauge: &&str| {
        let name = format!("modelfleet_worker_{gauge}");
        let line = text.lines().find(|line| line.starts_with(&name)).with_context(|| format!("{name} is told"))?;
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).with_context(|| format!("{line} has a number"))
    };
    gauges.iter().map(value).collect()
}

/// Sequences that run at each of the workers with these names and admin addresses.
async fn running(client: &Client, workers: &[(String, String)]) -> anyhow::Result<Vec<f64>> {
    let mut running = Vec::new();
    for (_, admin) in workers {
        running.extend(told(client, admin, &["running_sequences"]).await?);
    }
    Ok(running)
}

/// The name of the worker that runs a stream: it runs more than `before`.
async fn joined(
    client: &Client,
    workers: &[(String, String)],
    before: &[f64],
    stream: &Stream,
) -> anyhow::Result<String> {
    let home = eventually("a stream runs somewhere", PATIENCE, async || {
        let (has_ended, now) = (stream.has_ended(), running(client, workers).await?);
        let more = now.iter().zip(before).position(|(now, before)| now > before);
        ensure!(more.is_some() || has_ended, "{now:?}");
        Ok(more.map(|worker| workers[worker].0.clone()))
    });
    home.await?.context("a stream ended before it was seen to run")
}

/// When another process in the place of `victim` took requests.
async fn is_back(fleet: &Fleet, victim: &Process) -> anyhow::Result<Instant> {
    let is_back = |worker: &Process| worker.name == victim.name && worker.pid != victim.pid;
    let back = eventually("a killed worker is back", PATIENCE, async || {
        ensure!(fleet.workers().iter().any(is_back), "{}", victim.name);
        Ok(Instant::now())
    });
    back.await
}
