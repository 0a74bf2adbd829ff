//! Beginning and end.

use std::sync::Arc;

use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::{net::TcpStream, sync::Semaphore};

use crate::{
    fake::{FakeWorker, Step, words},
    rig::{CHAT, Rig, eventually, in_time, model},
};

const STREAM: &str = r#"{"model":"m","stream":true,"messages":[]}"#;

#[tokio::test]
async fn a_router_that_never_heard_of_an_operator_is_not_ready() {
    let rig = Rig::start_unsynced().await;
    assert!(!*rig.router.readiness().borrow());
    let response = rig.post(CHAT, STREAM).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    rig.tell(wire::proto::instruction::Instruction::Synced(wire::proto::Synced {}));
    assert!(*rig.router.readiness().borrow());
    assert_eq!(rig.post(CHAT, STREAM).await.status(), 404, "now it knows that there is none");
}

#[tokio::test]
async fn at_the_end_streams_finish_and_nobody_new_is_let_in() {
    let gate = Arc::new(Semaphore::new(0));
    let mut script = vec![Step::Head(200, Value::Null), Step::Text(0, "half"), Step::Await(gate.clone())];
    script.extend(words("rest").split_off(1));
    let worker = FakeWorker::start("w", move |_| Ok(script.clone())).await;
    let mut rig = Rig::start(vec![model(&[&worker])]).await;
    let mut running = rig.post(CHAT, STREAM).await.into_body();
    assert!(in_time(running.frame()).await.is_some());

    rig.end.take().unwrap().send(()).unwrap();
    eventually("it is not ready", || !*rig.router.readiness().borrow()).await;
    let mut refused = false;
    while !refused {
        refused = TcpStream::connect(&rig.http).await.is_err();
        tokio::task::yield_now().await;
    }
    assert!(!rig.served.is_finished(), "a stream still runs");
    gate.add_permits(1);
    let rest = in_time(running.collect()).await.unwrap().to_bytes();
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
    in_time(rig.served).await.unwrap();
}
