//! An HTTP client as small as these tests need it.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

/// A client without a proxy and with a deadline, so that a hang is a failure.
pub(crate) fn client() -> reqwest::Client {
    // A second call finds the first one's provider in place, which is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(180)).build().expect("plain settings")
}

/// What came back for a chat: the thought, the answer, and how many tokens it took.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) reasoning: String,
    pub(crate) content: String,
    pub(crate) finish_reason: String,
    pub(crate) completion_tokens: u64,
}

/// Asks for a whole chat completion, greedily.
pub(crate) async fn chat(url: &str, model: &str, question: &str) -> anyhow::Result<Answer> {
    let body = json!({
        "model": model, "temperature": 0, "messages": [{"role": "user", "content": question}],
    });
    let response = client().post(format!("{url}/v1/chat/completions")).json(&body).send().await?;
    let status = response.status();
    let text = response.text().await?;
    ensure!(status.is_success(), "{status}: {text}");
    let reply: Value = serde_json::from_str(&text)?;
    let choice = &reply["choices"][0];
    let string = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(Answer {
        reasoning: string(&choice["message"]["reasoning_content"]),
        content: string(&choice["message"]["content"]),
        finish_reason: string(&choice["finish_reason"]),
        completion_tokens: reply["usage"]["completion_tokens"].as_u64().context("usage is counted")?,
    })
}

/// Asks for a streamed chat completion, greedily, and puts its pieces together.
pub(crate) async fn chat_streamed(url: &str, model: &str, question: &str) -> anyhow::Result<Answer> {
    let body = json!({
        "model": model, "temperature": 0, "stream": true, "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": question}],
    });
    let response = client().post(format!("{url}/v1/chat/completions")).json(&body).send().await?;
    ensure!(response.status().is_success(), "{}: {}", response.status(), response.text().await?);
    let text = response.text().await?;
    let mut answer = Answer::default();
    let mut done = false;
    for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
        ensure!(!done, "nothing follows [DONE]: {data}");
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let chunk: Value = serde_json::from_str(data)?;
        if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
            answer.completion_tokens = tokens;
        }
        let choice = &chunk["choices"][0];
        answer.reasoning += choice["delta"]["reasoning_content"].as_str().unwrap_or_default();
        answer.content += choice["delta"]["content"].as_str().unwrap_or_default();
        answer.finish_reason += choice["finish_reason"].as_str().unwrap_or_default();
    }
    ensure!(done, "the stream ends with [DONE]: {text}");
    Ok(answer)
}
