//! What two crates agree on without knowing each other.

use engine::LocalFiles;

#[test]
fn the_planner_reads_what_the_engine_describes() {
    let files = LocalFiles(tests::root().join("manifests/models/tiny-r1"));
    let described = engine::describe(&files).unwrap();
    let json = serde_json::to_string(&described).unwrap();
    let read: planner::ModelDescription = serde_json::from_str(&json).unwrap();
    assert_eq!(read.experts, 16);
    assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&described).unwrap(), "nothing is lost");
}
