//! The exchange of expert rows, beside the least that its way can cost.
//!
//! `cargo bench -p worker --bench exchange` sends rows as wide as DeepSeek-V3's (7,168 values of bf16) to a holder on
//! loopback and waits for as many rows back, for 1, 8, 32 and 128 rows, in turn over:
//! - `framed TCP`: a length and the rows, echoed by a thread that does nothing else. The limit.
//! - `tonic stream`: the same messages as ours over a plain bidirectional stream of tonic, echoed.
//! - `over gRPC`, `in frames`: `MeshExchange` to `ExpertsService`, as workers do: rows gathered for the holder, checked,
//!   queued, computed by an expert one value wide, and put back in order. `compute` is that expert's part, measured alone,
//!   and `way` what is left of a round trip in frames without it.
//!
//! Each figure is the median of the rounds' medians, and the lowest and highest of these.

#[path = "exchange/model.rs"]
mod model;
#[path = "exchange/peers.rs"]
mod peers;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::ensure;
use engine::{Exchange as _, ExpertBatch, Experts, WireDtype};
use opentelemetry::metrics::noop::NoopMeterProvider;
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::service::Routes;
use tracing::Span;
use wire::{
    Services,
    proto::{self, experts_server::ExpertsServer},
};
use worker::{
    experts::{
        exchange::{MeshExchange, Own},
        pool::Pool,
        service::ExpertsService,
        standing::Board,
    },
    memory,
    mesh::{Mesh, Meshes},
    metrics::Metrics,
};

use self::peers::{Framed, Plain};

const ROWS: [usize; 4] = [1, 8, 32, 128];
const ROUNDS: usize = 5;
const WARM: usize = 50;
const TIMES: usize = 300;
const CONTENT: &str = "content";

fn main() -> anyhow::Result<()> {
    memory::keep_freed(); // as the worker does
    // The holder's side has threads of its own, as another process would.
    let (near, far) = (Runtime::new()?, Runtime::new()?);
    let folder = model::folder()?;
    let experts = model::experts(folder.path())?;
    let mut framed = Framed::start()?;
    let mut plain = near.block_on(Plain::start(&far))?;
    let mut over_grpc = near.block_on(Ours::start(&far, &experts, Way::Grpc))?;
    let mut in_frames = near.block_on(Ours::start(&far, &experts, Way::Frames))?;

    let columns = ["framed TCP", "tonic stream", "over gRPC", "in frames", "compute", "way"];
    println!("{:>5} {}", "rows", columns.map(|name| format!("{name:>24}")).join(" "));
    for rows in ROWS {
        let batch = Batch::of(rows);
        let mut rounds: [Vec<Duration>; 6] = Default::default();
        for round in 0..ROUNDS {
            rounds[0].push(median(|| framed.ask(&batch.rows))?);
            rounds[1].push(near.block_on(median_of(&mut plain, async |plain| plain.ask(&batch.rows).await))?);
            rounds[2].push(near.block_on(median_of(&mut over_grpc, async |ours| ours.ask(&batch).await))?);
            rounds[3].push(near.block_on(median_of(&mut in_frames, async |ours| ours.ask(&batch).await))?);
            rounds[4].push(median(|| compute(&experts, &batch))?);
            let way = rounds[3][round].saturating_sub(rounds[4][round]);
            rounds[5].push(way);
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
        Self {
            rows: (0..rows * model::HIDDEN).flat_map(value).collect(),
            pair_rows: (0..rows as u32).collect(),
            pair_experts: vec![0; rows],
        }
    }

    fn whole(&self) -> ExpertBatch<'_> {
        let (pair_rows, pair_experts) = (&self.pair_rows, &self.pair_experts);
        ExpertBatch { layer: model::LAYER, rows: &self.rows, pair_rows, pair_experts }
    }
}

/// How a holder can be asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Grpc,
    Frames,
}

/// A worker that holds nothing and asks one that holds everything.
struct Ours {
    exchange: MeshExchange,
}

impl Ours {
    async fn start(far: &Runtime, experts: &Arc<Experts>, way: Way) -> anyhow::Result<Self> {
        let metrics =
            || Metrics::new(&opentelemetry::metrics::MeterProvider::meter(&NoopMeterProvider::new(), "bench"));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let listener = listener.into_std()?;
        let service = ExpertsService::new(experts.clone(), Pool::start(experts, 1, metrics())?, CONTENT);
        let frames = Arc::new(service.frames());
        let service = ExpertsServer::new(service).max_decoding_message_size(wire::MAX_MESSAGE_BYTES);
        let grpc = Services::from(Routes::new(service));
        let services = if way == Way::Frames { grpc.with_frames(frames) } else { grpc };
        far.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener of tokio's stays one");
            wire::serve(listener, services, std::future::pending()).await
        });

        let holders = vec![proto::Holders { ordinals: vec![1] }; model::EXPERTS];
        let layers = vec![proto::LayerPlacement { layer: model::LAYER as u32, experts: holders }];
        let peer = proto::Peer { id: "holder".into(), address, ordinal: 1, loaded: true, ..Default::default() };
        let snapshot = proto::MeshSnapshot {
            version: Some(proto::Version { epoch: 1, sequence: 1 }),
            placement: Some(proto::Placement { shards: 2, layers }),
            peers: vec![peer],
            ..Default::default()
        };
        let meshes = Meshes::new(Mesh::default());
        meshes.take(snapshot).expect("the first one counts");
        let own =
            Own { replica: 0, ordinal: 0, content_hash: CONTENT.into(), hidden: model::HIDDEN, dtype: WireDtype::Bf16 };
        let mut ours = Self { exchange: MeshExchange::new(own, meshes, Board::new(metrics()), None, metrics()) };
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

fn compute(experts: &Experts, batch: &Batch) -> anyhow::Result<()> {
    ensure!(experts.run(&batch.whole())?.len() == batch.rows.len(), "rows are missing");
    Ok(())
}

/// The median time of a call.
fn median(mut call: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let mut times = Vec::with_capacity(TIMES);
    for turn in 0..WARM + TIMES {
        let begun = Instant::now();
        call()?;
        times.extend((turn >= WARM).then(|| begun.elapsed()));
    }
    Ok(middle(&mut times))
}

async fn median_of<T>(
    peer: &mut T,
    mut call: impl AsyncFnMut(&mut T) -> anyhow::Result<()>,
) -> anyhow::Result<Duration> {
    let mut times = Vec::with_capacity(TIMES);
    for turn in 0..WARM + TIMES {
        let begun = Instant::now();
        call(peer).await?;
        times.extend((turn >= WARM).then(|| begun.elapsed()));
    }
    Ok(middle(&mut times))
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
