//! Whether steps that go in two halves are worth it, by how far a holder is.
//!
//! `cargo bench -p worker --bench halves [-- FOLDER]` runs a model (tiny-r1) whose experts with odd numbers are at a
//! holder on loopback, behind a relay that hands on each byte a while later, as a network would. For 2, 16 and 128
//! sequences at once, tokens a second with steps that go:
//! - `whole`: a layer's rows leave together, and their answers are waited for;
//! - `halves`: while rows of one half travel, the other computes;
//! - `as timed`: the way that was faster, as workers do.
//!
//! Each figure is the median of the rounds, and the lowest and highest of these. Both workers share this machine's
//! cores.

#[path = "mesh/pair.rs"]
mod pair;

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use engine::{
    Engine as _, Event, Exchange, ExpertBatch, Held, LocalFiles, ModelEngine, Options, Replies, Request, Sampling,
};
use tokio::runtime::Runtime;
use tracing::Span;
use wire::proto;
use worker::{
    experts::exchange::{MeshExchange, Ticket},
    memory,
};

const TINY_R1: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/models/tiny-r1");
/// One way, µs.
const DELAYS: [u64; 4] = [0, 200, 1000, 5000];
const SEQUENCES: [usize; 3] = [2, 16, 128];
const PROMPT: usize = 8;
const ANSWER: usize = 64;
const ROUNDS: usize = 5;

fn main() -> anyhow::Result<()> {
    memory::keep_freed(); // as the worker does
    let (near, far) = (Runtime::new()?, Runtime::new()?);
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let folder = folder.map_or_else(|| PathBuf::from(TINY_R1), PathBuf::from);
    println!("{:>9} {:>9} {:>22} {:>22} {:>22}  to whole", "delay, us", "sequences", "whole", "halves", "as timed");
    for delay in DELAYS {
        let mut asker = near.block_on(Asker::start(&folder, &far, Duration::from_micros(delay)))?;
        for sequences in SEQUENCES {
            let ways = [Some(false), Some(true), None];
            let mut rates: [Vec<f64>; 3] = Default::default();
            for way in ways {
                near.block_on(asker.run(sequences, way))?; // warms up
            }
            for _ in 0..ROUNDS {
                for (rates, way) in rates.iter_mut().zip(ways) {
                    rates.push(near.block_on(asker.run(sequences, way))?);
                }
            }
            let cells = rates.each_mut().map(|rates| cell(rates));
            let ratio = |at: usize| rates[at][ROUNDS / 2] / rates[0][ROUNDS / 2];
            println!("{delay:>9} {sequences:>9} {}  {:.2} {:.2}", cells.join(" "), ratio(1), ratio(2));
        }
    }
    println!("tokens/s (lowest-highest of {ROUNDS} rounds), and of halves and as timed to whole");
    Ok(())
}

/// A worker with the experts of even numbers.
struct Asker {
    engine: ModelEngine,
    exchange: MeshExchange,
    vocabulary: u32,
}

impl Asker {
    async fn start(folder: &Path, far: &Runtime, delay: Duration) -> anyhow::Result<Self> {
        let most = SEQUENCES[SEQUENCES.len() - 1];
        let options = Options {
            kv_cache_tokens: most * (PROMPT + ANSWER).next_multiple_of(16),
            max_context_tokens: None,
            max_sequences: most,
            prefill_chunk: most * PROMPT,
        };
        let description = engine::describe(&LocalFiles(folder.into()))?;
        let held = |odd: u32| {
            let experts: BTreeSet<usize> = (odd as usize..description.experts as usize).step_by(2).collect();
            Held::from_layers(description.moe_layers.iter().map(|moe| (moe.layer as usize, experts.clone())).collect())
        };
        let holders = (0..description.experts as u32).map(|expert| proto::Holders { ordinals: vec![expert % 2] });
        let holders: Vec<_> = holders.collect();
        let layers = description.moe_layers.iter();
        let layers = layers.map(|moe| proto::LayerPlacement { layer: moe.layer as u32, experts: holders.clone() });
        let (_, theirs) = engine::load(folder, &held(1), &options, &mut |_, _| {})?;
        let address = relay(pair::holder(far, &theirs, true).await?, delay)?;
        let (engine, experts) = engine::load(folder, &held(0), &options, &mut |_, _| {})?;
        let exchange = pair::exchange(&experts, address, layers.collect());
        let vocabulary = engine.limits().vocab_size as u32;
        let mut asker = Self { engine, exchange, vocabulary };
        let connected = async {
            while asker.run(1, None).await.is_err() {
                asker.exchange.changed().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), connected).await?;
        Ok(asker)
    }

    /// Tokens a second of all sequences together, their prompts' step left out. `halves`: how steps go, if not as
    /// timed.
    async fn run(&mut self, sequences: usize, halves: Option<bool>) -> anyhow::Result<f64> {
        let prompt = |seed: u32| (0..PROMPT as u32).map(|at| (seed * 31 + at * 7 + 1) % self.vocabulary).collect();
        let request = |seed| Request {
            prompt: prompt(seed),
            generated: Vec::new(),
            max_tokens: ANSWER,
            stop_tokens: Vec::new(),
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            logprobs: None,
            prompt_logprobs: false,
        };
        for request in (0..sequences as u32).map(request).collect::<Vec<_>>() {
            self.engine.submit(request).context("it fits")?;
        }
        let (mut tokens, mut begun) = (0, None);
        while !self.engine.is_idle() {
            self.exchange.begin_step(Span::none());
            let events = self.engine.step(&mut Going { exchange: &mut self.exchange, halves }).await?;
            ensure!(self.exchange.end_step().is_none(), "an expert is missing");
            match begun {
                None => begun = Some(Instant::now()),
                Some(_) => tokens += events.iter().filter(|event| matches!(event, Event::Token { .. })).count(),
            }
        }
        Ok(tokens as f64 / begun.context("it ran")?.elapsed().as_secs_f64())
    }
}

/// The exchange, with steps that go one way.
struct Going<'a> {
    exchange: &'a mut MeshExchange,
    halves: Option<bool>,
}

impl Exchange for Going<'_> {
    type Ticket = Ticket;

    fn send(&mut self, batch: &ExpertBatch<'_>) -> Ticket {
        self.exchange.send(batch)
    }

    fn overlaps(&mut self, rows: usize) -> bool {
        self.halves.unwrap_or_else(|| self.exchange.overlaps(rows))
    }

    async fn join(&mut self, ticket: Ticket) -> Replies {
        self.exchange.join(ticket).await
    }
}

/// Hands on what comes to it to `address`, and back, each byte `delay` later; returns where it listens.
fn relay(address: String, delay: Duration) -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let here = listener.local_addr()?.to_string();
    thread::spawn(move || {
        for near in listener.incoming() {
            // a relay that cannot go on is noticed as a holder that is lost
            let Ok(near) = near else { return };
            let Ok(far) = TcpStream::connect(&address) else { return };
            let ends = [near.try_clone(), far.try_clone()];
            let [Ok(back_to), Ok(back_from)] = ends else { return };
            hand_on(near, far, delay);
            hand_on(back_from, back_to, delay);
        }
    });
    Ok(here)
}

fn hand_on(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            if sender.send((Instant::now() + delay, buffer[..read].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        let _ = to.set_nodelay(true); // else it only takes longer
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both); // it may have ended before
    });
}

fn cell(rates: &mut [f64]) -> String {
    rates.sort_by(f64::total_cmp);
    let (least, middle, most) = (rates[0], rates[rates.len() / 2], rates[rates.len() - 1]);
    format!("{:>22}", format!("{middle:.0} ({least:.0}-{most:.0})"))
}
