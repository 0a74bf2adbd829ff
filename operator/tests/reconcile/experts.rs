//! `modelfleet experts`: placements from the API server, loads from workers through it.

use std::time::Duration;

use operator::experts::{Error, ModelExperts, draw, read};

use crate::{api::Fault, world::World};

const PATIENCE: Duration = Duration::from_secs(10);

async fn seen(world: &World) -> ModelExperts {
    read(&world.api().client(), "default", "tiny", PATIENCE).await.unwrap()
}

/// Pods of workers, by ordinal.
fn workers(world: &World) -> Vec<String> {
    let mut names = world.names("pods");
    names.retain(|name| name != "router");
    names.sort();
    names
}

/// What a worker answers that gave these rows to the experts of layer 1.
fn tell(world: &World, pod: &str, rows: [u64; 4]) {
    let page = format!("{{\"layers\": [{{\"layer\": 1, \"rows\": {rows:?}}}]}}");
    world.api().page(&format!("{pod}:9400/experts"), Some((200, &page)));
}

fn rows(seen: &ModelExperts) -> Vec<Option<u64>> {
    seen.replicas[0].layers[0].experts.iter().map(|expert| expert.rows).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_all_workers_are_summed_by_layer_and_expert_and_nothing_is_written() {
    let (world, _operator) = World::installed().await;
    let pods = workers(&world);
    tell(&world, &pods[0], [10, 0, 2, 0]);
    tell(&world, &pods[1], [0, 4, 0, 0]);
    let writes = world.api().writes().len();
    let seen = seen(&world).await;
    assert_eq!(world.api().writes().len(), writes);
    assert_eq!((seen.model.as_str(), seen.status.as_str()), ("default/tiny", "Ready"));
    let replica = &seen.replicas[0];
    assert_eq!((replica.shards, replica.min_copies, replica.told()), (2, Some(1), 2));
    assert_eq!(rows(&seen), [Some(10), Some(4), Some(2), Some(0)]);
    for (worker, pod) in replica.workers.iter().zip(&pods) {
        assert_eq!((worker.live, worker.pod.as_ref()), (true, Some(pod)));
        let held: Vec<u32> = replica.layers[0]
            .experts
            .iter()
            .filter(|expert| expert.holders == [worker.ordinal])
            .map(|expert| expert.expert)
            .collect();
        assert_eq!(worker.experts[&1], held, "the record is what the workers were given");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_cannot_be_asked_is_told_with_the_reason_and_the_rest_is_drawn() {
    let (world, _operator) = World::installed().await;
    let pods = workers(&world);
    tell(&world, &pods[0], [10, 0, 2, 0]);
    let at = format!("{}:9400/experts", pods[1]);
    let forbidden = "pods is forbidden: User \"ann\" cannot get resource \"pods/proxy\"";
    let status = format!("{{\"kind\": \"Status\", \"code\": 403, \"message\": {forbidden:?}}}");
    let answers = [
        (None, format!("error trying to reach service: no answer at {at}")),
        (Some((403, status.as_str())), forbidden.to_owned()),
        (Some((503, "no experts are in memory\n")), "no experts are in memory".to_owned()),
        (Some((404, "")), "it answers 404".to_owned()),
        (Some((200, "<html>")), "its answer cannot be read: expected value at line 1 column 1".to_owned()),
    ];
    for (answer, why) in answers {
        world.api().page(&at, answer);
        let seen = seen(&world).await;
        assert_eq!(seen.replicas[0].workers[1].unknown.as_ref(), Some(&why));
        assert_eq!(rows(&seen), [Some(10), Some(0), Some(2), Some(0)]);
        let text = draw(&seen, operator::experts::Canvas { columns: 80, colour: false });
        assert!(text.contains("rows since 1 of 2 workers started"), "{text}");
        assert!(text.contains(&format!("serves, load unknown: {why}")), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_silent_or_gone_holds_nothing_up() {
    let (world, operator) = World::installed().await;
    let pods = workers(&world);
    tell(&world, &pods[1], [1, 1, 1, 1]);
    operator.kill().await;
    world.api().break_by(|call| (call.name.ends_with("-0-0:9400")).then_some(Fault::Hang));
    let seen = read(&world.api().client(), "default", "tiny", Duration::from_secs(1)).await.unwrap();
    assert_eq!(seen.replicas[0].workers[0].unknown.as_deref(), Some("no answer within 1 s"));
    assert_eq!(rows(&seen), [Some(1); 4]);
    world.cluster.make_no_pods(true);
    world.api().delete("pods", &pods[0]);
    let seen = read(&world.api().client(), "default", "tiny", PATIENCE).await.unwrap();
    let replica = &seen.replicas[0];
    assert_eq!((replica.workers[0].pod.as_ref(), replica.workers[0].live), (None, false));
    assert_eq!(replica.min_copies, Some(0), "what it held has no holder");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_model_names_those_there_are_and_a_refusal_is_told_in_the_servers_words() {
    let (world, _operator) = World::installed().await;
    let client = world.api().client();
    let error = read(&client, "default", "tini", PATIENCE).await.unwrap_err();
    assert!(matches!(error, Error::Unknown(_)));
    assert_eq!(error.to_string(), "no ModelDeployment tini in namespace default; there are: tiny");
    let error = read(&client, "elsewhere", "tiny", PATIENCE).await.unwrap_err();
    assert_eq!(error.to_string(), "no ModelDeployment tiny in namespace elsewhere; there are: none");
    world.api().break_by(|call| (call.resource == "configmaps").then_some(Fault::Answer(403)));
    let error = read(&client, "default", "tiny", PATIENCE).await.unwrap_err();
    assert_eq!(error.to_string(), "could not read ConfigMap list: broken on purpose");
}
