//! What a worker needs in memory, how many workers a replica has, and how many tokens their caches hold.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::ModelDescription;
use crate::placement::{Placement, Problem, Unplaceable, place};
use crate::units::{Bytes, Tokens};

/// The program, its threads and buffers, the tokenizer and the template.
const PROGRAM: Bytes = Bytes(48 << 20);
/// Rows that one step of the engine runs at most.
const STEP_ROWS: u64 = 512;
/// Vectors of the residual stream's width that the widest layer keeps for each row, f32.
const VECTORS_A_ROW: u64 = 16;
/// Contexts that the cache has room for where nobody says more, without and with a limit.
const CONTEXTS: u64 = 8;
const CONTEXTS_AT_MOST: u64 = 64;
/// The largest cache where nobody gives a size or a limit; one whole context fits in any case.
const CACHE_UNASKED: Bytes = Bytes(4 << 30);

/// What the user leaves open or fixes, all of one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Workers of a replica; `None`: the fewest that fit.
    pub shards: Option<u32>,
    /// Copies of each expert beyond the first, each on a worker of its own.
    pub redundancy: u32,
    /// The memory limit of a worker; `None`: as much as it takes.
    pub worker_memory: Option<Bytes>,
    /// Tokens in a worker's cache; `None`: what fits.
    pub kv_cache_tokens: Option<Tokens>,
    /// The longest prompt plus answer; `None`: the model's.
    pub max_context_tokens: Option<Tokens>,
    /// Where the experts are now; they move as little as the balance allows.
    pub previous: Option<Placement>,
}

/// What came of planning. That something does not fit is an answer, not an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It fits.
    Planned(Plan),
    /// It does not, and why.
    NoRoom(NoRoom),
}

/// What a replica is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// Workers of a replica.
    pub shards: u32,
    /// The longest prompt plus answer.
    pub max_context_tokens: Tokens,
    /// Tokens in a worker's cache.
    pub kv_cache_tokens: Tokens,
    /// Where the experts are.
    pub placement: Placement,
    /// What each worker needs, by ordinal.
    pub workers: Vec<Need>,
}

impl Plan {
    /// What a worker may hold of experts, all layers together, where all else in it takes what was planned.
    ///
    /// A worker that gets other experts holds old and new ones for a while, so an eighth stays free for that, unless the
    /// copies that must be need it.
    pub fn expert_room(&self, worker_memory: Bytes) -> ExpertRoom {
        const FREE: u64 = 8;
        let fullest = self.fullest();
        let most = worker_memory.minus(fullest.total().minus(fullest.experts));
        let steady = Bytes(most.0 - most.0.div_ceil(FREE)).max(fullest.experts.min(most));
        ExpertRoom { steady, moving: most }
    }

    /// Why the workers cannot be spread as the copies ask: `roomy` of the failure domains, each an `across` such as
    /// `zone`, have room for a worker. `None` if they can.
    pub fn spread_over(&self, redundancy: u32, across: &str, roomy: u32) -> Option<NoRoom> {
        let copies = redundancy.saturating_add(1);
        (roomy < copies).then(|| NoRoom::TooFewDomains {
            copies,
            experts: self.placement.layers.iter().map(|layer| layer.experts.len() as u32).max().unwrap_or_default(),
            workers: self.shards,
            memory: self.fullest().total(),
            across: across.to_owned(),
            roomy,
        })
    }

    /// The need of the fullest worker.
    pub fn fullest(&self) -> Need {
        self.workers.iter().copied().max_by_key(Need::total).unwrap_or_default()
    }
}

/// What a worker may hold of experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertRoom {
    /// In a placement: the room of [`Problem::room`].
    pub steady: Bytes,
    /// While a placement changes: the room of [`crate::rebalance::decide`].
    pub moving: Bytes,
}

/// What a worker needs in memory, in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Need {
    /// Weights that every worker holds.
    pub dense: Bytes,
    /// Weights of the experts that this one holds.
    pub experts: Bytes,
    /// The key-value cache.
    pub kv_cache: Bytes,
    /// What a step keeps between its layers.
    pub activations: Bytes,
    /// The program itself.
    pub program: Bytes,
}

impl Need {
    /// All of it.
    pub fn total(&self) -> Bytes {
        [self.dense, self.experts, self.kv_cache, self.activations, self.program].into_iter().sum()
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Need { dense, experts, kv_cache, activations, program } = self;
        write!(f, "{} (dense {dense}, experts {experts}, cache {kv_cache}, ", self.total())?;
        write!(f, "activations {activations}, program {program})")
    }
}

/// Why a model cannot be planned as asked. The text names the field, its value and what would do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// There are not enough experts to part.
    #[error("{}", shards_text(*.asked, *.experts))]
    TooManyShards {
        /// Workers that were asked for.
        asked: u32,
        /// Routed experts of a layer.
        experts: u32,
    },
    /// The model was not made for so long a context.
    #[error("spec.model.maxContextTokens is {asked}; the model takes {model}, so use at most {model}")]
    ContextTooLong {
        /// Tokens that were asked for.
        asked: Tokens,
        /// Tokens that the model takes.
        model: Tokens,
    },
    /// Not one request of the longest kind would fit the cache.
    #[error(
        "spec.memory.kvCacheTokens is {asked}; one request may be {context} tokens long, so use at least {context} \
         or lower spec.model.maxContextTokens"
    )]
    CacheTooSmall {
        /// Tokens that were asked for.
        asked: Tokens,
        /// The longest prompt plus answer.
        context: Tokens,
    },
    /// A worker would not fit its memory limit.
    #[error("{}", memory_text(*.limit, *.shards, need, *.enough))]
    MemoryTooSmall {
        /// The limit of a worker.
        limit: Bytes,
        /// The number of workers that was tried: the asked one, or the most that the experts can be parted among.
        shards: u32,
        /// What the fullest of them needs at least.
        need: Need,
        /// The fewest workers that do fit the limit, where more would.
        enough: Option<u32>,
    },
    /// There are fewer workers than copies of an expert.
    #[error("{}", redundancy_text(*.redundancy, *.shards, *.experts))]
    TooFewWorkers {
        /// Copies beyond the first.
        redundancy: u32,
        /// Workers that there are, or can be.
        shards: u32,
        /// Routed experts of a layer.
        experts: u32,
    },
    /// There are fewer failure domains with room than copies of an expert.
    #[error(
        "{copies} copies of {experts} experts need {workers} {} of {memory} on {copies} {across}s, {roomy} {} room",
        if *.workers == 1 { "worker" } else { "workers" },
        if *.roomy == 1 { format!("{across} has") } else { format!("{across}s have") }
    )]
    TooFewDomains {
        /// Copies of each expert.
        copies: u32,
        /// Experts of a layer.
        experts: u32,
        /// Workers of a replica.
        workers: u32,
        /// What the fullest of them needs.
        memory: Bytes,
        /// What a domain is called, such as `zone`.
        across: String,
        /// Domains with room for a worker.
        roomy: u32,
    },
    /// The copies of the experts cannot be placed.
    #[error(transparent)]
    Copies(#[from] Unplaceable),
}

fn shards_text(asked: u32, experts: u32) -> String {
    let field = format!("spec.parallelism.expert.shards is {asked}");
    match experts {
        0 => format!("{field}; the model has no routed experts, so use 1"),
        _ => format!("{field}; the model has {experts} experts a layer, so use at most {experts}"),
    }
}

fn memory_text(limit: Bytes, shards: u32, need: &Need, enough: Option<u32>) -> String {
    let total = need.total();
    let wider = enough.map(|enough| format!(", or at least {enough} in spec.parallelism.expert.shards"));
    let shards = if shards == 1 { "1 shard".to_owned() } else { format!("{shards} shards") };
    format!(
        "spec.resources.limits.memory is {limit}; with {shards} a worker needs {need}, so use at least {total}{}",
        wider.unwrap_or_default()
    )
}

fn redundancy_text(redundancy: u32, shards: u32, experts: u32) -> String {
    let field = format!("spec.parallelism.expert.redundancy is {redundancy}");
    let copies = redundancy.saturating_add(1);
    let most = shards.saturating_sub(1);
    match experts {
        0 => format!("{field}; the model has no routed experts, so use 0"),
        _ if copies > experts => format!(
            "{field}; the model has {experts} experts a layer, so at most {experts} shards, so use at most {}",
            experts - 1
        ),
        _ => format!(
            "{field}; spec.parallelism.expert.shards is {shards}, so use at most {most}, or at least {copies} shards"
        ),
    }
}

/// Decides what a replica is made of.
///
/// 1. The context is the asked one, at most the model's.
/// 2. The number of workers is the asked one, or the fewest with which the fullest worker, with a cache of one
///    context, fits the limit; as many as there are copies of an expert without a limit.
/// 3. The cache is the asked one, or what the limit leaves to the fullest worker, up to 64 contexts; without a limit
///    8 contexts, up to 4 GiB. One context fits always.
pub fn plan(model: &ModelDescription, request: &Request) -> Outcome {
    match try_plan(model, request) {
        Ok(plan) => Outcome::Planned(plan),
        Err(why) => Outcome::NoRoom(why),
    }
}

fn try_plan(model: &ModelDescription, request: &Request) -> Result<Plan, NoRoom> {
    let context = context(model, request)?;
    let least_cache = least_cache(context, request)?;
    let shards = match request.shards {
        Some(asked) => checked_shards(model, asked)?,
        None => fewest_shards(model, request, least_cache),
    };
    let redundancy = checked_redundancy(model, request.redundancy, shards)?;
    let problem = Problem { layers: layers(model), experts: model.experts, shards, redundancy, ..Problem::default() };
    let placement = place(&problem, request.previous.as_ref())?;
    let needs = |cache| {
        let experts = placement.expert_bytes(problem.layers).into_iter();
        experts.map(|experts| need(model, experts, cache)).collect::<Vec<Need>>()
    };
    let fullest = fullest(&needs(least_cache));
    if let Some(limit) = request.worker_memory.filter(|limit| fullest.total() > *limit) {
        let enough = fitting_shards(model, request, least_cache, limit, shards.saturating_add(1));
        return Err(NoRoom::MemoryTooSmall { limit, shards, need: fullest, enough });
    }
    let kv_cache_tokens =
        request.kv_cache_tokens.unwrap_or_else(|| cache_that_fits(model, context, request.worker_memory, fullest));
    let workers = needs(kv_cache_tokens);
    Ok(Plan { shards, max_context_tokens: context, kv_cache_tokens, placement, workers })
}

fn context(model: &ModelDescription, request: &Request) -> Result<Tokens, NoRoom> {
    match request.max_context_tokens {
        Some(asked) if asked > model.max_context_tokens => {
            Err(NoRoom::ContextTooLong { asked, model: model.max_context_tokens })
        }
        Some(asked) => Ok(asked),
        None => Ok(model.max_context_tokens),
    }
}

/// The smallest cache that will do: the asked one, or one context.
fn least_cache(context: Tokens, request: &Request) -> Result<Tokens, NoRoom> {
    match request.kv_cache_tokens {
        Some(asked) if asked < context => Err(NoRoom::CacheTooSmall { asked, context }),
        Some(asked) => Ok(asked),
        None => Ok(context),
    }
}

fn checked_shards(model: &ModelDescription, asked: u32) -> Result<u32, NoRoom> {
    let experts = if model.is_dense() { 0 } else { model.experts };
    match asked {
        0 | 1 => Ok(1),
        _ if asked > experts => Err(NoRoom::TooManyShards { asked, experts }),
        _ => Ok(asked),
    }
}

fn checked_redundancy(model: &ModelDescription, redundancy: u32, shards: u32) -> Result<u32, NoRoom> {
    let experts = if model.is_dense() { 0 } else { model.experts };
    if redundancy >= shards {
        return if redundancy == 0 { Ok(0) } else { Err(NoRoom::TooFewWorkers { redundancy, shards, experts }) };
    }
    Ok(redundancy)
}

/// The most workers among whom the experts can be parted.
fn most_shards(model: &ModelDescription) -> u32 {
    if model.is_dense() { 1 } else { model.experts }
}

/// The fewest workers that fit, or the most there can be.
fn fewest_shards(model: &ModelDescription, request: &Request, cache: Tokens) -> u32 {
    let most = most_shards(model);
    match request.worker_memory {
        Some(limit) => fitting_shards(model, request, cache, limit, 1).unwrap_or(most),
        None => request.redundancy.saturating_add(1).min(most),
    }
}

/// The fewest workers, `from` or more, that fit the limit. Fewer than the mean or the copies allow need not be tried.
fn fitting_shards(model: &ModelDescription, request: &Request, cache: Tokens, limit: Bytes, from: u32) -> Option<u32> {
    let (most, copies) = (most_shards(model), request.redundancy.saturating_add(1));
    let room = limit.minus(need(model, Bytes(0), cache).total());
    let all = layers(model).iter().map(|l| l.expert_bytes.times(u64::from(model.experts)).times(u64::from(copies)));
    let mean = all.sum::<Bytes>().0.div_ceil(room.0.max(1));
    let least = u32::try_from(mean).unwrap_or(u32::MAX).max(copies).max(from);
    let fits = |shards: &u32| {
        let (layers, experts, redundancy) = (layers(model), model.experts, request.redundancy);
        let problem = Problem { layers, experts, shards: *shards, redundancy, ..Problem::default() };
        place(&problem, None).is_ok_and(|p| p.expert_bytes(layers).into_iter().all(|bytes| bytes <= room))
    };
    (least..=most).find(fits)
}

/// A dense model has nothing to place.
fn layers(model: &ModelDescription) -> &[crate::model::MoeLayer] {
    if model.is_dense() { &[] } else { &model.moe_layers }
}

fn need(model: &ModelDescription, experts: Bytes, cache: Tokens) -> Need {
    let row = model.hidden_size.saturating_mul(VECTORS_A_ROW).saturating_add(model.vocab_size);
    Need {
        dense: model.dense_bytes,
        experts,
        kv_cache: model.kv_bytes_per_token.times(cache.0),
        activations: Bytes(size_of::<f32>() as u64).times(row).times(STEP_ROWS),
        program: PROGRAM,
    }
}

fn fullest(needs: &[Need]) -> Need {
    needs.iter().copied().max_by_key(Need::total).unwrap_or_default()
}

/// What the limit leaves for the cache, or the default size; a whole number of tokens, at least one context.
fn cache_that_fits(model: &ModelDescription, context: Tokens, limit: Option<Bytes>, fullest: Need) -> Tokens {
    let a_token = model.kv_bytes_per_token.0.max(1);
    let (room, contexts) = match limit {
        Some(limit) => (limit.minus(fullest.total()).plus(fullest.kv_cache), CONTEXTS_AT_MOST),
        None => (CACHE_UNASKED, CONTEXTS),
    };
    Tokens(room.0 / a_token).min(context.times(contexts)).max(context)
}
