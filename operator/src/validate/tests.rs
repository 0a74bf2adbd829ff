//! The table of refusals, which the cluster tests try against a real API server too, and what the table cannot say.

use serde::Deserialize;

use super::*;

const TABLE: &str = include_str!("../../tests/refusals.yaml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    refused: Vec<Case>,
    /// Only an API server sees what was before.
    #[serde(rename = "changed")]
    _changed: Vec<serde_yaml::Value>,
    accepted: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    case: String,
    at: Option<At>,
    #[serde(default)]
    message: String,
    validate: Option<String>,
    local: Option<String>,
    reason: Option<Reason>,
    spec: serde_yaml::Value,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
enum At {
    Admission,
    Validate,
}

fn table() -> Table {
    serde_yaml::from_str(TABLE).unwrap()
}

fn deployment(spec: &serde_yaml::Value) -> Result<ModelDeployment, serde_yaml::Error> {
    let spec = serde_yaml::from_value(spec.clone())?;
    Ok(ModelDeployment::new("tiny", spec))
}

fn refusals(case: &Case, place: Place) -> Vec<Refusal> {
    let md = deployment(&case.spec).unwrap_or_else(|e| panic!("{}: {e}", case.case));
    validate(&md, place).err().unwrap_or_default()
}

#[test]
fn every_bad_spec_is_refused_with_the_words_of_the_table() {
    let table = table();
    assert!(table.refused.len() >= 45, "{} cases", table.refused.len());
    for case in &table.refused {
        // What the API server alone can see does not even parse here.
        if case.validate.as_deref() == Some("unparsable") {
            assert!(deployment(&case.spec).is_err(), "{} parses", case.case);
            continue;
        }
        let wanted = case.validate.as_ref().unwrap_or(&case.message);
        let found = refusals(case, Place::Cluster);
        let hit = found.iter().find(|refusal| refusal.message.contains(wanted));
        let hit = hit.unwrap_or_else(|| panic!("{}: no {wanted:?} in {found:#?}", case.case));
        let reason = case.reason.unwrap_or_else(|| panic!("{} has no reason", case.case));
        assert_eq!(hit.reason, reason, "{}", case.case);
        assert!(case.at.is_some(), "{}", case.case);
    }
}

#[test]
fn every_refusal_says_the_path_of_the_field() {
    for case in table().refused.iter().filter(|case| case.validate.as_deref() != Some("unparsable")) {
        for refusal in refusals(case, Place::Cluster) {
            assert!(refusal.message.contains("spec."), "{}: {refusal}", case.case);
            assert!(refusal.field.starts_with("spec."), "{}: {}", case.case, refusal.field);
        }
    }
}

#[test]
fn every_good_spec_is_accepted_in_its_place() {
    for case in table().accepted {
        let local = refusals(&case, Place::Local);
        match &case.local {
            Some(words) => assert!(local.iter().any(|r| r.message.contains(words)), "{}: {local:#?}", case.case),
            None => assert_eq!(local, [], "{}", case.case),
        }
        if case.validate.as_deref() != Some("local only") {
            assert_eq!(refusals(&case, Place::Cluster), [], "{}", case.case);
        }
    }
}

fn accepted(spec: &str) -> ValidModel {
    let md = deployment(&serde_yaml::from_str(spec).unwrap()).unwrap();
    validate(&md, Place::Cluster).unwrap()
}

#[test]
fn what_is_left_out_has_its_documented_default() {
    let model = accepted("{model: {source: 'hf://a/b'}}");
    assert_eq!(model.served_names, ["tiny"]);
    assert_eq!((model.replicas, model.shards, model.worker_memory), (1, None, None));
    assert_eq!((model.max_pending, model.max_wait), (1024, Duration::from_secs(120)));
    assert_eq!((model.max_surge, model.max_unavailable), (1, 0));
    assert_eq!(model.drain_timeout, Duration::from_secs(60));
    assert_eq!(model.progress_deadline, Duration::from_secs(600));
    assert_eq!(model.autoscaling, None);
    let scaled = accepted("{model: {source: 'hf://a/b'}, autoscaling: {mode: Internal, maxReplicas: 3}}");
    let policy = scaled.autoscaling.unwrap();
    assert_eq!((policy.min, policy.max, policy.target), (1, 3, 8));
    assert_eq!((policy.window, policy.idle_after), (Millis::from_secs(300), Millis::from_secs(600)));
}

#[test]
fn what_is_written_is_read() {
    let model = accepted(
        "{model: {source: 'hf://a/b', maxContextTokens: 512}, replicas: 2, parallelism: {expert: {shards: 4}},
          resources: {limits: {memory: 1.5Gi}}, memory: {kvCacheTokens: 8192},
          rollout: {drainTimeout: 1m30s}, podTemplate: {spec: {containers: [{name: worker, env: [{name: A, value: b}]}]}}}",
    );
    assert_eq!((model.replicas, model.shards), (2, Some(4)));
    assert_eq!(model.worker_memory, Some(Bytes(3 << 29)));
    assert_eq!((model.kv_cache_tokens, model.max_context_tokens), (Some(Tokens(8192)), Some(Tokens(512))));
    assert_eq!(model.drain_timeout, Duration::from_secs(90));
    let template = model.pod_template.unwrap().spec.unwrap();
    assert_eq!(template.containers[0].env.as_ref().unwrap()[0].name, "A");
}

#[test]
fn a_revision_is_what_a_worker_runs_and_nothing_else() {
    let base = accepted("{model: {source: 'hf://a/b'}}").revision_input;
    let same = [
        "{model: {source: 'hf://a/b'}, replicas: 3}",
        "{model: {source: 'hf://a/b', servedNames: [x]}}",
        "{model: {source: 'hf://a/b'}, parallelism: {expert: {shards: 4}}}",
        "{model: {source: 'hf://a/b'}, routing: {queue: {maxPending: 5}}}",
        "{model: {source: 'hf://a/b'}, autoscaling: {mode: Internal, maxReplicas: 2}}",
        "{model: {source: 'hf://a/b'}, suspend: true}",
        "{model: {source: 'hf://a/b'}, rollout: {rollingUpdate: {maxSurge: 2}}}",
    ];
    for spec in same {
        assert_eq!(accepted(spec).revision_input, base, "{spec}");
    }
    let other = [
        "{model: {source: 'hf://a/c'}}",
        "{model: {source: 'hf://a/b', revision: v1}}",
        "{model: {source: 'hf://a/b', maxContextTokens: 9}}",
        "{model: {source: 'hf://a/b', credentialsRef: {name: hub}}}",
        "{model: {source: 'hf://a/b'}, resources: {limits: {memory: 1Gi}}}",
        "{model: {source: 'hf://a/b'}, memory: {kvCacheTokens: 9}}",
        "{model: {source: 'hf://a/b'}, scheduling: {nodeSelector: {a: b}}}",
        "{model: {source: 'hf://a/b'}, rollout: {drainTimeout: 30s}}",
        "{model: {source: 'hf://a/b'}, podTemplate: {metadata: {labels: {a: b}}}}",
    ];
    for spec in other {
        assert_ne!(accepted(spec).revision_input, base, "{spec}");
    }
    let mut restarted = deployment(&serde_yaml::from_str("{model: {source: 'hf://a/b'}}").unwrap()).unwrap();
    restarted.metadata.annotations = Some([(RESTARTED_AT.to_owned(), "now".to_owned())].into());
    assert_ne!(validate(&restarted, Place::Cluster).unwrap().revision_input, base);
}

#[test]
fn the_order_of_keys_in_a_pod_template_makes_no_revision() {
    let one = accepted("{model: {source: 'hf://a/b'}, podTemplate: {metadata: {labels: {a: b}, annotations: {c: d}}}}");
    let two = accepted("{model: {source: 'hf://a/b'}, podTemplate: {metadata: {annotations: {c: d}, labels: {a: b}}}}");
    assert_eq!(one.revision_input, two.revision_input);
    assert_eq!(
        one.revision_input,
        r#"{"source":"hf://a/b","podTemplate":{"metadata":{"annotations":{"c":"d"},"labels":{"a":"b"}}}}"#
    );
}

#[test]
fn no_refusal_repeats_a_password() {
    for source in ["hf://user:hunter2@a/b", "https://user:hunter2@hub/a/b", "pvc://user:hunter2@a"] {
        let md = ModelDeployment::new(
            "tiny",
            ModelDeploymentSpec {
                model: crds::Model { source: source.to_owned(), ..crds::Model::default() },
                ..ModelDeploymentSpec::default()
            },
        );
        for place in [Place::Cluster, Place::Local] {
            let text = format!("{:?}", validate(&md, place).unwrap_err());
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
}

#[test]
fn a_pod_template_of_a_megabyte_is_refused_before_it_is_read() {
    let note = "x".repeat(1 << 20);
    let template = serde_json::json!({"metadata": {"annotations": {"note": note}}, "spec": {"hostNetwork": true}});
    let mut md = deployment(&serde_yaml::from_str("{model: {source: 'hf://a/b'}}").unwrap()).unwrap();
    md.spec.pod_template = Some(template);
    let refusals = validate(&md, Place::Cluster).unwrap_err();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert!(refusals[0].message.contains("use at most 65536"), "{refusals:?}");
}
