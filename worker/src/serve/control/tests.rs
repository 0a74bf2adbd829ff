//! Instructions in, reports out, without an operator.

use std::path::PathBuf;

use tokio_stream::wrappers::ReceiverStream;
use wire::proto::MeshSnapshot;

use super::*;

fn options() -> Options {
    Options {
        model: "default/tiny".into(),
        model_dir: PathBuf::new(),
        revision: String::new(),
        content_hash: String::new(),
        replica: 0,
        ordinal: 0,
        placement: Vec::new(),
        kv_cache_tokens: 16,
        max_context_tokens: None,
        max_sequences: 1,
        advertise: String::new(),
        operators: Vec::new(),
        id: "me".into(),
        drain_timeout: Duration::ZERO,
    }
}

fn mesh(sequence: u64) -> Instruction {
    let version = Some(Version { epoch: 1, sequence });
    let snapshot = MeshSnapshot { model: "default/tiny".into(), version, ..MeshSnapshot::default() };
    Instruction { instruction: Some(instruction::Instruction::Mesh(snapshot)) }
}

#[tokio::test]
async fn a_snapshot_is_acknowledged_once_no_step_runs_on_an_older_one() {
    let state = State::new(Mesh::default(), &options());
    let (instructions, incoming) = mpsc::channel(8);
    let (reports, mut heard) = mpsc::channel(64);
    tokio::spawn(follow(ReceiverStream::new(incoming), state.clone(), reports));
    let mut acknowledged = async || loop {
        let report: Report = heard.recv().await.unwrap();
        if let Some(report::Report::Acknowledgement(said)) = report.report {
            return said.version.unwrap().sequence;
        }
    };
    instructions.send(mesh(1)).await.unwrap();
    assert_eq!(acknowledged().await, 1);
    state.meshes.begin_step();
    for sequence in [2, 3] {
        instructions.send(mesh(sequence)).await.unwrap();
    }
    let mut newest = state.meshes.follow();
    newest.wait_for(|mesh| mesh.version.sequence == 3).await.unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let early = tokio::time::timeout(Duration::from_millis(1), acknowledged()).await;
    assert!(early.is_err(), "a step still runs on the first");
    state.meshes.end_step();
    assert_eq!(acknowledged().await, 3);
}
