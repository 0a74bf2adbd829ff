//! Our processes, as doubles at the other end of the real control stream: routers, workers and describers that do at
//! once what they are told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use futures::StreamExt;
use tokio::{sync::mpsc, task::JoinSet};
use wire::proto::{
    self, Instruction, ModelSnapshot, hello::Role, instruction::Instruction as Told, report::Report as Say,
    worker_state::Phase,
};

/// What the doubles did and may do.
#[derive(Default)]
pub struct Stage {
    /// The newest snapshot of each model, as the router has it.
    pub snapshots: BTreeMap<String, ModelSnapshot>,
    /// Every snapshot that the router got, in order.
    pub seen: Vec<ModelSnapshot>,
    /// What each worker does, by pod UID.
    pub phases: BTreeMap<String, Phase>,
    /// Requests that wait at the router, by model.
    pub queued: BTreeMap<String, u64>,
    /// For each mesh that a worker got: it had loaded what this one makes it answer for.
    pub held: Vec<bool>,
    /// Workers that do not load, by revision.
    pub stuck: Vec<String>,
    /// Workers that drain still have requests.
    pub busy: bool,
    /// Rows that each worker gives to the experts of one layer, again and again.
    pub routed: Option<(u32, Vec<u64>)>,
}

/// Shared between the doubles and the test.
pub type Shared = Arc<Mutex<Stage>>;

/// Says hello to every operator, and answers.
pub struct Process {
    say: mpsc::Sender<proto::Report>,
    told: std::pin::Pin<Box<dyn futures::Stream<Item = Instruction> + Send>>,
}

impl Process {
    fn connect(operators: &[String], hello: proto::Hello) -> Self {
        let (say, reports) = mpsc::channel(64);
        let told = wire::fleet::watch(operators.to_vec(), move || hello.clone(), reports);
        Self { say, told: Box::pin(told) }
    }

    async fn say(&mut self, report: Say) {
        self.say.send(proto::Report { report: Some(report) }).await.unwrap();
    }

    async fn acknowledge(&mut self, model: String, version: Option<proto::Version>) {
        self.say(Say::Acknowledgement(proto::Acknowledgement { model, version })).await;
    }
}

/// A router: takes every snapshot, and tells its load.
pub fn router(operators: &[String], id: &str, stage: &Shared, tasks: &mut JoinSet<()>) {
    let hello = proto::Hello { http_address: "127.0.0.1:8080".to_owned(), ..hello(Role::Router, id) };
    let (mut process, stage) = (Process::connect(operators, hello), stage.clone());
    tasks.spawn(async move {
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(100));
        loop {
            tokio::select! {
                _ = tick.tick() => process.say(Say::RouterLoad(load(&stage))).await,
                told = process.told.next() => match told.and_then(|told| told.instruction) {
                    Some(Told::Model(snapshot)) => {
                        let (model, version) = (snapshot.model.clone(), snapshot.version);
                        {
                            let mut stage = stage.lock().unwrap();
                            stage.seen.push(snapshot.clone());
                            stage.snapshots.insert(model.clone(), snapshot);
                        }
                        process.acknowledge(model, version).await;
                    }
                    Some(Told::Removed(removed)) => {
                        stage.lock().unwrap().snapshots.remove(&removed.model);
                    }
                    Some(_) => {}
                    None => return,
                },
            }
        }
    });
}

fn load(stage: &Shared) -> proto::RouterLoad {
    let stage = stage.lock().unwrap();
    let load = |model: &String| proto::ModelLoad {
        model: model.clone(),
        queued: stage.queued.get(model).copied().unwrap_or(0),
        ..proto::ModelLoad::default()
    };
    proto::RouterLoad { models: stage.snapshots.keys().map(load).collect() }
}

/// Where a worker stands, from its pod.
#[derive(Clone)]
pub struct Place {
    /// The pod's UID.
    pub id: String,
    /// NAMESPACE/NAME.
    pub model: String,
    /// From the pod's labels.
    pub revision: String,
    /// From the pod's labels.
    pub replica: u32,
    /// From the pod's labels.
    pub ordinal: u32,
    /// From the container's arguments.
    pub content_hash: String,
}

/// A worker: loads what the mesh says, and drains when it says so.
pub fn worker(operators: &[String], place: Place, stage: &Shared, tasks: &mut JoinSet<()>) {
    let hello = proto::Hello {
        model: place.model.clone(),
        revision: place.revision.clone(),
        replica: place.replica,
        ordinal: place.ordinal,
        content_hash: place.content_hash.clone(),
        address: "127.0.0.1:9000".to_owned(),
        ..hello(Role::Worker, &place.id)
    };
    let (mut process, stage) = (Process::connect(operators, hello), stage.clone());
    tasks.spawn(async move {
        let (mut loaded, mut draining) = (None, None);
        let mut turns = tokio::time::interval(std::time::Duration::from_millis(20));
        let (mut loads, mut given) = (tokio::time::interval(std::time::Duration::from_millis(100)), 0);
        loop {
            let told = tokio::select! {
                _ = loads.tick() => {
                    let routed = stage.lock().unwrap().routed.clone();
                    if let Some((layer, rows)) = routed {
                        given += 1;
                        let rows = rows.into_iter().map(|rows| rows * given).collect();
                        let layers = vec![proto::LayerLoad { layer, rows }];
                        process.say(Say::ExpertLoad(proto::ExpertLoad { layers })).await;
                    }
                    continue;
                }
                told = process.told.next() => told,
                _ = turns.tick(), if draining.is_some() => {
                    if !stage.lock().unwrap().busy {
                        stage.lock().unwrap().phases.insert(place.id.clone(), Phase::Drained);
                        let state = proto::WorkerState { phase: Phase::Drained.into(), placement: draining.take() };
                        process.say(Say::WorkerState(state)).await;
                    }
                    continue;
                }
            };
            let Some(told) = told else { return };
            let Some(Told::Mesh(mesh)) = told.instruction else {
                continue;
            };
            let asked = experts(mesh.placement.as_ref(), place.ordinal);
            let held = loaded.as_ref().is_none_or(|loaded| asked.is_subset(loaded));
            stage.lock().unwrap().held.push(held);
            loaded = Some(asked.into_iter().chain(experts(mesh.also_hold.as_ref(), place.ordinal)).collect());
            let stuck = stage.lock().unwrap().stuck.contains(&place.revision);
            let busy = stage.lock().unwrap().busy;
            let phase = match (stuck, mesh.drain) {
                (true, _) => Phase::Loading,
                (false, true) if busy => Phase::Draining,
                (false, true) => Phase::Drained,
                (false, false) => Phase::Serving,
            };
            draining = mesh.version.filter(|_| phase == Phase::Draining);
            stage.lock().unwrap().phases.insert(place.id.clone(), phase);
            let state = proto::WorkerState { phase: phase.into(), placement: mesh.version };
            process.say(Say::WorkerState(state)).await;
            process.say(Say::WorkerLoad(proto::WorkerLoad::default())).await;
            process.acknowledge(mesh.model, mesh.version).await;
        }
    });
}

/// Layer and expert of each that this ordinal holds.
fn experts(placement: Option<&proto::Placement>, ordinal: u32) -> BTreeSet<(u32, usize)> {
    let layers = placement.into_iter().flat_map(|placement| &placement.layers);
    let of = |layer: &proto::LayerPlacement| {
        let experts = layer.experts.iter().enumerate();
        let held = experts.filter(|(_, holders)| holders.ordinals.contains(&ordinal));
        held.map(|(expert, _)| (layer.layer, expert)).collect::<Vec<_>>()
    };
    layers.flat_map(of).collect()
}

/// A describer: tells what the model weighs.
pub fn describer(operators: &[String], place: Place, json: String, tasks: &mut JoinSet<()>) {
    let hello = proto::Hello { model: place.model, revision: place.revision, ..hello(Role::Describe, &place.id) };
    let mut process = Process::connect(operators, hello);
    tasks.spawn(async move {
        process.say(Say::Description(proto::Description { json: json.into_bytes().into() })).await;
        while process.told.next().await.is_some() {}
    });
}

fn hello(role: Role, id: &str) -> proto::Hello {
    proto::Hello { role: role.into(), id: id.to_owned(), process: format!("{id} 1"), ..proto::Hello::default() }
}
