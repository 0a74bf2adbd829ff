//! Tokens a second of a model, for 1 and 8 requests at once: `cargo bench -p engine [-- FOLDER]`.

use std::path::PathBuf;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use engine::{Engine, Event, Held, NoPeers, Options, Request, Sampling, load};

const TINY_R1: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../manifests/models/tiny-r1");
const PROMPT: usize = 64;
const ANSWER: usize = 256;

fn main() -> Result<(), engine::Error> {
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let dir = PathBuf::from(folder.unwrap_or_else(|| TINY_R1.into()));
    let options = Options {
        kv_cache_tokens: 8 * (PROMPT + ANSWER),
        max_context_tokens: None,
        max_sequences: 8,
        prefill_chunk: 512,
    };
    let (mut engine, _) = load(&dir, &Held::all(), &options, &mut |_, _| {})?;
    run(&mut engine, 1)?; // warms up
    println!("requests  prefill tokens/s  decode tokens/s");
    for requests in [1, 8] {
        let (prefill, decode) = run(&mut engine, requests)?;
        println!("{requests:8}  {prefill:16.0}  {decode:15.0}");
    }
    Ok(())
}

/// Tokens a second until each request has its first token, and after that.
fn run(engine: &mut impl Engine, requests: usize) -> Result<(f64, f64), engine::Error> {
    for index in 0..requests {
        let request = Request {
            prompt: (0..PROMPT).map(|at| ((at * 37 + index * 11) % 500) as u32).collect(),
            generated: Vec::new(),
            max_tokens: ANSWER,
            stop_tokens: Vec::new(),
            sampling: Sampling::default(),
            logprobs: None,
            prompt_logprobs: false,
        };
        engine.submit(request).expect("the prompt fits the model");
    }
    let (mut drawn, start) = (0, Instant::now());
    let mut first = None;
    while !engine.is_idle() {
        let events = ready(engine.step(&mut NoPeers))?;
        drawn += events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
        if drawn >= requests {
            first.get_or_insert_with(|| (drawn, start.elapsed()));
        }
    }
    let (early, until) = first.unwrap_or((drawn, start.elapsed()));
    let rest = (start.elapsed() - until).as_secs_f64();
    Ok(((requests * PROMPT) as f64 / until.as_secs_f64(), (drawn - early) as f64 / rest))
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
