//! Answers that outlive their worker.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    time::Duration,
};

use http_body_util::BodyExt as _;
use router::Patience;
use serde_json::Value;
use tokio::sync::Semaphore;
use tonic::Code;
use wire::proto::{GenerateRequest, ModelSnapshot, generate_request::Input, inference_client::InferenceClient};

use crate::{
    fake::{FakeWorker, Step, rest, words},
    rig::{CHAT, Rig, events, eventually, in_time, json, model, text},
};

const STREAM: &str = r#"{"model":"m","stream":true,"stream_options":{"include_usage":true},"messages":[]}"#;
const WHOLE: &str = r#"{"model":"m","messages":[]}"#;
const TEXT: &str = "one two three four five";
/// Pieces of [`TEXT`]: its words, its end, its usage.
const PIECES: usize = 7;

/// How a worker is lost.
#[derive(Clone, Copy, Debug)]
enum End {
    Status(Code),
    /// The stream ends without a last piece.
    Silence,
    /// All its connections are closed.
    Death,
}

/// Two workers. The first that is called gives `pieces` of the answer, then does `ends`; the other gives the rest.
async fn cut_after(pieces: usize, ends: &[Step]) -> [FakeWorker; 2] {
    let calls = Arc::new(AtomicUsize::new(0));
    let script = |ends: Vec<Step>, calls: Arc<AtomicUsize>| {
        move |call: &_| {
            let mut steps = rest(call, TEXT);
            if calls.fetch_add(1, SeqCst) == 0 {
                steps.truncate(1 + pieces);
                steps.extend(ends.clone());
            }
            Ok(steps)
        }
    };
    let a = FakeWorker::start_apart("a", script(ends.to_vec(), calls.clone())).await;
    [a, FakeWorker::start_apart("b", script(ends.to_vec(), calls)).await]
}

fn migrating(workers: &[FakeWorker], attempts: u32) -> ModelSnapshot {
    ModelSnapshot { migration_attempts: attempts, ..model(&workers.iter().collect::<Vec<_>>()) }
}

/// What the client reads, but for what differs between any two requests.
fn shown(streamed: &str) -> Vec<Value> {
    let read = |event: String| match &*event {
        "[DONE]" => Value::Null,
        event => {
            let mut event: Value = serde_json::from_str(event).unwrap();
            (event["id"], event["created"]) = (Value::Null, Value::Null);
            event
        }
    };
    events(streamed).into_iter().map(read).collect()
}

async fn undisturbed() -> Vec<Value> {
    let worker = FakeWorker::start("w", |_| Ok(words(TEXT))).await;
    let rig = Rig::start(vec![model(&[&worker])]).await;
    let shown = shown(&rig.ask(STREAM).await.1);
    assert_eq!(shown.len(), PIECES + 1);
    shown
}

#[tokio::test]
async fn a_stream_whose_worker_is_lost_after_any_piece_goes_on_with_the_next() {
    let expected = undisturbed().await;
    for pieces in 1..PIECES {
        for end in [End::Status(Code::Unavailable), End::Status(Code::Internal), End::Silence, End::Death] {
            let gate = Arc::new(Semaphore::new(0));
            let ends = match end {
                End::Status(code) => vec![Step::Fail(code)],
                End::Silence => Vec::new(),
                End::Death => vec![Step::Await(gate)],
            };
            let workers = cut_after(pieces, &ends).await;
            let rig = Rig::start(vec![migrating(&workers, 1)]).await;
            let mut response = rig.post(CHAT, STREAM).await.into_body();
            let mut streamed = Vec::new();
            for _ in 0..pieces {
                streamed.extend(in_time(response.frame()).await.unwrap().unwrap().into_data().unwrap());
            }
            if let End::Death = end {
                for worker in workers.iter().filter(|worker| worker.calls() == 1) {
                    worker.close();
                }
            }
            streamed.extend(in_time(response.collect()).await.unwrap().to_bytes());
            let streamed = String::from_utf8(streamed).unwrap();
            assert_eq!(shown(&streamed), expected, "{end:?} after {pieces} pieces");
            rig.idle().await;
            let counted = "modelfleet_router_resumed_streams_total{model=\"ns/m\",reason=\"lost\"";
            assert!(rig.metrics().contains(counted), "{}", rig.metrics());
        }
    }
}

#[tokio::test]
async fn a_stream_goes_on_though_another_model_took_over_the_name_that_it_came_by() {
    let gate = Arc::new(Semaphore::new(0));
    let workers = cut_after(2, &[Step::Await(gate.clone()), Step::Fail(Code::Unavailable)]).await;
    let rig = Rig::start(vec![migrating(&workers, 1)]).await;
    let mut response = rig.post(CHAT, STREAM).await.into_body();
    let mut streamed = in_time(response.frame()).await.unwrap().unwrap().into_data().unwrap().to_vec();
    rig.tell_model(ModelSnapshot { model: "ns/older".into(), created: 1, ..model(&[]) });
    assert_eq!(rig.router.find("m").unwrap().model().name, "ns/older");
    gate.add_permits(1);
    streamed.extend(in_time(response.collect()).await.unwrap().to_bytes());
    assert_eq!(shown(&String::from_utf8(streamed).unwrap()), undisturbed().await);
    rig.idle().await;
}

#[tokio::test]
async fn whole_bodies_and_typed_streams_go_on_too() {
    let workers = cut_after(3, &[Step::Fail(Code::Unavailable)]).await;
    let rig = Rig::start(vec![migrating(&workers, 1)]).await;
    let body = json(rig.post(CHAT, WHOLE).await).await;
    assert_eq!(body["choices"][0]["message"]["content"], TEXT);
    assert_eq!(
        (&body["choices"][0]["finish_reason"], &body["usage"]["completion_tokens"]),
        (&"stop".into(), &5.into())
    );

    let workers = cut_after(3, &[Step::Fail(Code::Unavailable)]).await;
    let rig = Rig::start(vec![migrating(&workers, 1)]).await;
    let request =
        GenerateRequest { model: "m".into(), input: Some(Input::Prompt("a".into())), ..GenerateRequest::default() };
    let mut client = InferenceClient::new(wire::connect(&rig.grpc));
    let mut responses = in_time(client.generate(request)).await.unwrap().into_inner();
    let mut pieces = Vec::new();
    while let Some(piece) = in_time(responses.message()).await.unwrap() {
        pieces.push(piece);
    }
    assert_eq!(pieces.iter().map(|piece| &*piece.text).collect::<String>(), TEXT);
    assert_eq!(pieces.len(), PIECES);
    rig.idle().await;
}

#[tokio::test]
async fn the_next_worker_is_told_what_the_client_has() {
    let workers = cut_after(2, &[Step::Fail(Code::Unavailable)]).await;
    let rig = Rig::start(vec![migrating(&workers, 1)]).await;
    rig.ask(STREAM).await;
    let calls = workers.each_ref().map(|worker| worker.seen.calls.lock().unwrap()[0].clone());
    let (first, second) = if calls[0].resume.is_none() { (&calls[0], &calls[1]) } else { (&calls[1], &calls[0]) };
    let resume = second.resume.as_ref().unwrap();
    assert_eq!((resume.choices.len(), &resume.choices[0].token_ids[..]), (1, &[5, 5][..]));
    assert!(!resume.choices[0].finished);
    let said = |call: &wire::proto::GenerateCall| (call.request_id.clone(), call.created, call.body.clone());
    assert_eq!(said(first), said(second), "all that seeds and objects come from");
}

#[tokio::test]
async fn attempts_end_and_where_there_are_none_a_stream_ends_with_its_worker() {
    for (attempts, calls) in [(0, 1), (1, 2), (3, 4)] {
        let script = |call: &_| {
            let mut steps = rest(call, TEXT);
            steps.truncate(2);
            steps.push(Step::Fail(Code::Unavailable));
            Ok(steps)
        };
        let mut workers = Vec::new();
        for id in ["a", "b", "c", "d", "e"] {
            workers.push(FakeWorker::start(id, script).await);
        }
        let rig = Rig::start(vec![migrating(&workers, attempts)]).await;
        let (_, streamed) = rig.ask(STREAM).await;
        assert!(streamed.contains("event: error\n") && !streamed.contains("[DONE]"), "{streamed}");
        assert_eq!(events(&streamed).len(), calls + 1, "a piece from each worker, and the error");
        assert_eq!(workers.iter().map(FakeWorker::calls).sum::<usize>(), calls);
        rig.idle().await;
        let counted = "modelfleet_router_unresumed_streams_total{model=\"ns/m\",reason=\"lost\"";
        assert!(rig.metrics().contains(counted), "{}", rig.metrics());
    }
}

#[tokio::test]
async fn a_stream_waits_for_a_worker_of_its_content_as_long_as_a_request_does() {
    let expected = undisturbed().await;
    for comes_back in [true, false] {
        let script = |call: &_| {
            let mut steps = rest(call, TEXT);
            if call.resume.is_none() {
                steps.truncate(4);
                steps.push(Step::Fail(Code::Unavailable));
            }
            Ok(steps)
        };
        let mut lost = FakeWorker::start("lost", script).await;
        let other = FakeWorker::start("other", |_| Ok(words("never"))).await;
        let back = FakeWorker::start("back", script).await;
        let mut snapshot = migrating(std::slice::from_ref(&lost), 1);
        snapshot.max_wait_ms = if comes_back { 20_000 } else { 300 };
        let rig = Rig::start(vec![snapshot.clone()]).await;
        let mut response = rig.post(CHAT, STREAM).await.into_body();
        let mut streamed = in_time(response.frame()).await.unwrap().unwrap().into_data().unwrap().to_vec();
        lost.kill().await;
        snapshot.workers[0] = other.entry();
        snapshot.workers[0].revision = "next".into();
        rig.tell_model(snapshot.clone());
        if comes_back {
            eventually("the stream waits", || rig.counts() == (1, 0)).await;
            assert_eq!(rig.ask(WHOLE).await.0, 200, "it holds up nobody");
            snapshot.workers.push(back.entry());
            rig.tell_model(snapshot);
        }
        streamed.extend(in_time(response.collect()).await.unwrap().to_bytes());
        let streamed = String::from_utf8(streamed).unwrap();
        if comes_back {
            assert_eq!(shown(&streamed), expected);
        } else {
            assert!(streamed.contains("\"queue_timeout\"") && !streamed.contains("[DONE]"), "{streamed}");
        }
        rig.idle().await;
    }
}

#[tokio::test]
async fn a_stream_leaves_a_worker_that_drains_or_is_no_longer_listed_if_another_can_go_on() {
    let expected = undisturbed().await;
    for is_listed in [true, false] {
        let workers = cut_after(3, &[Step::Await(Arc::new(Semaphore::new(0)))]).await;
        let rig = Rig::start(vec![migrating(&workers, 1)]).await;
        let response = rig.post(CHAT, STREAM).await;
        let mut snapshot = migrating(&workers, 1);
        let running = usize::from(workers[1].calls() == 1);
        if is_listed {
            snapshot.workers[running].draining = true;
        } else {
            snapshot.workers.remove(running);
        }
        rig.tell_model(snapshot);
        assert_eq!(shown(&text(response).await), expected);
        eventually("it was cancelled at the worker", || workers[running].seen.ended.load(SeqCst) == 1).await;
        rig.idle().await;
        assert!(rig.metrics().contains("reason=\"draining\""));
        assert!(!rig.metrics().contains("reason=\"lost\""));
    }
}

#[tokio::test]
async fn without_another_worker_or_attempt_a_stream_ends_where_it_is_though_that_drains() {
    for (attempts, others) in [(1, 0), (0, 1)] {
        let gate = Arc::new(Semaphore::new(0));
        let waits = gate.clone();
        let script = move |_: &_| {
            let mut steps = words(TEXT);
            steps.insert(3, Step::Await(waits.clone()));
            Ok(steps)
        };
        let worker = FakeWorker::start("w", script).await;
        let other = FakeWorker::start("other", |_| Ok(words("never"))).await;
        let rig = Rig::start(vec![migrating(std::slice::from_ref(&worker), attempts)]).await;
        let response = rig.post(CHAT, STREAM).await;
        let mut snapshot = migrating(&[worker, other], attempts);
        snapshot.workers[0].draining = true;
        snapshot.workers.truncate(1 + others);
        rig.tell_model(snapshot);
        gate.add_permits(1);
        assert_eq!(shown(&text(response).await), undisturbed().await);
        rig.idle().await;
    }
}

const SHORT: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_stream_leaves_a_worker_that_freezes_and_one_that_sends_nothing() {
    let expected = undisturbed().await;
    let (thaws, frozen) = mpsc::channel();
    let freezes = Step::Freeze(Arc::new(Mutex::new(frozen)));
    let waits = Step::Await(Arc::new(Semaphore::new(0)));
    for (step, patience, reason) in
        [(freezes, Patience::default(), "silent"), (waits, Patience { slow: SHORT, ..Patience::default() }, "slow")]
    {
        let gate = Arc::new(Semaphore::new(0));
        let workers = cut_after(3, &[Step::Await(gate.clone()), step]).await;
        let rig = Rig::start_with(vec![migrating(&workers, 1)], patience).await;
        let response = rig.post(CHAT, STREAM).await;
        gate.add_permits(1); // what it has sent is on its way
        assert_eq!(shown(&text(response).await), expected, "{reason}");
        rig.idle().await;
        assert!(rig.metrics().contains(&format!("reason=\"{reason}\"")), "{}", rig.metrics());
    }
    drop(thaws);
}

#[tokio::test]
async fn a_worker_that_does_not_take_a_call_in_time_is_passed_over() {
    let gate = Arc::new(Semaphore::new(0));
    let hangs = FakeWorker::start("hangs", move |_| Ok(vec![Step::Await(gate.clone())])).await;
    let fine = FakeWorker::start("fine", |_| Ok(words("fine"))).await;
    let workers = [hangs, fine];
    let patience = Patience { head: SHORT, ..Patience::default() };
    let rig = Rig::start_with(vec![migrating(&workers, 0)], patience).await;
    for _ in 0..20 {
        assert_eq!(rig.ask(WHOLE).await.0, 200);
    }
    let asked = workers[0].calls();
    assert!((1..10).contains(&asked), "{asked} of 20 requests went where nothing comes");
    rig.idle().await;
}

#[tokio::test]
async fn a_worker_that_sends_nothing_but_gives_signs_of_life_keeps_its_streams() {
    let gate = Arc::new(Semaphore::new(0));
    let workers = cut_after(3, &[Step::Await(gate.clone()), Step::Finish(0, "stop"), Step::Usage(3, 5)]).await;
    let rig = Rig::start(vec![migrating(&workers, 1)]).await;
    let response = rig.post(CHAT, STREAM).await;
    let running = workers.iter().find(|worker| worker.calls() == 1).unwrap();
    eventually("it was asked and asked again", || running.seen.signs.load(SeqCst) > 5).await;
    gate.add_permits(1);
    let shown = shown(&text(response).await);
    assert_eq!(shown.last(), Some(&Value::Null), "it was whole");
    rig.idle().await;
    assert!(!rig.metrics().contains("resumed_streams_total{"), "{}", rig.metrics());
}

#[tokio::test]
async fn a_request_leaves_workers_that_give_no_sign_of_life_however_many_there_are() {
    let mut mute = Vec::new();
    for id in ["a", "b", "c", "d"] {
        let gate = Arc::new(Semaphore::new(0));
        let worker = FakeWorker::start(id, move |_| Ok(vec![Step::Await(gate.clone())])).await;
        worker.seen.is_mute.store(true, SeqCst);
        mute.push(worker);
    }
    let fine = FakeWorker::start("fine", |_| Ok(words("fine"))).await;
    let patience = Patience { head: Duration::from_secs(600), ..Patience::default() };
    let rig = Rig::start_with(vec![migrating(&mute, 0)], patience).await;
    let asked = rig.ask(WHOLE);
    let comes = async {
        eventually("all were asked", || mute.iter().all(|worker| worker.calls() == 1)).await;
        mute.push(fine);
        rig.tell_model(migrating(&mute, 0));
    };
    let ((status, _), ()) = tokio::join!(asked, comes);
    assert_eq!(status, 200);
    rig.idle().await;
}
