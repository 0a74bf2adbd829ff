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
        f.debug_struct("Repeated").field("id", &self.id).field("drawn", &self.drawn).finish()
    }
}

impl Echo {
    /// An engine that runs `slots` sequences at once and lets the others wait.
    pub fn new(limits: Limits, slots: usize) -> Self {
        Echo { limits, slots: slots.max(1), next: 0, sequences: VecDeque::new() }
    }

    fn running(&self) -> usize {
        self.sequences.len().min(self.slots)
    }
}

impl Default for Echo {
    fn default() -> Self {
        Echo::new(Limits { max_context_tokens: 4096, vocab_size: 1 << 17 }, 64)
    }
}

impl Engine for Echo {
    fn submit(&mut self, request: Request) -> Result<SequenceId, Refusal> {
        request.check(&self.limits)?;
        let id = SequenceId(self.next);
        self.next += 1;
        let drawn = request.generated.len();
        self.sequences.push_back(Repeated { id, request, drawn });
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

    fn away(&self) -> &[SequenceId] {
        &[]
    }

    fn load(&self) -> Load {
        let running = self.running();
        let used = self.sequences.iter().take(running).map(|r| r.request.prompt.len() + r.drawn);
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
        let certain = |token| TokenLogprob { logprob: 0.0, top: vec![(token, 0.0)] };
        if self.drawn == request.generated.len() && request.prompt_logprobs {
            let seen = request.prompt.iter().skip(1).map(|&token| Some(certain(token)));
            let logprobs = std::iter::once(None).chain(seen).collect();
            events.push(Event::Prompt { sequence, logprobs });
        }
        let mut last = None;
        if self.drawn < request.max_tokens {
            let token = request.prompt[self.drawn % request.prompt.len()];
            let logprob = request.logprobs.map(|_| certain(token));
            events.push(Event::Token { sequence, token, logprob });
            self.drawn += 1;
            last = Some(token);
        }
        if last.is_some_and(|token| request.stop_tokens.contains(&token)) {
            events.push(Event::Finished { sequence, reason: Finish::Stop });
        } else if self.drawn >= request.max_tokens {
            events.push(Event::Finished { sequence, reason: Finish::Length });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::engine::Sampling;
    use crate::exchange::NoPeers;

    fn step(echo: &mut Echo) -> Vec<Event> {
        let mut peers = NoPeers;
        let step = pin!(echo.step(&mut peers));
        match step.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(events) => events.unwrap(),
            Poll::Pending => panic!("echo waits for nobody"),
        }
    }

    fn request(prompt: &[u32], max_tokens: usize) -> Request {
        Request {
            prompt: prompt.to_vec(),
            generated: Vec::new(),
            max_tokens,
            stop_tokens: vec![9],
            sampling: Sampling::default(),
            logprobs: None,
            prompt_logprobs: false,
        }
    }

    /// All tokens drawn and why the last sequence ended.
    fn drain(echo: &mut Echo) -> (Vec<u32>, Option<Finish>) {
        let (mut tokens, mut finish) = (Vec::new(), None);
        while !echo.is_idle() {
            for event in step(echo) {
                match event {
                    Event::Token { token, .. } => tokens.push(token),
                    Event::Finished { reason, .. } => finish = Some(reason),
                    Event::Prompt { .. } | Event::Failed { .. } => {}
                }
            }
        }
        (tokens, finish)
    }

    #[test]
    fn the_prompt_comes_back_round_and_round() {
        let mut echo = Echo::default();
        echo.submit(request(&[3, 4], 5)).unwrap();
        assert_eq!(drain(&mut echo), (vec![3, 4, 3, 4, 3], Some(Finish::Length)));
        echo.submit(request(&[3, 9], 5)).unwrap();
        assert_eq!(drain(&mut echo), (vec![3, 9], Some(Finish::Stop)));
        echo.submit(Request { generated: vec![3, 4, 3], ..request(&[3, 4], 5) }).unwrap();
        assert_eq!(drain(&mut echo), (vec![4, 3], Some(Finish::Length)));
    }

    #[test]
    fn slots_bound_what_runs_and_cancelling_frees_one() {
        let mut echo = Echo::new(Limits { max_context_tokens: 10, vocab_size: 10 }, 1);
        let first = echo.submit(request(&[1], 5)).unwrap();
        echo.submit(request(&[2], 5)).unwrap();
        assert_eq!((echo.load().running, echo.load().waiting), (1, 1));
        assert_eq!(step(&mut echo).len(), 1);
        echo.cancel(first);
        assert_eq!(drain(&mut echo).0, [2; 5]);
        assert!(echo.submit(request(&[1], 10)).is_err());
    }
}
