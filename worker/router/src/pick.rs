//! Which worker gets a request: power of two choices over the workers of all replicas of a model. Pure.

/// The most sequences a router has out at one worker; more wait in the router, where they count as queued and can go to
/// a worker that comes. It is what a worker runs at once by default.
pub const SEQUENCES_PER_WORKER: u32 = 64;

/// A worker, as far as picking goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Sequences that this router has out there.
    pub outstanding: u32,
    /// Takes no new requests.
    pub is_draining: bool,
    /// Failed a moment ago.
    pub is_suspect: bool,
    /// Runs something else than what this request began with.
    pub is_other: bool,
}

impl View {
    /// Whether `weight` more sequences may go there.
    pub(crate) fn can_take(&self, weight: u32) -> bool {
        let fits = self.outstanding.saturating_add(weight) <= SEQUENCES_PER_WORKER;
        !self.is_other && !self.is_draining && !self.is_suspect && fits
    }
}

/// The answer of [`pick`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// The index of the worker.
    Worker(usize),
    /// Nobody can take it now.
    Wait(Why),
}

/// Why nobody can take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There is no worker that would do, or all are draining.
    NoWorker,
    /// Those there are failed a moment ago.
    AllSuspect,
    /// All have as much as they take.
    AllBusy,
}

/// Picks one of `workers` for `weight` sequences: of two able ones drawn at random, the one with less outstanding work,
/// or the first drawn if they have the same.
///
/// `draw` is uniformly random. Routers that know nothing of each other do not herd on one worker, as they would on the
/// least loaded one of a snapshot.
pub fn pick(workers: &[View], weight: u32, draw: u64) -> Pick {
    let able = || workers.iter().enumerate().filter(|(_, worker)| worker.can_take(weight));
    let count = able().count() as u64;
    if count == 0 {
        return Pick::Wait(why(workers));
    }
    let first = draw % count;
    // another one than the first, unless there is only one
    let second = if count == 1 { first } else { (first + 1 + (draw / count) % (count - 1)) % count };
    let drawn = |nth: u64| able().nth(nth as usize).expect("it was counted a line ago");
    let (a, b) = (drawn(first), drawn(second));
    Pick::Worker(if b.1.outstanding < a.1.outstanding { b.0 } else { a.0 })
}

fn why(workers: &[View]) -> Why {
    let mut here = workers.iter().filter(|worker| !worker.is_draining && !worker.is_other).peekable();
    if here.peek().is_none() {
        Why::NoWorker
    } else if here.all(|worker| worker.is_suspect) {
        Why::AllSuspect
    } else {
        Why::AllBusy
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn with(outstanding: u32) -> View {
        View { outstanding, is_draining: false, is_suspect: false, is_other: false }
    }

    #[test]
    fn why_nobody_takes_it() {
        let draining = View { is_draining: true, ..with(0) };
        let suspect = View { is_suspect: true, ..with(0) };
        let other = View { is_other: true, ..with(0) };
        let busy = with(SEQUENCES_PER_WORKER);
        let table: [(&[View], Why); 6] = [
            (&[], Why::NoWorker),
            (&[draining], Why::NoWorker),
            (&[other, draining], Why::NoWorker),
            (&[draining, suspect], Why::AllSuspect),
            (&[suspect, busy], Why::AllBusy),
            (&[busy], Why::AllBusy),
        ];
        for (workers, why) in table {
            assert_eq!(pick(workers, 1, 0), Pick::Wait(why), "{workers:?}");
        }
    }

    fn views() -> impl Strategy<Value = Vec<View>> {
        let view = (0..80_u32, any::<[bool; 3]>());
        let view = view.prop_map(|(outstanding, [is_draining, is_suspect, is_other])| View {
            outstanding,
            is_draining,
            is_suspect,
            is_other,
        });
        proptest::collection::vec(view, 0..20)
    }

    proptest! {
        #[test]
        fn only_a_worker_that_can_take_it_is_picked(workers in views(), weight in 1..70_u32, draw: u64) {
            match pick(&workers, weight, draw) {
                Pick::Worker(index) => prop_assert!(workers[index].can_take(weight)),
                Pick::Wait(_) => prop_assert!(workers.iter().all(|worker| !worker.can_take(weight))),
            }
        }

        #[test]
        fn the_most_loaded_of_several_is_never_picked(least in 0..30_u32, count in 2..10_usize, draw: u64) {
            let mut workers = vec![with(least); count];
            workers[count / 2].outstanding += 1;
            prop_assert_ne!(pick(&workers, 1, draw), Pick::Worker(count / 2));
        }
    }

    #[test]
    fn ties_are_spread_evenly() {
        let workers = [with(3); 5];
        let mut counts = [0; 5];
        for draw in 0..5000 {
            let Pick::Worker(index) = pick(&workers, 1, draw) else { panic!("all can take it") };
            counts[index] += 1;
        }
        assert_eq!(counts, [1000; 5]);
    }
}
