//! Connections to workers.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use tonic::transport::Channel;

/// One connection a worker, made at the first call.
#[derive(Debug, Default)]
pub struct Channels(Mutex<HashMap<String, Channel>>);

impl Channels {
    /// The channel to `address`.
    pub fn get(&self, address: &str) -> Channel {
        let mut channels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return channel.clone();
        }
        let channel = wire::connect(address);
        channels.insert(address.to_owned(), channel.clone());
        channel
    }

    /// Forgets those that are not `wanted`; calls that run keep theirs.
    pub fn retain(&self, wanted: impl Fn(&str) -> bool) {
        let mut channels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|address, _| wanted(address));
    }
}
