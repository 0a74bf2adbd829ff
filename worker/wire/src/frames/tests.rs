//! Without a network, but for what only a socket does.

use std::{io::Read, net::TcpListener};

use super::*;

fn call(sequence: u64, rows: usize) -> RunCall {
    let byte = |at: usize| (at as u64 * 31 + sequence) as u8;
    RunCall {
        sequence,
        pair_rows: vec![0, 7],
        rows: (0..rows).map(byte).collect::<Vec<u8>>().into(),
        ..RunCall::default()
    }
}

fn frame(message: RunCall) -> Vec<u8> {
    let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
    let frame = Frame::of(message, place).unwrap();
    [&frame.head[..], &frame.rows].concat()
}

/// Gives a byte, then none for now, then the next one.
struct Drops<'a>(&'a [u8], bool);

impl Source for Drops<'_> {
    fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Read::by_ref(&mut self.0).take(1).read_to_end(buffer)
    }
}

impl Source for &[u8] {
    fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let most = (buffer.capacity() - buffer.len()) as u64;
        self.take(most).read_to_end(buffer)
    }
}

impl Source for &TcpStream {
    fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        Ok(rustix::io::read(&**self, rustix::buffer::spare_capacity(buffer))?)
    }
}

#[test]
fn frames_that_come_byte_by_byte_are_read_whole() {
    let calls = [call(1, 5000), call(2, 0), call(3, 1), RunCall::default()];
    let bytes: Vec<u8> = calls.iter().cloned().flat_map(frame).collect();
    let mut incoming = Incoming::new(Drops(&bytes, false));
    for wanted in calls {
        let read = loop {
            match incoming.receive::<RunCall>() {
                Err(Error::Broke(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => break read.unwrap().unwrap(),
            }
        };
        assert_eq!(read, wanted);
        assert!(incoming.is_between());
    }
}

/// Gives as much as there is room for, and counts how often.
struct Counts<'a>(&'a [u8], usize);

impl Source for Counts<'_> {
    fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        self.1 += 1;
        Source::read(&mut self.0, buffer)
    }
}

#[test]
fn a_frame_as_large_as_the_last_one_is_read_at_once() {
    let reads = |rows: &[usize]| {
        let bytes: Vec<u8> = rows.iter().flat_map(|&rows| frame(call(1, rows))).collect();
        let mut incoming = Incoming::new(Counts(&bytes, 0));
        for &rows in rows {
            assert_eq!(incoming.receive().unwrap(), Some(call(1, rows)));
        }
        incoming.from.1
    };
    assert_eq!(reads(&[100_000; 3]), 2 + 1 + 1, "the first one's length is not known");
    assert_eq!(reads(&[100_000, 110_000, 120_000]), 2 + 1 + 1, "some are a little larger");
    assert_eq!(reads(&[100; 30]), 1, "several small ones");
    assert_eq!(reads(&[100_000, 100, 100, 120_000]), 2 + 1 + 1, "what is read behind one belongs to the next");
    assert_eq!(reads(&[300_000; 3]), 2 * 3, "memory is not held for a large one that may not come");
}

#[test]
fn what_is_no_frame_is_an_error_that_says_so() {
    let lengths = |message: u32, rows: u32| [message.to_le_bytes(), rows.to_le_bytes()].concat();
    let within = call(1, 9).encode_to_vec();
    let table = [
        (lengths(u32::MAX, u32::MAX), "a frame of 4294967295 and 4294967295 bytes is larger than 67108864"),
        (lengths(0, (64 << 20) + 1), "a frame of 0 and 67108865 bytes is larger than 67108864"),
        ([lengths(2, 0), vec![0xff, 0xff]].concat(), "a frame's message is none"),
        ([lengths(within.len() as u32, 0), within].concat(), "a frame's message has its rows within it, not behind it"),
        (lengths(0, 0)[..7].to_vec(), "the connection broke"),
        (frame(call(1, 9))[..20].to_vec(), "the connection broke"),
        (lengths(0, 64 << 20), "the connection broke"),
    ];
    for (bytes, wanted) in table {
        let error = Incoming::new(&*bytes).receive::<RunCall>().unwrap_err();
        assert_eq!(error.to_string(), wanted);
    }
    assert!(Incoming::new(&[][..]).receive::<RunCall>().unwrap().is_none(), "the end between two frames");
}

/// Two ends of a connection, the first of which does not block.
fn pair() -> (Arc<TcpStream>, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    near.set_nonblocking(true).unwrap();
    (Arc::new(near), listener.accept().unwrap().0)
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_a_socket_takes_is_written_in_order_and_bounded() {
    let (near, far) = pair();
    let outgoing = Outgoing::new(near, 8);
    let flushing = tokio::spawn({
        let outgoing = outgoing.clone();
        async move { outgoing.flush().await }
    });
    let mut sent = 0;
    while let Some(place) = outgoing.try_reserve() {
        assert!(place.send(call(sent, 1 << 20)));
        sent += 1;
        assert!(sent < 64, "all is held somewhere, or nothing is bounded");
    }
    assert!(sent >= 8, "{sent}");
    let read = tokio::task::spawn_blocking(move || {
        let mut incoming = Incoming::new(&far);
        (0..sent + 1).all(|sequence| incoming.receive().unwrap() == Some(call(sequence, 1 << 20)))
    });
    let place = tokio::time::timeout(std::time::Duration::from_secs(20), outgoing.reserve()).await;
    assert!(place.expect("there is room once it is read").unwrap().send(call(sent, 1 << 20)));
    assert!(read.await.unwrap());
    outgoing.end();
    assert!(outgoing.try_reserve().is_none() && outgoing.reserve().await.is_none());
    flushing.abort();
}

#[test]
fn what_is_too_large_or_finds_the_connection_broken_is_not_on_its_way() {
    let (near, far) = pair();
    let outgoing = Outgoing::new(near, 8);
    assert!(!outgoing.try_reserve().unwrap().send(call(1, MAX_MESSAGE_BYTES)), "with the message it is too large");
    assert!(outgoing.try_reserve().unwrap().send(call(2, 10)), "and does no harm to the next one");
    drop(far);
    outgoing.end();
    assert!(outgoing.try_reserve().is_none());
}
