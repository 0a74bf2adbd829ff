//! A rollout and an hour of scaling as text, one line a step, beside this file. `UPDATE=1 cargo test -p planner` writes
//! them anew.

#[path = "compare/transcript.rs"]
mod transcript;

use planner::Millis;
use planner::autoscale::{self, History, Load, Policy};
use planner::rollout::{Replica, State, Step, Wanted, next_step};

/// A fleet that does what it is told: a new replica takes 20 s to get ready, a draining one 10 s to get empty.
struct Fleet {
    replicas: Vec<(Replica, Millis)>,
    now: Millis,
    text: String,
}

impl Fleet {
    fn new() -> Self {
        Fleet { replicas: Vec::new(), now: Millis(0), text: String::new() }
    }

    fn note(&mut self, text: &str) {
        self.text += &format!("{text}\n");
    }

    /// Asks, tells, obeys, until nothing moves for a while or `until`.
    fn run(&mut self, wanted: &Wanted, until: u64) {
        let mut told = String::new();
        while self.now < Millis::from_secs(until) {
            let seen: Vec<Replica> = self.replicas.iter().map(|(r, _)| r.clone()).collect();
            let step = next_step(wanted, &seen, self.now);
            let line = format!("  {:<28} -> {step}", self.counts());
            if line != told {
                let at = format!("{}s", self.now.0 / 1000);
                self.text += &format!("{at:>5}{line}\n");
            }
            told = line;
            self.obey(&step);
            self.now = Millis(self.now.0 + 5_000);
            self.live();
        }
    }

    fn counts(&self) -> String {
        let mut revisions: Vec<&str> = self.replicas.iter().map(|(r, _)| r.id.revision.as_str()).collect();
        revisions.sort_unstable();
        revisions.dedup();
        let count = |revision: &&str| {
            let of = self.replicas.iter().filter(|(r, _)| r.id.revision == **revision);
            let ready = of.clone().filter(|(r, _)| r.state == State::Ready).count();
            format!("{revision} {ready}/{}", of.count())
        };
        let counts: Vec<String> = revisions.iter().map(count).collect();
        counts.join("  ")
    }

    fn obey(&mut self, step: &Step) {
        self.replicas.retain(|(r, _)| !step.delete.contains(&r.id));
        for (replica, since) in &mut self.replicas {
            if step.take_back.contains(&replica.id) {
                replica.state = State::Ready;
            }
            if step.drain.contains(&replica.id) {
                replica.state = State::Draining { since: self.now, empty: false };
                *since = self.now;
            }
        }
        for id in &step.create {
            let replica = Replica { id: id.clone(), state: State::Starting, running: 0 };
            self.replicas.push((replica, self.now));
        }
    }

    fn live(&mut self) {
        for (replica, since) in &mut self.replicas {
            let age = self.now.since(*since);
            replica.state = match replica.state {
                State::Starting if age >= Millis::from_secs(20) && replica.id.revision != "bad" => State::Ready,
                State::Draining { since, .. } if age >= Millis::from_secs(10) => State::Draining { since, empty: true },
                state => state,
            };
        }
    }
}

fn wanted(revision: &str, replicas: u32) -> Wanted {
    Wanted {
        revision: revision.to_owned(),
        replicas,
        max_surge: 1,
        max_unavailable: 0,
        drain_timeout: Millis::from_secs(60),
    }
}

#[test]
fn rollouts_read_as_expected() {
    let mut fleet = Fleet::new();
    fleet.note("install old, replicas=2 maxSurge=1 maxUnavailable=0");
    fleet.run(&wanted("old", 2), 40);
    fleet.note("roll to new");
    fleet.run(&wanted("new", 2), 160);
    fleet.note("roll to bad, which never gets ready");
    fleet.run(&wanted("bad", 2), 200);
    fleet.note("take it back");
    fleet.run(&wanted("new", 2), 240);
    fleet.note("scale to 4, and back to 3 while they load");
    fleet.run(&wanted("new", 4), 250);
    fleet.run(&wanted("new", 3), 300);
    fleet.note("roll to next, replicas=1 meanwhile, and back to new in the middle");
    fleet.run(&wanted("next", 1), 330);
    fleet.run(&wanted("new", 1), 380);
    fleet.note("roll without surge, maxSurge=0 maxUnavailable=1");
    fleet.run(&Wanted { max_surge: 0, max_unavailable: 1, ..wanted("last", 1) }, 430);
    fleet.note("suspend");
    fleet.run(&wanted("last", 0), 460);
    transcript::compare("rollout", &fleet.text);
}

/// Waiting and running requests, minute by minute.
fn work(minute: u64) -> Option<u64> {
    match minute {
        0..=2 => Some(0),
        3..=9 => Some(6),
        10..=14 => Some(31),
        15..=24 => Some(9),
        25..=27 => None,
        28..=30 => Some(9),
        31..=34 => Some(8),
        _ => Some(0),
    }
}

#[test]
fn an_hour_of_scaling_reads_as_expected() {
    let policy =
        Policy { min: 0, max: 3, target: 8, window: Millis::from_secs(300), idle_after: Millis::from_secs(600) };
    let (mut current, mut history) = (0, History::new(0, Millis(0)));
    let mut text = String::from("min=0 max=3 target=8 window=5m idle=10m, decided every 2 s\n");
    let mut told = String::new();
    for second in (0..3600).step_by(2) {
        let now = Millis::from_secs(second);
        let load = work(second / 60).map(|work| {
            let running = work.min(8 * u64::from(current));
            Load { queued: work - running, running, at: now }
        });
        let decision = autoscale::decide(&policy, current, load.as_ref(), &mut history, now);
        let line = decision.to_string();
        if line != told {
            text += &format!("{:>2}:{:02}  {line}\n", second / 60, second % 60);
        }
        told = line;
        current = decision.to;
    }
    transcript::compare("hour", &text);
}
