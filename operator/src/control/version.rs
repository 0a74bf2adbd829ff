//! The order of snapshots.

use wire::proto;

/// Orders the snapshots of one model: by the leader's epoch, then by its own count of changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Raised by each new leader.
    pub epoch: u64,
    /// Raised by each change of the model under one leader.
    pub sequence: u64,
}

impl From<proto::Version> for Version {
    fn from(version: proto::Version) -> Self {
        Self { epoch: version.epoch, sequence: version.sequence }
    }
}

impl From<Version> for proto::Version {
    fn from(version: Version) -> Self {
        Self { epoch: version.epoch, sequence: version.sequence }
    }
}
