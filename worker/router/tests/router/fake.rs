//! A worker that does what a test tells it to.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use futures::{Stream, StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    task::{AbortHandle, JoinHandle},
};
use tonic::{Request, Response, Status, metadata::MetadataMap, service::Routes};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_server::{Health, HealthServer},
};
use wire::proto::{
    Chunk, Endpoint, GenerateCall, GenerateReply, Head, WorkerEntry,
    chunk::Kind,
    generate_reply::Reply,
    worker_server::{Worker, WorkerServer},
};

/// One thing that a worker does in the course of an answer.
#[derive(Clone)]
pub(crate) enum Step {
    /// A head with this status and body.
    Head(u32, Value),
    /// A piece of this choice's text.
    Text(u32, &'static str),
    /// A piece of this choice's thought.
    Thought(u32, &'static str),
    /// The end of this choice.
    Finish(u32, &'static str),
    /// The last piece.
    Usage(u64, u64),
    /// The last piece of a failed answer: type and message.
    Error(&'static str, &'static str),
    /// Goes on once the test adds a permit.
    Await(Arc<Semaphore>),
    /// Ends the stream with this status.
    Fail(tonic::Code),
    /// Stops the thread until the test lets go of the other end.
    Freeze(Arc<Mutex<std::sync::mpsc::Receiver<()>>>),
}

/// What comes first: the stream, or a status at once.
pub(crate) type Script = Result<Vec<Step>, Status>;

/// `text` as [`words`], from behind what the client of `call` has.
pub(crate) fn rest(call: &GenerateCall, text: &'static str) -> Vec<Step> {
    let mut steps = words(text);
    let had = call.resume.iter().flat_map(|resume| &resume.choices).map(|had| had.token_ids.len()).sum();
    steps.drain(1..=had);
    steps
}

/// `text`, word by word, and its usage.
pub(crate) fn words(text: &'static str) -> Vec<Step> {
    let words = text.split_inclusive(' ');
    let mut steps = vec![Step::Head(200, Value::Null)];
    steps.extend(words.clone().map(|word| Step::Text(0, word)));
    steps.extend([Step::Finish(0, "stop"), Step::Usage(3, words.count() as u64)]);
    steps
}

/// A worker, and what it has seen.
pub(crate) struct FakeWorker {
    pub(crate) id: String,
    pub(crate) address: String,
    pub(crate) seen: Arc<Seen>,
    server: JoinHandle<std::io::Result<()>>,
    closes: AbortHandle,
}

#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) calls: Mutex<Vec<GenerateCall>>,
    pub(crate) metadata: Mutex<Vec<MetadataMap>>,
    /// Answers that began, and answers that ended or were cancelled.
    pub(crate) begun: AtomicUsize,
    pub(crate) ended: AtomicUsize,
    /// Signs of life that it was asked for.
    pub(crate) signs: AtomicUsize,
    /// Gives none.
    pub(crate) is_mute: AtomicBool,
}

impl FakeWorker {
    pub(crate) async fn start(id: &str, script: impl Fn(&GenerateCall) -> Script + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::<Seen>::default();
        let scripted = Scripted { script: Box::new(script), seen: seen.clone() };
        let routes = Routes::new(WorkerServer::new(scripted).max_decoding_message_size(wire::MAX_MESSAGE_BYTES));
        let routes = routes.add_service(HealthServer::new(Signs(seen.clone())));
        let server = tokio::spawn(wire::serve(listener, routes, std::future::pending()));
        let closes = server.abort_handle();
        Self { id: id.to_owned(), address, seen, server, closes }
    }

    /// As [`FakeWorker::start`], on a thread of its own, which may freeze.
    pub(crate) async fn start_apart(
        id: &'static str,
        script: impl Fn(&GenerateCall) -> Script + Send + Sync + 'static,
    ) -> Self {
        let (sender, started) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut worker = Self::start(id, script).await;
                let server = std::mem::replace(&mut worker.server, tokio::spawn(async { Ok(()) }));
                let _ = sender.send(worker);
                let _ = server.await;
            });
        });
        started.await.unwrap()
    }

    /// As the operator tells of it.
    pub(crate) fn entry(&self) -> WorkerEntry {
        WorkerEntry {
            id: self.id.clone(),
            address: self.address.clone(),
            content_hash: "hash".into(),
            ..Default::default()
        }
    }

    /// Closes all its connections and its socket, soon.
    pub(crate) fn close(&self) {
        self.closes.abort();
    }

    /// Closes all its connections and its socket.
    pub(crate) async fn kill(&mut self) {
        self.close();
        let _ = (&mut self.server).await;
    }

    pub(crate) fn calls(&self) -> usize {
        self.seen.calls.lock().unwrap().len()
    }
}

struct Scripted {
    script: Box<dyn Fn(&GenerateCall) -> Script + Send + Sync>,
    seen: Arc<Seen>,
}

struct Signs(Arc<Seen>);

#[tonic::async_trait]
impl Health for Signs {
    type WatchStream = stream::Empty<Result<HealthCheckResponse, Status>>;

    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        self.0.signs.fetch_add(1, SeqCst);
        if self.0.is_mute.load(SeqCst) {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(HealthCheckResponse::default()))
    }

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("nobody watches"))
    }
}

/// Counts the end of an answer, however it comes.
struct Ended(Arc<Seen>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, SeqCst);
    }
}

#[tonic::async_trait]
impl Worker for Scripted {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateReply, Status>> + Send>>;

    async fn generate(&self, request: Request<GenerateCall>) -> Result<Response<Self::GenerateStream>, Status> {
        self.seen.metadata.lock().unwrap().push(request.metadata().clone());
        let call = request.into_inner();
        self.seen.calls.lock().unwrap().push(call.clone());
        let steps = (self.script)(&call)?;
        self.seen.begun.fetch_add(1, SeqCst);
        let ended = Ended(self.seen.clone());
        let call = Arc::new(call);
        let replies = stream::iter(steps).filter_map(move |step| {
            let _ = &ended;
            let call = call.clone();
            async move { reply(step, &call).await }
        });
        Ok(Response::new(Box::pin(replies)))
    }
}

async fn reply(step: Step, call: &GenerateCall) -> Option<Result<GenerateReply, Status>> {
    let is_chat = call.endpoint() == Endpoint::ChatCompletions;
    let choice = |index: u32, key: &str, text: &str| {
        if is_chat { json!({"index": index, "delta": {key: text}}) } else { json!({"index": index, "text": text}) }
    };
    let ends_choice = matches!(step, Step::Finish(..));
    let (kind, index, mut json) = match step {
        Step::Await(permits) => {
            permits.acquire().await.unwrap().forget();
            return None;
        }
        Step::Freeze(until) => {
            let _ = until.lock().unwrap().recv();
            return None;
        }
        Step::Fail(code) => return Some(Err(Status::new(code, "10.1.2.3 said no"))),
        Step::Head(status, body) => {
            let head = Head { status, content_type: "application/json".into(), body: body.to_string().into() };
            return Some(Ok(GenerateReply { reply: Some(Reply::Head(head)) }));
        }
        Step::Text(index, text) => (Kind::Delta, index, json!({"choices": [choice(index, "content", text)]})),
        Step::Thought(index, text) => {
            (Kind::Delta, index, json!({"choices": [choice(index, "reasoning_content", text)]}))
        }
        Step::Finish(index, reason) => {
            let mut choice = choice(index, "content", "");
            choice["finish_reason"] = reason.into();
            (Kind::Delta, index, json!({"choices": [choice]}))
        }
        Step::Usage(prompt, completion) => {
            let usage =
                json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion});
            (Kind::Usage, 0, json!({"choices": [], "usage": usage}))
        }
        Step::Error(kind, message) => {
            let error = json!({"message": message, "type": kind, "param": null, "code": null});
            let chunk = Chunk { json: json!({"error": error}).to_string().into(), ..Default::default() };
            return Some(Ok(GenerateReply { reply: Some(Reply::Chunk(Chunk { kind: Kind::Error.into(), ..chunk })) }));
        }
    };
    json["id"] = call.request_id.clone().into();
    json["created"] = call.created.into();
    json["model"] = call.model.clone().into();
    json["object"] = if is_chat { "chat.completion.chunk" } else { "text_completion" }.into();
    let chunk = Chunk {
        kind: kind.into(),
        json: json.to_string().into(),
        choice: index,
        token_ids: vec![index + 5],
        ends_choice,
    };
    Some(Ok(GenerateReply { reply: Some(Reply::Chunk(chunk)) }))
}
