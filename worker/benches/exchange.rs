//! The exchange of expert rows, beside the least that its way can cost.
//!
//! `cargo bench -p worker --bench exchange` sends rows as wide as DeepSeek-V3's (7,168 values of bf16) to a holder on
//! loopback and waits for as many rows back, for 1, 8, 32 and 128 rows, in turn over:
//! - `framed TCP`: a length and the rows, echoed by a thread that does nothing else. The limit.
//! - `tonic stream`: the same messages as ours over a plain bidirectional stream of tonic, echoed.
//! - `over gRPC`, `in frames`: `MeshExchange` to `ExpertsService`, as workers do: rows gathered for the holder, checked,
//!   queued, computed by an expert one value wide, and put back in order. `compute` is that expert's part: what a round trip
//!   of framed TCP takes longer if the other end computes the rows with it, as this also takes the caches from whoever sends
//!   them. `way` is what is left of a round trip in frames without it.
//!
//! Each figure is the median of the rounds' medians, and the lowest and highest of these.

#[path = "exchange/model.rs"]
mod model;
#[path = "mesh/pair.rs"]
mod pair;
#[path = "exchange/peers.rs"]
mod peers;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::ensure;
use engine::{Exchange as _, ExpertBatch, Experts, WireDtype};
use tokio::runtime::Runtime;
use tracing::Span;
use wire::proto;
use worker::{experts::exchange::MeshExchange, memory};

use self::peers::{Framed, Plain};

const ROWS: [usize; 4] = [1, 8, 32, 128];
const ROUNDS: usize = 5;
/// The ways take short turns, so that whatever else the machine does slows all of them.
const TURNS: usize = 30;
const TIMES: usize = 10;

fn main() -> anyhow::Result<()> {
    memory::keep_freed(); // as the worker does
    // The holder's side has threads of its own, as another process would.
    let (near, far) = (Runtime::new()?, Runtime::new()?);
    let folder = model::folder()?;
    let experts = model::experts(folder.path())?;
    let mut framed = Framed::start(|rows| rows)?;
    let mut computing = {
        let experts = experts.clone();
        Framed::start(move |rows| compute(&experts, rows.into()).expect("its rows are whole"))?
    };
    let mut plain = near.block_on(Plain::start(&far))?;
    let mut over_grpc = near.block_on(Ours::start(&far, &experts, false))?;
    let mut in_frames = near.block_on(Ours::start(&far, &experts, true))?;

    let columns = ["framed TCP", "tonic stream", "over gRPC", "in frames", "compute", "way"];
    println!("{:>5} {}", "rows", columns.map(|name| format!("{name:>24}")).join(" "));
    for rows in ROWS {
        let batch = Batch::of(rows);
        let mut rounds: [Vec<Duration>; 6] = Default::default();
        for _ in 0..ROUNDS {
            let mut times: [Vec<Duration>; 5] = Default::default();
            for _ in 0..TURNS {
                let [bare, work, stream, grpc, frames] = &mut times;
                near.block_on(async {
                    turn(bare, async || framed.ask(&batch.rows)).await?;
                    turn(work, async || computing.ask(&batch.rows)).await?;
                    turn(stream, async || plain.ask(&batch.rows).await).await?;
                    turn(grpc, async || over_grpc.ask(&batch).await).await?;
                    turn(frames, async || in_frames.ask(&batch).await).await
                })?;
            }
            let [bare, work, stream, grpc, frames] = times.each_mut().map(|times| middle(times));
            let compute = work.saturating_sub(bare);
            let cells = [bare, stream, grpc, frames, compute, frames.saturating_sub(compute)];
            rounds.iter_mut().zip(cells).for_each(|(round, time)| round.push(time));
        }
        let limit = middle(&mut rounds[0]);
        let cells = rounds.iter_mut().map(|times| cell(times, limit));
        println!("{rows:>5} {}", cells.collect::<Vec<_>>().join(" "));
    }
    println!("us a round trip (lowest-highest of {ROUNDS} rounds), and as a multiple of framed TCP");
    Ok(())
}

/// Rows, each for one expert.
struct Batch {
    rows: bytes::Bytes,
    pair_rows: Vec<u32>,
    pair_experts: Vec<u32>,
}

impl Batch {
    fn of(rows: usize) -> Self {
        let value = |at: usize| half::bf16::from_f32((at % 251) as f32 / 251.0).to_le_bytes();
        Self::with((0..rows * model::HIDDEN).flat_map(value).collect())
    }

    fn with(rows: bytes::Bytes) -> Self {
        let number = rows.len() / (model::HIDDEN * WireDtype::Bf16.size());
        Self { rows, pair_rows: (0..number as u32).collect(), pair_experts: vec![0; number] }
    }

    fn whole(&self) -> ExpertBatch<'_> {
        let (pair_rows, pair_experts) = (&self.pair_rows, &self.pair_experts);
        ExpertBatch { layer: model::LAYER, rows: &self.rows, pair_rows, pair_experts }
    }
}

/// A worker that holds nothing and asks one that holds everything.
struct Ours {
    exchange: MeshExchange,
}

impl Ours {
    async fn start(far: &Runtime, experts: &Arc<Experts>, in_frames: bool) -> anyhow::Result<Self> {
        let address = pair::holder(far, experts, in_frames).await?;
        let holders = vec![proto::Holders { ordinals: vec![1] }; model::EXPERTS];
        let layers = vec![proto::LayerPlacement { layer: model::LAYER as u32, experts: holders }];
        let mut ours = Self { exchange: pair::exchange(experts, address, layers) };
        let batch = Batch::of(1);
        let connected = async {
            while ours.ask(&batch).await.is_err() {
                ours.exchange.changed().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), connected).await?;
        Ok(ours)
    }

    async fn ask(&mut self, batch: &Batch) -> anyhow::Result<()> {
        self.exchange.begin_step(Span::none());
        let ticket = self.exchange.send(&batch.whole());
        let replies = self.exchange.join(ticket).await;
        self.exchange.end_step();
        ensure!(replies.missing.is_empty() && replies.rows.len() == batch.rows.len(), "rows are missing");
        Ok(())
    }
}

/// What the expert makes of rows.
fn compute(experts: &Experts, rows: bytes::Bytes) -> anyhow::Result<Vec<u8>> {
    Ok(experts.run(&Batch::with(rows).whole())?)
}

/// A few calls, one after the other: the times of all but the first, which finds the caches of another way.
async fn turn(times: &mut Vec<Duration>, mut call: impl AsyncFnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    call().await?;
    for _ in 0..TIMES {
        let begun = Instant::now();
        call().await?;
        times.push(begun.elapsed());
    }
    Ok(())
}

fn middle(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn cell(times: &mut [Duration], limit: Duration) -> String {
    let (middle, micros) = (middle(times), |time: Duration| time.as_secs_f64() * 1e6);
    let (least, most) = (micros(times[0]), micros(times[times.len() - 1]));
    let ratio = middle.as_secs_f64() / limit.as_secs_f64();
    format!("{:>24}", format!("{:.0} ({least:.0}-{most:.0}) {ratio:.2}x", micros(middle)))
}
