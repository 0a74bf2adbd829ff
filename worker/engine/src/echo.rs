//! An engine without weights: it repeats the prompt. Tests of router and worker run on it.

use std::collections::VecDeque;

use crate::engine::{Engine, Event, Finish, Limits, Load, Request, SequenceId, TokenLogprob};
use crate::error::{Error, Refusal};
use crate::exchange::Exchange;

/// Repeats each prompt, one token a step, round and round until `max_tokens` or a stop token.
#[derive(Debug)]
pub struct Echo {
    limits: Limits,
    slots: usize,
    next: u64,
    sequences: VecDeque<Repeated>,
}

struct Repeated {
    id: SequenceId,
    request: Request,
    drawn: usize,
}

impl std::fmt::Debug for Repeated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // without the prompt, which is nobody's business in a log
        f.debug_struct("Repeated")
            .field("id", &self.id)
            .field("drawn", &self.drawn)
            .finish()
    }
}

impl Echo {
    /// An engine that runs `slots` sequences at once and lets the others wait.
    pub fn new(limits: Limits, slots: usize) -> Self {
        Echo {
            limits,
            slots: slots.max(1),
            next: 0,
            sequences: VecDeque::new(),
        }
    }

    fn running(&self) -> usize {
        self.sequences.len().min(self.slots)
    }
}

impl Default for Echo {
    fn default() -> Self {
        Echo::new(
            Limits {
                max_context_tokens: 4096,
                vocab_size: 1 << 17,
            },
            64,
        )
    }
}

impl Engine for Echo {
    fn submit(&mut self, request: Request) -> Result<SequenceId, Refusal> {
        request.check(&self.limits)?;
        let id = SequenceId(self.next);
        self.next += 1;
        self.sequences.push_back(Repeated {
            id,
            request,
            drawn: 0,
        });
        Ok(id)
    }

    fn cancel(&mut self, sequence: SequenceId) {
        self.sequences.retain(|repeated| repeated.id != sequence);
    }

    async fn step<E: Exchange>(&mut self, _exchange: &mut E) -> Result<Vec<Event>, Error> {
        let mut events = Vec::new();
        let running = self.running();
        for repeated in self.sequences.iter_mut().take(running) {
            repeated.advance(&mut events);
        }
        let ended = |id| events.iter().any(|event| event.ends() == Some(id));
        self.sequences.retain(|repeated| !ended(repeated.id));
        Ok(events)
    }

    fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    fn load(&self) -> Load {
        let running = self.running();
        let used = self
            .sequences
            .iter()
            .take(running)
            .map(|r| r.request.prompt.len() + r.drawn);
        Load {
            waiting: self.sequences.len() - running,
            running,
            kv_tokens_used: used.sum(),
            kv_tokens_total: self.slots * self.limits.max_context_tokens,
        }
    }

    fn limits(&self) -> Limits {
        self.limits
    }
}

impl Repeated {
    fn advance(&mut self, events: &mut Vec<Event>) {
        let (sequence, request) = (self.id, &self.request);
        let certain = |token| TokenLogprob {
            logprob: 0.0,
            top: vec![(token, 0.0)],
        };
        if self.drawn == 0 && request.prompt_logprobs {
            let seen = request
                .prompt
                .iter()
                .skip(1)
                .map(|&token| Some(certain(token)));
            let logprobs = std::iter::once(None).chain(seen).collect();
            events.push(Event::Prompt { sequence, logprobs });
        }
        let mut last = None;
        if self.drawn < request.max_tokens {
            let token = request.prompt[self.drawn % request.prompt.len()];
            let logprob = request.logprobs.map(|_| certain(token));
            events.push(Event::Token {
                sequence,
                token,
                logprob,
            });
            self.drawn += 1;
            last = Some(token);
        }
        if last.is_some_and(|token| request.stop_tokens.contains(&token)) {
            events.push(Event::Finished {
                sequence,
                reason: Finish::Stop,
            });
        } else if self.drawn >= request.max_tokens {
            events.push(Event::Finished {
                sequence,
                reason: Finish::Length,
            });
        }
    }
}
