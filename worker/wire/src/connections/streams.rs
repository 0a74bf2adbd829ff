//! HTTP/2 answers that nobody takes. A reader that grants no window answers pings all the same and holds up its own
//! stream only, so it is that stream that is cut; the others of its connection go on.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::{
    body::{Body, Frame, SizeHint},
    rt::Executor,
};

tokio::task_local! {
    /// The answer of the stream that the task runs.
    static ANSWER: Arc<Answer>;
}

/// Runs each stream of an HTTP/2 connection as a task, and ends it if its reader takes nothing of a [`watched`] answer.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    patience: Duration,
}

impl Streams {
    /// A reader may leave what there is to read for `patience`, and is cut before twice that time.
    pub fn new(patience: Duration) -> Self {
        Self { patience }
    }
}

impl<S> Executor<S> for Streams
where
    S: Future + Send + 'static,
    S::Output: Send,
{
    fn execute(&self, stream: S) {
        let (answer, patience) = (Arc::<Answer>::default(), self.patience);
        tokio::spawn(async move {
            tokio::select! {
                biased; // what the stream does is looked at first, its reader then
                _ = ANSWER.scope(answer.clone(), stream) => {}
                () = answer.is_left(patience) => {} // dropping the stream resets it
            }
        });
    }
}

/// `body` as the answer of the stream that this task runs.
pub fn watched<B>(body: B) -> Watched<B> {
    Watched { body, answer: ANSWER.try_with(Arc::clone).unwrap_or_default() }
}

/// Counts: odd while there is a piece that the reader has not made room for.
#[derive(Debug, Default)]
struct Answer(AtomicU64);

impl Answer {
    fn step(&self, from_odd: bool) {
        let count = self.0.load(Relaxed);
        if (count % 2 == 1) == from_odd {
            self.0.store(count + 1, Relaxed); // only the task of the stream writes
        }
    }

    fn untaken(&self) -> Option<u64> {
        Some(self.0.load(Relaxed)).filter(|count| count % 2 == 1)
    }

    /// Resolves once one piece has been left for `patience`.
    async fn is_left(&self, patience: Duration) {
        let mut before = None;
        loop {
            tokio::time::sleep(patience).await;
            let untaken = self.untaken();
            if untaken.is_some() && untaken == before {
                return;
            }
            before = untaken;
        }
    }
}

/// A body that tells which of its pieces wait for their reader: hyper asks for the next once there is room for it.
#[derive(Debug)]
pub struct Watched<B> {
    body: B,
    answer: Arc<Answer>,
}

impl<B: Body + Unpin> Body for Watched<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.answer.step(true);
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(_))) = &polled {
            self.answer.step(false);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
