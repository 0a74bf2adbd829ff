//! An API server in memory: enough of Kubernetes to run the operator against, and to break it on purpose.
//!
//! Objects live in one map. Server-side apply knows one field manager at a time, which is all the operator uses: a
//! field that the manager applied before and leaves out now is removed; the rest merges, lists with keys by key.
//! What belongs to controllers (pods of a StatefulSet, garbage collection) is in `cluster`.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use futures::{StreamExt, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame};
use kube::{Client, client::Body};
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use crate::path::{Path, plural};

type Key = (String, String, String);

/// What is done to a call instead of, or after, carrying it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answers with this status; nothing is written.
    Answer(u16),
    /// Writes, and never answers.
    LoseReply,
    /// Neither writes nor answers.
    Hang,
    /// Panics in the caller's task.
    Panic,
}

/// One call, as a fault plan sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Which write this is, from 1; 0 for reads.
    pub write: usize,
    /// HTTP method.
    pub method: String,
    /// Plural, and `/status` for that.
    pub resource: String,
    /// The object.
    pub name: String,
}

type Plan = Box<dyn FnMut(&Call) -> Option<Fault> + Send>;

/// The server. All clones are one.
#[derive(Clone, Default)]
pub struct Api(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<Key, Value>,
    /// What each object's manager applied last, for the main resource and for its status.
    applied: BTreeMap<(Key, bool), Value>,
    history: Vec<(u64, &'static str, String, Value)>,
    version: u64,
    uids: u64,
    calls: Vec<Call>,
    writes: usize,
    plan: Option<Plan>,
    /// The plural whose watches are silent.
    silent: Option<String>,
    /// What pods answer, by NAME:PORT/PATH.
    pages: BTreeMap<String, (u16, String)>,
    /// How often an older state came back.
    restored: usize,
}

/// What the server had at one moment.
pub struct Backup {
    objects: BTreeMap<Key, Value>,
    applied: BTreeMap<(Key, bool), Value>,
    version: u64,
}

impl Api {
    /// A client of this server. Its calls are counted as the operator's and suffer the fault plan.
    pub fn client(&self) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        Client::new(service, "default")
    }

    /// Installs a fault plan.
    pub fn break_by(&self, plan: impl FnMut(&Call) -> Option<Fault> + Send + 'static) {
        self.state(|state| state.plan = Some(Box::new(plan)));
    }

    /// Watches of a kind (by plural) tell nothing from now on, until it is another one's or nobody's turn.
    pub fn silence(&self, plural: Option<&str>) {
        self.state(|state| state.silent = plural.map(str::to_owned));
        self.0.changed.notify_waiters();
    }

    /// Ends the fault plan.
    pub fn mend(&self) {
        self.state(|state| state.plan = None);
    }

    /// The writes so far, in order, Leases and Events left out.
    pub fn writes(&self) -> Vec<Call> {
        self.state(|state| state.calls.clone())
    }

    /// All objects of a kind (by plural), by name.
    pub fn list(&self, plural: &str) -> Vec<Value> {
        self.state(|state| state.objects.iter().filter(|(key, _)| key.0 == plural).map(|(_, v)| v.clone()).collect())
    }

    /// One object.
    pub fn get(&self, plural: &str, name: &str) -> Option<Value> {
        self.list(plural).into_iter().find(|object| object["metadata"]["name"] == name)
    }

    /// Applies as a user would: not counted, no fault.
    pub fn apply(&self, object: Value) {
        let key = key(&plural(text(&object["kind"])), text(&object["metadata"]["name"]));
        let answer = self.state(|state| state.apply(&key, object, false));
        self.0.changed.notify_waiters();
        assert!(answer.is_ok(), "{answer:?}");
    }

    /// Changes an object as a controller or a user would: not counted, no fault. Says whether there is one.
    pub fn edit(&self, plural: &str, name: &str, edit: impl FnOnce(&mut Value)) -> bool {
        let found = self.state(|state| {
            let key = key(plural, name);
            let object = state.objects.get(&key).cloned();
            object.is_some_and(|mut object| {
                edit(&mut object);
                state.store(&key, object);
                true
            })
        });
        self.0.changed.notify_waiters();
        found
    }

    /// Deletes as a user would, without its dependents.
    pub fn delete(&self, plural: &str, name: &str) {
        self.state(|state| state.remove(&key(plural, name)));
        self.0.changed.notify_waiters();
    }

    /// What there is now.
    pub fn backup(&self) -> Backup {
        self.state(|state| Backup {
            objects: state.objects.clone(),
            applied: state.applied.clone(),
            version: state.version,
        })
    }

    /// Comes back with what there was then: versions go on from there, and watches of what came after it expire.
    pub fn restore(&self, backup: Backup) {
        self.state(|state| {
            state.history.retain(|(version, ..)| *version <= backup.version);
            (state.objects, state.applied, state.version) = (backup.objects, backup.applied, backup.version);
            state.restored += 1;
        });
        self.0.changed.notify_waiters();
    }

    /// Lets a pod answer at `NAME:PORT/PATH`, or no more.
    pub fn page(&self, at: &str, answer: Option<(u16, &str)>) {
        self.state(|state| match answer {
            Some((code, text)) => drop(state.pages.insert(at.to_owned(), (code, text.to_owned()))),
            None => drop(state.pages.remove(at)),
        });
    }

    fn state<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.state.lock().unwrap())
    }

    async fn answer(&self, request: Request<Body>) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
        let path = Path::parse(request.uri());
        let method = request.method().clone();
        let partial = request.headers().get("accept").is_some_and(|v| v.to_str().unwrap().contains("PartialObject"));
        let body = request.into_body().collect().await.unwrap().to_bytes();
        if path.watch {
            return self.watch(path);
        }
        let fault = self.state(|state| state.fault(&method, &path));
        match fault {
            Some(Fault::Answer(code)) => return reply(Err((code, "broken on purpose".to_owned()))),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Panic) => panic!("on purpose"),
            _ => {}
        }
        if let Some(proxied) = &path.proxied {
            let at = format!("{}/{proxied}", path.name.as_deref().unwrap_or_default());
            return match self.state(|state| state.pages.get(&at).cloned()) {
                Some((code, text)) => respond(code, text.into()),
                None => reply(Err((503, format!("error trying to reach service: no answer at {at}")))),
            };
        }
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
        let mut answer = self.state(|state| state.serve(&method, &path, body));
        self.0.changed.notify_waiters();
        if fault == Some(Fault::LoseReply) {
            std::future::pending::<()>().await;
        }
        if let (true, Ok(object)) = (partial, &mut answer) {
            object["apiVersion"] = "meta.k8s.io/v1".into();
            object["kind"] = "PartialObjectMetadata".into();
        }
        reply(answer)
    }

    fn watch(&self, path: Path) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
        let api = self.clone();
        let restored = api.state(|state| (path.version <= state.version).then_some(state.restored));
        let events = stream::unfold((api, path.version, path, restored), |(api, from, path, restored)| async move {
            let inner = api.0.clone();
            loop {
                let changed = inner.changed.notified();
                if from == EXPIRED {
                    return None;
                }
                if restored != Some(api.state(|state| state.restored)) {
                    return Some((Ok(expired()), (api, EXPIRED, path, restored)));
                }
                let next = api.state(|state| {
                    if state.silent.as_ref() == Some(&path.plural) {
                        return None;
                    }
                    let later = |one: &&(u64, &str, String, Value)| one.0 > from && one.2 == path.plural;
                    let mine = |one: &&(u64, &str, String, Value)| path.selects(&one.3);
                    state.history.iter().filter(later).find(mine).cloned()
                });
                if let Some((version, kind, _, object)) = next {
                    let mut line = serde_json::to_vec(&json!({"type": kind, "object": object})).unwrap();
                    line.push(b'\n');
                    let frame = Ok::<_, Infallible>(Frame::data(Bytes::from(line)));
                    return Some((frame, (api, version, path, restored)));
                }
                changed.await;
            }
        });
        Response::new(BodyExt::boxed_unsync(StreamBody::new(events.boxed())))
    }
}

/// The version of a watch that has said that it is over.
const EXPIRED: u64 = u64::MAX;

fn expired() -> Frame<Bytes> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410,
        "reason": "Expired", "message": "the resource version is not known"});
    Frame::data(format!("{}\n", json!({"type": "ERROR", "object": status})).into())
}

/// Where an object is that a test names: nodes are in no namespace.
fn key(plural: &str, name: &str) -> Key {
    let namespace = if plural == "nodes" { "" } else { "default" };
    (plural.to_owned(), namespace.to_owned(), name.to_owned())
}

type Answer = Result<Value, (u16, String)>;

impl State {
    fn fault(&mut self, method: &Method, path: &Path) -> Option<Fault> {
        let quiet = matches!(path.plural.as_str(), "leases" | "events");
        let mut call = Call {
            write: 0,
            method: method.to_string(),
            resource: format!("{}{}", path.plural, if path.status { "/status" } else { "" }),
            name: path.name.clone().unwrap_or_default(),
        };
        if method != Method::GET && !quiet {
            self.writes += 1;
            call.write = self.writes;
            self.calls.push(call.clone());
        }
        self.plan.as_mut().filter(|_| !quiet).and_then(|plan| plan(&call))
    }

    fn serve(&mut self, method: &Method, path: &Path, body: Value) -> Answer {
        let name = path.name.clone().or_else(|| body["metadata"]["name"].as_str().map(str::to_owned));
        let Some(name) = name else {
            return Ok(self.page(path));
        };
        let key = (path.plural.clone(), path.namespace.clone().unwrap_or_default(), name);
        let found = self.objects.get(&key).cloned();
        match (method.as_str(), found) {
            ("GET", Some(object)) => Ok(object),
            ("POST", Some(_)) => Err((409, "already exists".to_owned())),
            ("POST", None) => Ok(self.store(&key, body)),
            ("PATCH", found) if path.apply => {
                if path.status && found.is_none() {
                    return Err((404, "not found".to_owned()));
                }
                self.apply(&key, body, path.status)
            }
            ("PATCH", Some(mut object)) => {
                merge(&mut object, body);
                Ok(self.store(&key, object))
            }
            ("PUT", Some(object)) => {
                let claimed = &body["metadata"]["resourceVersion"];
                if !claimed.is_null() && *claimed != object["metadata"]["resourceVersion"] {
                    return Err((409, "the object has been modified".to_owned()));
                }
                Ok(self.store(&key, body))
            }
            ("DELETE", Some(object)) => {
                let wanted = &body["preconditions"]["uid"];
                if !wanted.is_null() && *wanted != object["metadata"]["uid"] {
                    return Err((409, "the UID in the precondition differs".to_owned()));
                }
                self.remove(&key);
                Ok(json!({"kind": "Status", "apiVersion": "v1", "status": "Success", "code": 200}))
            }
            _ => Err((404, format!("{} \"{}\" not found", key.0, key.2))),
        }
    }

    fn page(&self, path: &Path) -> Value {
        let mine = |(key, object): &(&Key, &Value)| key.0 == path.plural && path.selects(object);
        let items: Vec<_> = self.objects.iter().filter(mine).map(|(_, object)| object.clone()).collect();
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": self.version.to_string()}, "items": items})
    }

    fn apply(&mut self, key: &Key, applied: Value, status: bool) -> Answer {
        let mut object = self.objects.get(key).cloned().unwrap_or_else(|| json!({"metadata": {}}));
        let claimed = &applied["metadata"]["uid"];
        if !claimed.is_null() && *claimed != object["metadata"]["uid"] {
            return Err((409, "the UID in the patch differs".to_owned()));
        }
        if key.0 == "configmaps" && object["immutable"] == true && object["data"] != applied["data"] {
            return Err((422, "data: field is immutable when `immutable` is set".to_owned()));
        }
        if key.0 == "jobs" && !object["spec"].is_null() && object["spec"]["template"] != applied["spec"]["template"] {
            return Err((422, "spec.template: field is immutable".to_owned()));
        }
        let part = if status {
            json!({"status": applied["status"]})
        } else {
            let mut part = applied;
            part.as_object_mut().unwrap().remove("status");
            part
        };
        let part = without_nulls(part);
        let before = self.applied.insert((key.clone(), status), part.clone());
        if let Some(before) = before {
            drop_left_out(&mut object, &before, &part);
        }
        merge(&mut object, part);
        Ok(self.store(key, object))
    }

    /// Stores and tells the watchers, unless nothing changed.
    fn store(&mut self, key: &Key, mut object: Value) -> Value {
        let before = self.objects.get(key).cloned();
        if before.as_ref() == Some(&object) {
            return object;
        }
        self.version += 1;
        let metadata = object["metadata"].as_object_mut().unwrap();
        metadata.insert("namespace".to_owned(), key.1.clone().into());
        metadata.insert("name".to_owned(), key.2.clone().into());
        metadata.insert("resourceVersion".to_owned(), self.version.to_string().into());
        if before.is_none() {
            self.uids += 1;
            metadata.insert("uid".to_owned(), format!("uid-{}", self.uids).into());
            metadata.insert("creationTimestamp".to_owned(), "2026-01-01T00:00:00Z".into());
        }
        let generation = before.as_ref().map_or(0, |b| b["metadata"]["generation"].as_i64().unwrap_or(0));
        if before.as_ref().is_none_or(|before| before["spec"] != object["spec"]) {
            object["metadata"]["generation"] = (generation + 1).into();
        }
        let kind = if before.is_none() { "ADDED" } else { "MODIFIED" };
        self.history.push((self.version, kind, key.0.clone(), object.clone()));
        self.objects.insert(key.clone(), object.clone());
        object
    }

    fn remove(&mut self, key: &Key) {
        let Some(mut object) = self.objects.remove(key) else {
            return;
        };
        self.applied.retain(|(applied, _), _| applied != key);
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.history.push((self.version, "DELETED", key.0.clone(), object));
    }
}

fn reply(answer: Answer) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
    let (code, body) = match answer {
        Ok(object) => (200, object),
        Err((code, message)) => {
            let reason = match code {
                403 => "Forbidden",
                404 => "NotFound",
                409 => "Conflict",
                422 => "Invalid",
                _ => "InternalError",
            };
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "code": code, "reason": reason, "message": message});
            (code, status)
        }
    };
    respond(code, serde_json::to_vec(&body).unwrap().into())
}

fn respond(code: u16, bytes: Bytes) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
    let mut response = Response::new(http_body_util::Full::new(bytes).boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(from)) => match from.iter().find_map(list_key) {
            Some(name) => {
                for item in from {
                    match into.iter_mut().find(|one| one[name] == item[name]) {
                        Some(present) => merge(present, item),
                        None => into.push(item),
                    }
                }
            }
            None => *into = from,
        },
        (into, from) => *into = from,
    }
}

/// Removes what the manager applied before and leaves out now.
fn drop_left_out(object: &mut Value, before: &Value, now: &Value) {
    match (object, before, now) {
        (Value::Object(object), Value::Object(before), Value::Object(now)) => {
            for (key, value) in before {
                match (object.get_mut(key), now.get(key)) {
                    (_, None) => drop(object.remove(key)),
                    (Some(present), Some(now)) => drop_left_out(present, value, now),
                    (None, Some(_)) => {}
                }
            }
        }
        (Value::Array(object), Value::Array(before), Value::Array(now)) => {
            let Some(name) = before.iter().find_map(list_key) else {
                return;
            };
            let gone = |item: &Value| {
                let is = |one: &&Value| one[name] == item[name];
                before.iter().any(|one| is(&one)) && !now.iter().any(|one| is(&one))
            };
            object.retain(|item| !gone(item));
        }
        _ => {}
    }
}

/// The key of a list of objects, as Kubernetes has it for the lists that we apply.
fn list_key(item: &Value) -> Option<&'static str> {
    ["uid", "name", "type", "mountPath", "containerPort"].into_iter().find(|key| !item[*key].is_null())
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(key, value)| (key, without_nulls(value))).collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
