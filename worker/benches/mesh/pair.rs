//! A worker that asks, ordinal 0, and one that holds experts, ordinal 1.

use std::sync::Arc;

use engine::Experts;
use opentelemetry::metrics::{MeterProvider as _, noop::NoopMeterProvider};
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::service::Routes;
use wire::{
    Services,
    proto::{self, experts_server::ExpertsServer},
};
use worker::{
    experts::{
        exchange::{MeshExchange, Own},
        pool::Pool,
        service::ExpertsService,
        standing::Board,
    },
    mesh::{Mesh, Meshes},
    metrics::Metrics,
};

const CONTENT: &str = "content";

fn metrics() -> Arc<Metrics> {
    Metrics::new(&NoopMeterProvider::new().meter("bench"))
}

/// Serves `experts` on `far`, with one thread for them, over gRPC and perhaps in frames; returns the address.
pub(crate) async fn holder(far: &Runtime, experts: &Arc<Experts>, in_frames: bool) -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let listener = listener.into_std()?;
    let service = ExpertsService::new(experts.clone(), Pool::start(experts, 1, metrics())?, CONTENT);
    let frames = Arc::new(service.frames());
    let service = ExpertsServer::new(service).max_decoding_message_size(wire::MAX_MESSAGE_BYTES);
    let grpc = Services::from(Routes::new(service));
    let services = if in_frames { grpc.with_frames(frames) } else { grpc };
    far.spawn(async move {
        let listener = TcpListener::from_std(listener).expect("a listener of tokio's stays one");
        wire::serve(listener, services, std::future::pending()).await
    });
    Ok(address)
}

/// What asks a holder at `address` for the experts that `layers` say it has.
pub(crate) fn exchange(experts: &Experts, address: String, layers: Vec<proto::LayerPlacement>) -> MeshExchange {
    let peer = proto::Peer { id: "holder".into(), address, ordinal: 1, loaded: true, ..Default::default() };
    let snapshot = proto::MeshSnapshot {
        version: Some(proto::Version { epoch: 1, sequence: 1 }),
        placement: Some(proto::Placement { shards: 2, layers }),
        peers: vec![peer],
        ..Default::default()
    };
    let meshes = Meshes::new(Mesh::default());
    meshes.take(snapshot).expect("the first one counts");
    let (hidden, dtype) = (experts.hidden(), experts.dtype());
    let own = Own { replica: 0, ordinal: 0, content_hash: CONTENT.into(), hidden, dtype };
    MeshExchange::new(own, meshes, Board::new(metrics()), None, metrics())
}
