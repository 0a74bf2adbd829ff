//! The inference engine of modelfleet: models, layers, batching, sampling.
//!
//! It loads a model's files, continues sequences of tokens and computes rows of the experts it
//! holds. It knows nothing of text, of the network or of time.

mod description;
mod echo;
mod engine;
mod error;
mod exchange;
mod experts;
mod files;

use std::path::Path;
use std::sync::Arc;

pub use description::{DescribedFile, Description, MoeLayer};
pub use echo::Echo;
pub use engine::{
    Engine, Event, Finish, Limits, Load, Request, Sampling, SequenceId, TokenLogprob,
};
pub use error::{Error, ExpertsError, Refusal};
pub use exchange::{Exchange, ExpertBatch, NoPeers, Replies, WireDtype};
pub use experts::{Experts, Held};
pub use files::{LocalFiles, ModelFiles};

/// How much an engine may keep and do at once.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tokens of cache, for all sequences together.
    pub kv_cache_tokens: usize,
    /// Most tokens of a sequence; `None` takes the model's own limit.
    pub max_context_tokens: Option<usize>,
    /// Most sequences that run at once; more wait.
    pub max_sequences: usize,
    /// Most prompt tokens in one step, so that a long prompt does not hold up the others.
    pub prefill_chunk: usize,
}

/// Continues sequences with a model's weights.
#[derive(Debug)]
pub struct ModelEngine {}

/// Reads what a model is and needs, from its configuration and headers alone.
///
/// # Errors
/// [`Error`] if a file is missing, damaged, or of an architecture that is not known.
pub fn describe(files: &dyn ModelFiles) -> Result<Description, Error> {
    let _ = files.list();
    Err(Error::Config {
        reason: "no architecture is known yet".into(),
    })
}

/// Loads a model: the dense part whole, of the routed experts only those held.
///
/// `progress` is told the bytes read and the bytes there are to read, after each tensor.
///
/// # Errors
/// [`Error`] as [`describe`], and if the placement or an option does not fit the model.
pub fn load(
    dir: &Path,
    held: &Held,
    options: &Options,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(ModelEngine, Arc<Experts>), Error> {
    let _ = (dir, held, options, progress);
    Err(Error::Config {
        reason: "no architecture is known yet".into(),
    })
}

impl Engine for ModelEngine {
    fn submit(&mut self, _request: Request) -> Result<SequenceId, Refusal> {
        Err(Refusal::EmptyPrompt)
    }

    fn cancel(&mut self, _sequence: SequenceId) {}

    async fn step<E: Exchange>(&mut self, _exchange: &mut E) -> Result<Vec<Event>, Error> {
        Ok(Vec::new())
    }

    fn is_idle(&self) -> bool {
        true
    }

    fn load(&self) -> Load {
        Load::default()
    }

    fn limits(&self) -> Limits {
        Limits {
            max_context_tokens: 0,
            vocab_size: 0,
        }
    }
}
