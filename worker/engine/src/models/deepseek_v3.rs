//! DeepSeek-V3 and R1: latent attention, sigmoid gates balanced by a bias, shared experts.
//!
//! Mirrors transformers `modeling_deepseek_v3.py`, names of weights included. Layers for
//! multi-token prediction, which follow the last layer in the file, are not loaded.

mod config;

pub(crate) use config::Config;

use crate::error::Error;
use crate::exchange::Exchange;
use crate::experts::{Experts, Held};
use crate::kv::{Cache, Slice};
use crate::layers::kernels;
use crate::layers::matrix::Matrix;
use crate::layers::mla::{LayerCache, Mla};
use crate::layers::mlp::Mlp;
use crate::layers::moe::{Mixing, Moe};
use crate::layers::norm::RmsNorm;
use crate::layers::rope::{Angles, Rope};
use crate::load::Weights;
use crate::models::ByLayer;

/// The model without its routed experts.
#[derive(Debug)]
pub(crate) struct DeepseekV3 {
    hidden: usize,
    embed: Matrix,
    rope: Rope,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Matrix,
}

#[derive(Debug)]
struct Layer {
    input_norm: RmsNorm,
    attention: Mla,
    post_norm: RmsNorm,
    feed: Feed,
}

#[derive(Debug)]
enum Feed {
    Dense(Mlp),
    Moe(Moe),
}

impl DeepseekV3 {
    /// Walks over the tensors; of the routed experts over those held.
    pub(crate) fn load(config: &Config, weights: &Weights<'_, '_>, held: &Held) -> Result<(Self, ByLayer), Error> {
        let (hidden, vocab) = (config.shape.hidden, config.shape.vocab_size);
        let model = weights.at("model");
        let embed = model.matrix("embed_tokens.weight", vocab, hidden)?;
        let head = match config.tied {
            true => embed.clone(),
            false => weights.matrix("lm_head.weight", vocab, hidden)?,
        };
        let norm = RmsNorm::new(model.vector("norm.weight", hidden)?, config.epsilon);
        let (mut layers, mut experts) = (Vec::new(), Vec::new());
        for index in 0..config.shape.layers {
            let weights = model.at("layers").at(index);
            layers.push(Layer::load(config, &weights, index)?);
            experts.push(routed(config, &weights.at("mlp.experts"), index, held)?);
        }
        let rope = Rope::new(config.attention.rope, config.theta, config.yarn.as_ref(), config.interleave);
        Ok((DeepseekV3 { hidden, embed, rope, layers, norm, head }, experts))
    }

    /// See [`crate::models::Model::forward`].
    pub(crate) async fn forward<E: Exchange>(
        &self,
        slices: &mut Vec<Slice<'_>>,
        cache: &mut Cache,
        experts: &Experts,
        exchange: &mut E,
    ) -> Result<Vec<f32>, Error> {
        let in_two = slices.len() > 1 && exchange.overlaps(tokens(slices));
        let second = if in_two { slices.split_off(middle(slices)) } else { Vec::new() };
        let mut halves = [std::mem::take(slices), second].map(|slices| self.enter(slices));
        for (index, layer) in self.layers.iter().enumerate() {
            for rows in &mut halves {
                rows.arrive(experts, exchange).await?;
                let mut cache = LayerCache { cache, layer: index };
                layer.forward(rows, &self.rope, &mut cache, experts, exchange)?;
            }
        }
        for rows in &mut halves {
            rows.arrive(experts, exchange).await?;
        }
        let [mut first, second] = halves;
        first.hidden.extend(second.hidden);
        *slices = first.slices;
        slices.extend(second.slices);
        Ok(first.hidden)
    }

    /// `hidden`: `[rows, hidden]`. Returns `[rows, vocabulary]`.
    pub(crate) fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        self.head.apply(&self.norm.forward(hidden))
    }

    fn enter<'a, T>(&self, slices: Vec<Slice<'a>>) -> Rows<'a, '_, T> {
        let mut hidden = vec![0.0; tokens(&slices) * self.hidden];
        let tokens = slices.iter().flat_map(|slice| slice.tokens);
        for (row, &token) in hidden.chunks_exact_mut(self.hidden).zip(tokens) {
            self.embed.output(token as usize, row);
        }
        let positions = slices.iter().flat_map(Slice::positions);
        let angles = positions.map(|position| self.rope.angles(position)).collect();
        Rows { slices, hidden, angles, width: self.hidden, mixing: None }
    }
}

fn tokens(slices: &[Slice<'_>]) -> usize {
    slices.iter().map(|slice| slice.tokens.len()).sum()
}

/// Where slices are cut, so that there are about as many tokens before as after; there are at least two.
fn middle(slices: &[Slice<'_>]) -> usize {
    let (all, mut before) = (tokens(slices), 0);
    let apart = slices.iter().map(|slice| {
        before += slice.tokens.len();
        (2 * before).abs_diff(all)
    });
    (1..slices.len()).zip(apart).min_by_key(|&(_, apart)| apart).map_or(1, |(at, _)| at)
}

impl Layer {
    fn load(config: &Config, weights: &Weights<'_, '_>, index: usize) -> Result<Self, Error> {
        let hidden = config.shape.hidden;
        let norm = |name| Ok::<_, Error>(RmsNorm::new(weights.vector(name, hidden)?, config.epsilon));
        let mlp = weights.at("mlp");
        let feed = if config.shape.moe_layers.contains(&index) {
            Feed::Moe(Moe::load(&mlp, index, &config.gate, hidden, config.shared_inner)?)
        } else {
            Feed::Dense(Mlp::load(&mlp, hidden, config.dense_inner)?)
        };
        Ok(Layer {
            input_norm: norm("input_layernorm.weight")?,
            attention: Mla::load(&weights.at("self_attn"), &config.attention, config.softmax_scale())?,
            post_norm: norm("post_attention_layernorm.weight")?,
            feed,
        })
    }

    /// Rows that have arrived from the layer before: through this one, but for what is on its way to experts elsewhere.
    fn forward<'a, E: Exchange>(
        &'a self,
        rows: &mut Rows<'_, 'a, E::Ticket>,
        rope: &Rope,
        cache: &mut LayerCache<'_>,
        experts: &Experts,
        exchange: &mut E,
    ) -> Result<(), Error> {
        if rows.slices.is_empty() {
            return Ok(());
        }
        let normed = self.input_norm.forward(&rows.hidden);
        let attended = self.attention.forward(&normed, rope, &rows.angles, &rows.slices, cache);
        kernels::add(&mut rows.hidden, &attended);
        let normed = self.post_norm.forward(&rows.hidden);
        match &self.feed {
            Feed::Dense(mlp) => kernels::add(&mut rows.hidden, &mlp.forward(&normed)),
            Feed::Moe(moe) => rows.mixing = Some((moe, moe.begin(&normed, experts, exchange)?)),
        }
        Ok(())
    }
}

/// One routed expert. `weights`: at the top.
pub(crate) fn expert(config: &Config, weights: &Weights<'_, '_>, layer: usize, expert: usize) -> Result<Mlp, Error> {
    let weights = weights.at("model").at("layers").at(layer).at("mlp.experts");
    routed_one(config, &weights, layer, expert)
}

fn routed_one(config: &Config, weights: &Weights<'_, '_>, layer: usize, expert: usize) -> Result<Mlp, Error> {
    Mlp::load(&weights.expert(layer, expert), config.shape.hidden, config.expert_inner)
}

/// The routed experts of a layer that are held; none for a dense layer. `weights`: at the experts.
fn routed(config: &Config, weights: &Weights<'_, '_>, layer: usize, held: &Held) -> Result<Vec<Option<Mlp>>, Error> {
    if !config.shape.moe_layers.contains(&layer) {
        return Ok(Vec::new());
    }
    let one = |expert| held.holds(layer, expert).then(|| routed_one(config, weights, layer, expert)).transpose();
    (0..config.gate.experts).map(one).collect()
}

/// What the layers pass on: the rows of some slices, one after the other.
struct Rows<'a, 'm, T> {
    slices: Vec<Slice<'a>>,
    /// `[rows, width]`.
    hidden: Vec<f32>,
    angles: Vec<Angles>,
    width: usize,
    /// What experts are to add to them, and of which layer.
    mixing: Option<(&'m Moe, Mixing<T>)>,
}

impl<T> Rows<'_, '_, T> {
    /// Waits for what is on its way to experts.
    async fn arrive<E: Exchange<Ticket = T>>(&mut self, experts: &Experts, exchange: &mut E) -> Result<(), Error> {
        if let Some((moe, mixing)) = self.mixing.take() {
            let mixed = moe.end(mixing, experts, exchange).await?;
            kernels::add(&mut self.hidden, &mixed.rows);
            self.leave(&mixed.lost);
        }
        Ok(())
    }

    /// Takes out every slice with a lost row, and its other rows with it.
    fn leave(&mut self, lost: &[usize]) {
        if lost.is_empty() {
            return;
        }
        let mut end = 0;
        let (mut hidden, mut angles) = (Vec::new(), Vec::new());
        self.slices.retain(|slice| {
            let rows = end..end + slice.tokens.len();
            end = rows.end;
            let stays = !lost.iter().any(|row| rows.contains(row));
            if stays {
                hidden.extend_from_slice(&self.hidden[rows.start * self.width..rows.end * self.width]);
                angles.extend_from_slice(&self.angles[rows]);
            }
            stays
        });
        self.hidden = hidden;
        self.angles = angles;
    }
}
