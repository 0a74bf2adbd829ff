//! What is wrong or missing is said in words that help, and what ran before goes on.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::{
    ask::{Asking, Client},
    cluster::{Cluster, run},
    refusals::{By, REFUSALS},
};

/// The object of `five-lines.yaml` with a change of its spec.
fn changed(patch: &str) -> anyhow::Result<Value> {
    let mut object = json!({
        "apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "tiny-r1"},
        "spec": {"model": {"source": "hf://modelfleet/tiny-r1"}},
    });
    merge(&mut object["spec"], serde_json::from_str(patch)?);
    Ok(object)
}

fn merge(into: &mut Value, patch: Value) {
    match patch {
        Value::Object(fields) if into.is_object() => {
            for (name, value) in fields {
                merge(&mut into[name], value);
            }
        }
        other => *into = other,
    }
}

pub(crate) async fn bad_yaml_is_refused_and_the_model_serves_on(cluster: &Cluster) -> anyhow::Result<()> {
    let client = Client::router(cluster).await?;
    let asking = Asking::start(&client, "tiny-r1", 1);
    for (patch, by, words) in REFUSALS {
        let manifest = changed(patch)?.to_string();
        match by {
            By::Admission => {
                let refusal = cluster.apply(&manifest).await.err().with_context(|| format!("{patch} was accepted"))?;
                let refusal = format!("{refusal:#}");
                ensure!(refusal.contains(words), "{patch}: {refusal}\nlacks: {words}");
            }
            By::Condition(condition) => {
                cluster.apply(&manifest).await.with_context(|| patch.to_owned())?;
                is_false(cluster, condition, words).await.with_context(|| patch.to_owned())?;
            }
        }
    }
    asking.stop_without_error().await?;
    cluster.apply_example("five-lines.yaml").await?;
    cluster.ready("tiny-r1", 60).await?;
    client.right_sum("tiny-r1", 47, 85).await.map(drop)
}

async fn is_false(cluster: &Cluster, condition: &str, words: &str) -> anyhow::Result<()> {
    cluster
        .until(&format!("{condition} is False"), 45, async || {
            let model = cluster.model("tiny-r1").await?;
            ensure!(model.is_observed(), "an older generation is observed");
            let [status, reason, message] = model.condition(condition).context("no such condition yet")?;
            ensure!(status == "False" && message.contains(words), "{status} {reason}: {message}\nlacks: {words}");
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
