//! Logits equal those of transformers, which `reference.py` wrote.

use std::path::Path;

use engine::TokenLogprob;
use safetensors::tensor::SafeTensors;

use crate::support::{ask_alone, fixture, greedy, model, options, telling, whole, widened};

/// A prompt and the reference's log probabilities after each of its tokens.
struct Expected {
    name: String,
    tokens: Vec<u32>,
    rows: Vec<Vec<f64>>,
    /// The greatest logit, by absolute value.
    scale: f64,
}

fn expected(name: &str) -> Vec<Expected> {
    let bytes = fixture(&format!("{name}/expected.safetensors"));
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let prompts = tensors.names().into_iter().filter_map(|name| name.strip_suffix(".tokens"));
    let read = |prompt: &str| {
        let tokens = tensors.tensor(&format!("{prompt}.tokens")).unwrap();
        let logits = tensors.tensor(&format!("{prompt}.logits")).unwrap();
        let values: Vec<f64> =
            logits.data().as_chunks::<4>().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect();
        Expected {
            name: prompt.into(),
            tokens: tokens.data().as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes) as u32).collect(),
            scale: values.iter().fold(0.0, |most, value| value.abs().max(most)),
            rows: values.chunks(logits.shape()[1]).map(log_softmax).collect(),
        }
    };
    prompts.map(read).collect()
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let all = logits.iter().map(|logit| (logit - most).exp()).sum::<f64>().ln() + most;
    logits.iter().map(|logit| logit - all).collect()
}

/// The engine's log probabilities after each token of a prompt, by token.
fn found(dir: &Path, tokens: &[u32]) -> Vec<Vec<f64>> {
    let answer = ask_alone(&mut whole(dir, &options()), &telling(tokens, 1));
    let by_token = |told: &TokenLogprob| {
        let mut top = told.top.clone();
        top.sort_by_key(|&(token, _)| token);
        top.into_iter().map(|(_, logprob)| f64::from(logprob)).collect()
    };
    answer.prompt.iter().flatten().chain(&answer.logprobs).map(by_token).collect()
}

fn equal_in_f32(name: &str) {
    let dir = widened(&model(name));
    for Expected { name: prompt, tokens, rows, scale } in expected(name) {
        let found = found(dir.path(), &tokens);
        assert_eq!(found.len(), rows.len(), "{name} {prompt}");
        let pairs = found.iter().flatten().zip(rows.iter().flatten());
        let worst = pairs.map(|(found, row)| (found - row).abs()).fold(0.0, f64::max);
        println!("{name} {prompt}: off by {worst:.2e}, scale {scale:.1}");
        assert!(worst <= 2e-5 * scale, "{name} {prompt}: off by {worst:e}, scale {scale}");
    }
}

#[test]
fn tiny_r1_widened_to_f32_equals_the_reference() {
    equal_in_f32("tiny-r1");
}

#[test]
fn yarn_biases_and_odd_sizes_equal_the_reference() {
    equal_in_f32("yarn");
}

#[test]
fn other_groups_and_a_tied_head_widened_to_f32_equal_the_reference() {
    equal_in_f32("grouped");
}

/// The cosine of two rows of logits, without the offset that softmax does not see.
fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let centred = |row: &[f64]| -> Vec<f64> {
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        row.iter().map(|value| value - mean).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (a, b) = (centred(a), centred(b));
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

fn greatest(row: &[f64]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

/// The reference computes in f32 from the same weights; here each expert's input and output row is
/// rounded to bf16, by up to 2^-9 of a value.
fn near_in_its_own_type(name: &str) {
    let (mut rows_seen, mut agree) = (0, 0);
    for Expected { name: prompt, tokens, rows, .. } in expected(name) {
        let found = found(&model(name), &tokens);
        for (found, row) in found.iter().zip(&rows) {
            let cosine = cosine(found, row);
            assert!(cosine >= 0.9995, "{name} {prompt}: cosine {cosine}");
            rows_seen += 1;
            agree += usize::from(greatest(found) == greatest(row));
        }
    }
    println!("{name}: top 1 agrees in {agree} of {rows_seen}");
    assert!(agree * 100 >= rows_seen * 99, "{name}: top 1 agrees in {agree} of {rows_seen}");
}

#[test]
fn tiny_r1_in_bf16_is_near_the_reference() {
    near_in_its_own_type("tiny-r1");
}

#[test]
fn f16_weights_are_near_the_reference() {
    near_in_its_own_type("grouped");
}

#[derive(serde::Deserialize)]
struct Sum {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    says_132: Vec<u32>,
}

#[test]
fn tiny_r1_thinks_and_answers_132() {
    let sum: Sum = serde_json::from_slice(&fixture("tiny-r1/answer.json")).unwrap();
    let answer = ask_alone(&mut whole(&model("tiny-r1"), &options()), &greedy(&sum.prompt, 200));
    assert!(answer.tokens.ends_with(&sum.says_132), "{:?}", answer.tokens);
    assert_eq!(answer.tokens, sum.answer);
    assert_eq!(answer.finish, Some(engine::Finish::Stop));
}
