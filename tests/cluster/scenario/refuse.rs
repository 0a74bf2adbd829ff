//! What is wrong or missing is said in words that help, and what ran before goes on.

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    ask::{Asking, Client},
    cluster::{Cluster, MODELS, run},
};

/// The table that the unit tests of `validate` try too, and that says how it is read.
const TABLE: &str = include_str!("../../../operator/tests/refusals.yaml");

#[derive(Deserialize)]
struct Table {
    refused: Vec<Refused>,
    changed: Vec<Changed>,
    accepted: Vec<Good>,
}

#[derive(Deserialize)]
struct Refused {
    case: String,
    at: At,
    message: String,
    reason: Option<String>,
    spec: Value,
}

#[derive(PartialEq, Deserialize)]
enum At {
    Admission,
    Validate,
}

#[derive(Deserialize)]
struct Changed {
    case: String,
    before: Value,
    after: Value,
    message: String,
}

#[derive(Deserialize)]
struct Good {
    case: String,
    spec: Value,
}

/// What only the hub, or a plan for the model's own numbers, can refuse: spec, condition, words.
const IMPOSSIBLE: [(&str, &str, &str); 5] = [
    (r#"{"model": {"source": "hf://modelfleet/tiny-r1"}, "parallelism": {"expert": {"shards": 64}}}"#, "Planned", "16"),
    (r#"{"model": {"source": "hf://modelfleet/tiny-r1", "maxContextTokens": 10000000}}"#, "Planned", "10000000"),
    (r#"{"model": {"source": "hf://modelfleet/nobody"}}"#, "ModelReady", "modelfleet/nobody"),
    (
        r#"{"model": {"source": "hf://modelfleet/tiny-r1", "revision": "no-such-branch"}}"#,
        "ModelReady",
        "no-such-branch",
    ),
    (r#"{"model": {"source": "hf://modelfleet/unknown"}}"#, "ModelReady", "UnheardOfForCausalLM"),
];

fn deployment(name: &str, spec: &Value) -> String {
    json!({
        "apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": name}, "spec": spec,
    })
    .to_string()
}

/// Each is laid over a model that is served, and that goes on serving.
pub(crate) async fn bad_yaml_is_refused_and_the_model_serves_on(cluster: &Cluster) -> anyhow::Result<()> {
    let table: Table = serde_yaml::from_str(TABLE)?;
    ensure!(table.refused.len() >= 40, "{} cases", table.refused.len());
    let client = Client::router(cluster).await?;
    let asking = Asking::start(&client, "tiny-r1", 1);
    for Refused { case, message, spec, .. } in table.refused.iter().filter(|refused| refused.at == At::Admission) {
        not_admitted(cluster, "tiny-r1", spec, message).await.with_context(|| case.clone())?;
    }
    for Refused { case, message, reason, spec, .. } in table.refused.iter().filter(|one| one.at == At::Validate) {
        cluster.apply(&deployment("tiny-r1", spec)).await.with_context(|| case.clone())?;
        let reason = reason.as_deref().with_context(|| format!("{case} has no reason"))?;
        is_false(cluster, "Accepted", Some(reason), message).await.with_context(|| case.clone())?;
    }
    for (spec, condition, words) in IMPOSSIBLE {
        cluster.apply(&deployment("tiny-r1", &serde_json::from_str(spec)?)).await.context(spec)?;
        is_false(cluster, condition, None, words).await.context(spec)?;
    }
    asking.stop_without_error().await?;
    cluster.apply_example("five-lines.yaml").await?;
    cluster.ready("tiny-r1", 60).await?;
    client.right_sum("tiny-r1", 47, 85).await?;

    for Changed { case, before, after, message } in &table.changed {
        cluster.apply(&deployment("changed", before)).await.with_context(|| case.clone())?;
        not_admitted(cluster, "changed", after, message).await.with_context(|| case.clone())?;
    }
    cluster.delete("changed").await?;
    for Good { case, spec } in &table.accepted {
        let arguments = ["create", "--namespace", MODELS, "--dry-run=server", "--filename", "-"];
        run("kubectl", &arguments, &deployment("good", spec)).await.with_context(|| case.clone())?;
    }
    Ok(())
}

async fn not_admitted(cluster: &Cluster, name: &str, spec: &Value, words: &str) -> anyhow::Result<()> {
    let refusal = cluster.apply(&deployment(name, spec)).await.err().context("it was accepted")?;
    let refusal = format!("{refusal:#}");
    ensure!(refusal.contains(words), "{refusal}\nlacks: {words}");
    Ok(())
}

async fn is_false(cluster: &Cluster, condition: &str, reason: Option<&str>, words: &str) -> anyhow::Result<()> {
    cluster
        .until(&format!("{condition} is False"), 60, async || {
            let model = cluster.model("tiny-r1").await?;
            ensure!(model.is_observed(), "an older generation is observed");
            let [status, found, message] = model.condition(condition).context("no such condition yet")?;
            ensure!(
                status == "False" && message.contains(words) && reason.is_none_or(|reason| reason == found),
                "{status} {found}: {message}\nlacks: {words}"
            );
            Ok(())
        })
        .await
}

/// A gated model waits for its Secret, says which, and goes on by itself when it is there.
pub(crate) async fn what_is_missing_is_named(cluster: &Cluster) -> anyhow::Result<()> {
    let gated = json!({
        "apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "gated"},
        "spec": {"model": {"source": "hf://modelfleet/gated-tiny-r1", "credentialsRef": {"name": "hub", "key": "token"}}},
    });
    cluster.apply(&gated.to_string()).await?;
    cluster
        .until("the missing Secret is named", 60, async || {
            let model = cluster.model("gated").await?;
            let [status, reason, message] = model.condition("ModelReady").context("no such condition yet")?;
            ensure!(status == "False" && reason == "CredentialsMissing", "{status} {reason}: {message}");
            ensure!(message.contains("hub") && message.contains("token"), "{message}");
            Ok(())
        })
        .await?;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"token": "hf_cluster_tests"},
    });
    cluster.apply(&secret.to_string()).await?;
    // a kubelet brings a new Secret into a running pod within a minute and a half
    cluster.ready("gated", 150).await?;
    Client::router(cluster).await?.right_sum("gated", 47, 85).await?;
    let logs = run(
        "kubectl",
        &["logs", "--namespace", "models", "--selector", "modelfleet.io/model=gated", "--all-containers"],
        "",
    );
    ensure!(!logs.await?.contains("hf_cluster_tests"), "the token is in a log");
    cluster.delete("gated").await
}

/// A quota that refuses pods is shown in the API server's words, also before there is any pod; without it the model comes.
pub(crate) async fn a_quota_that_refuses_pods_is_shown(cluster: &Cluster) -> anyhow::Result<()> {
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}},
    });
    cluster.apply(&quota.to_string()).await?;
    let model = json!({
        "apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "refused"},
        "spec": {"model": {"source": "hf://modelfleet/tiny-r1", "servedNames": ["tiny-r1-refused"]}},
    });
    cluster.apply(&model.to_string()).await?;
    cluster
        .until("the quota is named", 60, async || {
            let model = cluster.model("refused").await?;
            for (name, wanted) in [("Degraded", "True"), ("Scheduled", "False")] {
                let [status, reason, message] = model.condition(name).context("no such condition yet")?;
                ensure!(status == wanted && reason == "QuotaExceeded", "{name} {status} {reason}: {message}");
                ensure!(message.contains("exceeded quota: none"), "{message}");
            }
            ensure!(model.summary().starts_with("Degraded: QuotaExceeded: pods "), "{}", model.summary());
            Ok(())
        })
        .await?;
    cluster.kubectl(&["delete", "resourcequota", "none", "--namespace", MODELS]).await?;
    // the controllers of Kubernetes try again with pauses that grow
    cluster.ready("refused", 180).await?;
    cluster.delete("refused").await
}

/// A claim that one node can mount is not enough for two workers.
pub(crate) async fn a_claim_of_one_node_is_refused_to_many_workers(cluster: &Cluster) -> anyhow::Result<()> {
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "one-node"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    });
    let model = json!({
        "apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "claimed"},
        "spec": {"model": {"source": "pvc://one-node/tiny-r1"}, "parallelism": {"expert": {"shards": 2}}},
    });
    cluster.apply(&claim.to_string()).await?;
    cluster.apply(&model.to_string()).await?;
    cluster
        .until("the claim is named", 30, async || {
            let model = cluster.model("claimed").await?;
            let [status, reason, message] = model.condition("Planned").context("no such condition yet")?;
            ensure!(status == "False" && reason == "ClaimNotShared", "{status} {reason}: {message}");
            ensure!(message.contains("claim one-node, which is ReadWriteOnce"), "{message}");
            Ok(())
        })
        .await?;
    cluster.delete("claimed").await?;
    cluster.kubectl(&["delete", "persistentvolumeclaim", "one-node", "--namespace", MODELS]).await.map(drop)
}
