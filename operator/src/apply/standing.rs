//! Whether an object is as it should be: pure, from what is rendered, what is seen, and what was written last.

use std::time::Duration;

use kube::ResourceExt;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::Ours;
use crate::error::Error;

/// How long the watch may lag behind a write of ours before the write counts as undone by somebody.
pub(super) const LAG: Duration = Duration::from_secs(5);

/// Hash of the object as it was rendered: tells a removed field, which a comparison of what is there cannot.
pub(super) const RENDERED: &str = "modelfleet.io/rendered";

/// An object as the API server had it after our write.
#[derive(Debug, Clone)]
pub(super) struct Written {
    pub(super) hash: String,
    pub(super) uid: Option<String>,
    pub(super) generation: Option<i64>,
    pub(super) version: Option<u64>,
    pub(super) at: Instant,
}

impl Written {
    pub(super) fn of(hash: String, after: &impl ResourceExt) -> Self {
        Self {
            hash,
            uid: after.uid(),
            generation: after.meta().generation,
            version: version(after),
            at: Instant::now(),
        }
    }
}

/// An object as it is sent, with its hash inside.
pub(super) struct Sealed {
    pub(super) object: Value,
    pub(super) hash: String,
}

pub(super) fn seal<K: Ours>(object: &K) -> Result<Sealed, Error> {
    let encode = |source| Error::Encode { what: format!("{} {}", K::kind(&()), object.name_any()), source };
    let bare = serde_json::to_vec(object).map_err(encode)?;
    let hash: String = Sha256::digest(&bare)[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut sealed = object.clone();
    sealed.annotations_mut().insert(RENDERED.to_owned(), hash.clone());
    Ok(Sealed { object: serde_json::to_value(&sealed).map_err(encode)?, hash })
}

pub(super) enum Standing {
    /// As it should be.
    Settled,
    /// Written by us a moment ago; the watch has not told yet.
    Awaited,
    /// Must be written.
    Differs,
}

pub(super) fn standing<K: Ours>(
    desired: &Sealed,
    seen: Option<&K>,
    written: Option<&Written>,
    now: Instant,
) -> Result<Standing, Error> {
    let written = written.filter(|written| written.hash == desired.hash);
    let lags = |seen: &K| written.is_some_and(|w| matches!((version(seen), w.version), (Some(s), Some(w)) if s < w));
    if written.is_some_and(|w| now.duration_since(w.at) < LAG) && seen.is_none_or(lags) {
        return Ok(Standing::Awaited);
    }
    let Some(seen) = seen else {
        return Ok(Standing::Differs);
    };
    let encode = |source| Error::Encode { what: format!("{} {}", K::kind(&()), seen.name_any()), source };
    // The server may have stored another spelling (1024Mi as 1Gi): then the generation after our write decides.
    let untouched =
        |w: &Written| w.generation.is_some() && w.generation == seen.meta().generation && w.uid == seen.uid();
    let same = seen.annotations().get(RENDERED) == Some(&desired.hash)
        && (within(&desired.object, &serde_json::to_value(seen).map_err(encode)?) || written.is_some_and(untouched));
    Ok(if same { Standing::Settled } else { Standing::Differs })
}

/// Tells whether `seen` has all that `desired` says; what else it has belongs to the server or to others.
pub(super) fn within(desired: &Value, seen: &Value) -> bool {
    match (desired, seen) {
        (Value::Object(desired), Value::Object(seen)) => {
            desired.iter().all(|(key, value)| within(value, seen.get(key).unwrap_or(&Value::Null)))
        }
        (Value::Array(desired), Value::Array(seen)) => {
            desired.len() == seen.len() && desired.iter().zip(seen).all(|(desired, seen)| within(desired, seen))
        }
        // Empty and absent are one on the wire.
        (Value::Object(desired), Value::Null) => desired.values().all(|value| within(value, &Value::Null)),
        (Value::Array(desired), Value::Null) => desired.is_empty(),
        (Value::String(desired), Value::Null) => desired.is_empty(),
        (desired, seen) => desired == seen,
    }
}

/// Orders writes of one object. Kubernetes promises that these are numbers that grow.
pub(super) fn version(object: &impl ResourceExt) -> Option<u64> {
    object.resource_version()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    use super::*;

    fn config(value: &str) -> ConfigMap {
        serde_json::from_value(json!({"metadata": {"name": "a"}, "data": {"key": value}})).unwrap()
    }

    /// The object as the server has it after `object` was written.
    fn stored(object: &ConfigMap, version: &str) -> ConfigMap {
        let mut stored: ConfigMap = serde_json::from_value(seal(object).unwrap().object).unwrap();
        stored.metadata.resource_version = Some(version.to_owned());
        stored
    }

    fn written(object: &ConfigMap, version: u64, at: Instant) -> Written {
        Written { hash: seal(object).unwrap().hash, uid: None, generation: None, version: Some(version), at }
    }

    #[test]
    fn what_is_there_is_not_written_again() {
        let desired = seal(&config("one")).unwrap();
        let seen = stored(&config("one"), "5");
        assert!(matches!(standing(&desired, Some(&seen), None, Instant::now()).unwrap(), Standing::Settled));
    }

    #[test]
    fn an_edit_by_somebody_is_undone() {
        let desired = seal(&config("one")).unwrap();
        let mut seen = stored(&config("one"), "5");
        seen.data.as_mut().unwrap().insert("key".to_owned(), "edited".to_owned());
        assert!(matches!(standing(&desired, Some(&seen), None, Instant::now()).unwrap(), Standing::Differs));
    }

    #[test]
    fn a_watch_that_lags_behind_our_write_causes_no_second_write() {
        let (desired, now) = (seal(&config("two")).unwrap(), Instant::now());
        let (old, written) = (stored(&config("one"), "5"), written(&config("two"), 9, now));
        let at = |later| standing(&desired, Some(&old), Some(&written), now + later).unwrap();
        assert!(matches!(at(Duration::ZERO), Standing::Awaited));
        assert!(matches!(at(LAG), Standing::Differs), "by then somebody undid it");
    }

    #[test]
    fn empty_and_absent_are_one() {
        assert!(within(&json!({"a": [], "b": {}, "c": ""}), &json!({})));
        assert!(!within(&json!({"a": [1]}), &json!({})));
        assert!(within(&json!({"a": 1}), &json!({"a": 1, "defaulted": true})));
    }
}
