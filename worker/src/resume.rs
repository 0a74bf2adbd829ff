//! What a client has of an answer from a worker that was lost: read from the call, and checked.

use wire::proto;

use crate::openai::Refusal;

/// What the client has of one choice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Had {
    /// The piece before the first token, if there is one: who speaks, or the echo of the prompt.
    pub begun: bool,
    /// The tokens of all pieces.
    pub tokens: Vec<u32>,
    /// The last piece.
    pub finished: bool,
}

/// What the client has of each of `choices`.
///
/// # Errors
/// If a choice is named that the request does not have, twice, or has more tokens than it may.
pub fn had(resume: Option<proto::Resume>, choices: usize) -> Result<Vec<Had>, Refusal> {
    let mut had = vec![Had::default(); choices];
    for resumed in resume.into_iter().flat_map(|resume| resume.choices) {
        let index = resumed.choice;
        let refuse = |what: String| Refusal::invalid("resume", format!("resume names choice {index}{what}"));
        let Some(had) = had.get_mut(index as usize) else {
            return Err(refuse(format!("; the request has {choices}")));
        };
        if had.begun {
            return Err(refuse(" twice".to_owned()));
        }
        *had = Had { begun: true, tokens: resumed.token_ids, finished: resumed.finished };
    }
    Ok(had)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resume(choices: &[u32]) -> Option<proto::Resume> {
        let resumed = |&choice: &u32| proto::ResumedChoice { choice, token_ids: vec![7, 8], finished: false };
        Some(proto::Resume { choices: choices.iter().map(resumed).collect() })
    }

    #[test]
    fn choices_that_are_not_named_have_not_begun() {
        let part = Had { begun: true, tokens: vec![7, 8], finished: false };
        assert_eq!(had(resume(&[1]), 2).unwrap(), [Had::default(), part]);
        assert_eq!(had(None, 1).unwrap(), [Had::default()]);
    }

    #[test]
    fn choices_that_cannot_be_are_refused() {
        for (named, words) in [(&[2][..], "resume names choice 2; the request has 2"), (&[0, 0], "choice 0 twice")] {
            let refusal = had(resume(named), 2).unwrap_err();
            assert!(refusal.message.contains(words), "{refusal}");
        }
    }
}
