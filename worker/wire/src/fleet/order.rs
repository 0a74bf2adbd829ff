//! Which instructions are news: pure bookkeeping over epochs and versions.

use std::collections::{BTreeSet, HashMap};

use crate::proto::{Instruction, ModelRemoved, Version, instruction};

/// What all streams together have said.
#[derive(Default)]
pub(super) struct Order {
    epoch: u64,
    newest: HashMap<String, (u64, u64)>,
    /// Models that routers know; a worker's mesh is none of them.
    known: BTreeSet<String>,
}

/// What one stream has said since it began.
#[derive(Default)]
pub(super) struct Said {
    epoch: u64,
    models: BTreeSet<String>,
}

impl Order {
    /// The highest epoch that was heard.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What the process is to hear of `instruction`, which came on the stream of `said`: usually itself, nothing if it
    /// is old, and for a `Synced` first the removal of what this leader did not send.
    pub(super) fn admit(&mut self, said: &mut Said, instruction: Instruction) -> Vec<Instruction> {
        match &instruction.instruction {
            Some(instruction::Instruction::Model(snapshot)) => {
                if !self.is_news(said, &snapshot.model, snapshot.version) {
                    return Vec::new();
                }
                said.models.insert(snapshot.model.clone());
                self.known.insert(snapshot.model.clone());
                vec![instruction]
            }
            Some(instruction::Instruction::Mesh(mesh)) => {
                if self.is_news(said, &mesh.model, mesh.version) {
                    vec![instruction]
                } else {
                    Vec::new()
                }
            }
            Some(instruction::Instruction::Removed(removed)) => {
                if self.is_deposed(said) {
                    return Vec::new();
                }
                said.models.remove(&removed.model);
                self.forget(&removed.model);
                vec![instruction]
            }
            Some(instruction::Instruction::Synced(_)) => {
                if self.is_deposed(said) {
                    return Vec::new();
                }
                let gone: Vec<String> = self.known.difference(&said.models).cloned().collect();
                let mut all: Vec<Instruction> = gone.iter().map(|model| removal(model)).collect();
                gone.iter().for_each(|model| self.forget(model));
                all.push(instruction);
                all
            }
            None => Vec::new(), // of a newer release
        }
    }

    fn is_news(&mut self, said: &mut Said, model: &str, version: Option<Version>) -> bool {
        let version = version.unwrap_or_default();
        said.epoch = said.epoch.max(version.epoch);
        self.epoch = self.epoch.max(version.epoch);
        let version = (version.epoch, version.sequence);
        let newest = self.newest.entry(model.to_owned()).or_insert(version);
        // the same once more is no harm: it is what a leader says on a new stream
        let news = version.0 == self.epoch && version >= *newest;
        if news {
            *newest = version;
        }
        news
    }

    /// Whether the stream is of a leader after whom another came. One that has told no version yet may be the newest.
    fn is_deposed(&self, said: &Said) -> bool {
        said.epoch != 0 && said.epoch < self.epoch
    }

    fn forget(&mut self, model: &str) {
        self.known.remove(model);
        self.newest.remove(model); // a model of that name made later counts from the beginning
    }
}

fn removal(model: &str) -> Instruction {
    let removed = ModelRemoved { model: model.to_owned() };
    Instruction { instruction: Some(instruction::Instruction::Removed(removed)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{ModelSnapshot, Synced};

    fn model(name: &str, epoch: u64, sequence: u64) -> Instruction {
        let version = Some(Version { epoch, sequence });
        let snapshot = ModelSnapshot { model: name.into(), version, ..Default::default() };
        Instruction { instruction: Some(instruction::Instruction::Model(snapshot)) }
    }

    fn synced() -> Instruction {
        Instruction { instruction: Some(instruction::Instruction::Synced(Synced {})) }
    }

    #[test]
    fn the_newest_version_wins_whatever_the_order_of_arrival() {
        let (mut order, mut said) = (Order::default(), Said::default());
        assert_eq!(order.admit(&mut said, model("a/m", 1, 2)).len(), 1);
        assert!(order.admit(&mut said, model("a/m", 1, 1)).is_empty());
        assert_eq!(order.admit(&mut said, model("a/m", 1, 2)).len(), 1, "a new stream repeats it");
        assert_eq!(order.admit(&mut said, model("a/n", 1, 1)).len(), 1, "models count on their own");
    }

    #[test]
    fn a_deposed_leader_is_not_heard() {
        let (mut order, mut old, mut new) = (Order::default(), Said::default(), Said::default());
        order.admit(&mut old, model("a/m", 1, 9));
        assert_eq!(order.admit(&mut new, model("a/m", 2, 1)).len(), 1);
        assert!(order.admit(&mut old, model("a/m", 1, 10)).is_empty());
        assert!(order.admit(&mut old, removal("a/m")).is_empty());
        assert!(order.admit(&mut old, synced()).is_empty());
        assert_eq!(order.epoch(), 2);
    }

    #[test]
    fn what_a_new_leader_does_not_send_before_synced_is_gone() {
        let (mut order, mut old, mut new) = (Order::default(), Said::default(), Said::default());
        order.admit(&mut old, model("a/m", 1, 1));
        order.admit(&mut old, model("a/n", 1, 1));
        order.admit(&mut new, model("a/n", 2, 1));
        assert_eq!(order.admit(&mut new, synced()), [removal("a/m"), synced()]);
        assert_eq!(order.admit(&mut new, synced()), [synced()]);
    }

    #[test]
    fn a_model_made_again_counts_from_the_beginning() {
        let (mut order, mut said) = (Order::default(), Said::default());
        order.admit(&mut said, model("a/m", 1, 7));
        order.admit(&mut said, removal("a/m"));
        assert_eq!(order.admit(&mut said, model("a/m", 1, 1)).len(), 1);
    }
}
