//! Messages with rows over a bare TCP connection, where the way through HTTP/2 costs more than the rows.
//!
//! A frame is two lengths (`u32`, little endian), of a protobuf message without its rows and of the rows; then both.
//! [`connections::framed`](crate::connections::framed) opens and accepts such connections.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, Write},
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use prost::Message;
use tokio::{
    io::Interest,
    net,
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
};

use crate::{
    MAX_MESSAGE_BYTES,
    proto::{RunCall, RunReply},
};

/// Of the two lengths.
const LENGTHS: usize = 8;
/// Read at once at least, where a message and the beginning of its rows fit in.
const LEAST_READ: usize = 4 << 10;
/// A frame up to this size is expected to be followed by one that is hardly larger, which is then read at once.
const MOST_READ: usize = 256 << 10;

/// A message whose rows travel beside it.
pub trait Framed: Message + Default {
    /// The rows.
    fn rows(&mut self) -> &mut Bytes;
}

impl Framed for RunCall {
    fn rows(&mut self) -> &mut Bytes {
        &mut self.rows
    }
}

impl Framed for RunReply {
    fn rows(&mut self) -> &mut Bytes {
        &mut self.rows
    }
}

/// Why nothing more can be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The lengths are no frame's.
    #[error("a frame of {message} and {rows} bytes is larger than {MAX_MESSAGE_BYTES}")]
    TooLarge {
        /// Of the message.
        message: usize,
        /// Of its rows.
        rows: usize,
    },
    /// The message is none.
    #[error("a frame's message is none")]
    NoMessage(#[from] prost::DecodeError),
    /// Rows are within the message.
    #[error("a frame's message has its rows within it, not behind it")]
    RowsWithin,
    /// The connection broke, within a frame too.
    #[error("the connection broke")]
    Broke(#[from] io::Error),
}

/// Where bytes come from.
pub trait Source {
    /// Adds what there is to `buffer`, in the capacity that it has; returns how many bytes.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing for now.
    fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize>;
}

/// Reads frames. What was read of one is kept when the connection has no more for now.
pub struct Incoming<S> {
    from: S,
    /// Of a frame, and what was read behind it.
    read: Vec<u8>,
    /// How much is read at once.
    at_once: usize,
}

impl<S: Source> Incoming<S> {
    /// Reads from the beginning of a frame.
    pub fn new(from: S) -> Self {
        Self { from, read: Vec::new(), at_once: LEAST_READ }
    }

    /// Whether nothing of a frame was read yet.
    pub fn is_between(&self) -> bool {
        self.read.is_empty()
    }

    pub(crate) fn source(&self) -> &S {
        &self.from
    }

    /// The next message; `None` where the peer ended between two. Its rows are where they were read.
    ///
    /// # Errors
    /// [`Error`]. After [`io::ErrorKind::WouldBlock`] it can be called again, after any other error in vain.
    pub fn receive<M: Framed>(&mut self) -> Result<Option<M>, Error> {
        let [message, rows] = loop {
            let ends = ends(&self.read)?;
            let wanted = ends.map_or(LENGTHS, |[_, rows]| rows);
            if let Some(ends) = ends.filter(|_| self.read.len() >= wanted) {
                break ends;
            }
            // pages are the system's until bytes come
            self.read.reserve_exact(wanted.max(self.at_once).saturating_sub(self.read.len()));
            match fill(&mut self.from, &mut self.read) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && self.is_between() => return Ok(None),
                filled => filled?,
            }
        };
        let mut frame = Bytes::from(std::mem::take(&mut self.read));
        self.read.extend_from_slice(&frame.split_off(rows)); // most often nothing
        self.at_once = if rows > MOST_READ { LEAST_READ } else { (rows + rows / 8).max(LEAST_READ) };
        let mut read = M::decode(&frame[LENGTHS..message])?;
        if !read.rows().is_empty() {
            return Err(Error::RowsWithin);
        }
        *read.rows() = frame.split_off(message);
        Ok(Some(read))
    }
}

/// Where the message and the rows of a frame end, once its lengths are there.
fn ends(frame: &[u8]) -> Result<Option<[usize; 2]>, Error> {
    let Some([message, rows]) = frame.as_chunks::<4>().0.first_chunk::<2>() else { return Ok(None) };
    let [message, rows] = [message, rows].map(|length| u32::from_le_bytes(*length) as usize);
    if message + rows > MAX_MESSAGE_BYTES {
        return Err(Error::TooLarge { message, rows });
    }
    Ok(Some([LENGTHS + message, LENGTHS + message + rows]))
}

fn fill(from: &mut impl Source, buffer: &mut Vec<u8>) -> io::Result<()> {
    match from.read(buffer) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Writes frames, from any thread.
///
/// Who sends writes, if nobody waits before it; nobody waits for the peer. What the socket does not take is written by
/// [`Outgoing::flush`], in order.
pub struct Outgoing {
    socket: Arc<TcpStream>,
    waiting: Mutex<VecDeque<Frame>>,
    more: Notify,
    places: Arc<Semaphore>,
}

/// Room for one message.
pub struct Place {
    outgoing: Arc<Outgoing>,
    place: OwnedSemaphorePermit,
}

struct Frame {
    head: Vec<u8>,
    rows: Bytes,
    sent: usize,
    _place: OwnedSemaphorePermit,
}

impl Outgoing {
    /// Of a socket that does not block; at most `places` messages are held.
    pub(crate) fn new(socket: Arc<TcpStream>, places: usize) -> Arc<Self> {
        let (waiting, more, places) = (Mutex::default(), Notify::new(), Arc::new(Semaphore::new(places)));
        Arc::new(Self { socket, waiting, more, places })
    }

    /// Room for a message, if there is any now.
    pub fn try_reserve(self: &Arc<Self>) -> Option<Place> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        Some(Place { outgoing: self.clone(), place })
    }

    /// Room for a message, waited for; `None` once the connection has ended.
    pub async fn reserve(self: &Arc<Self>) -> Option<Place> {
        let place = self.places.clone().acquire_owned().await.ok()?;
        Some(Place { outgoing: self.clone(), place })
    }

    /// Writes what waits for room in the socket, until the connection ends. Must run inside tokio.
    pub async fn flush(&self) {
        loop {
            self.more.notified().await;
            if self.write_waiting().await.is_err() {
                return self.end();
            }
        }
    }

    /// The socket is watched only meanwhile, so that what is read wakes nobody but its reader.
    async fn write_waiting(&self) -> io::Result<()> {
        let watched = net::TcpStream::from_std(self.socket.try_clone()?)?;
        loop {
            watched.writable().await?;
            match watched.try_io(Interest::WRITABLE, || self.try_write_waiting()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return written,
            }
        }
    }

    fn try_write_waiting(&self) -> io::Result<()> {
        let mut waiting = self.waiting();
        while let Some(frame) = waiting.front_mut() {
            frame.write(&self.socket)?;
            waiting.pop_front();
        }
        Ok(())
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Frame>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever reads from the connection, or waits for a place, finds its end.
    pub(crate) fn end(&self) {
        self.places.close();
        let _ = self.socket.shutdown(Shutdown::Both); // it may have ended before
        self.waiting().clear();
    }
}

impl Place {
    /// Sends a message; whether it is on its way. One that is too large is not, nor one that finds the connection broken.
    pub fn send<M: Framed>(self, message: M) -> bool {
        let Self { outgoing, place } = self;
        let Some(mut frame) = Frame::of(message, place) else { return false };
        let mut waiting = outgoing.waiting();
        if waiting.is_empty() {
            match frame.write(&outgoing.socket) {
                Ok(()) => return true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    drop(waiting);
                    outgoing.end();
                    return false;
                }
            }
        }
        waiting.push_back(frame);
        drop(waiting);
        outgoing.more.notify_one();
        true
    }
}

impl Frame {
    fn of<M: Framed>(mut message: M, place: OwnedSemaphorePermit) -> Option<Self> {
        let rows = std::mem::take(message.rows());
        let length = message.encoded_len();
        if length + rows.len() > MAX_MESSAGE_BYTES {
            return None;
        }
        let mut head = Vec::with_capacity(LENGTHS + length);
        for length in [length, rows.len()] {
            head.extend(u32::try_from(length).ok()?.to_le_bytes());
        }
        message.encode(&mut head).ok()?; // a Vec has room for it
        Some(Self { head, rows, sent: 0, _place: place })
    }

    /// Writes what is left of it; `WouldBlock` if that is not all.
    fn write(&mut self, mut socket: &TcpStream) -> io::Result<()> {
        while self.sent < self.head.len() + self.rows.len() {
            let head = &self.head[self.sent.min(self.head.len())..];
            let rows = &self.rows[self.sent.saturating_sub(self.head.len())..];
            match socket.write_vectored(&[IoSlice::new(head), IoSlice::new(rows)]) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
