//! Many requests whose clients leave when they like: none hangs, no counter stays up, nothing is left behind.

mod client;
mod rig;

use std::{ops::Range, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use futures::StreamExt as _;
use tests::{local::metrics, poll};

use self::{client::Clients, rig::Rig};
use crate::{
    http::{chat, chat_streamed},
    local::{SUMS, started},
};

const SEED: u64 = 20_260_101;
const PATIENCE: Duration = Duration::from_secs(180);
/// How much this process, clients included, may grow over 5,000 requests: far below 5,000 of anything that is kept.
const GROWTH_BYTES: u64 = 32 << 20;

/// Asks until all of `numbers` have an answer or have left; at most `company` at once.
async fn ask_all(clients: &Arc<Clients>, numbers: Range<u64>, company: usize) -> u64 {
    let asked = futures::stream::iter(numbers).map(|number| {
        let clients = clients.clone();
        tokio::spawn(async move {
            let asked = tokio::time::timeout(PATIENCE, clients.ask(SEED, number)).await;
            asked.unwrap_or_else(|_| panic!("request {number} of seed {SEED} hangs")).unwrap_or_else(|error| {
                panic!("request {number} of seed {SEED}: {error:#}");
            })
        })
    });
    let stayed = asked.buffer_unordered(company).map(|asked| u64::from(asked.unwrap()));
    stayed.fold(0, |sum, stayed| async move { sum + stayed }).await
}

/// Until it holds, or the reason why it never did.
async fn eventually(what: &str, look: impl AsyncFnMut() -> anyhow::Result<()>) {
    poll::eventually(what, PATIENCE, look).await.unwrap();
}

/// Bytes of this process in memory.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Connections that the listener at `address` has open.
fn connections(address: &str) -> usize {
    const LISTENING: &str = "0A";
    const GONE: &str = "06"; // TIME_WAIT: the system's, not ours
    let port: u16 = address.rsplit(':').next().unwrap().parse().unwrap();
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&format!(":{port:04X}")) && ![LISTENING, GONE].contains(&row[3])).count()
}

/// Until no client is connected.
async fn closed(address: &str) {
    eventually("clients' connections are closed", async || {
        ensure!(connections(address) == 0, "{} are open", connections(address));
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_requests_leave_nothing_behind() {
    let rig = Rig::start(3).await;
    let clients = Arc::new(Clients::new(&rig.http, &rig.grpc));
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    ask_all(&clients, 20_000..20_300, 96).await; // connections between our processes are made
    eventually("the fleet is at rest", async || rig.at_rest()).await;
    closed(&rig.http).await;
    let tasks_before = tasks();

    let mut stayed = ask_all(&clients, 0..5_000, 96).await;
    eventually("the fleet is at rest", async || rig.at_rest()).await;
    let resident_before = resident_bytes();
    stayed += ask_all(&clients, 5_000..10_000, 96).await;
    eventually("the fleet is at rest", async || rig.at_rest()).await;
    let grown = resident_bytes().saturating_sub(resident_before);

    closed(&rig.http).await;
    assert!(connections(&rig.grpc) <= 1, "one channel is one connection");
    eventually("no task is left", async || {
        ensure!(tasks() <= tasks_before, "{} tasks; {tasks_before} before", tasks());
        Ok(())
    })
    .await;
    eprintln!(
        "{stayed} of 10,000 stayed; {grown} bytes more in memory after the second half, {resident_before} before"
    );
    assert!((4_000..8_000).contains(&stayed), "some stay, some leave: {stayed}");
    assert!(grown < GROWTH_BYTES, "{grown} bytes more after 5,000 requests");
}

/// The value of a gauge, summed over its labels.
fn gauge(text: &str, name: &str) -> anyhow::Result<f64> {
    let named = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    let values = text.lines().filter(named).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    let values: Vec<f64> = values.collect();
    ensure!(!values.is_empty(), "there is no {name}");
    Ok(values.iter().sum())
}

const ROUTER_GAUGES: [&str; 2] = ["modelfleet_router_queued_requests", "modelfleet_router_running_requests"];
const WORKER_GAUGES: [&str; 3] =
    ["modelfleet_worker_running_sequences", "modelfleet_worker_waiting_sequences", "modelfleet_worker_kv_tokens"];

fn all_zero(text: &str, names: &[&str]) -> anyhow::Result<()> {
    for name in names {
        let value = gauge(text, name)?;
        ensure!(value == 0.0, "{name} is {value}");
    }
    Ok(())
}

/// Asks for a sum as a stream and leaves after some bytes of it, or before its head.
async fn leave(url: &str, question: &str, draw: &mut fastrand::Rng) -> anyhow::Result<()> {
    let body = serde_json::json!({
        "model": "tiny", "stream": draw.bool(), "messages": [{"role": "user", "content": question}],
    });
    let asked = crate::http::client().post(format!("{url}/v1/chat/completions")).json(&body).send();
    let Ok(response) = tokio::time::timeout(Duration::from_millis(draw.u64(..150)), asked).await else {
        return Ok(());
    };
    let mut pieces = response?.error_for_status()?.bytes_stream();
    for _ in 0..draw.usize(..20) {
        pieces.next().await.transpose()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_model_answers_those_who_stay() {
    let (_folder, fleet, url) = tokio::task::block_in_place(|| started(4));
    let asked = futures::stream::iter(0..300_u64).map(|number| {
        let url = url.clone();
        tokio::spawn(async move {
            let mut draw = fastrand::Rng::with_seed(SEED ^ number);
            let (a, b) = SUMS[draw.usize(..SUMS.len())];
            let question = format!("What is {a} + {b}?");
            let asked = async {
                let answer = match draw.u32(..6) {
                    0 => chat(&url, "tiny", &question).await?,
                    1 | 2 => chat_streamed(&url, "tiny", &question).await?,
                    _ => return leave(&url, &question, &mut draw).await,
                };
                ensure!(answer.content == (a + b).to_string(), "{question} {answer:?}");
                Ok(())
            };
            let asked = tokio::time::timeout(PATIENCE, asked).await.context("it hangs").flatten();
            asked.with_context(|| format!("request {number} of seed {SEED}"))
        })
    });
    let results: Vec<_> = asked.buffer_unordered(12).map(|result| result.unwrap()).collect().await;
    let failed: Vec<_> = results.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    assert!(failed.is_empty(), "{failed:#?}\n{:#?}", fleet.printed());

    eventually("all counters are zero", async || {
        for process in fleet.processes() {
            let text = metrics(&process.admin().await?).await?;
            let names = if process.name == "router" { &ROUTER_GAUGES[..] } else { &WORKER_GAUGES[..] };
            all_zero(&text, names).with_context(|| process.name.clone())?;
        }
        Ok(())
    })
    .await;
    assert_eq!(chat(&url, "tiny", "What is 47 + 85?").await.unwrap().content, "132");
    assert_eq!(fleet.processes().len(), 5, "nobody died: {:?}", fleet.processes());
    fleet.stop().unwrap();
}
