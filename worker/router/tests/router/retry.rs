//! Workers that cannot be reached, drain, or are lost.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::sync::Semaphore;
use tonic::{Code, Status};

use crate::{
    fake::{FakeWorker, Script, Step, words},
    rig::{CHAT, Rig, events, eventually, in_time, json, model, text},
};

const STREAM: &str = r#"{"model":"m","stream":true,"messages":[]}"#;
const WHOLE: &str = r#"{"model":"m","messages":[]}"#;

/// Fails the first `times` calls as `script` says, on whichever of two workers they come.
async fn failing_at_first(times: usize, script: fn() -> Script) -> (FakeWorker, FakeWorker) {
    let calls = Arc::new(AtomicUsize::new(0));
    let answer = move |calls: &AtomicUsize| {
        if calls.fetch_add(1, SeqCst) < times { script() } else { Ok(words("fine")) }
    };
    let other = calls.clone();
    (FakeWorker::start("a", move |_| answer(&calls)).await, FakeWorker::start("b", move |_| answer(&other)).await)
}

#[tokio::test]
async fn whatever_fails_before_the_first_piece_goes_to_another_worker() {
    let draining: fn() -> Script = || Err(Status::unavailable("draining"));
    let other_files: fn() -> Script = || Err(Status::failed_precondition("other content"));
    let busy: fn() -> Script = || Ok(vec![Step::Head(503, Value::Null)]);
    let lost: fn() -> Script = || Ok(vec![Step::Head(200, Value::Null), Step::Fail(Code::Internal)]);
    let ended: fn() -> Script = || Ok(vec![Step::Head(200, Value::Null)]);
    let mute: fn() -> Script = || Ok(Vec::new());
    for script in [draining, other_files, busy, lost, ended, mute] {
        let (a, b) = failing_at_first(1, script).await;
        let rig = Rig::start(vec![model(&[&a, &b])]).await;
        let streamed = text(rig.post(CHAT, STREAM).await).await;
        assert!(streamed.ends_with("data: [DONE]\n\n"), "{streamed}");
        assert_eq!((a.calls(), b.calls()), (1, 1), "at once, and not to the one that failed");
        rig.idle().await;
        assert!(rig.metrics().contains("modelfleet_router_retries_total{model=\"ns/m\""));
    }
}

#[tokio::test]
async fn a_whole_answer_survives_the_loss_of_its_worker_in_the_middle() {
    let (a, b) = failing_at_first(1, || {
        Ok(vec![Step::Head(200, Value::Null), Step::Text(0, "half "), Step::Fail(Code::Unavailable)])
    })
    .await;
    let rig = Rig::start(vec![model(&[&a, &b])]).await;
    let body = json(rig.post(CHAT, WHOLE).await).await;
    assert_eq!(body["choices"][0]["message"]["content"], "half fine", "though streams of this model do not go on");
    let calls = [a, b].map(|worker| worker.seen.calls.lock().unwrap().pop().unwrap());
    assert_eq!(calls.iter().filter(|call| call.resume.is_some()).count(), 1);
    rig.idle().await;
}

#[tokio::test]
async fn a_stream_that_breaks_after_its_first_piece_says_so_and_has_no_done() {
    let broken = vec![Step::Head(200, Value::Null), Step::Text(0, "half"), Step::Fail(Code::Unavailable)];
    let failed = vec![Step::Head(200, Value::Null), Step::Text(0, "half"), Step::Error("server_error", "no expert")];
    let silent = vec![Step::Head(200, Value::Null), Step::Text(0, "half")];
    for (script, message) in [
        (broken, "The model could not answer; try again later"),
        (failed, "no expert"),
        (silent, "The model could not answer; try again later"),
    ] {
        let worker = FakeWorker::start("w", move |_| Ok(script.clone())).await;
        let rig = Rig::start(vec![model(&[&worker])]).await;
        let streamed = text(rig.post(CHAT, STREAM).await).await;
        assert!(streamed.contains("event: error\n") && !streamed.contains("[DONE]"), "{streamed}");
        let last: Value = serde_json::from_str(events(&streamed).last().unwrap()).unwrap();
        assert_eq!(last["error"]["message"], message);
        assert!(!streamed.contains("10.1.2.3"), "nothing internal");
        rig.idle().await;
    }
}

#[tokio::test]
async fn a_failure_before_the_first_piece_has_a_status() {
    for body in [STREAM, WHOLE] {
        let worker = FakeWorker::start("w", |_| {
            Ok(vec![Step::Head(200, Value::Null), Step::Error("server_error", "no expert")])
        })
        .await;
        let rig = Rig::start(vec![model(&[&worker])]).await;
        let response = rig.post(CHAT, body).await;
        assert_eq!(response.status(), 500);
        assert_eq!(json(response).await["error"]["message"], "no expert");
        assert_eq!(worker.calls(), 1);
    }
}

#[tokio::test]
async fn a_request_that_kills_its_worker_does_not_kill_all() {
    let mut workers = Vec::new();
    for id in ["a", "b", "c", "d", "e"] {
        let lost = || Ok(vec![Step::Head(200, Value::Null), Step::Fail(Code::Internal)]);
        workers.push(FakeWorker::start(id, move |_| lost()).await);
    }
    let rig = Rig::start(vec![model(&workers.iter().collect::<Vec<_>>())]).await;
    let response = rig.post(CHAT, STREAM).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(workers.iter().map(FakeWorker::calls).sum::<usize>(), 3);
    rig.idle().await;
}

#[tokio::test]
async fn a_dead_worker_costs_no_request() {
    let mut dead = FakeWorker::start("dead", |_| Ok(words("fine"))).await;
    let live = FakeWorker::start("live", |_| Ok(words("fine"))).await;
    let rig = Rig::start(vec![model(&[&dead, &live])]).await;
    dead.kill().await;
    for _ in 0..20 {
        let (status, body) = rig.ask(STREAM).await;
        assert!(status == 200 && body.ends_with("data: [DONE]\n\n"), "{status} {body}");
    }
    rig.idle().await;
}

#[tokio::test]
async fn with_all_workers_dead_requests_are_held_and_then_refused_without_a_word_about_them() {
    let mut worker = FakeWorker::start("w", |_| Ok(words("fine"))).await;
    let address = worker.address.clone();
    let mut snapshot = model(&[&worker]);
    snapshot.max_wait_ms = 600;
    let rig = Rig::start(vec![snapshot]).await;
    worker.kill().await;
    let response = rig.post(CHAT, WHOLE).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let body = text(response).await;
    assert!(!body.contains(&address) && !body.contains("onnect"), "{body}");
    rig.idle().await;
}

#[tokio::test]
async fn a_worker_that_drains_gets_no_new_request_but_finishes_its_own() {
    let gate = Arc::new(Semaphore::new(0));
    let mut script = vec![Step::Head(200, Value::Null), Step::Text(0, "half"), Step::Await(gate.clone())];
    script.extend(words("rest").split_off(1));
    let old = FakeWorker::start("old", move |_| Ok(script.clone())).await;
    let new = FakeWorker::start("new", |_| Ok(words("fine"))).await;
    let rig = Rig::start(vec![model(&[&old])]).await;
    let mut running = rig.post(CHAT, STREAM).await.into_body();
    assert!(in_time(running.frame()).await.is_some());
    let mut snapshot = model(&[&old, &new]);
    snapshot.workers[0].draining = true;
    rig.tell_model(snapshot);
    for _ in 0..5 {
        assert_eq!(rig.ask(WHOLE).await.0, 200);
    }
    assert_eq!((old.calls(), new.calls()), (1, 5));
    rig.tell_model(model(&[&new])); // the operator no longer lists it
    gate.add_permits(1);
    let rest = in_time(running.collect()).await.unwrap().to_bytes();
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
    rig.idle().await;
}

#[tokio::test]
async fn the_name_is_used_where_the_address_fails() {
    let worker = FakeWorker::start("w", |_| Ok(words("fine"))).await;
    let mut snapshot = model(&[&worker]);
    snapshot.workers[0].dns_name = worker.address.replace("127.0.0.1", "localhost");
    snapshot.workers[0].address = "127.0.0.1:1".into();
    let rig = Rig::start(vec![snapshot]).await;
    let looking = rig.router.clone();
    let looks = tokio::spawn(async move {
        let mut turns = tokio::time::interval(std::time::Duration::from_millis(20));
        turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            turns.tick().await;
            looking.look();
        }
    });
    assert_eq!(rig.ask(WHOLE).await.0, 200);
    looks.abort();
}

#[tokio::test]
async fn a_client_that_leaves_cancels_at_the_worker() {
    let gate = Arc::new(Semaphore::new(0));
    for (body, steps) in [(STREAM, 2), (STREAM, 1), (WHOLE, 2)] {
        let mut script = vec![Step::Head(200, Value::Null), Step::Text(0, "half")];
        script.truncate(steps); // it leaves before the first piece, or after
        script.push(Step::Await(gate.clone()));
        let worker = FakeWorker::start("w", move |_| Ok(script.clone())).await;
        let rig = Rig::start(vec![model(&[&worker])]).await;
        let stream = tokio::net::TcpStream::connect(&rig.http).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let asked = tokio::spawn(async move { sender.send_request(crate::rig::post(CHAT, body)).await });
        eventually("the worker has begun", || worker.seen.begun.load(SeqCst) == 1).await;
        if steps == 2 && body == STREAM {
            let mut response = in_time(asked).await.unwrap().unwrap().into_body();
            assert!(in_time(response.frame()).await.is_some());
        } else {
            asked.abort();
        }
        connection.abort();
        eventually("the worker was cancelled", || worker.seen.ended.load(SeqCst) == 1).await;
        rig.idle().await;
        assert!(rig.metrics().contains("error_type=\"cancelled\""));
    }
}
