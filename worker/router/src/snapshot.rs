//! Snapshots of the control stream as tables to route by. Pure; the tables are replaced whole.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use wire::proto::{ModelSnapshot, Version, WorkerEntry, model_snapshot::Availability};

use crate::{
    line::{Freed, Line},
    load::WorkerLoad,
};

/// One model, as one snapshot has it.
#[derive(Clone, Debug)]
pub struct Model {
    /// `NAMESPACE/NAME`.
    pub name: String,
    /// Which snapshot.
    pub version: Version,
    /// The names that it wants, beside its own.
    pub served_names: Vec<String>,
    /// Unix time in seconds.
    pub created: i64,
    /// Whether it has workers, or gets some.
    pub availability: Availability,
    /// How many may wait.
    pub max_pending: usize,
    /// How long one may wait.
    pub max_wait: Duration,
    /// How often a stream may go on at another worker.
    pub migration_attempts: u32,
    /// Of all replicas.
    pub workers: Vec<Arc<Worker>>,
}

/// What a worker runs. An answer that one began another can take over if this is the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Of the model files.
    pub hash: String,
    /// Of what the files are run with.
    pub revision: String,
}

/// A worker.
#[derive(Debug)]
pub struct Worker {
    /// The pod's UID, or the local token.
    pub id: String,
    /// `HOST:PORT`.
    pub address: String,
    /// `HOST:PORT` for when nobody answers at the address, or empty.
    pub named_address: String,
    /// Takes no new requests.
    pub is_draining: bool,
    /// What it runs.
    pub content: Arc<Content>,
    /// What this router has out there.
    pub load: Arc<WorkerLoad>,
}

impl Worker {
    /// Where to call it now.
    pub fn target(&self) -> &str {
        if self.load.is_by_name() && !self.named_address.is_empty() { &self.named_address } else { &self.address }
    }
}

impl Model {
    /// `snapshot`, with the counters that `previous` has of the same workers.
    fn new(snapshot: ModelSnapshot, previous: Option<&Model>) -> Self {
        let loads: HashMap<&str, &Arc<WorkerLoad>> =
            previous.iter().flat_map(|model| &model.workers).map(|worker| (&*worker.id, &worker.load)).collect();
        let availability = snapshot.availability();
        let worker = |entry: WorkerEntry| {
            let load = loads.get(&*entry.id).map(|load| Arc::clone(load)).unwrap_or_default();
            Arc::new(Worker {
                named_address: named_address(&entry),
                id: entry.id,
                address: entry.address,
                is_draining: entry.draining,
                content: Arc::new(Content { hash: entry.content_hash, revision: entry.revision }),
                load,
            })
        };
        Self {
            name: snapshot.model,
            version: snapshot.version.unwrap_or_default(),
            served_names: snapshot.served_names,
            created: snapshot.created,
            availability,
            max_pending: snapshot.max_pending as usize,
            max_wait: Duration::from_millis(snapshot.max_wait_ms),
            migration_attempts: snapshot.migration_attempts,
            workers: snapshot.workers.into_iter().map(worker).collect(),
        }
    }

    /// Tells the answers that run at workers of `self` or of `previous` whether they had better leave. Those of a worker
    /// that stays are never told to, not even for a moment.
    fn tell_leaving(&self, previous: Option<&Model>) {
        let stays: HashSet<&str> = self.workers.iter().map(|worker| &*worker.id).collect();
        let before = previous.iter().flat_map(|model| &model.workers);
        before.filter(|worker| !stays.contains(&*worker.id)).for_each(|worker| worker.load.leaves(true));
        self.workers.iter().for_each(|worker| worker.load.leaves(worker.is_draining));
    }
}

/// The worker's name, with the port of its address unless it has one.
fn named_address(entry: &WorkerEntry) -> String {
    let port = entry.address.rsplit_once(':').map_or("", |(_, port)| port);
    match &*entry.dns_name {
        "" => String::new(),
        name if name.contains(':') => name.to_owned(),
        name => format!("{name}:{port}"),
    }
}

/// All models, by name.
#[derive(Clone, Debug, Default)]
pub struct Table {
    models: BTreeMap<String, Arc<Line>>,
    names: HashMap<String, Arc<Line>>,
}

impl Table {
    /// The model that answers to `name`.
    pub fn find(&self, name: &str) -> Option<&Arc<Line>> {
        self.names.get(name)
    }

    /// All models, in order of their own names.
    pub fn lines(&self) -> impl Iterator<Item = &Arc<Line>> {
        self.models.values()
    }

    /// All names that are answered to, in order, with their models.
    pub fn names(&self) -> BTreeMap<&str, &Arc<Line>> {
        self.names.iter().map(|(name, line)| (&**name, line)).collect()
    }

    /// This table with a newer snapshot of one model. Its line stays; `freed` is for one that is new.
    #[must_use]
    pub fn with(&self, snapshot: ModelSnapshot, freed: &Freed) -> Self {
        let mut models = self.models.clone();
        if let Some(line) = models.get(&snapshot.model) {
            let previous = line.model();
            let model = Model::new(snapshot, Some(&previous));
            line.update(model);
            line.model().tell_leaving(Some(&previous)); // once the table has those to whom they can go
        } else {
            let model = Model::new(snapshot, None);
            model.tell_leaving(None);
            models.insert(model.name.clone(), Line::new(model, freed.clone()));
        }
        Self::of(models)
    }

    /// This table without one model.
    #[must_use]
    pub fn without(&self, model: &str) -> Self {
        let mut models = self.models.clone();
        if let Some(line) = models.remove(model) {
            line.close();
        }
        Self::of(models)
    }

    /// A model's own name is always its; of those who want another, the oldest has it.
    fn of(models: BTreeMap<String, Arc<Line>>) -> Self {
        let mut by_age: Vec<Arc<Model>> = models.values().map(|line| line.model()).collect();
        by_age.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
        let mut names: HashMap<String, Arc<Line>> =
            models.iter().map(|(name, line)| (name.clone(), line.clone())).collect();
        for model in by_age {
            for name in &model.served_names {
                names.entry(name.clone()).or_insert_with(|| models[&model.name].clone());
            }
        }
        Self { models, names }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;

    fn freed() -> Freed {
        Arc::new(|_| {})
    }

    fn snapshot(model: &str, created: i64, names: &[&str], workers: &[&str]) -> ModelSnapshot {
        let workers = workers.iter().map(|id| WorkerEntry { id: (*id).into(), ..Default::default() });
        ModelSnapshot {
            model: model.into(),
            created,
            served_names: names.iter().map(ToString::to_string).collect(),
            workers: workers.collect(),
            ..Default::default()
        }
    }

    fn holder(table: &Table, name: &str) -> Option<String> {
        table.find(name).map(|line| line.model().name.clone())
    }

    #[test]
    fn the_oldest_holder_keeps_a_name_and_the_next_inherits_it() {
        let table = Table::default()
            .with(snapshot("b/young", 9, &["m", "b/old"], &[]), &freed())
            .with(snapshot("b/old", 5, &["m"], &[]), &freed());
        assert_eq!(holder(&table, "m").as_deref(), Some("b/old"));
        assert_eq!(holder(&table, "b/young").as_deref(), Some("b/young"));
        assert_eq!(holder(&table, "b/old").as_deref(), Some("b/old"), "its own name is nobody else's");
        let table = table.without("b/old");
        assert_eq!(holder(&table, "m").as_deref(), Some("b/young"));
        assert_eq!(holder(&table, "unknown"), None);
    }

    #[test]
    fn counters_stay_with_workers_that_stay() {
        let table = Table::default().with(snapshot("b/m", 1, &[], &["w1", "w2"]), &freed());
        let before = table.find("b/m").unwrap().model();
        before.workers[1].load.failed(Duration::ZERO, false);
        let table = table.with(snapshot("b/m", 1, &[], &["w2", "w3"]), &freed());
        let after = table.find("b/m").unwrap().model();
        assert!(after.workers[0].load.is_suspect(Duration::ZERO));
        assert!(!after.workers[1].load.is_suspect(Duration::ZERO));
    }

    #[test]
    fn answers_leave_workers_that_drain_or_are_gone_and_stay_when_a_drain_is_taken_back() {
        let table = Table::default().with(snapshot("b/m", 1, &[], &["w1", "w2"]), &freed());
        let before = table.find("b/m").unwrap().model();
        let leaving = || [0, 1].map(|index| before.workers[index].load.is_leaving());
        let mut draining = snapshot("b/m", 1, &[], &["w2"]);
        draining.workers[0].draining = true;
        let table = table.with(draining, &freed());
        assert_eq!(leaving(), [true, true]);
        let _table = table.with(snapshot("b/m", 1, &[], &["w2"]), &freed());
        assert_eq!(leaving(), [true, false]);
    }

    #[test]
    fn answers_of_a_worker_that_stays_are_not_told_to_leave_for_a_moment() {
        let mut table = Table::default().with(snapshot("b/m", 1, &[], &["w1"]), &freed());
        let load = table.find("b/m").unwrap().model().workers[0].load.clone();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let told = scope.spawn(|| {
                let looks = std::iter::repeat_with(|| load.is_leaving());
                looks.take_while(|_| !is_over.load(Relaxed)).any(|leaving| leaving)
            });
            for _ in 0..20_000 {
                table = table.with(snapshot("b/m", 1, &[], &["w1"]), &freed());
            }
            is_over.store(true, Relaxed);
            assert!(!told.join().unwrap());
        });
    }

    #[test]
    fn a_name_without_port_has_the_port_of_the_address() {
        let entry = |dns_name: &str| WorkerEntry {
            address: "[fd00::7]:9000".into(),
            dns_name: dns_name.into(),
            ..Default::default()
        };
        assert_eq!(named_address(&entry("m-0.m-workers.ns")), "m-0.m-workers.ns:9000");
        assert_eq!(named_address(&entry("localhost:1")), "localhost:1");
        assert_eq!(named_address(&entry("")), "");
    }
}
