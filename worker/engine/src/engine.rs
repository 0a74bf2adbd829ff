//! What an engine is asked and what it answers: requests, events, and the trait that the worker drives.

use std::future::Future;

use crate::error::{Error, Refusal};
use crate::exchange::Exchange;

/// Names a sequence from its acceptance to its last event. Never used twice by one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// One sequence to be continued. `n` choices are `n` requests with different [`Sampling::stream`].
#[derive(Clone, PartialEq)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Tokens that another engine has generated already, in order. They count as generated in all respects, and are no
    /// events.
    pub generated: Vec<u32>,
    /// Most tokens to generate, [`Request::generated`] included. With 0 the prompt is only read (for [`Request::prompt_logprobs`]).
    pub max_tokens: usize,
    /// Tokens that end the sequence, the model's end of text included. The token itself is still
    /// an event.
    pub stop_tokens: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// How many alternatives to give with each token's log probability; `None` gives none of both.
    pub logprobs: Option<usize>,
    /// Whether the prompt's tokens get log probabilities, with as many alternatives.
    pub prompt_logprobs: bool,
}

/// How a token is drawn from logits. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0 means all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities sum up to `top_p`, in (0, 1].
    pub top_p: f32,
    /// Only tokens at least `min_p` times as likely as the likeliest, in [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens seen in the answer.
    pub presence_penalty: f32,
    /// Subtracted from logits of tokens for each time they were seen in the answer.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Random numbers depend on seed, stream and position only.
    pub seed: u64,
    /// Which choice of a request this is.
    pub stream: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            stream: 0,
        }
    }
}

/// What happened to a sequence in a step.
#[derive(Debug)]
pub enum Event {
    /// One more token.
    Token {
        /// The sequence.
        sequence: SequenceId,
        /// The token.
        token: u32,
        /// Its log probability, if asked for.
        logprob: Option<TokenLogprob>,
    },
    /// The prompt is read; comes before the first token, if asked for.
    Prompt {
        /// The sequence.
        sequence: SequenceId,
        /// One entry a token; the first has none, since nothing precedes it.
        logprobs: Vec<Option<TokenLogprob>>,
    },
    /// The last event of a sequence that ended as asked.
    Finished {
        /// The sequence.
        sequence: SequenceId,
        /// Why.
        reason: Finish,
    },
    /// The last event of a sequence that could not go on.
    Failed {
        /// The sequence.
        sequence: SequenceId,
        /// Why.
        error: Error,
    },
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token was drawn.
    Stop,
    /// `max_tokens` were drawn.
    Length,
}

/// The log probability of a token under the model, before temperature and filters.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Natural logarithm.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first, ties by lowest id.
    pub top: Vec<(u32, f32)>,
}

/// What an engine has to do and to store right now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences accepted that hold no pages yet.
    pub waiting: usize,
    /// Sequences that hold pages.
    pub running: usize,
    /// Tokens of cache reserved, in whole pages.
    pub kv_tokens_used: usize,
    /// Tokens of cache there are.
    pub kv_tokens_total: usize,
}

/// What requests must keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of a sequence, prompt and answer together.
    pub max_context_tokens: usize,
    /// How many tokens there are.
    pub vocab_size: usize,
}

/// Continues sequences, one iteration at a time.
pub trait Engine {
    /// Accepts a request; from then on it ends with exactly one last event, or by [`Engine::cancel`].
    ///
    /// # Errors
    /// A [`Refusal`] if it could never be served here; nothing is kept of it.
    fn submit(&mut self, request: Request) -> Result<SequenceId, Refusal>;

    /// Forgets a sequence and frees its slot and pages at once; no further event names it.
    fn cancel(&mut self, sequence: SequenceId);

    /// Runs one iteration: admit, schedule, forward, sample, emit. Its only await is
    /// [`Exchange::join`], so it may be dropped there; the sequences then go on unharmed next time.
    ///
    /// # Errors
    /// [`Error`] only if no sequence can go on; what ends one sequence is an [`Event::Failed`].
    fn step<E: Exchange>(&mut self, exchange: &mut E) -> impl Future<Output = Result<Vec<Event>, Error>>;

    /// Whether a step would have nothing to do.
    fn is_idle(&self) -> bool;

    /// The sequences that left the last step they were in because the answer of an expert was missing: they wait, and
    /// nothing of that step counts for them.
    fn away(&self) -> &[SequenceId];

    /// What there is to do.
    fn load(&self) -> Load;

    /// What requests must keep to.
    fn limits(&self) -> Limits;
}

impl Request {
    /// Refuses what no engine with these limits could serve.
    ///
    /// # Errors
    /// The first rule broken, in the order: prompt, context, what is left to generate, sampling.
    pub fn check(&self, limits: &Limits) -> Result<(), Refusal> {
        if self.prompt.is_empty() {
            return Err(Refusal::EmptyPrompt);
        }
        let known = |token: u32| (token as usize) < limits.vocab_size;
        let bias = self.sampling.logit_bias.iter().map(|&(token, _)| token);
        let read = self.prompt.iter().chain(&self.generated).copied();
        if let Some(token) = read.chain(bias).find(|&token| !known(token)) {
            return Err(Refusal::UnknownToken { token, vocab_size: limits.vocab_size });
        }
        if self.tokens().is_none_or(|tokens| tokens > limits.max_context_tokens) {
            return Err(Refusal::Context {
                prompt: self.prompt.len(),
                max_tokens: self.max_tokens,
                max_context: limits.max_context_tokens,
            });
        }
        let (generated, max_tokens) = (self.generated.len(), self.max_tokens);
        if generated > 0 && generated >= max_tokens {
            return Err(Refusal::NothingLeft { generated, max_tokens });
        }
        self.sampling.check()
    }

    /// Most tokens of the sequence, prompt and answer together; `None` if no number holds them.
    pub fn tokens(&self) -> Option<usize> {
        self.prompt.len().checked_add(self.max_tokens)
    }
}

impl Sampling {
    /// Refuses parameters out of range.
    fn check(&self) -> Result<(), Refusal> {
        let finite = |value: f32| value.is_finite();
        let rules: [(&'static str, f32, bool, &'static str); 6] = [
            ("temperature", self.temperature, self.temperature >= 0.0, "0 or more"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "above 0"),
            ("presence_penalty", self.presence_penalty, true, "a finite number"),
            ("frequency_penalty", self.frequency_penalty, true, "a finite number"),
        ];
        let bias = self.logit_bias.iter().map(|&(_, bias)| ("logit_bias", bias, true, "a finite number"));
        for (name, value, holds, accepted) in rules.into_iter().chain(bias) {
            if !(holds && finite(value)) {
                return Err(Refusal::Sampling { name, value, accepted });
            }
        }
        Ok(())
    }
}

impl Event {
    /// The sequence that this event ends, if it is a last one.
    pub fn ends(&self) -> Option<SequenceId> {
        match self {
            Event::Finished { sequence, .. } | Event::Failed { sequence, .. } => Some(*sequence),
            Event::Token { .. } | Event::Prompt { .. } => None,
        }
    }
}
