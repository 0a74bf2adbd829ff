//! Bytes that are no requests, and floods of frames, on every port that the processes open.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::Served;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
/// `:method POST`, `:scheme http`, `:path /`, by their indices in HPACK's static table.
const REQUEST: &[u8] = &[0x83, 0x86, 0x84];

/// HTTP/2: length, type, flags, stream, payload.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// What the peer says until it closes; `None` if it does not within some seconds.
async fn until_closed(address: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let (mut reader, mut writer) = TcpStream::connect(address).await.unwrap().into_split();
    let mut said = Vec::new();
    let talk = async {
        let write = async {
            let _ = writer.write_all(bytes).await; // it may have closed by then
            std::future::pending::<()>().await
        };
        tokio::select! {
            _ = reader.read_to_end(&mut said) => {} // a reset is an end, too
            () = write => {}
        }
    };
    tokio::time::timeout(Duration::from_secs(20), talk).await.ok()?;
    Some(said)
}

fn has_goaway(said: &[u8]) -> bool {
    let mut rest = said;
    while let [a, b, c, kind, ..] = *rest {
        if kind == GOAWAY {
            return true;
        }
        let length = 9 + u32::from_be_bytes([0, a, b, c]) as usize;
        rest = rest.get(length..).unwrap_or_default();
    }
    false
}

/// Every address that one of the processes listens on.
fn addresses(served: &Served) -> Vec<String> {
    served.processes.iter().flat_map(|process| process.listens().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_any_port_kills_nothing() {
    let served = Served::start(2).await;
    let addresses = addresses(&served);
    assert_eq!(addresses.len(), 3 + 2 * 2, "a router has three ports, a worker two: {addresses:?}");
    for address in &addresses {
        for garbage in [
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], // TLS
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\0\0\0\0\r\n\r\n",
        ] {
            let said = until_closed(address, garbage).await;
            let said = said.unwrap_or_else(|| panic!("{address} keeps {:?}", String::from_utf8_lossy(garbage)));
            assert!(!String::from_utf8_lossy(&said).contains(" 200 OK"), "{address}");
        }
        drop(TcpStream::connect(address).await.unwrap());
    }
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames_are_cut_and_others_are_served() {
    let served = Served::start(1).await;
    let http = served.url.trim_start_matches("http://").to_owned();
    let worker = served.fleet.workers()[0].address.clone();
    let begin = || [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    let resets = (0..20_000_u32).flat_map(|number| {
        let stream = 2 * number + 1;
        [frame(HEADERS, END_HEADERS, stream, REQUEST), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
    });
    let rapid_reset: Vec<u8> = begin().into_iter().chain(resets).collect();
    let pieces = (0..20_000).flat_map(|_| frame(CONTINUATION, 0, 1, &[0x83; 16]));
    let endless_head: Vec<u8> = begin().into_iter().chain(frame(HEADERS, 0, 1, REQUEST)).chain(pieces).collect();
    for (what, flood) in [("resets", &rapid_reset), ("an endless head", &endless_head)] {
        for address in [&http, &served.grpc, &worker] {
            let mut told = false;
            for _ in 0..3 {
                let said = until_closed(address, flood).await.unwrap_or_else(|| panic!("{what} at {address} go on"));
                told |= has_goaway(&said); // a reset of the connection may take the last words with it
            }
            assert!(told, "{what} at {address} end without GOAWAY");
            served.lives().await;
        }
    }
    served.end().await;
}
