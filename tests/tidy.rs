//! House rules that a machine can check: crate borders, the top level, pure modules, how files are laid out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde_json::Value;

/// For each crate: which of ours it may use, and what must not come into its programs by any way.
const BORDERS: [(&str, &[&str], &[&str]); 8] = [
    ("crds", &[], &["tokio", "tonic", "candle-core"]),
    ("wire", &[], &["kube", "candle-core"]),
    ("planner", &[], &["kube", "tokio", "tonic", "tracing", "rand"]),
    ("engine", &[], &["kube", "tokio", "tonic"]),
    ("router", &["wire"], &["kube", "candle-core"]),
    ("worker", &["engine", "wire"], &["kube"]),
    ("operator", &["crds", "planner", "wire"], &["candle-core"]),
    ("tests", &["crds", "engine", "operator", "planner", "router", "wire", "worker"], &[]),
];

/// Modules that decide. They see values only, so that a simulator, a test and a program get the same answer.
const PURE: [&str; 19] = [
    "operator/planner/src",
    "operator/src/experts.rs",
    "operator/src/experts/draw.rs",
    "operator/src/launch.rs",
    "operator/src/moving.rs",
    "operator/src/render.rs",
    "operator/src/render",
    "operator/src/report.rs",
    "operator/src/validate.rs",
    "operator/src/validate",
    "worker/router/src/admit.rs",
    "worker/router/src/budget.rs",
    "worker/router/src/patience.rs",
    "worker/router/src/pick.rs",
    "worker/router/src/pulse.rs",
    "worker/router/src/queue.rs",
    "worker/router/src/resume.rs",
    "worker/src/experts/pace.rs",
    "worker/src/experts/split.rs",
];

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(tests::root()).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn tracked() -> Vec<String> {
    let listing = output("git", &["-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]);
    let files: Vec<String> =
        listing.lines().filter(|path| tests::root().join(path).exists()).map(str::to_owned).collect();
    assert!(files.len() > 20, "git lists the repository");
    files
}

fn rust_files() -> Vec<(String, String)> {
    let read = |path: String| (fs::read_to_string(tests::root().join(&path)).expect("a tracked file"), path);
    let files = tracked().into_iter().filter(|path| path.ends_with(".rs"));
    files.map(read).map(|(text, path)| (path, text)).collect()
}

/// The part of a file that is in the program: all before its unit tests.
fn program_text(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

#[test]
fn crate_borders_hold() {
    let metadata: Value =
        serde_json::from_str(&output("cargo", &["metadata", "--format-version=1", "--locked"])).unwrap();
    let name_of: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap()))
        .collect();
    let is_normal =
        |dependency: &&Value| dependency["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].is_null());
    let uses: BTreeMap<&str, Vec<&str>> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| {
            let normal = node["deps"].as_array().unwrap().iter().filter(is_normal);
            (node["id"].as_str().unwrap(), normal.map(|dependency| dependency["pkg"].as_str().unwrap()).collect())
        })
        .collect();
    let members: Vec<&str> =
        metadata["workspace_members"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
    let ours: BTreeSet<&str> = members.iter().map(|id| name_of[id]).collect();
    let ruled: BTreeSet<&str> = BORDERS.iter().map(|(name, ..)| *name).collect();
    assert_eq!(ours, ruled, "each crate of the workspace has its borders drawn here");

    for (name, may_use, never) in BORDERS {
        let id = members.iter().find(|id| name_of[*id] == name).unwrap();
        for used in uses[id].iter().map(|used| name_of[used]).filter(|used| ours.contains(used)) {
            assert!(may_use.contains(&used), "{name} uses {used}; of ours it may use {may_use:?}");
        }
        // cargo metadata unites the features of the whole workspace; what a crate alone brings in is cargo tree's to say
        let tree = output(
            "cargo",
            &["tree", "--package", name, "--edges=normal", "--prefix=none", "--format={p}", "--color=never"],
        );
        let reached: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
        assert!(reached.contains(name), "cargo tree lists {name}");
        for banned in never {
            assert!(!reached.contains(banned), "{name} must never use {banned}, and does, through its dependencies");
        }
    }
}

#[test]
fn the_top_level_holds_what_the_design_names() {
    let allowed = ["Cargo.toml", "Cargo.lock", "README.md", "LICENSE"];
    let folders = ["operator", "worker", "crds", "charts", "manifests", "tests"];
    for path in tracked() {
        let top = path.split('/').next().unwrap();
        let good = top.starts_with('.')
            || (path.contains('/') && folders.contains(&top))
            || (!path.contains('/') && allowed.contains(&top));
        assert!(good, "{path}: the top level holds {allowed:?}, {folders:?} and dot-entries");
    }
}

#[test]
fn decisions_see_values_only() {
    let mut seen = BTreeSet::new();
    for (path, text) in rust_files() {
        let Some(rule) = PURE.iter().find(|pure| path == **pure || path.starts_with(&format!("{pure}/"))) else {
            continue;
        };
        seen.insert(*rule);
        for banned in ["async ", ".await", "tokio::", "std::net", "Instant::now", "SystemTime::now", "tracing::"] {
            let code = program_text(&text).lines().filter(|line| !line.trim_start().starts_with("//"));
            let hits: Vec<&str> = code.filter(|line| line.contains(banned)).collect();
            assert!(hits.is_empty(), "{path} decides, so it must not contain `{banned}`: {hits:?}");
        }
    }
    let folders_may_lack: BTreeSet<&str> = PURE.into_iter().filter(|pure| tests::root().join(pure).exists()).collect();
    assert_eq!(seen, folders_may_lack, "each pure module was read");
}

#[test]
fn files_are_laid_out_as_the_style_says() {
    for (path, text) in rust_files() {
        assert!(!path.ends_with("/mod.rs"), "{path}: write a file beside the folder instead of mod.rs");
        assert!(text.starts_with("//!") || text.starts_with("#!"), "{path} must open with what it answers for (`//!`)");
        let lines = text.lines().count();
        assert!(lines <= 700, "{path} has {lines} lines: is there a second subject in it?");
    }
}

#[test]
fn packages_are_named_as_their_folders() {
    for manifest in tracked().iter().filter(|path| path.ends_with("/Cargo.toml")) {
        let folder = Path::new(manifest).parent().unwrap().file_name().unwrap().to_str().unwrap();
        let text = fs::read_to_string(tests::root().join(manifest)).unwrap();
        assert!(text.contains(&format!("name = \"{folder}\"")), "{manifest} must name its package {folder}");
    }
}

#[test]
fn tests_poll_instead_of_sleeping() {
    for (path, text) in rust_files() {
        let all_tests = path.contains("/tests/") || path.starts_with("tests/") || path.ends_with("/tests.rs");
        let test_code = match all_tests {
            true => text.as_str(),
            false => text.split_once("#[cfg(test)]").map_or("", |(_, tests)| tests),
        };
        let this_file = path == "tests/tidy.rs";
        let says_why = |line: &str| line.contains("// polls") || line.contains("// the time is what is tried");
        let bare: Vec<&str> = test_code.lines().filter(|line| line.contains("sleep(") && !says_why(line)).collect();
        assert!(this_file || bare.is_empty(), "{path}: poll a condition with a deadline: {bare:?}");
    }
}

#[test]
fn silenced_lints_say_why() {
    for (path, text) in rust_files() {
        let mut rest = text.as_str();
        while let Some(at) = rest.find("allow(").filter(|_| path != "tests/tidy.rs") {
            let end = rest[at..].find(")]").map_or(rest.len(), |end| at + end);
            let is_attribute = rest[..at].ends_with("#[") || rest[..at].ends_with("#![");
            assert!(!is_attribute || rest[at..end].contains("reason"), "{path}: {} has no reason", &rest[at..end]);
            rest = &rest[at + 1..];
        }
    }
}
