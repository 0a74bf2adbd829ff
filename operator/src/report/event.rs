//! What is told as an Event: each condition that came to say something else, and each change of size.

use crds::{ConditionType, ModelDeploymentStatus, Reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// An Event to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// A person may have to act.
    pub warning: bool,
    /// The condition's reason.
    pub reason: String,
    /// The condition's type.
    pub action: String,
    /// The condition's message.
    pub message: String,
}

/// The events between two statuses. The first status tells nothing that is as it should be.
pub fn notes(before: Option<&ModelDeploymentStatus>, after: &ModelDeploymentStatus) -> Vec<Note> {
    let old = before.map(|before| before.conditions.as_slice()).unwrap_or_default();
    let mut notes: Vec<Note> = Vec::new();
    for note in after.conditions.iter().filter(|one| !quiet(one) && said_otherwise(old, one)).map(note) {
        // two conditions may say the same, such as that the model is being described
        if !notes.iter().any(|told| told.reason == note.reason && told.message == note.message) {
            notes.push(note);
        }
    }
    notes
}

fn said_otherwise(old: &[Condition], new: &Condition) -> bool {
    let same = |one: &&Condition| one.type_ == new.type_;
    !old.iter().find(same).is_some_and(|one| one.status == new.status && one.reason == new.reason)
}

/// States that everything begins with, and holds of the autoscaler that only repeat the number.
fn quiet(condition: &Condition) -> bool {
    let reasons = [
        Reason::AsDesired,
        Reason::Disabled,
        Reason::Steady,
        Reason::Stabilizing,
        Reason::RedistributionTooHigh,
        Reason::PodsPending,
        Reason::Scheduled,
        Reason::ReplicasMissing,
        Reason::Valid,
    ];
    reasons.iter().any(|reason| reason.to_string() == condition.reason)
}

fn note(condition: &Condition) -> Note {
    let calm = [
        Reason::Describing,
        Reason::Fetching,
        Reason::Loading,
        Reason::NotRouted,
        Reason::ScaledToZero,
        Reason::Suspended,
    ];
    let bad = if condition.type_ == ConditionType::Degraded.as_str() { "True" } else { "False" };
    let expected = calm.iter().any(|reason| reason.to_string() == condition.reason);
    Note {
        warning: condition.status == bad && !expected,
        reason: condition.reason.clone(),
        action: condition.type_.clone(),
        message: condition.message.clone(),
    }
}
