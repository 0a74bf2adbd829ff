//! Connections for [`frames`](crate::frames), on the port of the gRPC services.
//!
//! Who opens one sends a line with the version, and gets it back. Whoever does not speak it hangs up, since the line is
//! no HTTP, and is asked over gRPC.

use std::{
    io,
    net::{self, Shutdown},
    sync::Arc,
    time::Duration,
};

use futures::{Stream, stream};
use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::sockopt,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::TcpStream,
    sync::{Mutex, Notify, OwnedMutexGuard},
    time::Instant,
};

use super::{CONNECT_TIMEOUT, PING_EVERY, PING_TIMEOUT, READER_TIMEOUT};
use crate::frames::{Error, Framed, Incoming, Outgoing, Source};

/// What either end sends first.
pub(super) const PREFACE: &[u8; 20] = b"modelfleet-frames 1\n";

/// An open connection. It closes when it is dropped, whoever still reads from it or writes to it.
pub struct Connection {
    socket: Arc<net::TcpStream>,
    patience: Duration,
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
        tuned(stream, READER_TIMEOUT).map(Some)
    };
    tokio::time::timeout(CONNECT_TIMEOUT, opened).await?
}

/// Takes one whose first bytes were seen to be the preface. `patience`: how long the rest of a message may take to go on.
pub(super) async fn accept(mut stream: TcpStream, patience: Duration) -> io::Result<Connection> {
    stream.read_exact(&mut [0; PREFACE.len()]).await?;
    stream.write_all(PREFACE).await?;
    tuned(stream, patience)
}

/// A peer that vanished, or does not read, is noticed as soon as over HTTP/2. The system does it: both ends' processes
/// may be busy.
fn tuned(stream: TcpStream, patience: Duration) -> io::Result<Connection> {
    const PROBES: u32 = 5;
    let stream = stream.into_std()?;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, PING_EVERY)?;
    sockopt::set_tcp_keepintvl(&stream, PING_TIMEOUT / PROBES)?;
    sockopt::set_tcp_keepcnt(&stream, PROBES)?;
    #[cfg(target_os = "linux")] // elsewhere only the probes tell
    {
        let unheard = PING_EVERY + PING_TIMEOUT;
        sockopt::set_tcp_user_timeout(&stream, u32::try_from(unheard.as_millis()).unwrap_or(u32::MAX))?;
    }
    Ok(Connection { socket: Arc::new(stream), patience, outgoing: None })
}

impl Connection {
    /// What writes to it; at most `places` messages are held.
    pub fn outgoing(&mut self, places: usize) -> Arc<Outgoing> {
        self.outgoing.insert(Outgoing::new(self.socket.clone(), places)).clone()
    }

    /// What comes over it, for a thread that waits.
    pub fn incoming(&self) -> Waiting {
        Waiting { incoming: Incoming::new(Socket(self.socket.clone())), patience: self.patience }
    }

    /// The messages that come over it, until the first error or the end, and who else may read them. Must be used inside
    /// tokio.
    ///
    /// # Errors
    /// If the system has no more file descriptors.
    pub fn messages<M: Framed>(self) -> io::Result<(impl Stream<Item = Result<M, Error>> + Send, Reader)> {
        let socket = Watched::No(self.socket.try_clone()?);
        let incoming = Incoming::new(Socket(self.socket.clone()));
        let reading = Arc::new(Mutex::new(Reading { incoming, kept_until: Instant::now() }));
        let reader = Reader { reading, left: Arc::default() };
        let watch = Watch { _connection: self, reader: reader.clone(), socket };
        Ok((stream::try_unfold(watch, Watch::next), reader))
    }
}

/// How long a connection is not read by its task after a thread has. As long as threads come back that soon, what comes
/// wakes nobody but them.
const KEPT: Duration = Duration::from_millis(10);

/// What reads a connection while no thread waits for what comes.
struct Watch {
    _connection: Connection,
    reader: Reader,
    socket: Watched,
}

/// A socket that the runtime watches, or not. It stays open in between: there may be no file descriptor to open it again.
enum Watched {
    Yes(TcpStream),
    No(net::TcpStream),
}

impl Watched {
    fn yes(self) -> io::Result<TcpStream> {
        match self {
            Self::Yes(socket) => Ok(socket),
            Self::No(socket) => TcpStream::from_std(socket),
        }
    }

    fn no(self) -> io::Result<net::TcpStream> {
        match self {
            Self::Yes(socket) => socket.into_std(),
            Self::No(socket) => Ok(socket),
        }
    }
}

impl Watch {
    async fn next<M: Framed>(mut self) -> Result<Option<(M, Self)>, Error> {
        loop {
            while let Some(until) = self.reader.kept_until() {
                self.socket = Watched::No(self.socket.no()?);
                tokio::select! {
                    () = tokio::time::sleep_until(until) => {}
                    () = self.reader.left.notified() => {}
                }
            }
            let socket = self.socket.yes()?;
            socket.readable().await?;
            let received = self.reader.try_receive(&socket);
            self.socket = Watched::Yes(socket);
            if let Some(received) = received {
                return Ok(received?.map(|message| (message, self)));
            }
        }
    }
}

/// Who else may read what comes over a connection: a thread that waits for it would be woken later by the task that
/// reads it.
#[derive(Clone)]
pub struct Reader {
    reading: Arc<Mutex<Reading>>,
    left: Arc<Notify>,
}

struct Reading {
    incoming: Incoming<Socket>,
    /// Until then the task leaves it to threads.
    kept_until: Instant,
}

impl Reader {
    /// Reads from now on; `None` if somebody reads just now.
    pub fn claim(&self) -> Option<Claim> {
        let reading = self.reading.clone().try_lock_owned().ok()?;
        let mut claim = Claim { reading, left: Left(Some(self.left.clone())) };
        claim.reading.kept_until = Instant::now();
        Some(claim)
    }

    /// The next message, if a watched socket has it and nobody else reads.
    fn try_receive<M: Framed>(&self, watched: &TcpStream) -> Option<Result<Option<M>, Error>> {
        let mut reading = self.reading.try_lock().ok()?;
        let received = watched.try_io(Interest::READABLE, || match reading.incoming.receive() {
            Err(Error::Broke(error)) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            next => Ok(next),
        });
        received.ok()
    }

    /// Until when the task must not read, if it must not now.
    fn kept_until(&self) -> Option<Instant> {
        let now = Instant::now();
        match self.reading.try_lock() {
            Ok(reading) => Some(reading.kept_until).filter(|&until| now < until),
            Err(_) => Some(now + KEPT),
        }
    }
}

/// A connection that is read by nobody else now; its task does once this is dropped.
pub struct Claim {
    reading: OwnedMutexGuard<Reading>,
    left: Left, // told when the guard is gone
}

struct Left(Option<Arc<Notify>>);

impl Drop for Left {
    fn drop(&mut self) {
        if let Some(left) = &self.0 {
            left.notify_one();
        }
    }
}

impl Claim {
    /// Whether no part of a message waits here. Let go only then, or when [`Claim::receive`] would block: whole messages
    /// that wait here wake nobody.
    pub fn is_empty(&self) -> bool {
        self.reading.incoming.is_between()
    }

    /// The next message, if it is there; else see [`Incoming::receive`].
    ///
    /// # Errors
    /// As that.
    pub fn receive<M: Framed>(&mut self) -> Result<Option<M>, Error> {
        self.reading.incoming.receive()
    }

    /// Lets go, and expects to come back so soon that the task need not read meanwhile.
    pub fn keep(mut self) {
        self.reading.kept_until = Instant::now() + KEPT;
        self.left.0 = None;
    }
}

/// What comes over a connection, waited for.
pub struct Waiting {
    incoming: Incoming<Socket>,
    /// How long the rest of a message may take to go on.
    patience: Duration,
}

impl Waiting {
    /// The next message; `None` where the peer ended between two.
    ///
    /// # Errors
    /// [`Error`]; half a message and then nothing for a minute is one.
    pub fn receive<M: Framed>(&mut self) -> Result<Option<M>, Error> {
        let mut waits = self.incoming.is_between();
        loop {
            let most = (!self.incoming.is_between()).then_some(self.patience);
            if waits && !wait_for(&mut [readable(&self.incoming)], most)? {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            match self.incoming.receive() {
                Err(Error::Broke(error)) if error.kind() == io::ErrorKind::WouldBlock => waits = true,
                next => return next,
            }
        }
    }
}

/// Waits until something has come over some of these connections, or ended them, at most so long: which.
///
/// # Errors
/// If the system cannot wait.
pub fn wait<'a>(claims: impl Iterator<Item = &'a Claim>, most: Duration) -> io::Result<Vec<bool>> {
    let mut sockets: Vec<_> = claims.map(|claim| readable(&claim.reading.incoming)).collect();
    wait_for(&mut sockets, Some(most))?;
    Ok(sockets.iter().map(|socket| !socket.revents().is_empty()).collect())
}

fn readable(incoming: &Incoming<Socket>) -> PollFd<'_> {
    PollFd::new(&*incoming.source().0, PollFlags::IN)
}

/// Whether one of these is ready, after at most so long.
fn wait_for(sockets: &mut [PollFd<'_>], most: Option<Duration>) -> io::Result<bool> {
    let most = most.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    match poll(sockets, most.as_ref()) {
        Err(Errno::INTR) => Ok(true), // it is looked again
        ready => Ok(ready? > 0),
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

/// A socket that does not block.
struct Socket(Arc<net::TcpStream>);

impl Source for Socket {
    fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        Ok(rustix::io::read(&*self.0, spare_capacity(buffer))?)
    }
}

#[cfg(test)]
mod tests;
