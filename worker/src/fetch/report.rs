//! Tells the operators how a fetch or a description goes, and waits for the token that they promise.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use tokio::{sync::mpsc, task::JoinHandle};
use wire::proto::{Failure, Hello, Progress, Report, hello::Role, progress, report};

use super::{Error, OnProgress};

/// How often progress is told at most.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How long the operators have for the last words: they may learn of this pod later than from it.
const LAST_WORDS: Duration = Duration::from_secs(30);
const TOKEN_EVERY: Duration = Duration::from_secs(2);

/// A control stream that is only spoken to.
pub struct Reporter {
    reports: mpsc::Sender<Report>,
    streams: JoinHandle<()>,
    told: Arc<Mutex<Option<Instant>>>,
}

impl Reporter {
    /// Opens control streams to `operators`; with none of them, nothing is told to nobody.
    pub fn open(operators: Vec<String>, role: Role, id: String, model: String, revision: String) -> Self {
        let (reports, receiver) = mpsc::channel(64);
        let process = crate::serve::control::process();
        let hello = Hello { role: role.into(), id, process, model, revision, ..Hello::default() };
        let alone = operators.is_empty();
        let mut instructions = wire::fleet::watch(operators, move || hello.clone(), receiver);
        let streams = tokio::spawn(async move { while !alone && instructions.next().await.is_some() {} });
        Self { reports, streams, told: Arc::default() }
    }

    /// Progress, told at most once a second.
    pub fn on_progress(&self) -> OnProgress {
        let (reports, told) = (self.reports.clone(), self.told.clone());
        Arc::new(move |done_bytes, total_bytes| {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            if done_bytes < total_bytes && told.is_some_and(|told| told.elapsed() < TELL_EVERY) {
                return;
            }
            *told = Some(Instant::now());
            let progress = Progress { phase: progress::Phase::Downloading.into(), done_bytes, total_bytes };
            let _ = reports.try_send(Report { report: Some(report::Report::Progress(progress)) }); // more will come
        })
    }

    /// Says why it cannot go on, or does not yet.
    pub async fn failure(&self, reason: &str, message: String) {
        let failure = Failure { reason: reason.to_owned(), message };
        self.send(report::Report::Failure(failure)).await;
    }

    /// Sends a description.
    pub async fn description(&self, json: Vec<u8>) {
        self.send(report::Report::Description(wire::proto::Description { json: json.into() })).await;
    }

    /// Waits until every operator has taken in all that was said, but for one that is away.
    pub async fn heard(self) {
        drop(self.reports);
        let _ = tokio::time::timeout(LAST_WORDS, self.streams).await; // an operator that is away hears nothing
    }

    async fn send(&self, report: report::Report) {
        let _ = self.reports.send(Report { report: Some(report) }).await; // an operator that is away hears nothing
    }
}

/// Reads the token from a file; waits for it, and says so, as long as the file is missing or empty.
///
/// # Errors
/// If the file is there and cannot be read.
pub async fn token(path: &Path, reporter: &Reporter) -> Result<String, Error> {
    loop {
        match tokio::fs::read_to_string(path).await {
            Ok(token) if !token.trim().is_empty() => return Ok(token.trim().to_owned()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::file(path.display().to_string(), error)),
        }
        let key = path.file_name().unwrap_or_default().to_string_lossy();
        let message = format!("waiting for key {key} of the Secret that spec.model.credentialsRef names");
        reporter.failure("CredentialsMissing", message).await;
        tokio::time::sleep(TOKEN_EVERY).await;
    }
}
