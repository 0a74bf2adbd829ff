//! The engine that runs a model: `admit -> schedule -> forward -> sample -> emit`.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::engine::{Engine, Event, Limits, Load, Request, SequenceId};
use crate::error::{Error, Refusal};
use crate::exchange::Exchange;
use crate::experts::Experts;
use crate::kv::{Cache, PAGE_TOKENS, Pages, Slice};
use crate::models::{Model, Shape};
use crate::schedule::{Schedule, cached_tokens};

/// Rows that become logits at once: a vocabulary is wide, and prompts can ask for every row.
const LOGIT_ROWS: usize = 16;

/// How much an engine may keep and do at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Tokens of cache, for all sequences together, rounded up to pages of 16: a sequence takes whole ones, and one
    /// of as many tokens as there are must fit.
    pub kv_cache_tokens: usize,
    /// Most tokens of a sequence; `None` takes the model's own limit.
    pub max_context_tokens: Option<usize>,
    /// Most sequences that run at once; more wait.
    pub max_sequences: usize,
    /// Most prompt tokens in one step, so that a long prompt does not hold up the others.
    pub prefill_chunk: usize,
}

impl Options {
    /// Refuses options that a model cannot keep to.
    ///
    /// # Errors
    /// [`Error::Option`] with the option's value and what is accepted.
    pub(crate) fn check(&self, shape: &Shape) -> Result<(), Error> {
        let refuse =
            |option, value: usize, accepted: String| Err(Error::Option { option, value: value.to_string(), accepted });
        let at_least = |least: usize| format!("use at least {least}");
        if self.kv_cache_tokens == 0 {
            return refuse("kv_cache_tokens", 0, at_least(1));
        }
        if self.max_sequences == 0 {
            return refuse("max_sequences", 0, at_least(1));
        }
        if self.prefill_chunk == 0 {
            return refuse("prefill_chunk", 0, at_least(1));
        }
        match self.max_context_tokens {
            Some(tokens) if tokens == 0 || tokens > shape.max_context => {
                let accepted = format!("the model takes 1 to {}", shape.max_context);
                refuse("max_context_tokens", tokens, accepted)
            }
            _ => Ok(()),
        }
    }
}

/// Continues sequences with a model's weights.
///
/// # Guarantees
/// A sequence's tokens depend on its request and the weights alone: not on the batch, on how its
/// prompt was parted, on who holds which expert, or on answers that were late.
#[derive(Debug)]
pub struct ModelEngine {
    model: Model,
    experts: Arc<Experts>,
    hidden: usize,
    cache: Cache,
    schedule: Schedule,
    limits: Limits,
    /// Those that left the last step, and those whose last step was left by them.
    left: Vec<SequenceId>,
    away: Vec<SequenceId>,
}

impl ModelEngine {
    pub(crate) fn new(model: Model, experts: Arc<Experts>, shape: &Shape, options: &Options) -> Self {
        let pages = Pages::new(options.kv_cache_tokens);
        ModelEngine {
            model,
            experts,
            hidden: shape.hidden,
            cache: Cache::new(shape.layers, shape.cache_width),
            schedule: Schedule::new(pages, options.max_sequences, options.prefill_chunk),
            limits: Limits {
                max_context_tokens: options.max_context_tokens.unwrap_or(shape.max_context),
                vocab_size: shape.vocab_size,
            },
            left: Vec::new(),
            away: Vec::new(),
        }
    }

    /// Bytes of the cache once all of it is in use.
    pub fn cache_bytes(&self) -> u64 {
        self.cache.page_bytes() * self.schedule.pages.total() as u64
    }

    fn forget_ended(&mut self, events: &[Event]) {
        events.iter().filter_map(Event::ends).for_each(|ended| self.schedule.remove(ended));
    }
}

impl Engine for ModelEngine {
    fn submit(&mut self, request: Request) -> Result<SequenceId, Refusal> {
        request.check(&self.limits)?;
        let total = self.schedule.pages.total() * PAGE_TOKENS;
        let need = cached_tokens(&request).next_multiple_of(PAGE_TOKENS);
        if need > total {
            return Err(Refusal::Cache { need, total });
        }
        Ok(self.schedule.push(request))
    }

    fn cancel(&mut self, sequence: SequenceId) {
        self.schedule.remove(sequence);
        self.away.retain(|&id| id != sequence);
    }

    async fn step<E: Exchange>(&mut self, exchange: &mut E) -> Result<Vec<Event>, Error> {
        self.schedule.admit();
        let mut slices = self.schedule.slices(&self.left);
        self.left.clear();
        if slices.is_empty() {
            return Ok(Vec::new());
        }
        let id = |slice: &Slice<'_>| self.schedule.running[slice.sequence].id;
        let begun: Vec<SequenceId> = slices.iter().map(id).collect();
        let hidden = self.model.forward(&mut slices, &mut self.cache, &self.experts, exchange).await?;

        let ended: BTreeSet<SequenceId> = slices.iter().map(id).collect();
        self.away.retain(|id| !begun.contains(id));
        self.left = begun.into_iter().filter(|id| !ended.contains(id)).collect();
        self.away.extend(&self.left);

        // from here on nothing waits, so a step that was given up has changed nothing
        let wanted = self.schedule.wanted(&slices);
        let lengths: Vec<(usize, usize)> = slices.iter().map(|slice| (slice.sequence, slice.positions().end)).collect();
        lengths.into_iter().for_each(|(index, length)| self.schedule.commit(index, length));
        let mut events = Vec::new();
        for wanted in wanted.chunks(LOGIT_ROWS) {
            let row = |row: usize| &hidden[row * self.hidden..(row + 1) * self.hidden];
            let rows: Vec<f32> = wanted.iter().flat_map(|wanted| row(wanted.row)).copied().collect();
            let logits = self.model.logits(&rows);
            for (wanted, logits) in wanted.iter().zip(logits.chunks_exact(self.limits.vocab_size)) {
                self.schedule.take(wanted, logits.to_vec(), &mut events);
            }
        }
        self.forget_ended(&events);
        Ok(events)
    }

    fn is_idle(&self) -> bool {
        self.schedule.waiting.is_empty() && self.schedule.running.is_empty()
    }

    fn away(&self) -> &[SequenceId] {
        &self.away
    }

    fn load(&self) -> Load {
        Load {
            waiting: self.schedule.waiting.len(),
            running: self.schedule.running.len(),
            kv_tokens_used: self.schedule.pages.used() * PAGE_TOKENS,
            kv_tokens_total: self.schedule.pages.total() * PAGE_TOKENS,
        }
    }

    fn limits(&self) -> Limits {
        self.limits
    }
}
