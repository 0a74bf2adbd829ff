//! A client of the router: single requests, and requests that go on in the background and are all checked.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
};
use hyper_util::{
    client::legacy::{Client as Http, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, timeout},
};

use crate::cluster::{Cluster, SYSTEM};

/// No request of the scenarios takes longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// Speaks HTTP to one address; every request on a connection of its own, so that all routers get some.
#[derive(Clone)]
pub(crate) struct Client {
    http: Http<HttpConnector, Full<Bytes>>,
    /// `http://HOST:PORT`
    pub(crate) url: String,
}

/// An answer that was read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The body as JSON; null if it is none.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// What the model said, after its thought.
    pub(crate) fn content(&self) -> String {
        self.json()["choices"][0]["message"]["content"].as_str().unwrap_or("").to_owned()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    /// A client of `http://ADDRESS`.
    pub(crate) fn new(address: &str) -> Self {
        let http = Http::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(HttpConnector::new());
        Self { http, url: format!("http://{address}") }
    }

    /// A client of the routers' Service.
    pub(crate) async fn router(cluster: &Cluster) -> anyhow::Result<Self> {
        Ok(Self::new(&format!("{}:8080", cluster.service(SYSTEM, "modelfleet-router").await?)))
    }

    /// Sends a request and returns as soon as the answer's head is there.
    pub(crate) async fn open(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body)))?;
        Ok(timeout(PATIENCE, self.http.request(request)).await.context("no answer")??)
    }

    /// Sends a request and reads the whole answer.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> anyhow::Result<Answer> {
        let response = self.open(method, path, headers, body).await?;
        let (head, body) = response.into_parts();
        let body = timeout(PATIENCE, body.collect()).await.context("the answer does not end")??.to_bytes().to_vec();
        Ok(Answer { status: head.status, body })
    }

    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send(Method::GET, path, &[], Vec::new()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        let headers = [("content-type", "application/json")];
        self.send(Method::POST, path, &headers, body.to_string().into_bytes()).await
    }

    /// Asks for a sum.
    pub(crate) async fn sum(&self, model: &str, a: u64, b: u64) -> anyhow::Result<Answer> {
        self.post("/v1/chat/completions", &question(model, &format!("What is {a} + {b}?"))).await
    }

    /// Asks for a sum and fails if it is not answered rightly.
    pub(crate) async fn right_sum(&self, model: &str, a: u64, b: u64) -> anyhow::Result<Answer> {
        let answer = self.sum(model, a, b).await?;
        ensure!(answer.status == StatusCode::OK, "{}: {}", answer.status, answer.text());
        ensure!(answer.content().contains(&(a + b).to_string()), "{a} + {b}: {}", answer.text());
        Ok(answer)
    }

    /// The sum of a metric's series in Prometheus text; it fails if there are none.
    pub(crate) async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let answer = self.get("/metrics").await?;
        let text = answer.text();
        let lines = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' ')));
        let values: Vec<f64> = lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        ensure!(!values.is_empty(), "{} has no metric {name}", self.url);
        Ok(values.iter().sum())
    }
}

/// A greedy chat request.
pub(crate) fn question(model: &str, question: &str) -> Value {
    json!({"model": model, "temperature": 0, "messages": [{"role": "user", "content": question}]})
}

/// Requests that run, a few at a time, until they are stopped.
pub(crate) struct Asking {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    failed: Arc<Mutex<Vec<String>>>,
    tasks: JoinSet<()>,
}

impl Asking {
    /// Starts `parallel` askers of sums.
    pub(crate) fn start(client: &Client, model: &str, parallel: u64) -> Self {
        let (stop, answered): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let failed: Arc<Mutex<Vec<String>>> = Arc::default();
        let mut tasks = JoinSet::new();
        for asker in 0..parallel {
            let (client, model) = (client.clone(), model.to_owned());
            let (stop, answered, failed) = (stop.clone(), answered.clone(), failed.clone());
            tasks.spawn(async move {
                let mut turn = asker;
                // what is broken is not flooded
                let mut failures = tokio::time::interval(Duration::from_millis(100));
                failures.set_missed_tick_behavior(MissedTickBehavior::Delay);
                while !stop.load(Ordering::Relaxed) {
                    turn += parallel;
                    match client.right_sum(&model, 100 + turn * 7 % 400, 10 + turn * 13 % 90).await {
                        Ok(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => {
                            failed.lock().expect("no asker panics").push(format!("{error:#}"));
                            failures.tick().await;
                        }
                    }
                }
            });
        }
        Self { stop, answered, failed, tasks }
    }

    /// How many were answered so far.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Stops; returns how many were answered, and what went wrong with the others.
    pub(crate) async fn stop(mut self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        let failed = std::mem::take(&mut *self.failed.lock().expect("no asker panics"));
        (self.answered(), failed)
    }

    /// Stops and fails if one request did.
    pub(crate) async fn stop_without_error(self) -> anyhow::Result<u64> {
        let (answered, failed) = self.stop().await;
        ensure!(failed.is_empty(), "{} of {} failed: {:#?}", failed.len(), answered, &failed[..failed.len().min(5)]);
        ensure!(answered > 0, "nothing was asked");
        Ok(answered)
    }
}
