//! Work that is shared out among threads.
//!
//! They are made for it and end with it, and the system shares the processors out among all that want them. In a pool a
//! peer's few rows would wait behind the products of our step, or ours behind a peer's.

use std::cell::Cell;
use std::num::NonZero;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// Fewer multiplications than this are not worth another thread.
const WORK: usize = 1 << 23;
/// Reading a weight costs about as much as multiplying it with so many rows.
pub(crate) const READING: usize = 8;

thread_local! {
    /// Whether this thread works on a share already.
    static SHARES: Cell<bool> = const { Cell::new(false) };
}

/// Threads that so many multiplications, and so many weights that are read for them, are worth.
pub(crate) fn worth(multiplications: usize, weights: usize) -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    match multiplications + READING * weights < WORK || SHARES.get() {
        true => 1,
        false => *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get)),
    }
}

/// Does each of `tasks`, on at most so many threads, of which the caller's is one. What a task does has no more threads.
pub(crate) fn share<T: Send>(threads: usize, tasks: Vec<T>, work: impl Fn(T) + Sync) {
    let more = threads.min(tasks.len()).saturating_sub(1);
    if more == 0 {
        return tasks.into_iter().for_each(work);
    }
    let tasks = Mutex::new(tasks.into_iter());
    let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work_on = || {
        let before = SHARES.replace(true);
        while let Some(task) = next() {
            work(task);
        }
        SHARES.set(before);
    };
    thread::scope(|scope| {
        for _ in 0..more {
            if thread::Builder::new().spawn_scoped(scope, work_on).is_err() {
                break; // the system has no more threads; those that there are do all
            }
        }
        work_on();
    });
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn each_task_is_done_once_and_as_many_at_once_as_were_asked_for() {
        for (threads, count) in [(1, 5), (3, 0), (3, 1), (3, 3), (3, 30), (8, 3)] {
            let at_once = threads.min(count);
            let (barrier, seen) = (Barrier::new(at_once.max(1)), Mutex::new(HashSet::new()));
            let mut done = vec![0; count];
            share(threads, done.iter_mut().enumerate().collect(), |(task, done)| {
                *done += task + 1;
                if task < at_once {
                    barrier.wait(); // else one thread could do all
                }
                seen.lock().unwrap().insert(thread::current().id());
                assert_eq!(SHARES.get(), at_once > 1, "what it does has no more threads");
            });
            assert_eq!(done, (1..=count).collect::<Vec<_>>());
            assert_eq!(seen.lock().unwrap().len(), at_once);
            assert!(!SHARES.get());
        }
    }
}
