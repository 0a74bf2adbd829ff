//! A peer that asks in frames: a thread that reads its calls, and computes those that would be computed at once.

use std::{sync::Arc, thread};

use futures::executor::block_on;
use tokio::sync::oneshot;
use tracing::{debug, error};
use wire::{
    connections::framed::{Connection, Waiting},
    frames::{self, Outgoing},
    proto::RunCall,
};

use super::{
    pool::SendReply,
    service::{ExpertsService, STREAM_CALLS},
};

/// Serves it until it ends the connection. Dropping the future closes that.
pub(super) async fn serve(service: ExpertsService, mut connection: Connection) {
    let (incoming, outgoing) = (connection.incoming(), connection.outgoing(STREAM_CALLS));
    let (replies, (end, ended)) = (outgoing.clone(), oneshot::channel::<()>());
    let reading = thread::Builder::new().name("experts-peer".into()).spawn(move || {
        if let Err(error) = read(&service, incoming, &replies) {
            debug!(error = &error as &dyn std::error::Error, "a peer's connection ended");
        }
        drop(end);
    });
    if let Err(error) = reading {
        return error!(%error, "no thread for a peer");
    }
    tokio::select! {
        _ = ended => {}
        () = outgoing.flush() => {}
    }
}

/// Takes calls until the peer ends.
fn read(service: &ExpertsService, mut incoming: Waiting, replies: &Arc<Outgoing>) -> Result<(), frames::Error> {
    while let Some(call) = incoming.receive::<RunCall>()? {
        let place = replies.try_reserve();
        let place = place.map(|place| -> SendReply { Box::new(move |reply| _ = place.send(reply)) });
        if let Some(refusal) = service.compute(call, place) {
            // a peer that does not read its refusals is not read either
            match block_on(replies.reserve()) {
                Some(place) => _ = place.send(refusal),
                None => break,
            }
        }
    }
    Ok(())
}
