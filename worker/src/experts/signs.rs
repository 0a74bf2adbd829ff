//! Whether a holder that takes its time is there at all: then a stream to it opens, though its experts are busy.
//!
//! A stopped process opens none, nor does one behind a network that is cut. How long a sign may take is learnt as it is of
//! replies, so that a machine that is slow blames nobody for long.

use futures::{FutureExt as _, future::BoxFuture};
use tokio::{sync::oneshot, task::AbortHandle, time::Instant};

use super::pace::{LEAST, Pace};

/// A sign that took so many times longer than it may was not slow.
const TOO_LONG: u32 = 2;

/// Signs of one holder.
pub(super) struct Signs {
    pace: Pace,
    /// When anything came from it last.
    heard: Instant,
    asked: Option<Question>,
}

/// A question that is under way.
struct Question {
    asked: Instant,
    /// When there was a sign.
    sign: oneshot::Receiver<Option<Instant>>,
    task: AbortHandle,
}

impl Drop for Question {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Signs {
    pub(super) fn new() -> Self {
        Self { pace: Pace::default(), heard: Instant::now(), asked: None }
    }

    /// Something came from it.
    pub(super) fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// Whether it has been silent for too long. If it is only quiet yet, it is asked: `ask` resolves with whether there is a
    /// sign. A question that was forgotten meanwhile is asked anew. Must run inside tokio.
    pub(super) fn are_missing(&mut self, ask: impl FnOnce() -> BoxFuture<'static, bool>) -> bool {
        self.take();
        let limit = self.pace.deadline(0);
        match self.asked.as_ref().map(|question| question.asked.elapsed()) {
            Some(waited) if waited < limit * TOO_LONG => return waited >= limit,
            None if self.heard.elapsed() < LEAST => {}
            _ => self.asked = Some(Question::ask(ask())),
        }
        false
    }

    /// What came of the question. A sign that took too long came from one that stood still, and does not tell how fast the
    /// next will be.
    fn take(&mut self) {
        let Some(question) = &mut self.asked else { return };
        let Some(answer) = (&mut question.sign).now_or_never() else { return };
        if let Ok(Some(at)) = answer {
            let took = at.saturating_duration_since(question.asked);
            if took <= self.pace.deadline(0) * TOO_LONG {
                self.pace.answered(0, took);
            }
            self.heard = self.heard.max(at);
        }
        self.asked = None; // without an answer there is nobody to ask, and the stream of calls has ended
    }
}

impl Question {
    fn ask(ask: BoxFuture<'static, bool>) -> Self {
        let (tell, sign) = oneshot::channel();
        let task = tokio::spawn(async move {
            let is_there = ask.await;
            let _ = tell.send(is_there.then(Instant::now)); // nobody waits any more
        });
        Self { asked: Instant::now(), sign, task: task.abort_handle() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::future::{pending, ready};

    use super::*;

    /// Time passes on a clock that stands still otherwise.
    async fn pass(time: Duration) {
        tokio::time::sleep(time).await; // the time is what is tried
    }

    /// Milliseconds until signs are missing, if they are within five seconds, asking `after` so many.
    async fn missing(signs: &mut Signs, after: Option<u64>) -> Option<u128> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            let ask = || match after {
                Some(ms) => pass(Duration::from_millis(ms)).map(|()| true).boxed(),
                None => pending().boxed(),
            };
            if signs.are_missing(ask) {
                return Some(begun.elapsed().as_millis());
            }
            pass(Duration::from_millis(5)).await;
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_stands_still_is_missed_at_once_each_time() {
        let mut signs = Signs::new();
        for _ in 0..10 {
            assert_eq!(missing(&mut signs, None).await, Some(100), "50 ms of quiet, and 50 ms for a sign");
            pass(Duration::from_secs(1)).await;
            assert_eq!(missing(&mut signs, Some(1)).await, None, "it is there again");
            signs.heard();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_slow_is_missed_until_that_is_learnt() {
        let mut signs = Signs::new();
        assert_eq!(missing(&mut signs, Some(70)).await, Some(100));
        pass(Duration::from_millis(70)).await;
        assert_eq!(missing(&mut signs, Some(70)).await, None);
        assert_eq!(missing(&mut signs, Some(300)).await, None, "five times as long as usual");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_sends_is_not_asked() {
        let mut signs = Signs::new();
        for _ in 0..1000 {
            signs.heard();
            assert!(!signs.are_missing(|| panic!("it is heard")));
            pass(LEAST / 2).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn where_nobody_is_asking_says_nothing() {
        let mut signs = Signs::new();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            assert!(!signs.are_missing(|| ready(false).boxed()));
            pass(Duration::from_millis(5)).await;
        }
    }
}
