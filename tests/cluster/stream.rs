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
    cluster::{Cluster, text},
};

/// Streams at once.
const STREAMS: usize = 20;
/// Tokens of every other stream, which ends then: wherever it went on, it must know how many it had.
const SHORT: u64 = 12;

/// [`STREAMS`] streams of one model.
pub(crate) struct Streams {
    stop: Arc<AtomicBool>,
    /// How often each ended as it should.
    whole: Arc<[AtomicU64; STREAMS]>,
    wrong: Arc<Mutex<Vec<String>>>,
    tasks: JoinSet<()>,
}

impl Streams {
    /// Asks each once undisturbed, then starts them.
    pub(crate) async fn start(client: &Client, model: &str) -> anyhow::Result<Self> {
        let mut undisturbed = BTreeMap::new();
        for index in 0..STREAMS {
            let answer = answer(client, model, index).await.with_context(|| format!("stream {index}"))?;
            undisturbed.insert(index, answer);
        }
        let (stop, whole): (Arc<AtomicBool>, Arc<[AtomicU64; STREAMS]>) = Default::default();
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
                        None => drop(whole[index].fetch_add(1, Ordering::Relaxed)),
                        Some(problem) => wrong.lock().expect("no stream panics").push(problem),
                    }
                }
            });
        }
        Ok(Self { stop, whole, wrong, tasks })
    }

    /// How many ended as they should.
    pub(crate) fn whole(&self) -> u64 {
        self.counts().iter().sum()
    }

    fn counts(&self) -> [u64; STREAMS] {
        std::array::from_fn(|index| self.whole[index].load(Ordering::Relaxed))
    }

    /// Waits until each of them, not just the short ones, has begun and ended from now on.
    pub(crate) async fn go_on(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let before = self.counts();
        cluster
            .until("each stream begins and ends", 60, async || {
                let now = self.counts();
                // the one that runs now has begun before
                let waiting: Vec<_> = (0..STREAMS).filter(|&index| now[index] < before[index] + 2).collect();
                ensure!(waiting.is_empty(), "not yet {waiting:?}; {}", self.told());
                Ok(())
            })
            .await
    }

    /// Stops, and fails if one stream was not whole.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        ensure!(self.wrong.lock().expect("no stream panics").is_empty(), "{}", self.told());
        Ok(())
    }

    /// How many were wrong, and what the first ones said.
    fn told(&self) -> String {
        let wrong = self.wrong.lock().expect("no stream panics");
        format!("{} wrong beside {}: {:#?}", wrong.len(), self.whole(), &wrong[..wrong.len().min(5)])
    }
}

/// All that one stream says, thought included.
async fn answer(client: &Client, model: &str, index: usize) -> anyhow::Result<String> {
    let mut body = question(model, &format!("What is {} + {}?", 100 + 17 * index, 23 + 11 * index));
    body["stream"] = true.into();
    let is_short = index % 2 == 1;
    if is_short {
        body["max_tokens"] = SHORT.into();
    }
    let headers = [("content-type", "application/json")];
    let response = client.open(Method::POST, "/v1/chat/completions", &headers, body.to_string().into_bytes()).await?;
    let status = response.status();
    let body = String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?;
    ensure!(status.is_success(), "{status}: {body}");
    let mut events: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    ensure!(events.pop() == Some("[DONE]"), "the stream has no end: {body}");
    let (mut said, mut finish) = (String::new(), String::new());
    for event in events {
        let event: Value = serde_json::from_str(event).with_context(|| event.to_owned())?;
        finish += text(&event, "/choices/0/finish_reason");
        let delta = &event["choices"][0]["delta"];
        said += text(delta, "/reasoning_content");
        said += text(delta, "/content");
    }
    let expected = if is_short { "length" } else { "stop" };
    ensure!(finish == expected, "it finished for {finish:?} and not {expected:?}, having said {said:?}");
    Ok(said)
}
