//! The objects of each example, whole, as text: the field that nobody thought of is the one that changes.
//!
//! `MODELFLEET_GOLDEN=write cargo test -p operator --test reconcile golden` writes them anew.

use std::{fmt::Write as _, fs, path::Path};

use crds::ModelDeployment;
use operator::{
    render::{Desired, HubAccess, Install, Names, fresh},
    validate::{Place, validate},
};
use planner::{ModelDescription, Outcome};
use serde::Serialize;

const COMMAND: &str = "MODELFLEET_GOLDEN=write cargo test -p operator --test reconcile golden";

#[test]
fn golden_objects_of_every_example() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<_> =
        fs::read_dir(root.join("../manifests/examples")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 5, "{files:?}");
    for file in files {
        let rendered = rendered(&fs::read_to_string(&file).unwrap());
        let golden = root.join("tests/golden").join(file.file_name().unwrap());
        if std::env::var_os("MODELFLEET_GOLDEN").is_some() {
            fs::create_dir_all(golden.parent().unwrap()).unwrap();
            fs::write(&golden, rendered).unwrap();
            continue;
        }
        let committed = fs::read_to_string(&golden).unwrap_or_default();
        assert!(rendered == committed, "{} is not what is rendered; run: {COMMAND}", golden.display());
    }
}

fn rendered(yaml: &str) -> String {
    let mut md: ModelDeployment = serde_yaml::from_str(yaml).unwrap();
    md.metadata.namespace = Some("default".to_owned());
    md.metadata.uid = Some("00000000-0000-0000-0000-000000000000".to_owned());
    let model = match validate(&md, Place::Cluster) {
        Ok(model) => model,
        Err(refusals) => return format!("# refused in a cluster: {}\n", refusals[0].message),
    };
    let description = description();
    match planner::plan(&description, &model.request(None)) {
        Outcome::Planned(plan) => documents(&fresh(&Names::of(&md), &model, &install(), &description, &plan)),
        Outcome::NoRoom(why) => format!("# does not fit: {why}\n"),
    }
}

fn documents(desired: &Desired) -> String {
    let mut text = String::new();
    append(&mut text, &desired.service_accounts);
    append(&mut text, &desired.services);
    append(&mut text, &desired.config_maps);
    append(&mut text, &desired.stateful_sets);
    append(&mut text, &desired.jobs);
    append(&mut text, &desired.budgets);
    text
}

fn append(text: &mut String, objects: &[impl Serialize]) {
    for object in objects {
        write!(text, "---\n{}", serde_yaml::to_string(object).unwrap()).unwrap();
    }
}

fn install() -> Install {
    Install {
        image: "registry.example/modelfleet:1.0.0".to_owned(),
        image_pull_policy: "IfNotPresent".to_owned(),
        image_pull_secrets: vec!["registry".to_owned()],
        operator: "modelfleet-operator.modelfleet.svc:9100".to_owned(),
        router: "modelfleet-router.modelfleet.svc".to_owned(),
        hub: HubAccess { certificates: Some("certificates of the hub\n".to_owned()), ..HubAccess::default() },
        telemetry: vec![("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), "http://collector:4317".to_owned())],
    }
}

/// Of the model in `manifests/models/tiny-r1`.
fn description() -> ModelDescription {
    let layers: Vec<_> = (1..4).map(|layer| serde_json::json!({"layer": layer, "expertBytes": 98_304})).collect();
    serde_json::from_value(serde_json::json!({
        "architecture": "DeepseekV3ForCausalLM", "dtype": "bf16", "parameters": 3_604_080, "denseBytes": 2_500_000,
        "kvBytesPerToken": 640, "maxContextTokens": 1024, "vocabSize": 512, "hiddenSize": 256, "layers": 4,
        "experts": 16, "expertsPerToken": 4, "moeLayers": layers, "resolvedRevision": "c0ffee",
        "contentHash": "ab".repeat(32), "files": [{"path": "model.safetensors", "size": 7_200_000}],
    }))
    .unwrap()
}
