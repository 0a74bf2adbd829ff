//! Connections for [`frames`](crate::frames), on the port of the gRPC services.
//!
//! Who opens one sends a line with the version, and gets it back. Whoever does not speak it hangs up, since the line is
//! no HTTP, and is asked over gRPC.

use std::{
    io::{self, Read},
    net::{self, Shutdown},
    sync::Arc,
};

use futures::{Stream, stream};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::sockopt,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{CONNECT_TIMEOUT, PING_EVERY, PING_TIMEOUT, READER_TIMEOUT};
use crate::frames::{Error, Framed, Incoming, Outgoing};

/// What either end sends first.
pub(super) const PREFACE: &[u8; 20] = b"modelfleet-frames 1\n";

/// An open connection. It closes when it is dropped, whoever still reads from it or writes to it.
pub struct Connection {
    socket: Arc<net::TcpStream>,
    outgoing: Option<Arc<Outgoing>>,
}

/// Opens one to `HOST:PORT`; `None` if somebody is there who does not speak frames.
///
/// # Errors
/// If nobody answers there.
pub async fn connect(address: &str) -> io::Result<Option<Connection>> {
    let opened = async {
        let mut stream = TcpStream::connect(address).await?;
        let mut back = [0; PREFACE.len()];
        let heard = async {
            stream.write_all(PREFACE).await?;
            stream.read_exact(&mut back).await
        };
        if heard.await.is_err() || back != *PREFACE {
            return Ok(None);
        }
        tuned(stream).map(Some)
    };
    tokio::time::timeout(CONNECT_TIMEOUT, opened).await?
}

/// Takes one whose first bytes were seen to be the preface.
pub(super) async fn accept(mut stream: TcpStream) -> io::Result<Connection> {
    stream.read_exact(&mut [0; PREFACE.len()]).await?;
    stream.write_all(PREFACE).await?;
    tuned(stream)
}

/// A peer that vanished, or does not read, is noticed as soon as over HTTP/2. The system does it: both ends' processes
/// may be busy.
fn tuned(stream: TcpStream) -> io::Result<Connection> {
    const PROBES: u32 = 5;
    let stream = stream.into_std()?;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, PING_EVERY)?;
    sockopt::set_tcp_keepintvl(&stream, PING_TIMEOUT / PROBES)?;
    sockopt::set_tcp_keepcnt(&stream, PROBES)?;
    #[cfg(target_os = "linux")] // elsewhere only the probes tell
    {
        let patience = PING_EVERY + PING_TIMEOUT;
        sockopt::set_tcp_user_timeout(&stream, u32::try_from(patience.as_millis()).unwrap_or(u32::MAX))?;
    }
    Ok(Connection { socket: Arc::new(stream), outgoing: None })
}

impl Connection {
    /// What writes to it; at most `places` messages are held.
    pub fn outgoing(&mut self, places: usize) -> Arc<Outgoing> {
        self.outgoing.insert(Outgoing::new(self.socket.clone(), places)).clone()
    }

    /// What comes over it, for a thread that waits. `WouldBlock` means that nothing came for a minute.
    pub fn incoming(&self) -> Incoming<impl Read + Send + use<>> {
        Incoming::new(Waiting(self.socket.clone()))
    }

    /// The messages that come over it, until the first error or the end. Must be called inside tokio.
    ///
    /// # Errors
    /// If the system has no more file descriptors.
    pub fn messages<M: Framed>(self) -> io::Result<impl Stream<Item = Result<M, Error>> + Send> {
        let socket = Arc::new(TcpStream::from_std(self.socket.try_clone()?)?);
        let incoming = Incoming::new(Trying(socket.clone()));
        Ok(stream::try_unfold((self, socket, incoming), |(connection, socket, mut incoming)| async {
            loop {
                socket.readable().await?;
                match incoming.receive() {
                    Err(Error::Broke(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                    next => return Ok(next?.map(|message| (message, (connection, socket, incoming)))),
                }
            }
        }))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both); // it may have ended before
        if let Some(outgoing) = &self.outgoing {
            outgoing.end();
        }
    }
}

/// A socket that does not block, and is waited for.
struct Waiting(Arc<net::TcpStream>);

impl Read for Waiting {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        const WAIT: Timespec = Timespec { tv_sec: READER_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
        let mut socket = &*self.0;
        match socket.read(into) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&WAIT))?;
                socket.read(into)
            }
            read => read,
        }
    }
}

/// A socket that tokio waits for.
struct Trying(Arc<TcpStream>);

impl Read for Trying {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(into)
    }
}
