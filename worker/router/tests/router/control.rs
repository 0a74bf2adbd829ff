//! The control stream, with an operator that a test scripts.

use std::time::Instant;

use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_sdk::trace::{InMemorySpanExporter, Sampler, SdkTracerProvider, SpanData};
use router::control;
use tokio::sync::mpsc;
use tracing_subscriber::{
    Layer as _,
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
};
use wire::proto::{Hello, Synced, Version, instruction, model_snapshot::Availability, report};

use crate::{
    fake::{FakeWorker, words},
    operator::{Operator, heard, instruct},
    rig::{CHAT, Rig, eventually, in_time, model, post, send, text},
};

#[tokio::test]
async fn snapshots_are_acknowledged_load_is_pushed_and_serving_outlives_the_operator() {
    let worker = FakeWorker::start("w", |_| Ok(words("fine"))).await;
    let rig = Rig::start_unsynced().await;
    let mut operator = Operator::start().await;
    let (reports, receiver) = mpsc::channel(64);
    let instructions = wire::fleet::watch(vec![operator.address.clone()], Hello::default, receiver);
    tokio::spawn(control::follow(rig.router.clone(), instructions, reports));

    let (mut inbound, outbound) = operator.stream().await;
    assert!(matches!(heard(&mut inbound).await, report::Report::Hello(_)));
    let mut asleep = model(&[]);
    asleep.availability = Availability::Asleep.into();
    outbound.send(instruct(instruction::Instruction::Model(asleep))).await.unwrap();
    outbound.send(instruct(instruction::Instruction::Synced(Synced {}))).await.unwrap();
    loop {
        if let report::Report::Acknowledgement(acknowledgement) = heard(&mut inbound).await {
            assert_eq!(acknowledgement.version, Some(Version { epoch: 1, sequence: 1 }));
            break;
        }
    }

    let http = rig.http.clone();
    let asked =
        tokio::spawn(async move { text(send(&http, post(CHAT, r#"{"model":"m","stream":true}"#)).await).await });
    let begun = Instant::now();
    loop {
        let heard = heard(&mut inbound).await;
        if matches!(heard, report::Report::RouterLoad(load) if load.models[0].queued == 1) {
            break;
        }
        assert!(begun.elapsed().as_secs() < 20);
    }
    let mut awake = model(&[&worker]);
    awake.version = Some(Version { epoch: 1, sequence: 2 });
    outbound.send(instruct(instruction::Instruction::Model(awake))).await.unwrap();
    assert!(in_time(asked).await.unwrap().ends_with("data: [DONE]\n\n"));

    operator.kill().await;
    drop((inbound, outbound));
    for _ in 0..10 {
        assert_eq!(rig.ask(r#"{"model":"m","stream":true}"#).await.0, 200);
    }
}

#[tokio::test]
async fn one_trace_goes_from_the_client_to_the_worker_and_holds_no_words() {
    let exporter = InMemorySpanExporter::default();
    let provider =
        SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOn).with_simple_exporter(exporter.clone()).build();
    let ours = Targets::new().with_target("router", LevelFilter::INFO);
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test")).with_filter(ours);
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
    let worker = FakeWorker::start("w", |_| Ok(words("canary"))).await;
    let rig = Rig::start(vec![model(&[&worker])]).await;
    let mut request = post(CHAT, r#"{"model":"m","stream":true,"messages":["canary"]}"#);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.headers_mut().insert("traceparent", parent.parse().unwrap());
    text(rig.send(request).await).await;
    rig.idle().await;

    eventually("both spans ended", || exporter.get_finished_spans().unwrap().len() == 2).await;
    let spans = exporter.get_finished_spans().unwrap();
    let named = |name: &str| -> &SpanData {
        spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no {name} in {spans:?}"))
    };
    let (server, client) = (named("POST /v1/chat/completions"), named("modelfleet.v1.Worker/Generate"));
    assert_eq!(server.span_context.trace_id().to_string(), &parent[3..35]);
    assert_eq!(server.parent_span_id.to_string(), &parent[36..52]);
    assert_eq!(client.parent_span_id, server.span_context.span_id());
    let sent = wire::telemetry::extract(&worker.seen.metadata.lock().unwrap()[0]);
    assert_eq!(sent.span().span_context().span_id(), client.span_context.span_id());
    for (key, value) in [("http.response.status_code", "200"), ("gen_ai.request.model", "m"), ("http.route", CHAT)] {
        let attribute = server.attributes.iter().find(|attribute| attribute.key.as_str() == key);
        assert_eq!(attribute.map(|attribute| attribute.value.to_string()).as_deref(), Some(value), "{key}");
    }
    assert!(!format!("{spans:?}").contains("canary"));
}
