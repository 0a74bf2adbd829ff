//! One choice of an answer: tokens in, pieces of text out.

use engine::{Finish, TokenLogprob};

use crate::{
    openai::chunk::{Delta, Scored},
    text::{
        Text,
        detokenise::Detokeniser,
        stop::StopStrings,
        think::{CLOSE, OPEN, Parted, Thought},
    },
};

/// The state of one choice. Text that is held back takes its tokens with it, until it comes out.
pub struct Choice {
    index: u32,
    detokeniser: Detokeniser,
    stop: StopStrings,
    thought: Thought,
    stop_tokens: Vec<u32>,
    tokens: Vec<u32>,
    scored: Vec<Scored>,
    score: bool,
    offset: usize,
}

/// What a choice begins with.
pub struct Beginning<'a> {
    /// Index of the choice.
    pub index: u32,
    /// Tokens before the first new one.
    pub prompt: &'a [u32],
    /// The rendered conversation; `None` if it is none, then nothing is parted.
    pub conversation: Option<&'a str>,
    /// Text ends before any of these.
    pub stop: Vec<String>,
    /// These tokens end the choice and make no text.
    pub stop_tokens: Vec<u32>,
    /// Whether log probabilities are wanted.
    pub score: bool,
    /// Characters of an echoed prompt.
    pub offset: usize,
}

impl Choice {
    /// Begins a choice.
    pub fn begin(text: &Text, beginning: Beginning<'_>) -> Self {
        let tags: &[&str] = if beginning.conversation.is_some() { &[OPEN, CLOSE] } else { &[] };
        Self {
            index: beginning.index,
            detokeniser: Detokeniser::new(text, beginning.prompt, tags),
            stop: StopStrings::new(beginning.stop),
            thought: beginning.conversation.map_or_else(Thought::none, Thought::after),
            stop_tokens: beginning.stop_tokens,
            tokens: Vec::new(),
            scored: Vec::new(),
            score: beginning.score,
            offset: beginning.offset,
        }
    }

    /// Takes a token. Returns a piece if there is text to show; one with a finish is the last, by a stop string.
    pub fn token(&mut self, text: &Text, id: u32, logprob: Option<TokenLogprob>) -> Option<Delta> {
        self.tokens.push(id);
        if self.score {
            self.scored.push(Scored { id, logprob });
        }
        if self.stop_tokens.contains(&id) {
            return None;
        }
        let new = self.detokeniser.push(text, id);
        let (shown, met) = self.stop.push(&new);
        let mut parted = self.thought.push(&shown);
        if met {
            append(&mut parted, self.thought.finish());
            return Some(self.delta(text, parted, Some("stop")));
        }
        (!parted.is_empty()).then(|| self.delta(text, parted, None))
    }

    /// Takes tokens that the client has, and shows nothing of them. Returns the last piece if they end the choice, and
    /// only that is missing.
    ///
    /// `max_tokens`: of the whole choice.
    pub fn replay(&mut self, text: &Text, ids: &[u32], max_tokens: usize) -> Option<Delta> {
        let met = ids.iter().find_map(|&id| self.token(text, id, None).filter(|delta| delta.finish.is_some()));
        self.delta(text, Parted::default(), None); // what is held back is counted as shown
        let end = match ids.last() {
            _ if met.is_some() => met,
            Some(last) if self.stop_tokens.contains(last) => Some(self.finish(text, Finish::Stop)),
            Some(_) if ids.len() >= max_tokens => Some(self.finish(text, Finish::Length)),
            _ => None,
        };
        end.map(|end| Delta { tokens: Vec::new(), scored: Vec::new(), ..end })
    }

    /// Ends the choice: its last piece, with what was held back.
    pub fn finish(&mut self, text: &Text, reason: Finish) -> Delta {
        let rest = self.detokeniser.finish(text);
        let (mut shown, met) = self.stop.push(&rest);
        if !met {
            shown += &self.stop.finish();
        }
        let mut parted = self.thought.push(&shown);
        append(&mut parted, self.thought.finish());
        let reason = match reason {
            Finish::Length if !met => "length",
            Finish::Length | Finish::Stop => "stop",
        };
        self.delta(text, parted, Some(reason))
    }

    fn delta(&mut self, text: &Text, parted: Parted, finish: Option<&'static str>) -> Delta {
        let scored = std::mem::take(&mut self.scored);
        let offset = self.offset;
        self.offset += scored.iter().map(|scored| text.token(scored.id).chars().count()).sum::<usize>();
        Delta { choice: self.index, text: parted, tokens: std::mem::take(&mut self.tokens), scored, offset, finish }
    }
}

fn append(parted: &mut Parted, rest: Parted) {
    parted.reasoning += &rest.reasoning;
    parted.content += &rest.content;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tests::tiny;

    fn choice(text: &Text, conversation: Option<&str>, stop: &[&str]) -> Choice {
        let stop = stop.iter().map(|&s| s.to_owned()).collect();
        let beginning =
            Beginning { index: 0, prompt: &[], conversation, stop, stop_tokens: vec![1], score: false, offset: 0 };
        Choice::begin(text, beginning)
    }

    fn run(choice: &mut Choice, text: &Text, ids: &[u32]) -> Vec<Delta> {
        let mut deltas: Vec<Delta> = Vec::new();
        for &id in ids {
            deltas.extend(choice.token(text, id, None));
            if deltas.last().is_some_and(|delta| delta.finish.is_some()) {
                return deltas;
            }
        }
        deltas.push(choice.finish(text, Finish::Stop));
        deltas
    }

    fn joined(deltas: &[Delta]) -> (String, String) {
        let join = |part: fn(&Delta) -> &str| deltas.iter().map(part).collect::<String>();
        (join(|d| &d.text.reasoning), join(|d| &d.text.content))
    }

    #[test]
    fn thought_and_answer_are_parted_and_no_token_is_lost() {
        let text = tiny();
        let mut ids = text.encode("7+5=12", false).unwrap();
        ids.push(6);
        ids.extend(text.encode("\n\n132", false).unwrap());
        ids.push(1);
        let deltas = run(&mut choice(&text, Some("<think>\n"), &[]), &text, &ids);
        assert_eq!(joined(&deltas), ("7+5=12".into(), "132".into()));
        assert_eq!(deltas.iter().flat_map(|d| d.tokens.clone()).collect::<Vec<_>>(), ids);
        assert_eq!(deltas.last().unwrap().finish, Some("stop"));
    }

    #[test]
    fn text_that_is_no_conversation_is_not_parted() {
        let text = tiny();
        let ids = [text.encode("a", false).unwrap(), vec![6], text.encode("b", false).unwrap()].concat();
        assert_eq!(joined(&run(&mut choice(&text, None, &[]), &text, &ids)), (String::new(), "ab".into()));
    }

    #[test]
    fn a_stop_string_over_two_tokens_ends_the_choice() {
        let text = tiny();
        let ids = text.encode("1 2 3 4 5", false).unwrap();
        let deltas = run(&mut choice(&text, None, &["3 4"]), &text, &ids);
        assert_eq!(joined(&deltas).1, "1 2 ");
        assert!(deltas.iter().flat_map(|d| &d.tokens).count() < ids.len());
        assert_eq!(deltas.last().unwrap().finish, Some("stop"));
    }

    #[test]
    fn a_choice_taken_over_after_any_token_shows_the_rest() {
        let text = tiny();
        let crab = text.encode("🦀", false).unwrap();
        assert!(crab.len() > 1, "a character of several tokens");
        let ids =
            [text.encode("7+", false).unwrap(), crab, vec![6], text.encode("\n\n1 2 3 4 5", false).unwrap()].concat();
        let whole = run(&mut choice(&text, Some("<think>\n"), &["3 4"]), &text, &ids);
        assert_eq!(joined(&whole), ("7+🦀".into(), "1 2 ".into()));
        let end = whole.iter().map(|delta| delta.tokens.len()).sum();
        for cut in 0..=end {
            let mut first = choice(&text, Some("<think>\n"), &["3 4"]);
            let mut shown: Vec<Delta> = ids[..cut].iter().filter_map(|&id| first.token(&text, id, None)).collect();
            if shown.last().is_some_and(|delta| delta.finish.is_some()) {
                shown.pop(); // lost on the way
            }
            let mut second = choice(&text, Some("<think>\n"), &["3 4"]);
            let rest = match second.replay(&text, &ids[..cut], 100) {
                Some(end) => vec![end],
                None => run(&mut second, &text, &ids[cut..]),
            };
            let (all, whole) = (joined(&[shown, rest].concat()), joined(&whole));
            assert_eq!(all, whole, "after {cut} tokens");
        }
    }

    #[test]
    fn a_choice_of_which_only_the_end_is_missing_ends_at_once() {
        let text = tiny();
        let ids = text.encode("1 2 3", false).unwrap();
        let end = |ids: &[u32], max_tokens| choice(&text, None, &[]).replay(&text, ids, max_tokens);
        assert_eq!(end(&ids, ids.len()).unwrap().finish, Some("length"));
        assert_eq!(end(&[&ids[..], &[1]].concat(), 100).unwrap().finish, Some("stop"));
        assert!(end(&ids, 100).is_none() && end(&[], 0).is_none());
    }

    #[test]
    fn a_stop_token_makes_no_text() {
        let text = tiny();
        let stop = text.encode("9", false).unwrap()[0];
        let mut one = choice(&text, None, &[]);
        one.stop_tokens.push(stop);
        assert!(one.token(&text, stop, None).is_none());
        let last = one.finish(&text, Finish::Stop);
        assert_eq!((last.text.content.as_str(), last.tokens), ("", vec![stop]));
    }
}
