//! The control stream: snapshots in, acknowledgements and load out.

use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tracing::{info, warn};
use wire::proto::{Instruction, Report, report};

use crate::{dispatch::LOOK_EVERY, router::Router};

const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Applies `instructions` and sends to `reports` until either ends. With no operator neither does: the router serves on
/// from its last snapshot.
pub async fn follow(
    router: Router,
    mut instructions: impl Stream<Item = Instruction> + Unpin,
    reports: mpsc::Sender<Report>,
) {
    let mut report_again = tokio::time::interval(REPORT_EVERY);
    let mut look_again = tokio::time::interval(LOOK_EVERY);
    report_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    look_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let report = tokio::select! {
            instruction = instructions.next() => match instruction {
                Some(instruction) => {
                    let acknowledged = router.apply(instruction);
                    if let Some(acknowledgement) = &acknowledged {
                        info!(model = acknowledgement.model, version = ?acknowledgement.version, "snapshot in force");
                    }
                    acknowledged.map(report::Report::Acknowledgement)
                }
                None => return warn!("the control stream ended"),
            },
            _ = report_again.tick() => Some(report::Report::RouterLoad(router.load())),
            () = router.somebody_waits() => Some(report::Report::RouterLoad(router.load())),
            _ = look_again.tick() => {
                router.look();
                None
            }
        };
        if report.is_some() && reports.send(Report { report }).await.is_err() {
            return;
        }
    }
}
