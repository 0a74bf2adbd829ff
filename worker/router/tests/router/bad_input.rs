//! Each row of bad input that a client can send over HTTP: a clear answer, and the router lives.

use std::{
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::Full;
use router::Patience;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    fake::{FakeWorker, Step, words},
    rig::{CHAT, Rig, eventually, in_time, json, model, post, send},
};

const GOOD: &str = r#"{"model":"m","stream":true}"#;

/// Asserts OpenAI's shape, and that the router still answers.
async fn refused(rig: &Rig, request: Request<Full<Bytes>>) -> (StatusCode, Value) {
    let response = rig.send(request).await;
    let status = response.status();
    assert!(response.headers().contains_key("x-request-id"));
    let body = json(response).await;
    for key in ["message", "type"] {
        assert!(body["error"][key].is_string(), "{body}");
    }
    for key in ["param", "code"] {
        assert!(body["error"].get(key).is_some(), "{body}");
    }
    assert_eq!(rig.ask(GOOD).await.0, 200);
    (status, body["error"].clone())
}

async fn rig() -> (Rig, FakeWorker) {
    let worker = FakeWorker::start("w", |_| Ok(words("fine"))).await;
    (Rig::start(vec![model(&[&worker])]).await, worker)
}

fn request(method: Method, path: &str) -> Request<Full<Bytes>> {
    let mut request = post(path, GOOD);
    *request.method_mut() = method;
    request
}

#[tokio::test]
async fn routes_methods_and_models_that_do_not_exist() {
    let (rig, _worker) = rig().await;
    for path in ["/", "/v1", "/v2/models", "//v1/chat/completions", "/v1/chat%2fcompletions", "/v1/../v1/models"] {
        assert_eq!(refused(&rig, request(Method::POST, path)).await.0, 404, "{path}");
    }
    for (method, path) in [
        (Method::GET, CHAT),
        (Method::DELETE, "/v1/completions"),
        (Method::POST, "/v1/models"),
        (Method::DELETE, "/v1/models/m"),
        (Method::from_bytes(b"BREW").unwrap(), CHAT),
    ] {
        assert_eq!(refused(&rig, request(method, path)).await.0, 405, "{path}");
    }
    let allowed = rig.send(request(Method::GET, CHAT)).await;
    assert_eq!(allowed.headers()[header::ALLOW], "POST");
    let (status, error) = refused(&rig, post(CHAT, r#"{"model":"nobody\u0007\n"}"#)).await;
    assert_eq!((status.as_u16(), &error["code"]), (404, &"model_not_found".into()));
    assert_eq!(error["message"], "The model `nobody` does not exist");
}

#[tokio::test]
async fn bodies_that_are_not_what_they_should_be() {
    let (rig, worker) = rig().await;
    let deep = "[".repeat(100_000);
    for (body, param) in [
        ("", None),
        ("{", None),
        ("null", None),
        ("{\"model\":\"m\"}}", None),
        ("{\"model\":\"m\",\"temperature\":NaN}", None),
        ("{\"model\":\"m\",\"model\":\"m\"}", None),
        (&deep, None),
        ("{}", Some("model")),
        (r#"{"model":"m","n":65}"#, Some("n")),
        (r#"{"model":"m","n":1e30}"#, Some("n")),
        (r#"{"model":"m","stream":1}"#, Some("stream")),
    ] {
        let (status, error) = refused(&rig, post(CHAT, body)).await;
        assert_eq!(status, 400, "{body:.60}");
        assert_eq!(error["param"].as_str(), param, "{body:.60}");
        let code = if param.is_some() { "invalid_value" } else { "invalid_json" };
        assert_eq!(error["code"], code, "{body:.60}");
    }
    let mut latin = post(CHAT, "");
    *latin.body_mut() = Full::new(Bytes::from_static(b"{\"model\":\"\xe9\"}"));
    assert_eq!(refused(&rig, latin).await.1["message"], "The body is not UTF-8 at byte 10");
    assert!(worker.seen.calls.lock().unwrap().iter().all(|call| call.body == GOOD));
}

#[tokio::test]
async fn content_that_is_not_json_or_is_compressed() {
    let (rig, _worker) = rig().await;
    for (name, value) in [
        (header::CONTENT_TYPE, "multipart/form-data; boundary=x"),
        (header::CONTENT_TYPE, "application/x-www-form-urlencoded"),
        (header::CONTENT_ENCODING, "gzip"),
    ] {
        let mut bad = post(CHAT, GOOD);
        bad.headers_mut().insert(name, value.parse().unwrap());
        assert_eq!(refused(&rig, bad).await.0, 415, "{value}");
    }
    let mut good = post(CHAT, GOOD);
    good.headers_mut().insert(header::CONTENT_TYPE, "Application/JSON; charset=utf-8".parse().unwrap());
    assert_eq!(rig.send(good).await.status(), 200);
}

#[tokio::test]
async fn bodies_and_heads_that_are_too_large() {
    let (rig, worker) = rig().await;
    let fits = format!(r#"{{"model":"m","stream":true,"x":"{}"}}"#, "y".repeat((4 << 20) - 40));
    assert_eq!(rig.ask(&fits).await.0, 200);
    assert_eq!(worker.seen.calls.lock().unwrap()[0].body.len(), fits.len());
    let large = "y".repeat((4 << 20) + 1);
    assert_eq!(refused(&rig, post(CHAT, &large)).await.0, 413);

    let mut stream = TcpStream::connect(&rig.http).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 20, "y".repeat(1 << 20));
    for _ in 0..5 {
        stream.write_all(chunk.as_bytes()).await.unwrap();
    }
    assert!(answer(&mut stream).await.starts_with("HTTP/1.1 413"), "counted, not claimed");

    let mut head = post(CHAT, GOOD);
    head.headers_mut().insert("x-long", "y".repeat(17 << 10).parse().unwrap());
    assert_eq!(send(&rig.http, head).await.status(), 431);
    let mut head = post(CHAT, GOOD);
    head.headers_mut().insert("x-long", "y".repeat(12 << 10).parse().unwrap());
    assert_eq!(send(&rig.http, head).await.status(), 200);
}

async fn answer(stream: &mut TcpStream) -> String {
    let mut bytes = vec![0; 4096];
    let read = in_time(stream.read(&mut bytes)).await.unwrap();
    String::from_utf8_lossy(&bytes[..read]).into_owned()
}

/// Until the router closes the connection; what it said.
async fn closed(mut stream: TcpStream) -> String {
    let mut said = Vec::new();
    let _ = in_time(stream.read_to_end(&mut said)).await; // a reset is an end, too
    String::from_utf8_lossy(&said).into_owned()
}

#[tokio::test]
async fn who_sends_a_head_slowly_or_nothing_is_cut_and_who_pauses_between_requests_is_not() {
    let (rig, _worker) = rig().await;
    let connect = || async { TcpStream::connect(&rig.http).await.unwrap() };
    let silent = connect().await;
    let mut half = connect().await;
    half.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-sl").await.unwrap();
    let mut preface = connect().await;
    preface.write_all(b"PRI * HTTP/2").await.unwrap();
    let mut second = connect().await;
    second.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(answer(&mut second).await.starts_with("HTTP/1.1 200"));
    second.write_all(b"GET /v1/mod").await.unwrap();
    let mut patient = connect().await;
    patient.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(answer(&mut patient).await.starts_with("HTTP/1.1 200"));

    let begun = Instant::now();
    let cut = tokio::join!(closed(silent), closed(half), closed(preface), closed(second));
    assert_eq!(cut, Default::default(), "not a word");
    assert!(begun.elapsed() >= Duration::from_secs(3), "only the deadline may end them");

    patient.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(answer(&mut patient).await.starts_with("HTTP/1.1 200"), "it had begun no head");
}

#[tokio::test]
async fn a_body_that_ends_early_or_never_is_no_request() {
    let (rig, worker) = rig().await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{\"model\"");
    let mut early = TcpStream::connect(&rig.http).await.unwrap();
    early.write_all(head.as_bytes()).await.unwrap();
    early.shutdown().await.unwrap();
    let said = closed(early).await;
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 400"), "{said}");
    assert_eq!(worker.calls(), 0);
    rig.idle().await;
}

#[tokio::test]
async fn garbage_on_the_wire_kills_nothing() {
    let (rig, _worker) = rig().await;
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], // TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\0\0\0\0",
    ] {
        let mut stream = TcpStream::connect(&rig.http).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let said = closed(stream).await;
        assert!(!said.contains("HTTP/1.1 200"), "{said}");
        assert_eq!(rig.ask(GOOD).await.0, 200);
    }
}

#[tokio::test]
async fn a_body_that_takes_too_long_is_timed_out() {
    let (rig, _worker) = rig().await;
    let mut stream = TcpStream::connect(&rig.http).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut said = vec![0; 1024];
    let read = tokio::time::timeout(Duration::from_secs(60), stream.read(&mut said)).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&said[..read]);
    assert!(said.starts_with("HTTP/1.1 408"), "{said}");
}

#[tokio::test]
async fn clients_that_never_read_are_cut_and_hold_no_worker() {
    let piece: &'static str = Box::leak("y".repeat(64 << 10).into_boxed_str());
    let worker = FakeWorker::start("w", move |_| {
        let mut steps = vec![Step::Head(200, Value::Null)];
        steps.extend(std::iter::repeat_n(Step::Text(0, piece), 1000)); // more than all buffers on the way
        Ok(steps)
    })
    .await;
    let patience = Patience { reader: Duration::from_millis(300), ..Patience::default() };
    let rig = Rig::start_with(vec![model(&[&worker])], patience).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = TcpStream::connect(&rig.http).await.unwrap();
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: router\r\ncontent-length: {}\r\n\r\n", GOOD.len());
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(GOOD.as_bytes()).await.unwrap();
        clients.push(client);
    }
    eventually("all were cut", || worker.seen.ended.load(SeqCst) == clients.len()).await;
    rig.idle().await;
    for mut client in clients {
        let mut read = Vec::new();
        let _ = in_time(client.read_to_end(&mut read)).await; // a reset, or what was on the way
        assert!(read.starts_with(b"HTTP/1.1 200") && !read.ends_with(b"[DONE]\n\n"), "{}", read.len());
    }
}
