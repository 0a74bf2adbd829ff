//! Frames and gRPC side by side: the same answers, and what goes wrong with sockets.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use engine::{Exchange as _, ExpertBatch};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::Instant,
};
use wire::{
    connections::framed,
    proto::{self, RunCall, RunReply, refusal::Reason},
};

use super::{
    exchange::MeshExchange,
    link::{Claimed, Link},
    network::{self, CALLS, Calls, Network, Open},
    standing::{Board, Standing},
    tests::{HASH, Way, Worker, all, alone, following, mesh, metrics, own, placement, requests, serve},
};
use crate::drive::Driver;

async fn open(way: Way, address: &str) -> Open {
    let open = match way {
        Way::Grpc => network::grpc(address).await,
        Way::Frames => network::sockets().open(address).await,
    };
    let open = open.expect("somebody answers");
    assert_eq!(matches!(open.0, Calls::Socket(..)), way == Way::Frames);
    open
}

async fn next((_, replies): &mut Open) -> RunReply {
    tokio::time::timeout(Duration::from_secs(20), replies.next()).await.expect("it is answered").expect("it is open")
}

fn good() -> RunCall {
    RunCall {
        sequence: 1,
        layer: 1,
        content_hash: HASH.into(),
        dtype: proto::Dtype::Bf16.into(),
        rows: vec![7; 512].into(),
        pair_rows: vec![0],
        pair_experts: vec![1],
        ..RunCall::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ways_give_the_same_rows_and_refuse_what_cannot_be_computed_each_with_its_reason() {
    let worker = Worker::start(&placement(2), 1, HASH).await;
    let (mut frames, mut grpc) = (open(Way::Frames, &worker.address).await, open(Way::Grpc, &worker.address).await);
    let good = good();
    let table = [
        (good.clone(), None),
        (
            RunCall {
                rows: vec![9; 512 * 100].into(),
                pair_rows: (0..100).collect(),
                pair_experts: vec![1; 100],
                ..good.clone()
            },
            None,
        ),
        (RunCall { rows: Vec::new().into(), pair_rows: vec![], pair_experts: vec![], ..good.clone() }, None),
        (RunCall { content_hash: "x".into(), ..good.clone() }, Some(Reason::OtherContent)),
        (RunCall { dtype: proto::Dtype::F32.into(), ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { rows: vec![0; 511].into(), ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { pair_rows: vec![1], ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { pair_rows: vec![0, 0], ..good.clone() }, Some(Reason::Malformed)),
        (
            RunCall { pair_rows: vec![0; 200_000], pair_experts: vec![1; 200_000], ..good.clone() },
            Some(Reason::Malformed),
        ),
        (RunCall { pair_experts: vec![2], ..good.clone() }, Some(Reason::NotHeld)),
        (RunCall { layer: 99, ..good.clone() }, Some(Reason::NotHeld)),
        (RunCall { pair_experts: vec![u32::MAX], ..good.clone() }, Some(Reason::NotHeld)),
    ];
    for (call, wanted) in table {
        let pairs = call.pair_experts.len();
        assert!(frames.0.send(call.clone()) && grpc.0.send(call));
        let reply = next(&mut frames).await;
        assert_eq!(reply, next(&mut grpc).await);
        assert_eq!(reply.rows.len(), if wanted.is_none() { 512 * pairs } else { 0 });
        assert_eq!(reply.refusal.map(|refusal| refusal.reason()), wanted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_does_not_read_harms_nobody_else() {
    let worker = Worker::start(&placement(2), 1, HASH).await;
    // more than the connection holds of calls that are not taken, and a megabyte of reply each
    let call = |sequence| RunCall {
        sequence,
        rows: vec![0; 512 * 128].into(),
        pair_rows: vec![0; 2048],
        pair_experts: vec![1; 2048],
        ..good()
    };
    for way in [Way::Frames, Way::Grpc] {
        let (hung, _unread) = open(way, &worker.address).await;
        let sent = async {
            for sequence in 0..1000 {
                while !hung.send(call(sequence)) {
                    tokio::task::yield_now().await;
                }
            }
        };
        let stuck = tokio::time::timeout(Duration::from_millis(500), sent).await;
        assert!(stuck.is_err(), "a gigabyte of replies that nobody reads is kept somewhere");
        let mut other = open(way, &worker.address).await;
        for sequence in 0..4 {
            assert!(other.0.send(call(sequence)));
            let reply = next(&mut other).await;
            assert_eq!((reply.sequence, reply.rows.len()), (sequence, 512 * 2048));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_without_frames_is_asked_over_grpc_and_not_tried_again_at_once() {
    let worker = Worker::start(&placement(2), 1, HASH).await;
    let (_server, address) = serve(&worker.experts, HASH, Way::Grpc).await;
    let before = Proxy::to(&address, |_| None).await;
    let network = network::sockets();
    for connections in [2, 3] {
        let mut open = network.open(&before.address).await.expect("it is asked over gRPC");
        assert!(matches!(open.0, Calls::Queue(_)));
        assert!(open.0.send(good()));
        assert_eq!(next(&mut open).await.rows.len(), 512);
        assert_eq!(before.connections.load(Ordering::Relaxed), connections);
    }
    assert!(network.open("127.0.0.1:1").await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_waited_too_long_is_refused_in_frames_too() {
    let worker = Worker::start(&placement(2), 1, HASH).await;
    let mut stream = open(Way::Frames, &worker.address).await;
    // long enough for the second to wait for longer than a millisecond
    let long = RunCall {
        rows: vec![0; 512 * 4096].into(),
        pair_rows: (0..4096).collect(),
        pair_experts: vec![1; 4096],
        ..good()
    };
    let late = RunCall { sequence: 2, remaining_ms: 1, pair_rows: vec![0; 65], pair_experts: vec![1; 65], ..good() };
    assert!(stream.0.send(long) && stream.0.send(late));
    assert_eq!(next(&mut stream).await.rows.len(), 512 * 4096);
    let refusal = next(&mut stream).await;
    assert_eq!((refusal.sequence, refusal.refusal.unwrap().reason()), (2, Reason::Expired));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_replies_reads_them_without_being_woken() {
    let worker = Worker::start(&placement(2), 1, HASH).await;
    let meshes = following(mesh(&placement(2), &[String::from("127.0.0.1:1"), worker.address], 1));
    let mut exchange = MeshExchange::new(own(), meshes, Board::new(metrics()), None, metrics());
    let (rows, pair_rows) = (vec![7; 512 * 100].into(), (0..100).collect::<Vec<u32>>());
    let batch = ExpertBatch { layer: 1, rows: &rows, pair_rows: &pair_rows, pair_experts: &[1; 100] };
    for _ in 0..20 {
        exchange.begin_step(tracing::Span::none());
        let ticket = exchange.send(&batch);
        // asked once, and by nobody later
        let replies = exchange.join(ticket).now_or_never();
        if exchange.end_step().is_some() {
            exchange.changed().await; // not connected yet
        } else if replies.is_some_and(|replies| replies.missing.is_empty()) {
            return;
        }
    }
    panic!("the replies came by another thread");
}

/// A holder of whose replies the first is read at once, and no other by the task that keeps the link.
struct ReadOnce(String);

impl Network for ReadOnce {
    fn open(&self, _: &str) -> BoxFuture<'static, Option<Open>> {
        let to = self.0.clone();
        async move {
            let mut connection = framed::connect(&to).await.unwrap().unwrap();
            let outgoing = connection.outgoing(CALLS);
            let (replies, reader) = connection.messages::<RunReply>().unwrap();
            let mut replies = Box::pin(replies);
            assert_eq!(replies.next().await.unwrap().unwrap().sequence, 1);
            let open = stream::once(async move {
                let _open = replies;
                pending().await
            });
            Some((Calls::Socket(outgoing, reader), open.boxed()))
        }
        .boxed()
    }
}

/// An open link to a holder that sent these replies at once.
async fn link(sent: &[u8]) -> (Link, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let network = Arc::new(ReadOnce(listener.local_addr().unwrap().to_string()));
    let standing = Standing::new("holder", &Board::new(metrics()));
    let link = Link::open(vec![String::from("holder:1")], network, standing);
    let (mut holder, _) = listener.accept().await.unwrap();
    let mut bytes = vec![0; 20];
    holder.read_exact(&mut bytes).await.unwrap(); // the preface, which goes back
    bytes.extend(sent.iter().flat_map(|&sequence| empty_reply(sequence)));
    holder.write_all(&bytes).await.unwrap();
    let opened = async {
        while link.send(RunCall::default()).is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), opened).await.expect("it is open");
    (link, holder)
}

/// Both lengths, and field 1 of the reply.
fn empty_reply(sequence: u8) -> [u8; 10] {
    [2, 0, 0, 0, 0, 0, 0, 0, 8, sequence]
}

#[tokio::test]
async fn a_reply_that_was_read_behind_another_is_handed_over_by_who_claims_the_link() {
    let (link, mut holder) = link(&[1, 2]).await;
    let reply = link.send(RunCall { sequence: 2, ..RunCall::default() }).unwrap();
    let mut claimed = [link.claim().expect("nobody else reads")];
    let answer = reply.now_or_never().expect("it was there already").unwrap();
    assert_eq!(answer.reply.sequence, 2);

    let mut reply = link.send(RunCall { sequence: 3, ..RunCall::default() }).unwrap();
    holder.write_all(&empty_reply(3)).await.unwrap();
    let handed_over = async {
        while reply.try_recv().is_err() {
            assert!(!Claimed::read(&mut claimed, Instant::now()), "there is no time to wait");
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), handed_over)
        .await
        .expect("what has come is handed over all the same");
}

#[tokio::test]
async fn a_link_that_has_ended_keeps_back_no_reply_of_another() {
    let ((ended, ending), (link, mut holder)) = (link(&[1]).await, link(&[1]).await);
    let mut reply = link.send(RunCall { sequence: 2, ..RunCall::default() }).unwrap();
    holder.write_all(&empty_reply(2)).await.unwrap();
    drop(ending);
    let mut claimed = [&ended, &link].map(|link| link.claim().expect("nobody else reads"));
    let until = Instant::now() + Duration::from_secs(20);
    while Claimed::read(&mut claimed, until) {}
    assert_eq!(reply.try_recv().expect("it was there").reply.sequence, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_batches_on_their_way_get_each_its_own_rows() {
    let worker = Worker::start(&placement(2), 1, HASH).await;
    let meshes = following(mesh(&placement(2), &[String::from("127.0.0.1:1"), worker.address], 1));
    let mut exchange = MeshExchange::new(own(), meshes, Board::new(metrics()), None, metrics());
    let rows: [bytes::Bytes; 2] = [vec![7; 512 * 40].into(), vec![60; 512 * 3].into()];
    let pair_rows: Vec<u32> = (0..40).collect();
    let batch = |rows, number, expert: &'static [u32]| ExpertBatch {
        layer: 1,
        rows,
        pair_rows: &pair_rows[..number],
        pair_experts: &expert[..number],
    };
    let batches = [batch(&rows[0], 40, &[1; 40]), batch(&rows[1], 3, &[3; 3])];
    let wanted = batches.map(|batch| worker.experts.run(&batch).unwrap());
    let mut rounds = 0;
    while rounds < 20 {
        exchange.begin_step(tracing::Span::none());
        let tickets = batches.map(|batch| exchange.send(&batch));
        let mut replies = Vec::new();
        for ticket in tickets {
            replies.push(exchange.join(ticket).await);
        }
        if exchange.end_step().is_some() {
            let connected = tokio::time::timeout(Duration::from_secs(20), exchange.changed());
            connected.await.expect("nothing is missing for another reason");
            continue;
        }
        rounds += 1;
        assert!(replies.iter().zip(&wanted).all(|(replies, wanted)| replies.rows == *wanted), "round {rounds}");
    }
}

/// Stands before a holder, and resets each connection after as many bytes of replies as `cut` says of its number.
struct Proxy {
    address: String,
    connections: &'static AtomicUsize,
}

impl Proxy {
    async fn to(holder: &str, cut: fn(usize) -> Option<u64>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let connections: &AtomicUsize = Box::leak(Box::default());
        let holder = holder.to_owned();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let number = connections.fetch_add(1, Ordering::Relaxed);
                let far = TcpStream::connect(&holder).await.unwrap();
                tokio::spawn(async move {
                    let ((mut calls, mut back), (replies, mut on)) = (near.into_split(), far.into_split());
                    let mut replies = replies.take(cut(number).unwrap_or(u64::MAX));
                    tokio::select! {
                        _ = tokio::io::copy(&mut calls, &mut on) => {}
                        _ = tokio::io::copy(&mut replies, &mut back) => {}
                    }
                    let _ = on.shutdown().await; // the other ends close as they are dropped
                });
            }
        });
        Self { address, connections }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_within_frames_change_no_token() {
    let wanted = alone(requests(2, 20)).await;
    let placement = placement(2);
    let mut workers = [Worker::start(&placement, 0, HASH).await, Worker::start(&placement, 1, HASH).await];
    // behind the preface, in the lengths, the message and the rows of some frame
    let cut = |number| {
        [Some(23), Some(20 + 8 + 1), Some(1000), Some(50_001), Some(100_003), None].get(number).copied().flatten()
    };
    let proxy = Proxy::to(&workers[1].address, cut).await;
    let meshes = following(mesh(&placement, &[workers[0].address.clone(), proxy.address.clone()], 1));
    let exchange = MeshExchange::new(own(), meshes, Board::new(metrics()), None, metrics());
    let driver = Driver::start(workers[0].engine.take().unwrap(), exchange, metrics()).unwrap();
    let answers = all(driver.submit(requests(2, 20), tracing::Span::none()).await.unwrap()).await;
    assert_eq!(answers, wanted);
    assert!(proxy.connections.load(Ordering::Relaxed) >= 6, "each cut bit");
}
