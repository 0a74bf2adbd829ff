//! Waiting: bounds, deadlines, waking.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::sync::Semaphore;
use wire::proto::{ModelRemoved, instruction, model_snapshot::Availability};

use crate::{
    fake::{FakeWorker, Step, words},
    rig::{CHAT, Rig, eventually, in_time, json, model, post, send, text},
};

const STREAM: &str = r#"{"model":"m","stream":true,"messages":[]}"#;
const WHOLE: &str = r#"{"model":"m","messages":[]}"#;
/// Of the requests that weigh most, a worker takes four.
const BIG: &str = r#"{"model":"m","n":64,"messages":[]}"#;

async fn gated(gate: &Arc<Semaphore>) -> FakeWorker {
    let gate = gate.clone();
    FakeWorker::start("w", move |_| {
        let mut script = words("fine");
        script.insert(0, Step::Await(gate.clone()));
        Ok(script)
    })
    .await
}

#[tokio::test]
async fn a_full_queue_answers_429_with_retry_after_and_what_waits_is_served() {
    let gate = Arc::new(Semaphore::new(0));
    let worker = gated(&gate).await;
    let mut snapshot = model(&[&worker]);
    snapshot.max_pending = 2;
    let rig = Rig::start(vec![snapshot]).await;
    let ask = |body: &'static str| {
        let address = rig.http.clone();
        tokio::spawn(async move { send(&address, post(CHAT, body)).await.status().as_u16() })
    };
    let running = [ask(BIG), ask(BIG), ask(BIG), ask(BIG)];
    eventually("the worker is full", || rig.counts() == (0, 4)).await;
    let waiting = [ask(WHOLE), ask(BIG)];
    eventually("two wait", || rig.counts() == (2, 4)).await;
    let refused = rig.post(CHAT, WHOLE).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(json(refused).await["error"]["type"], "rate_limit_error");
    assert!(rig.metrics().contains("modelfleet_router_rejected_requests_total{reason=\"queue_full\""));

    gate.add_permits(6);
    for asked in running.into_iter().chain(waiting) {
        assert_eq!(in_time(asked).await.unwrap(), 200);
    }
    rig.idle().await;
}

#[tokio::test]
async fn many_choices_do_not_wait_for_a_worker_without_other_work_and_hold_up_nobody() {
    let gate = Arc::new(Semaphore::new(0));
    let worker = gated(&gate).await;
    let rig = Rig::start(vec![model(&[&worker])]).await;
    let asked = [WHOLE, BIG, WHOLE].map(|body| {
        let address = rig.http.clone();
        tokio::spawn(async move { send(&address, post(CHAT, body)).await.status().as_u16() })
    });
    eventually("all run at once", || rig.counts() == (0, 3)).await;
    gate.add_permits(3);
    for asked in asked {
        assert_eq!(in_time(asked).await.unwrap(), 200);
    }
    rig.idle().await;
}

#[tokio::test]
async fn who_waits_too_long_gets_503_and_who_streams_hears_comments() {
    let mut snapshot = model(&[]);
    snapshot.availability = Availability::Asleep.into();
    snapshot.max_wait_ms = 1500;
    let rig = Rig::start(vec![snapshot]).await;
    let whole = rig.post(CHAT, WHOLE).await;
    assert_eq!(whole.status(), 503);
    assert_eq!(whole.headers()["retry-after"], "5");

    let streamed = rig.post(CHAT, STREAM).await;
    assert_eq!(streamed.status(), 200, "it is told to wait after a second");
    let streamed = text(streamed).await;
    assert!(streamed.starts_with(": waiting\n\nevent: error\n") && !streamed.contains("[DONE]"), "{streamed}");
    rig.idle().await;
}

#[tokio::test]
async fn the_first_request_to_a_model_asleep_wakes_it_and_is_answered() {
    let worker = FakeWorker::start("w", |_| Ok(words("fine"))).await;
    let mut asleep = model(&[]);
    asleep.availability = Availability::Asleep.into();
    let rig = Rig::start(vec![asleep]).await;
    let address = rig.http.clone();
    let asked = tokio::spawn(async move { send(&address, post(CHAT, STREAM)).await });
    in_time(rig.router.somebody_waits()).await; // which pushes the load
    assert_eq!(rig.router.load().models[0].queued, 1);
    let mut body = in_time(asked).await.unwrap().into_body();
    let first = in_time(body.frame()).await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, ": waiting\n\n");
    rig.tell_model(model(&[&worker]));
    let rest = in_time(body.collect()).await.unwrap().to_bytes();
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
    rig.idle().await;
}

#[tokio::test]
async fn a_model_that_nothing_wakes_refuses_at_once() {
    let mut off = model(&[]);
    off.availability = Availability::Off.into();
    let rig = Rig::start(vec![off]).await;
    let response = rig.post(CHAT, STREAM).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
}

#[tokio::test]
async fn who_waits_for_a_model_that_is_deleted_hears_that_it_is_gone() {
    let rig = Rig::start(vec![model(&[])]).await;
    let address = rig.http.clone();
    let asked = tokio::spawn(async move { send(&address, post(CHAT, WHOLE)).await });
    eventually("it waits", || rig.counts() == (1, 0)).await;
    rig.tell(instruction::Instruction::Removed(ModelRemoved { model: "ns/m".into() }));
    assert_eq!(in_time(asked).await.unwrap().status(), 404);
}

#[tokio::test]
async fn who_leaves_the_queue_leaves_no_trace() {
    let rig = Rig::start(vec![model(&[])]).await;
    let stream = tokio::net::TcpStream::connect(&rig.http).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let asked = tokio::spawn(async move { sender.send_request(post(CHAT, WHOLE)).await });
    eventually("it waits", || rig.counts() == (1, 0)).await;
    asked.abort();
    connection.abort();
    rig.idle().await;
}

#[tokio::test]
async fn work_is_spread_over_the_workers_of_all_replicas() {
    let gate = Arc::new(Semaphore::new(0));
    let mut workers = Vec::new();
    for id in ["a", "b", "c", "d"] {
        let gate = gate.clone();
        let script = move || {
            let mut script = words("fine");
            script.insert(0, Step::Await(gate.clone()));
            script
        };
        workers.push(FakeWorker::start(id, move |_| Ok(script())).await);
    }
    let rig = Rig::start(vec![model(&workers.iter().collect::<Vec<_>>())]).await;
    let asked: Vec<_> = (0..80)
        .map(|_| {
            let address = rig.http.clone();
            tokio::spawn(async move { send(&address, post(CHAT, WHOLE)).await.status().as_u16() })
        })
        .collect();
    eventually("all run", || workers.iter().map(|worker| worker.seen.begun.load(SeqCst)).sum::<usize>() == 80).await;
    for worker in &workers {
        let calls = worker.calls();
        assert!((15..=25).contains(&calls), "{} has {calls} of 80", worker.id);
    }
    gate.add_permits(80);
    for asked in asked {
        assert_eq!(in_time(asked).await.unwrap(), 200);
    }
    rig.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_requests_with_clients_that_leave_anywhere_leave_nothing_behind() {
    let slow = || {
        let mut script = words("one two three four five six");
        script.insert(3, Step::Await(Arc::new(Semaphore::new(1))));
        script
    };
    let stuck = |seed: usize| seed.is_multiple_of(7);
    let mut workers = Vec::new();
    for id in ["a", "b", "c"] {
        let calls = std::sync::atomic::AtomicUsize::new(0);
        let never = Arc::new(Semaphore::new(0));
        let script = move |_: &_| {
            let mut script = slow();
            if stuck(calls.fetch_add(1, SeqCst)) {
                script.insert(2, Step::Await(never.clone())); // until the client leaves
            }
            Ok(script)
        };
        workers.push(FakeWorker::start(id, script).await);
    }
    let mut snapshot = model(&workers.iter().collect::<Vec<_>>());
    snapshot.max_pending = 10_000;
    let rig = Rig::start(vec![snapshot]).await;
    let places = Arc::new(Semaphore::new(100));
    let mut clients = tokio::task::JoinSet::new();
    for seed in 0..2000_u64 {
        let (address, places) = (rig.http.clone(), places.clone());
        clients.spawn(async move {
            let _place = places.acquire().await.unwrap();
            let patience = Duration::from_millis(if seed % 4 == 0 { 3000 } else { seed * 7919 % 60 });
            let body = if seed % 3 == 0 { WHOLE } else { STREAM };
            let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await.unwrap();
            let connection = tokio::spawn(connection);
            let asked = async {
                let response = sender.send_request(post(CHAT, body)).await.unwrap();
                response.into_body().collect().await.unwrap().to_bytes()
            };
            let answered = tokio::time::timeout(patience, asked).await.ok();
            connection.abort();
            answered.map(|answer| answer.len())
        });
    }
    let mut answered = 0;
    while let Some(client) = in_time(clients.join_next()).await {
        answered += usize::from(client.unwrap().is_some());
    }
    assert!(answered > 0 && answered < 2000, "{answered}: some stayed, some left");
    rig.idle().await;
    for worker in &workers {
        eventually("each answer ended", || worker.seen.begun.load(SeqCst) == worker.seen.ended.load(SeqCst)).await;
    }
    let (status, body) = rig.ask(r#"{"model":"none"}"#).await;
    assert_eq!(
        (status.as_u16(), serde_json::from_str::<Value>(&body).unwrap()["error"]["param"].as_str()),
        (404, Some("model"))
    );
}
