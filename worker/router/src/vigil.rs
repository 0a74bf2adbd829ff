//! Watches over workers that run something: asks those that are quiet for a sign of life, and tells their answers when
//! none comes. When that is, [`Pulse`] decides.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use tokio::{sync::watch, time::MissedTickBehavior};
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};
use tracing::{info, warn};

use crate::{
    pulse::{Act, Pulse, TICK},
    router::Router,
    snapshot::Worker,
};

/// Whether one worker is there. It outlives snapshots.
#[derive(Debug, Default)]
pub struct Life {
    /// Since the last tick.
    heard: AtomicBool,
    pulse: Mutex<Pulse>,
    /// As `silent` has it; for those who only look.
    is_silent: AtomicBool,
    silent: watch::Sender<bool>,
}

impl Life {
    /// Something came from it.
    pub(crate) fn heard(&self) {
        if !self.heard.load(Relaxed) {
            self.heard.store(true, Relaxed);
        }
    }

    /// Whether it gives no sign of life.
    pub(crate) fn is_silent(&self) -> bool {
        self.is_silent.load(Relaxed)
    }

    /// Resolves when it gives no sign of life, now or later.
    pub(crate) fn silence(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut silent = self.silent.subscribe();
        async move {
            if silent.wait_for(|silent| *silent).await.is_err() {
                std::future::pending::<()>().await; // it is gone, and whoever waits is about to be
            }
        }
    }

    /// Time passed in which it ran something, or nothing.
    fn tick(&self, runs: bool) -> Option<Act> {
        let mut pulse = self.lock();
        if !runs && !pulse.is_silent() {
            return pulse.rests();
        }
        let act = pulse.tick(self.heard.swap(false, Relaxed));
        self.tell(&pulse);
        act
    }

    /// What came of a question.
    fn answered(&self, asked: Instant, answer: &Result<HealthCheckResponse, Status>) {
        let mut pulse = self.lock();
        match answer {
            Ok(_) => pulse.signed(asked.elapsed()),
            // somebody said so, who knows no such question
            Err(status) if status.code() == Code::Unimplemented => pulse.signed(asked.elapsed()),
            Err(_) => pulse.unsigned(),
        }
        self.tell(&pulse);
    }

    fn tell(&self, pulse: &Pulse) {
        let is_silent = pulse.is_silent();
        self.is_silent.store(is_silent, Relaxed);
        self.silent.send_if_modified(|before| std::mem::replace(before, is_silent) != is_silent);
    }

    fn lock(&self) -> MutexGuard<'_, Pulse> {
        self.pulse.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches over the workers of all models, for ever.
pub async fn keep(router: Router) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay); // a router that was held up has not waited for anybody
    loop {
        ticks.tick().await;
        for line in router.table().lines() {
            for worker in &line.model().workers {
                look(&router, worker);
            }
        }
    }
}

fn look(router: &Router, worker: &Arc<Worker>) {
    match worker.load.life.tick(worker.load.outstanding() > 0) {
        Some(Act::Ask) => drop(tokio::spawn(ask(router.channels().get(worker.target()), worker.clone()))),
        Some(Act::GiveUp) => warn!(worker = worker.id, "a worker gives no sign of life"),
        None => {}
    }
}

async fn ask(channel: Channel, worker: Arc<Worker>) {
    let (asked, life) = (Instant::now(), &worker.load.life);
    let was_silent = life.is_silent();
    let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    life.answered(asked, &answer.map(tonic::Response::into_inner));
    if was_silent && !life.is_silent() {
        info!(worker = worker.id, "a worker is there again");
    }
}
