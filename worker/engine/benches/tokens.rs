//! Tokens a second of a model: `cargo bench -p engine --bench tokens [-- FOLDER [REQUESTS PROMPT ANSWER]]`.
//!
//! One line for each load: requests at once, tokens of each prompt and of each answer, and tokens a second of all of them
//! together, until each request has its first token and after that. `-- models FOLDER` writes the models of
//! `tests/bench/bits` instead.

#[path = "tokens/model.rs"]
mod model;

use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use engine::{Engine, Event, Held, ModelEngine, NoPeers, Options, Request, Sampling, load};

const TINY_R1: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../manifests/models/tiny-r1");
const LOADS: [Load; 4] = [Load::new(1, 64, 256), Load::new(8, 64, 256), Load::new(32, 64, 256), Load::new(1, 960, 1)];
/// How long a load runs, at least.
const ENOUGH: Duration = Duration::from_secs(1);

#[derive(Clone, Copy)]
struct Load {
    requests: usize,
    prompt: usize,
    answer: usize,
}

impl Load {
    const fn new(requests: usize, prompt: usize, answer: usize) -> Self {
        Load { requests, prompt, answer }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let numbers = arguments.iter().skip(1).map(|number| number.parse());
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["models", folder] => model::write_all(TINY_R1.as_ref(), folder.as_ref()),
        [folder, _, _, _] => {
            let numbers: Vec<usize> = numbers.collect::<Result<_, _>>()?;
            measure(folder.as_ref(), &[Load::new(numbers[0], numbers[1], numbers[2])])
        }
        [folder] => measure(folder.as_ref(), &LOADS),
        _ => measure(TINY_R1.as_ref(), &LOADS),
    }
}

fn measure(folder: &Path, loads: &[Load]) -> Result<(), Box<dyn Error>> {
    println!("requests  prompt  answer  prefill tokens/s  decode tokens/s");
    for &of in loads {
        let options = Options {
            kv_cache_tokens: of.requests * (of.prompt + of.answer).next_multiple_of(16),
            max_context_tokens: None,
            max_sequences: of.requests,
            prefill_chunk: 512,
        };
        let (mut engine, _) = load(folder, &Held::all(), &options, &mut |_, _| {})?;
        run(&mut engine, Load { prompt: of.prompt.min(16), answer: of.answer.min(8), ..of })?; // warms up
        let (mut runs, mut sum) = (0, Ran::default());
        while sum.prefill + sum.decode < ENOUGH {
            let ran = run(&mut engine, of)?;
            runs += 1;
            sum.prefill += ran.prefill;
            sum.decode += ran.decode;
            sum.decoded += ran.decoded;
        }
        let prefill = (runs * of.requests * of.prompt) as f64 / sum.prefill.as_secs_f64();
        let decode = sum.decoded as f64 / sum.decode.as_secs_f64();
        println!("{:8}  {:6}  {:6}  {prefill:16.1}  {decode:15.1}", of.requests, of.prompt, of.answer);
    }
    Ok(())
}

#[derive(Default)]
struct Ran {
    /// Until each request has its first token.
    prefill: Duration,
    /// After that.
    decode: Duration,
    /// Tokens after that.
    decoded: usize,
}

fn run(engine: &mut ModelEngine, of: Load) -> Result<Ran, engine::Error> {
    let vocabulary = engine.limits().vocab_size;
    for index in 0..of.requests {
        let request = Request {
            prompt: (0..of.prompt).map(|at| ((at * 37 + index * 11) % vocabulary) as u32).collect(),
            generated: Vec::new(),
            max_tokens: of.answer,
            stop_tokens: Vec::new(),
            sampling: Sampling::default(),
            logprobs: None,
            prompt_logprobs: false,
        };
        engine.submit(request).expect("the prompt fits the model");
    }
    let (mut begun, mut ran, start) = (BTreeSet::new(), Ran::default(), Instant::now());
    while !engine.is_idle() {
        let all_begun = begun.len() == of.requests;
        for event in ready(engine.step(&mut NoPeers))? {
            if let Event::Token { sequence, .. } = event {
                begun.insert(sequence);
                ran.decoded += usize::from(all_begun);
            }
        }
        if !all_begun {
            ran.prefill = start.elapsed();
        }
    }
    ran.decode = start.elapsed() - ran.prefill;
    Ok(ran)
}

/// Without peers no step ever waits.
fn ready<F: Future>(step: F) -> F::Output {
    let mut step = pin!(step);
    loop {
        if let Poll::Ready(output) = step.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
    }
}
