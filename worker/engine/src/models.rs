//! The families of models that we know, by the name in `architectures`.

mod deepseek_v3;

use crate::error::Error;
use crate::exchange::Exchange;
use crate::experts::{Experts, Held};
use crate::kv::{Cache, Slice};
use crate::layers::mlp::Mlp;
use crate::load::{Fields, Shelf, Weights};

/// What the engine must know of any model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) vocab_size: usize,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) max_context: usize,
    /// Values cached for a token and layer.
    pub(crate) cache_width: usize,
    /// Routed experts of a layer; 0 if the model is dense.
    pub(crate) experts: usize,
    pub(crate) experts_per_token: usize,
    /// The layers that have routed experts.
    pub(crate) moe_layers: Vec<usize>,
}

/// A checked configuration of one family.
#[derive(Debug)]
pub(crate) enum Family {
    DeepseekV3(deepseek_v3::Config),
}

/// Reads the configuration of a family.
type Reader = fn(&Fields) -> Result<Family, Error>;

/// The architectures that are known. A new family is one line here and one file below.
const KNOWN: &[(&str, Reader)] =
    &[("DeepseekV3ForCausalLM", |fields| deepseek_v3::Config::read(fields).map(Family::DeepseekV3))];

impl Family {
    /// Finds the family that a configuration names, and reads the rest of it.
    ///
    /// # Errors
    /// [`Error::Config`] if it names none that is known, or a field is out of range.
    pub(crate) fn read(fields: &Fields) -> Result<(&'static str, Self), Error> {
        let named = fields.get("architectures").and_then(|value| value.as_array());
        let first = named.and_then(|names| names.first()).and_then(|name| name.as_str());
        let Some((name, read)) = KNOWN.iter().find(|(name, _)| Some(*name) == first) else {
            let known: Vec<String> = KNOWN.iter().map(|(name, _)| format!("[{name:?}]")).collect();
            return Err(fields.wrong("architectures", &known.join(" or ")));
        };
        Ok((name, read(fields)?))
    }

    pub(crate) fn shape(&self) -> &Shape {
        match self {
            Family::DeepseekV3(config) => &config.shape,
        }
    }

    /// Refuses a file that holds more of the model than the configuration tells of.
    pub(crate) fn check(&self, shelf: &Shelf) -> Result<(), Error> {
        match self {
            Family::DeepseekV3(config) => config.check(shelf),
        }
    }

    /// Walks over the tensors of one routed expert.
    pub(crate) fn expert(&self, weights: &Weights<'_, '_>, layer: usize, expert: usize) -> Result<Mlp, Error> {
        match self {
            Family::DeepseekV3(config) => deepseek_v3::expert(config, weights, layer, expert),
        }
    }

    /// Walks over the model's tensors; of the routed experts over those held.
    ///
    /// Returns the model and its experts.
    pub(crate) fn load(&self, weights: &Weights<'_, '_>, held: &Held) -> Result<(Model, ByLayer), Error> {
        match self {
            Family::DeepseekV3(config) => {
                let (model, experts) = deepseek_v3::DeepseekV3::load(config, weights, held)?;
                Ok((Model::DeepseekV3(model), experts))
            }
        }
    }
}

/// Routed experts by layer, then number; `None` where another worker has it.
pub(crate) type ByLayer = Vec<Vec<Option<Mlp>>>;

/// A model of any family.
#[derive(Debug)]
pub(crate) enum Model {
    DeepseekV3(deepseek_v3::DeepseekV3),
}

impl Model {
    /// Runs tokens through all layers and writes their latents to the cache.
    ///
    /// Slices that lack an expert's answer are taken out of `slices`; the others do not notice.
    ///
    /// # Shapes
    /// Returns `[tokens of the slices left, hidden]`.
    /// # Errors
    /// [`Error`] only if an exchange or expert breaks its contract.
    pub(crate) async fn forward<E: Exchange>(
        &self,
        slices: &mut Vec<Slice<'_>>,
        cache: &mut Cache,
        experts: &Experts,
        exchange: &mut E,
    ) -> Result<Vec<f32>, Error> {
        match self {
            Model::DeepseekV3(model) => model.forward(slices, cache, experts, exchange).await,
        }
    }

    /// `hidden`: `[rows, hidden]`. Returns `[rows, vocabulary]`.
    pub(crate) fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        match self {
            Model::DeepseekV3(model) => model.logits(hidden),
        }
    }
}
