//! Where the model comes from, and what it is called.

use std::collections::BTreeSet;

use crds::{Reason, rules};

use super::fields::{is_framed, is_object_name};
use super::{Input, Place, Refusal, unless};

const SOURCE: &str = "spec.model.source";
const SOURCE_LENGTH: usize = 512;
const REVISION_LENGTH: usize = 256;
const SERVED_NAMES: usize = 16;
const SERVED_NAME_LENGTH: usize = 128;
const OBJECT_NAME_LENGTH: usize = 253;

pub(super) fn scheme(input: &Input<'_>) -> Vec<Refusal> {
    let source = &input.spec.model.source;
    let known = ["hf://", "pvc://", "file://"].iter().any(|scheme| source.starts_with(scheme));
    unless(known, &rules::SOURCE_SCHEME, Reason::InvalidSource)
}

pub(super) fn no_user(input: &Input<'_>) -> Vec<Refusal> {
    let source = &input.spec.model.source;
    let holds = source.starts_with("file://") || !source.contains('@');
    unless(holds, &rules::SOURCE_USER, Reason::InvalidSource)
}

pub(super) fn no_dots(input: &Input<'_>) -> Vec<Refusal> {
    unless(!has_dots(&input.spec.model.source), &rules::SOURCE_DOTS, Reason::InvalidSource)
}

fn has_dots(source: &str) -> bool {
    let path = source.strip_prefix("hf://").or_else(|| source.strip_prefix("pvc://"));
    path.is_some_and(|path| path.split('/').any(|part| part == "." || part == ".."))
}

/// `hf://OWNER/NAME`, `pvc://CLAIM/PATH`, `file://PATH`; silent where another rule has spoken.
pub(super) fn shape(input: &Input<'_>) -> Vec<Refusal> {
    let source = &input.spec.model.source;
    if let Some(path) = source.strip_prefix("file://") {
        let holds = !path.is_empty() && !path.chars().any(|c| c.is_ascii_control());
        return unless(holds, &rules::SOURCE_FILE, Reason::InvalidSource);
    }
    if source.contains('@') || has_dots(source) {
        return Vec::new();
    }
    if let Some(path) = source.strip_prefix("hf://") {
        let repository = path.split_once('/').is_some_and(|(owner, name)| is_repository(owner) && is_repository(name));
        return unless(repository, &rules::SOURCE_HF, Reason::InvalidSource);
    }
    if let Some(path) = source.strip_prefix("pvc://") {
        return unless(is_claim_path(path), &rules::SOURCE_PVC, Reason::InvalidSource);
    }
    Vec::new()
}

/// `[A-Za-z0-9][A-Za-z0-9._-]{0,95}`
fn is_repository(part: &str) -> bool {
    let first = part.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    first && part.len() <= 96 && part.bytes().all(is_path_byte)
}

fn is_claim_path(path: &str) -> bool {
    let mut parts = path.strip_suffix('/').unwrap_or(path).split('/');
    let claim = parts.next().unwrap_or_default();
    let is_claim = claim.len() <= OBJECT_NAME_LENGTH && is_object_name(claim);
    is_claim && parts.all(|part| !part.is_empty() && part.bytes().all(is_path_byte))
}

fn is_path_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

pub(super) fn length(input: &Input<'_>) -> Vec<Refusal> {
    too_long(SOURCE, &input.spec.model.source, SOURCE_LENGTH, Reason::InvalidSource)
}

/// The schema's `maxLength`, in its words.
pub(super) fn too_long(field: &str, text: &str, most: usize, reason: Reason) -> Vec<Refusal> {
    let length = text.chars().count();
    if length <= most {
        return Vec::new();
    }
    vec![Refusal::new(reason, field, format!("{field} has {length} characters; use at most {most}"))]
}

/// The API server lets both pass, so that one YAML can be tried in both places.
pub(super) fn place(input: &Input<'_>) -> Vec<Refusal> {
    let source = &input.spec.model.source;
    let message = match input.place {
        Place::Cluster if source.starts_with("file://") => {
            "spec.model.source is a file:// of one machine; in a cluster use hf://OWNER/NAME or pvc://CLAIM/PATH"
                .to_owned()
        }
        // a password is not repeated
        Place::Local if source.starts_with("pvc://") && !source.contains('@') => {
            format!(
                "{SOURCE} is {source}, which only a cluster can read; on this machine use hf://OWNER/NAME or file://PATH"
            )
        }
        Place::Cluster | Place::Local => return Vec::new(),
    };
    vec![Refusal::new(Reason::UnsupportedSource, SOURCE, message)]
}

pub(super) fn revision(input: &Input<'_>) -> Vec<Refusal> {
    let model = &input.spec.model;
    let Some(revision) = &model.revision else {
        return Vec::new();
    };
    let first = revision.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = revision.bytes().all(|b| is_path_byte(b) || b == b'/');
    let holds = first && rest && !revision.contains("..");
    let mut refusals = unless(holds, &rules::REVISION, Reason::InvalidRevision);
    refusals.extend(too_long(rules::REVISION.path, revision, REVISION_LENGTH, Reason::InvalidRevision));
    let hub = model.source.starts_with("hf://");
    refusals.extend(unless(hub, &rules::REVISION_OF_HUB, Reason::InvalidRevision));
    refusals
}

pub(super) fn credentials(input: &Input<'_>) -> Vec<Refusal> {
    let model = &input.spec.model;
    let Some(secret) = &model.credentials_ref else {
        return Vec::new();
    };
    let reason = Reason::InvalidReference;
    let name = is_object_name(&secret.name);
    let key = is_secret_key(&secret.key);
    let mut refusals = unless(model.source.starts_with("hf://"), &rules::CREDENTIALS_OF_HUB, reason);
    refusals.extend(unless(name, &rules::SECRET_NAME, reason));
    refusals.extend(unless(key, &rules::SECRET_KEY, reason));
    refusals.extend(too_long(rules::SECRET_NAME.path, &secret.name, OBJECT_NAME_LENGTH, reason));
    refusals.extend(too_long(rules::SECRET_KEY.path, &secret.key, OBJECT_NAME_LENGTH, reason));
    refusals
}

fn is_secret_key(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(is_path_byte) && !key.starts_with("..") && key != "."
}

pub(super) fn served_names(input: &Input<'_>) -> Vec<Refusal> {
    const FIELD: &str = "spec.model.servedNames";
    let reason = Reason::InvalidServedName;
    let Some(names) = &input.spec.model.served_names else {
        return Vec::new();
    };
    let mut refusals = Vec::new();
    if names.is_empty() || names.len() > SERVED_NAMES {
        let message = format!("{FIELD} has {} names; use 1 to {SERVED_NAMES}, or leave it out", names.len());
        refusals.push(Refusal::new(reason, FIELD, message));
    }
    if !names.iter().all(|name| is_served_name(name)) {
        refusals.push(Refusal::of(&rules::SERVED_NAME, reason));
    }
    if let Some(long) = names.iter().map(String::len).find(|length| *length > SERVED_NAME_LENGTH) {
        let message = format!("{FIELD} holds a name of {long} characters; use at most {SERVED_NAME_LENGTH}");
        refusals.push(Refusal::new(reason, FIELD, message));
    }
    let mut seen = BTreeSet::new();
    for name in names.iter().filter(|name| !seen.insert(name.as_str())) {
        refusals.push(Refusal::new(reason, FIELD, format!("{FIELD} holds {name:?} twice; remove one")));
    }
    refusals
}

fn is_served_name(name: &str) -> bool {
    let frame = |b: u8| b.is_ascii_alphanumeric();
    is_framed(name, frame, |b| frame(b) || b"._:/-".contains(&b))
}
