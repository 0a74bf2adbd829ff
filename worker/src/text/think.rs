//! Parts the thought of a reasoning model from its answer.
//!
//! The thought stands between `<think>` and `</think>`. A template may end the prompt with the opening tag; then the
//! generated text begins inside the thought. Tags are found as text, however many pieces they come in.

use super::stop::overlap;

/// The tag that opens a thought.
pub const OPEN: &str = "<think>";
/// The tag that ends it.
pub const CLOSE: &str = "</think>";

/// New text of a choice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parted {
    /// Of the thought.
    pub reasoning: String,
    /// Of the answer.
    pub content: String,
}

impl Parted {
    /// Whether there is no text at all.
    pub fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty()
    }
}

enum Place {
    /// Nothing but white space so far: a thought may open here, and only here.
    Beginning,
    Thought,
    /// Behind the closing tag: line ends are dropped.
    Between,
    Answer,
}

/// Parts one stream of text.
pub struct Thought {
    place: Place,
    held: String,
}

impl Thought {
    /// Starts behind `prompt`, the rendered conversation.
    pub fn after(prompt: &str) -> Self {
        let open = prompt.rfind(OPEN).is_some_and(|open| prompt[open + OPEN.len()..].chars().all(char::is_whitespace));
        Self { place: if open { Place::Thought } else { Place::Beginning }, held: String::new() }
    }

    /// For text that is no conversation: all of it is content.
    pub fn none() -> Self {
        Self { place: Place::Answer, held: String::new() }
    }

    /// Takes new text; returns what is known to belong to the thought or to the answer.
    pub fn push(&mut self, text: &str) -> Parted {
        self.held.push_str(text);
        let mut out = Parted::default();
        while self.step(&mut out) {}
        out
    }

    /// Returns what was held back; the text ends here.
    pub fn finish(&mut self) -> Parted {
        let rest = std::mem::take(&mut self.held);
        match self.place {
            Place::Thought => Parted { reasoning: rest, ..Parted::default() },
            _ => Parted { content: rest, ..Parted::default() },
        }
    }

    /// Moves what it can out of the held text; true if the place changed, so that there may be more to do.
    fn step(&mut self, out: &mut Parted) -> bool {
        match self.place {
            Place::Beginning => {
                let begun = self.held.trim_start();
                if let Some(rest) = begun.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.place = Place::Thought;
                    return true;
                }
                if OPEN.starts_with(begun) {
                    return false;
                }
                self.place = Place::Answer;
                true
            }
            Place::Thought => {
                if let Some(at) = self.held.find(CLOSE) {
                    out.reasoning.push_str(&self.held[..at]);
                    self.held.drain(..at + CLOSE.len());
                    self.place = Place::Between;
                    return true;
                }
                let keep = overlap(&self.held, CLOSE);
                let rest = self.held.split_off(self.held.len() - keep);
                out.reasoning.push_str(&std::mem::replace(&mut self.held, rest));
                false
            }
            Place::Between => {
                self.held = self.held.trim_start_matches(['\n', '\r']).to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.place = Place::Answer;
                true
            }
            Place::Answer => {
                out.content.push_str(&std::mem::take(&mut self.held));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(prompt: &str, parts: &[&str]) -> (String, String) {
        let mut thought = Thought::after(prompt);
        let mut out = Parted::default();
        let mut add = |piece: Parted| {
            out.reasoning += &piece.reasoning;
            out.content += &piece.content;
        };
        for part in parts {
            add(thought.push(part));
        }
        add(thought.finish());
        (out.reasoning, out.content)
    }

    fn parted(reasoning: &str, content: &str) -> (String, String) {
        (reasoning.to_owned(), content.to_owned())
    }

    #[test]
    fn a_template_may_open_the_thought() {
        assert_eq!(all("..<think>\n", &["7 + 5", "</think>", "\n\n", "132"]), parted("7 + 5", "132"));
        assert_eq!(all("..<think>\n", &["no end"]), parted("no end", ""));
    }

    #[test]
    fn a_thought_closed_in_the_prompt_is_over() {
        assert_eq!(all("<think>\n\n</think>\n\n", &["132"]), parted("", "132"));
    }

    #[test]
    fn a_model_may_open_the_thought_itself() {
        assert_eq!(all("..", &["\n<thi", "nk>", "a", "</th", "ink>b"]), parted("a", "b"));
    }

    #[test]
    fn tags_in_an_answer_are_text() {
        assert_eq!(all("..", &["write <think>x</think>"]), parted("", "write <think>x</think>"));
        assert_eq!(all("..", &[" <thin", "g>"]), parted("", " <thing>"));
        assert_eq!(all("<think>", &["a</think>b</think>c"]), parted("a", "b</think>c"));
    }

    #[test]
    fn text_that_only_looks_like_a_tag_is_kept() {
        assert_eq!(all("<think>", &["1 <", "/thin", " 2"]), parted("1 </thin 2", ""));
    }
}
