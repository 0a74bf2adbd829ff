//! A network without sockets, under tokio's paused clock: holders compute at once, messages take a while, and a plan says
//! what goes wrong. Everything follows from the plan, so a run can be had again from its seed.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use engine::Experts;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use wire::proto::{RunCall, RunReply};

use super::{
    network::{CALLS, Calls, Network, Open},
    pool,
};

/// What goes wrong with a message, or with the holder that is to get it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    DropCall,
    DropReply,
    /// Behind those that are sent in the next milliseconds, so that their order changes.
    DelayCall(u64),
    DelayReply(u64),
    DoubleCall,
    DoubleReply,
    /// Before it computes; back after so many milliseconds.
    KillBefore(u64),
    /// After it computed, before the reply leaves.
    KillAfter(u64),
    /// It takes in everything and answers nothing for so many milliseconds.
    Freeze(u64),
    /// Its streams end; it lives on.
    Reset,
    /// It has no room for the call.
    Busy,
    /// It does not hold the experts any more, says it.
    NotHeld,
}

impl Fault {
    /// The kind, without its time.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::DropCall => "drop call",
            Self::DropReply => "drop reply",
            Self::DelayCall(_) => "delay call",
            Self::DelayReply(_) => "delay reply",
            Self::DoubleCall => "double call",
            Self::DoubleReply => "double reply",
            Self::KillBefore(_) => "kill before",
            Self::KillAfter(_) => "kill after",
            Self::Freeze(_) => "freeze",
            Self::Reset => "reset",
            Self::Busy => "busy",
            Self::NotHeld => "not held",
        }
    }
}

/// What goes wrong with the n-th call of rows.
pub(super) type Plan = Box<dyn FnMut(usize) -> Option<Fault> + Send>;

/// Holders by address, and the way to them.
#[derive(Clone)]
pub(super) struct Net(Arc<Mutex<State>>);

struct State {
    holders: BTreeMap<String, Holder>,
    plan: Plan,
    /// Calls of rows so far.
    calls: usize,
    bitten: BTreeMap<&'static str, usize>,
}

struct Holder {
    experts: Arc<Experts>,
    /// Counts its lives; streams of an earlier one are over.
    life: watch::Sender<u64>,
    down_until: Instant,
    frozen_until: Instant,
    /// Calls of rows so far.
    calls: usize,
}

/// A message's way.
const WAY: Duration = Duration::from_micros(200);

impl Net {
    /// Nothing goes wrong but by `plan`. Must run inside tokio.
    pub(super) fn new(holders: &[(&str, Arc<Experts>)], plan: Plan) -> Self {
        let now = Instant::now();
        let holder = |experts: &Arc<Experts>| Holder {
            experts: experts.clone(),
            life: watch::Sender::new(0),
            down_until: now,
            frozen_until: now,
            calls: 0,
        };
        let holders = holders.iter().map(|(address, experts)| ((*address).to_owned(), holder(experts))).collect();
        Self(Arc::new(Mutex::new(State { holders, plan, calls: 0, bitten: BTreeMap::new() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls of rows so far.
    pub(super) fn calls(&self) -> usize {
        self.state().calls
    }

    /// Those to one holder.
    pub(super) fn calls_to(&self, address: &str) -> usize {
        self.state().holders[address].calls
    }

    /// How often each kind of fault happened.
    pub(super) fn bitten(&self) -> BTreeMap<&'static str, usize> {
        self.state().bitten.clone()
    }

    /// What happens to a call; faults of the holder happen here.
    fn fate(&self, to: &str, call: &RunCall) -> Option<Fault> {
        let mut state = self.state();
        if call.pair_experts.is_empty() {
            return None; // a probe
        }
        let number = state.calls;
        state.calls += 1;
        state.holders.get_mut(to).expect("the call came to it").calls += 1;
        let fault = (state.plan)(number)?;
        *state.bitten.entry(fault.name()).or_default() += 1;
        let holder = state.holders.get_mut(to).expect("the call came to it");
        match fault {
            Fault::KillBefore(ms) => holder.end(ms),
            Fault::Reset => holder.end(0),
            Fault::Freeze(ms) => holder.frozen_until = Instant::now() + Duration::from_millis(ms),
            _ => {}
        }
        Some(fault)
    }

    fn thawed(&self, to: &str) -> Instant {
        self.state().holders.get(to).map_or_else(Instant::now, |holder| holder.frozen_until)
    }

    async fn answer(self, to: String, call: RunCall, replies: mpsc::Sender<RunReply>) {
        let fault = self.fate(&to, &call);
        let delay = match fault {
            Some(Fault::DropCall | Fault::KillBefore(_) | Fault::Reset) => return,
            Some(Fault::DelayCall(ms)) => WAY + Duration::from_millis(ms),
            _ => WAY,
        };
        tokio::time::sleep(delay).await;
        let thawed = self.thawed(&to);
        tokio::time::sleep_until(thawed).await;
        let times = if fault == Some(Fault::DoubleCall) { 2 } else { 1 };
        for _ in 0..times {
            let experts = self.state().holders.get(&to).map(|holder| holder.experts.clone());
            let reply = match (fault, experts) {
                (Some(Fault::Busy), _) => pool::refuse(&call, wire::proto::refusal::Reason::Busy, "a plan says so"),
                (Some(Fault::NotHeld), _) => {
                    pool::refuse(&call, wire::proto::refusal::Reason::NotHeld, "a plan says so")
                }
                (_, Some(experts)) => pool::run(&experts, &call),
                (_, None) => return,
            };
            match fault {
                Some(Fault::KillAfter(ms)) => {
                    self.state().holders.get_mut(&to).expect("it is there").end(ms);
                    return;
                }
                Some(Fault::DropReply) => return,
                Some(Fault::DelayReply(ms)) => tokio::time::sleep(Duration::from_millis(ms)).await,
                Some(Fault::DoubleReply) => {
                    let _ = replies.send(reply.clone()).await; // the stream may be over
                }
                _ => {}
            }
            tokio::time::sleep(WAY).await;
            let _ = replies.send(reply).await; // the stream may be over
        }
    }
}

impl Holder {
    fn end(&mut self, down_ms: u64) {
        self.down_until = Instant::now() + Duration::from_millis(down_ms);
        self.life.send_modify(|life| *life += 1);
    }
}

impl Network for Net {
    fn open(&self, to: &str) -> BoxFuture<'static, Option<Open>> {
        let (net, to) = (self.clone(), to.to_owned());
        async move {
            tokio::time::sleep(WAY).await;
            let thawed = net.thawed(&to);
            tokio::time::sleep_until(thawed).await;
            let mut life = {
                let state = net.state();
                let holder = state.holders.get(&to).filter(|holder| holder.down_until <= Instant::now())?;
                holder.life.subscribe()
            };
            let (calls, mut incoming) = mpsc::channel::<RunCall>(CALLS);
            let (replies, outgoing) = mpsc::channel(CALLS);
            tokio::spawn(async move {
                let mut tasks = tokio::task::JoinSet::new(); // ends with the stream
                loop {
                    tokio::select! {
                        biased;
                        _ = life.changed() => return,
                        call = incoming.recv() => {
                            let Some(call) = call else { return };
                            tasks.spawn(net.clone().answer(to.clone(), call, replies.clone()));
                        }
                    }
                }
            });
            Some((Calls::Queue(calls), ReceiverStream::new(outgoing).boxed()))
        }
        .boxed()
    }
}
