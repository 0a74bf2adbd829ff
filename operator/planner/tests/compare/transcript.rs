//! Texts that a person reads once, kept beside the tests. `UPDATE=1 cargo test -p planner` writes them anew.

/// Compares a text with the one that is kept.
pub(crate) fn compare(name: &str, text: &str) {
    let path = format!("{}/tests/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, text).expect("the transcript can be written");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == text,
        "operator/planner/tests/{name}.txt differs; run: UPDATE=1 cargo test -p planner\n{text}"
    );
}
