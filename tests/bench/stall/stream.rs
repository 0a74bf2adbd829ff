//! One stream of the benchmark, and when each of its pieces came.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use tests::poll::eventually;

use crate::PATIENCE;

/// Tokens of an answer: what fits the model's context.
const TOKENS: usize = 900;
/// Pieces that have come when a stream is under way.
const UNDER_WAY: usize = 60;

/// A stream that is being read.
pub(crate) struct Stream {
    pieces: Arc<Mutex<Pieces>>,
    reads: JoinHandle<anyhow::Result<()>>,
}

/// What came of a stream, and when.
#[derive(Clone, Default)]
pub(crate) struct Pieces(Vec<(Instant, String)>);

impl Stream {
    /// Asks the question of this number, and returns when the first piece has come.
    pub(crate) async fn begin(url: &str, number: usize) -> anyhow::Result<Self> {
        let question = format!("What is {} + {}?", 47 + 13 * number, 85 + 29 * number);
        let body = json!({
            "model": "tiny-r1", "stream": true, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": true,
            "messages": [{"role": "user", "content": question}],
        });
        // a second call finds the first one's provider in place, which is the same
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build()?;
        let response =
            client.post(format!("{url}/v1/chat/completions")).json(&body).send().await?.error_for_status()?;
        let pieces = Arc::<Mutex<Pieces>>::default();
        let reads = tokio::spawn(read(response, pieces.clone()));
        let stream = Self { pieces, reads };
        stream.has(1).await?;
        Ok(stream)
    }

    /// Waits until it is under way.
    pub(crate) async fn is_under_way(&self) -> anyhow::Result<()> {
        self.has(UNDER_WAY).await
    }

    /// Whether no more comes.
    pub(crate) fn has_ended(&self) -> bool {
        self.reads.is_finished()
    }

    async fn has(&self, pieces: usize) -> anyhow::Result<()> {
        let has = eventually("a stream is under way", PATIENCE, async || {
            let (has, ended) = (lock(&self.pieces).0.len(), self.has_ended());
            ensure!(has >= pieces || ended, "{has} of {pieces} pieces");
            Ok(has)
        });
        ensure!(has.await? >= pieces, "a stream ended before it was under way");
        Ok(())
    }

    /// All that came, at its end.
    pub(crate) async fn end(self) -> anyhow::Result<Pieces> {
        tokio::time::timeout(PATIENCE, self.reads).await.context("a stream hangs")???;
        Ok(lock(&self.pieces).clone())
    }
}

async fn read(response: reqwest::Response, pieces: Arc<Mutex<Pieces>>) -> anyhow::Result<()> {
    let (mut bytes, mut text, mut is_done) = (response.bytes_stream(), Vec::new(), false);
    while let Some(part) = bytes.next().await {
        text.extend_from_slice(&part.context("the stream broke")?);
        let came = Instant::now();
        while let Some(end) = text.windows(2).position(|two| two == b"\n\n") {
            let event = String::from_utf8(text.drain(..end + 2).collect())?;
            let Some(data) = event.trim_end().strip_prefix("data: ") else {
                ensure!(event.starts_with(':'), "{event}");
                continue;
            };
            is_done = data == "[DONE]";
            if !is_done {
                let mut piece: Value = serde_json::from_str(data)?;
                lock(&pieces).0.push((came, piece["choices"].take().to_string()));
            }
        }
    }
    ensure!(is_done, "the stream ends without [DONE]");
    Ok(())
}

fn lock(pieces: &Mutex<Pieces>) -> std::sync::MutexGuard<'_, Pieces> {
    pieces.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pieces {
    /// All of it, piece by piece, without what differs between any two requests.
    pub(crate) fn text(&self) -> String {
        self.0.iter().map(|(_, piece)| &**piece).collect::<Vec<_>>().join("\n")
    }

    fn gaps(&self) -> impl Iterator<Item = (Instant, Instant)> {
        self.0.windows(2).map(|pair| (pair[0].0, pair[1].0))
    }

    /// Of those that ended before `fault`, the median.
    pub(crate) fn usual_gap_before(&self, fault: Instant) -> Option<Duration> {
        let before = self.gaps().filter(|&(_, until)| until < fault);
        let mut gaps: Vec<Duration> = before.map(|(from, until)| until - from).collect();
        gaps.sort();
        gaps.get(gaps.len() / 2).copied()
    }

    /// Of those that ended after `fault`, from when to when. `None`: it had ended.
    pub(crate) fn longest_gap_after(&self, fault: Instant) -> Option<(Instant, Instant)> {
        self.gaps().filter(|&(_, until)| until >= fault).max_by_key(|&(from, until)| until - from)
    }
}
