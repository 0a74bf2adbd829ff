//! Requests whose answers are the same each time, and what is compared of them.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use anyhow::{Context, bail, ensure};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tonic::Request;
use wire::proto::{
    Conversation, GenerateRequest, Message, Sampling, generate_request::Input, inference_client::InferenceClient,
};

/// How it is asked.
#[derive(Clone, Debug)]
enum Way {
    Streamed(&'static str, Value),
    Whole(&'static str, Value),
    Typed(Box<GenerateRequest>),
}

/// One request. Its name is its id, from which its objects are named, and its tokens drawn where it has no seed.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    name: String,
    way: Way,
}

/// Pieces by choice, in order; choices come in no order among each other.
pub(super) type Answer = BTreeMap<Option<u64>, Vec<String>>;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// What clients ask: chats and completions, one choice and several, greedy and drawn, with stop strings, echo and log
/// probabilities, over all three ways.
pub(super) fn all() -> Vec<Ask> {
    let says = |question: &str| json!([{"role": "user", "content": question}]);
    let sum = json!({"messages": says("What is 318 + 475?"), "temperature": 0, "logprobs": true, "top_logprobs": 2});
    let drawn = json!({"messages": says("What is 47 + 85?"), "temperature": 0.9, "n": 2, "frequency_penalty": 0.2});
    let stopped =
        json!({"messages": says("What is 999 + 1?"), "temperature": 0.3, "stop": ["=1", "never"], "logprobs": true});
    let echoed = json!({
        "prompt": ["1 + 1 =", "12 12"], "max_tokens": 60, "temperature": 1.1, "seed": 9, "echo": true, "logprobs": 1,
        "ignore_eos": true,
    });
    let crabs = json!({"prompt": "🦀 中 é", "max_tokens": 80, "temperature": 2.0, "ignore_eos": true, "logprobs": 0});
    let message = Message { role: "user".into(), content: "What is 640 + 359?".into() };
    let typed = GenerateRequest {
        model: "tiny".into(),
        input: Some(Input::Messages(Conversation { messages: vec![message] })),
        logprobs: Some(1),
        sampling: Some(Sampling { temperature: Some(0.7), ..Sampling::default() }),
        ..GenerateRequest::default()
    };
    let ways = [
        Way::Streamed(CHAT, sum.clone()),
        Way::Typed(Box::new(typed)),
        Way::Streamed(CHAT, drawn.clone()),
        Way::Whole(CHAT, sum),
        Way::Streamed(COMPLETIONS, echoed),
        Way::Streamed(CHAT, stopped),
        Way::Whole(CHAT, drawn),
        Way::Streamed(COMPLETIONS, crabs),
    ];
    ways.into_iter().enumerate().map(|(number, way)| Ask { name: format!("soak-{number}"), way }).collect()
}

/// Where two answers part.
pub(super) fn difference(found: &Answer, expected: &Answer) -> String {
    let differ = |choice: &&Option<u64>| found.get(*choice) != expected.get(*choice);
    let choices: Vec<_> = expected.keys().chain(found.keys()).filter(differ).collect();
    let Some(choice) = choices.first() else { return String::new() };
    let none = Vec::new();
    let (found, expected) = (found.get(*choice).unwrap_or(&none), expected.get(*choice).unwrap_or(&none));
    let same = found.iter().zip(expected).take_while(|(found, expected)| found == expected).count();
    format!(
        "choice {choice:?} differs at piece {same} of {}:\n{:?}\n{:?} was expected",
        expected.len(),
        found.get(same),
        expected.get(same)
    )
}

impl Ask {
    /// Its answer; each piece is counted in `read` when it comes.
    pub(super) async fn send(&self, url: &str, grpc: &str, read: &AtomicU64) -> anyhow::Result<Answer> {
        match &self.way {
            Way::Streamed(path, body) => self.streamed(&format!("{url}{path}"), body.clone(), read).await,
            Way::Whole(path, body) => self.whole(&format!("{url}{path}"), body.clone(), read).await,
            Way::Typed(request) => self.typed(grpc, request.as_ref().clone(), read).await,
        }
    }

    async fn post(&self, url: &str, mut body: Value) -> anyhow::Result<reqwest::Response> {
        body["model"] = "tiny".into();
        let request = crate::http::client().post(url).header("x-request-id", &self.name).json(&body);
        let response = request.send().await?;
        let status = response.status();
        if !status.is_success() {
            bail!("{status}: {}", response.text().await?);
        }
        Ok(response)
    }

    async fn streamed(&self, url: &str, mut body: Value, read: &AtomicU64) -> anyhow::Result<Answer> {
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        let mut bytes = self.post(url, body).await?.bytes_stream();
        let (mut text, mut answer, mut done) = (Vec::new(), Answer::new(), false);
        while let Some(part) = bytes.next().await {
            text.extend_from_slice(&part.context("the stream broke")?);
            while let Some(end) = text.windows(2).position(|two| two == b"\n\n") {
                let block = String::from_utf8(text.drain(..end + 2).collect())?;
                ensure!(!done, "nothing follows [DONE]: {block}");
                match block.trim_end().strip_prefix("data: ") {
                    Some("[DONE]") => done = true,
                    Some(json) => {
                        read.fetch_add(1, Relaxed);
                        let mut piece: Value = serde_json::from_str(json)?;
                        piece["created"].take();
                        let choice = piece["choices"][0]["index"].as_u64();
                        answer.entry(choice).or_default().push(piece.to_string());
                    }
                    None => ensure!(block.starts_with(':'), "{block}"),
                }
            }
        }
        ensure!(done, "it ends without [DONE]");
        Ok(answer)
    }

    async fn whole(&self, url: &str, body: Value, read: &AtomicU64) -> anyhow::Result<Answer> {
        let mut body: Value = self.post(url, body).await?.json().await?;
        read.fetch_add(1, Relaxed);
        body["created"].take();
        Ok(Answer::from([(None, vec![body.to_string()])]))
    }

    async fn typed(&self, grpc: &str, request: GenerateRequest, read: &AtomicU64) -> anyhow::Result<Answer> {
        let mut request = Request::new(request);
        request.metadata_mut().insert("x-request-id", self.name.parse()?);
        let mut responses = InferenceClient::new(wire::connect(grpc)).generate(request).await?.into_inner();
        let mut answer = Answer::new();
        while let Some(piece) = responses.message().await? {
            if piece.request_id.is_empty() {
                continue; // it waits
            }
            read.fetch_add(1, Relaxed);
            let choice = piece.usage.is_none().then_some(u64::from(piece.choice));
            answer.entry(choice).or_default().push(format!("{piece:?}"));
        }
        ensure!(answer.contains_key(&None), "it ends without usage");
        Ok(answer)
    }
}
