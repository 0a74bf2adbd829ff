//! Stop strings, which may begin in one token and end in another.

/// Cuts a stream of text before the first stop string.
///
/// Text that may be the beginning of a stop string is held back until it can no longer become one.
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Empty strings never match.
    pub fn new(strings: Vec<String>) -> Self {
        Self { strings: strings.into_iter().filter(|string| !string.is_empty()).collect(), held: String::new() }
    }

    /// Takes new text; returns what can be shown, and whether a stop string was met: then nothing more comes.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let met = self.strings.iter().filter_map(|string| self.held.find(string.as_str())).min();
        if let Some(at) = met {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.strings.iter().map(|string| overlap(&self.held, string)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// Returns what was held back; the text ends here.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that is a beginning of `string`, but not all of it.
pub(super) fn overlap(text: &str, string: &str) -> usize {
    let beginnings = string.char_indices().map(|(at, _)| at).rev();
    beginnings.into_iter().find(|&at| text.ends_with(&string[..at])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(stops: &[&str], parts: &[&str]) -> (String, bool) {
        let mut stop = StopStrings::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut shown = String::new();
        for part in parts {
            let (text, met) = stop.push(part);
            shown += &text;
            if met {
                return (shown, true);
            }
        }
        (shown + &stop.finish(), false)
    }

    #[test]
    fn a_stop_string_over_several_pieces_is_found_and_cut() {
        assert_eq!(all(&["\n\nQ:"], &["42", "\n", "\nQ", ":", " more"]), ("42".into(), true));
        assert_eq!(all(&["abc", "b"], &["a", "b", "c"]), ("a".into(), true));
    }

    #[test]
    fn a_beginning_that_comes_to_nothing_is_shown() {
        assert_eq!(all(&["\n\nQ:"], &["42", "\n", "\nA:"]), ("42\n\nA:".into(), false));
        assert_eq!(all(&["END"], &["the E", "N"]), ("the EN".into(), false));
    }

    #[test]
    fn text_is_held_no_longer_than_needed() {
        let mut stop = StopStrings::new(vec!["aab".into()]);
        assert_eq!(stop.push("xaa"), ("x".into(), false));
        assert_eq!(stop.push("a"), ("a".into(), false));
        assert_eq!(stop.push("中"), ("aa中".into(), false));
    }

    proptest! {
        #[test]
        fn the_cut_does_not_depend_on_the_pieces(text in "[ab中]{0,20}", stop in "[ab中]{1,4}", at in 0_usize..20) {
            let at = text.char_indices().map(|(i, _)| i).nth(at).unwrap_or(text.len());
            let (left, right) = text.split_at(at);
            let whole = text.find(&stop).map_or((text.clone(), false), |at| (text[..at].to_owned(), true));
            prop_assert_eq!(all(&[&stop], &[left, right]), whole);
        }
    }
}
