//! A replica and what its workers told, as values; the text of them whole.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use planner::{Plan, Tokens, placement::LayerPlacement};
use serde_json::json;

use super::*;
use crate::render::Revision;

const TABLE: &str = "\
default/redundant: revision 64e02ff1, replica 0, workers 3/4\n\
minimum copies 1, skew 0 %\n\
layer 2: 19500 rows since 3 of 4 workers started\n\
\n\
EXPERT  ROWS  SHARE   COPIES  HOLDERS\n\
0       264   1.3 %   2       0 (node-0), 2 (node-2)\n\
1       93    0.4 %   1       0 (node-0), 3 (node-3, not ready)\n\
2       2571  13.1 %  2       0 (node-0), 2 (node-2)\n\
3       1716  8.8 %   1       0 (node-0), 3 (node-3, not ready)\n\
4       519   2.6 %   2       0 (node-0), 2 (node-2)\n\
5       1971  10.1 %  1       0 (node-0), 3 (node-3, not ready)\n\
6       90    0.4 %   2       0 (node-0), 2 (node-2)\n\
7       858   4.4 %   1       0 (node-0), 3 (node-3, not ready)\n\
8       1284  6.5 %   2       1 (node-1), 2 (node-2)\n\
9       1368  7.0 %   1       1 (node-1), 3 (node-3, not ready)\n\
10      1110  5.6 %   2       1 (node-1), 2 (node-2)\n\
11      510   2.6 %   1       1 (node-1), 3 (node-3, not ready)\n\
12      2559  13.1 %  2       1 (node-1), 2 (node-2)\n\
13      1275  6.5 %   1       1 (node-1), 3 (node-3, not ready)\n\
14      2640  13.5 %  2       1 (node-1), 2 (node-2)\n\
15      672   3.4 %   1       1 (node-1), 3 (node-3, not ready)\n\
\n\
worker 3 is not in it: no answer within 5 s\n";
const PLAIN: Canvas = Canvas { columns: 80, colour: false };

fn pod(name: &str, node: &str, ready: bool) -> Arc<Pod> {
    let status = json!({"name": "worker", "ready": ready, "restartCount": 0, "image": "", "imageID": ""});
    let pod = json!({
        "metadata": {"name": name}, "spec": {"nodeName": node, "containers": []},
        "status": {"containerStatuses": [status]},
    });
    Arc::new(serde_json::from_value(pod).unwrap())
}

/// A replica whose layers have these holders for each expert. All workers but the last are ready on nodes of their own.
fn replica(shards: u32, layers: &[Vec<Vec<u32>>]) -> Replica {
    let layer = |(layer, experts): (u32, &Vec<Vec<u32>>)| LayerPlacement { layer, experts: experts.clone() };
    let placement = Placement { shards, layers: (1..).zip(layers).map(layer).collect() };
    let worker = |ordinal: u32| {
        let (name, node) = (format!("redundant-64e02ff1-0-{ordinal}"), format!("node-{ordinal}"));
        Worker { ordinal, ..Worker::bare(&pod(&name, &node, ordinal + 1 < shards)) }
    };
    Replica {
        revision: Revision::parse("64e02ff1").unwrap(),
        index: 0,
        set: None,
        plan: Some(Plan {
            shards,
            max_context_tokens: Tokens(1024),
            kv_cache_tokens: Tokens(8192),
            placement,
            workers: vec![],
        }),
        also: None,
        draining_since: None,
        workers: (0..shards).map(worker).collect(),
    }
}

fn model(replica: ReplicaExperts) -> ModelExperts {
    ModelExperts { model: "default/redundant".to_owned(), status: "Ready".to_owned(), replicas: vec![replica] }
}

/// What `manifests/examples/redundant.yaml` makes, with loads made up; the last worker is lost.
fn copied() -> ModelExperts {
    let holders: Vec<Vec<u32>> = (0..16).map(|expert| vec![expert / 8, 2 + expert % 2]).collect();
    let rows = |layer: u64| (0..16).map(|expert| (expert * expert * 7919 + layer * 104_729) % 997).collect();
    let rows: BTreeMap<u32, Vec<u64>> = (1..=3).map(|layer| (layer, rows(u64::from(layer)))).collect();
    let mut told: BTreeMap<u32, Told> = (0..3).map(|ordinal| (ordinal, Ok(rows.clone()))).collect();
    told.insert(3, Err("no answer within 5 s".to_owned()));
    model(ReplicaExperts::of(&replica(4, &[holders.clone(), holders.clone(), holders]), told))
}

/// As DeepSeek-V3 has them: 256 experts a layer.
fn many() -> ModelExperts {
    let holders: Vec<Vec<u32>> = (0..256).map(|expert| vec![expert / 32]).collect();
    let rows: Vec<u64> = (0..256).map(|expert| (expert * 7919) % 1000).collect();
    let told = (0..8).map(|ordinal| (ordinal, Ok(BTreeMap::from([(1, rows.clone())])))).collect();
    model(ReplicaExperts::of(&replica(8, &[holders]), told))
}

#[test]
fn the_drawing_in_the_readme_is_what_is_drawn() {
    let readme = include_str!("../../../README.md");
    let drawn = draw(&copied(), PLAIN);
    assert!(readme.contains(&drawn), "README.md lacks:\n{drawn}");
}

#[test]
fn a_layer_is_a_table_with_the_nodes_of_the_holders() {
    assert_eq!(table(&copied().only(2).unwrap()), TABLE);
}

#[test]
fn a_layer_without_routed_experts_is_refused_with_those_that_have() {
    let error = copied().only(0).unwrap_err();
    assert_eq!(error.to_string(), "layer 0 of default/redundant has no routed experts; layers that have: 1-3");
}

#[test]
fn a_terminal_shows_load_and_lost_copies_in_colour() {
    let text = draw(&copied(), Canvas { colour: true, ..PLAIN });
    for painted in ["\x1b[31m█\x1b[0m", "\x1b[33m▇\x1b[0m", "\x1b[33m1\x1b[0m"] {
        assert!(text.contains(painted), "{painted:?} in {text:?}");
    }
    assert!(!text.contains("\x1b[33m▄") && !text.contains("\x1b[31m2"), "{text:?}");
    let bare = text.replace("\x1b[31m", "").replace("\x1b[33m", "").replace("\x1b[2m", "").replace("\x1b[0m", "");
    assert_eq!(bare, draw(&copied(), PLAIN), "nothing else differs");
}

#[test]
fn without_loads_it_says_so_and_draws_who_holds_what() {
    let holders = vec![vec![0], vec![1]];
    let told = (0..2).map(|ordinal| (ordinal, Err("it answers 404".to_owned()))).collect();
    let seen = model(ReplicaExperts::of(&replica(2, &[holders]), told));
    assert_eq!(seen.replicas[0].skew_percent, None);
    assert_eq!(
        draw(&seen, PLAIN),
        "default/redundant: revision 64e02ff1, replica 0, workers 1/2\nminimum copies 0, skew unknown\n\
         no worker told its load\n\n\
         LAYER  ROWS  COPIES  FROM  EXPERTS\n\
         1      ?     0-1     0     ??\n\
         \x20                          10\n\n\
         WORKER  POD                     NODE    EXPERTS  STATE\n\
         0       redundant-64e02ff1-0-0  node-0  0        serves, load unknown: it answers 404\n\
         1       redundant-64e02ff1-0-1  node-1  1        not ready, load unknown: it answers 404\n"
    );
}

#[test]
fn a_model_without_replicas_experts_or_record_says_which() {
    let asleep = ModelExperts { model: "default/tiny".to_owned(), status: "Asleep".to_owned(), replicas: Vec::new() };
    assert_eq!(draw(&asleep, PLAIN), "default/tiny has no replica; its status: Asleep\n");
    let mut none = replica(1, &[]);
    let dense = model(ReplicaExperts::of(&none, BTreeMap::new()));
    assert!(draw(&dense, PLAIN).ends_with("workers 0/1\nno routed experts\n"));
    none.plan = None;
    let lost = model(ReplicaExperts::of(&none, BTreeMap::new()));
    assert!(draw(&lost, PLAIN).ends_with("its placement is not recorded\n"));
}

#[test]
fn a_replica_whose_experts_move_and_that_drains_says_so() {
    let mut moving = replica(2, &[vec![vec![0], vec![1]]]);
    moving.also = moving.plan.clone().map(Besides::Next);
    moving.draining_since = Some(k8s_openapi::jiff::Timestamp::UNIX_EPOCH);
    let text = draw(&model(ReplicaExperts::of(&moving, BTreeMap::new())), PLAIN);
    let heading: Vec<&str> = text.lines().take(2).collect();
    let wanted = [
        "default/redundant: revision 64e02ff1, replica 0, workers 1/2, draining",
        "minimum copies 0, skew unknown, experts move: the next holders load",
    ];
    assert_eq!(heading, wanted);
}

#[test]
fn as_data_it_has_the_same() {
    let data = serde_json::to_value(copied().only(3).unwrap()).unwrap();
    let replica = &data["replicas"][0];
    assert_eq!((&replica["minCopies"], &replica["shards"], &replica["moving"]), (&json!(1), &json!(4), &json!(null)));
    assert_eq!(replica["workers"][3]["unknown"], "no answer within 5 s");
    assert_eq!(replica["workers"][2]["experts"], json!({"3": [0, 2, 4, 6, 8, 10, 12, 14]}));
    let expert = &replica["layers"][0]["experts"][1];
    let rows = 3 * ((7919 + 3 * 104_729) % 997);
    assert_eq!(*expert, json!({"expert": 1, "rows": rows, "copies": 1, "holders": [0, 3]}));
}

#[test]
fn many_experts_take_the_lines_they_need_and_no_line_is_too_long() {
    for (columns, lines) in [(80, 6), (100, 4), (120, 4), (200, 2), (20, 16)] {
        let text = draw(&many(), Canvas { columns, ..PLAIN });
        let cells: Vec<&str> = text.lines().filter(|line| line.contains('▁')).collect();
        // one is the line that explains the shades
        assert_eq!(cells.len() - usize::from(cells[0].starts_with("rows since")), lines, "{text}");
        assert!(columns < 80 || text.lines().all(|line| line.chars().count() <= columns), "{text}");
    }
}
