//! What names, labels and paths may look like: the patterns of `crds::rules`, as functions.

/// `[a-z0-9]([a-z0-9.-]*[a-z0-9])?`: names of objects.
pub(super) fn is_object_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    is_framed(text, inner, |b| inner(b) || b == b'.' || b == b'-')
}

/// `[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?`, at most 63: a label's name, and its value unless that is empty.
pub(super) fn is_label_name(text: &str) -> bool {
    let free = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    text.len() <= 63 && is_framed(text, |b| b.is_ascii_alphanumeric(), free)
}

/// `NAME` or `DOMAIN/NAME`.
pub(super) fn is_label_key(text: &str) -> bool {
    match text.split_once('/') {
        Some((domain, name)) => domain.len() <= 253 && is_object_name(domain) && is_label_name(name),
        None => is_label_name(text),
    }
}

/// A label's value; may be empty.
pub(super) fn is_label_value(text: &str) -> bool {
    text.is_empty() || is_label_name(text)
}

/// Not empty, first and last of one kind, the others of another.
pub(super) fn is_framed(text: &str, frame: impl Fn(u8) -> bool, free: impl Fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    let ends = [bytes.first(), bytes.last()].into_iter().all(|end| end.is_some_and(|b| frame(*b)));
    ends && bytes.iter().all(|b| free(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_what_kubernetes_takes() {
        assert!(is_object_name("a") && is_object_name("a-b.c1") && is_object_name("1a"));
        assert!(!is_object_name("") && !is_object_name("-a") && !is_object_name("A") && !is_object_name("a_b"));
        assert!(is_label_key("disk") && is_label_key("example.com/disk_Type.1"));
        assert!(!is_label_key("") && !is_label_key("/a") && !is_label_key("a/b/c") && !is_label_key("a b"));
        assert!(is_label_value("") && is_label_value(&"a".repeat(63)) && !is_label_value(&"a".repeat(64)));
    }
}
