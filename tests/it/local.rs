//! Local mode, as a user starts it: real processes, real sockets, the real small model.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context as _, ensure};
use tests::{
    local::{Fleet, Process, runs, signal},
    poll,
};

use crate::http::{Answer, chat, chat_streamed, client};

/// The longest that a fleet may take to recover, or to go.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) const SUMS: [(u32, u32); 12] = [
    (47, 85),
    (318, 475),
    (9, 94),
    (999, 1),
    (0, 0),
    (123, 877),
    (500, 500),
    (808, 77),
    (6, 7),
    (640, 359),
    (271, 828),
    (314, 159),
];

/// A deployment of the small model in a folder of its own.
pub(crate) fn deployment(shards: u32) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.yaml");
    let model = tests::root().join("manifests/models/tiny-r1");
    let yaml = format!(
        "apiVersion: modelfleet.io/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: tiny}}\nspec:\n  \
         model: {{source: \"file://{}\"}}\n  parallelism: {{expert: {{shards: {shards}}}}}\n",
        model.display()
    );
    std::fs::write(&file, yaml).unwrap();
    (folder, file)
}

pub(crate) fn started(shards: u32) -> (tempfile::TempDir, Fleet, String) {
    let (folder, file) = deployment(shards);
    let mut fleet = Fleet::start(&file, &[]).unwrap();
    fleet.ready().unwrap();
    let url = fleet.url().unwrap();
    (folder, fleet, url)
}

#[test]
fn five_lines_of_yaml_become_a_thought_and_an_answer() {
    let output = tests::command("modelfleet")
        .args(["local", "manifests/examples/tiny-r1.yaml", "--prompt", "What is 47 + 85?"])
        .current_dir(tests::root())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (words, table) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{}: {table}", output.status);
    assert!(words.contains("</think>"), "the thought comes first: {words}");
    assert_eq!(words.trim_end().rsplit('\n').next(), Some("132"), "{words}\n{table}");
    let held: Vec<&str> = table
        .lines()
        .filter(|line| line.contains("127.0.0.1:"))
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    assert_eq!(held, ["-", "0-3", "4-7", "8-11", "12-15"], "who holds which experts: {table}");
    let pids = table.lines().filter_map(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok());
    for pid in pids {
        assert!(!runs(pid), "process {pid} was left behind: {table}");
    }
}

#[tokio::test]
async fn the_same_bytes_with_any_number_of_shards_alone_and_in_company() {
    let mut reference: Option<Vec<Answer>> = None;
    for shards in [1, 2, 4, 8] {
        let (_folder, fleet, url) = started(shards);
        assert_eq!(fleet.workers().len(), shards as usize, "{:?}", fleet.processes());
        let mut alone = Vec::new();
        for (a, b) in &SUMS[..4] {
            alone.push(chat(&url, "tiny", &format!("What is {a} + {b}?")).await.unwrap());
        }
        let questions: Vec<String> = SUMS.iter().map(|(a, b)| format!("What is {a} + {b}?")).collect();
        let together: Vec<Answer> =
            futures::future::try_join_all(questions.iter().map(|question| chat_streamed(&url, "tiny", question)))
                .await
                .unwrap();
        for ((a, b), answer) in SUMS.iter().zip(&together) {
            assert_eq!(answer.content, (a + b).to_string(), "{a} + {b} over {shards} shards: {answer:?}");
            assert_eq!(answer.finish_reason, "stop");
        }
        assert_eq!(alone, together[..4], "alone and in company, over {shards} shards");
        assert_eq!(reference.get_or_insert_with(|| together.clone()), &together, "over {shards} shards");
        fleet.stop().unwrap();
    }
}

#[tokio::test]
async fn a_worker_that_dies_comes_back_and_no_answer_is_wrong() {
    let (_folder, fleet, url) = started(4);
    let before = chat(&url, "tiny", "What is 318 + 475?").await.unwrap();
    let victim = fleet.workers()[2].clone();
    signal(victim.pid, "KILL").unwrap();
    // Whoever asks while an expert has no holder waits for it.
    let during = chat(&url, "tiny", "What is 318 + 475?").await;
    if let Ok(answer) = &during {
        assert_eq!(answer, &before);
    }
    let back = poll::until("the worker is back under another process id", PATIENCE, || {
        let is_back = |worker: &Process| worker.name == victim.name && worker.pid != victim.pid;
        ensure!(fleet.workers().iter().any(is_back), "{:#?}", fleet.printed());
        Ok(())
    });
    back.unwrap();
    let ask =
        async || chat(&url, "tiny", "What is 318 + 475?").await.with_context(|| format!("{:#?}", fleet.printed()));
    assert_eq!(poll::eventually("it answers", PATIENCE, ask).await.unwrap(), before);
    fleet.stop().unwrap();
}

#[test]
fn a_parent_that_is_killed_leaves_no_child_and_no_file() {
    let (folder, file) = deployment(2);
    let temporary = folder.path().join("temporary");
    std::fs::create_dir(&temporary).unwrap();
    let mut fleet = Fleet::start(&file, &[("TMPDIR", temporary.to_str().unwrap())]).unwrap();
    fleet.ready().unwrap();
    let children: Vec<u32> = fleet.processes().iter().map(|process| process.pid).collect();
    assert_eq!(children.len(), 3);
    assert!(children.iter().all(|pid| runs(*pid)));
    fleet.kill().unwrap();
    let gone = poll::until("all children are gone", PATIENCE, || {
        ensure!(!children.iter().any(|pid| runs(*pid)), "some of {children:?} run");
        Ok(())
    });
    gone.unwrap();
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0);
}

#[tokio::test]
async fn bad_requests_are_refused_by_name_and_nothing_dies() {
    let (_folder, fleet, url) = started(1);
    let cases = [
        (r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"temperature":9}"#, "temperature"),
        (r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"top_p":0}"#, "top_p"),
        (r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"max_tokens":-1}"#, "max_tokens"),
        (r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"max_tokens":99999}"#, "max_tokens"),
        (r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"n":1000}"#, "n"),
        (
            r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"response_format":{"type":"json_object"}}"#,
            "response_format",
        ),
        (
            r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"tools":[{"type":"function","function":{"name":"f"}}]}"#,
            "tools",
        ),
        (r#"{"model":"tiny","messages":[]}"#, "messages"),
        (r#"{"model":"tiny"}"#, "messages"),
        (r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"stop":[1]}"#, "stop"),
        (r#"{"messages":[{"role":"user","content":"hi"}]}"#, "model"),
    ];
    for (body, parameter) in cases {
        let request = client().post(format!("{url}/v1/chat/completions")).header("content-type", "application/json");
        let response = request.body(body).send().await.unwrap();
        let status = response.status().as_u16();
        let reply: serde_json::Value = response.json().await.unwrap();
        assert_eq!(status, 400, "{body}: {reply}");
        let named = reply["error"]["param"].as_str().unwrap_or_default();
        assert!(named.starts_with(parameter), "{body} should name {parameter}: {reply}");
        assert!(!reply["error"]["message"].as_str().unwrap_or_default().is_empty(), "{reply}");
    }
    assert_eq!(chat(&url, "tiny", "What is 2 + 2?").await.unwrap().content, "4");
    fleet.stop().unwrap();
}
