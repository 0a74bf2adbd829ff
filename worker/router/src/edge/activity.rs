//! What a connection is at, seen from its reads and writes: hyper times a head from the end of the last request, but
//! one that has begun has less time than one that has not.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Times are in milliseconds since the connection began, plus one; 0 is none.
#[derive(Debug)]
pub(super) struct Activity {
    began: Instant,
    head_timeout: Option<Duration>,
    stall_timeout: Duration,
    head_since: AtomicU64,
    stalled_since: AtomicU64,
    requests: AtomicU32,
}

impl Activity {
    pub(super) fn of_http1(head_timeout: Duration, stall_timeout: Duration) -> Arc<Self> {
        Self::new(Some(head_timeout), stall_timeout)
    }

    /// Heads of HTTP/2 are frames among others; its own pings find a peer that hangs in one.
    pub(super) fn of_http2(stall_timeout: Duration) -> Arc<Self> {
        Self::new(None, stall_timeout)
    }

    fn new(head_timeout: Option<Duration>, stall_timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            head_timeout,
            stall_timeout,
            head_since: AtomicU64::new(0),
            stalled_since: AtomicU64::new(0),
            requests: AtomicU32::new(0),
        })
    }

    /// A head was read; its request runs until the guard drops.
    pub(super) fn begin(self: &Arc<Self>) -> Busy {
        self.requests.fetch_add(1, Relaxed);
        self.head_since.store(0, Relaxed);
        Busy(self.clone())
    }

    fn has_read(&self) {
        if self.requests.load(Relaxed) == 0 && self.head_since.load(Relaxed) == 0 {
            self.head_since.store(self.now(), Relaxed);
        }
    }

    fn has_written(&self, is_stalled: bool) {
        if !is_stalled {
            self.stalled_since.store(0, Relaxed);
        } else if self.stalled_since.load(Relaxed) == 0 {
            self.stalled_since.store(self.now(), Relaxed);
        }
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64 + 1
    }

    fn is_over(&self, since: &AtomicU64, timeout: Duration) -> bool {
        let since = since.load(Relaxed);
        since != 0 && self.now().saturating_sub(since) >= timeout.as_millis() as u64
    }

    /// Resolves once a head or a reader takes too long.
    pub(super) async fn is_overdue(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY.min(self.stall_timeout)).await;
            let head = self.head_timeout.is_some_and(|timeout| self.is_over(&self.head_since, timeout));
            if head || self.is_over(&self.stalled_since, self.stall_timeout) {
                return;
            }
        }
    }
}

/// A request runs.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Relaxed);
    }
}

/// A connection that tells its [`Activity`].
#[derive(Debug)]
pub(super) struct Watched {
    stream: TcpStream,
    activity: Arc<Activity>,
}

impl Watched {
    pub(super) fn new(stream: TcpStream, activity: Arc<Activity>) -> Self {
        Self { stream, activity }
    }

    fn told<T>(&self, written: Poll<T>) -> Poll<T> {
        self.activity.has_written(written.is_pending());
        written
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.activity.has_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.told(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.told(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    #[test]
    fn a_head_counts_from_its_first_byte_to_its_request() {
        let activity = Activity::of_http1(NOW, Duration::MAX);
        assert!(!activity.is_over(&activity.head_since, NOW), "nothing was read yet");
        activity.has_read();
        assert!(activity.is_over(&activity.head_since, NOW));
        let busy = activity.begin();
        activity.has_read(); // the body
        assert!(!activity.is_over(&activity.head_since, NOW));
        drop(busy);
        activity.has_read(); // the next head
        assert!(activity.is_over(&activity.head_since, NOW));
    }

    #[test]
    fn a_reader_that_reads_again_is_not_stalled() {
        let activity = Activity::of_http2(NOW);
        activity.has_written(true);
        assert!(activity.is_over(&activity.stalled_since, NOW));
        activity.has_written(false);
        assert!(!activity.is_over(&activity.stalled_since, NOW));
    }
}
