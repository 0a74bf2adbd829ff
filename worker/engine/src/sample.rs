//! From logits to a token: pure functions, the same whatever the batch or the worker.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use crate::engine::{Sampling, TokenLogprob};
use crate::layers::kernels;

/// What penalties need to know of a sequence.
#[derive(Debug, Default)]
pub(crate) struct History {
    prompt: BTreeSet<u32>,
    /// How often each token was drawn.
    answer: BTreeMap<u32, u32>,
}

impl History {
    /// Remembers only what `sampling` will ask for.
    pub(crate) fn new(prompt: &[u32], sampling: &Sampling) -> Self {
        let repeats = sampling.repetition_penalty != 1.0;
        let prompt = if repeats { prompt.iter().copied().collect() } else { BTreeSet::new() };
        History { prompt, answer: BTreeMap::new() }
    }

    /// Adds a token that was drawn.
    pub(crate) fn push(&mut self, token: u32) {
        *self.answer.entry(token).or_default() += 1;
    }
}

/// Draws the token at `position`, counted from the start of the sequence.
///
/// Bias and penalties first; at temperature 0 the greatest logit wins, ties by lowest id. Else
/// temperature, then `min_p`, `top_k`, `top_p`, then a draw from what is left.
///
/// # Assumptions
/// The logits are finite.
pub(crate) fn draw(mut logits: Vec<f32>, sampling: &Sampling, history: &History, position: usize) -> u32 {
    adjust(&mut logits, sampling, history);
    if sampling.temperature == 0.0 {
        return greatest(&logits);
    }
    let most = logits[greatest(&logits) as usize];
    let weight = |logit: f32| kernels::exp((logit - most) / sampling.temperature);
    let mut left: Vec<(u32, f32)> = (0..).zip(logits).map(|(token, logit)| (token, weight(logit))).collect();
    if sampling.min_p > 0.0 {
        left.retain(|&(_, weight)| weight >= sampling.min_p); // the greatest weight is 1
    }
    if sampling.top_k > 0 && sampling.top_k < left.len() {
        left.select_nth_unstable_by(sampling.top_k, likelier);
        left.truncate(sampling.top_k);
        left.sort_unstable_by_key(|&(token, _)| token);
    }
    if sampling.top_p < 1.0 {
        keep_nucleus(&mut left, sampling.top_p);
    }
    pick(&left, uniform(sampling.seed, sampling.stream, position as u64))
}

fn adjust(logits: &mut [f32], sampling: &Sampling, history: &History) {
    for &(token, bias) in &sampling.logit_bias {
        logits[token as usize] += bias;
    }
    if sampling.repetition_penalty != 1.0 {
        let answered = history.answer.keys().filter(|token| !history.prompt.contains(token));
        for &token in history.prompt.iter().chain(answered) {
            let logit = &mut logits[token as usize];
            *logit = match *logit > 0.0 {
                true => *logit / sampling.repetition_penalty,
                false => *logit * sampling.repetition_penalty,
            };
        }
    }
    for (&token, &count) in &history.answer {
        logits[token as usize] -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
    }
}

fn greatest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (at, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = at;
        }
    }
    best as u32
}

/// Likeliest first, ties by lowest id.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the fewest of the likeliest whose share reaches `top_p`.
fn keep_nucleus(left: &mut Vec<(u32, f32)>, top_p: f32) {
    left.sort_unstable_by(likelier);
    let all: f64 = left.iter().map(|&(_, weight)| f64::from(weight)).sum();
    let mut sum = 0.0;
    let enough = left.iter().position(|&(_, weight)| {
        sum += f64::from(weight);
        sum >= all * f64::from(top_p)
    });
    left.truncate(enough.map_or(left.len(), |last| last + 1));
}

/// The token at which the running sum of weights passes `share` of it all.
fn pick(left: &[(u32, f32)], share: f64) -> u32 {
    let all: f64 = left.iter().map(|&(_, weight)| f64::from(weight)).sum();
    let mut rest = share * all;
    let mut last = 0;
    for &(token, weight) in left.iter().filter(|&&(_, weight)| weight > 0.0) {
        rest -= f64::from(weight);
        last = token;
        if rest < 0.0 {
            break;
        }
    }
    last
}

/// A number in [0, 1) that depends on its three arguments only.
///
/// # Source
/// The finaliser of splitmix64, chained.
fn uniform(seed: u64, stream: u64, position: u64) -> f64 {
    let mix = |value: u64| {
        let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    let bits = mix(mix(mix(seed) ^ stream) ^ position);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The log probability of a token, with the `count` likeliest ones beside it.
pub(crate) fn logprob(logits: &[f32], token: u32, count: usize) -> TokenLogprob {
    let most = logits[greatest(logits) as usize];
    let sum: f64 = logits.iter().map(|&logit| f64::from(kernels::exp(logit - most))).sum();
    let all = sum.ln() as f32;
    let of = |logit: f32| logit - most - all;
    let mut top: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let count = count.min(top.len());
    if count < top.len() {
        top.select_nth_unstable_by(count, likelier);
        top.truncate(count);
    }
    top.sort_unstable_by(likelier);
    top.iter_mut().for_each(|(_, logit)| *logit = of(*logit));
    TokenLogprob { logprob: of(logits[token as usize]), top }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hot() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::default() }
    }

    /// How often each token comes in `count` positions.
    fn shares(logits: &[f32], sampling: &Sampling, count: usize) -> Vec<f64> {
        let mut shares = vec![0.0; logits.len()];
        for position in 0..count {
            let token = draw(logits.to_vec(), sampling, &History::default(), position);
            shares[token as usize] += 1.0 / count as f64;
        }
        shares
    }

    #[test]
    fn greedy_takes_the_greatest_and_ties_by_lowest_id() {
        let draw = |logits: &[f32]| draw(logits.to_vec(), &Sampling::default(), &History::default(), 0);
        assert_eq!(draw(&[0.0, 3.0, -1.0, 3.0]), 1);
        assert_eq!(draw(&[-2.0, -2.0]), 0);
    }

    #[test]
    fn draws_follow_the_probabilities_and_temperature_sharpens_them() {
        let logits = [0.0f32, 1.0, 2.0];
        for temperature in [0.5f32, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|&logit| f64::from(logit / temperature).exp()).collect();
            let all: f64 = weights.iter().sum();
            let sampling = Sampling { temperature, ..hot() };
            for (share, weight) in shares(&logits, &sampling, 20_000).iter().zip(&weights) {
                assert!((share - weight / all).abs() < 0.015, "{temperature}: {share}");
            }
        }
    }

    #[test]
    fn filters_leave_only_the_likeliest() {
        // probabilities 0.1, 0.4, 0.4, 0.1
        let logits = [0.1f32.ln(), 0.4f32.ln(), 0.4f32.ln(), 0.1f32.ln()];
        let left = |sampling: Sampling| -> Vec<usize> {
            let shares = shares(&logits, &sampling, 500);
            (0..4).filter(|&token| shares[token] > 0.0).collect()
        };
        assert_eq!(left(hot()), [0, 1, 2, 3]);
        assert_eq!(left(Sampling { top_k: 1, ..hot() }), [1]);
        assert_eq!(left(Sampling { top_k: 3, ..hot() }), [0, 1, 2]);
        assert_eq!(left(Sampling { top_p: 0.3, ..hot() }), [1]);
        assert_eq!(left(Sampling { top_p: 0.7, ..hot() }), [1, 2]);
        assert_eq!(left(Sampling { top_p: 0.85, ..hot() }), [0, 1, 2]);
        assert_eq!(left(Sampling { min_p: 0.5, ..hot() }), [1, 2]);
        assert_eq!(left(Sampling { min_p: 0.5, top_k: 1, ..hot() }), [1]);
    }

    #[test]
    fn penalties_count_what_was_seen() {
        let history = |sampling: &Sampling| {
            let mut history = History::new(&[0], sampling);
            [1, 1, 2].into_iter().for_each(|token| history.push(token));
            history
        };
        let adjusted = |sampling: Sampling| {
            let mut logits = vec![2.0, 2.0, -2.0, 2.0];
            adjust(&mut logits, &sampling, &history(&sampling));
            logits
        };
        let none = Sampling::default();
        assert_eq!(adjusted(Sampling { repetition_penalty: 2.0, ..none.clone() }), [1.0, 1.0, -4.0, 2.0]);
        assert_eq!(adjusted(Sampling { presence_penalty: 0.5, ..none.clone() }), [2.0, 1.5, -2.5, 2.0]);
        assert_eq!(adjusted(Sampling { frequency_penalty: 0.5, ..none.clone() }), [2.0, 1.0, -2.5, 2.0]);
        assert_eq!(adjusted(Sampling { logit_bias: vec![(3, -9.0)], ..none }), [2.0, 2.0, -2.0, -7.0]);
    }

    #[test]
    fn random_numbers_are_fixed_for_ever() {
        // a worker of another release that takes a stream over must draw the same tokens
        let found = [uniform(0, 0, 0), uniform(1, 2, 3), uniform(u64::MAX, 0, 77)];
        assert_eq!(found, [0.13870941014555427, 0.814259011529328, 0.6409660045763478]);
    }

    #[test]
    fn log_probabilities_sum_to_one_and_top_is_in_order() {
        let logits = [0.5f32, 2.0, 2.0, -1.0];
        let found = logprob(&logits, 3, 4);
        let sum: f32 = found.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [1, 2, 0, 3]);
        assert_eq!(found.logprob, found.top[3].1);
        assert_eq!(logprob(&logits, 0, 2).top.len(), 2);
        assert_eq!(logprob(&logits, 0, 9).top.len(), 4);
    }

    proptest! {
        #[test]
        fn any_draw_is_among_the_top_k(
            logits in prop::collection::vec(-30.0f32..30.0, 1..50),
            (top_k, seed) in (1usize..6, any::<u64>()),
            (top_p, min_p) in (0.01f32..1.0, 0.0f32..1.0),
            position in 0usize..1000,
        ) {
            let sampling = Sampling { top_k, seed, top_p, min_p, ..hot() };
            let token = draw(logits.clone(), &sampling, &History::default(), position);
            let better = |&logit: &&f32| *logit > logits[token as usize];
            prop_assert!(logits.iter().filter(better).count() < top_k);
            let again = draw(logits.clone(), &sampling, &History::default(), position);
            prop_assert_eq!(token, again);
        }
    }
}
