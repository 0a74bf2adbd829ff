//! Two ends over loopback.

use std::{io::Write as _, pin::pin};

use futures::{StreamExt as _, poll};
use tokio::net::TcpListener;

use super::*;
use crate::proto::RunCall;

/// The end that connected and the one that accepted.
async fn pair(patience: Duration) -> (Connection, Connection) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accepted = async { accept(listener.accept().await.unwrap().0, patience).await.unwrap() };
    let (near, far) = tokio::join!(connect(&address), accepted);
    (near.unwrap().expect("it speaks frames"), far)
}

fn call(sequence: u64) -> RunCall {
    RunCall { sequence, rows: vec![1; 100].into(), ..RunCall::default() }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_system_tells_both_ends_that_the_other_has_vanished() {
    let (near, far) = pair(READER_TIMEOUT).await;
    for socket in [&*near.socket, &*far.socket] {
        assert!(sockopt::socket_keepalive(socket).unwrap());
        assert_eq!(sockopt::tcp_keepidle(socket).unwrap(), PING_EVERY);
        assert_eq!(sockopt::tcp_keepintvl(socket).unwrap() * sockopt::tcp_keepcnt(socket).unwrap(), PING_TIMEOUT);
        assert_eq!(sockopt::tcp_user_timeout(socket).unwrap(), 8000, "ms, for what the other end has not acknowledged");
    }
}

#[tokio::test]
async fn half_a_message_and_then_silence_is_an_error_and_silence_between_two_is_not() {
    let (mut near, far) = pair(Duration::ZERO).await;
    let mut incoming = far.incoming();
    let mut read = tokio::task::spawn_blocking(move || [incoming.receive::<RunCall>(), incoming.receive()]);
    let waited = tokio::time::timeout(Duration::from_millis(100), &mut read).await;
    assert!(waited.is_err(), "a peer may have nothing to say: {waited:?}");
    let call = call(7);
    assert!(near.outgoing(1).try_reserve().unwrap().send(call.clone()));
    (&*near.socket).write_all(&[1, 0, 0, 0]).unwrap();
    let read = tokio::time::timeout(Duration::from_secs(20), read).await.expect("it is cut");
    let [first, second] = read.unwrap();
    assert_eq!(first.unwrap(), Some(call));
    let Err(Error::Broke(error)) = second else { panic!("{second:?}") };
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn who_claims_a_connection_reads_it_and_what_comes_later_is_read_as_before() {
    let (near, mut far) = pair(READER_TIMEOUT).await;
    let outgoing = far.outgoing(8);
    let send = |sequence| assert!(outgoing.try_reserve().unwrap().send(call(sequence)));
    let (messages, reader) = near.messages::<RunCall>().unwrap();
    let mut messages = pin!(messages);
    let mut claim = reader.claim().unwrap();
    assert!(reader.claim().is_none());
    for sequence in [1, 2] {
        send(sequence);
        let other = tokio::time::timeout(Duration::from_millis(100), messages.next()).await;
        assert!(other.is_err(), "{other:?}");
        if sequence == 1 {
            wait([&claim].into_iter(), Duration::from_secs(20)).unwrap();
            assert_eq!(claim.receive().unwrap(), Some(call(1)));
        }
    }
    drop(claim);
    let next = tokio::time::timeout(Duration::from_secs(20), messages.next()).await;
    assert_eq!(next.expect("it is read").unwrap().unwrap(), call(2));
}

#[tokio::test]
async fn what_comes_while_a_thread_is_expected_back_waits_for_it_a_moment() {
    let (near, mut far) = pair(READER_TIMEOUT).await;
    let outgoing = far.outgoing(8);
    let (messages, reader) = near.messages::<RunCall>().unwrap();
    let mut messages = pin!(messages);
    tokio::time::pause();
    for (sequence, is_kept) in [(1, true), (2, false)] {
        reader.claim().unwrap().keep(); // the last one counts
        let claim = reader.claim().unwrap();
        if !is_kept {
            // its task leaves it alone for as long, unless it is told
            assert!(poll!(messages.next()).is_pending());
        }
        assert!(outgoing.try_reserve().unwrap().send(call(sequence)));
        wait([&claim].into_iter(), Duration::from_secs(20)).unwrap();
        if is_kept {
            claim.keep()
        } else {
            drop(claim)
        }
        let begun = Instant::now();
        assert_eq!(messages.next().await.unwrap().unwrap(), call(sequence));
        assert_eq!(begun.elapsed() >= KEPT, is_kept);
    }
}
