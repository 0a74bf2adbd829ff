//! Replicas by hand, by an HPA's door, and by the queue.

use anyhow::{Context, ensure};
use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    ask::Client,
    cluster::{Cluster, MODELS, text},
};

/// `kubectl scale` works, and an HPA finds one pod a replica behind the selector.
pub(crate) async fn the_scale_subresource_works(cluster: &Cluster) -> anyhow::Result<()> {
    let scale = async |replicas: &str| {
        let arguments = ["scale", "modeldeployment/sharded", "--namespace", MODELS, "--replicas", replicas];
        cluster.kubectl(&arguments).await
    };
    scale("2").await?;
    let model = cluster.ready("sharded", 90).await?;
    ensure!(model.printed("ready") == "2/2", "READY is {}", model.printed("ready"));
    let selector = text(&model.0, "/status/selector").to_owned();
    let selected = cluster.list("pods", &selector).await?;
    ensure!(selected.len() == 2, "{selector} selects one pod a replica, not {}", selected.len());

    let hpa = json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "sharded"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment", "name": "sharded"},
            "minReplicas": 1, "maxReplicas": 4,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}}],
        },
    });
    cluster.apply(&hpa.to_string()).await?;
    cluster
        .until("the HPA is able to scale", 60, async || {
            let hpa = cluster.get(&["hpa", "sharded", "--namespace", MODELS]).await?;
            let conditions =
                hpa.pointer("/status/conditions").and_then(Value::as_array).context("no conditions yet")?;
            let able = conditions.iter().find(|condition| condition["type"] == "AbleToScale");
            ensure!(able.is_some_and(|able| able["status"] == "True"), "{conditions:?}");
            ensure!(hpa["status"]["currentReplicas"] == 2, "{}", hpa["status"]);
            Ok(())
        })
        .await?;
    cluster.kubectl(&["delete", "hpa", "sharded", "--namespace", MODELS]).await?;
    scale("1").await?;
    cluster
        .until("one replica is left", 120, async || {
            let workers = cluster.workers("sharded").await?;
            ensure!(workers.len() == 4, "{:?}", workers.keys());
            Ok(())
        })
        .await?;
    cluster.ready("sharded", 30).await.map(drop)
}

/// 1 to 3 while requests wait; 1 and then 0 when they are done; and one request wakes it.
pub(crate) async fn load_brings_replicas_and_quiet_takes_them(cluster: &Cluster) -> anyhow::Result<()> {
    const MODEL: &str = "tiny-r1-autoscaled";
    cluster.apply_example("autoscaled.yaml").await?;
    cluster.ready("autoscaled", 90).await?;
    let client = Client::router(cluster).await?;
    let mut askers = JoinSet::new();
    for asker in 0..24_u64 {
        let client = client.clone();
        askers.spawn(async move {
            for turn in 0..20 {
                client.right_sum(MODEL, 100 + asker * 20 + turn, 10 + turn).await?;
            }
            anyhow::Ok(())
        });
    }
    let replicas = async |wanted: i64, seconds: u64| {
        cluster
            .until(&format!("{wanted} replicas"), seconds, async || {
                let model = cluster.model("autoscaled").await?;
                let desired = model.number("desiredReplicas");
                ensure!(desired == wanted, "desiredReplicas is {desired}: {}", model.0["status"]["autoscaling"]);
                Ok(())
            })
            .await
    };
    replicas(3, 30).await.context("24 requests at once, 4 a replica")?;
    while let Some(asker) = askers.join_next().await {
        asker??;
    }
    replicas(1, 60).await.context("the work is done")?;
    replicas(0, 60).await.context("nobody asks")?;
    cluster
        .until("no worker is left", 90, async || {
            let workers = cluster.workers("autoscaled").await?;
            ensure!(workers.is_empty(), "{:?}", workers.keys());
            Ok(())
        })
        .await?;
    let answer = client.right_sum(MODEL, 47, 85).await.context("the request that wakes it")?;
    ensure!(answer.status == StatusCode::OK);

    let refused = cluster
        .kubectl(&["scale", "modeldeployment/autoscaled", "--namespace", MODELS, "--replicas", "2"])
        .await
        .expect_err("autoscaling sets the replicas");
    let words = "spec.replicas is set by autoscaling; change minReplicas or maxReplicas";
    ensure!(format!("{refused:#}").contains(words), "{refused:#}");
    cluster.delete("autoscaled").await
}
