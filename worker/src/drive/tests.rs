//! The driver over `Echo`, and over engines that stall or panic.

use engine::{Echo, Error, Limits, Replies, Sampling};
use opentelemetry::metrics::MeterProvider as _;

use super::*;

fn metrics() -> Arc<Metrics> {
    Metrics::new(&opentelemetry::metrics::noop::NoopMeterProvider::new().meter("test"))
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        generated: Vec::new(),
        max_tokens,
        stop_tokens: Vec::new(),
        sampling: Sampling::default(),
        logprobs: None,
        prompt_logprobs: false,
    }
}

fn echo() -> Driver {
    let limits = Limits { max_context_tokens: 1 << 40, vocab_size: 1 << 17 };
    Driver::start(Echo::new(limits, 8), NoPeers, metrics()).unwrap()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await; // polls
    }
    panic!("{what} did not happen");
}

#[tokio::test]
async fn sequences_get_their_tokens_and_end() {
    let driver = echo();
    let requests = vec![request(&[5, 6], 3), request(&[9], 1)];
    let mut sequences = driver.submit(requests, Span::none()).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = sequences[0].recv().await {
        events.push(event);
    }
    let token = |id| Progress::Token(id, None);
    assert_eq!(events, [token(5), token(6), token(5), Progress::Finished(Finish::Length)]);
    assert_eq!(sequences[1].recv().await, Some(token(9)));
}

#[tokio::test]
async fn a_request_is_taken_whole_or_not_at_all() {
    let driver = echo();
    let result = driver.submit(vec![request(&[5], 1000), request(&[], 3)], Span::none()).await;
    assert!(matches!(result, Err(SubmitError::Refused(Refusal::EmptyPrompt))));
    until("the first one is forgotten", || {
        driver.load() == Load { kv_tokens_total: driver.load().kv_tokens_total, ..Load::default() }
    })
    .await;
}

#[tokio::test]
async fn dropping_a_sequence_frees_its_place() {
    let driver = Driver::start(stalled(), Away(Duration::from_secs(60)), metrics()).unwrap();
    let sequences = driver.submit(vec![request(&[5], 3)], Span::none()).await.unwrap();
    until("the sequence runs", || driver.load().running == 1).await;
    drop(sequences);
    until("the place is free", || driver.load().running == 0).await;
}

#[tokio::test]
async fn who_does_not_read_loses_the_sequence() {
    let driver = echo();
    let mut sequences = driver.submit(vec![request(&[5], 1 << 30)], Span::none()).await.unwrap();
    until("the sequence is cut", || driver.load().running == 0 && sequences[0].len() == EVENTS).await;
    let mut last = None;
    while let Some(event) = sequences[0].recv().await {
        last = Some(event);
    }
    assert!(matches!(last, Some(Progress::Token(..))), "cut without an end: {last:?}");
}

/// Every step wants rows from a holder that is never there.
struct Stalled(Echo, Vec<SequenceId>);

fn stalled() -> Stalled {
    Stalled(Echo::default(), Vec::new())
}

impl Engine for Stalled {
    fn submit(&mut self, request: Request) -> Result<SequenceId, Refusal> {
        let id = self.0.submit(request)?;
        self.1.push(id);
        Ok(id)
    }
    fn cancel(&mut self, sequence: SequenceId) {
        self.0.cancel(sequence);
        self.1.retain(|&id| id != sequence);
    }
    async fn step<E: Exchange>(&mut self, _: &mut E) -> Result<Vec<Event>, Error> {
        Ok(Vec::new())
    }
    fn is_idle(&self) -> bool {
        self.0.is_idle()
    }
    fn away(&self) -> &[SequenceId] {
        &self.1
    }
    fn load(&self) -> Load {
        self.0.load()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
}

/// Lacks an expert in each step.
struct Away(Duration);

impl Exchange for Away {
    type Ticket = ();
    fn send(&mut self, _: &engine::ExpertBatch<'_>) {}
    async fn join(&mut self, (): ()) -> Replies {
        Replies::default()
    }
}

impl Peers for Away {
    fn begin_step(&mut self, _: Span) {}
    fn end_step(&mut self) -> Option<Missing> {
        Some(Missing { layer: 3, expert: 14, max_wait: self.0 })
    }
    async fn changed(&mut self) {
        std::future::pending().await
    }
}

#[tokio::test]
async fn a_sequence_waits_for_its_experts_and_then_fails_loudly() {
    let wait = Duration::from_millis(300);
    let driver = Driver::start(stalled(), Away(wait), metrics()).unwrap();
    let started = Instant::now();
    let mut sequences = driver.submit(vec![request(&[5], 3)], Span::none()).await.unwrap();
    let event = sequences[0].recv().await;
    let named = "expert 14 of layer 3 for 0.3 s";
    assert!(matches!(&event, Some(Progress::Failed(message)) if message.contains(named)), "{event:?}");
    assert!(started.elapsed() >= wait, "failed after {:?}", started.elapsed());
}

/// Panics when the token 13 is asked for.
pub(crate) struct Superstitious(pub(crate) Echo);

impl Engine for Superstitious {
    fn submit(&mut self, request: Request) -> Result<SequenceId, Refusal> {
        self.0.submit(request)
    }
    fn cancel(&mut self, sequence: SequenceId) {
        self.0.cancel(sequence);
    }
    async fn step<E: Exchange>(&mut self, exchange: &mut E) -> Result<Vec<Event>, Error> {
        let events = self.0.step(exchange).await?;
        assert!(!events.iter().any(|event| matches!(event, Event::Token { token: 13, .. })), "thirteen");
        Ok(events)
    }
    fn is_idle(&self) -> bool {
        self.0.is_idle()
    }
    fn away(&self) -> &[SequenceId] {
        self.0.away()
    }
    fn load(&self) -> Load {
        self.0.load()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
}

#[tokio::test]
async fn an_engine_that_panics_ends_its_sequences_without_a_last_word_and_is_noticed() {
    let driver = Driver::start(Superstitious(Echo::default()), NoPeers, metrics()).unwrap();
    let mut sequences = driver.submit(vec![request(&[13], 3), request(&[5], 900)], Span::none()).await.unwrap();
    for sequence in &mut sequences {
        let mut last = None;
        while let Some(progress) = sequence.recv().await {
            last = Some(progress);
        }
        assert!(matches!(last, None | Some(Progress::Token(..))), "whoever reads {last:?} does not go on elsewhere");
    }
    driver.ended().await;
    assert!(matches!(driver.submit(vec![request(&[1], 1)], Span::none()).await, Err(SubmitError::Ended)));
}
