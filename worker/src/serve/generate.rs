//! `modelfleet.v1.Worker`: runs the requests that routers hand over.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use opentelemetry::trace::TraceContextExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::{StreamMap, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};
use tracing::{Instrument as _, Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use wire::{
    genai::{self, Outcome},
    openai::ErrorObject,
    proto::{Chunk, Endpoint, GenerateCall, GenerateReply, Head, chunk::Kind, generate_reply::Reply, worker_server},
};

use super::state::{Refused, State};
use crate::{
    choice::Choice,
    drive::{Driver, Progress, Sequence, SubmitError},
    metrics::Metrics,
    openai::{
        Refusal,
        chunk::{Delta, Scored, Writer},
    },
    prepare::{Model, Prepared, refused},
    text::think::Parted,
};

/// Replies that are written and not yet taken by the connection.
const REPLIES: usize = 16;
/// A router that takes no reply for so long is cut.
const SLOW_WAIT: Duration = Duration::from_secs(30);
/// Bodies that are parsed and tokenized at once; the others wait.
const PREPARED_AT_ONCE: usize = 2;

type Replies = mpsc::Sender<Result<GenerateReply, Status>>;

/// Runs requests on one engine.
#[derive(Clone)]
pub struct GenerateService(Arc<Inner>);

struct Inner {
    model: Model,
    driver: Driver,
    state: Arc<State>,
    metrics: Arc<Metrics>,
    preparing: Semaphore,
}

impl GenerateService {
    /// Answers with `model`'s words what `driver`'s engine generates.
    pub fn new(model: Model, driver: Driver, state: Arc<State>, metrics: Arc<Metrics>) -> Self {
        let preparing = Semaphore::new(PREPARED_AT_ONCE);
        Self(Arc::new(Inner { model, driver, state, metrics, preparing }))
    }
}

#[tonic::async_trait]
impl worker_server::Worker for GenerateService {
    type GenerateStream = ReceiverStream<Result<GenerateReply, Status>>;

    async fn generate(&self, request: Request<GenerateCall>) -> Result<Response<Self::GenerateStream>, Status> {
        let span = info_span!("modelfleet.v1.Worker/Generate", otel.kind = "server");
        let parent = wire::telemetry::extract(request.metadata());
        let _ = span.set_parent(parent); // without an exporter there is nothing to set
        let call = request.into_inner();
        let inner = &self.0;
        let hash = &inner.state.content_hash;
        if !call.content_hash.is_empty() && call.content_hash != *hash {
            return Err(Status::failed_precondition("this worker serves other model files"));
        }
        // after both the router asks another worker at once
        let place = inner.state.admit().map_err(|refused| match refused {
            Refused::Draining => Status::unavailable("this worker takes no new requests"),
            Refused::Full => Status::resource_exhausted("too many requests wait at this worker"),
        })?;
        let (replies, stream) = mpsc::channel(REPLIES);
        tokio::spawn(inner.clone().run(call, replies, place).instrument(span));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Why an answer ends without being whole.
enum Broken {
    /// Nobody reads any more, or not fast enough.
    Gone,
    /// It cannot go on here, but may elsewhere. The words are for the router.
    Lost(&'static str),
    /// The words and the code are for the client.
    Failed(String, &'static str),
}

/// What was counted while a request ran.
#[derive(Default)]
struct Count {
    head: bool,
    first_token: Option<f64>,
    prompt: usize,
    /// Tokens that the client has from other workers: they are of its usage, but this worker only read them.
    had: usize,
    /// Tokens that were generated here.
    generated: usize,
}

impl Inner {
    /// Answers a call, and records what became of it. The place is free when this ends.
    async fn run(self: Arc<Self>, call: GenerateCall, replies: Replies, _place: OwnedSemaphorePermit) {
        let started = Instant::now();
        let mut count = Count::default();
        let deadline = (call.remaining_ms > 0).then(|| Duration::from_millis(call.remaining_ms));
        let endpoint = call.endpoint();
        let ended = tokio::select! {
            ended = self.answer(call, &replies, started, &mut count) => ended,
            () = replies.closed() => Err(Broken::Gone),
            () = after(deadline) => Err(Broken::Failed("the request took longer than its deadline".into(), "deadline_exceeded")),
            () = self.state.is_cut() => Err(Broken::Lost("this worker goes away")),
        };
        let error = match ended {
            Ok(error) => error,
            Err(Broken::Gone) => Some("cancelled"),
            Err(Broken::Lost(message)) => {
                let _ = replies.try_send(Err(Status::unavailable(message))); // without room the stream just ends
                Some("unavailable")
            }
            Err(Broken::Failed(message, code)) => {
                let body = ErrorObject::server(message).code(code).to_json();
                let _ = send(&replies, broken(body, code, count.head)).await; // nobody reads any more
                Some(code)
            }
        };
        let outcome = Outcome {
            operation: if endpoint == Endpoint::ChatCompletions { genai::CHAT } else { genai::TEXT_COMPLETION },
            model: &self.state.model,
            duration: started.elapsed().as_secs_f64(),
            first_token: count.first_token,
            usage: (count.prompt > 0).then_some(((count.prompt + count.had) as u64, count.generated as u64)),
            error,
        };
        self.metrics.requests.record(&outcome);
    }

    /// Returns the reason of a refusal, or `None` for an answer that is whole.
    async fn answer(
        self: &Arc<Self>,
        call: GenerateCall,
        replies: &Replies,
        started: Instant,
        count: &mut Count,
    ) -> Result<Option<&'static str>, Broken> {
        let mut writer = Writer {
            endpoint: call.endpoint(),
            id: call.request_id.clone(),
            created: call.created,
            model: call.model.clone(),
            logprobs: false,
        };
        let prepared = match self.prepare(call).await? {
            Ok(prepared) => prepared,
            Err(refusal) => return self.refuse(replies, &refusal).await,
        };
        writer.logprobs = prepared.call.logprobs.is_some();
        let requests = prepared.requests.iter().zip(&prepared.choices).filter(|(_, begun)| begun.runs());
        let requests = requests.map(|(request, _)| request.clone()).collect();
        let sequences = match self.driver.submit(requests, traced()).await {
            Ok(sequences) => sequences,
            Err(SubmitError::Refused(refusal)) => {
                return self.refuse(replies, &refused(&refusal)).await;
            }
            Err(SubmitError::Ended) => return Err(Broken::Lost("the engine has ended")),
        };
        let head = Head { status: 200, content_type: "application/json".into(), ..Head::default() };
        send(replies, Reply::Head(head)).await?;
        count.head = true;
        count.prompt = prepared.prompts.iter().map(|prompt| prompt.ids.len()).sum();
        count.had = prepared.choices.iter().map(|begun| begun.had.tokens.len()).sum();
        let mut answer = Answer::begin(self, writer, prepared, sequences, replies);
        answer.run(started, count).await?;
        Ok(None)
    }

    async fn prepare(self: &Arc<Self>, call: GenerateCall) -> Result<Result<Prepared, Refusal>, Broken> {
        let _turn = self.preparing.acquire().await.map_err(|_| failed())?;
        let inner = self.clone();
        tokio::task::spawn_blocking(move || inner.model.prepare(&call)).await.map_err(|_| failed())
    }

    async fn refuse(&self, replies: &Replies, refusal: &Refusal) -> Result<Option<&'static str>, Broken> {
        let head = Head {
            status: refusal.status.into(),
            content_type: "application/json".into(),
            body: refusal.to_json().into(),
        };
        send(replies, Reply::Head(head)).await?;
        Ok(Some("invalid_request"))
    }
}

/// The choices of a request while they grow.
struct Answer<'a> {
    inner: &'a Inner,
    writer: Writer,
    prepared: Prepared,
    /// A sequence that ends sends `None` last, so that one that was lost is told from one that ended.
    sequences: StreamMap<usize, futures::stream::BoxStream<'static, Option<Progress>>>,
    replies: &'a Replies,
}

impl<'a> Answer<'a> {
    fn begin(
        inner: &'a Inner,
        writer: Writer,
        prepared: Prepared,
        sequences: Vec<Sequence>,
        replies: &'a Replies,
    ) -> Self {
        let mut map = StreamMap::new();
        let running = prepared.choices.iter().enumerate().filter(|(_, begun)| begun.runs());
        for ((index, _), sequence) in running.zip(sequences) {
            let end = futures::stream::iter([None]);
            map.insert(index, ReceiverStream::new(sequence).map(Some).chain(end).boxed());
        }
        Self { inner, writer, prepared, sequences: map, replies }
    }

    async fn run(&mut self, started: Instant, count: &mut Count) -> Result<(), Broken> {
        let text = &self.inner.model.text;
        for index in 0..self.prepared.choices.len() {
            if !self.prepared.choices[index].had.begun {
                self.open(index).await?;
            }
            if let Some(end) = self.prepared.choices[index].end.take() {
                self.piece(index, end).await?;
            }
        }
        while let Some((index, progress)) = self.sequences.next().await {
            match progress {
                Some(Progress::Prompt(logprobs)) => self.echo(index, Some(logprobs)).await?,
                Some(Progress::Token(id, logprob)) => {
                    count.generated += 1;
                    count.first_token.get_or_insert_with(|| started.elapsed().as_secs_f64());
                    if let Some(delta) = self.choice(index).token(text, id, logprob) {
                        self.piece(index, delta).await?;
                    }
                }
                Some(Progress::Finished(reason)) => {
                    let delta = self.choice(index).finish(text, reason);
                    self.piece(index, delta).await?;
                }
                Some(Progress::Failed(message)) => {
                    return Err(Broken::Failed(message, "model_failed"));
                }
                None => return Err(Broken::Lost("the engine lost a sequence")),
            }
        }
        let usage = self.writer.usage(count.prompt, count.had + count.generated);
        send(self.replies, Reply::Chunk(usage)).await
    }

    fn choice(&mut self, index: usize) -> &mut Choice {
        &mut self.prepared.choices[index].choice
    }

    /// What comes before the first token: who speaks, or the prompt if it is to be part of the answer.
    async fn open(&mut self, index: usize) -> Result<(), Broken> {
        if self.writer.endpoint == Endpoint::ChatCompletions {
            let role = self.writer.role(u32::try_from(index).unwrap_or(u32::MAX));
            return send(self.replies, Reply::Chunk(role)).await;
        }
        // with log probabilities it waits for those of the prompt
        if self.prepared.call.echo && !self.writer.logprobs { self.echo(index, None).await } else { Ok(()) }
    }

    async fn echo(&mut self, index: usize, logprobs: Option<Vec<Option<engine::TokenLogprob>>>) -> Result<(), Broken> {
        let prompt = &self.prepared.prompts[index / self.prepared.call.n];
        let scored = logprobs.into_iter().flatten().zip(&prompt.ids);
        let delta = Delta {
            choice: u32::try_from(index).unwrap_or(u32::MAX),
            text: Parted { content: prompt.text.clone(), ..Parted::default() },
            scored: scored.map(|(logprob, &id)| Scored { id, logprob }).collect(),
            ..Delta::default()
        };
        let chunk = self.writer.delta(&self.inner.model.text, delta);
        send(self.replies, Reply::Chunk(chunk)).await
    }

    /// Sends a piece; the last one of a choice ends its sequence.
    async fn piece(&mut self, index: usize, delta: Delta) -> Result<(), Broken> {
        if delta.finish.is_some() {
            self.sequences.remove(&index);
        }
        let chunk = self.writer.delta(&self.inner.model.text, delta);
        send(self.replies, Reply::Chunk(chunk)).await
    }
}

async fn send(replies: &Replies, reply: Reply) -> Result<(), Broken> {
    let reply = Ok(GenerateReply { reply: Some(reply) });
    match tokio::time::timeout(SLOW_WAIT, replies.send(reply)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Broken::Gone),
    }
}

/// The end of an answer that is not whole: a status, if none was sent yet.
fn broken(body: Vec<u8>, code: &str, head_sent: bool) -> Reply {
    if head_sent {
        return Reply::Chunk(Chunk { kind: Kind::Error.into(), json: body.into(), ..Chunk::default() });
    }
    let status = match code {
        "deadline_exceeded" => 504,
        _ => 500,
    };
    Reply::Head(Head { status, content_type: "application/json".into(), body: body.into() })
}

async fn after(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

fn failed() -> Broken {
    Broken::Failed("the model could not go on with this request".into(), "model_failed")
}

/// The current span if its trace is recorded; none otherwise, so that steps are not slowed for nothing.
fn traced() -> Span {
    let span = Span::current();
    let sampled = span.context().span().span_context().is_sampled();
    if sampled { span } else { Span::none() }
}
