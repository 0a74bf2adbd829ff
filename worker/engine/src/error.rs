//! What can go wrong in the engine, for whoever loads a model and for whoever asks it something.

use std::io;

/// An error of loading or running a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model could not be read.
    #[error("reading {file}")]
    Read {
        /// The file, as the model's folder names it.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// `config.json` is refused; nothing was allocated for the model.
    #[error("config.json: {reason}")]
    Config {
        /// The field, its value, and what is accepted.
        reason: String,
    },
    /// A weight file or its index is refused as a whole.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// One tensor is missing, or does not fit what `config.json` says.
    #[error("{file}: tensor {tensor}: {reason}")]
    Tensor {
        /// The file that holds it, or should.
        file: String,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The placement names a layer or an expert that the model does not have.
    #[error("placement: {reason}")]
    Held {
        /// What was named and what exists.
        reason: String,
    },
    /// An option makes no sense.
    #[error("{option} is {value}; {accepted}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What would be accepted.
        accepted: String,
    },
    /// The tensor library could not keep a tensor.
    #[error("keeping tensor {tensor}")]
    Keep {
        /// Its name.
        tensor: String,
        /// What the library said.
        source: Box<candle_core::Error>,
    },
    /// The model answered something that is not a number, so no token can be drawn.
    #[error("logits of position {position} hold {count} values that are not numbers")]
    NotANumber {
        /// Position of the token that was to be drawn, from the start of the sequence.
        position: usize,
        /// How many of the logits are NaN.
        count: usize,
    },
    /// This worker's own experts refused a batch that was made for them.
    #[error("computing experts held here")]
    Experts(#[source] ExpertsError),
    /// An exchange answered with bytes that do not fit the batch it was given.
    #[error("expert replies of layer {layer} have {got} bytes; {want} were asked for")]
    Replies {
        /// The layer asked about.
        layer: usize,
        /// Bytes wanted.
        want: usize,
        /// Bytes that came.
        got: usize,
    },
}

/// Why a request was not accepted. The words are for the client.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// Nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A token that the model does not have.
    #[error("token {token} is not in the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// How many tokens there are.
        vocab_size: usize,
    },
    /// The prompt with what may be generated exceeds the context.
    #[error(
        "the prompt has {prompt} tokens and up to {max_tokens} are to be generated; the context is {max_context} tokens"
    )]
    Context {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// The model's context in tokens.
        max_context: usize,
    },
    /// As many tokens are generated already as may be.
    #[error("{generated} tokens are generated already and up to {max_tokens} may be; there must be one left")]
    NothingLeft {
        /// Tokens generated already.
        generated: usize,
        /// Tokens asked for.
        max_tokens: usize,
    },
    /// The sequence would not fit the whole cache, even alone.
    #[error("the request needs {need} tokens of cache; this worker has {total}")]
    Cache {
        /// Tokens needed, in whole pages.
        need: usize,
        /// Tokens there are.
        total: usize,
    },
    /// A sampling parameter out of range.
    #[error("{name} is {value}; it must be {accepted}")]
    Sampling {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: f32,
        /// The range.
        accepted: &'static str,
    },
}

/// Why expert rows were not computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpertsError {
    /// The pairs name an expert that is not in this worker's memory.
    #[error("expert {expert} of layer {layer} is not held here")]
    NotHeld {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: usize,
    },
    /// The bytes are not whole rows of the model's width.
    #[error("{bytes} bytes are not whole rows of {row} bytes")]
    Rows {
        /// Bytes given.
        bytes: usize,
        /// Bytes of one row.
        row: usize,
    },
    /// A pair names a row that was not sent, or the two lists differ in length.
    #[error("pairs do not fit the rows: {reason}")]
    Pairs {
        /// What differs.
        reason: String,
    },
}
