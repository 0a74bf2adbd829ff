//! One request's way over workers: what its client has of the answer, and whether it may go on elsewhere. Pure.
//!
//! A worker that takes an answer over gets the tokens of all pieces that the client has. They lead to the same state
//! that the lost worker had, so the answer goes on behind the last piece, and no token comes twice or never.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use wire::proto::{Chunk, Resume, ResumedChoice, chunk::Kind};

use crate::{patience::Patience, snapshot::Content};

/// How often a request may be lost by workers before its client has anything, unless its model lets answers go on more
/// often: one that kills its worker must not kill all.
const LOSSES: u32 = 3;
/// The most tokens of one answer that are remembered; a longer one stays where it is.
const MOST_TOKENS: usize = 1 << 20;

/// Why an answer leaves its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The stream broke.
    Lost,
    /// The worker gives no sign of life.
    Silent,
    /// The worker is there, but sends nothing.
    Slow,
    /// The worker goes away.
    Draining,
}

impl Reason {
    /// For metrics and traces.
    pub fn label(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Silent => "silent",
            Self::Slow => "slow",
            Self::Draining => "draining",
        }
    }
}

/// What is seen of a running answer.
#[derive(Clone, Copy, Debug)]
pub struct Sight {
    /// Its worker takes no new requests, or is no longer listed.
    pub is_leaving: bool,
    /// Its worker gives no sign of life.
    pub is_silent: bool,
    /// Since the last piece.
    pub silent_for: Duration,
    /// Whether a token has come: the first may take long.
    pub has_tokens: bool,
}

/// Whether an answer that could go on at another worker leaves the one that it has.
pub fn leave(sight: &Sight, patience: &Patience) -> Option<Reason> {
    if sight.is_leaving {
        Some(Reason::Draining)
    } else if sight.is_silent {
        Some(Reason::Silent)
    } else if sight.has_tokens && sight.silent_for >= patience.slow {
        Some(Reason::Slow)
    } else {
        None
    }
}

/// One request, from its arrival to its end.
#[derive(Debug)]
pub struct Journey {
    choices: BTreeMap<u32, Had>,
    tokens: usize,
    content: Option<Arc<Content>>,
    losses: u32,
    moves: u32,
    most_moves: u32,
}

/// What the client has of a choice.
#[derive(Debug, Default)]
struct Had {
    token_ids: Vec<u32>,
    is_whole: bool,
}

impl Journey {
    /// A request whose stream may go on elsewhere so often.
    pub fn of_stream(migration_attempts: u32) -> Self {
        Self { choices: BTreeMap::new(), tokens: 0, content: None, losses: 0, moves: 0, most_moves: migration_attempts }
    }

    /// A request whose client gets nothing before all of it is there: a retry, to the client, so that it goes on as
    /// often as one.
    pub fn of_whole(migration_attempts: u32) -> Self {
        Self::of_stream(migration_attempts.max(LOSSES - 1))
    }

    /// A piece goes to the client, from a worker with this content.
    pub fn took(&mut self, chunk: &Chunk, content: &Arc<Content>) {
        if chunk.kind() == Kind::Usage || chunk.kind() == Kind::Error {
            return;
        }
        if self.content.is_none() {
            self.content = Some(content.clone());
        }
        self.tokens += chunk.token_ids.len();
        if self.tokens > MOST_TOKENS {
            self.choices.clear();
            return;
        }
        let had = self.choices.entry(chunk.choice).or_default();
        had.token_ids.extend_from_slice(&chunk.token_ids);
        had.is_whole |= chunk.ends_choice;
    }

    /// What another worker must run to go on; `None` if any will do, for the client has nothing yet.
    pub fn content(&self) -> Option<&Arc<Content>> {
        self.content.as_ref()
    }

    /// Whether a worker was lost with it before the client had anything.
    pub fn was_lost(&self) -> bool {
        self.losses > 0
    }

    /// For the worker that is to go on.
    pub fn resume(&self) -> Option<Resume> {
        self.content.as_ref()?;
        let choices = self.choices.iter().map(|(&choice, had)| ResumedChoice {
            choice,
            token_ids: had.token_ids.clone(),
            finished: had.is_whole,
        });
        Some(Resume { choices: choices.collect() })
    }

    /// Whether it could go on elsewhere.
    pub fn may_move(&self) -> bool {
        self.content.is_none() || self.moves < self.most_moves && self.tokens <= MOST_TOKENS
    }

    /// It leaves a worker, by need or not. Returns whether it goes on.
    #[must_use]
    pub fn moves_on(&mut self) -> bool {
        let may = self.may_move();
        if self.content.is_none() {
            self.losses += 1;
            return self.losses < LOSSES.max(self.most_moves);
        }
        self.moves += 1;
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Arc<Content> {
        Arc::new(Content { hash: "h".into(), revision: "r".into() })
    }

    fn chunk(choice: u32, token_ids: &[u32], ends_choice: bool) -> Chunk {
        Chunk { kind: Kind::Delta.into(), choice, token_ids: token_ids.to_vec(), ends_choice, ..Chunk::default() }
    }

    fn had(choice: u32, token_ids: &[u32], finished: bool) -> ResumedChoice {
        ResumedChoice { choice, token_ids: token_ids.to_vec(), finished }
    }

    #[test]
    fn the_tokens_of_all_pieces_are_what_the_client_has() {
        let mut journey = Journey::of_stream(3);
        assert_eq!(journey.resume(), None);
        for piece in [chunk(1, &[], false), chunk(0, &[], false), chunk(1, &[5, 6], false), chunk(1, &[7], true)] {
            journey.took(&piece, &content());
        }
        let usage = Chunk { kind: Kind::Usage.into(), ..Chunk::default() };
        journey.took(&usage, &content());
        let choices = vec![had(0, &[], false), had(1, &[5, 6, 7], true)];
        assert_eq!(journey.resume(), Some(Resume { choices }));
    }

    #[test]
    fn attempts_are_counted_over_the_whole_stream() {
        let mut journey = Journey::of_stream(2);
        journey.took(&chunk(0, &[1], false), &content());
        assert!(journey.may_move());
        assert_eq!([journey.moves_on(), journey.moves_on(), journey.moves_on()], [true, true, false]);
        assert!(!journey.may_move());
        let mut never = Journey::of_stream(0);
        never.took(&chunk(0, &[1], false), &content());
        assert!(!never.may_move() && !never.moves_on());
    }

    #[test]
    fn what_nobody_has_seen_goes_on_even_where_streams_do_not() {
        for mut journey in [Journey::of_stream(0), Journey::of_whole(0)] {
            assert_eq!([journey.moves_on(), journey.moves_on(), journey.moves_on()], [true, true, false]);
        }
        let mut often = Journey::of_stream(5);
        assert_eq!([(); 5].map(|()| often.moves_on()), [true, true, true, true, false], "as often as the model says");
        let mut whole = Journey::of_whole(0);
        whole.took(&chunk(0, &[1], false), &content());
        assert_eq!([whole.moves_on(), whole.moves_on(), whole.moves_on()], [true, true, false]);
    }

    #[test]
    fn an_answer_too_long_to_remember_stays() {
        let mut journey = Journey::of_stream(9);
        journey.took(&chunk(0, &vec![7; MOST_TOKENS], false), &content());
        assert!(journey.may_move());
        journey.took(&chunk(0, &[7], false), &content());
        assert!(!journey.may_move());
        assert!(journey.choices.is_empty(), "and nothing of it is kept");
    }

    #[test]
    fn why_an_answer_leaves() {
        let patience = Patience::default();
        let fine = Sight { is_leaving: false, is_silent: false, silent_for: patience.slow / 2, has_tokens: true };
        let table = [
            (fine, None),
            (Sight { is_leaving: true, is_silent: true, ..fine }, Some(Reason::Draining)),
            (Sight { is_silent: true, ..fine }, Some(Reason::Silent)),
            (Sight { silent_for: patience.slow, ..fine }, Some(Reason::Slow)),
            (Sight { silent_for: patience.slow, has_tokens: false, ..fine }, None),
        ];
        for (sight, reason) in table {
            assert_eq!(leave(&sight, &patience), reason, "{sight:?}");
        }
    }
}
