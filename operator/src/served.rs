//! Who answers to a served name: the oldest ModelDeployment that asks for it, by creation time and then UID.
//!
//! Pure. `NAMESPACE/NAME` always works and is never contested.

use crds::{ModelDeployment, Reason};
use kube::ResourceExt;

use crate::validate::Refusal;

/// A name that another one holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The name.
    pub name: String,
    /// Namespace and name of the holder.
    pub holder: (String, String),
}

/// The names that `md` asks for.
pub fn asked(md: &ModelDeployment) -> Vec<String> {
    md.spec.model.served_names.clone().unwrap_or_else(|| vec![md.name_any()])
}

/// Those of `md`'s names that an older one of `all` asks for too.
pub fn taken<'a>(md: &ModelDeployment, all: impl Iterator<Item = &'a ModelDeployment> + Clone) -> Vec<Taken> {
    let older = all.filter(|other| other.uid() != md.uid() && age(other) < age(md));
    let held = |name: String| {
        let holder = older.clone().filter(|other| asked(other).contains(&name)).min_by_key(|other| age(other))?;
        Some(Taken { name, holder: (holder.namespace().unwrap_or_default(), holder.name_any()) })
    };
    asked(md).into_iter().filter_map(held).collect()
}

/// Refuses names that were asked for by hand. The holder is named only inside its own namespace.
pub fn refusals(md: &ModelDeployment, taken: &[Taken]) -> Vec<Refusal> {
    let Some(asked) = &md.spec.model.served_names else {
        return Vec::new();
    };
    let refusal = |(at, taken): (usize, &Taken)| Refusal {
        reason: Reason::ServedNameTaken,
        field: format!("spec.model.servedNames[{at}]"),
        message: format!("spec.model.servedNames has {}; {}, so use another name", taken.name, holder(md, taken)),
    };
    let at = |taken: &Taken| asked.iter().position(|name| *name == taken.name).unwrap_or(0);
    taken.iter().map(|taken| refusal((at(taken), taken))).collect()
}

/// What to say where the name that nobody asked for by hand is another's.
pub fn remark(md: &ModelDeployment, taken: &[Taken]) -> Option<String> {
    let taken = taken.first().filter(|_| md.spec.model.served_names.is_none())?;
    let path = format!("{}/{}", md.namespace().unwrap_or_default(), md.name_any());
    Some(format!("the name {} is taken: {}; requests use {path}", taken.name, holder(md, taken)))
}

fn holder(md: &ModelDeployment, taken: &Taken) -> String {
    let (namespace, name) = &taken.holder;
    match md.namespace().as_ref() == Some(namespace) {
        true => format!("ModelDeployment {name} serves it"),
        false => "a model of another namespace serves it".to_owned(),
    }
}

fn age(md: &ModelDeployment) -> (Option<k8s_openapi::jiff::Timestamp>, String) {
    (md.metadata.creation_timestamp.as_ref().map(|time| time.0), md.uid().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn model(namespace: &str, name: &str, created: &str, names: Option<&[&str]>) -> ModelDeployment {
        serde_json::from_value(json!({
            "apiVersion": "modelfleet.io/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"namespace": namespace, "name": name, "uid": format!("{namespace}{name}"), "creationTimestamp": created},
            "spec": {"model": {"source": "hf://a/b", "servedNames": names}},
        }))
        .unwrap()
    }

    const EARLY: &str = "2026-01-01T00:00:00Z";
    const LATE: &str = "2026-01-02T00:00:00Z";

    #[test]
    fn the_oldest_keeps_a_name_and_the_other_is_told_who_in_its_own_namespace() {
        let all = [model("a", "one", EARLY, Some(&["x"])), model("a", "two", LATE, Some(&["x", "y"]))];
        assert_eq!(taken(&all[0], all.iter()), []);
        let refusals = refusals(&all[1], &taken(&all[1], all.iter()));
        assert_eq!(
            refusals[0].message,
            "spec.model.servedNames has x; ModelDeployment one serves it, so use another name"
        );
    }

    #[test]
    fn nobody_is_named_across_namespaces_and_a_default_name_refuses_nothing() {
        let all = [model("a", "one", EARLY, None), model("b", "one", LATE, None)];
        let taken = taken(&all[1], all.iter());
        assert_eq!(refusals(&all[1], &taken), []);
        let remark = remark(&all[1], &taken).unwrap();
        assert!(remark.ends_with("a model of another namespace serves it; requests use b/one"), "{remark}");
    }
}
