//! An answer taken over from a lost worker, wherever it was cut: what is missing comes, to the byte, and nothing twice.

use std::collections::BTreeMap;

use futures::StreamExt as _;
use wire::proto::Chunk;

use super::*;

/// The pieces of an answer, in order.
async fn pieces(worker: &Running, endpoint: Endpoint, body: &Value, resume: Option<Resume>) -> Vec<Chunk> {
    let call = GenerateCall {
        endpoint: endpoint.into(),
        body: body.to_string().into_bytes().into(),
        request_id: "r-1".into(),
        created: 7,
        model: "tiny".into(),
        resume,
        ..GenerateCall::default()
    };
    let mut stream = worker.call(call).await.unwrap();
    let mut pieces = Vec::new();
    while let Some(reply) = stream.message().await.unwrap() {
        match reply.reply.unwrap() {
            Reply::Head(head) => assert_eq!(head.status, 200, "{head:?}"),
            Reply::Chunk(chunk) => pieces.push(chunk),
        }
    }
    pieces
}

/// What a client has that got these pieces.
fn had(pieces: &[Chunk]) -> Option<Resume> {
    let mut choices = BTreeMap::<u32, ResumedChoice>::new();
    for piece in pieces.iter().filter(|piece| piece.kind() == Kind::Delta) {
        let had = choices.entry(piece.choice).or_insert(ResumedChoice { choice: piece.choice, ..Default::default() });
        had.token_ids.extend(&piece.token_ids);
        had.finished |= piece.ends_choice;
    }
    (!choices.is_empty()).then(|| Resume { choices: choices.into_values().collect() })
}

/// By choice, and the usage: choices come in no order among each other.
fn by_choice(pieces: &[Chunk]) -> BTreeMap<(i32, u32), Vec<&Chunk>> {
    let mut sorted = BTreeMap::<_, Vec<_>>::new();
    for piece in pieces {
        sorted.entry((piece.kind, piece.choice)).or_default().push(piece);
    }
    sorted
}

fn thought() -> (Endpoint, Value) {
    let mut body = sum();
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    (Endpoint::ChatCompletions, body)
}

fn choices() -> (Endpoint, Value) {
    let message = json!({"role": "user", "content": "What is 318 + 475?"});
    let body = json!({
        "messages": [message], "n": 3, "max_tokens": 40, "temperature": 1.1, "seed": 7,
        "frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1,
    });
    (Endpoint::ChatCompletions, body)
}

fn echo() -> (Endpoint, Value) {
    let body = json!({
        "prompt": ["1 + 1 =", "2 2 2"], "n": 2, "max_tokens": 12, "temperature": 0.9, "echo": true, "logprobs": 2,
        "ignore_eos": true,
    });
    (Endpoint::Completions, body)
}

/// Characters of several tokens, and bytes that are none.
fn crabs() -> (Endpoint, Value) {
    let text = crate::text::tests::tiny();
    let bytes = text.encode("🦀中é", false).unwrap();
    let bias: serde_json::Map<String, Value> = bytes.iter().map(|id| (id.to_string(), json!(60))).collect();
    let body = json!({
        "prompt": "crabs: 🦀🦀", "max_tokens": 60, "temperature": 1.5, "logit_bias": bias, "logprobs": 0, "seed": 3,
    });
    (Endpoint::Completions, body)
}

/// Ends by a stop string that begins in one token and ends in another.
fn stopped() -> (Endpoint, Value) {
    let mut body = sum();
    body["stop"] = json!(["7+5=12 ", "never"]);
    (Endpoint::ChatCompletions, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_cut_after_any_piece_goes_on_with_the_next() {
    let worker = Running::start(16).await;
    for (endpoint, body) in [thought(), choices(), echo(), crabs(), stopped()] {
        let whole = pieces(&worker, endpoint, &body, None).await;
        assert!(whole.len() > 5, "{}", whole.len());
        let cuts = futures::stream::iter(1..=whole.len()).map(async |cut| {
            let (had_pieces, missing) = whole.split_at(cut.min(whole.len() - 1));
            let rest = pieces(&worker, endpoint, &body, had(had_pieces)).await;
            assert_eq!(by_choice(&rest), by_choice(missing), "{body} after {cut} pieces");
        });
        cuts.buffer_unordered(16).collect::<()>().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_cut_between_any_two_tokens_goes_on_with_the_next() {
    let worker = Running::start(16).await;
    let shown = |endpoint: Endpoint, pieces: &[Chunk]| -> String {
        let parsed = pieces.iter().map(|piece| serde_json::from_slice::<Value>(&piece.json).unwrap());
        let parts = match endpoint {
            Endpoint::ChatCompletions => &["/choices/0/delta/reasoning_content", "/choices/0/delta/content"][..],
            _ => &["/choices/0/text"],
        };
        parsed
            .flat_map(|json| {
                parts.iter().map(move |part| json.pointer(part)?.as_str().map(str::to_owned)).collect::<Vec<_>>()
            })
            .flatten()
            .collect()
    };
    for (endpoint, body) in [thought(), crabs(), stopped()] {
        let whole = pieces(&worker, endpoint, &body, None).await;
        let tokens: Vec<u32> = whole.iter().flat_map(|piece| piece.token_ids.clone()).collect();
        let usage = whole.last().unwrap();
        let cuts = futures::stream::iter(0..=tokens.len()).map(async |cut| {
            let had = ResumedChoice { token_ids: tokens[..cut].to_vec(), ..ResumedChoice::default() };
            let rest = pieces(&worker, endpoint, &body, Some(Resume { choices: vec![had] })).await;
            let mut count = 0;
            let before = whole.iter().take_while(|piece| {
                count += piece.token_ids.len();
                count <= cut && !piece.ends_choice
            });
            let all = shown(endpoint, &before.cloned().collect::<Vec<_>>()) + &shown(endpoint, &rest);
            assert_eq!(all, shown(endpoint, &whole), "{body} after {cut} tokens");
            let rest_tokens: Vec<u32> = rest.iter().flat_map(|piece| piece.token_ids.clone()).collect();
            assert_eq!(rest_tokens, tokens[cut..], "{body} after {cut} tokens");
            assert_eq!(rest.last(), Some(usage), "{body} after {cut} tokens");
        });
        cuts.buffer_unordered(16).collect::<()>().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_client_can_have_is_refused() {
    let worker = Running::start(2).await;
    let resumed =
        |choice, token_ids: Vec<u32>| Resume { choices: vec![ResumedChoice { choice, token_ids, finished: false }] };
    for (resume, words) in [(resumed(1, vec![7]), "the request has 1"), (resumed(0, vec![600]), "token 600")] {
        let call = GenerateCall {
            endpoint: Endpoint::Completions.into(),
            body: json!({"prompt": "1", "max_tokens": 9}).to_string().into_bytes().into(),
            resume: Some(resume),
            ..GenerateCall::default()
        };
        let answer = gather(worker.call(call).await.unwrap()).await;
        assert_eq!(answer.status, 400);
        assert!(answer.refusal["error"]["message"].as_str().unwrap().contains(words), "{}", answer.refusal);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_out_of_time_lets_others_go_on() {
    let mut worker = Running::start(8).await;
    let mut stream = worker.generate(Endpoint::Completions, endless()).await.unwrap();
    worker.end(Shutdown::Within(Duration::from_millis(100)));
    let status = loop {
        match stream.message().await {
            Ok(reply) => assert!(reply.is_some(), "it ends without a word"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    worker.task.await.unwrap().unwrap();
}
