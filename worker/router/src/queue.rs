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
    /// Places of those who came anew.
    new: usize,
    next: u64,
}

#[derive(Debug)]
struct Place<T> {
    ticket: Ticket,
    is_new: bool,
    arrived: Duration,
    item: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { places: VecDeque::new(), new: 0, next: 0 }
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
        let ticket = self.ticket();
        self.new += 1;
        self.places.push_back(Place { ticket, is_new: true, arrived, item });
        Ok(ticket)
    }

    /// Puts back at the front what had left the queue and lost its worker. It was let in before, so there is room.
    pub fn put_back(&mut self, item: T, arrived: Duration) -> Ticket {
        let ticket = self.ticket();
        self.places.push_front(Place { ticket, is_new: false, arrived, item });
        ticket
    }

    fn ticket(&mut self) -> Ticket {
        self.next += 1;
        Ticket(self.next)
    }

    /// Takes the first for whom `give` has something, with it. Nobody overtakes one who came anew; those who were put
    /// back may need what is not there, so they hold up nobody.
    pub fn take<G>(&mut self, mut give: impl FnMut(&T) -> Option<G>) -> Option<(T, G)> {
        for index in 0..self.places.len() {
            let place = &self.places[index];
            match give(&place.item) {
                Some(given) => return self.remove_at(index).map(|item| (item, given)),
                None if place.is_new => return None,
                None => {}
            }
        }
        None
    }

    /// Takes out who leaves; nothing if they have been served.
    pub fn remove(&mut self, ticket: Ticket) -> Option<T> {
        let index = self.places.iter().position(|place| place.ticket == ticket)?;
        self.remove_at(index)
    }

    fn remove_at(&mut self, index: usize) -> Option<T> {
        let place = self.places.remove(index)?;
        self.new -= usize::from(place.is_new);
        Some(place.item)
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
        self.new > 0
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
        assert_eq!((any(&mut queue), any(&mut queue), any(&mut queue)), (Some('z'), Some('a'), None));
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
