//! The control stream over loopback: routers and workers are the client's side of `wire`, the reconciler is the test.

use std::{pin::Pin, time::Duration};

use futures::{Stream, StreamExt as _};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{sleep, timeout},
};
use wire::proto::{
    self, Instruction, MeshSnapshot, ModelSnapshot, hello::Role, instruction::Instruction as Told,
    report::Report as Say, worker_state::Phase,
};

use super::*;

const MODEL: &str = "default/tiny";
const PATIENCE: Duration = Duration::from_secs(20);

async fn serving(fleet: &Fleet) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let fleet = fleet.clone();
    tokio::spawn(async move { fleet.serve(listener, std::future::pending()).await });
    address
}

fn identity(id: &str) -> Identity {
    Identity { id: id.to_owned(), ip: Some("127.0.0.1".parse().unwrap()) }
}

/// A process at the other end.
struct Peer {
    say: mpsc::Sender<proto::Report>,
    instructions: Pin<Box<dyn Stream<Item = Instruction> + Send>>,
}

impl Peer {
    fn connect(address: &str, hello: proto::Hello) -> Self {
        let (say, reports) = mpsc::channel(16);
        let instructions = wire::fleet::watch(vec![address.to_owned()], move || hello.clone(), reports);
        Self { say, instructions: Box::pin(instructions) }
    }

    fn router(address: &str, id: &str) -> Self {
        Self::connect(address, proto::Hello { http_address: "127.0.0.1:8080".to_owned(), ..hello(Role::Router, id) })
    }

    fn worker(address: &str, id: &str, ordinal: u32) -> Self {
        Self::connect(address, worker_hello(id, ordinal))
    }

    async fn say(&self, report: Say) {
        self.say.send(proto::Report { report: Some(report) }).await.unwrap();
    }

    async fn told(&mut self) -> Told {
        let next = timeout(PATIENCE, self.instructions.next()).await.expect("told in time");
        next.unwrap().instruction.unwrap()
    }

    async fn model(&mut self) -> ModelSnapshot {
        loop {
            if let Told::Model(model) = self.told().await {
                return model;
            }
        }
    }

    async fn mesh(&mut self) -> MeshSnapshot {
        match self.told().await {
            Told::Mesh(mesh) => mesh,
            other => panic!("not a mesh: {other:?}"),
        }
    }

    async fn serves(&self, placement: Option<proto::Version>) {
        self.phase(Phase::Serving, placement).await;
    }

    async fn phase(&self, phase: Phase, placement: Option<proto::Version>) {
        self.say(Say::WorkerState(proto::WorkerState { phase: phase.into(), placement })).await;
    }

    async fn queued(&self, queued: u64) {
        let load = proto::ModelLoad { model: MODEL.to_owned(), queued, running: 2, ..Default::default() };
        self.say(Say::RouterLoad(proto::RouterLoad { models: vec![load] })).await;
    }

    async fn acknowledge(&self, version: Option<proto::Version>) {
        let model = MODEL.to_owned();
        self.say(Say::Acknowledgement(proto::Acknowledgement { model, version })).await;
    }

    /// Nothing can be waited for, so a short time must do: too short a one passes a bad test, and fails no good one.
    async fn is_told_nothing(&mut self) {
        let told = timeout(Duration::from_millis(300), self.instructions.next()).await;
        assert!(told.is_err(), "{told:?}");
    }
}

fn hello(role: Role, id: &str) -> proto::Hello {
    proto::Hello { role: role.into(), id: id.to_owned(), process: format!("{id} 1"), ..Default::default() }
}

fn worker_hello(id: &str, ordinal: u32) -> proto::Hello {
    proto::Hello {
        model: MODEL.to_owned(),
        revision: "r1".to_owned(),
        ordinal,
        address: format!("127.0.0.1:900{ordinal}"),
        content_hash: "hash".to_owned(),
        ..hello(Role::Worker, id)
    }
}

/// One replica of two workers, w0 and w1, with one expert each.
fn facts() -> ModelFacts {
    let worker = |ordinal: u32| WorkerFacts {
        id: format!("w{ordinal}"),
        address: String::new(),
        dns_name: String::new(),
        ordinal,
        ready: false,
        leaves: false,
    };
    let layer = planner::placement::LayerPlacement { layer: 1, experts: vec![vec![0], vec![1]] };
    ModelFacts {
        served_names: vec!["tiny".to_owned()],
        created: 1,
        availability: Availability::Serving,
        max_pending: 101,
        max_wait: Duration::from_secs(1),
        max_context_tokens: 8,
        migration_attempts: 3,
        expert_wait: Some(Duration::from_millis(1500)),
        replicas: vec![ReplicaFacts {
            replica: 0,
            revision: "r1".to_owned(),
            content_hash: "hash".to_owned(),
            placement: planner::Placement { shards: 2, layers: vec![layer] },
            also_hold: None,
            draining: false,
            workers: vec![worker(0), worker(1)],
        }],
    }
}

fn leading() -> Fleet {
    let fleet = Fleet::new();
    fleet.expect(["r0", "r1", "w0", "w1"].map(identity));
    fleet.lead(1);
    fleet.publish(MODEL, facts());
    fleet.synced([MODEL.to_owned()]);
    fleet
}

/// Looks at the view, after every change, until it is as wanted.
async fn until(fleet: &Fleet, wanted: impl Fn(&FleetView) -> bool) -> FleetView {
    let seen = async {
        loop {
            let view = fleet.seen(MODEL);
            if wanted(&view) {
                return view;
            }
            sleep(Duration::from_millis(5)).await; // polls
        }
    };
    let last = timeout(PATIENCE, seen).await;
    last.unwrap_or_else(|_| panic!("never seen; the last was {:#?}", fleet.seen(MODEL)))
}

#[tokio::test]
async fn leader_speaks_and_follower_is_silent() {
    let (leader, follower) = (leading(), Fleet::new());
    follower.expect([identity("r0")]);
    follower.publish(MODEL, facts());
    let (first, second) = (serving(&leader).await, serving(&follower).await);

    let mut silent = Peer::router(&second, "r0");
    until(&follower, |view| view.routers.len() == 1).await;
    silent.is_told_nothing().await;

    let mut router = Peer::router(&first, "r0");
    let model = router.model().await;
    assert_eq!(model.version, Some(proto::Version { epoch: 1, sequence: 2 }));
    assert_eq!((model.model.as_str(), model.served_names.as_slice()), (MODEL, ["tiny".to_owned()].as_slice()));
    assert_eq!(router.told().await, Told::Synced(proto::Synced {}));
}

#[tokio::test]
async fn router_is_synced_only_when_all_models_are_published() {
    let fleet = Fleet::new();
    fleet.expect([identity("r0")]);
    fleet.lead(1);
    fleet.synced([MODEL.to_owned(), "default/late".to_owned()]);
    fleet.publish(MODEL, facts());
    let mut router = Peer::router(&serving(&fleet).await, "r0");
    assert_eq!(router.model().await.model, MODEL);
    router.is_told_nothing().await;
    fleet.publish("default/late", ModelFacts { replicas: Vec::new(), ..facts() });
    assert_eq!(router.model().await.model, "default/late");
    assert_eq!(router.told().await, Told::Synced(proto::Synced {}));
    fleet.remove("default/late");
    assert_eq!(router.told().await, Told::Removed(proto::ModelRemoved { model: "default/late".to_owned() }));
}

#[tokio::test]
async fn higher_epoch_in_a_hello_is_exceeded() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let mut router = Peer::router(&address, "r0");
    assert_eq!(router.model().await.version.unwrap().epoch, 1);
    let mut ahead = by_hand(&address, proto::Hello { epoch: 41, ..hello(Role::Router, "r1") }).await;
    assert_eq!(ahead.model().await.version.unwrap().epoch, 42);
    assert_eq!(router.model().await.version.unwrap().epoch, 42);
    assert_eq!(fleet.epoch(), Some(42));
}

/// The Lease counts holders. A leader that let go of it and took it back counted once more than the Lease, and the next
/// one begins where that one was: its versions would be older than what the processes have.
#[tokio::test]
async fn epoch_that_a_process_has_from_another_leader_is_not_used_again() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let mut router = by_hand(&address, proto::Hello { epoch: 1, ..hello(Role::Router, "r1") }).await;
    let told = router.model().await.version.unwrap();
    assert!(told.epoch > 1, "{told:?}");
    assert_eq!(fleet.epoch(), Some(told.epoch));
}

/// A process whose hello has the epoch that is given, and not the one that `watch` heard.
async fn by_hand(address: &str, hello: proto::Hello) -> Peer {
    let (say, reports) = mpsc::channel(1);
    say.send(proto::Report { report: Some(Say::Hello(hello)) }).await.unwrap();
    let mut client = proto::fleet_client::FleetClient::new(wire::connect(address));
    let reports = tokio_stream::wrappers::ReceiverStream::new(reports);
    let instructions = client.watch(reports).await.unwrap().into_inner();
    Peer { say, instructions: Box::pin(instructions.map(Result::unwrap)) }
}

#[tokio::test]
async fn new_leader_starts_above_every_epoch_that_was_acknowledged() {
    let fleet = Fleet::new();
    fleet.expect([identity("r0")]);
    let router = Peer::router(&serving(&fleet).await, "r0");
    router.acknowledge(Some(proto::Version { epoch: 7, sequence: 3 })).await;
    until(&fleet, |view| view.routers.first().is_some_and(|router| router.acknowledged.is_some())).await;
    fleet.lead(2);
    assert_eq!(fleet.epoch(), Some(8));
    fleet.follow();
    fleet.lead(2);
    assert_eq!(fleet.epoch(), Some(9));
}

#[tokio::test]
async fn unknown_id_is_neither_told_nor_seen_until_it_is_expected() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let mut stranger = Peer::router(&address, "nobody");
    stranger.is_told_nothing().await;
    assert_eq!(fleet.seen(MODEL).routers, []);
    fleet.expect([identity("nobody")]);
    assert_eq!(stranger.model().await.model, MODEL);
    fleet.expect([]);
    until(&fleet, |view| view.routers.is_empty()).await;
}

#[tokio::test]
async fn an_id_from_another_address_does_not_count() {
    let fleet = leading();
    fleet.expect([Identity { id: "r0".to_owned(), ip: Some("10.0.0.1".parse().unwrap()) }]);
    let mut router = Peer::router(&serving(&fleet).await, "r0");
    router.is_told_nothing().await;
    assert_eq!(fleet.seen(MODEL).routers, []);
}

#[tokio::test]
async fn snapshot_is_sent_again_only_if_it_changed() {
    let fleet = leading();
    let mut router = Peer::router(&serving(&fleet).await, "r0");
    let first = router.model().await;
    assert_eq!(router.told().await, Told::Synced(proto::Synced {}));
    fleet.publish(MODEL, facts());
    router.is_told_nothing().await;
    fleet.publish(MODEL, ModelFacts { served_names: vec!["other".to_owned()], ..facts() });
    let second = router.model().await;
    assert_eq!(second.served_names, ["other"]);
    assert!(Version::from(second.version.unwrap()) > Version::from(first.version.unwrap()));
}

#[tokio::test]
async fn routers_share_the_queue() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let mut first = Peer::router(&address, "r0");
    let model = first.model().await;
    assert_eq!((model.max_pending, model.migration_attempts), (101, 3));
    let mut second = Peer::router(&address, "r1");
    assert_eq!(second.model().await.max_pending, 50);
    assert_eq!(first.model().await.max_pending, 51);
    drop(second); // and its lease ends
    loop {
        first.queued(0).await;
        match timeout(Duration::from_millis(200), first.model()).await {
            Ok(model) => break assert_eq!(model.max_pending, 101),
            Err(_) => assert!(fleet.epoch().is_some()),
        }
    }
}

#[tokio::test]
async fn workers_reach_routers_when_their_replica_is_whole_and_count_as_routed_when_acknowledged() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let mut router = Peer::router(&address, "r0");
    assert_eq!(router.model().await.workers, []);
    let (mut w0, mut w1) = (Peer::worker(&address, "w0", 0), Peer::worker(&address, "w1", 1));
    let placement = w0.mesh().await.version;
    w0.serves(placement).await;
    let half = router.model().await;
    assert_eq!(half.workers.len(), 1);
    assert!(half.workers[0].draining, "the other expert has no holder yet");
    let placement = w1.mesh().await.version;
    w1.serves(placement).await;
    let whole = loop {
        let model = router.model().await;
        if model.workers.len() == 2 {
            break model;
        }
    };
    assert!(whole.workers.iter().all(|worker| !worker.draining));
    assert_eq!(whole.workers[1].address, "127.0.0.1:9001");
    let view = until(&fleet, |view| view.workers.len() == 2).await;
    assert!(view.workers.iter().all(|worker| worker.placement_loaded && !worker.routed));
    router.acknowledge(whole.version).await;
    until(&fleet, |view| view.workers.iter().all(|worker| worker.routed)).await;
    let mesh = loop {
        let mesh = w0.mesh().await;
        if mesh.peers[0].loaded {
            break mesh;
        }
    };
    w0.acknowledge(mesh.version).await;
    until(&fleet, |view| view.workers[0].acknowledged).await;
}

#[tokio::test]
async fn mesh_names_placement_and_the_others() {
    let fleet = leading();
    let mut w0 = Peer::worker(&serving(&fleet).await, "w0", 0);
    let mesh = w0.mesh().await;
    let placement = mesh.placement.unwrap();
    assert_eq!((placement.shards, placement.layers.len()), (2, 1));
    assert_eq!(placement.layers[0].experts[1].ordinals, [1]);
    let peers: Vec<&str> = mesh.peers.iter().map(|peer| peer.id.as_str()).collect();
    assert_eq!(peers, ["w1"]);
    let mut draining = facts();
    draining.replicas[0].draining = true;
    fleet.publish(MODEL, draining);
    assert!(w0.mesh().await.drain);
}

#[tokio::test]
async fn mesh_names_what_to_hold_besides_how_long_to_wait_and_the_replicas_that_hold_the_same() {
    let fleet = leading();
    fleet.expect(["w0", "w1", "w2", "w3"].map(identity));
    let mut wider = facts();
    let mut twin = wider.replicas[0].clone();
    (twin.replica, twin.workers[0].id, twin.workers[1].id) = (1, "w2".to_owned(), "w3".to_owned());
    let other = ReplicaFacts { replica: 2, revision: "r2".to_owned(), workers: Vec::new(), ..twin.clone() };
    let swapped = planner::placement::LayerPlacement { layer: 1, experts: vec![vec![1], vec![0]] };
    wider.replicas[0].also_hold = Some(planner::Placement { shards: 2, layers: vec![swapped] });
    wider.replicas.extend([twin, other]);
    fleet.publish(MODEL, wider);
    let mesh = Peer::worker(&serving(&fleet).await, "w0", 0).mesh().await;
    assert_eq!(mesh.also_hold.unwrap().layers[0].experts[0].ordinals, [1]);
    assert_eq!(mesh.max_wait_ms, 1500);
    let others: Vec<u32> = mesh.others.iter().map(|other| other.replica).collect();
    assert_eq!(others, [1], "another revision numbers its replicas anew");
    let peers: Vec<(&str, u32)> = mesh.peers.iter().map(|peer| (peer.id.as_str(), peer.replica)).collect();
    assert_eq!(peers, [("w1", 0), ("w2", 1), ("w3", 1)]);
}

#[tokio::test]
async fn rows_of_experts_and_suspicions_are_summed_over_the_workers() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let (w0, w1) = (Peer::worker(&address, "w0", 0), Peer::worker(&address, "w1", 1));
    // loads go only to operators that listen: the next one has it all
    until(&fleet, |view| view.workers.len() == 2).await;
    let load = |rows: [u64; 2]| {
        let layers = vec![proto::LayerLoad { layer: 1, rows: rows.to_vec() }];
        Say::ExpertLoad(proto::ExpertLoad { layers })
    };
    let rows = |view: &FleetView| view.expert_loads.first().map(|load| load.rows[&1].clone());
    w0.say(load([10, 0])).await;
    until(&fleet, |view| rows(view) == Some(vec![10, 0])).await;
    w1.say(load([1, 1])).await;
    until(&fleet, |view| rows(view) == Some(vec![11, 1])).await;
    w0.say(load([20, 5])).await;
    w0.say(Say::Suspects(proto::Suspects { ids: vec!["w1".to_owned()] })).await;
    let suspected = |view: &FleetView| view.workers.iter().map(|worker| worker.suspected_by).collect::<Vec<_>>();
    // of worker 0: ten that count nine by now, and ten more
    let view = until(&fleet, |view| rows(view) == Some(vec![20, 6]) && suspected(view) == [0, 1]).await;
    let loads = &view.expert_loads[..];
    assert_eq!((loads.len(), loads[0].revision.as_str(), loads[0].replica), (1, "r1", 0));
    w1.say(Say::Suspects(proto::Suspects { ids: vec!["w0".to_owned()] })).await;
    until(&fleet, |view| suspected(view) == [1, 1]).await;
    drop(w1);
    // who is gone neither gives rows nor suspects
    until(&fleet, |view| rows(view) == Some(vec![19, 5]) && suspected(view) == [0, 1]).await;
}

#[tokio::test]
async fn rows_of_experts_wake_the_reconciler_when_they_have_doubled() {
    let fleet = leading();
    let worker = Peer::worker(&serving(&fleet).await, "w0", 0);
    until(&fleet, |view| view.workers.len() == 1).await;
    let mut changed = Box::pin(fleet.changed());
    while timeout(Duration::from_millis(200), changed.next()).await.is_ok() {}
    for (rows, wakes) in [(0, false), (1, true), (1, false), (2, true), (3, false), (1000, true)] {
        let layers = vec![proto::LayerLoad { layer: 1, rows: vec![rows, 0] }];
        worker.say(Say::ExpertLoad(proto::ExpertLoad { layers })).await;
        let patience = if wakes { PATIENCE } else { Duration::from_millis(200) };
        assert_eq!(timeout(patience, changed.next()).await.is_ok(), wakes, "{rows} rows");
    }
}

#[tokio::test]
async fn draining_worker_leaves_and_without_requests_holds_nobody_up() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let (mut w0, w1) = (Peer::worker(&address, "w0", 0), Peer::worker(&address, "w1", 1));
    w1.phase(Phase::Draining, None).await;
    let told = |mesh: MeshSnapshot| (mesh.peers[0].loaded, mesh.peers[0].running, mesh.peers[0].leaving);
    while told(w0.mesh().await) != (true, true, true) {}
    w1.say(Say::WorkerLoad(proto::WorkerLoad::default())).await;
    while told(w0.mesh().await) != (true, false, true) {}
}

#[tokio::test]
async fn stale_load_is_none() {
    let fleet = leading();
    let router = Peer::router(&serving(&fleet).await, "r0");
    until(&fleet, |view| view.routers.len() == 1 && view.load.is_none()).await;
    router.queued(5).await;
    let view = until(&fleet, |view| view.load.is_some()).await;
    assert_eq!(view.load.unwrap(), LoadView { queued: 5, running: 2, ..Default::default() });
    until(&fleet, |view| view.routers.is_empty() && view.load.is_none()).await;
}

#[tokio::test]
async fn first_request_for_a_model_wakes_the_reconciler() {
    let fleet = leading();
    let router = Peer::router(&serving(&fleet).await, "r0");
    until(&fleet, |view| view.routers.len() == 1).await;
    let mut changed = Box::pin(fleet.changed());
    while timeout(Duration::from_millis(200), changed.next()).await.is_ok() {}
    router.queued(0).await;
    router.queued(1).await;
    assert_eq!(timeout(PATIENCE, changed.next()).await.unwrap().unwrap(), MODEL);
}

#[tokio::test]
async fn what_a_worker_said_outlives_its_stream_but_not_its_process() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let worker = Peer::worker(&address, "w0", 0);
    worker.serves(None).await;
    until(&fleet, |view| view.workers.first().is_some_and(|worker| worker.phase == WorkerPhase::Serving)).await;
    drop(worker);
    let view = until(&fleet, |view| !view.workers[0].connected).await;
    assert_eq!(view.workers[0].phase, WorkerPhase::Serving);
    let twin = proto::Hello { process: "w0 2".to_owned(), ..worker_hello("w0", 0) };
    let _twin = Peer::connect(&address, twin);
    let view = until(&fleet, |view| view.workers[0].connected).await;
    assert_eq!(view.workers[0].phase, WorkerPhase::Unspecified);
}

#[tokio::test]
async fn new_leader_takes_no_ready_worker_from_the_routers() {
    let fleet = Fleet::new();
    fleet.expect([identity("r0")]);
    fleet.lead(1);
    let mut before = facts();
    before.replicas[0].workers.iter_mut().for_each(|worker| worker.ready = true);
    fleet.publish(MODEL, before);
    let mut router = Peer::router(&serving(&fleet).await, "r0");
    let workers = router.model().await.workers;
    assert_eq!(workers.iter().filter(|worker| !worker.draining).count(), 2);
}

#[tokio::test]
async fn fetchers_and_describers_are_heard() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let hello = |role, id| proto::Hello { role: i32::from(role), process: "other".to_owned(), ..worker_hello(id, 0) };
    let fetcher = Peer::connect(&address, hello(Role::Fetch, "w0"));
    let describer = Peer::connect(&address, hello(Role::Describe, "w1"));
    let progress = proto::Progress { phase: ProgressPhase::Downloading.into(), done_bytes: 41, total_bytes: 100 };
    until(&fleet, |view| !view.fetchers.is_empty()).await;
    fetcher.say(Say::Progress(progress)).await;
    describer.say(Say::Description(proto::Description { json: b"{}".as_slice().into() })).await;
    let view = until(&fleet, |view| !view.descriptions.is_empty()).await;
    assert_eq!(view.descriptions, [DescriptionView { revision: "r1".to_owned(), json: b"{}".to_vec() }]);
    until(&fleet, |view| view.fetchers[0].progress.is_some_and(|progress| progress.percent() == 41)).await;
    let failure = proto::Failure { reason: "GatedModel".to_owned(), message: "ask for access".to_owned() };
    fetcher.say(Say::Failure(failure)).await;
    let view = until(&fleet, |view| !view.failures.is_empty()).await;
    assert_eq!((view.failures[0].reason.as_str(), view.failures[0].role), ("GatedModel", Role::Fetch));
}

#[tokio::test]
async fn what_was_said_before_the_process_was_expected_counts_and_only_then_the_stream_ends() {
    let fleet = Fleet::new();
    fleet.lead(1);
    let address = serving(&fleet).await;
    let (say, reports) = mpsc::channel(2);
    let hello = proto::Hello { role: Role::Describe.into(), ..worker_hello("d0", 0) };
    let description = proto::Description { json: b"{}".as_slice().into() };
    for report in [Say::Hello(hello), Say::Description(description)] {
        say.send(proto::Report { report: Some(report) }).await.unwrap();
    }
    drop(say);
    let mut client = proto::fleet_client::FleetClient::new(wire::connect(&address));
    let reports = tokio_stream::wrappers::ReceiverStream::new(reports);
    let mut instructions = client.watch(reports).await.unwrap().into_inner();
    assert!(timeout(Duration::from_millis(200), instructions.message()).await.is_err(), "nobody expected it yet");
    fleet.expect([identity("d0")]);
    assert_eq!(timeout(PATIENCE, instructions.message()).await.unwrap().unwrap(), None);
    assert_eq!(fleet.seen(MODEL).descriptions.len(), 1);
}

#[tokio::test]
async fn a_failure_that_is_tried_again_stands_until_it_is_overcome() {
    let fleet = leading();
    let address = serving(&fleet).await;
    let hello = |process: &str| proto::Hello {
        role: Role::Describe.into(),
        process: process.to_owned(),
        ..worker_hello("w0", 0)
    };
    let first = Peer::connect(&address, hello("first"));
    let failure = proto::Failure { reason: "SourceNotFound".to_owned(), message: "no such repository".to_owned() };
    first.say(Say::Failure(failure)).await;
    until(&fleet, |view| !view.failures.is_empty()).await;
    let second = Peer::connect(&address, hello("second"));
    drop(first);
    second.say(Say::Description(proto::Description { json: b"{}".as_slice().into() })).await;
    let view = until(&fleet, |view| view.failures.is_empty()).await;
    assert_eq!(view.descriptions.len(), 1, "it went only when it was overcome");
}

#[tokio::test]
async fn a_stream_that_does_not_begin_with_a_hello_ends() {
    let address = serving(&leading()).await;
    let (say, reports) = mpsc::channel(1);
    say.send(proto::Report { report: Some(Say::WorkerLoad(proto::WorkerLoad::default())) }).await.unwrap();
    let mut client = proto::fleet_client::FleetClient::new(wire::connect(&address));
    let reports = tokio_stream::wrappers::ReceiverStream::new(reports);
    let mut instructions = client.watch(reports).await.unwrap().into_inner();
    let status = timeout(PATIENCE, instructions.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn streams_end_when_the_server_shuts_down() {
    let fleet = leading();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn({
        let fleet = fleet.clone();
        async move { fleet.serve(listener, async { drop(stopped.await) }).await }
    });
    let mut router = Peer::router(&address, "r0");
    router.model().await;
    stop.send(()).unwrap();
    timeout(PATIENCE, server).await.unwrap().unwrap().unwrap();
}
