//! Whatever goes wrong between workers, the answers are those of a run in which nothing did.
//!
//! Each run is a function of its plan. A random one is a function of its seed, which a failure prints; run it again with
//! `MODELFLEET_SEED=n`, or more of them with `MODELFLEET_SEEDS=2000`; every kind of fault at every message with
//! `MODELFLEET_ALL_FAULTS=1` (`cargo test -p worker faults`).

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use engine::{Exchange, ExpertBatch, Experts, Held, Replies, Request, Sampling};
use opentelemetry::metrics::MeterProvider as _;
use tokio::time::Duration;
use tracing::Span;
use wire::proto::{self, Holders, LayerPlacement, MeshSnapshot, Peer, ReplicaPlacement, Version};

use super::{
    exchange::{MeshExchange, Missing, Own, Ticket},
    overlap::Way,
    sim::{Fault, Net, Plan},
    standing::Board,
};
use crate::{
    drive::{Driver, Peers, Progress, Sequence},
    mesh::{Mesh, Meshes, Placement},
    metrics::Metrics,
};

/// The caller is ordinal 0 of replica 0; the holders are ordinals 1 and 2, and one worker of replica 1 that holds all.
const HOLDERS: [&str; 3] = ["one:1", "two:1", "other:1"];

pub(super) fn metrics() -> Arc<Metrics> {
    Metrics::new(&opentelemetry::metrics::noop::NoopMeterProvider::new().meter("test"))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1")
}

pub(super) fn load(held: &Held) -> (engine::ModelEngine, Arc<Experts>) {
    let options =
        engine::Options { kv_cache_tokens: 512, max_context_tokens: None, max_sequences: 8, prefill_chunk: 12 };
    engine::load(&folder(), held, &options, &mut |_, _| {}).unwrap()
}

/// How many workers of the caller's replica hold each expert, and whether another replica can help out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Copies {
    own: u32,
    other: bool,
}

const ALONE: Copies = Copies { own: 1, other: false };
const TWO: Copies = Copies { own: 2, other: false };
const OTHER: Copies = Copies { own: 1, other: true };

/// Expert `e` is at ordinal `1 + e % 2`, with two copies at both; few are with the caller.
fn placement(copies: Copies) -> proto::Placement {
    let ordinals = |expert: u32| match expert {
        0 | 5 => vec![0],
        _ => (0..copies.own).map(|copy| 1 + (expert + copy) % 2).collect(),
    };
    dealt(3, ordinals)
}

fn dealt(shards: u32, ordinals: impl Fn(u32) -> Vec<u32>) -> proto::Placement {
    let experts = || (0..16).map(|expert| Holders { ordinals: ordinals(expert) }).collect();
    proto::Placement { shards, layers: (1..4).map(|layer| LayerPlacement { layer, experts: experts() }).collect() }
}

fn mesh(copies: Copies, max_wait_ms: u64) -> MeshSnapshot {
    let peer = |(replica, ordinal, address): (u32, u32, &str)| Peer {
        id: address.into(),
        address: address.into(),
        replica,
        ordinal,
        loaded: true,
        running: true,
        ..Peer::default()
    };
    let [one, two, other] = HOLDERS;
    MeshSnapshot {
        version: Some(Version { epoch: 1, sequence: 1 }),
        placement: Some(placement(copies)),
        peers: [(0, 1, one), (0, 2, two), (1, 0, other)].map(peer).to_vec(),
        others: vec![ReplicaPlacement { replica: 1, placement: copies.other.then(|| dealt(1, |_| vec![0])) }],
        max_wait_ms,
        ..MeshSnapshot::default()
    }
}

/// The experts of each holder, read once for all runs.
fn holders(copies: Copies) -> Vec<(&'static str, Arc<Experts>)> {
    static ALL: OnceLock<BTreeMap<u32, Vec<Arc<Experts>>>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let of = |own: u32| {
            let placement = Placement::from(&placement(Copies { own, other: false }));
            [placement.held(1), placement.held(2), Held::all()].iter().map(|held| load(held).1).collect()
        };
        BTreeMap::from([(1, of(1)), (2, of(2))])
    });
    HOLDERS.into_iter().zip(all[&copies.own].iter().cloned()).collect()
}

pub(super) fn requests() -> Vec<Request> {
    let prompt = |seed: u32, length: u32| (0..length).map(|at| (at * 37 + seed * 11 + 3) % 500).collect();
    let request = |seed: u32, length, max_tokens| Request {
        prompt: prompt(seed, length),
        generated: Vec::new(),
        max_tokens,
        stop_tokens: Vec::new(),
        sampling: Sampling { temperature: 0.8, seed: u64::from(seed), ..Sampling::default() },
        logprobs: Some(2),
        prompt_logprobs: seed == 1,
    };
    vec![request(0, 3, 6), request(1, 15, 4), request(2, 1, 5)]
}

pub(super) struct Run {
    pub(super) answers: Vec<Vec<Progress>>,
    net: Net,
    took: Duration,
}

/// Who the caller is that holds these experts.
pub(super) fn own(experts: &Experts) -> Own {
    Own { replica: 0, ordinal: 0, content_hash: "content".into(), hidden: experts.hidden(), dtype: experts.dtype() }
}

/// All that happens to sequences, until they end.
pub(super) async fn gather(sequences: Vec<Sequence>) -> Vec<Vec<Progress>> {
    let mut answers = Vec::new();
    for mut sequence in sequences {
        let mut answer = Vec::new();
        while let Some(progress) = sequence.recv().await {
            answer.push(progress);
        }
        answers.push(answer);
    }
    answers
}

/// One generation of three sequences, in virtual time.
fn run(copies: Copies, max_wait_ms: u64, plan: Plan) -> Run {
    run_seen(copies, max_wait_ms, plan, metrics(), Span::none())
}

/// As [`run`], counted by `metrics` and traced below `span`.
fn run_seen(copies: Copies, max_wait_ms: u64, plan: Plan, metrics: Arc<Metrics>, span: Span) -> Run {
    run_on(mesh(copies, max_wait_ms), copies, plan, metrics, span, &requests(), Some(Way::Whole))
}

/// The caller's exchange, with steps that go this way, or as timed.
struct Going(MeshExchange, Option<Way>);

impl Exchange for Going {
    type Ticket = Ticket;

    fn send(&mut self, batch: &ExpertBatch<'_>) -> Ticket {
        self.0.send(batch)
    }

    fn overlaps(&mut self, rows: usize) -> bool {
        self.1.map_or_else(|| self.0.overlaps(rows), |way| way == Way::Halves)
    }

    async fn join(&mut self, ticket: Ticket) -> Replies {
        self.0.join(ticket).await
    }
}

impl Peers for Going {
    fn begin_step(&mut self, span: Span) {
        self.0.begin_step(span);
    }

    fn end_step(&mut self) -> Option<Missing> {
        self.0.end_step()
    }

    async fn changed(&mut self) {
        self.0.changed().await;
    }
}

/// As [`run_seen`], on this mesh, of these requests, with steps that go this way, or as timed.
fn run_on(
    snapshot: MeshSnapshot,
    copies: Copies,
    plan: Plan,
    metrics: Arc<Metrics>,
    span: Span,
    requests: &[Request],
    way: Option<Way>,
) -> Run {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let net = Net::new(&holders(copies), plan);
        let meshes = Meshes::new(Mesh::default());
        let (engine, experts) = load(&Placement::from(snapshot.placement.as_ref().unwrap()).held(0));
        meshes.take(snapshot).unwrap();
        let own = own(&experts);
        metrics.routed(&experts);
        let board = Board::new(metrics.clone());
        let exchange = MeshExchange::over(Arc::new(net.clone()), own, meshes, board, None, metrics.clone());
        let (driver, steps) = Driver::apart(engine, Going(exchange, way), metrics);
        let begun = tokio::time::Instant::now();
        let asked = async { gather(driver.submit(requests.to_vec(), span).await.unwrap()).await };
        let answers = tokio::select! {
            biased;
            answers = asked => answers,
            () = steps.run() => panic!("the engine ended"),
        };
        Run { answers, net, took: begun.elapsed() }
    })
}

pub(super) fn undisturbed() -> &'static Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(|| {
        let run = run(TWO, 0, Box::new(|_| None));
        let lengths: Vec<usize> = run.answers.iter().map(Vec::len).collect();
        assert_eq!(lengths, [7, 6, 6], "tokens, the end, and one prompt");
        run
    })
}

/// Runs with one fault at one call; the answers must be the undisturbed ones.
fn one_fault(copies: Copies, at: usize, fault: Fault) -> Run {
    let run = run(copies, 0, Box::new(move |call| (call == at).then_some(fault)));
    let bitten = run.net.bitten();
    assert_eq!(bitten, BTreeMap::from([(fault.name(), 1)]), "{copies:?}: {fault:?} at call {at}");
    assert!(run.answers == undisturbed().answers, "{copies:?}: {fault:?} at call {at} changed the answers");
    run
}

/// Every fault, with times that are too short to be noticed, and too long.
const FAULTS: [Fault; 13] = [
    Fault::DropCall,
    Fault::DropReply,
    Fault::DelayCall(3),
    Fault::DelayReply(400),
    Fault::DoubleCall,
    Fault::DoubleReply,
    Fault::KillBefore(30),
    Fault::KillAfter(2000),
    Fault::Freeze(10),
    Fault::Freeze(900),
    Fault::Reset,
    Fault::Busy,
    Fault::NotHeld,
];

#[test]
fn where_experts_are_changes_no_bit() {
    let alone = {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (driver, steps) = Driver::apart(load(&Held::all()).0, engine::NoPeers, metrics());
            let asked = async { gather(driver.submit(requests(), Span::none()).await.unwrap()).await };
            tokio::select! {
                answers = asked => answers,
                () = steps.run() => panic!("the engine ended"),
            }
        })
    };
    for copies in [ALONE, TWO, OTHER] {
        let run =
            |way| run_on(mesh(copies, 0), copies, Box::new(|_| None), metrics(), Span::none(), &requests(), Some(way));
        let [whole, halves] = [Way::Whole, Way::Halves].map(run);
        assert!(whole.answers == alone && halves.answers == alone, "{copies:?}");
        assert!(whole.net.calls() > 0 && halves.net.calls() > whole.net.calls());
        assert!(whole.net.bitten().is_empty() && halves.net.bitten().is_empty());
    }
}

#[test]
fn a_holder_that_leaves_is_asked_only_for_what_no_other_has() {
    for copies in [TWO, ALONE] {
        let mut snapshot = mesh(copies, 0);
        snapshot.peers[1].leaving = true;
        let run = run_on(snapshot, copies, Box::new(|_| None), metrics(), Span::none(), &requests(), Some(Way::Whole));
        assert!(run.answers == undisturbed().answers, "{copies:?}");
        assert_eq!(run.net.calls_to(HOLDERS[1]) == 0, copies == TWO, "{copies:?}");
    }
}

/// Calls are numbered over layers and steps, so this is each fault at each layer of each step, before and after.
#[test]
fn one_fault_at_each_layer_and_step_changes_no_bit() {
    for copies in [ALONE, TWO, OTHER] {
        let calls = run(copies, 0, Box::new(|_| None)).net.calls();
        assert!(calls >= 3 * 6, "{calls} calls in three layers and at least six steps");
        for at in 0..calls {
            // one kind at each call, in turn; with the variable, all of them
            let all = std::env::var_os("MODELFLEET_ALL_FAULTS").is_some();
            let kinds = if all { &FAULTS[..] } else { &FAULTS[at % FAULTS.len()..][..1] };
            kinds.iter().for_each(|&fault| drop(one_fault(copies, at, fault)));
        }
    }
}

#[test]
fn each_kind_of_fault_at_each_of_some_calls_changes_no_bit() {
    for copies in [ALONE, TWO] {
        for fault in FAULTS {
            for at in [0, 7] {
                one_fault(copies, at, fault);
            }
        }
    }
}

#[test]
fn with_a_copy_a_loss_is_hardly_felt() {
    let usual = undisturbed().took;
    for at in 0..6 {
        let killed = one_fault(TWO, at, Fault::KillBefore(60_000)).took.saturating_sub(usual);
        assert!(killed < Duration::from_millis(200), "a killed holder cost {killed:?}");
        for at in [at, at + 12] {
            // the first ones may take long, as nothing is known of their holders
            let frozen = one_fault(TWO, at, Fault::Freeze(60_000)).took.saturating_sub(usual);
            assert!(frozen < Duration::from_millis(200), "a frozen holder cost {frozen:?}");
        }
        let other = one_fault(OTHER, at, Fault::KillBefore(60_000)).took.saturating_sub(usual);
        assert!(other < Duration::from_millis(200), "another replica helped out after {other:?}");
    }
}

#[test]
fn without_a_copy_sequences_wait_until_the_holder_is_back() {
    for fault in [Fault::KillBefore(20_000), Fault::KillAfter(20_000), Fault::Freeze(20_000)] {
        let took = one_fault(ALONE, 5, fault).took;
        let wait = Duration::from_secs(20)..Duration::from_secs(22);
        assert!(wait.contains(&took), "{fault:?}: {took:?}");
    }
}

#[test]
fn a_slow_holder_without_a_copy_is_waited_for() {
    let slow: Plan = Box::new(|_| Some(Fault::DelayReply(3000)));
    let run = run(ALONE, 0, slow);
    assert!(run.answers == undisturbed().answers);
    assert!(run.net.bitten()["delay reply"] >= 18);
}

#[test]
fn an_answer_that_comes_late_counts_if_the_other_copy_is_lost_too() {
    let usual = undisturbed().took;
    // the first holder is late, and again if it is asked again; whoever is asked instead is never heard again
    let mut late_since = None;
    let plan: Plan = Box::new(move |call| match call {
        19 => {
            late_since = Some(tokio::time::Instant::now());
            Some(Fault::DelayReply(400))
        }
        20 => Some(Fault::Freeze(60_000)),
        _ => late_since.is_some_and(|at| at.elapsed() < Duration::from_millis(400)).then_some(Fault::DelayReply(400)),
    });
    let run = run(TWO, 0, plan);
    assert_eq!(run.net.bitten()["freeze"], 1);
    assert!(run.answers == undisturbed().answers);
    let cost = run.took.saturating_sub(usual);
    assert!(cost < Duration::from_millis(500), "the late answer was there after 400 ms; it cost {cost:?}");
}

#[test]
fn who_waits_too_long_is_told_which_expert_nobody_held() {
    let run = run(ALONE, 1500, Box::new(|call| (call == 4).then_some(Fault::KillBefore(60_000))));
    assert_eq!(run.net.bitten(), BTreeMap::from([("kill before", 1)]));
    let failed: Vec<&String> = run
        .answers
        .iter()
        .filter_map(|answer| match answer.last() {
            Some(Progress::Failed(message)) => Some(message),
            _ => None,
        })
        .collect();
    assert!(!failed.is_empty(), "sixty seconds are longer than one and a half");
    for message in failed {
        assert!(message.contains("of layer") && message.contains("for 1.5 s"), "{message}");
    }
    assert!(run.took < Duration::from_secs(4), "{:?}", run.took); // each sequence waits on its own
    for (answer, wanted) in run.answers.iter().zip(&undisturbed().answers) {
        let good = answer.iter().filter(|progress| !matches!(progress, Progress::Failed(_)));
        assert!(good.zip(wanted).all(|(one, other)| one == other), "what came before was right");
    }
}

/// A number for each seed and call, that does not depend on the order in which it is asked for.
fn draw(seed: u64, call: usize, what: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (seed, call, what).hash(&mut hasher);
    hasher.finish()
}

fn random(seed: u64) -> (Copies, Plan) {
    let copies = [ALONE, TWO, OTHER][(draw(seed, 0, 0) % 3) as usize];
    let often = 3 + draw(seed, 0, 1) % 20;
    let last = 200; // then it is quiet, so that every run ends
    let plan: Plan = Box::new(move |call| {
        let bites = call < last && draw(seed, call, 2).is_multiple_of(often);
        let ms = draw(seed, call, 3) % if draw(seed, call, 4).is_multiple_of(4) { 3000 } else { 60 };
        let kinds = [
            Fault::DropCall,
            Fault::DropReply,
            Fault::DelayCall(ms),
            Fault::DelayReply(ms),
            Fault::DoubleCall,
            Fault::DoubleReply,
            Fault::KillBefore(ms),
            Fault::KillAfter(ms),
            Fault::Freeze(ms),
            Fault::Reset,
            Fault::Busy,
            Fault::NotHeld,
        ];
        bites.then(|| kinds[(draw(seed, call, 5) % kinds.len() as u64) as usize])
    });
    (copies, plan)
}

fn one_seed(seed: u64) -> Run {
    let (copies, plan) = random(seed);
    let way = if draw(seed, 0, 6).is_multiple_of(2) { Way::Whole } else { Way::Halves };
    let run = run_on(mesh(copies, 600_000), copies, plan, metrics(), Span::none(), &requests(), Some(way));
    let ends: Vec<_> = run.answers.iter().map(|answer| (answer.len(), answer.last())).collect();
    assert!(run.answers == undisturbed().answers, "{copies:?}, {way:?}: the answers differ; they end with {ends:?}");
    run
}

#[test]
fn random_faults_change_no_bit() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    let seeds = match (number("MODELFLEET_SEED"), number("MODELFLEET_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, seeds) => 0..seeds.unwrap_or(200),
    };
    let single = seeds.end - seeds.start == 1;
    let mut bitten: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in seeds {
        match std::panic::catch_unwind(AssertUnwindSafe(|| one_seed(seed))) {
            Ok(run) => run.net.bitten().into_iter().for_each(|(kind, count)| *bitten.entry(kind).or_default() += count),
            Err(_) => panic!("seed {seed} failed: run MODELFLEET_SEED={seed} cargo test -p worker random_faults"),
        }
    }
    println!("faults that bit: {bitten:?}");
    assert!(single || bitten.len() == 12, "each kind of fault happened: {bitten:?}");
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 0..6 {
        let (one, other) = (one_seed(seed), one_seed(seed));
        assert_eq!((one.net.calls(), one.net.bitten(), one.took), (other.net.calls(), other.net.bitten(), other.took));
    }
}

#[test]
fn what_goes_wrong_is_counted() {
    let (registry, provider) = counted();
    let metrics = Metrics::new(&provider.meter("test"));
    let plan: Plan = Box::new(|call| match call {
        1 => Some(Fault::Busy),
        5 => Some(Fault::KillBefore(60_000)),
        _ => None,
    });
    let run = run_seen(OTHER, 0, plan, metrics, Span::none());
    assert_eq!(run.net.bitten().len(), 2);
    for (name, label) in [
        ("modelfleet_worker_expert_resent_rows_total{", "reason=\"lost\""),
        ("modelfleet_worker_expert_resent_rows_total{", "reason=\"busy\""),
        ("modelfleet_worker_expert_bytes_total{", "direction=\"sent\""),
        ("modelfleet_worker_expert_bytes_total{", "direction=\"received\""),
        ("modelfleet_worker_expert_wait_duration_seconds_count", ""),
        ("modelfleet_worker_routed_rows_total{", "layer=\"1\""),
        ("modelfleet_worker_busiest_expert_rows_total{", "layer=\"3\""),
    ] {
        assert!(value(&registry, name, label) > 0.0, "{name} {label} is not counted");
    }
    assert_eq!(value(&registry, "modelfleet_worker_peer_suspicions_total", ""), 1.0);
    assert_eq!(value(&registry, "modelfleet_worker_suspect_peers", ""), 0.0, "who is gone from the mesh is no suspect");
}

#[test]
fn steps_that_wait_are_timed_and_tried_in_halves() {
    let (registry, provider) = counted();
    let metrics = Metrics::new(&provider.meter("test"));
    let long = requests().into_iter().map(|request| Request { max_tokens: 40, ..request }).collect::<Vec<_>>();
    run_on(mesh(ALONE, 0), ALONE, Box::new(|_| None), metrics, Span::none(), &long, None);
    let steps = |parts| value(&registry, "modelfleet_worker_steps_total", parts);
    // computing takes no time here, so halves win nothing
    assert_eq!(steps("parts=\"2\""), 9.0);
    assert!(steps("parts=\"1\"") > 20.0);
}

#[test]
fn a_holder_that_had_no_time_to_answer_is_no_suspect() {
    for (max_wait_ms, suspicions) in [(20, 0.0), (60_000, 1.0)] {
        let (registry, provider) = counted();
        let plan: Plan = Box::new(|call| (call == 1).then_some(Fault::DropReply));
        let run = run_seen(ALONE, max_wait_ms, plan, Metrics::new(&provider.meter("test")), Span::none());
        assert_eq!(run.net.bitten().len(), 1);
        assert_eq!(value(&registry, "modelfleet_worker_peer_suspicions_total", ""), suspicions, "{max_wait_ms} ms");
    }
}

/// Runs something with an exchange on this mesh, in virtual time.
fn exchange<F: Future<Output = ()>>(snapshot: MeshSnapshot, plan: Plan, run: impl FnOnce(MeshExchange, Net) -> F) {
    exchange_seen(snapshot, plan, metrics(), run);
}

/// As [`exchange`], counted by `metrics`.
fn exchange_seen<F: Future<Output = ()>>(
    snapshot: MeshSnapshot,
    plan: Plan,
    metrics: Arc<Metrics>,
    run: impl FnOnce(MeshExchange, Net) -> F,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let (meshes, holders) = (Meshes::new(Mesh::default()), holders(TWO));
        meshes.take(snapshot).unwrap();
        let (net, own) = (Net::new(&holders, plan), own(&holders[0].1));
        let network = Arc::new(net.clone());
        let mut exchange = MeshExchange::over(network, own, meshes, Board::new(metrics.clone()), None, metrics);
        exchange.begin_step(Span::none());
        while tokio::time::timeout(Duration::from_millis(10), exchange.changed()).await.is_ok() {} // streams open
        run(exchange, net).await;
    });
}

/// Sends one row, of zeros, to one expert.
fn row(exchange: &mut MeshExchange, expert: u32) -> Ticket {
    exchange.send(&ExpertBatch { layer: 1, rows: &vec![0; 512].into(), pair_rows: &[0], pair_experts: &[expert] })
}

/// Three holders, of which the first has the expert 2 alone, and the others all the rest.
fn three() -> MeshSnapshot {
    let mut snapshot = mesh(TWO, 0);
    (snapshot.peers[2].replica, snapshot.peers[2].ordinal) = (0, 3);
    snapshot.placement = Some(dealt(4, |expert| if expert == 2 { vec![1] } else { vec![2, 3] }));
    snapshot
}

#[test]
fn who_is_late_with_rows_that_came_otherwise_is_no_suspect() {
    let (registry, provider) = counted();
    // the second row's holder is late, but answers before the other copy does; the first row's answers after both
    let faults = [Fault::Freeze(400), Fault::DelayReply(70), Fault::DelayReply(300)];
    let plan: Plan = Box::new(move |call| Some(faults[call.checked_sub(16)?]));
    exchange_seen(three(), plan, Metrics::new(&provider.meter("test")), async |mut exchange, net| {
        for _ in 0..8 {
            // both become known, so that 50 ms are late
            let (rows, pair_rows) = (vec![0; 512 * 16].into(), Vec::from_iter(0..16));
            let batch = ExpertBatch { layer: 1, rows: &rows, pair_rows: &pair_rows, pair_experts: &[3; 16] };
            let ticket = exchange.send(&batch);
            exchange.join(ticket).await;
        }
        assert_eq!(net.calls(), 16);
        let (first, second) = (row(&mut exchange, 2), row(&mut exchange, 3));
        assert!(exchange.join(first).await.missing.is_empty() && exchange.join(second).await.missing.is_empty());
        assert_eq!(net.calls(), 19);
    });
    assert_eq!(value(&registry, "modelfleet_worker_peer_suspicions_total", ""), 2.0);
}

#[test]
fn a_batch_that_is_not_waited_for_yet_is_looked_after() {
    let plan: Plan = Box::new(|call| [Fault::DelayReply(300), Fault::DropCall].get(call).copied());
    exchange(three(), plan, async |mut exchange, net| {
        let (first, second) = (row(&mut exchange, 2), row(&mut exchange, 3));
        assert!(exchange.join(first).await.missing.is_empty());
        let (calls, now) = (net.calls(), tokio::time::Instant::now());
        assert!(exchange.join(second).await.missing.is_empty());
        assert_eq!(now.elapsed(), Duration::ZERO, "it was sent again while the first was waited for");
        assert_eq!((net.calls(), net.bitten().len()), (calls, 2));
    });
}

#[test]
fn an_answer_counts_that_comes_while_another_batch_is_waited_for_though_its_holder_was_silent() {
    let mut snapshot = mesh(TWO, 0);
    snapshot.placement = Some(dealt(3, |expert| vec![1 + expert % 2]));
    let plan: Plan = Box::new(|call| Some(if call == 1 { Fault::Freeze(1000) } else { Fault::DelayReply(2000) }));
    exchange(snapshot, plan, async |mut exchange, net| {
        let (first, second) = (row(&mut exchange, 2), row(&mut exchange, 3));
        assert!(exchange.join(first).await.missing.is_empty());
        assert!(exchange.join(second).await.missing.is_empty());
        assert_eq!(net.calls_to(HOLDERS[1]), 1);
    });
}

#[test]
fn nothing_more_is_sent_for_a_step_that_was_given_up() {
    let plan: Plan = Box::new(|call| [Fault::DropCall, Fault::DelayReply(300)].get(call).copied());
    exchange(mesh(ALONE, 0), plan, async |mut exchange, net| {
        drop(row(&mut exchange, 1));
        exchange.begin_step(Span::none());
        let second = row(&mut exchange, 2);
        assert!(exchange.join(second).await.missing.is_empty());
        assert_eq!((net.calls_to(HOLDERS[1]), net.bitten().len()), (1, 2));
    });
}

#[test]
fn steps_that_lacked_an_expert_do_not_count() {
    for (fault, lacks) in [(Some(Fault::DropCall), true), (None, false)] {
        exchange(mesh(ALONE, 20), Box::new(move |_| fault), async |mut exchange, _| {
            let mut tries_halves = false;
            for _ in 0..20 {
                exchange.begin_step(Span::none());
                tries_halves |= exchange.overlaps(8);
                let ticket = row(&mut exchange, 2);
                exchange.join(ticket).await;
                assert_eq!(exchange.end_step().is_some(), lacks);
            }
            assert_eq!(tries_halves, !lacks, "lacking steps must not count");
        });
    }
}

/// Where metrics are counted and can be read, while the provider lives.
fn counted() -> (prometheus::Registry, opentelemetry_sdk::metrics::SdkMeterProvider) {
    let registry = prometheus::Registry::new();
    let exporter = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().unwrap();
    let provider = opentelemetry_sdk::metrics::SdkMeterProvider::builder().with_reader(exporter).build();
    (registry, provider)
}

/// The sum of what is counted under a name, with a label.
fn value(registry: &prometheus::Registry, name: &str, label: &str) -> f64 {
    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
    let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// The names of the spans around each event that was seen.
#[derive(Clone, Default)]
struct Seen(Arc<std::sync::Mutex<Vec<Event>>>);

type Event = (String, Vec<&'static str>);

impl<S> tracing_subscriber::Layer<S> for Seen
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    fn on_event(&self, event: &tracing::Event<'_>, context: tracing_subscriber::layer::Context<'_, S>) {
        struct Message(String);
        impl tracing::field::Visit for Message {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        let spans = context.event_scope(event).into_iter().flatten().map(|span| span.name()).collect();
        self.0.lock().unwrap().push((message.0, spans));
    }
}

#[test]
fn rows_that_are_sent_again_are_an_event_of_their_call() {
    use tracing_subscriber::layer::SubscriberExt as _;
    let seen = Seen::default();
    let run = tracing::subscriber::with_default(tracing_subscriber::registry().with(seen.clone()), || {
        let plan: Plan = Box::new(|call| (call == 2).then_some(Fault::Reset));
        run_seen(TWO, 0, plan, metrics(), tracing::info_span!("request"))
    });
    assert!(run.answers == undisturbed().answers);
    let events = seen.0.lock().unwrap();
    let again: Vec<_> = events.iter().filter(|(message, _)| message == "sent again").collect();
    assert!(!again.is_empty(), "{events:?}");
    assert!(again.iter().all(|(_, spans)| spans == &["experts.run", "request"]), "{again:?}");
}
