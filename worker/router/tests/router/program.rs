//! The program itself: signals and exit.

use std::{process::Stdio, sync::Arc};

use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    sync::Semaphore,
};
use wire::proto::{Synced, instruction, report};

use crate::{
    fake::{FakeWorker, Step, words},
    operator::{Operator, heard, instruct},
    rig::{CHAT, DEADLINE, in_time, model, post, send},
};

const STREAM: &str = r#"{"model":"m","stream":true,"messages":[]}"#;

fn started(operator: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_modelfleet-router"));
    command.args(["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--linger", "0"]);
    command.args(["--operator", operator]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OTEL_") {
            command.env_remove(name);
        }
    }
    command.kill_on_drop(true).spawn().unwrap()
}

#[tokio::test]
async fn told_to_end_it_takes_nothing_new_lets_streams_finish_and_exits_well() {
    let gate = Arc::new(Semaphore::new(0));
    let waits = gate.clone();
    let worker = FakeWorker::start("w", move |_| {
        let mut steps = vec![Step::Head(200, Value::Null), Step::Text(0, "half"), Step::Await(waits.clone())];
        steps.extend(words("rest").split_off(1));
        Ok(steps)
    })
    .await;
    let mut operator = Operator::start().await;
    let mut router = started(&operator.address);
    let (mut inbound, outbound) = operator.stream().await;
    let report::Report::Hello(hello) = heard(&mut inbound).await else { panic!("a stream begins with a hello") };
    for instruction in [instruction::Instruction::Model(model(&[&worker])), instruction::Instruction::Synced(Synced {})]
    {
        outbound.send(instruct(instruction)).await.unwrap();
    }
    while !matches!(heard(&mut inbound).await, report::Report::RouterLoad(load) if !load.models.is_empty()) {}

    let mut streams = Vec::new();
    for _ in 0..8 {
        let mut response = send(&hello.http_address, post(CHAT, STREAM)).await.into_body();
        assert!(in_time(response.frame()).await.unwrap().is_ok());
        streams.push(response);
    }
    let pid = router.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    for address in [&hello.http_address, &hello.address] {
        let refused = async {
            while TcpStream::connect(address).await.is_ok() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await; // polls
            }
        };
        in_time(refused).await;
    }
    assert!(router.try_wait().unwrap().is_none(), "streams still run");
    gate.add_permits(streams.len());
    for stream in streams {
        let rest = in_time(stream.collect()).await.unwrap().to_bytes();
        assert!(rest.ends_with(b"data: [DONE]\n\n"));
    }
    let status = tokio::time::timeout(DEADLINE, router.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
}
