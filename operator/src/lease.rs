//! Which operator acts: leader election by a Lease.
//!
//! A Lease does not fence. It only makes two writers rare; that two do no harm is owed to fixed names, server-side
//! apply and deletes with a UID precondition. [`evaluate`] is the whole decision; the loop around it reads and writes.

use std::{future::Future, time::Duration};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, api::PostParams};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use crate::backoff;

/// The spans of an election. `renew` < `deadline` < `duration`.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Another may take the Lease this long after it last saw it renewed.
    pub duration: Duration,
    /// A leader that could not renew for this long stops writing.
    pub deadline: Duration,
    /// Time between renewals, and between looks at another's Lease.
    pub renew: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { duration: Duration::from_secs(15), deadline: Duration::from_secs(10), renew: Duration::from_secs(2) }
    }
}

/// A time in which this process may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// Higher than that of every leader before, as far as the Lease tells.
    pub epoch: u64,
    until: Instant,
}

/// Tells whether this process leads now.
#[derive(Debug, Clone)]
pub struct Leadership(watch::Receiver<Option<Term>>);

/// The other end of a [`Leadership`]: set by [`elect`], or by a test.
#[derive(Debug)]
pub struct Claim(watch::Sender<Option<Term>>);

/// Makes both ends; nobody leads yet.
pub fn leadership() -> (Claim, Leadership) {
    let (sender, receiver) = watch::channel(None);
    (Claim(sender), Leadership(receiver))
}

impl Claim {
    /// Leads with `epoch` until the given moment.
    pub fn lead(&self, epoch: u64, until: Instant) {
        self.0.send_replace(Some(Term { epoch, until }));
    }

    /// Leads no more.
    pub fn follow(&self) {
        self.0.send_if_modified(|term| term.take().is_some());
    }
}

impl Leadership {
    /// The present term, if this process leads and its time is not over.
    pub fn term(&self) -> Option<Term> {
        self.0.borrow().filter(|term| Instant::now() < term.until)
    }

    /// Tells whether this process led last, and its time is over: the same term may go on, and nobody is told that it
    /// stood still.
    pub fn lapsed(&self) -> bool {
        self.0.borrow().is_some_and(|term| Instant::now() >= term.until)
    }

    /// Waits until the epoch differs from `epoch` (`None`: does not lead), and returns the new one.
    ///
    /// A term that nobody renews ends here by itself.
    pub async fn changed_from(&mut self, epoch: Option<u64>) -> Option<u64> {
        loop {
            let term = *self.0.borrow_and_update();
            let now = term.filter(|term| Instant::now() < term.until).map(|term| term.epoch);
            if now != epoch {
                return now;
            }
            let end = async {
                match term {
                    Some(term) => tokio::time::sleep_until(term.until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.0.changed() => if changed.is_err() && term.is_none() {
                    std::future::pending::<()>().await;
                } else if changed.is_err() {
                    sleep(Duration::from_millis(100)).await;
                },
                () = end => {}
            }
        }
    }
}

/// The Lease as last read, and when its content was first seen by our own clock.
///
/// Another host's clock decides nothing: only whether `renewTime` changed is looked at, not what it says.
#[derive(Debug, Clone, PartialEq)]
pub struct Sighting {
    spec: LeaseSpec,
    since: Instant,
}

impl Sighting {
    /// What is known after reading `spec` at `now`, given what was known before.
    pub fn of(before: Option<Self>, spec: LeaseSpec, now: Instant) -> Self {
        match before {
            Some(before) if before.spec == spec => before,
            _ => Self { spec, since: now },
        }
    }
}

/// What to do about the Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Take it, as the leader after `transitions` changes.
    Acquire {
        /// `leaseTransitions` to write.
        transitions: i32,
    },
    /// It is ours: write a new `renewTime`.
    Renew {
        /// `leaseTransitions` to keep.
        transitions: i32,
    },
    /// Another holds it; it may be taken after this time if nothing changes.
    Wait(Duration),
}

/// Decides what `me` does about the Lease seen at `now`; `None`: there is none. `holds`: this very process took it.
///
/// One that finds its own name without having taken the Lease was started anew in the same pod: the old process is
/// dead, so it takes over at once, with a higher count.
pub fn evaluate(me: &str, holds: bool, lease: Option<&Sighting>, now: Instant) -> Step {
    let Some(Sighting { spec, since }) = lease else {
        return Step::Acquire { transitions: 0 };
    };
    let transitions = spec.lease_transitions.unwrap_or(0);
    let holder = spec.holder_identity.as_deref().unwrap_or("");
    if holder == me && holds {
        return Step::Renew { transitions };
    }
    let next = Step::Acquire { transitions: transitions.saturating_add(1) };
    if holder.is_empty() || holder == me {
        return next;
    }
    let seconds = spec.lease_duration_seconds.unwrap_or(0).max(0).unsigned_abs();
    let rest = (*since + Duration::from_secs(u64::from(seconds))).saturating_duration_since(now);
    if rest.is_zero() { next } else { Step::Wait(rest) }
}

/// Where the Lease is, and who asks.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The Leases of the operator's own namespace.
    pub leases: Api<Lease>,
    /// The Lease's name.
    pub name: String,
    /// Unique among the processes that live: the pod's name.
    pub identity: String,
    /// The spans.
    pub timing: Timing,
}

/// Takes part in the election until `shutdown`, then gives the Lease back.
pub async fn elect(candidate: &Candidate, claim: &Claim, shutdown: impl Future<Output = ()>) {
    let mut held = None;
    tokio::select! {
        () = compete(candidate, claim, &mut held) => {}
        () = shutdown => {}
    }
    claim.follow();
    if let Some(lease) = held {
        candidate.release(lease).await;
    }
}

/// Reads, decides and writes for ever. `held` is the Lease as last written by us.
async fn compete(candidate: &Candidate, claim: &Claim, held: &mut Option<Lease>) {
    let mut sighting = None;
    loop {
        let started = Instant::now();
        match timeout(candidate.timing.deadline / 2, candidate.turn(held.is_some(), &mut sighting)).await {
            Ok(Ok(Some((lease, epoch)))) => {
                if held.is_none() {
                    info!(epoch, identity = candidate.identity, "leading");
                }
                *held = Some(lease);
                claim.lead(epoch, started + candidate.timing.deadline);
            }
            Ok(Ok(None)) => {
                *held = None;
                claim.follow();
            }
            Ok(Err(error)) => warn!(%error, "could not renew or read the Lease"),
            Err(_) => warn!("no answer about the Lease"),
        }
        let jitter = backoff::pause(0, backoff::draw()).mul_f64(0.4);
        sleep((candidate.timing.renew + jitter).saturating_sub(started.elapsed())).await;
    }
}

impl Candidate {
    /// One look and, where due, one write. Returns the Lease and its epoch if it is ours now.
    async fn turn(&self, holds: bool, sighting: &mut Option<Sighting>) -> Result<Option<(Lease, u64)>, kube::Error> {
        let found = self.leases.get_opt(&self.name).await?;
        let now = Instant::now();
        *sighting =
            found.as_ref().map(|lease| Sighting::of(sighting.take(), lease.spec.clone().unwrap_or_default(), now));
        let transitions = match evaluate(&self.identity, holds, sighting.as_ref(), now) {
            Step::Wait(_) => return Ok(None),
            Step::Acquire { transitions } | Step::Renew { transitions } => transitions,
        };
        let lease = self.claimed(found, transitions);
        let written = match &lease.metadata.resource_version {
            // The version makes the write fail if another wrote in between.
            Some(_) => self.leases.replace(&self.name, &PostParams::default(), &lease).await,
            None => self.leases.create(&PostParams::default(), &lease).await,
        };
        match written {
            Ok(lease) => Ok(Some((lease, epoch(transitions)))),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn claimed(&self, found: Option<Lease>, transitions: i32) -> Lease {
        let now = MicroTime(Timestamp::now());
        let before = found.as_ref().and_then(|lease| lease.spec.as_ref());
        let ours = before.and_then(|spec| spec.holder_identity.as_deref()) == Some(&self.identity);
        let acquired = before.filter(|_| ours).and_then(|spec| spec.acquire_time.clone());
        let spec = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.timing.duration.as_secs()).ok(),
            acquire_time: acquired.or_else(|| Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        };
        let named = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
        Lease { metadata: found.map_or(named, |lease| lease.metadata), spec: Some(spec) }
    }

    /// Lets the next one lead at once, instead of after `duration`.
    async fn release(&self, mut lease: Lease) {
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
        }
        let params = PostParams::default();
        let call = self.leases.replace(&self.name, &params, &lease);
        match timeout(Duration::from_secs(2), call).await {
            Ok(Ok(_)) => info!("gave the Lease back"),
            Ok(Err(error)) => warn!(%error, "could not give the Lease back"),
            Err(_) => warn!("no answer when giving the Lease back"),
        }
    }
}

fn epoch(transitions: i32) -> u64 {
    u64::from(transitions.max(0).unsigned_abs()) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(holder: &str, transitions: i32, since: Instant) -> Sighting {
        let spec = LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        };
        Sighting { spec, since }
    }

    #[test]
    fn takes_what_nobody_holds() {
        let now = Instant::now();
        assert_eq!(evaluate("a", false, None, now), Step::Acquire { transitions: 0 });
        assert_eq!(evaluate("a", false, Some(&seen("", 3, now)), now), Step::Acquire { transitions: 4 });
    }

    #[test]
    fn renews_its_own_and_keeps_the_count() {
        let now = Instant::now();
        assert_eq!(evaluate("a", true, Some(&seen("a", 3, now)), now), Step::Renew { transitions: 3 });
    }

    #[test]
    fn a_restarted_process_takes_over_from_itself_with_a_higher_count() {
        let now = Instant::now();
        assert_eq!(evaluate("a", false, Some(&seen("a", 3, now)), now), Step::Acquire { transitions: 4 });
    }

    #[test]
    fn waits_for_another_until_it_is_silent_for_the_duration() {
        let since = Instant::now();
        let lease = seen("b", 3, since);
        let at = |seconds| evaluate("a", false, Some(&lease), since + Duration::from_secs(seconds));
        assert_eq!(at(0), Step::Wait(Duration::from_secs(15)));
        assert_eq!(at(14), Step::Wait(Duration::from_secs(1)));
        assert_eq!(at(15), Step::Acquire { transitions: 4 });
    }

    #[test]
    fn a_clock_of_another_host_decides_nothing() {
        let (first, later) = (Instant::now(), Instant::now() + Duration::from_secs(9));
        let renewed = |hours: i64| LeaseSpec {
            renew_time: Some(MicroTime(Timestamp::UNIX_EPOCH + Duration::from_secs(3600 * hours.unsigned_abs()))),
            ..seen("b", 0, first).spec
        };
        let one = Sighting::of(None, renewed(5), first);
        let same = Sighting::of(Some(one.clone()), renewed(5), later);
        assert_eq!(same.since, first, "nothing changed, so its time runs");
        let back = Sighting::of(Some(same), renewed(1), later);
        assert_eq!(back.since, later, "a renewal counts, though its clock went back");
    }

    #[tokio::test]
    async fn a_term_ends_by_itself() {
        let (claim, mut leadership) = leadership();
        claim.lead(7, Instant::now() + Duration::from_millis(200));
        assert_eq!(leadership.changed_from(None).await, Some(7));
        assert!(leadership.term().is_some());
        assert_eq!(leadership.changed_from(Some(7)).await, None);
        assert!(leadership.term().is_none() && leadership.lapsed());
        claim.lead(7, Instant::now() + Duration::from_secs(60));
        assert!(leadership.term().is_some() && !leadership.lapsed(), "the same term goes on");
        claim.follow();
        assert!(!leadership.lapsed());
    }
}
