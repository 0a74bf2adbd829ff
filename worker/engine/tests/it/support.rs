//! Models, meshes in one process, and what a run of an engine gave.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::{Future, ready};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use engine::{
    Engine, Event, Exchange, ExpertBatch, Experts, Finish, Held, ModelEngine, NoPeers, Options, Replies, Request,
    Sampling, SequenceId, TokenLogprob, load,
};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use tempfile::TempDir;

/// The folder of a model: tiny-r1 of the examples, else a fixture.
pub(crate) fn model(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    match name {
        "tiny-r1" => root.join("../../manifests/models/tiny-r1"),
        _ => root.join("tests/fixtures").join(name),
    }
}

/// A file of the fixtures.
pub(crate) fn fixture(path: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)).unwrap()
}

/// A copy of a model whose weights are f32, so that nothing is rounded on the way to experts.
pub(crate) fn widened(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let wide: Vec<(String, Vec<usize>, Vec<u8>)> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_string(), view.shape().to_vec(), wide(&view)))
        .collect();
    let view = |shape: &Vec<usize>, bytes| TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
    let views = wide.iter().map(|(name, shape, bytes)| (name, view(shape, bytes)));
    serialize_to_file(views, None, &copy.path().join("model.safetensors")).unwrap();
    fs::copy(dir.join("config.json"), copy.path().join("config.json")).unwrap();
    copy
}

fn wide(view: &TensorView<'_>) -> Vec<u8> {
    let pairs = view.data().as_chunks::<2>().0.iter();
    match view.dtype() {
        Dtype::BF16 => pairs.flat_map(|b| bf16::from_le_bytes(*b).to_f32().to_le_bytes()).collect(),
        Dtype::F16 => pairs.flat_map(|b| f16::from_le_bytes(*b).to_f32().to_le_bytes()).collect(),
        _ => view.data().to_vec(),
    }
}

/// Room for everything, the prompt in one piece.
pub(crate) fn options() -> Options {
    Options { kv_cache_tokens: 4096, max_context_tokens: None, max_sequences: 16, prefill_chunk: 1024 }
}

/// A greedy request.
pub(crate) fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        generated: Vec::new(),
        max_tokens,
        stop_tokens: vec![1],
        sampling: Sampling::default(),
        logprobs: None,
        prompt_logprobs: false,
    }
}

/// A request for everything that an engine can tell, so that equal answers mean equal logits.
pub(crate) fn telling(prompt: &[u32], max_tokens: usize) -> Request {
    Request { logprobs: Some(usize::MAX), prompt_logprobs: true, ..greedy(prompt, max_tokens) }
}

/// The whole model in one process.
pub(crate) fn whole(dir: &Path, options: &Options) -> ModelEngine {
    load(dir, &Held::all(), options, &mut |_, _| {}).unwrap().0
}

/// A worker among others: its engine and the way to the others' experts.
pub(crate) struct Member {
    pub(crate) engine: ModelEngine,
    pub(crate) experts: Arc<Experts>,
    pub(crate) mesh: Mesh,
}

/// Experts of all workers in one process. Can lose answers.
#[derive(Default)]
pub(crate) struct Mesh {
    holders: Vec<Arc<Experts>>,
    /// Counts down to each answer that gets lost.
    pub(crate) lose_every: Option<usize>,
    pub(crate) sent: usize,
    pub(crate) lost: usize,
    /// Whether steps go in halves.
    pub(crate) halves: bool,
    on_their_way: usize,
    /// Batches that were on their way at once.
    pub(crate) most: usize,
}

impl Exchange for Mesh {
    type Ticket = Replies;

    fn send(&mut self, batch: &ExpertBatch<'_>) -> Replies {
        let (mut rows, mut missing) = (Vec::new(), Vec::new());
        for (pair, (&row, &expert)) in batch.pair_rows.iter().zip(batch.pair_experts).enumerate() {
            self.sent += 1;
            let held = |holder: &&Arc<Experts>| holder.holds(batch.layer, expert as usize);
            let holder = self.holders.iter().find(held).expect("every expert has a holder");
            let one = ExpertBatch { pair_rows: &[row], pair_experts: &[expert], ..*batch };
            let mut answer = holder.run(&one).unwrap();
            if self.lose_every.is_some_and(|every| self.sent.is_multiple_of(every)) {
                answer.fill(0xff); // whatever comes in place of a lost row must not matter
                missing.push(pair as u32);
                self.lost += 1;
            }
            rows.extend(answer);
        }
        self.on_their_way += 1;
        self.most = self.most.max(self.on_their_way);
        Replies { rows: rows.into(), missing }
    }

    fn overlaps(&mut self, _: usize) -> bool {
        self.halves
    }

    fn join(&mut self, replies: Replies) -> impl Future<Output = Replies> {
        self.on_their_way -= 1;
        ready(replies)
    }
}

impl Mesh {
    /// One more that may be asked.
    pub(crate) fn hold_too(&mut self, experts: Arc<Experts>) {
        self.holders.push(experts);
    }
}

/// The experts of `shard` of `shards`: every `shards`-th one.
pub(crate) fn share(dir: &Path, shard: usize, shards: usize) -> Held {
    let description = engine::describe(&engine::LocalFiles(dir.into())).unwrap();
    let experts: BTreeSet<usize> = (shard..description.experts as usize).step_by(shards).collect();
    let layers = description.moe_layers.iter().map(|moe| (moe.layer as usize, experts.clone()));
    Held::from_layers(layers.collect())
}

/// All workers of a model whose experts are parted.
pub(crate) fn sharded(dir: &Path, shards: usize, options: &Options) -> Vec<Member> {
    let load = |shard| load(dir, &share(dir, shard, shards), options, &mut |_, _| {}).unwrap();
    let loaded: Vec<_> = (0..shards).map(load).collect();
    let holders: Vec<Arc<Experts>> = loaded.iter().map(|(_, experts)| experts.clone()).collect();
    let member =
        |(engine, experts)| Member { engine, experts, mesh: Mesh { holders: holders.clone(), ..Mesh::default() } };
    loaded.into_iter().map(member).collect()
}

/// What came of one request.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    pub(crate) prompt: Vec<Option<TokenLogprob>>,
    pub(crate) finish: Option<Finish>,
}

/// Runs a future that is never pending for long.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
    }
}

/// Runs one step and adds its events to the answers.
pub(crate) fn step<N: Engine, E: Exchange>(
    engine: &mut N,
    exchange: &mut E,
    answers: &mut BTreeMap<SequenceId, Answer>,
) {
    for event in block_on(engine.step(exchange)).unwrap() {
        match event {
            Event::Token { sequence, token, logprob } => {
                let answer = answers.entry(sequence).or_default();
                answer.tokens.push(token);
                answer.logprobs.extend(logprob);
            }
            Event::Prompt { sequence, logprobs } => {
                answers.entry(sequence).or_default().prompt = logprobs;
            }
            Event::Finished { sequence, reason } => {
                let before = answers.entry(sequence).or_default().finish.replace(reason);
                assert_eq!(before, None, "a sequence ended twice");
            }
            Event::Failed { error, .. } => panic!("{error}"),
        }
    }
}

/// Answers all requests, submitted at once.
pub(crate) fn ask<N: Engine, E: Exchange>(engine: &mut N, exchange: &mut E, requests: &[Request]) -> Vec<Answer> {
    let submitted = requests.iter().map(|request| engine.submit(request.clone()).unwrap());
    let ids: Vec<SequenceId> = submitted.collect();
    let mut answers: BTreeMap<SequenceId, Answer> = BTreeMap::new();
    for _ in 0..20_000 {
        if engine.is_idle() {
            let load = engine.load();
            assert_eq!((load.running, load.waiting, load.kv_tokens_used), (0, 0, 0));
            return ids.iter().map(|id| answers[id].clone()).collect();
        }
        step(engine, exchange, &mut answers);
    }
    panic!("the engine does not come to an end");
}

/// Answers one request alone on a whole model.
pub(crate) fn ask_alone(engine: &mut ModelEngine, request: &Request) -> Answer {
    ask(engine, &mut NoPeers, std::slice::from_ref(request)).remove(0)
}

/// Eight different requests: lengths, sampling and demands differ.
pub(crate) fn company(vocab: u32) -> Vec<Request> {
    (0..8)
        .map(|index: u32| {
            let prompt: Vec<u32> = (0..3 + 7 * index).map(|at| (at * 37 + index * 11) % vocab).collect();
            let sampling = Sampling {
                temperature: if index.is_multiple_of(2) { 0.0 } else { 0.9 },
                top_p: 0.95,
                frequency_penalty: 0.1 * index as f32,
                seed: 7,
                stream: u64::from(index),
                ..Sampling::default()
            };
            let telling = telling(&prompt, 6 + index as usize);
            Request { sampling, stop_tokens: Vec::new(), ..telling }
        })
        .collect()
}
