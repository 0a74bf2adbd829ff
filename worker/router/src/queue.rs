//! The requests of one model that wait for a worker: first come, first served, bounded in number and in time. Pure.
//!
//! Architecture Invariant: no clock and no wakers; the caller brings the time and takes what is due.

use std::{collections::VecDeque, time::Duration};

/// Names a place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// The queue holds as much as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A queue of `T`s. Times are since any one moment.
#[derive(Debug)]
pub struct Queue<T> {
    places: VecDeque<Place<T>>,
    next: u64,
}

#[derive(Debug)]
struct Place<T> {
    ticket: Ticket,
    weight: u32,
    arrived: Duration,
    item: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { places: VecDeque::new(), next: 0 }
    }
}

impl<T> Queue<T> {
    /// Puts `item` at the end, unless `most` wait already.
    ///
    /// # Errors
    /// [`Full`].
    pub fn push(&mut self, item: T, weight: u32, arrived: Duration, most: usize) -> Result<Ticket, Full> {
        if self.places.len() >= most {
            return Err(Full);
        }
        let ticket = self.ticket();
        self.places.push_back(Place { ticket, weight, arrived, item });
        Ok(ticket)
    }

    /// Puts back at the front what had left the queue and lost its worker. It was let in before, so there is room.
    pub fn put_back(&mut self, item: T, weight: u32, arrived: Duration) -> Ticket {
        let ticket = self.ticket();
        self.places.push_front(Place { ticket, weight, arrived, item });
        ticket
    }

    fn ticket(&mut self) -> Ticket {
        self.next += 1;
        Ticket(self.next)
    }

    /// How many sequences the first in line wants to run.
    pub fn first(&self) -> Option<u32> {
        self.places.front().map(|place| place.weight)
    }

    /// Takes the first in line.
    pub fn pop(&mut self) -> Option<T> {
        self.places.pop_front().map(|place| place.item)
    }

    /// Takes out who leaves; nothing if they have been served.
    pub fn remove(&mut self, ticket: Ticket) -> Option<T> {
        let index = self.places.iter().position(|place| place.ticket == ticket)?;
        self.places.remove(index).map(|place| place.item)
    }

    /// Takes out all.
    pub fn clear(&mut self) {
        self.places.clear();
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// How long the one that came first has waited.
    pub fn oldest_wait(&self, now: Duration) -> Duration {
        let oldest = self.places.iter().map(|place| place.arrived).min();
        oldest.map_or(Duration::ZERO, |arrived| now.saturating_sub(arrived))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(9);

    #[test]
    fn no_more_wait_than_may() {
        let mut queue = Queue::default();
        assert_eq!(queue.push('a', 1, NOW, 0), Err(Full));
        queue.push('a', 1, NOW, 2).unwrap();
        queue.push('b', 1, NOW, 2).unwrap();
        assert_eq!(queue.push('c', 1, NOW, 2), Err(Full));
    }

    #[test]
    fn who_lost_a_worker_is_first_again_even_if_the_queue_is_full() {
        let mut queue = Queue::default();
        queue.push('a', 1, NOW, 1).unwrap();
        queue.put_back('z', 3, Duration::from_secs(2));
        assert_eq!((queue.first(), queue.len()), (Some(3), 2));
        assert_eq!(queue.oldest_wait(NOW), Duration::from_secs(7));
        assert_eq!((queue.pop(), queue.pop(), queue.pop()), (Some('z'), Some('a'), None));
    }

    #[test]
    fn who_leaves_lets_the_others_up() {
        let mut queue = Queue::default();
        let a = queue.push('a', 1, NOW, 9).unwrap();
        queue.push('b', 1, NOW, 9).unwrap();
        assert_eq!(queue.remove(a), Some('a'));
        assert_eq!(queue.remove(a), None);
        assert_eq!(queue.pop(), Some('b'));
    }

    proptest! {
        #[test]
        fn those_who_stay_are_served_in_order_of_arrival(leave in proptest::collection::vec(any::<bool>(), 0..40)) {
            let mut queue = Queue::default();
            let tickets: Vec<_> = (0..leave.len()).map(|i| queue.push(i, 1, NOW, 40).unwrap()).collect();
            for (ticket, _) in tickets.iter().zip(&leave).filter(|(_, leaves)| **leaves) {
                queue.remove(*ticket);
            }
            let served: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
            let stayed: Vec<_> = (0..leave.len()).filter(|&i| !leave[i]).collect();
            prop_assert_eq!(served, stayed);
        }
    }
}
