//! The model's tokenizer: text to token ids and back.
//!
//! Answers for loading it within a cap and for single conversions. The pieces of a stream are put together in
//! [`detokenise`], cut at stop strings in [`stop`], and parted into thought and answer in [`think`].

use std::{collections::HashSet, fs::File, io::Read as _, path::Path};

use tokenizers::{DecoderWrapper, Tokenizer};

pub mod detokenise;
pub mod stop;
pub mod think;

/// Largest `tokenizer.json` that is read.
const TOKENIZER_BYTES: u64 = 64 << 20;

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// Name of the file in the model's folder.
        file: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than the cap.
    #[error("{file} has more than {limit} bytes")]
    TooLarge {
        /// Name of the file in the model's folder.
        file: &'static str,
        /// The cap in bytes.
        limit: u64,
    },
    /// The file's content is not a tokenizer.
    #[error("tokenizer.json is not usable: {0}")]
    Parse(String),
    /// The tokenizer makes ids that the model has no row for.
    #[error("tokenizer.json has token id {id}; the model's vocabulary has {vocab_size} tokens")]
    BeyondVocabulary {
        /// The highest id.
        id: u32,
        /// Rows in the model's embedding.
        vocab_size: usize,
    },
    /// This text has no tokens.
    #[error("cannot tokenize this text: {0}")]
    Encode(String),
}

/// A model's tokenizer.
pub struct Text {
    tokenizer: Tokenizer,
    added: HashSet<u32>,
    special: HashSet<u32>,
    longest_token: usize,
    bytes_of_chars: Option<Vec<(char, u8)>>,
}

impl Text {
    /// Loads `tokenizer.json` from a model's folder.
    ///
    /// # Errors
    /// If it is missing, larger than the cap, not a tokenizer, or has ids at or above `vocab_size`.
    pub fn load(dir: &Path, vocab_size: usize) -> Result<Self, Error> {
        Self::from_bytes(&read_capped(dir, "tokenizer.json", TOKENIZER_BYTES)?, vocab_size)
    }

    /// As [`Text::load`], from the file's content.
    ///
    /// # Errors
    /// If the content is not a tokenizer, or has ids at or above `vocab_size`.
    pub fn from_bytes(bytes: &[u8], vocab_size: usize) -> Result<Self, Error> {
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| Error::Parse(error.to_string()))?;
        // Requests are never cut or padded silently, whatever the file says.
        tokenizer.with_truncation(None).map_err(|error| Error::Parse(error.to_string()))?;
        tokenizer.with_padding(None);
        let vocabulary = tokenizer.get_vocab(true);
        if let Some(&id) = vocabulary.values().max().filter(|&&id| id as usize >= vocab_size) {
            return Err(Error::BeyondVocabulary { id, vocab_size });
        }
        let longest_token = vocabulary.keys().map(String::len).max().unwrap_or(1).max(1);
        let added_tokens = tokenizer.get_added_tokens_decoder();
        let added = added_tokens.keys().copied().collect();
        let special = added_tokens.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        Ok(Self { tokenizer, added, special, longest_token, bytes_of_chars: byte_level.then(byte_level_alphabet) })
    }

    /// Token ids of `text`; `special` adds what the tokenizer puts around a text of its own, as a first token.
    ///
    /// # Errors
    /// If the tokenizer has no token for some of the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.tokenizer.encode_fast(text, special).map_err(|error| Error::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// Text of one token by itself, special or not.
    pub fn token(&self, id: u32) -> String {
        self.tokenizer.decode(&[id], false).unwrap_or_default()
    }

    /// Bytes of one token by itself, exact even where they are a part of a character.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let exact = self.bytes_of_chars.as_ref().filter(|_| !self.added.contains(&id)).and_then(|alphabet| {
            let byte = |char| alphabet.binary_search_by_key(&char, |&(char, _)| char).ok().map(|at| alphabet[at].1);
            self.tokenizer.id_to_token(id)?.chars().map(byte).collect()
        });
        exact.unwrap_or_else(|| self.token(id).into_bytes())
    }

    /// The id of the token that is spelt so.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Whether a token is left out of text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The fewest tokens that `text` can have.
    pub fn at_least(&self, text: &str) -> usize {
        text.len() / self.longest_token
    }
}

/// Reads a file of a model's folder, at most `limit` bytes.
///
/// # Errors
/// If it cannot be read or is larger.
pub fn read_capped(dir: &Path, file: &'static str, limit: u64) -> Result<Vec<u8>, Error> {
    let open = File::open(dir.join(file)).map_err(|source| Error::Read { file, source })?;
    let mut bytes = Vec::new();
    open.take(limit + 1).read_to_end(&mut bytes).map_err(|source| Error::Read { file, source })?;
    if bytes.len() as u64 > limit {
        return Err(Error::TooLarge { file, limit });
    }
    Ok(bytes)
}

/// The characters by which byte-level vocabularies spell bytes, sorted.
///
/// # Source
/// `bytes_to_unicode` of GPT-2: printable bytes stand for themselves, the others for U+0100 and up.
fn byte_level_alphabet() -> Vec<(char, u8)> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=u8::MAX).filter(|&byte| !printable(byte));
    let shifted = (0x100..).filter_map(char::from_u32).zip(others);
    let mut alphabet: Vec<_> = (0..=u8::MAX).filter(|&byte| printable(byte)).map(|b| (b.into(), b)).collect();
    alphabet.extend(shifted);
    alphabet.sort_unstable();
    alphabet
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn tiny() -> Text {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1");
        Text::load(&dir, 512).unwrap()
    }

    #[test]
    fn text_survives_the_way_there_and_back() {
        let text = tiny();
        for sample in ["What is 47 + 85?", "héllo, wörld", "中文 and 🦀", "", "\u{0}\u{7f}\n\t "] {
            assert_eq!(text.decode(&text.encode(sample, false).unwrap()), sample);
        }
    }

    #[test]
    fn bytes_of_tokens_make_up_the_bytes_of_the_text() {
        let text = tiny();
        let ids = text.encode("a 🦀 crab: 中", false).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| text.token_bytes(id)).collect();
        assert_eq!(bytes, "a 🦀 crab: 中".as_bytes());
        assert_eq!(text.token_bytes(6), b"</think>");
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_refused_with_both_numbers() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1");
        let error = Text::load(&dir, 100).err().unwrap().to_string();
        assert!(error.contains("token id 511") && error.contains("100 tokens"), "{error}");
    }

    #[test]
    fn a_tokenizer_that_is_none_is_refused() {
        assert!(Text::from_bytes(b"{\"model\": 3}", 10).is_err());
        assert!(Text::from_bytes(&[0xFF; 100], 10).is_err());
    }

    #[test]
    fn a_file_above_its_cap_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), "x".repeat(100)).unwrap();
        assert!(matches!(read_capped(dir.path(), "tokenizer.json", 99), Err(Error::TooLarge { .. })));
        assert_eq!(read_capped(dir.path(), "tokenizer.json", 100).unwrap().len(), 100);
    }
}
