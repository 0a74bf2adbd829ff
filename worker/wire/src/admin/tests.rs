//! Over loopback.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use prometheus::IntCounter;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::*;

async fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn probes_and_metrics_tell_what_the_process_knows() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let registry = Registry::new();
    let counter = IntCounter::new("modelfleet_test_total", "Test").unwrap();
    registry.register(Box::new(counter.clone())).unwrap();
    counter.inc_by(7);
    let is_ready = Arc::new(AtomicBool::new(false));
    let seen = is_ready.clone();
    let ready = move || {
        if seen.load(Relaxed) { Ok(()) } else { Err("no snapshot yet".to_owned()) }
    };
    let seen = is_ready.clone();
    let read = move || if seen.load(Relaxed) { Ok(serde_json::json!([1, 2])) } else { Err("too early".to_owned()) };
    let pages = vec![Page { path: "/numbers", read: Arc::new(read) }];
    tokio::spawn(serve(listener, Admin { ready, registry, pages }, std::future::pending()));

    assert!(get(&address, "/healthz").await.starts_with("HTTP/1.1 200"));
    let not_ready = get(&address, "/readyz").await;
    assert!(not_ready.starts_with("HTTP/1.1 503") && not_ready.contains("no snapshot yet"), "{not_ready}");
    let nothing_yet = get(&address, "/numbers").await;
    assert!(nothing_yet.starts_with("HTTP/1.1 503") && nothing_yet.ends_with("too early\n"), "{nothing_yet}");
    is_ready.store(true, Relaxed);
    assert!(get(&address, "/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(get(&address, "/metrics").await.contains("modelfleet_test_total 7"));
    let page = get(&address, "/numbers").await;
    assert!(page.contains("content-type: application/json") && page.ends_with("[1,2]"), "{page}");
    assert!(get(&address, "/debug").await.starts_with("HTTP/1.1 404"));
}
