//! Client bytes to engine requests: parse, render, tokenize, and check against the model.
//!
//! CPU work without waiting; callers keep it off the runtime's threads.

use std::path::Path;

use engine::{Limits, Request, Sampling};
use sha2::{Digest as _, Sha256};
use wire::proto::{Endpoint, GenerateCall};

use crate::{
    chat::{self, ChatTemplate},
    choice::{Beginning, Choice},
    openai::{self, Call, Defaults, Input, Prompt, Refusal, chunk::Delta},
    resume::{Had, had},
    text::{self, Text},
};

/// What turns text into tokens and back for one model.
pub struct Model {
    /// The tokenizer.
    pub text: Text,
    template: Option<ChatTemplate>,
    defaults: Defaults,
    limits: Limits,
}

/// Why a model's text files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Tokenizer or configuration.
    #[error("cannot load the tokenizer")]
    Text(#[from] text::Error),
    /// Chat template.
    #[error("cannot load the chat template")]
    Template(#[from] chat::LoadError),
}

/// A prompt as the engine gets it.
pub struct PromptTokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The text they came from, or stand for.
    pub text: String,
}

/// A request that can be submitted: choice `c` continues prompt `c / call.n`.
pub struct Prepared {
    /// What was asked.
    pub call: Call,
    /// The prompts.
    pub prompts: Vec<PromptTokens>,
    /// One a choice.
    pub requests: Vec<Request>,
    /// The choices, as far as the client has them.
    pub choices: Vec<Begun>,
}

/// A choice, behind what the client has of it.
pub struct Begun {
    /// Its state.
    pub choice: Choice,
    /// What the client has.
    pub had: Had,
    /// Its last piece, if only that is missing.
    pub end: Option<Delta>,
}

impl Begun {
    /// Whether there are tokens to generate.
    pub fn runs(&self) -> bool {
        !self.had.finished && self.end.is_none()
    }
}

impl Model {
    /// Loads tokenizer, template and defaults from a model's folder.
    ///
    /// `limits`: of the engine that runs it.
    ///
    /// # Errors
    /// If a file is damaged, above its cap, or does not fit the vocabulary.
    pub fn load(dir: &Path, limits: Limits) -> Result<Self, LoadError> {
        Ok(Self {
            text: Text::load(dir, limits.vocab_size)?,
            template: ChatTemplate::load(dir)?,
            defaults: Defaults::load(dir)?,
            limits,
        })
    }

    /// Makes engine requests of a call.
    ///
    /// # Errors
    /// The first thing in it that cannot be honoured.
    pub fn prepare(&self, call: &GenerateCall) -> Result<Prepared, Refusal> {
        let (endpoint, request_id, resume) = (call.endpoint(), &call.request_id, call.resume.clone());
        let call = match endpoint {
            Endpoint::ChatCompletions => openai::chat(&call.body, &self.defaults)?,
            Endpoint::Completions => openai::completion(&call.body, &self.defaults)?,
            Endpoint::Unspecified => {
                return Err(Refusal::invalid("endpoint", "the endpoint is not known"));
            }
        };
        let prompts = self.prompts(&call.input)?;
        let mut requests = Vec::with_capacity(prompts.len() * call.n);
        for (index, prompt) in prompts.iter().enumerate() {
            let max_tokens = self.max_tokens(&call, prompt.ids.len())?;
            for choice in index * call.n..(index + 1) * call.n {
                requests.push(self.request(&call, request_id, &prompt.ids, max_tokens, choice as u64));
            }
        }
        let had = had(resume, requests.len())?;
        let is_chat = endpoint == Endpoint::ChatCompletions;
        let mut choices = Vec::with_capacity(requests.len());
        for (index, (request, had)) in requests.iter_mut().zip(had).enumerate() {
            let begun = self.begin(&call, &prompts[index / call.n], is_chat, request, had);
            if begun.runs() {
                request.check(&self.limits).map_err(|refusal| refused(&refusal))?;
            }
            choices.push(begun);
        }
        Ok(Prepared { call, prompts, requests, choices })
    }

    /// Brings a choice, and the request for its tokens, to where the client has it.
    fn begin(&self, call: &Call, prompt: &PromptTokens, is_chat: bool, request: &mut Request, had: Had) -> Begun {
        let beginning = Beginning {
            index: u32::try_from(request.sampling.stream).unwrap_or(u32::MAX),
            prompt: &prompt.ids,
            conversation: is_chat.then_some(prompt.text.as_str()),
            stop: call.stop.clone(),
            stop_tokens: request.stop_tokens.clone(),
            score: call.logprobs.is_some(),
            offset: if call.echo { prompt.text.chars().count() } else { 0 },
        };
        let mut choice = Choice::begin(&self.text, beginning);
        let end = match had.finished {
            true => None,
            false => choice.replay(&self.text, &had.tokens, request.max_tokens),
        };
        request.prompt_logprobs &= !had.begun; // they were in its first piece
        request.generated.clone_from(&had.tokens);
        Begun { choice, had, end }
    }

    fn prompts(&self, input: &Input) -> Result<Vec<PromptTokens>, Refusal> {
        match input {
            Input::Chat(messages) => {
                let Some(template) = &self.template else {
                    let message = "this model has no chat template; use /v1/completions";
                    return Err(Refusal::invalid("messages", message));
                };
                let text = template.render(messages).map_err(|e| Refusal::invalid("messages", e.to_string()))?;
                Ok(vec![self.tokens("messages", text, false)?])
            }
            Input::Prompts(prompts) => prompts.iter().map(|prompt| self.prompt(prompt)).collect(),
        }
    }

    fn prompt(&self, prompt: &Prompt) -> Result<PromptTokens, Refusal> {
        match prompt {
            Prompt::Text(text) => self.tokens("prompt", text.clone(), true),
            Prompt::Ids(ids) => {
                let beyond = ids.iter().find(|&&id| id as usize >= self.limits.vocab_size);
                if let Some(id) = beyond {
                    let message = format!("prompt has token {id}; the vocabulary has {}", self.limits.vocab_size);
                    return Err(Refusal::invalid("prompt", message));
                }
                self.fits("prompt", ids.len())?;
                Ok(PromptTokens { ids: ids.clone(), text: self.text.decode(ids) })
            }
        }
    }

    fn tokens(&self, param: &'static str, text: String, special: bool) -> Result<PromptTokens, Refusal> {
        // so that what cannot fit is refused before it is tokenized
        self.fits(param, self.text.at_least(&text))?;
        let ids = self.text.encode(&text, special).map_err(|error| Refusal::invalid(param, error.to_string()))?;
        self.fits(param, ids.len())?;
        Ok(PromptTokens { ids, text })
    }

    fn fits(&self, param: &'static str, tokens: usize) -> Result<(), Refusal> {
        let context = self.limits.max_context_tokens;
        if tokens <= context {
            return Ok(());
        }
        let message = format!("{param} has at least {tokens} tokens; the context is {context} tokens");
        Err(over_context(param, message))
    }

    fn max_tokens(&self, call: &Call, prompt: usize) -> Result<usize, Refusal> {
        let context = self.limits.max_context_tokens;
        let left = context.saturating_sub(prompt);
        let param = match call.input {
            Input::Chat(_) => "messages",
            Input::Prompts(_) => "prompt",
        };
        let field = call.max_tokens_field;
        match call.max_tokens {
            Some(asked) if asked > left => {
                let message = format!(
                    "{param} has {prompt} tokens and {field} is {asked}; the context is {context} tokens, so use at most {left}"
                );
                Err(over_context(if left == 0 { param } else { field }, message))
            }
            Some(asked) => Ok(asked),
            None if left == 0 => {
                let message = format!("{param} has {prompt} tokens, as many as the context of {context} tokens");
                Err(over_context(param, message))
            }
            None => Ok(call.default_max_tokens.map_or(left, |tokens| tokens.min(left))),
        }
    }

    fn request(&self, call: &Call, request_id: &str, prompt: &[u32], max_tokens: usize, choice: u64) -> Request {
        let mut stop_tokens = call.stop_token_ids.clone();
        if !call.ignore_eos {
            stop_tokens.extend(&self.defaults.end_tokens);
        }
        let seed = call.seed.unwrap_or_else(|| seed_of(request_id));
        Request {
            prompt: prompt.to_vec(),
            generated: Vec::new(),
            max_tokens,
            stop_tokens,
            sampling: Sampling { seed, stream: choice, ..call.sampling.clone() },
            logprobs: call.logprobs,
            prompt_logprobs: call.echo && call.logprobs.is_some(),
        }
    }
}

fn over_context(param: &str, message: String) -> Refusal {
    Refusal { code: Some("context_length_exceeded"), ..Refusal::invalid(param, message) }
}

/// What the engine refuses, as the client reads it.
pub fn refused(refusal: &engine::Refusal) -> Refusal {
    use engine::Refusal as Engine;
    let (param, code) = match refusal {
        Engine::EmptyPrompt => ("prompt", "invalid_value"),
        Engine::UnknownToken { .. } => ("logit_bias", "invalid_value"),
        Engine::NothingLeft { .. } => ("resume", "invalid_value"),
        Engine::Context { .. } | Engine::Cache { .. } => ("max_tokens", "context_length_exceeded"),
        Engine::Sampling { name, .. } => (*name, "invalid_value"),
    };
    Refusal { code: Some(code), ..Refusal::invalid(param, refusal.to_string()) }
}

/// A seed for a request that brings none: the same on whichever worker it runs.
fn seed_of(request_id: &str) -> u64 {
    let digest = Sha256::digest(request_id.as_bytes());
    digest.iter().take(8).fold(0, |seed, &byte| seed << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests;
