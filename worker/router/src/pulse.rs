//! Whether a worker is there, by what is heard of it. Pure.
//!
//! A worker that runs something and sends nothing is asked for a sign of life. Its connections give one though its engine
//! is busy: a long prompt, or experts that are away, silence an answer and not its worker. A stopped process gives none, nor
//! does a network that is cut. Time is counted in the router's own ticks: one that is held up itself blames nobody.

use std::time::Duration;

/// How often [`Pulse::tick`] is called.
pub const TICK: Duration = Duration::from_millis(50);
/// Ticks without anything from a worker until it is asked.
const QUIET: u32 = 4;
/// Ticks between two questions to a worker that is heard: so one knows how fast it answers.
const USUAL: u32 = 20;
/// Ticks that a sign may take, at least.
const LEAST: u32 = 5;
/// Ticks that the first sign may take: there may be no connection yet.
const FIRST: u32 = 10;
/// Ticks that no sign may take.
const MOST: u32 = 200;
/// How many times slower than the slowest of late a sign may be.
const SLOWER: u32 = 5;
/// Who was given up so that twice the time would have been enough gets it, and again so often at most.
const MOST_DOUBLINGS: u32 = 5;
/// Ticks of life after which one of these is taken back.
const FORGOTTEN_AFTER: u32 = 200;

/// What is known of a worker's life.
#[derive(Debug, Default)]
pub struct Pulse {
    /// Ticks since it was heard.
    quiet: u32,
    /// Ticks since it was asked.
    asked: u32,
    is_asked: bool,
    /// Whether the sign that is due tells how fast it answers. Not if it stood still meanwhile.
    is_timed: bool,
    is_silent: bool,
    slowest_sign: Duration,
    doublings: u32,
    /// Ticks since it was given up, or since it was heard again.
    since: u32,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Ask for a sign, and tell [`Pulse::signed`] or [`Pulse::unsigned`] what came of it.
    Ask,
    /// It is silent: what it runs had better go on elsewhere.
    GiveUp,
}

impl Pulse {
    /// Time passed, in which the worker was heard or not.
    pub fn tick(&mut self, heard: bool) -> Option<Act> {
        self.asked = self.asked.saturating_add(1);
        self.quiet = self.quiet.saturating_add(1);
        if heard {
            self.hear();
        }
        self.since = self.since.saturating_add(1);
        if !self.is_silent && self.since >= FORGOTTEN_AFTER {
            (self.since, self.doublings) = (0, self.doublings.saturating_sub(1));
        }
        if !self.is_asked {
            let is_due = self.quiet >= QUIET && self.asked >= QUIET || self.asked >= USUAL;
            return is_due.then(|| self.ask());
        }
        let is_late = self.quiet.min(self.asked) >= self.limit();
        (is_late && !self.is_silent).then(|| {
            (self.is_silent, self.since, self.is_timed) = (true, 0, false);
            Act::GiveUp
        })
    }

    fn ask(&mut self) -> Act {
        (self.is_asked, self.asked, self.is_timed) = (true, 0, !self.is_silent);
        Act::Ask
    }

    /// It gave a sign, so long after it was asked.
    pub fn signed(&mut self, took: Duration) {
        if self.is_timed {
            self.slowest_sign = took.max(self.slowest_sign - self.slowest_sign / 16);
        }
        self.is_asked = false;
        self.hear();
    }

    /// The question came to nothing: there is no connection. That ends answers by itself, and says nothing of a worker to
    /// which there may be one again.
    pub fn unsigned(&mut self) {
        self.is_asked = false;
    }

    /// Time passed in which it ran nothing, so nothing needs to be heard of it. But it is asked until it is known how fast
    /// it answers.
    pub fn rests(&mut self) -> Option<Act> {
        self.quiet = 0;
        if self.is_asked || !self.slowest_sign.is_zero() {
            return None;
        }
        self.asked += 1;
        (self.asked >= USUAL).then(|| self.ask())
    }

    /// Whether it was given up, and not heard since.
    pub fn is_silent(&self) -> bool {
        self.is_silent
    }

    fn hear(&mut self) {
        self.quiet = 0;
        if self.is_silent {
            // it was slow only, or it did stand still, which no patience mends
            let was_slow = self.since <= self.limit();
            self.doublings = (self.doublings + u32::from(was_slow)).min(MOST_DOUBLINGS);
            (self.is_silent, self.since) = (false, 0);
        }
    }

    /// Ticks that a sign may take.
    fn limit(&self) -> u32 {
        let usual = (self.slowest_sign * SLOWER).as_millis().div_ceil(TICK.as_millis()) as u32;
        let usual = if self.slowest_sign.is_zero() { FIRST } else { usual.max(LEAST) };
        (usual << self.doublings).min(MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u32 = 20;

    /// Ticks until there is something to do.
    fn until(pulse: &mut Pulse, heard: bool) -> (u32, Act) {
        for tick in 1..10_000 {
            if let Some(act) = pulse.tick(heard) {
                return (tick, act);
            }
        }
        panic!("nothing is ever done: {pulse:?}");
    }

    fn signing(took: Duration) -> Pulse {
        let mut pulse = Pulse::default();
        for _ in 0..3 {
            assert_eq!(until(&mut pulse, false).1, Act::Ask);
            pulse.signed(took);
        }
        pulse
    }

    #[test]
    fn a_worker_that_stops_is_given_up_within_a_second() {
        for mut pulse in [Pulse::default(), signing(Duration::from_millis(2))] {
            let (quiet, act) = until(&mut pulse, false);
            assert_eq!((quiet, act), (QUIET, Act::Ask));
            let (late, act) = until(&mut pulse, false);
            assert_eq!(act, Act::GiveUp);
            assert!(pulse.is_silent() && quiet + late < SECOND, "{quiet} and {late} ticks");
        }
    }

    #[test]
    fn one_that_sends_is_asked_once_a_second_and_never_given_up() {
        let mut pulse = Pulse::default();
        assert_eq!(until(&mut pulse, true), (SECOND, Act::Ask));
        assert!((0..1000).all(|_| pulse.tick(true).is_none()), "though the sign does not come");
        pulse.signed(Duration::from_millis(2));
        assert_eq!(until(&mut pulse, true).1, Act::Ask);
    }

    #[test]
    fn one_that_is_slow_but_gives_signs_is_never_given_up() {
        let slow = 6 * TICK;
        let mut pulse = signing(slow);
        for _ in 0..100 {
            assert_eq!(until(&mut pulse, false).1, Act::Ask);
            assert!((0..4 * 6).all(|_| pulse.tick(false).is_none()), "even four times as slow as ever before");
            pulse.signed(slow);
        }
        for _ in 0..100 {
            until(&mut pulse, false);
            pulse.signed(Duration::from_millis(1));
        }
        assert_eq!(pulse.limit(), LEAST, "that it was slow is forgotten");
    }

    #[test]
    fn what_comes_while_a_sign_is_due_is_a_sign_too() {
        let mut pulse = signing(Duration::from_millis(2));
        assert_eq!(until(&mut pulse, false).1, Act::Ask);
        for tick in 0..100 {
            assert_eq!(pulse.tick(tick % (LEAST - 1) == 0), None);
        }
        assert_eq!(until(&mut pulse, false).1, Act::GiveUp);
    }

    #[test]
    fn one_that_was_given_up_too_soon_gets_more_time_until_that_is_forgotten() {
        let mut pulse = signing(Duration::from_millis(2));
        for limit in [5, 10, 20, 40, 80, 160, 160] {
            until(&mut pulse, false);
            assert_eq!(until(&mut pulse, false), (limit, Act::GiveUp));
            assert_eq!(pulse.tick(false), None, "it is given up once");
            pulse.signed(TICK * limit);
            assert!(!pulse.is_silent());
        }
        for _ in 0..5 * FORGOTTEN_AFTER {
            pulse.tick(true);
        }
        assert_eq!(pulse.limit(), LEAST);
    }

    #[test]
    fn one_that_did_stand_still_is_given_up_as_soon_the_next_time() {
        let mut pulse = signing(Duration::from_millis(2));
        for _ in 0..10 {
            until(&mut pulse, false);
            assert_eq!(until(&mut pulse, false), (LEAST, Act::GiveUp));
            assert!((0..=LEAST).all(|_| pulse.tick(false).is_none()));
            pulse.signed(TICK * 2 * LEAST);
        }
    }

    #[test]
    fn where_nobody_answers_it_is_asked_again_and_stays_what_it_was() {
        let mut pulse = signing(Duration::from_millis(2));
        for _ in 0..5 {
            assert_eq!(until(&mut pulse, false), (QUIET, Act::Ask));
            pulse.unsigned();
        }
        assert!(!pulse.is_silent());
        until(&mut pulse, false);
        assert_eq!(until(&mut pulse, false).1, Act::GiveUp);
        pulse.unsigned();
        assert!(pulse.is_silent());
        assert_eq!(until(&mut pulse, false).1, Act::Ask);
        assert!(pulse.tick(true).is_none() && !pulse.is_silent(), "it sent something");
    }

    #[test]
    fn what_a_worker_did_not_say_while_it_ran_nothing_is_no_silence() {
        let mut pulse = signing(Duration::from_millis(2));
        assert!((0..100).all(|_| pulse.rests().is_none()));
        assert_eq!(until(&mut pulse, false), (QUIET, Act::Ask));
    }

    #[test]
    fn one_that_never_ran_anything_is_asked_until_it_is_known_how_fast_it_answers() {
        let mut pulse = Pulse::default();
        let mut asked = || (0..SECOND).filter_map(|_| pulse.rests()).count();
        assert_eq!((asked(), asked()), (1, 0));
        pulse.unsigned();
        assert_eq!((0..SECOND).filter_map(|_| pulse.rests()).count(), 1);
        pulse.signed(Duration::from_millis(2));
        assert!((0..100).all(|_| pulse.rests().is_none()) && pulse.limit() == LEAST);
    }

    #[test]
    fn a_sign_that_was_due_when_it_was_given_up_says_nothing_of_how_fast_it_answers() {
        let mut pulse = signing(Duration::from_millis(2));
        until(&mut pulse, false);
        assert_eq!(until(&mut pulse, false).1, Act::GiveUp);
        assert!((0..100).all(|_| pulse.tick(false).is_none()));
        assert!(pulse.tick(true).is_none() && !pulse.is_silent(), "its answer comes first");
        pulse.signed(TICK * 100);
        assert_eq!(pulse.limit(), LEAST);
    }
}
