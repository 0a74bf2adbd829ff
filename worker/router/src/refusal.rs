//! Why a request gets no answer, as clients and as metrics see it. It names nothing internal.

use http::{Method, StatusCode};
use wire::openai::ErrorObject;

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP's status.
    pub status: StatusCode,
    /// The body.
    pub error: Box<ErrorObject>,
    /// Seconds after which it is worth to try again.
    pub retry_after: Option<u32>,
    /// The method that the path takes, if it was another.
    pub allow: Option<Method>,
    /// A label for metrics, from a small set.
    pub reason: &'static str,
}

impl Refusal {
    /// The request is at fault, in `param` if it is one field of it.
    pub fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        let error = ErrorObject::invalid_request(message);
        let error = match param {
            Some(param) => error.param(param).code("invalid_value"),
            None => error.code("invalid_json"),
        };
        Self::new(StatusCode::BAD_REQUEST, error, "invalid_request")
    }

    /// A 4xx that is not about the body.
    pub fn protocol(status: StatusCode, message: impl Into<String>, reason: &'static str) -> Self {
        Self::new(status, ErrorObject::invalid_request(message), reason)
    }

    /// The path takes `allowed` only.
    pub fn wrong_method(allowed: Method) -> Self {
        let message = format!("This path takes {allowed} only");
        let refusal = Self::protocol(StatusCode::METHOD_NOT_ALLOWED, message, "wrong_method");
        Self { allow: Some(allowed), ..refusal }
    }

    /// No model answers to `name`, shown as far as it can be a name.
    pub fn no_model(name: &str) -> Self {
        let shown: String = name.chars().filter(|c| !c.is_control()).take(320).collect();
        let error = ErrorObject::invalid_request(format!("The model `{shown}` does not exist"));
        Self::new(StatusCode::NOT_FOUND, error.param("model").code("model_not_found"), "model_not_found")
    }

    /// As many wait as may.
    pub fn queue_full() -> Self {
        let error = ErrorObject::rate_limit("Too many requests wait for this model; try again later");
        Self::new(StatusCode::TOO_MANY_REQUESTS, error.code("queue_full"), "queue_full").retry_after(1)
    }

    /// The model has no worker, and waiting does not help.
    pub fn no_worker() -> Self {
        Self::unavailable("This model is switched off", "no_worker").retry_after(30)
    }

    /// It waited as long as it may.
    pub fn waited_too_long() -> Self {
        Self::unavailable("No worker was free in time; try again later", "queue_timeout").retry_after(5)
    }

    /// Workers were lost, again and again.
    pub fn workers_failed() -> Self {
        Self::unavailable("The model could not answer; try again later", "workers_failed").retry_after(5)
    }

    /// The router itself ends, or has not begun.
    pub fn not_ready() -> Self {
        Self::unavailable("Not ready; try again", "not_ready").retry_after(1)
    }

    /// The client's own deadline passed.
    pub fn deadline() -> Self {
        let error = ErrorObject::server("The deadline of the request passed").code("deadline_exceeded");
        Self::new(StatusCode::GATEWAY_TIMEOUT, error, "deadline_exceeded")
    }

    /// A worker answered what we cannot read.
    pub fn broken() -> Self {
        let error = ErrorObject::server("The model could not answer").code("internal_error");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, error, "internal_error")
    }

    /// What a worker refused, in its words.
    pub fn of_worker(status: StatusCode, error: ErrorObject) -> Self {
        let reason = if status.is_client_error() { "invalid_request" } else { "worker_error" };
        Self::new(status, error, reason)
    }

    /// An error that came when the answer had begun: its type says whose fault it is.
    pub fn of_stream(error: ErrorObject) -> Self {
        let status = match error.r#type.as_str() {
            "invalid_request_error" => StatusCode::BAD_REQUEST,
            "rate_limit_error" => StatusCode::TOO_MANY_REQUESTS,
            _ if error.code.as_deref() == Some("unavailable") => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::of_worker(status, error)
    }

    fn unavailable(message: &str, reason: &'static str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorObject::server(message).code(reason), reason)
    }

    fn new(status: StatusCode, error: ErrorObject, reason: &'static str) -> Self {
        Self { status, error: Box::new(error), retry_after: None, allow: None, reason }
    }

    fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }
}
