//! The control stream, seen from a process that is controlled: one stream to every operator, merged into one.
//!
//! Only the leading operator speaks; the others hold their stream silently, so that a change of leader needs no
//! reconnect. What matters about this process (hello, acknowledgements, state, description, failure) is sent again on
//! every new stream; loads and progress are not, the next ones come soon.

mod latest;
mod link;
mod order;

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::Stream;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;

use crate::proto::{Hello, Instruction, Report};
use latest::Latest;
use order::Order;

const RESOLVE_EVERY: Duration = Duration::from_secs(5);
/// Instructions not yet taken by the process; more wait in the operator.
const INBOX: usize = 64;
/// Reports that an operator may be behind before its stream is given up and made anew.
const OUTBOX: usize = 256;

/// Holds a control stream to every operator at `addresses` (`HOST:PORT`, each resolved again every five seconds).
///
/// 1. Each stream begins with `hello` (its epoch filled in: the highest that was heard), then the latest of each state.
/// 2. What comes from `reports` goes to all operators. One that does not keep up gets a new stream.
/// 3. Instructions of all streams come out in one. One of a deposed leader (a lower epoch than was heard) or older than
///    the model's newest is left out. Before a `Synced` comes a `ModelRemoved` for each model that it did not send.
/// 4. A stream that ends is made again, after a pause that grows to five seconds.
///
/// Once `reports` is closed, the streams are closed after the last report, and the returned one ends when all
/// operators have taken that in: a process that reports and leaves waits for that, with a deadline of its own.
/// Dropping the returned stream ends everything.
pub fn watch(
    addresses: Vec<String>,
    hello: impl Fn() -> Hello + Send + Sync + 'static,
    reports: mpsc::Receiver<Report>,
) -> impl Stream<Item = Instruction> + Send + Unpin + 'static {
    let (inbox, instructions) = mpsc::channel(INBOX);
    let shared =
        Arc::new(Shared { hello: Box::new(hello), inbox, order: Mutex::default(), outboxes: Mutex::default() });
    tokio::spawn(run(addresses, shared, reports));
    ReceiverStream::new(instructions)
}

struct Shared {
    hello: Box<dyn Fn() -> Hello + Send + Sync>,
    inbox: mpsc::Sender<Instruction>,
    order: Mutex<Order>,
    outboxes: Mutex<Outboxes>,
}

/// What was last said, and to whom the next goes. One lock, so a new stream misses nothing between the two.
#[derive(Default)]
struct Outboxes {
    latest: Latest,
    open: HashMap<SocketAddr, mpsc::Sender<Report>>,
    closed: bool,
}

impl Shared {
    fn outboxes(&self) -> std::sync::MutexGuard<'_, Outboxes> {
        self.outboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self) -> std::sync::MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends to every operator; one whose outbox is full loses its stream, and gets the latest on its next.
    fn report(&self, report: Report) {
        let mut outboxes = self.outboxes();
        outboxes.open.retain(|_, outbox| outbox.try_send(report.clone()).is_ok());
        outboxes.latest.keep(report);
    }

    /// No further reports: each stream ends after what is in its outbox.
    fn close(&self) {
        let mut outboxes = self.outboxes();
        outboxes.closed = true;
        outboxes.open.clear();
    }

    /// The outbox of a new stream, with all that an operator must know in it.
    fn open(&self, operator: SocketAddr) -> mpsc::Receiver<Report> {
        let hello = Hello { epoch: self.order().epoch(), ..(self.hello)() };
        let mut outboxes = self.outboxes();
        let first: Vec<Report> = outboxes.latest.after(hello);
        let (outbox, reports) = mpsc::channel(OUTBOX + first.len());
        for report in first {
            outbox.try_send(report).expect("the channel holds them all");
        }
        if !outboxes.closed {
            outboxes.open.insert(operator, outbox);
        }
        reports
    }
}

async fn run(addresses: Vec<String>, shared: Arc<Shared>, mut reports: mpsc::Receiver<Report>) {
    let mut resolved = resolve(addresses);
    let mut links = Links::default();
    let mut reporting = true;
    loop {
        tokio::select! {
            () = shared.inbox.closed() => return, // dropping the links ends them
            report = reports.recv(), if reporting => match report {
                Some(report) => shared.report(report),
                None => {
                    reporting = false;
                    shared.close();
                }
            },
            Some(operators) = resolved.recv() => links.follow(&operators, &shared),
            Some(ended) = links.tasks.join_next() => if let Ok(operator) = ended {
                links.running.remove(&operator);
            },
        }
        if !reporting && links.told_all() {
            return;
        }
    }
}

/// All operators, again every few seconds. An address that cannot be resolved keeps its last good answer.
fn resolve(addresses: Vec<String>) -> mpsc::Receiver<HashSet<SocketAddr>> {
    let (found, resolved) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut answers: HashMap<String, Vec<SocketAddr>> = HashMap::new();
        let mut again = tokio::time::interval(RESOLVE_EVERY);
        while !found.is_closed() {
            again.tick().await;
            for address in &addresses {
                match tokio::net::lookup_host(address.as_str()).await {
                    Ok(found) => {
                        answers.insert(address.clone(), found.collect());
                    }
                    Err(error) => debug!(address, %error, "could not resolve the operator"),
                }
            }
            let _ = found.send(answers.values().flatten().copied().collect()).await; // closed: the loop ends
        }
    });
    resolved
}

/// One task an operator.
#[derive(Default)]
struct Links {
    tasks: JoinSet<SocketAddr>,
    running: HashMap<SocketAddr, link::Wanted>,
    started: bool,
}

impl Links {
    /// Links end after the last report once they have told it; before the first there is somebody to be told.
    fn told_all(&self) -> bool {
        self.started && self.running.is_empty()
    }

    /// Starts a link to each new operator, and lets those end that are no longer named, once their stream does.
    fn follow(&mut self, operators: &HashSet<SocketAddr>, shared: &Arc<Shared>) {
        for (operator, link) in &self.running {
            link.set(operators.contains(operator));
        }
        for &operator in operators {
            if let Entry::Vacant(place) = self.running.entry(operator) {
                debug!(%operator, "following an operator");
                let link = place.insert(link::Wanted::default()).clone();
                self.tasks.spawn(link::run(operator, shared.clone(), link));
                self.started = true;
            }
        }
    }
}

#[cfg(test)]
mod tests;
