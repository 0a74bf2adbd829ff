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
mod kv;
mod layers;
mod load;
mod models;
mod sample;
mod schedule;
mod step;

use std::path::Path;
use std::sync::Arc;

pub use description::{DescribedFile, Description, MoeLayer};
pub use echo::Echo;
pub use engine::{Engine, Event, Finish, Limits, Load, Request, Sampling, SequenceId, TokenLogprob};
pub use error::{Error, ExpertsError, Refusal};
pub use exchange::{Exchange, ExpertBatch, NoPeers, Replies, WireDtype};
pub use experts::{Experts, Held};
pub use files::{LocalFiles, ModelFiles};
pub use step::{ModelEngine, Options};

use experts::Source;
use load::{Fields, Loader, Mode, Shelf, Tally};
use models::Family;

/// A model's files, found to fit each other.
struct Checked {
    architecture: &'static str,
    family: Family,
    shelf: Shelf,
    /// What all of it weighs.
    tally: Tally,
}

/// Checks configuration and headers against each other; nothing is allocated for the model.
fn check(files: &dyn ModelFiles) -> Result<Checked, Error> {
    let (architecture, family) = Family::read(&Fields::read(files)?)?;
    let shelf = Shelf::open(files)?;
    family.check(&shelf)?;
    let tally = weigh(files, &family, &shelf, &Held::all())?;
    Ok(Checked { architecture, family, shelf, tally })
}

/// What a worker weighs that holds these experts.
fn weigh(files: &dyn ModelFiles, family: &Family, shelf: &Shelf, held: &Held) -> Result<Tally, Error> {
    let mut unheard = |_, _| {};
    let loader = Loader::new(files, shelf, Mode::Check, 0, &mut unheard);
    family.load(&loader.weights(), held)?;
    Ok(loader.tally())
}

/// Reads what a model is and needs, from its configuration and headers alone.
///
/// # Errors
/// [`Error`] if a file is missing, damaged, or of an architecture that is not known.
pub fn describe(files: &dyn ModelFiles) -> Result<Description, Error> {
    let Checked { architecture, family, tally, .. } = check(files)?;
    let shape = family.shape();
    let moe_layers = tally
        .experts
        .iter()
        .map(|(&layer, &(bytes, experts))| MoeLayer { layer: layer as u64, expert_bytes: bytes.div_ceil(experts) });
    Ok(Description {
        architecture: architecture.into(),
        dtype: tally.dtype().into(),
        parameters: tally.parameters,
        dense_bytes: tally.dense_bytes,
        kv_bytes_per_token: (shape.layers * shape.cache_width * size_of::<f32>()) as u64,
        max_context_tokens: shape.max_context as u64,
        vocab_size: shape.vocab_size as u64,
        hidden_size: shape.hidden as u64,
        layers: shape.layers as u64,
        experts: shape.experts as u64,
        experts_per_token: shape.experts_per_token as u64,
        moe_layers: moe_layers.collect(),
        resolved_revision: String::new(),
        content_hash: String::new(),
        files: Vec::new(),
    })
}

/// Loads a model: the dense part whole, of the routed experts only those held. Others can follow, see [`Experts::load`].
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
    let files = LocalFiles(dir.into());
    let Checked { family, shelf, tally, .. } = check(&files)?;
    let (shape, dtype) = (family.shape().clone(), tally.wire());
    held.check(&shape.moe_layers, shape.experts)?;
    options.check(&shape)?;
    let own = weigh(&files, &family, &shelf, held)?;
    let loader = Loader::new(&files, &shelf, Mode::Read, own.dense_bytes + own.expert_bytes(), progress);
    let (model, experts) = family.load(&loader.weights(), held)?;
    let experts = Arc::new(Experts::new(Source { files, family, shelf }, dtype, experts));
    Ok((ModelEngine::new(model, experts.clone(), &shape, options), experts))
}
