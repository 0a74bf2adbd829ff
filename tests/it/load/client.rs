//! Clients of an echo: over HTTP or gRPC, streamed or whole; they stay to the end, or leave where chance tells them to.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, ensure};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinHandle};
use tonic::transport::Channel;
use wire::proto::{GenerateRequest, TokenIds, generate_request::Input, inference_client::InferenceClient};
use worker::text::Text;

/// Where a client leaves.
#[derive(Clone, Copy)]
enum Leave {
    Never,
    /// With a part of its request sent.
    Sending,
    /// So long after its request, before there is a head if it can.
    Waiting(Duration),
    /// After so many pieces of the answer.
    Reading(usize),
}

/// One request. The answer that is asked for is `sentence`, `rounds` times.
struct Asked {
    sentence: String,
    ids: Vec<u32>,
    rounds: usize,
    choices: u32,
    streamed: bool,
    typed: bool,
    leave: Leave,
}

/// What was said, by choice, and how many tokens that took if it was told.
#[derive(Default)]
struct Said {
    texts: BTreeMap<u64, String>,
    tokens: Option<u64>,
}

/// Closes a connection when dropped.
struct Connection<T>(JoinHandle<T>);

impl<T> Drop for Connection<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Clients of one router.
pub(super) struct Clients {
    http: String,
    inference: InferenceClient<Channel>,
    text: Text,
}

impl Clients {
    pub(super) fn new(http: &str, grpc: &str) -> Self {
        let text = Text::load(&tests::root().join("manifests/models/tiny-r1"), 512).unwrap();
        Self { http: http.to_owned(), inference: InferenceClient::new(wire::connect(grpc)), text }
    }

    /// Asks what `seed` and `number` draw. Returns whether the client stayed.
    pub(super) async fn ask(&self, seed: u64, number: u64) -> anyhow::Result<bool> {
        let asked = self.draw(seed, number)?;
        let said = if asked.typed { self.over_grpc(&asked).await? } else { self.over_http(&asked).await? };
        let Some(said) = said else { return Ok(false) };
        let expected = asked.sentence.repeat(asked.rounds);
        ensure!(said.texts.len() == asked.choices as usize, "{:?} are not {} choices", said.texts, asked.choices);
        for text in said.texts.values() {
            ensure!(*text == expected, "{text:?} is not {expected:?}");
        }
        let tokens = (asked.ids.len() * asked.rounds) as u64 * u64::from(asked.choices);
        ensure!(said.tokens == Some(tokens), "{:?} tokens are not {tokens}", said.tokens);
        Ok(true)
    }

    fn draw(&self, seed: u64, number: u64) -> anyhow::Result<Asked> {
        let mut draw = fastrand::Rng::with_seed(seed ^ number);
        let leave = match draw.u32(..10) {
            0 => Leave::Sending,
            1 => Leave::Waiting(Duration::from_micros(draw.u64(..5_000))),
            2 | 3 => Leave::Reading(draw.usize(1..40)),
            _ => Leave::Never,
        };
        let sentence = format!("{number} is mine. ");
        let rounds = if matches!(leave, Leave::Never) { draw.usize(1..4) } else { draw.usize(1..30) };
        Ok(Asked {
            ids: self.text.encode(&sentence, false)?,
            sentence,
            rounds,
            choices: if draw.u32(..8) == 0 { 3 } else { 1 },
            streamed: draw.bool(),
            typed: draw.u32(..4) == 0,
            leave,
        })
    }

    /// `None`: the client left.
    async fn over_http(&self, asked: &Asked) -> anyhow::Result<Option<Said>> {
        let body = json!({
            "model": "echo", "prompt": asked.ids, "max_tokens": asked.ids.len() * asked.rounds, "n": asked.choices,
            "stream": asked.streamed, "stream_options": {"include_usage": true},
        })
        .to_string();
        let mut stream = TcpStream::connect(&self.http).await?;
        if matches!(asked.leave, Leave::Sending) {
            let (path, length) = ("/v1/completions", body.len());
            let request = format!("POST {path} HTTP/1.1\r\nhost: router\r\ncontent-length: {length}\r\n\r\n{body}");
            stream.write_all(&request.as_bytes()[..request.len() / (1 + asked.rounds)]).await?;
            return Ok(None);
        }
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let _connection = Connection(tokio::spawn(connection));
        let request = Request::post("/v1/completions").header("host", "router");
        let request = request.header("content-type", "application/json").body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request);
        let mut response = match asked.leave {
            Leave::Waiting(time) => {
                let _ = tokio::time::timeout(time, response).await; // whatever came, nobody reads it
                return Ok(None);
            }
            _ => response.await?,
        };
        let (status, mut bytes, mut pieces) = (response.status(), Vec::new(), 0);
        while let Some(frame) = response.frame().await {
            bytes.extend(frame?.into_data().unwrap_or_default());
            pieces += 1;
            if matches!(asked.leave, Leave::Reading(most) if pieces >= most) {
                return Ok(None);
            }
        }
        let text = String::from_utf8(bytes)?;
        ensure!(status == 200, "{status}: {text}");
        if asked.streamed { of_events(&text) } else { of_answer(&text) }.map(Some)
    }

    async fn over_grpc(&self, asked: &Asked) -> anyhow::Result<Option<Said>> {
        let request = GenerateRequest {
            model: "echo".into(),
            input: Some(Input::PromptTokenIds(TokenIds { ids: asked.ids.clone() })),
            max_tokens: u32::try_from(asked.ids.len() * asked.rounds).ok(),
            n: Some(asked.choices),
            ..Default::default()
        };
        let mut client = self.inference.clone();
        let response = client.generate(request);
        let mut responses = match asked.leave {
            Leave::Sending => {
                let _ = tokio::time::timeout(Duration::ZERO, response).await; // a unary message is sent whole
                return Ok(None);
            }
            Leave::Waiting(time) => {
                let _ = tokio::time::timeout(time, response).await;
                return Ok(None);
            }
            Leave::Never | Leave::Reading(_) => response.await?.into_inner(),
        };
        let (mut said, mut pieces) = (Said::default(), 0);
        while let Some(response) = responses.message().await? {
            if let Some(usage) = response.usage {
                said.tokens = Some(usage.completion_tokens.into());
            } else {
                said.texts.entry(response.choice.into()).or_default().push_str(&response.text);
            }
            pieces += 1;
            if matches!(asked.leave, Leave::Reading(most) if pieces >= most) {
                return Ok(None);
            }
        }
        Ok(Some(said))
    }
}

fn of_answer(text: &str) -> anyhow::Result<Said> {
    let mut said = Said::default();
    said.add(&serde_json::from_str(text)?)?;
    Ok(said)
}

fn of_events(text: &str) -> anyhow::Result<Said> {
    let (mut said, mut done) = (Said::default(), false);
    for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
        ensure!(!done, "nothing follows [DONE]: {data}");
        done = data == "[DONE]";
        if !done {
            said.add(&serde_json::from_str(data)?)?;
        }
    }
    ensure!(done, "the stream ends with [DONE]: {text}");
    Ok(said)
}

impl Said {
    fn add(&mut self, object: &Value) -> anyhow::Result<()> {
        self.tokens = object["usage"]["completion_tokens"].as_u64().or(self.tokens);
        for choice in object["choices"].as_array().with_context(|| format!("no choices: {object}"))? {
            let index = choice["index"].as_u64().context("a choice has an index")?;
            self.texts.entry(index).or_default().push_str(choice["text"].as_str().unwrap_or_default());
        }
        Ok(())
    }
}
