//! What an operator must hear first on a new stream.

use std::collections::BTreeMap;

use crate::proto::{Hello, Report, report};

/// The latest report of each lasting kind.
#[derive(Default)]
pub(super) struct Latest {
    acknowledgements: BTreeMap<String, Report>,
    worker_state: Option<Report>,
    description: Option<Report>,
    failure: Option<Report>,
    suspects: Option<Report>,
}

impl Latest {
    /// Remembers `report`, if it is of a lasting kind.
    pub(super) fn keep(&mut self, report: Report) {
        match &report.report {
            Some(report::Report::Acknowledgement(acknowledgement)) => {
                self.acknowledgements.insert(acknowledgement.model.clone(), report);
            }
            Some(report::Report::WorkerState(_)) => self.worker_state = Some(report),
            Some(report::Report::Description(_)) => {
                self.description = Some(report);
                self.failure = None;
            }
            Some(report::Report::Progress(_)) => self.failure = None,
            Some(report::Report::Failure(_)) => self.failure = Some(report),
            Some(report::Report::Suspects(_)) => self.suspects = Some(report),
            _ => {}
        }
    }

    /// No need to acknowledge a model that is gone.
    pub(super) fn forget(&mut self, model: &str) {
        self.acknowledgements.remove(model);
    }

    /// `hello`, then what is remembered.
    pub(super) fn after(&self, hello: Hello) -> Vec<Report> {
        let hello = Report { report: Some(report::Report::Hello(hello)) };
        let states = [&self.worker_state, &self.description, &self.failure, &self.suspects];
        let states = states.into_iter().flatten().chain(self.acknowledgements.values()).cloned();
        std::iter::once(hello).chain(states).collect()
    }
}
