//! What router and worker must agree on of OpenAI's interface: limits, and the shape of errors. Errors name nothing
//! internal.

use serde::{Deserialize, Serialize};

/// Most choices of one prompt.
pub const MAX_CHOICES: u32 = 64;
/// Most stop strings of a request.
pub const MAX_STOPS: usize = 16;
/// Most messages of a conversation.
pub const MAX_MESSAGES: usize = 1024;

/// `{"error": {..}}`, the body of a refused request and the data of a stream's last event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorObject,
}

/// What went wrong, for a person (`message`) and for a program (the rest).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorObject {
    /// One sentence that says what to change.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error`, `server_error`, ...
    pub r#type: String,
    /// The field of the request that is to blame.
    pub param: Option<String>,
    /// A stable name of what happened: `model_not_found`, ...
    pub code: Option<String>,
}

impl ErrorObject {
    /// The request is at fault: status 400, or the 4xx that fits better.
    pub fn invalid_request(message: impl Into<String>) -> Self {
        Self::new("invalid_request_error", message)
    }

    /// Too much is asked for at once: status 429.
    pub fn rate_limit(message: impl Into<String>) -> Self {
        Self::new("rate_limit_error", message)
    }

    /// We are at fault, or not able to at the moment: status 5xx.
    pub fn server(message: impl Into<String>) -> Self {
        Self::new("server_error", message)
    }

    fn new(r#type: &str, message: impl Into<String>) -> Self {
        Self { message: message.into(), r#type: r#type.into(), param: None, code: None }
    }

    /// Names the field that is to blame.
    #[must_use]
    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Names what happened.
    #[must_use]
    pub fn code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }

    /// The JSON of the [`ErrorBody`].
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&ErrorBody { error: self.clone() }).expect("strings always serialise")
    }

    /// Reads the JSON of an [`ErrorBody`], as a worker sends it; what is none becomes a server error without its text.
    pub fn from_json(json: &[u8]) -> Self {
        serde_json::from_slice(json)
            .map_or_else(|_| Self::server("the model could not answer"), |body: ErrorBody| body.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_the_shape_that_openai_clients_read() {
        let error = ErrorObject::invalid_request("n is 65; use at most 64").param("n").code("out_of_range");
        let json = String::from_utf8(error.to_json()).unwrap();
        assert_eq!(
            json,
            r#"{"error":{"message":"n is 65; use at most 64","type":"invalid_request_error","param":"n","code":"out_of_range"}}"#
        );
        assert_eq!(ErrorObject::from_json(json.as_bytes()), error);
    }

    #[test]
    fn unreadable_errors_are_not_shown() {
        let error = ErrorObject::from_json(b"thread panicked at 10.0.0.7");
        assert_eq!((error.r#type.as_str(), error.message.as_str()), ("server_error", "the model could not answer"));
    }
}
