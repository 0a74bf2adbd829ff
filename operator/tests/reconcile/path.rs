//! The paths of the Kubernetes API, as far as the operator uses them.

use http::Uri;
use serde_json::Value;

/// A parsed request path with its query.
#[derive(Debug, Clone)]
pub struct Path {
    /// Such as `statefulsets`.
    pub plural: String,
    /// `None` over all namespaces.
    pub namespace: Option<String>,
    /// `None` for lists.
    pub name: Option<String>,
    /// The subresource `/status`.
    pub status: bool,
    /// What is asked of a pod through the API server.
    pub proxied: Option<String>,
    /// A watch, from `version` on.
    pub watch: bool,
    /// Where a watch begins.
    pub version: u64,
    /// A server-side apply.
    pub apply: bool,
    labels: Vec<(String, Option<String>)>,
    fields: Vec<(String, Option<String>)>,
}

impl Path {
    /// Parses `/api/v1/...` and `/apis/GROUP/VERSION/...`.
    pub fn parse(uri: &Uri) -> Self {
        let parts: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
        let rest = if parts[0] == "api" { &parts[2..] } else { &parts[3..] };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
            rest => (None, rest),
        };
        let query: Vec<(String, String)> = uri.query().unwrap_or("").split('&').filter_map(pair).collect();
        let find = |key: &str| query.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        Self {
            plural: rest[0].to_owned(),
            namespace,
            name: rest.get(1).map(|name| (*name).to_owned()),
            status: rest.get(2) == Some(&"status"),
            proxied: (rest.get(2) == Some(&"proxy")).then(|| rest[3..].join("/")),
            watch: find("watch").as_deref() == Some("true"),
            version: find("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0),
            apply: find("fieldManager").is_some(),
            labels: find("labelSelector").map(|selector| selector.split(',').map(label).collect()).unwrap_or_default(),
            fields: find("fieldSelector").map(|selector| selector.split(',').map(label).collect()).unwrap_or_default(),
        }
    }

    /// Tells whether an object is in this list or watch.
    pub fn selects(&self, object: &Value) -> bool {
        let here = self.namespace.as_deref().is_none_or(|namespace| object["metadata"]["namespace"] == namespace);
        let labels = &object["metadata"]["labels"];
        let chosen = self.fields.iter().all(|(key, value)| object[key] == value.as_deref().unwrap_or_default());
        here && chosen
            && self.labels.iter().all(|(key, value)| match value {
                Some(value) => labels[key] == value.as_str(),
                None => !labels[key].is_null(),
            })
    }
}

/// The plural of a kind.
pub fn plural(kind: &str) -> String {
    format!("{}s", kind.to_lowercase())
}

fn pair(part: &str) -> Option<(String, String)> {
    let (key, value) = part.split_once('=')?;
    Some((key.to_owned(), value.replace("%2F", "/").replace("%3D", "=").replace("%2C", ",").replace('+', " ")))
}

fn label(part: &str) -> (String, Option<String>) {
    match part.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (part.to_owned(), None),
    }
}
