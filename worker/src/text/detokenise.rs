//! Token ids to text while they arrive: never half a character, never a character twice.

use super::Text;

/// Tokens of the prompt that are decoded with the first new ones, because some decoders drop or add a space at the
/// beginning of a text.
const CONTEXT: usize = 6;
/// Tokens that may be held back: no character is spread over more, so what is left then is no text.
const HELD: usize = 32;
/// What a decoder puts for bytes that are no UTF-8, or not yet.
const REPLACEMENT: char = '\u{FFFD}';

/// The text of one growing sequence.
///
/// The concatenation of everything returned equals the text of all tokens decoded at once.
pub struct Detokeniser {
    window: Vec<u32>,
    /// Tokens at the head of the window whose text is out.
    shown: usize,
    /// Text of the window that is out.
    prefix: String,
    /// Spelt out although special: the tags that part thought from answer.
    spelt: Vec<(u32, String)>,
}

impl Detokeniser {
    /// Starts behind `prompt`. Tokens in `spelt` appear as their own spelling even if they are special.
    pub fn new(text: &Text, prompt: &[u32], spelt: &[&str]) -> Self {
        let window: Vec<u32> = prompt.iter().copied().filter(|&id| !text.is_special(id)).collect();
        let window = window[window.len().saturating_sub(CONTEXT)..].to_vec();
        let spelt = spelt.iter().filter_map(|&tag| Some((text.id(tag)?, tag.to_owned()))).collect();
        Self { shown: window.len(), prefix: text.decode(&window), window, spelt }
    }

    /// Takes the next token; returns the text that is final now, often none.
    pub fn push(&mut self, text: &Text, id: u32) -> String {
        if let Some((_, spelling)) = self.spelt.iter().find(|&&(tag, _)| tag == id) {
            let spelling = spelling.clone();
            return self.finish(text) + &spelling;
        }
        if text.is_special(id) {
            return String::new();
        }
        self.window.push(id);
        if self.window.len() - self.shown > HELD {
            return self.finish(text);
        }
        let all = text.decode(&self.window);
        // Decoders that join byte tokens change what came before until the character is whole.
        let Some(new) = all.strip_prefix(self.prefix.as_str()) else {
            return String::new();
        };
        let stable = new.trim_end_matches(REPLACEMENT).to_owned();
        if stable.len() == new.len() && !new.is_empty() {
            self.forget(text);
        } else {
            self.prefix.push_str(&stable);
        }
        stable
    }

    /// Returns what was held back; the sequence ends here, or a tag follows.
    pub fn finish(&mut self, text: &Text) -> String {
        let all = text.decode(&self.window);
        let rest = match all.strip_prefix(self.prefix.as_str()) {
            Some(rest) => rest.to_owned(),
            None => text.decode(&self.window[self.shown..]),
        };
        self.forget(text);
        rest
    }

    /// Keeps the tokens shown last as the context of the next ones.
    fn forget(&mut self, text: &Text) {
        self.window.drain(..self.shown);
        self.shown = self.window.len();
        self.prefix = text.decode(&self.window);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::tests::tiny;

    fn pieces(text: &Text, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut stream = Detokeniser::new(text, prompt, &["<think>", "</think>"]);
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(text, id)).collect();
        pieces.push(stream.finish(text));
        pieces
    }

    fn byte_tokens(text: &Text, bytes: &[u8]) -> Vec<u32> {
        let of = |byte: u8| (0..512).find(|&id| text.token_bytes(id) == [byte]).unwrap();
        bytes.iter().map(|&byte| of(byte)).collect()
    }

    #[test]
    fn half_a_character_is_never_shown() {
        let text = tiny();
        let ids = byte_tokens(&text, "a中🦀".as_bytes());
        assert_eq!(pieces(&text, &[], &ids), ["a", "", "", "中", "", "", "", "🦀", ""]);
    }

    #[test]
    fn bytes_that_stay_no_text_are_shown_in_the_end() {
        let text = tiny();
        let ids = byte_tokens(&text, b"a\xE4\xB8b");
        assert_eq!(pieces(&text, &[], &ids).concat(), "a\u{FFFD}b");
        let ids = byte_tokens(&text, b"a\xE4\xB8");
        assert_eq!(pieces(&text, &[], &ids).concat(), "a\u{FFFD}");
        let ids = byte_tokens(&text, &[0x80; 200]);
        assert_eq!(pieces(&text, &[], &ids).concat(), "\u{FFFD}".repeat(200));
    }

    #[test]
    fn tags_are_spelt_and_other_special_tokens_are_not() {
        let text = tiny();
        let mut ids = byte_tokens(&text, b"x");
        ids.extend([6, 4, 1]);
        assert_eq!(pieces(&text, &[], &ids), ["x", "</think>", "", "", ""]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_split_into_tokens_gives_the_same_text(sample in "\\PC{0,24}", cuts in prop::collection::vec(any::<bool>(), 128)) {
            let text = tiny();
            let mut ids = Vec::new();
            let mut part = String::new();
            for (char, &cut) in sample.chars().zip(&cuts) {
                if cut {
                    ids.extend(text.encode(&part, false).unwrap());
                    ids.extend(byte_tokens(&text, char.to_string().as_bytes()));
                    part.clear();
                } else {
                    part.push(char);
                }
            }
            ids.extend(text.encode(&part, false).unwrap());
            let pieces = pieces(&text, &[3, 40, 41], &ids);
            prop_assert_eq!(pieces.concat(), text.decode(&ids));
            prop_assert!(sample.contains(REPLACEMENT) || pieces.iter().all(|piece| !piece.contains(REPLACEMENT)));
        }

        #[test]
        fn any_tokens_give_the_text_of_all_at_once(ids in prop::collection::vec(7_u32..512, 0..48)) {
            let text = tiny();
            prop_assert_eq!(pieces(&text, &[], &ids).concat(), text.decode(&ids));
        }
    }
}
