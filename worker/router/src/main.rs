//! `modelfleet-router`: arguments, telemetry, sockets, signals, one call.

use std::{future::Future, io, net::SocketAddr, time::Duration};

use anyhow::Context as _;
use clap::Parser;
use router::{Ending, Listeners, Router, control, serve};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};
use tracing::info;
use wire::{
    admin::{self, Admin},
    fleet,
    proto::{Hello, hello::Role},
    telemetry,
};

/// Routes OpenAI HTTP and typed gRPC requests to the workers of all models.
#[derive(Parser)]
#[command(version, name = "modelfleet-router")]
struct Arguments {
    /// Where OpenAI's HTTP is served.
    #[arg(long, default_value = "[::]:8080")]
    http: String,
    /// Where gRPC is served.
    #[arg(long, default_value = "[::]:9090")]
    grpc: String,
    /// Where health and metrics are served.
    #[arg(long, default_value = "[::]:9400")]
    admin: String,
    /// An operator; its name is resolved to all its addresses, again and again. May be given more than once.
    #[arg(long, required = true)]
    operator: Vec<String>,
    /// The HTTP address that the operator tells others; what was bound if not given.
    #[arg(long)]
    advertise_http: Option<String>,
    /// The gRPC address that the operator tells others; what was bound if not given.
    #[arg(long)]
    advertise_grpc: Option<String>,
    /// The pod's UID, or in local mode a token of the parent.
    #[arg(long, env = "MODELFLEET_ID", hide_env_values = true, default_value = "")]
    id: String,
    /// Seconds for which requests are still taken after SIGTERM, until clients know other routers only.
    #[arg(long, default_value_t = 5)]
    linger: u64,
    /// Seconds that running requests get after that.
    #[arg(long, default_value_t = 600)]
    drain_timeout: u64,
    /// Ends when standard input closes, as it does when the parent dies.
    #[arg(long)]
    exit_with_stdin: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let telemetry = telemetry::start("modelfleet-router").context("starting telemetry")?;
    let served = run(arguments, &telemetry).await;
    telemetry.shutdown().await;
    served
}

async fn run(arguments: Arguments, telemetry: &telemetry::Telemetry) -> anyhow::Result<()> {
    let listeners = Listeners { http: bind(&arguments.http).await?, grpc: bind(&arguments.grpc).await? };
    let admin_listener = bind(&arguments.admin).await?;
    let (http, grpc) = (listeners.http.local_addr()?, listeners.grpc.local_addr()?);
    info!(%http, %grpc, admin = %admin_listener.local_addr()?, "listening");
    let router = Router::new(&telemetry.meter());

    let ready = router.readiness();
    let ready = move || {
        if *ready.borrow() { Ok(()) } else { Err("does not know the models yet, or ends".to_owned()) }
    };
    let admin = Admin { ready, registry: telemetry.registry(), pages: Vec::new() };
    let admin = tokio::spawn(admin::serve(admin_listener, admin, std::future::pending()));

    let hello = hello(&arguments, http, grpc);
    let (reports, receiver) = mpsc::channel(64);
    let instructions = fleet::watch(arguments.operator.clone(), move || hello.clone(), receiver);
    let control = tokio::spawn(control::follow(router.clone(), instructions, reports));

    let ending = Ending {
        linger: Duration::from_secs(if arguments.exit_with_stdin { 0 } else { arguments.linger }),
        grace: Duration::from_secs(arguments.drain_timeout),
    };
    serve(listeners, router, end(arguments.exit_with_stdin)?, ending).await.context("serving")?;
    control.abort();
    admin.abort();
    info!("ended");
    Ok(())
}

async fn bind(address: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))
}

fn hello(arguments: &Arguments, http: SocketAddr, grpc: SocketAddr) -> Hello {
    let advertised = |given: &Option<String>, bound: SocketAddr| given.clone().unwrap_or_else(|| bound.to_string());
    Hello {
        role: Role::Router.into(),
        id: arguments.id.clone(),
        process: format!("{:032x}", fastrand::u128(..)),
        address: advertised(&arguments.advertise_grpc, grpc),
        http_address: advertised(&arguments.advertise_http, http),
        ..Default::default()
    }
}

/// Resolves when the process is told to end.
fn end(with_stdin: bool) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = closed(with_stdin) => {}
        }
    })
}

async fn closed(with_stdin: bool) {
    if !with_stdin {
        return std::future::pending().await;
    }
    let (sender, closed) = oneshot::channel::<()>();
    // a thread, not a task: a read of standard input cannot be cancelled, and would hold up the end after SIGTERM
    std::thread::spawn(move || {
        let _ended = sender;
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    });
    let _ = closed.await;
}
