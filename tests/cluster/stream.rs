//! Streams that begin again whenever they end, each compared with what it was before anything happened.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use anyhow::{Context, ensure};
use http_body_util::BodyExt;
use hyper::Method;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    ask::{Client, question},
    cluster::text,
};

/// Streams at once.
pub(crate) const STREAMS: u64 = 20;
/// Tokens of every other stream, which ends then: wherever it went on, it must know how many it had.
const SHORT: u64 = 12;

/// [`STREAMS`] streams of one model.
pub(crate) struct Streams {
    stop: Arc<AtomicBool>,
    whole: Arc<AtomicU64>,
    wrong: Arc<Mutex<Vec<String>>>,
    tasks: JoinSet<()>,
}

impl Streams {
    /// Asks each once undisturbed, then starts them.
    pub(crate) async fn start(client: &Client, model: &str) -> anyhow::Result<Self> {
        let mut undisturbed = BTreeMap::new();
        for index in 0..STREAMS {
            undisturbed.insert(index, answer(client, model, index).await?);
        }
        let (stop, whole): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let wrong: Arc<Mutex<Vec<String>>> = Arc::default();
        let mut tasks = JoinSet::new();
        for (index, expected) in undisturbed {
            let (client, model) = (client.clone(), model.to_owned());
            let (stop, whole, wrong) = (stop.clone(), whole.clone(), wrong.clone());
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let problem = match answer(&client, &model, index).await {
                        Ok(text) if text == expected => None,
                        Ok(text) => Some(format!("stream {index} said {text:?} and not {expected:?}")),
                        Err(error) => Some(format!("stream {index}: {error:#}")),
                    };
                    match problem {
                        None => drop(whole.fetch_add(1, Ordering::Relaxed)),
                        Some(problem) => wrong.lock().expect("no stream panics").push(problem),
                    }
                }
            });
        }
        Ok(Self { stop, whole, wrong, tasks })
    }

    /// How many ended as they should.
    pub(crate) fn whole(&self) -> u64 {
        self.whole.load(Ordering::Relaxed)
    }

    /// Stops, and fails if one stream was not whole.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        let wrong = self.wrong.lock().expect("no stream panics");
        ensure!(wrong.is_empty(), "{} of {}: {:#?}", wrong.len(), self.whole(), &wrong[..wrong.len().min(5)]);
        Ok(())
    }
}

/// All that one stream says, thought included.
async fn answer(client: &Client, model: &str, index: u64) -> anyhow::Result<String> {
    let mut body = question(model, &format!("What is {} + {}?", 100 + 17 * index, 23 + 11 * index));
    body["stream"] = true.into();
    if index % 2 == 1 {
        body["max_tokens"] = SHORT.into();
    }
    let headers = [("content-type", "application/json")];
    let response = client.open(Method::POST, "/v1/chat/completions", &headers, body.to_string().into_bytes()).await?;
    let status = response.status();
    let body = String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?;
    ensure!(status.is_success(), "{status}: {body}");
    let mut events: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    ensure!(events.pop() == Some("[DONE]"), "the stream has no end: {body}");
    let mut said = String::new();
    for event in events {
        let event: Value = serde_json::from_str(event).with_context(|| event.to_owned())?;
        let delta = &event["choices"][0]["delta"];
        said += text(delta, "/reasoning_content");
        said += text(delta, "/content");
    }
    Ok(said)
}
