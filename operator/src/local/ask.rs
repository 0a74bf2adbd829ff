//! Asks one question over the router's HTTP, and writes thought and answer as they come.

use std::{io::Write, net::SocketAddr};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

/// A line of the answer, or an error's body, may be this long.
const MAX_BYTES: usize = 1 << 20;

/// Why there is no answer, or only half of one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The router does not answer.
    #[error("ask the router")]
    Connect(#[source] std::io::Error),
    /// The connection broke.
    #[error("read the answer")]
    Http(#[from] hyper::Error),
    /// The router or the worker refused.
    #[error("the model did not answer: {0}")]
    Refused(String),
    /// Not what an OpenAI endpoint sends.
    #[error("the answer cannot be read: {0}")]
    Malformed(String),
    /// The answer cannot be written.
    #[error("write the answer")]
    Write(#[from] std::io::Error),
}

/// Asks `model` and streams to `words`: the thought as the model marks it, in `<think>`, an empty line, the answer.
///
/// Greedy, so that the same question gets the same answer.
///
/// # Errors
/// See [`Error`].
pub(super) async fn ask(
    router: SocketAddr,
    model: &str,
    prompt: &str,
    words: &mut (dyn Write + Send),
) -> Result<(), Error> {
    let stream = TcpStream::connect(router).await.map_err(Error::Connect)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let mut response = sender.send_request(request(router, model, prompt)).await?;
    let result = if response.status() == StatusCode::OK {
        answer(response.body_mut(), words).await
    } else {
        Err(refusal(response.status(), response.body_mut()).await)
    };
    connection.abort();
    result
}

fn request(router: SocketAddr, model: &str, prompt: &str) -> Request<Full<Bytes>> {
    let body = serde_json::json!({
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": true,
        "temperature": 0,
    });
    Request::post("/v1/chat/completions")
        .header(header::HOST, router.to_string())
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::from(body.to_string()))
        .expect("the parts are valid")
}

async fn answer(body: &mut Incoming, words: &mut (dyn Write + Send)) -> Result<(), Error> {
    let (mut lines, mut transcript) = (Lines::default(), Transcript::default());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        for line in lines.push(&data)? {
            match line.strip_prefix("data:").map(str::trim) {
                Some("[DONE]") => return Ok(transcript.end(words)?),
                Some(event) => transcript.write(event, words)?,
                None => {} // a comment, or the empty line between events
            }
        }
    }
    Err(Error::Malformed("it ended without [DONE]".to_owned()))
}

async fn refusal(status: StatusCode, body: &mut Incoming) -> Error {
    let mut bytes = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data() {
            bytes.extend_from_slice(&data);
        }
        if bytes.len() > MAX_BYTES {
            break;
        }
    }
    match serde_json::from_slice::<Event>(&bytes) {
        Ok(Event { error: Some(error), .. }) => Error::Refused(error.message),
        _ => Error::Refused(status.to_string()),
    }
}

/// Cuts bytes into lines.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn push(&mut self, data: &[u8]) -> Result<Vec<String>, Error> {
        self.0.extend_from_slice(data);
        let end = self.0.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let whole: Vec<u8> = self.0.drain(..end).collect();
        if self.0.len() > MAX_BYTES {
            return Err(Error::Malformed(format!("a line is longer than {MAX_BYTES} bytes")));
        }
        let whole = String::from_utf8(whole).map_err(|error| Error::Malformed(error.to_string()))?;
        Ok(whole.lines().map(str::to_owned).collect())
    }
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    error: Option<wire::openai::ErrorObject>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Delta,
}

#[derive(Deserialize)]
struct Delta {
    reasoning_content: Option<String>,
    content: Option<String>,
}

/// What was written so far.
#[derive(Default)]
enum Transcript {
    #[default]
    Nothing,
    Thought,
    Answer,
}

impl Transcript {
    fn write(&mut self, event: &str, words: &mut (dyn Write + Send)) -> Result<(), Error> {
        let event: Event = serde_json::from_str(event).map_err(|error| Error::Malformed(error.to_string()))?;
        if let Some(error) = event.error {
            return Err(Error::Refused(error.message));
        }
        for Choice { delta } in event.choices {
            if let Some(thought) = delta.reasoning_content.filter(|text| !text.is_empty()) {
                if matches!(self, Self::Nothing) {
                    words.write_all(b"<think>")?;
                }
                *self = Self::Thought;
                words.write_all(thought.as_bytes())?;
            }
            if let Some(content) = delta.content.filter(|text| !text.is_empty()) {
                if matches!(self, Self::Thought) {
                    words.write_all(b"</think>\n\n")?;
                }
                *self = Self::Answer;
                words.write_all(content.as_bytes())?;
            }
        }
        Ok(words.flush()?)
    }

    fn end(self, words: &mut (dyn Write + Send)) -> std::io::Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Thought | Self::Answer => words.write_all(b"\n"),
        }?;
        words.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(events: &[&str]) -> Result<String, Error> {
        let (mut words, mut transcript) = (Vec::new(), Transcript::default());
        for event in events {
            transcript.write(event, &mut words)?;
        }
        transcript.end(&mut words)?;
        Ok(String::from_utf8(words).unwrap())
    }

    #[test]
    fn thought_and_answer_are_written_apart() {
        let events = [
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"reasoning_content":"7+5"}}]}"#,
            r#"{"choices":[{"delta":{"reasoning_content":"=12"}}]}"#,
            r#"{"choices":[{"delta":{"content":"13"}}]}"#,
            r#"{"choices":[{"delta":{"content":"2"},"finish_reason":"stop"}]}"#,
        ];
        assert_eq!(written(&events).unwrap(), "<think>7+5=12</think>\n\n132\n");
        assert_eq!(written(&events[3..]).unwrap(), "132\n");
        assert_eq!(written(&events[..1]).unwrap(), "");
    }

    #[test]
    fn an_error_in_the_stream_is_the_reason() {
        let error = r#"{"error":{"message":"the worker is gone","type":"server_error","param":null,"code":null}}"#;
        assert_eq!(written(&[error]).unwrap_err().to_string(), "the model did not answer: the worker is gone");
    }

    #[test]
    fn lines_are_cut_wherever_the_bytes_are() {
        let mut lines = Lines::default();
        let text = "data: ä\n\n: ping\ndata: [DONE]\n";
        let cut: Vec<String> = text.as_bytes().chunks(1).flat_map(|byte| lines.push(byte).unwrap()).collect();
        assert_eq!(cut, ["data: ä", "", ": ping", "data: [DONE]"]);
        assert!(lines.push(&vec![b'x'; MAX_BYTES + 1]).is_err());
    }
}
