//! The processes of local mode: who they are, what becomes of them, and what is written about them.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::{StreamExt as _, future::join_all, stream::BoxStream};
use tokio::{net::TcpListener, sync::mpsc};

use super::{
    Error, Options, Output, Planned, Tools,
    ask::ask,
    child::{Child, Event, STANDARD_INPUT},
    experts::Shown,
    prepare,
};
use crate::{
    control::{Availability, Fleet, Identity, ModelFacts, ReplicaFacts, WorkerFacts},
    launch::{self, Launch, Program, Route, Serve, Site},
    table::{self, aligned},
};

/// A child that dies so often before all are ready will not come up.
const HOPELESS: u32 = 3;
/// What a child gets to end beyond the time in which it may finish its requests.
const MARGIN: Duration = Duration::from_secs(5);
/// The revision of everything that runs here: nothing is ever rolled.
const REVISION: &str = "local";

/// A model whose files are on this machine.
pub(super) struct Started {
    pub(super) planned: Planned,
    pub(super) folder: PathBuf,
}

pub(super) struct Crew<'a> {
    options: &'a Options,
    fleet: Fleet,
    operators: Vec<String>,
    output: Output<'a>,
    /// Models of which the fleet heard something.
    heard: BoxStream<'static, String>,
    events: mpsc::Receiver<Event>,
    report: mpsc::Sender<Event>,
    router: Option<Member>,
    workers: Vec<Member>,
    pids: BTreeMap<String, u32>,
    /// The table as written, with its head.
    table: Vec<[String; 4]>,
    ready: bool,
    grace: Duration,
}

/// Who is to be started, and how.
type Recruits = Vec<(Member, Launch)>;

struct Member {
    name: String,
    /// Proves to the fleet who it is.
    token: String,
    /// NAMESPACE/NAME; empty for the router.
    model: String,
    experts: String,
    child: Option<Child>,
}

impl<'a> Crew<'a> {
    pub(super) fn new(
        options: &'a Options,
        fleet: Fleet,
        operator: SocketAddr,
        output: Output<'a>,
    ) -> Result<Self, Error> {
        for program in [Program::Router, Program::Worker] {
            let path = options.programs.join(program.file_name());
            if !path.is_file() {
                return Err(Error::NoProgram(path));
            }
        }
        let (report, events) = mpsc::channel(64);
        fleet.lead(1);
        Ok(Self {
            options,
            heard: fleet.changed().boxed(),
            fleet,
            operators: vec![operator.to_string()],
            output,
            events,
            report,
            router: None,
            workers: Vec::new(),
            pids: BTreeMap::new(),
            table: Vec::new(),
            ready: false,
            grace: MARGIN,
        })
    }

    pub(super) fn tools(&self) -> Tools<'a> {
        Tools { programs: &self.options.programs, cache: &self.options.cache }
    }

    /// The folder with the model's files, fetched if need be; how far that is is written in steps of a tenth.
    pub(super) async fn fetch(&mut self, planned: &Planned) -> Result<PathBuf, Error> {
        let token = token()?;
        self.fleet.expect([identity(&token)]);
        let (tools, model) = (self.tools(), &planned.accepted.name);
        let mut fetched = std::pin::pin!(prepare::fetch(planned, tools, &self.operators, &token));
        let mut written = 0;
        loop {
            tokio::select! {
                fetched = &mut fetched => return Ok(fetched?),
                Some(_) = self.heard.next() => {
                    let progress = self.fleet.seen(model).fetchers.first().and_then(|fetcher| fetcher.progress);
                    let percent = progress.map_or(0, |progress| progress.percent() / 10 * 10);
                    if percent > written {
                        written = percent;
                        note(&mut self.output, &format!("{model} is being fetched: {percent} %"));
                    }
                }
            }
        }
    }

    /// Tells the fleet what there is, and starts the router and all workers. Returns what the board is to show.
    pub(super) async fn start(&mut self, models: Vec<Started>) -> Result<Shown, Error> {
        self.reserve("http", self.options.http).await?;
        self.reserve("grpc", self.options.grpc).await?;
        let token = token()?;
        let (http, grpc) = (self.options.http.to_string(), self.options.grpc.to_string());
        let launch = launch::router(&Route { id: &token, http: &http, grpc: &grpc, operators: &self.operators });
        let mut launches: Recruits = vec![(Member::router(token), launch)];
        let mut facts = Vec::new();
        for model in &models {
            let (members, replicas) = self.workers_of(model)?;
            launches.extend(members);
            facts.push((model.planned.accepted.name.clone(), model_facts(&model.planned, replicas)));
            self.grace = self.grace.max(model.planned.accepted.model.drain_timeout + MARGIN);
        }
        self.fleet.expect(launches.iter().map(|(member, _)| identity(&member.token)));
        self.fleet.synced(facts.iter().map(|(name, _)| name.clone()));
        let mut shown = Shown { fleet: self.fleet.clone(), models: Vec::new() };
        for (name, facts) in facts {
            self.fleet.publish(&name, facts.clone());
            shown.models.push((name, facts.replicas));
        }
        for (mut member, launch) in launches {
            let report = self.report.clone();
            member.child = Some(Child::start(member.name.clone(), &self.options.programs, launch, report));
            if member.model.is_empty() { self.router = Some(member) } else { self.workers.push(member) }
        }
        Ok(shown)
    }

    /// A child would only say that it died.
    async fn reserve(&self, flag: &'static str, address: SocketAddr) -> Result<(), Error> {
        match TcpListener::bind(address).await {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::Listen { flag, address, source }),
        }
    }

    fn workers_of(&self, model: &Started) -> Result<(Recruits, Vec<ReplicaFacts>), Error> {
        let Planned { accepted, description, plan } = &model.planned;
        let (mut members, mut replicas) = (Vec::new(), Vec::new());
        for replica in 0..accepted.model.replicas.max(1) {
            let mut workers = Vec::new();
            for ordinal in 0..plan.shards {
                let token = token()?;
                let launch = launch::serve(&Serve {
                    site: Site::Child { id: &token },
                    model: &accepted.name,
                    model_dir: &model.folder.to_string_lossy(),
                    revision: REVISION,
                    content_hash: &description.content_hash,
                    replica,
                    ordinal,
                    placement_path: STANDARD_INPUT,
                    placement: &plan.placement,
                    kv_cache_tokens: plan.kv_cache_tokens.0,
                    max_context_tokens: plan.max_context_tokens.0,
                    drain_timeout: accepted.model.drain_timeout,
                    operators: &self.operators,
                    telemetry: &[],
                });
                workers.push(worker_facts(&token, ordinal));
                let member = Member {
                    name: member_name(&accepted.name, replica, ordinal),
                    token,
                    model: accepted.name.clone(),
                    experts: table::experts(&plan.placement.held_by(ordinal)),
                    child: None,
                };
                members.push((member, launch));
            }
            replicas.push(ReplicaFacts {
                replica,
                revision: REVISION.to_owned(),
                content_hash: description.content_hash.clone(),
                placement: plan.placement.clone(),
                also_hold: None,
                draining: false,
                workers,
            });
        }
        Ok((members, replicas))
    }

    /// Waits until every process has said where it is, and writes the table. Returns the router's HTTP address.
    pub(super) async fn introduce(&mut self) -> Result<SocketAddr, Error> {
        let (rows, http) = loop {
            if let Some(known) = self.rows() {
                break known;
            }
            self.news().await?;
        };
        drop(self.output.notes.write_all(aligned(&rows).as_bytes()));
        drop(self.output.notes.flush());
        self.table = rows;
        Ok(http)
    }

    /// Writes the new row of each worker that was started again, once it takes requests again.
    fn reintroduce(&mut self) {
        for worker in &self.workers {
            let seen = self.fleet.seen(&worker.model).workers;
            let back = seen.into_iter().find(|view| view.id == worker.token && view.routed);
            let row = back.and_then(|view| self.row(worker, &view.address));
            let known = self.table.iter().position(|known| known[0] == worker.name);
            let (Some(row), Some(at)) = (row, known) else { continue };
            if self.table[at][2] != row[2] {
                self.table[at] = row;
                let lines = aligned(&self.table);
                note(&mut self.output, lines.lines().nth(at).unwrap_or_default());
            }
        }
    }

    /// All rows, router first, and the router's HTTP address; nothing while one is missing.
    fn rows(&self) -> Option<(Vec<[String; 4]>, SocketAddr)> {
        let router = self.router.as_ref()?;
        let seen = self.fleet.seen(&self.workers.first()?.model).routers;
        let http = seen.into_iter().find(|view| view.id == router.token)?.http_address;
        let mut rows = vec![["NAME", "PID", "ADDRESS", "EXPERTS"].map(str::to_owned), self.row(router, &http)?];
        for worker in &self.workers {
            let seen = self.fleet.seen(&worker.model).workers;
            let address = seen.into_iter().find(|view| view.id == worker.token)?.address;
            rows.push(self.row(worker, &address)?);
        }
        Some((rows, http.parse().ok()?))
    }

    fn row(&self, member: &Member, address: &str) -> Option<[String; 4]> {
        let pid = self.pids.get(&member.name)?.to_string();
        Some([member.name.clone(), pid, address.to_owned(), member.experts.clone()])
    }

    /// Waits until the router sends requests to every worker.
    pub(super) async fn ready(&mut self) -> Result<(), Error> {
        while !self.workers.iter().all(|worker| self.is_routed(worker)) {
            self.news().await?;
        }
        self.ready = true;
        Ok(())
    }

    fn is_routed(&self, worker: &Member) -> bool {
        self.fleet.seen(&worker.model).workers.iter().any(|view| view.id == worker.token && view.routed)
    }

    /// Asks while the others are watched.
    pub(super) async fn ask(&mut self, router: SocketAddr, model: &str, prompt: &str) -> Result<(), Error> {
        let Self { output: Output { words, notes }, events, pids, .. } = self;
        let mut answered = std::pin::pin!(ask(router, model, prompt, *words));
        loop {
            tokio::select! {
                answered = &mut answered => return Ok(answered?),
                Some(event) = events.recv() => {
                    if let Some(line) = told(event, pids) {
                        write_line(*notes, &line);
                    }
                }
            }
        }
    }

    /// Says that all models can answer, and writes what happens from then on, for ever.
    pub(super) async fn watch(&mut self) -> Result<(), Error> {
        if let Some(admin) = self.options.admin {
            note(&mut self.output, &format!("experts: modelfleet experts NAME --local={admin}"));
        }
        note(&mut self.output, "ready");
        loop {
            self.news().await?;
            self.reintroduce();
        }
    }

    /// Waits for something to happen.
    async fn news(&mut self) -> Result<(), Error> {
        tokio::select! {
            Some(model) = self.heard.next() => self.check(&model),
            Some(event) = self.events.recv() => {
                if let Event::Died { name, how, deaths, .. } = &event
                    && *deaths >= HOPELESS
                    && !self.ready
                {
                    return Err(Error::Died { name: name.clone(), how: how.clone(), deaths: *deaths });
                }
                if let Some(line) = told(event, &mut self.pids) {
                    note(&mut self.output, &line);
                }
                Ok(())
            }
        }
    }

    /// A worker that says why it cannot load will not come up.
    fn check(&self, model: &str) -> Result<(), Error> {
        let failed = self.fleet.seen(model).failures.into_iter().next();
        match failed {
            Some(failure) if !self.ready => {
                let member = self.workers.iter().find(|worker| worker.token == failure.id);
                let name = member.map_or(model, |member| &member.name).to_owned();
                Err(Error::Failed { name, message: failure.message })
            }
            _ => Ok(()),
        }
    }

    /// Ends the router, which finishes its requests first, then all workers.
    pub(super) async fn end(mut self) {
        let grace = self.grace;
        if let Some(router) = self.router.take().and_then(|router| router.child) {
            router.end(grace).await;
        }
        let workers = self.workers.drain(..).filter_map(|worker| worker.child);
        let ended = join_all(workers.map(|worker| worker.end(grace)));
        let unread = async { while self.events.recv().await.is_some() {} };
        tokio::select! {
            _ = ended => {}
            () = unread => {}
        }
    }
}

impl Member {
    fn router(token: String) -> Self {
        let (name, experts) = ("router".to_owned(), "-".to_owned());
        Self { name, token, model: String::new(), experts, child: None }
    }
}

/// How a worker is called.
pub(super) fn member_name(model: &str, replica: u32, ordinal: u32) -> String {
    let short = model.strip_prefix("default/").unwrap_or(model);
    format!("{short}-{replica}-{ordinal}")
}

/// Notes the process id; what to write about it, if anything.
fn told(event: Event, pids: &mut BTreeMap<String, u32>) -> Option<String> {
    match event {
        Event::Started { name, pid } => {
            pids.insert(name, pid);
            None
        }
        Event::Died { name, how, pause, .. } => Some(format!("{name} {how}; starting it again in {pause:?}")),
    }
}

fn note(output: &mut Output<'_>, line: &str) {
    write_line(output.notes, line);
}

/// In one piece, for the children write their logs to the same place. That nobody reads it is no reason to stop.
fn write_line(notes: &mut dyn Write, line: &str) {
    drop(notes.write_all(format!("{line}\n").as_bytes()));
    drop(notes.flush());
}

fn identity(token: &str) -> Identity {
    Identity { id: token.to_owned(), ip: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)) }
}

/// 128 random bits.
fn token() -> Result<String, Error> {
    let mut bytes = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|source: io::Error| Error::Own { what: "draw a random token", source })?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

fn worker_facts(token: &str, ordinal: u32) -> WorkerFacts {
    let (address, dns_name) = (String::new(), String::new()); // its hello says where it is
    WorkerFacts { id: token.to_owned(), address, dns_name, ordinal, ready: false, leaves: false }
}

fn model_facts(planned: &Planned, replicas: Vec<ReplicaFacts>) -> ModelFacts {
    let model = &planned.accepted.model;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    ModelFacts {
        served_names: model.served_names.clone(),
        created: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        availability: Availability::Serving,
        max_pending: model.max_pending,
        max_wait: model.max_wait,
        max_context_tokens: u32::try_from(planned.plan.max_context_tokens.0).unwrap_or(u32::MAX),
        migration_attempts: model.migration_attempts,
        expert_wait: model.expert_wait,
        replicas,
    }
}
