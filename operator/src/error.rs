//! What can go wrong while the operator acts on the world, and what happens next.
//!
//! What the user's specification gets wrong is no error: `validate` and the planner answer with values.

use std::time::Duration;

/// A call or a step of a reconcile that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An object could not be written.
    #[error("could not apply {kind} {name}")]
    Apply {
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
        /// The API server's answer.
        source: Box<kube::Error>,
    },
    /// An object could not be read.
    #[error("could not read {kind} {name}")]
    Read {
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
        /// The API server's answer.
        source: Box<kube::Error>,
    },
    /// An object could not be deleted.
    #[error("could not delete {kind} {name}")]
    Delete {
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
        /// The API server's answer.
        source: Box<kube::Error>,
    },
    /// The API server did not answer within the deadline of one call.
    #[error("{kind} {name}: no answer from the API server within {} s", after.as_secs())]
    Timeout {
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
        /// How long the call was given.
        after: Duration,
    },
    /// The name that an object of ours must have is taken by one that is not ours, and stays as it is.
    #[error("{kind} {name} exists and does not belong to this ModelDeployment; rename or delete it")]
    Foreign {
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
    },
    /// This process no longer leads, so it must not write.
    #[error("stopped before writing {kind} {name}: another operator leads")]
    NotLeading {
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
    },
    /// A record that this operator keeps in the cluster does not read back.
    #[error("the record in {object} cannot be read: {why}")]
    Record {
        /// The object that holds it.
        object: String,
        /// What is wrong with it.
        why: String,
    },
    /// A value of ours has no JSON form.
    #[error("could not write {what} as JSON")]
    Encode {
        /// What was being written.
        what: String,
        /// Where it failed.
        source: serde_json::Error,
    },
    /// The reconcile of one object panicked; the others go on.
    #[error("the reconcile panicked: {0}")]
    Panic(String),
}

/// What happens after an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Nothing helps but a change of an object.
    Invalid,
    /// Tried again, with growing pauses.
    Transient,
    /// Ours to fix: logged loudly, tried again rarely.
    Bug,
}

impl Error {
    /// Says what happens next.
    pub fn class(&self) -> Class {
        match self {
            Self::Apply { .. } | Self::Read { .. } | Self::Delete { .. } | Self::Timeout { .. } => Class::Transient,
            // The other object may go away without waking us: it carries no label of ours.
            Self::Foreign { .. } => Class::Transient,
            // The new leader does the work; this process is woken if it leads again.
            Self::NotLeading { .. } => Class::Invalid,
            Self::Record { .. } => Class::Transient,
            Self::Encode { .. } | Self::Panic(_) => Class::Bug,
        }
    }

    /// A stable CamelCase reason for conditions and events.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Apply { source, .. } | Self::Read { source, .. } | Self::Delete { source, .. } => api_reason(source),
            Self::Timeout { .. } => "ApiServerTimeout",
            Self::Foreign { .. } => "NameTaken",
            Self::NotLeading { .. } => "NotLeading",
            Self::Record { .. } => "RecordUnreadable",
            Self::Encode { .. } | Self::Panic(_) => "InternalError",
        }
    }

    /// The message and those of its sources, as one line.
    pub fn chain(&self) -> String {
        match self {
            // kube prints its status twice; the server's own words are enough.
            Self::Apply { source, .. } | Self::Read { source, .. } | Self::Delete { source, .. } => {
                match source.as_ref() {
                    kube::Error::Api(status) => format!("{self}: {}", status.message),
                    other => format!("{self}: {other}"),
                }
            }
            Self::Encode { source, .. } => format!("{self}: {source}"),
            _ => self.to_string(),
        }
    }
}

fn api_reason(source: &kube::Error) -> &'static str {
    let kube::Error::Api(status) = source else {
        return "ApiServerUnreachable";
    };
    match status.code {
        403 if status.message.contains("exceeded quota") => "QuotaExceeded",
        403 => "Forbidden",
        409 => "Conflict",
        422 => "RejectedByApiServer",
        429 => "ApiServerBusy",
        _ => "ApiServerError",
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn refused(code: u16, message: &str) -> Error {
        let status = Status { code, message: message.to_owned(), ..Status::success() };
        Error::Apply {
            kind: "Pod".to_owned(),
            name: "a".to_owned(),
            source: Box::new(kube::Error::Api(status.boxed())),
        }
    }

    #[test]
    fn a_quota_is_named_and_the_servers_words_are_kept_once() {
        let error = refused(403, "pods is forbidden: exceeded quota: small");
        assert_eq!(error.reason(), "QuotaExceeded");
        assert_eq!(error.class(), Class::Transient);
        assert_eq!(error.chain(), "could not apply Pod a: pods is forbidden: exceeded quota: small");
    }

    #[test]
    fn a_panic_is_a_bug() {
        assert_eq!(Error::Panic("index out of bounds".to_owned()).class(), Class::Bug);
    }
}
