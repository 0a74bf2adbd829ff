//! The requests of one model that wait for a worker: first come, first served, bounded in number and in time. Pure.
//!
//! Architecture Invariant: no clock and no wakers; the caller brings the time and takes what is due.

use std::{collections::BTreeMap, time::Duration};

/// Names a place in the queue, and says where it is: before 0 are those who were put back, the last of them first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(i64);

impl Ticket {
    fn is_new(self) -> bool {
        self.0 >= 0
    }
}

/// The queue holds as much as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A queue of `T`s. Times are since any one moment. However many wait, who comes, leaves or is served costs `O(log n)`.
#[derive(Debug)]
pub struct Queue<T> {
    places: BTreeMap<Ticket, Place<T>>,
    /// How many were put back, and how many came anew, ever.
    put_back: i64,
    new: i64,
}

#[derive(Debug)]
struct Place<T> {
    arrived: Duration,
    item: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { places: BTreeMap::new(), put_back: 0, new: 0 }
    }
}

impl<T> Queue<T> {
    /// Puts `item` at the end, unless `most` wait already.
    ///
    /// # Errors
    /// [`Full`].
    pub fn push(&mut self, item: T, arrived: Duration, most: usize) -> Result<Ticket, Full> {
        if self.places.len() >= most {
            return Err(Full);
        }
        let ticket = Ticket(self.new);
        self.new += 1;
        self.places.insert(ticket, Place { arrived, item });
        Ok(ticket)
    }

    /// Puts back at the front what had left the queue and lost its worker. It was let in before, so there is room.
    pub fn put_back(&mut self, item: T, arrived: Duration) -> Ticket {
        self.put_back += 1;
        let ticket = Ticket(-self.put_back);
        self.places.insert(ticket, Place { arrived, item });
        ticket
    }

    /// Takes the first for whom `give` has something, with it. Nobody overtakes one who came anew; those who were put
    /// back may need what is not there, so they hold up nobody.
    pub fn take<G>(&mut self, mut give: impl FnMut(&T) -> Option<G>) -> Option<(T, G)> {
        for (&ticket, place) in &self.places {
            match give(&place.item) {
                Some(given) => return self.remove(ticket).map(|item| (item, given)),
                None if ticket.is_new() => return None,
                None => {}
            }
        }
        None
    }

    /// Takes out who leaves; nothing if they have been served.
    pub fn remove(&mut self, ticket: Ticket) -> Option<T> {
        self.places.remove(&ticket).map(|place| place.item)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether one who comes anew must wait behind another.
    pub fn has_new(&self) -> bool {
        self.places.last_key_value().is_some_and(|(ticket, _)| ticket.is_new())
    }

    /// How long the one that came first has waited.
    pub fn oldest_wait(&self, now: Duration) -> Duration {
        let oldest = self.places.values().map(|place| place.arrived).min();
        oldest.map_or(Duration::ZERO, |arrived| now.saturating_sub(arrived))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(9);

    fn any<T>(queue: &mut Queue<T>) -> Option<T> {
        queue.take(|_| Some(())).map(|(item, ())| item)
    }

    #[test]
    fn no_more_wait_than_may() {
        let mut queue = Queue::default();
        assert_eq!(queue.push('a', NOW, 0), Err(Full));
        queue.push('a', NOW, 2).unwrap();
        queue.push('b', NOW, 2).unwrap();
        assert_eq!(queue.push('c', NOW, 2), Err(Full));
    }

    #[test]
    fn who_lost_a_worker_is_first_again_even_if_the_queue_is_full() {
        let mut queue = Queue::default();
        queue.push('a', NOW, 1).unwrap();
        queue.put_back('z', Duration::from_secs(2));
        assert_eq!(queue.len(), 2);
        assert_eq!(queue.oldest_wait(NOW), Duration::from_secs(7));
        queue.put_back('y', NOW);
        assert_eq!([0; 4].map(|_| any(&mut queue)), [Some('y'), Some('z'), Some('a'), None]);
    }

    #[test]
    fn who_needs_what_is_not_there_holds_up_nobody_but_who_came_anew_does() {
        let mut queue = Queue::default();
        queue.push('a', NOW, 9).unwrap();
        queue.push('b', NOW, 9).unwrap();
        queue.put_back('z', NOW);
        assert_eq!(queue.take(|&item| (item != 'z').then_some(1)), Some(('a', 1)));
        assert_eq!(queue.take(|&item| (item == 'c').then_some(1)), None);
        queue.push('c', NOW, 9).unwrap();
        assert_eq!(queue.take(|&item| (item == 'c').then_some(1)), None, "b is before it");
        assert!(queue.has_new());
        while any(&mut queue).is_some() {}
        queue.put_back('z', NOW);
        assert!(!queue.has_new());
    }

    #[test]
    fn who_leaves_lets_the_others_up() {
        let mut queue = Queue::default();
        let a = queue.push('a', NOW, 9).unwrap();
        queue.push('b', NOW, 9).unwrap();
        assert_eq!(queue.remove(a), Some('a'));
        assert_eq!(queue.remove(a), None);
        assert_eq!(any(&mut queue), Some('b'));
        assert!(!queue.has_new());
    }

    proptest! {
        #[test]
        fn those_who_stay_are_served_in_order_of_arrival(leave in proptest::collection::vec(proptest::bool::ANY, 0..40)) {
            let mut queue = Queue::default();
            let tickets: Vec<_> = (0..leave.len()).map(|i| queue.push(i, NOW, 40).unwrap()).collect();
            for (ticket, _) in tickets.iter().zip(&leave).filter(|(_, leaves)| **leaves) {
                queue.remove(*ticket);
            }
            let served: Vec<_> = std::iter::from_fn(|| any(&mut queue)).collect();
            let stayed: Vec<_> = (0..leave.len()).filter(|&i| !leave[i]).collect();
            prop_assert_eq!(served, stayed);
        }
    }
}
