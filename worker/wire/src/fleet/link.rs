//! The stream to one operator: made, held, made again.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};
use tracing::{debug, warn};

use super::{Shared, order::Said};
use crate::{
    MAX_MESSAGE_BYTES, connect,
    proto::{fleet_client::FleetClient, instruction},
};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Whether the name still resolves to this operator.
#[derive(Clone)]
pub(super) struct Wanted(Arc<AtomicBool>);

impl Default for Wanted {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl Wanted {
    pub(super) fn set(&self, wanted: bool) {
        self.0.store(wanted, Relaxed);
    }
}

/// Holds a stream until the operator is no longer wanted, or there is nothing more to report and nobody to hear from.
pub(super) async fn run(operator: SocketAddr, shared: Arc<Shared>, wanted: Wanted) -> SocketAddr {
    let channel = connect(&operator.to_string());
    let mut pause = FIRST_PAUSE;
    loop {
        match hold(operator, &channel, &shared).await {
            Ok(heard) => {
                if heard {
                    pause = FIRST_PAUSE;
                }
                if shared.outboxes().closed {
                    return operator; // it has taken in all that there is to say
                }
                debug!(%operator, "the operator ended the control stream");
            }
            Err(status) if status.code() == Code::PermissionDenied => {
                warn!(%operator, why = status.message(), "the operator refuses the control stream");
            }
            Err(status) => debug!(%operator, code = ?status.code(), "no control stream"),
        }
        shared.outboxes().open.remove(&operator);
        if !wanted.0.load(Relaxed) || shared.inbox.is_closed() {
            return operator;
        }
        tokio::time::sleep(jittered(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One stream, until it ends: without an error only if the operator took in all that was said. Returns whether anything
/// was heard on it.
async fn hold(operator: SocketAddr, channel: &Channel, shared: &Shared) -> Result<bool, Status> {
    let mut client = FleetClient::new(channel.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let reports = ReceiverStream::new(shared.open(operator));
    let mut instructions = client.watch(reports).await?.into_inner();
    let mut said = Said::default();
    let mut heard = false;
    while let Some(instruction) = instructions.message().await? {
        heard = true;
        let news = shared.order().admit(&mut said, instruction);
        for instruction in news {
            if let Some(instruction::Instruction::Removed(removed)) = &instruction.instruction {
                shared.outboxes().latest.forget(&removed.model);
            }
            if shared.inbox.send(instruction).await.is_err() {
                return Ok(heard);
            }
        }
    }
    Ok(heard)
}

/// Half to all of `pause`, so that processes that lost an operator together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let draw = RandomState::new().hash_one(0) % 500;
    pause.mul_f64(0.5 + draw as f64 / 1000.0)
}
