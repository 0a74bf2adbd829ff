//! Tables of what a line does, and that its counters always come back to zero.

use std::sync::mpsc;

use proptest::prelude::*;
use wire::proto::{ModelSnapshot, WorkerEntry};

use super::*;
use crate::{pick::SEQUENCES_PER_WORKER, snapshot::Table};

const NOW: Duration = Duration::from_secs(1);

fn snapshot(workers: usize, max_pending: u32, availability: Availability) -> ModelSnapshot {
    let entry = |id: usize| WorkerEntry { id: id.to_string(), ..Default::default() };
    ModelSnapshot {
        model: "ns/m".into(),
        availability: availability.into(),
        max_pending,
        workers: (0..workers).map(entry).collect(),
        ..Default::default()
    }
}

fn freed() -> Freed {
    Arc::new(|line| line.serve(NOW, || 0))
}

fn line(workers: usize, max_pending: u32) -> Arc<Line> {
    let table = Table::default().with(snapshot(workers, max_pending, Availability::Serving), &freed());
    table.find("ns/m").unwrap().clone()
}

fn enter(line: &Arc<Line>, weight: u32, is_retry: bool) -> (Entered, mpsc::Receiver<Grant>) {
    enter_as(line, weight, if is_retry { Turn::Retry } else { Turn::First })
}

fn enter_as(line: &Arc<Line>, weight: u32, turn: Turn) -> (Entered, mpsc::Receiver<Grant>) {
    let (sender, receiver) = mpsc::channel();
    let waiter = || -> Waiter { Box::new(move |grant| sender.send(grant).map_err(|back| back.0)) };
    let entry = Entry { weight, arrived: Duration::ZERO, turn };
    (line.enter(entry, NOW, 0, waiter), receiver)
}

fn granted(line: &Arc<Line>, weight: u32) -> Grant {
    match enter(line, weight, false).0 {
        Entered::Granted(grant) => grant,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_free_worker_is_granted_at_once_and_the_rest_wait_up_to_the_bound() {
    let line = line(1, 1);
    let running = granted(&line, SEQUENCES_PER_WORKER);
    let (waiting, grant) = enter(&line, 1, false);
    assert!(matches!(waiting, Entered::Waiting(_, Why::AllBusy)));
    assert!(matches!(enter(&line, 1, false).0, Entered::Full));
    assert_eq!(line.counts(), (1, 1));
    let load = line.load(NOW);
    assert_eq!((load.queued, load.running, load.oldest_wait_ms, load.accepted), (1, 1, 1000, 3));

    drop(running); // the guard serves the next
    assert_eq!(grant.try_recv().unwrap().worker().id, "0");
    assert_eq!(line.counts(), (0, 0));
}

#[test]
fn nobody_overtakes_the_line_but_who_lost_a_worker() {
    let line = line(1, 9);
    let running = granted(&line, SEQUENCES_PER_WORKER - 1);
    let (_, big) = enter(&line, 2, false);
    assert!(matches!(enter(&line, 1, false).0, Entered::Waiting(..)), "it would fit, but is second");
    assert!(matches!(enter(&line, 1, true).0, Entered::Granted(_)));
    drop(running);
    assert!(big.try_recv().is_ok());
}

#[test]
fn a_stream_waits_for_a_worker_of_its_content_and_holds_up_nobody() {
    let line = line(1, 9);
    let content = |revision: &str| Arc::new(Content { hash: String::new(), revision: revision.into() });
    let (gone, waits) = enter_as(&line, 1, Turn::Resume(content("old")));
    assert!(matches!(gone, Entered::Waiting(_, Why::NoWorker)));
    let running = granted(&line, SEQUENCES_PER_WORKER);
    let (_, new) = enter(&line, 1, false);
    let (_, resumed) = enter_as(&line, SEQUENCES_PER_WORKER, Turn::Resume(content("")));
    drop(running);
    let grant = resumed.try_recv().expect("it goes before those who came anew");
    assert!(new.try_recv().is_err());
    drop(grant);
    assert!(new.try_recv().is_ok() && waits.try_recv().is_err());
    assert_eq!(line.counts().0, 1);
}

#[test]
fn retries_end_with_their_budget_and_the_rest_waits_for_more() {
    let line = line(1, 9);
    let mut now = NOW;
    let mut granted = 0;
    let waiting = loop {
        match enter(&line, 1, true) {
            (Entered::Granted(_), _) => granted += 1,
            (_, waiting) => break waiting,
        }
    };
    assert!((50..200).contains(&granted), "{granted}");
    assert!(matches!(enter(&line, 1, false).0, Entered::Granted(_)), "who comes anew needs none");
    line.serve(now, || 0);
    assert!(waiting.try_recv().is_err());
    now += Duration::from_millis(100);
    line.serve(now, || 0);
    assert!(waiting.try_recv().is_ok());
}

#[test]
fn a_worker_that_failed_is_tried_with_one_request() {
    let line = line(1, 9);
    let load = line.model().workers[0].load.clone();
    load.failed(Duration::ZERO, false);
    let trial = granted(&line, 1);
    let (Entered::Waiting(..), second) = enter(&line, 1, false) else { panic!("it has not answered yet") };
    load.answered();
    line.serve(NOW, || 0);
    assert!(second.try_recv().is_ok());
    load.failed(Duration::ZERO, false);
    drop(trial);
    drop(granted(&line, 1)); // given up, so that the next one may try
    drop(granted(&line, 1));
}

#[test]
fn who_left_the_queue_or_hung_up_is_passed_over() {
    let line = line(1, 9);
    let running = granted(&line, SEQUENCES_PER_WORKER);
    let (Entered::Waiting(ticket, _), left) = enter(&line, 1, false) else { panic!() };
    let (_, hung_up) = enter(&line, 1, false);
    let (_, stays) = enter(&line, 1, false);
    line.leave(ticket);
    drop(hung_up);
    drop(running);
    assert!(left.try_recv().is_err());
    drop(stays.try_recv().unwrap());
    assert_eq!(line.counts(), (0, 0));
}

#[test]
fn a_new_snapshot_wakes_who_waits_and_an_off_one_refuses() {
    let table = Table::default().with(snapshot(0, 9, Availability::Asleep), &freed());
    let line = table.find("ns/m").unwrap().clone();
    let (waiting, grant) = enter(&line, 1, false);
    assert!(matches!(waiting, Entered::Waiting(_, Why::NoWorker)));
    let table = table.with(snapshot(1, 9, Availability::Serving), &freed());
    line.serve(NOW, || 0);
    assert!(grant.try_recv().is_ok());
    let _table = table.with(snapshot(0, 9, Availability::Off), &freed());
    assert!(matches!(enter(&line, 1, false).0, Entered::Off));
}

#[test]
fn a_model_that_goes_sends_its_waiters_away() {
    let table = Table::default().with(snapshot(0, 9, Availability::Serving), &freed());
    let line = table.find("ns/m").unwrap().clone();
    let (_, grant) = enter(&line, 1, false);
    let _table = table.without("ns/m");
    assert!(matches!(grant.try_recv(), Err(mpsc::TryRecvError::Disconnected)));
    assert_eq!(line.counts(), (0, 0));
}

#[test]
fn many_that_need_what_is_not_there_cost_one_look() {
    let line = line(1, 1000);
    let running = granted(&line, SEQUENCES_PER_WORKER);
    let gone = |hash: &str| Turn::Resume(Arc::new(Content { hash: hash.into(), revision: "old".into() }));
    let lost: Vec<_> = (0..50).map(|index| enter_as(&line, 1 + index % 3, gone("a")).1).collect();
    let retries: Vec<_> = (0..50).map(|_| enter(&line, 1, true).1).collect();
    let (_, other) = enter_as(&line, 1, gone("b"));
    let (_, new) = enter(&line, 1, false);
    let mut looks = 0;
    line.serve(NOW, || {
        looks += 1;
        0
    });
    assert_eq!(line.counts(), (102, 1));
    assert!(looks <= 3 + 1 + 1 + 1, "{looks} looks for four kinds of requests, one of three weights");
    drop(running);
    assert!(retries.iter().all(|retry| retry.try_recv().is_ok()) && new.try_recv().is_ok());
    assert!(other.try_recv().is_err() && lost.iter().all(|lost| lost.try_recv().is_err()));
}

proptest! {
    #[test]
    fn counters_come_back_to_zero(
        weights in proptest::collection::vec(1..=SEQUENCES_PER_WORKER, 1..60),
        order in proptest::collection::vec(any::<u16>(), 60),
    ) {
        let line = line(3, 1000);
        let mut running = Vec::new();
        let mut waiting = Vec::new();
        for (weight, order) in weights.iter().zip(order) {
            match enter(&line, *weight, order % 5 == 0) {
                (Entered::Granted(grant), _) => running.push(grant),
                (_, receiver) => waiting.push(receiver),
            }
            if order % 3 == 0 && !running.is_empty() {
                running.swap_remove(order as usize % running.len());
            }
            if order % 4 == 0 && !waiting.is_empty() {
                waiting.swap_remove(order as usize % waiting.len());
            }
            for worker in &line.model().workers {
                prop_assert!(worker.load.outstanding() <= SEQUENCES_PER_WORKER);
            }
        }
        drop(running);
        while let Some(receiver) = waiting.pop() {
            drop(receiver);
            line.serve(NOW, || 1);
        }
        line.serve(NOW, || 1);
        prop_assert_eq!(line.counts(), (0, 0));
        prop_assert!(line.model().workers.iter().all(|worker| worker.load.outstanding() == 0));
    }
}
