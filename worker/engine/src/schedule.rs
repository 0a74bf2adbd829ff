//! Which sequences run, and which of their tokens go into the next step.
//!
//! **Guarantee.** A sequence that runs has pages for all it may ever grow to, taken when it was
//! admitted, so it always finishes: nothing is preempted, evicted or computed twice for lack of
//! room. **Order.** Sequences are admitted as they came; a large one is not overtaken by smaller
//! ones, so none waits for ever.

use std::collections::VecDeque;

use crate::engine::{Event, Finish, Request, SequenceId, TokenLogprob};
use crate::error::Error;
use crate::kv::{Pages, Slice};
use crate::sample::{self, History};

/// One accepted request and how far it is.
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    request: Request,
    /// Prompt and answer.
    tokens: Vec<u32>,
    /// Tokens whose latents are in the cache.
    cached: usize,
    pages: Vec<u32>,
    history: History,
    prompt_logprobs: Vec<Option<TokenLogprob>>,
}

impl std::fmt::Debug for Sequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // without its tokens, which are nobody's business in a log
        f.debug_struct("Sequence").field("id", &self.id).field("cached", &self.cached).finish()
    }
}

/// A row of the step's result that is to become logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The row, counted over all slices.
    pub(crate) row: usize,
    /// The sequence's place among those that run.
    pub(crate) sequence: usize,
    /// The position of the row's token; the logits tell of the next.
    pub(crate) position: usize,
}

impl Sequence {
    fn new(id: SequenceId, request: Request) -> Self {
        let mut history = History::new(&request.prompt, &request.sampling);
        request.generated.iter().for_each(|&token| history.push(token));
        Sequence {
            id,
            tokens: [&request.prompt[..], &request.generated].concat(),
            cached: 0,
            pages: Vec::new(),
            history,
            prompt_logprobs: vec![None],
            request,
        }
    }

    /// Tokens that were there from the beginning.
    fn given(&self) -> usize {
        self.request.prompt.len() + self.request.generated.len()
    }

    /// Takes the logits that follow the token at `position`: for a token of the prompt as its log
    /// probability, for the last of all to draw the next.
    fn take(&mut self, position: usize, logits: Vec<f32>, events: &mut Vec<Event>) {
        let sequence = self.id;
        let count = logits.iter().filter(|logit| !logit.is_finite()).count();
        if count > 0 {
            let error = Error::NotANumber { position: position + 1, count };
            return events.push(Event::Failed { sequence, error });
        }
        if let Some(&next) = self.request.prompt.get(position + 1) {
            let top = self.request.logprobs.unwrap_or(0);
            return self.prompt_logprobs.push(Some(sample::logprob(&logits, next, top)));
        }
        if self.request.prompt_logprobs && position + 1 == self.request.prompt.len() {
            let logprobs = std::mem::take(&mut self.prompt_logprobs);
            events.push(Event::Prompt { sequence, logprobs });
        }
        if position + 1 < self.tokens.len() {
            return; // it was wanted for the prompt only
        }
        if self.request.max_tokens > 0 {
            self.draw(position + 1, logits, events);
        } else {
            events.push(Event::Finished { sequence, reason: Finish::Length });
        }
    }

    fn draw(&mut self, position: usize, logits: Vec<f32>, events: &mut Vec<Event>) {
        let (sequence, request) = (self.id, &self.request);
        let before = request.logprobs.map(|count| (logits.clone(), count));
        let token = sample::draw(logits, &request.sampling, &self.history, position);
        let logprob = before.map(|(logits, count)| sample::logprob(&logits, token, count));
        events.push(Event::Token { sequence, token, logprob });
        self.tokens.push(token);
        self.history.push(token);
        if request.stop_tokens.contains(&token) {
            events.push(Event::Finished { sequence, reason: Finish::Stop });
        } else if self.tokens.len() - request.prompt.len() >= request.max_tokens {
            events.push(Event::Finished { sequence, reason: Finish::Length });
        }
    }
}

/// Most tokens of a request whose latents are ever cached: the last token drawn is not read again.
pub(crate) fn cached_tokens(request: &Request) -> usize {
    request.prompt.len() + request.max_tokens.saturating_sub(1)
}

/// Sequences that wait, sequences that run, and the pages that they share.
#[derive(Debug)]
pub(crate) struct Schedule {
    pub(crate) waiting: VecDeque<Sequence>,
    pub(crate) running: Vec<Sequence>,
    pub(crate) pages: Pages,
    max_sequences: usize,
    prefill_chunk: usize,
    next: u64,
}

impl Schedule {
    pub(crate) fn new(pages: Pages, max_sequences: usize, prefill_chunk: usize) -> Self {
        let (waiting, running) = (VecDeque::new(), Vec::new());
        Schedule { waiting, running, pages, max_sequences, prefill_chunk, next: 0 }
    }

    /// Lets a request wait for its turn.
    pub(crate) fn push(&mut self, request: Request) -> SequenceId {
        let id = SequenceId(self.next);
        self.next += 1;
        self.waiting.push_back(Sequence::new(id, request));
        id
    }

    /// Lets sequences run while there are slots and pages for them.
    pub(crate) fn admit(&mut self) {
        while self.running.len() < self.max_sequences {
            let Some(first) = self.waiting.front() else {
                break;
            };
            let Some(pages) = self.pages.take(cached_tokens(&first.request)) else {
                break;
            };
            let sequence = self.waiting.pop_front().expect("it was at the front");
            self.running.push(Sequence { pages, ..sequence });
        }
    }

    /// The tokens of the next step: one for each sequence that generates, and of those that still
    /// read, in the order they came, `prefill_chunk` together. Those of `last` come after the others,
    /// so that what cannot go on does not keep others from reading.
    pub(crate) fn slices(&self, last: &[SequenceId]) -> Vec<Slice<'_>> {
        let mut budget = self.prefill_chunk;
        let mut slices = Vec::with_capacity(self.running.len());
        let mut order: Vec<(usize, &Sequence)> = self.running.iter().enumerate().collect();
        order.sort_by_key(|(_, sequence)| last.contains(&sequence.id));
        for (index, sequence) in order {
            let unread = &sequence.tokens[sequence.cached..];
            let generates = sequence.cached >= sequence.given();
            let tokens = if generates { unread } else { &unread[..unread.len().min(budget)] };
            if !generates {
                budget -= tokens.len();
            }
            if !tokens.is_empty() {
                let (start, pages) = (sequence.cached, &sequence.pages);
                slices.push(Slice { sequence: index, start, tokens, pages });
            }
        }
        slices
    }

    /// The rows of slices that something is to be drawn or learnt from.
    pub(crate) fn wanted(&self, slices: &[Slice<'_>]) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let rows = slices.iter().flat_map(|slice| slice.positions().map(move |at| (slice, at)));
        for (row, (slice, position)) in rows.enumerate() {
            let sequence = &self.running[slice.sequence];
            let last = position + 1 == sequence.tokens.len();
            let told = sequence.request.prompt_logprobs && position < sequence.request.prompt.len();
            if last || told {
                wanted.push(Wanted { row, sequence: slice.sequence, position });
            }
        }
        wanted
    }

    /// Counts a sequence's tokens up to `length` as cached.
    pub(crate) fn commit(&mut self, sequence: usize, length: usize) {
        self.running[sequence].cached = length;
    }

    /// Hands logits to the sequence that wanted them, unless it has already failed.
    pub(crate) fn take(&mut self, wanted: &Wanted, logits: Vec<f32>, events: &mut Vec<Event>) {
        let sequence = &mut self.running[wanted.sequence];
        if !events.iter().any(|event| event.ends() == Some(sequence.id)) {
            sequence.take(wanted.position, logits, events);
        }
    }

    /// Removes a sequence and frees its slot and pages.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = self.running.remove(at);
            self.pages.release(sequence.pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Sampling;
    use crate::kv::PAGE_TOKENS;

    fn request(prompt: usize, max_tokens: usize) -> Request {
        Request {
            prompt: vec![1; prompt],
            generated: Vec::new(),
            max_tokens,
            stop_tokens: Vec::new(),
            sampling: Sampling::default(),
            logprobs: None,
            prompt_logprobs: false,
        }
    }

    fn schedule(pages: usize) -> Schedule {
        Schedule::new(Pages::new(pages * PAGE_TOKENS), 3, 10)
    }

    fn spans(schedule: &Schedule) -> Vec<(usize, usize, usize)> {
        let span = |slice: &Slice<'_>| (slice.sequence, slice.start, slice.tokens.len());
        schedule.slices(&[]).iter().map(span).collect()
    }

    #[test]
    fn room_for_the_whole_answer_is_taken_at_once() {
        let mut schedule = schedule(4);
        schedule.push(request(16, 17)); // 32 cached tokens: 2 pages
        schedule.push(request(1, 48)); // 3 pages
        schedule.push(request(1, 1));
        schedule.admit();
        assert_eq!((schedule.running.len(), schedule.pages.used()), (1, 2));
        let first = schedule.running[0].id;
        schedule.remove(first);
        schedule.admit();
        assert_eq!((schedule.running.len(), schedule.pages.used()), (2, 4));
    }

    #[test]
    fn prompts_share_the_chunk_and_generation_is_not_held_up() {
        let mut schedule = schedule(99);
        [request(12, 5), request(4, 5), request(30, 5), request(1, 1)].into_iter().for_each(|r| {
            schedule.push(r);
        });
        schedule.admit();
        assert_eq!(spans(&schedule), [(0, 0, 10)]);
        schedule.commit(0, 10);
        assert_eq!(spans(&schedule), [(0, 10, 2), (1, 0, 4), (2, 0, 4)]);
        schedule.commit(0, 12);
        schedule.running[0].tokens.push(7);
        schedule.commit(1, 4);
        schedule.commit(2, 4);
        schedule.running[1].tokens.push(7);
        assert_eq!(spans(&schedule), [(0, 12, 1), (1, 4, 1), (2, 4, 10)]);
    }

    #[test]
    fn who_left_the_last_step_leaves_the_chunk_to_others_first() {
        let mut schedule = schedule(99);
        let first = schedule.push(request(40, 5));
        schedule.push(request(7, 5));
        schedule.admit();
        let span = |slice: &Slice<'_>| (slice.sequence, slice.start, slice.tokens.len());
        assert_eq!(schedule.slices(&[]).iter().map(span).collect::<Vec<_>>(), [(0, 0, 10)]);
        assert_eq!(schedule.slices(&[first]).iter().map(span).collect::<Vec<_>>(), [(1, 0, 7), (0, 0, 3)]);
    }

    #[test]
    fn a_sequence_that_did_not_commit_is_planned_again() {
        let mut schedule = schedule(99);
        schedule.push(request(4, 5));
        schedule.admit();
        assert_eq!(spans(&schedule), spans(&schedule));
        assert_eq!(spans(&schedule), [(0, 0, 4)]);
    }
}
