//! Installing and removing the product, and what it may do while it is there.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, MODELS, SYSTEM, run, text};

/// A namespace in which only restricted pods run.
fn restricted(namespace: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n  labels:\n    \
         pod-security.kubernetes.io/enforce: restricted\n    pod-security.kubernetes.io/warn: restricted\n"
    )
}

/// The hub and the collector.
pub(crate) async fn surroundings_run(cluster: &Cluster) -> anyhow::Result<()> {
    for namespace in [SYSTEM, MODELS] {
        run("kubectl", &["apply", "--filename", "-"], &restricted(namespace)).await?;
    }
    cluster.kubectl(&["apply", "--filename", "tests/cluster/surroundings.yaml"]).await?;
    for deployment in ["deployment/hub", "deployment/collector"] {
        cluster.kubectl(&["rollout", "status", "--namespace", "surroundings", deployment, "--timeout=60s"]).await?;
    }
    Ok(())
}

pub(crate) async fn helm_installs_and_its_test_passes(cluster: &Cluster) -> anyhow::Result<()> {
    let mut arguments = vec!["upgrade", "--install", "modelfleet", "charts/modelfleet", "--namespace", SYSTEM];
    arguments.extend(["--wait", "--timeout", "120s"]);
    let settings = [
        "image.registry=localhost",
        "image.repository=modelfleet",
        "image.tag=test",
        "image.pullPolicy=Never",
        "hub.endpoint=http://hub.surroundings.svc:8000",
        "telemetry.endpoint=http://collector.surroundings.svc:4317",
    ];
    for setting in settings {
        arguments.extend(["--set", setting]);
    }
    let notes = run("helm", &arguments, "").await?;
    ensure!(notes.contains("/v1/chat/completions"), "the notes show the first curl: {notes}");
    for part in ["operator", "router"] {
        let pods = cluster.pods_of(part).await?;
        ensure!(pods.len() == 2, "two pods of the {part}: {pods:?}");
    }
    run("helm", &["test", "modelfleet", "--namespace", SYSTEM, "--timeout", "60s"], "").await?;
    Ok(())
}

/// Every call of the operator was allowed, and every right that it has was used: the audit log knows.
pub(crate) async fn the_operator_used_its_rights_and_no_others(cluster: &Cluster) -> anyhow::Result<()> {
    let log = std::fs::read_to_string(cluster.home.join("logs/audit.log")).context("the API server's audit log")?;
    let events = log.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let right = |event: &Value| {
        let [group, resource, subresource] =
            ["/objectRef/apiGroup", "/objectRef/resource", "/objectRef/subresource"].map(|path| text(event, path));
        let subresource = if subresource.is_empty() { String::new() } else { format!("/{subresource}") };
        format!("{} {group}/{resource}{subresource}", text(event, "/verb"))
    };
    let (mut used, mut forbidden) = (BTreeSet::new(), BTreeSet::new());
    for event in events.iter().filter(|event| event["objectRef"].is_object()) {
        let decision = event.pointer("/annotations/authorization.k8s.io~1decision").and_then(Value::as_str);
        if decision == Some("forbid") { &mut forbidden } else { &mut used }.insert(right(event));
        // an apply that makes an object needs the right to create it, which is not logged as a call of its own
        if event["verb"] == "patch" && event["responseStatus"]["code"] == 201 {
            used.insert(right(event).replacen("patch", "create", 1));
        }
    }
    ensure!(forbidden.is_empty(), "the operator lacks rights: {forbidden:#?}");

    let mut granted = BTreeSet::new();
    let home = cluster.get(&["role", "modelfleet-operator-home", "--namespace", SYSTEM]).await?;
    let everywhere = cluster.get(&["clusterrole", "modelfleet-operator-modelfleet-system"]).await?;
    let nodes = cluster.get(&["clusterrole", "modelfleet-operator-nodes-modelfleet-system"]).await?;
    for role in [everywhere, nodes, home] {
        for rule in role["rules"].as_array().context("rules")? {
            let list = |field: &str| rule[field].as_array().cloned().unwrap_or_default();
            for group in list("apiGroups") {
                for resource in list("resources") {
                    granted.extend(list("verbs").iter().map(|verb| {
                        let word = |value: &Value| value.as_str().unwrap_or("").to_owned();
                        format!("{} {}/{}", word(verb), word(&group), word(&resource))
                    }));
                }
            }
        }
    }
    let unused: BTreeSet<_> = granted.difference(&used).collect();
    ensure!(unused.is_empty(), "the operator has rights that it never used: {unused:#?}");
    Ok(())
}

pub(crate) async fn uninstall_keeps_what_users_declared(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply_example("five-lines.yaml").await?;
    run("helm", &["uninstall", "modelfleet", "--namespace", SYSTEM, "--wait", "--timeout", "180s"], "").await?;
    cluster.model("tiny-r1").await.context("the ModelDeployment is still there")?;
    let left = cluster.get(&["deployments,services,roles,rolebindings,serviceaccounts", "--namespace", SYSTEM]).await?;
    let left = left["items"].as_array().cloned().unwrap_or_default();
    let ours: Vec<_> = left.iter().map(|item| text(item, "/metadata/name")).filter(|name| *name != "default").collect();
    ensure!(ours.is_empty(), "left in {SYSTEM}: {ours:?}");
    cluster.kubectl(&["delete", "crd", "modeldeployments.modelfleet.io", "--timeout=60s"]).await?;
    Ok(())
}
