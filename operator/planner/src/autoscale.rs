//! How many replicas are wanted: from the queue, up at once and down slowly. `README.md` states the rules.

use std::collections::VecDeque;
use std::fmt;

use crate::units::Millis;

/// Load older than this says nothing about now. Routers report every second.
pub const STALE_AFTER: Millis = Millis(3_000);

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The fewest replicas. With 0 an idle model goes to sleep.
    pub min: u32,
    /// The most replicas, at least 1 and at least `min`.
    pub max: u32,
    /// Waiting and running requests that one replica should have at most, at least 1.
    pub target: u32,
    /// The largest number wanted over this time is kept.
    pub window: Millis,
    /// How long no request was seen before the last replica goes, if `min` is 0.
    pub idle_after: Millis,
}

/// Requests of a model, over all routers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Requests that wait.
    pub queued: u64,
    /// Requests that run.
    pub running: u64,
    /// When the oldest of the routers' reports came.
    pub at: Millis,
}

/// What is remembered from call to call: the numbers that were wanted within the window, and when work was last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// Falling numbers, each with the last moment at which it was wanted: a larger one makes earlier ones useless.
    wanted: VecDeque<(Millis, u32)>,
    busy: Millis,
}

/// How many replicas are wanted from now on, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Replicas wanted before.
    pub from: u32,
    /// Replicas wanted now.
    pub to: u32,
    /// Why.
    pub why: Why,
    /// What was known.
    pub load: Option<Load>,
}

/// Why a number was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The load asks for the number that there is.
    Steady,
    /// More waits and runs than the replicas, starting ones included, should have.
    ScaledUp,
    /// The same, and `max` allows no more.
    AtMaximum,
    /// A smaller number was enough for the whole window.
    ScaledDown,
    /// A smaller number would do now, but not for the whole window.
    Stabilizing,
    /// A smaller number would do, but its replicas would be at their target.
    RedistributionTooHigh,
    /// `min` allows no fewer.
    AtMinimum,
    /// No request was seen for the idle time.
    ScaledToZero,
    /// A request waits and there is no replica.
    Woken,
    /// No router has reported.
    LoadMissing,
    /// The reports are too old.
    LoadStale,
}

impl History {
    /// What is remembered at first: that `current` was wanted until now. So nothing shrinks before a whole window was
    /// watched.
    pub fn new(current: u32, now: Millis) -> Self {
        History { wanted: VecDeque::from([(now, current)]), busy: now }
    }

    fn remember(&mut self, wanted: u32, now: Millis, window: Millis) {
        while self.wanted.back().is_some_and(|(_, earlier)| *earlier <= wanted) {
            self.wanted.pop_back();
        }
        self.wanted.push_back((now, wanted));
        while self.wanted.len() > 1 && self.wanted.front().is_some_and(|(at, _)| now.since(*at) >= window) {
            self.wanted.pop_front();
        }
    }

    fn largest(&self) -> u32 {
        self.wanted.front().map_or(0, |(_, wanted)| *wanted)
    }
}

/// Decides how many replicas are wanted.
///
/// 1. Without fresh load the number holds, within `min` and `max`, and the window and the idle time begin again.
/// 2. *Up*, at once: if more waits and runs than `current` replicas should have, as many as that takes. `current`
///    counts starting replicas in full, so none is started twice.
/// 3. *Down*, slowly: to the largest number wanted over the window, if that leaves each replica below its target.
/// 4. *To zero*: from one, when no request was seen for the idle time.
///
/// # Guarantees
/// The answer lies within `min` and `max`. Missing or stale load never makes it smaller, but for `max`. The history
/// holds at most `max` entries.
pub fn decide(policy: &Policy, current: u32, load: Option<&Load>, history: &mut History, now: Millis) -> Decision {
    let (to, why) = match fresh(load, now) {
        Ok(load) => wanted(policy, current, load, history, now),
        Err(why) => {
            history.remember(current, now, Millis(0));
            history.busy = now;
            (current, why)
        }
    };
    let (to, why) = match to {
        _ if to < policy.min => (policy.min, Why::AtMinimum),
        _ if to > policy.max => (policy.max, Why::AtMaximum),
        _ => (to, why),
    };
    Decision { from: current, to, why, load: load.copied() }
}

fn fresh(load: Option<&Load>, now: Millis) -> Result<&Load, Why> {
    let load = load.ok_or(Why::LoadMissing)?;
    if now.since(load.at) > STALE_AFTER { Err(Why::LoadStale) } else { Ok(load) }
}

fn wanted(policy: &Policy, current: u32, load: &Load, history: &mut History, now: Millis) -> (u32, Why) {
    let work = load.queued.saturating_add(load.running);
    let target = u64::from(policy.target.max(1));
    if work > 0 {
        history.busy = now;
    }
    let enough = u32::try_from(work.div_ceil(target)).unwrap_or(u32::MAX).min(policy.max);
    history.remember(enough, now, policy.window);
    if enough > current {
        return (enough, if current == 0 { Why::Woken } else { Why::ScaledUp });
    }
    if current == 0 || work > target.saturating_mul(u64::from(current)) {
        return (current, if work > 0 { Why::AtMaximum } else { Why::Steady });
    }
    fewer(policy, current, work, history, now)
}

/// The number is enough; is a smaller one?
fn fewer(policy: &Policy, current: u32, work: u64, history: &History, now: Millis) -> (u32, Why) {
    let least = policy.min.max(1);
    if current == 1 && policy.min == 0 {
        let idle = work == 0 && now.since(history.busy) >= policy.idle_after;
        return if idle { (0, Why::ScaledToZero) } else { (1, Why::Steady) };
    }
    if current <= least {
        return (current, Why::Steady);
    }
    // Strictly below the target, or the next request would bring the replica back.
    let below = u32::try_from(work / u64::from(policy.target.max(1)) + 1).unwrap_or(u32::MAX);
    let to = history.largest().max(below).max(least);
    if to < current {
        (to, Why::ScaledDown)
    } else if below >= current {
        let why = if work.div_ceil(u64::from(policy.target.max(1))) < u64::from(current) {
            Why::RedistributionTooHigh
        } else {
            Why::Steady
        };
        (current, why)
    } else {
        (current, Why::Stabilizing)
    }
}

impl fmt::Display for Decision {
    /// `2 -> 5 ScaledUp (queued 31, running 8)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} {:?}", self.from, self.to, self.why)?;
        match &self.load {
            Some(load) => write!(f, " (queued {}, running {})", load.queued, load.running),
            None => Ok(()),
        }
    }
}
