//! Mixture of experts: gate, then dispatch to whoever holds the experts, then combine.

use bytes::Bytes;

use super::kernels;
use super::matrix::Matrix;
use super::mlp::Mlp;
use crate::error::Error;
use crate::exchange::{Exchange, ExpertBatch, Replies, WireDtype};
use crate::experts::Experts;
use crate::load::Weights;

/// How a model chooses experts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GateShape {
    pub(crate) experts: usize,
    /// Experts that a token is given to.
    pub(crate) top_k: usize,
    /// Experts are in this many groups of equal size.
    pub(crate) groups: usize,
    /// Only the experts of this many groups can be chosen.
    pub(crate) groups_kept: usize,
    /// Whether a token's gates are divided by their sum.
    pub(crate) normalise: bool,
    /// What gates are multiplied by in the end.
    pub(crate) scale: f32,
}

/// Scores experts for each token and chooses some.
///
/// # Source
/// transformers `DeepseekV3TopkRouter`; DeepSeek-V3 technical report, section 2.1.2.
#[derive(Debug)]
pub(crate) struct Gate {
    shape: GateShape,
    weight: Matrix,
    /// Balances the load: added for the choice, not for the gates.
    bias: Vec<f32>,
}

/// For each token its experts, by number, and their gates: `[tokens, top_k]` both.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Routing {
    pub(crate) top_k: usize,
    pub(crate) experts: Vec<u32>,
    pub(crate) gates: Vec<f32>,
}

impl Gate {
    fn load(weights: &Weights<'_, '_>, shape: &GateShape, hidden: usize) -> Result<Self, Error> {
        Ok(Gate {
            weight: weights.matrix("weight", shape.experts, hidden)?,
            bias: weights.vector("e_score_correction_bias", shape.experts)?,
            shape: shape.clone(),
        })
    }

    /// `x`: `[tokens, hidden]`.
    pub(crate) fn route(&self, x: &[f32]) -> Routing {
        let mut scores = self.weight.apply(x);
        scores.iter_mut().for_each(|score| *score = kernels::sigmoid(*score));
        let mut routing = Routing { top_k: self.shape.top_k, experts: Vec::new(), gates: Vec::new() };
        for scores in scores.chunks_exact(self.shape.experts) {
            let chosen = choose(&self.shape, scores, &self.bias);
            routing.gates.extend(gates(&self.shape, scores, &chosen));
            routing.experts.extend(chosen);
        }
        routing
    }
}

/// The experts of one token, in ascending order: the best of the best groups, ties by lowest number.
///
/// A group is as good as its two best experts together.
pub(crate) fn choose(shape: &GateShape, scores: &[f32], bias: &[f32]) -> Vec<u32> {
    let biased: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
    let size = shape.experts / shape.groups;
    let group_scores: Vec<f32> = biased
        .chunks_exact(size)
        .map(|group| best(group, 2).into_iter().map(|expert| group[expert as usize]).sum())
        .collect();
    let kept = best(&group_scores, shape.groups_kept);
    let candidate = |expert: usize| kept.contains(&((expert / size) as u32));
    let choosable: Vec<f32> = biased
        .iter()
        .enumerate()
        .map(|(expert, &score)| if candidate(expert) { score } else { f32::NEG_INFINITY })
        .collect();
    let mut chosen = best(&choosable, shape.top_k);
    chosen.sort_unstable();
    chosen
}

/// The places of the `count` greatest scores, greatest first, ties by lowest place.
fn best(scores: &[f32], count: usize) -> Vec<u32> {
    let mut places: Vec<u32> = (0..scores.len() as u32).collect();
    places.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
    places.truncate(count);
    places
}

fn gates(shape: &GateShape, scores: &[f32], chosen: &[u32]) -> Vec<f32> {
    let own = chosen.iter().map(|&expert| scores[expert as usize]);
    let sum = if shape.normalise { own.clone().sum::<f32>() + 1e-20 } else { 1.0 };
    own.map(|score| score / sum * shape.scale).collect()
}

/// The rows that each expert must see, sorted by expert, then token. All three have
/// `tokens * top_k` entries.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Dispatch {
    pub(crate) experts: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) gates: Vec<f32>,
}

/// Turns each token's choice into pairs of token and expert.
pub(crate) fn dispatch(routing: &Routing) -> Dispatch {
    let mut pairs: Vec<(u32, u32, f32)> = routing
        .experts
        .iter()
        .zip(&routing.gates)
        .enumerate()
        .map(|(at, (&expert, &gate))| (expert, (at / routing.top_k) as u32, gate))
        .collect();
    pairs.sort_by_key(|&(expert, token, _)| (expert, token));
    Dispatch {
        experts: pairs.iter().map(|pair| pair.0).collect(),
        tokens: pairs.iter().map(|pair| pair.1).collect(),
        gates: pairs.iter().map(|pair| pair.2).collect(),
    }
}

/// Some pairs of a dispatch with the rows that they need, ready to be computed or sent.
#[derive(Debug, Default)]
pub(crate) struct Part {
    /// The pairs' places in the dispatch.
    pub(crate) places: Vec<usize>,
    rows: Bytes,
    pair_rows: Vec<u32>,
    pair_experts: Vec<u32>,
}

impl Part {
    fn batch(&self, layer: usize) -> ExpertBatch<'_> {
        ExpertBatch { layer, rows: &self.rows, pair_rows: &self.pair_rows, pair_experts: &self.pair_experts }
    }
}

impl Dispatch {
    /// The pairs whose expert satisfies `wanted`, with each row that they need once, in the order of
    /// tokens.
    ///
    /// `rows`: one row of bytes a token, `row_bytes` each.
    pub(crate) fn part(&self, rows: &[u8], row_bytes: usize, wanted: impl Fn(usize) -> bool) -> Part {
        let places = (0..self.experts.len()).filter(|&at| wanted(self.experts[at] as usize));
        let mut part = Part { places: places.collect(), ..Part::default() };
        let mut needed = vec![false; rows.len() / row_bytes];
        part.places.iter().for_each(|&place| needed[self.tokens[place] as usize] = true);
        let (mut row_of, mut kept_rows) = (vec![0; needed.len()], Vec::new());
        let kept = rows.chunks_exact(row_bytes).enumerate().filter(|(token, _)| needed[*token]);
        for (row, (token, bytes)) in (0u32..).zip(kept) {
            row_of[token] = row;
            kept_rows.extend_from_slice(bytes);
        }
        part.rows = kept_rows.into();
        for &place in &part.places {
            part.pair_rows.push(row_of[self.tokens[place] as usize]);
            part.pair_experts.push(self.experts[place]);
        }
        part
    }
}

/// Adds the experts' outputs, each times its gate, into their tokens.
///
/// `outputs`: `[tokens * top_k, hidden]`, in dispatch order. Returns `[tokens, hidden]`.
/// A token's sum runs in expert order, so its bits do not depend on who answered first.
pub(crate) fn combine(dispatch: &Dispatch, outputs: &[f32], tokens: usize, hidden: usize) -> Vec<f32> {
    let mut sums = vec![0.0; tokens * hidden];
    let pairs = dispatch.tokens.iter().zip(&dispatch.gates).zip(outputs.chunks_exact(hidden));
    for ((&token, &gate), output) in pairs {
        let token = token as usize;
        let sum = &mut sums[token * hidden..(token + 1) * hidden];
        kernels::add_scaled(&[gate], 1, output, hidden, sum, hidden);
    }
    sums
}

/// A layer's experts: the shared ones, which all workers hold, and the way to the routed ones.
#[derive(Debug)]
pub(crate) struct Moe {
    layer: usize,
    hidden: usize,
    gate: Gate,
    shared: Mlp,
}

/// A layer's tokens while rows of theirs are elsewhere.
#[derive(Debug)]
pub(crate) struct Mixing<T> {
    dispatch: Dispatch,
    /// `[tokens, hidden]`
    shared: Vec<f32>,
    outputs: Outputs,
    away: Part,
    /// None if all experts are here.
    ticket: Option<T>,
}

/// What a layer's experts made of its tokens.
#[derive(Debug)]
pub(crate) struct Mixed {
    /// `[tokens, hidden]`. The rows of lost tokens mean nothing.
    pub(crate) rows: Vec<f32>,
    /// Tokens that lack an expert's answer, ascending, each once.
    pub(crate) lost: Vec<usize>,
}

impl Moe {
    /// `inner`: width of the shared experts together. `weights`: at `mlp`.
    pub(crate) fn load(
        weights: &Weights<'_, '_>,
        layer: usize,
        shape: &GateShape,
        hidden: usize,
        inner: usize,
    ) -> Result<Self, Error> {
        Ok(Moe {
            layer,
            hidden,
            gate: Gate::load(&weights.at("gate"), shape, hidden)?,
            shared: Mlp::load(&weights.at("shared_experts"), hidden, inner)?,
        })
    }

    /// Gives each token to its experts. Rows for experts elsewhere leave first; the shared expert
    /// and those here compute while they travel. [`Moe::end`] waits for them.
    ///
    /// # Shapes
    /// `x`: `[tokens, hidden]`.
    /// # Errors
    /// [`Error::Experts`] if one that is held does not take its rows.
    pub(crate) fn begin<E: Exchange>(
        &self,
        x: &[f32],
        experts: &Experts,
        exchange: &mut E,
    ) -> Result<Mixing<E::Ticket>, Error> {
        let dispatch = dispatch(&self.gate.route(x));
        let (rows, row_bytes) = (experts.dtype().encode(x), self.hidden * experts.dtype().size());
        // taken once: an expert that comes or goes meanwhile is asked for neither twice nor never
        let table = experts.table(self.layer);
        let held = |expert: usize| table.get(expert).is_some_and(Option::is_some);
        let away = dispatch.part(&rows, row_bytes, |expert| !held(expert));
        let ticket = (!away.places.is_empty()).then(|| exchange.send(&away.batch(self.layer)));
        let shared = self.shared.forward(x);
        let here = dispatch.part(&rows, row_bytes, held);
        let mut outputs = Outputs::new(dispatch.experts.len(), self.hidden, experts.dtype());
        let own = experts.run_on(&table, &here.batch(self.layer)).map_err(Error::Experts)?;
        outputs.fill(&here, &own);
        Ok(Mixing { dispatch, shared, outputs, away, ticket })
    }

    /// Waits for the rows that are elsewhere, and adds up.
    ///
    /// # Errors
    /// [`Error::Replies`] if the exchange answers with rows of another size.
    pub(crate) async fn end<E: Exchange>(
        &self,
        mixing: Mixing<E::Ticket>,
        experts: &Experts,
        exchange: &mut E,
    ) -> Result<Mixed, Error> {
        let Mixing { dispatch, shared, mut outputs, away, ticket } = mixing;
        let mut lost = Vec::new();
        if let Some(ticket) = ticket {
            let replies = exchange.join(ticket).await;
            self.check(&replies, away.places.len(), self.hidden * experts.dtype().size())?;
            outputs.fill(&away, &replies.rows);
            let place = |&pair: &u32| away.places[pair as usize];
            lost = replies.missing.iter().map(|p| dispatch.tokens[place(p)] as usize).collect();
            lost.sort_unstable();
            lost.dedup();
        }
        experts.count(self.layer, dispatch.experts.iter().copied());
        let mut rows = combine(&dispatch, &outputs.values, shared.len() / self.hidden, self.hidden);
        kernels::add(&mut rows, &shared);
        Ok(Mixed { rows, lost })
    }

    fn check(&self, replies: &Replies, pairs: usize, row_bytes: usize) -> Result<(), Error> {
        let (got, want) = (replies.rows.len(), pairs * row_bytes);
        let none = got == 0 && replies.missing.len() == pairs;
        let known = replies.missing.iter().all(|&pair| (pair as usize) < pairs);
        if (got == want || none) && known {
            return Ok(());
        }
        Err(Error::Replies { layer: self.layer, want, got })
    }
}

/// The experts' answers, in dispatch order, whoever gave them.
#[derive(Debug)]
struct Outputs {
    hidden: usize,
    dtype: WireDtype,
    values: Vec<f32>,
}

impl Outputs {
    fn new(pairs: usize, hidden: usize, dtype: WireDtype) -> Self {
        Outputs { hidden, dtype, values: vec![0.0; pairs * hidden] }
    }

    fn fill(&mut self, part: &Part, rows: &[u8]) {
        let row_bytes = self.hidden * self.dtype.size();
        for (place, row) in part.places.iter().zip(rows.chunks_exact(row_bytes)) {
            let to = &mut self.values[place * self.hidden..(place + 1) * self.hidden];
            self.dtype.decode(row, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shape(experts: usize, groups: usize, groups_kept: usize, top_k: usize) -> GateShape {
        GateShape { experts, top_k, groups, groups_kept, normalise: true, scale: 2.5 }
    }

    #[test]
    fn only_experts_of_the_best_groups_are_chosen() {
        // group 1 has the best single expert, but the others' two best together beat its
        let scores = [0.5, 0.5, 0.9, 0.0, 0.6, 0.4, 0.1, 0.1];
        let chosen = choose(&shape(8, 4, 2, 3), &scores, &[0.0; 8]);
        assert_eq!(chosen, [0, 1, 4]);
    }

    #[test]
    fn bias_changes_the_choice_and_not_the_gates() {
        let (scores, bias) = ([0.2, 0.4, 0.6, 0.8], [1.0, 0.0, 0.0, 0.0]);
        let shape = shape(4, 1, 1, 2);
        let chosen = choose(&shape, &scores, &bias);
        assert_eq!(chosen, [0, 3]);
        assert_eq!(gates(&shape, &scores, &chosen), [0.2 / (0.2 + 0.8) * 2.5, 0.8 / (0.2 + 0.8) * 2.5]);
    }

    #[test]
    fn ties_go_to_the_lowest_number() {
        assert_eq!(choose(&shape(8, 4, 2, 2), &[0.5; 8], &[0.0; 8]), [0, 1]);
    }

    fn routings() -> impl Strategy<Value = (Routing, usize)> {
        (1usize..12, 1usize..9, 1usize..5).prop_flat_map(|(tokens, experts, top_k)| {
            let top_k = top_k.min(experts);
            let all: Vec<u32> = (0..experts as u32).collect();
            let one = prop::sample::subsequence(all, top_k);
            let gates = prop::collection::vec(-2.0f32..2.0, tokens * top_k);
            (prop::collection::vec(one, tokens), gates)
                .prop_map(move |(chosen, gates)| (Routing { top_k, experts: chosen.concat(), gates }, tokens))
        })
    }

    /// A stand-in for expert `expert`: any function of the row will do.
    fn expert(expert: u32, row: &[f32]) -> Vec<f32> {
        row.iter().map(|value| value * (expert as f32 + 0.3) - 0.1).collect()
    }

    proptest! {
        #[test]
        fn dispatch_and_combine_equal_the_dense_sum((routing, tokens) in routings(), here in any::<u8>()) {
            let hidden = 3;
            let x: Vec<f32> = (0..tokens * hidden).map(|at| (at as f32 * 0.7).sin()).collect();
            let bytes = WireDtype::F32.encode(&x);
            let dispatch = dispatch(&routing);
            let held = |expert: usize| here >> expert & 1 == 1;
            let parts =
                [dispatch.part(&bytes, 12, held), dispatch.part(&bytes, 12, |expert| !held(expert))];
            let mut outputs = Outputs::new(dispatch.experts.len(), hidden, WireDtype::F32);
            for part in &parts {
                let batch = part.batch(0);
                let pairs = batch.pair_experts.iter().zip(batch.pair_rows);
                prop_assert!(pairs.collect::<Vec<_>>().is_sorted());
                prop_assert!(batch.rows.len() / 12 <= tokens);
                let mut answers = Vec::new();
                for (&row, &index) in batch.pair_rows.iter().zip(batch.pair_experts) {
                    let mut values = vec![0.0; hidden];
                    let row = row as usize;
                    WireDtype::F32.decode(&batch.rows[row * 12..(row + 1) * 12], &mut values);
                    answers.extend(WireDtype::F32.encode(&expert(index, &values)));
                }
                outputs.fill(part, &answers);
            }
            let sums = combine(&dispatch, &outputs.values, tokens, hidden);
            for token in 0..tokens {
                let mut dense = vec![0.0f32; hidden];
                for at in token * routing.top_k..(token + 1) * routing.top_k {
                    let output = expert(routing.experts[at], &x[token * hidden..(token + 1) * hidden]);
                    for (sum, value) in dense.iter_mut().zip(output) {
                        *sum = routing.gates[at].mul_add(value, *sum);
                    }
                }
                prop_assert_eq!(&sums[token * hidden..(token + 1) * hidden], &dense[..]);
            }
        }
    }
}
