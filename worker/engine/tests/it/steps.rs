//! Batching, chunks, cancelling, refusals and lost answers.

use std::collections::BTreeMap;
use std::pin::pin;
use std::task::{Context, Waker};

use engine::{Engine, Exchange, ExpertBatch, Finish, NoPeers, Options, Refusal, Replies, Request, Sampling};

use crate::support::{Answer, ask, ask_alone, company, greedy, model, options, sharded, step, telling, whole};

fn tiny(options: &Options) -> engine::ModelEngine {
    whole(&model("tiny-r1"), options)
}

fn solo() -> Vec<Answer> {
    let mut engine = tiny(&options());
    company(512).iter().map(|request| ask_alone(&mut engine, request)).collect()
}

#[test]
fn a_batch_equals_each_alone() {
    assert!(ask(&mut tiny(&options()), &mut NoPeers, &company(512)) == solo());
}

#[test]
fn chunks_and_scarce_slots_change_no_bit() {
    let expected = solo();
    for (prefill_chunk, max_sequences, kv_cache_tokens) in [(1, 3, 4096), (5, 8, 4096), (16, 8, 96)] {
        let options = Options { prefill_chunk, max_sequences, kv_cache_tokens, ..options() };
        let found = ask(&mut tiny(&options), &mut NoPeers, &company(512));
        assert!(found == expected, "chunks of {prefill_chunk}, {max_sequences} slots");
    }
}

#[test]
fn a_sequence_taken_over_goes_on_as_if_nothing_happened() {
    let sampling = Sampling {
        temperature: 0.8,
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.4,
        seed: 5,
        stream: 2,
        ..Sampling::default()
    };
    let request = Request { sampling, stop_tokens: Vec::new(), ..telling(&[0, 3, 314, 309], 24) };
    let whole = ask_alone(&mut tiny(&options()), &request);
    for prefill_chunk in [1024, 5] {
        let mut engine = tiny(&Options { prefill_chunk, ..options() });
        for cut in 0..24 {
            let rest = Request { generated: whole.tokens[..cut].to_vec(), ..request.clone() };
            let found = ask_alone(&mut engine, &rest);
            assert_eq!(found.tokens, whole.tokens[cut..], "after {cut}");
            assert!(found.logprobs == whole.logprobs[cut..], "after {cut}");
            assert!(found.prompt == whole.prompt && found.finish == whole.finish, "after {cut}");
        }
    }
}

#[test]
fn lost_answers_are_asked_for_again_and_change_no_bit() {
    let expected = solo();
    for lose_every in [199, 499] {
        let options = Options { prefill_chunk: 7, ..options() };
        let mut member = sharded(&model("tiny-r1"), 4, &options).remove(1);
        member.mesh.lose_every = Some(lose_every);
        let found = ask(&mut member.engine, &mut member.mesh, &company(512));
        assert!(member.mesh.lost > 3, "{} lost", member.mesh.lost);
        assert!(found == expected, "one of {lose_every} lost");
    }
}

#[test]
fn halves_change_no_bit_and_one_computes_while_the_other_is_away() {
    let expected = solo();
    for (prefill_chunk, lose_every) in [(1024, None), (7, None), (7, Some(499))] {
        let run = |halves| {
            let mut member = sharded(&model("tiny-r1"), 4, &Options { prefill_chunk, ..options() }).remove(1);
            (member.mesh.halves, member.mesh.lose_every) = (halves, lose_every);
            let found = ask(&mut member.engine, &mut member.mesh, &company(512));
            assert!(found == expected, "chunks of {prefill_chunk}, one of {lose_every:?} lost");
            member.mesh
        };
        let (whole, halves) = (run(false), run(true));
        assert_eq!((whole.most, halves.most), (1, 2));
        match lose_every {
            None => assert_eq!(whole.sent, halves.sent, "nothing is done twice"),
            Some(_) => assert!(halves.lost > 3, "{} lost", halves.lost),
        }
    }
}

/// Loses every answer for the last row of the first layer that asks: the second sequence's only row.
struct LoseSecond<'a>(&'a mut crate::support::Mesh);

impl Exchange for LoseSecond<'_> {
    type Ticket = Replies;

    fn send(&mut self, batch: &ExpertBatch<'_>) -> Replies {
        let mut replies = self.0.send(batch);
        if batch.layer > 1 {
            return replies;
        }
        let second = (batch.rows.len() / 512) as u32 - 1;
        let lost = (0..).zip(batch.pair_rows).filter(|&(_, &row)| row == second);
        replies.missing = lost.map(|(pair, _)| pair).collect();
        replies
    }

    async fn join(&mut self, replies: Replies) -> Replies {
        replies
    }
}

#[test]
fn others_go_on_when_one_sequence_lacks_answers() {
    let mut member = sharded(&model("tiny-r1"), 8, &options()).remove(0);
    let prompt = [0, 3, 314, 309];
    let first = member.engine.submit(greedy(&prompt, 3)).unwrap();
    let second = member.engine.submit(greedy(&[5], 3)).unwrap();
    let mut answers = BTreeMap::new();
    for _ in 0..3 {
        step(&mut member.engine, &mut LoseSecond(&mut member.mesh), &mut answers);
        // once the first has ended, its row is the only one and is not lost any more
        if answers.get(&first).is_some_and(|answer: &Answer| answer.finish.is_some()) {
            break;
        }
    }
    assert_eq!(answers[&first].tokens.len(), 3);
    assert!(!answers.contains_key(&second));
    while !member.engine.is_idle() {
        step(&mut member.engine, &mut member.mesh, &mut answers);
    }
    assert_eq!(answers[&second], ask_alone(&mut tiny(&options()), &greedy(&[5], 3)));
}

/// Never answers.
struct Silent;

impl Exchange for Silent {
    type Ticket = ();

    fn send(&mut self, _: &ExpertBatch<'_>) {}

    async fn join(&mut self, (): ()) -> Replies {
        std::future::pending().await
    }
}

#[test]
fn a_step_that_was_given_up_changes_nothing() {
    let mut member = sharded(&model("tiny-r1"), 4, &options()).remove(0);
    let request = telling(&[0, 3, 314, 309], 5);
    let expected = ask_alone(&mut tiny(&options()), &request);
    let id = member.engine.submit(request).unwrap();
    let mut answers = BTreeMap::new();
    while !member.engine.is_idle() {
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(member.engine.step(&mut Silent)).poll(&mut context).is_pending());
        step(&mut member.engine, &mut member.mesh, &mut answers);
    }
    assert!(answers[&id] == expected);
}

#[test]
fn cancelling_frees_slots_and_pages_at_once() {
    let options = Options { max_sequences: 2, kv_cache_tokens: 64, ..options() };
    let mut engine = tiny(&options);
    let ids: Vec<_> = (0..3).map(|_| engine.submit(greedy(&[3; 10], 20)).unwrap()).collect();
    let mut answers = BTreeMap::new();
    step(&mut engine, &mut NoPeers, &mut answers);
    let load = engine.load();
    assert_eq!((load.running, load.waiting, load.kv_tokens_used, load.kv_tokens_total), (2, 1, 64, 64));
    engine.cancel(ids[0]);
    assert_eq!((engine.load().running, engine.load().kv_tokens_used), (1, 32));
    engine.cancel(ids[2]);
    engine.cancel(ids[1]);
    assert!(engine.is_idle());
    assert_eq!(engine.load().kv_tokens_used, 0);
    answers.clear();
    step(&mut engine, &mut NoPeers, &mut answers);
    assert!(answers.is_empty());
}

#[test]
fn what_never_fits_is_refused_with_the_numbers() {
    let mut engine = tiny(&Options { kv_cache_tokens: 96, ..options() });
    let refused = |engine: &mut engine::ModelEngine, request| engine.submit(request).unwrap_err().to_string();
    let good = greedy(&[3; 10], 5);
    for (request, words) in [
        (greedy(&[], 5), "the prompt has no tokens"),
        (greedy(&[512], 5), "token 512 is not in the vocabulary of 512"),
        (
            greedy(&[3; 10], 1015),
            "the prompt has 10 tokens and up to 1015 are to be generated; the context is 1024 tokens",
        ),
        (
            Request { generated: vec![3; 5], ..good.clone() },
            "5 tokens are generated already and up to 5 may be; there must be one left",
        ),
        (Request { generated: vec![512], ..good.clone() }, "token 512 is not in the vocabulary of 512"),
        (greedy(&[3; 90], 8), "the request needs 112 tokens of cache; this worker has 96"),
        (
            Request { sampling: Sampling { top_p: 0.0, ..Sampling::default() }, ..good.clone() },
            "top_p is 0; it must be above 0 and at most 1",
        ),
        (
            Request { sampling: Sampling { temperature: f32::NAN, ..Sampling::default() }, ..good.clone() },
            "temperature is NaN; it must be 0 or more",
        ),
        (
            Request { sampling: Sampling { logit_bias: vec![(600, 1.0)], ..Sampling::default() }, ..good.clone() },
            "token 600 is not in the vocabulary of 512",
        ),
    ] {
        assert_eq!(refused(&mut engine, request), words);
    }
    let endless = Request { max_tokens: usize::MAX, ..good };
    assert!(matches!(engine.submit(endless), Err(Refusal::Context { .. })));
    assert!(engine.is_idle());
    assert_eq!(ask_alone(&mut engine, &Request { stop_tokens: Vec::new(), ..greedy(&[3; 90], 7) }).tokens.len(), 7);
}

#[test]
fn the_longest_sequence_fits_a_cache_of_as_many_tokens() {
    for tokens in [1, 9, 16, 17, 250] {
        let sizes = Options { kv_cache_tokens: tokens, max_context_tokens: Some(tokens), ..options() };
        let mut engine = tiny(&sizes);
        let request = Request { stop_tokens: Vec::new(), ..greedy(&vec![3; tokens.div_ceil(2)], tokens / 2) };
        assert_eq!(ask_alone(&mut engine, &request).tokens.len(), tokens / 2, "{tokens}");
        assert!(engine.submit(greedy(&vec![3; tokens], 0)).is_ok(), "{tokens}");
    }
}

#[test]
fn a_prompt_can_be_read_without_an_answer() {
    let request = telling(&[0, 3, 314, 309], 0);
    let answer = ask_alone(&mut tiny(&options()), &request);
    assert_eq!((answer.tokens.len(), answer.finish), (0, Some(Finish::Length)));
    assert_eq!(answer.prompt.len(), 4);
    assert!(answer.prompt[0].is_none() && answer.prompt[1..].iter().all(Option::is_some));
}

#[test]
fn choices_of_one_request_differ_and_repeat() {
    let choice = |stream| {
        let sampling = Sampling { temperature: 1.5, seed: 9, stream, ..Sampling::default() };
        Request { sampling, ..greedy(&[0, 3, 314], 20) }
    };
    let mut engine = tiny(&options());
    let once = ask(&mut engine, &mut NoPeers, &[choice(0), choice(1)]);
    assert_ne!(once[0].tokens, once[1].tokens);
    assert_eq!(ask_alone(&mut engine, &choice(1)).tokens, once[1].tokens);
}
