//! Local mode, the second shell: the same plan and the same launches as in a cluster, as child processes on loopback.
//!
//! It applies once: no scaling, no rollout, at least one replica each. A child that dies is started again.

mod ask;
mod child;
mod crew;
mod experts;
mod prepare;
mod read;

use std::{
    collections::BTreeSet,
    future::Future,
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use tokio::net::TcpListener;

use self::crew::{Crew, Started};
pub use self::{
    ask::Error as AskError,
    experts::{Board, Error as ExpertsError, read as read_experts},
    prepare::{Accepted, Error as PrepareError, Planned, Tools, accept, plan},
    read::{Declared, Error as ReadError, Origin, model_name, read},
};
use crate::{control::Fleet, validate::Place};

/// What local mode is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// YAML with `ModelDeployment`s.
    pub files: Vec<PathBuf>,
    /// A question for the first model; with its answer local mode ends.
    pub prompt: Option<String>,
    /// Where the router serves HTTP.
    pub http: SocketAddr,
    /// Where the router serves gRPC.
    pub grpc: SocketAddr,
    /// Where the board is served.
    pub admin: Option<SocketAddr>,
    /// The folder with `modelfleet-router` and `modelfleet-worker`.
    pub programs: PathBuf,
    /// Where fetched models are kept.
    pub cache: PathBuf,
}

/// Where local mode writes.
pub struct Output<'a> {
    /// What the model says, and nothing else.
    pub words: &'a mut (dyn Write + Send),
    /// Who runs where, and what happens to them.
    pub notes: &'a mut (dyn Write + Send),
}

/// Why local mode ended without success.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The files cannot be used.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A model cannot be started.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// Two models want one name.
    #[error("{origin}: spec.model.servedNames has {name}; a model before it answers to {name} already")]
    NameTaken {
        /// Where the second is.
        origin: Origin,
        /// The name.
        name: String,
    },
    /// A program is not where the others are.
    #[error("{} is missing; build all programs with: cargo build --release", .0.display())]
    NoProgram(PathBuf),
    /// An address of the router cannot be had.
    #[error("listen on {address} for --{flag}")]
    Listen {
        /// The flag that sets it.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Something of our own process.
    #[error("{what}")]
    Own {
        /// What we were doing.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A worker says that it cannot go on.
    #[error("{name}: {message}")]
    Failed {
        /// The process.
        name: String,
        /// What it says.
        message: String,
    },
    /// A child cannot be brought up.
    #[error("{name} {how}, {deaths} times in a row")]
    Died {
        /// The process.
        name: String,
        /// How it ended the last time.
        how: String,
        /// How often.
        deaths: u32,
    },
    /// No answer came.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Stopped from outside before the answer was complete.
    #[error("stopped before the answer was complete")]
    Stopped,
}

/// Runs models on this machine.
///
/// 1. Reads, validates, describes, fetches and plans all models.
/// 2. Starts the control stream, the router and the workers, and writes the table of processes once all have spoken.
/// 3. With a prompt: asks the first model and writes its words. Else: fills the board and writes `ready` once every
///    model can answer, and serves until `shutdown`.
/// 4. Drains: first the router ends, then the workers.
///
/// Dropping the future kills the children.
///
/// # Errors
/// See [`Error`]. Nothing runs any more when it returns, with or without one.
pub async fn run<'a>(
    options: &'a Options,
    board: &Board,
    output: Output<'a>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let fleet = Fleet::new();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
    let listener = listener.map_err(|source| Error::Own { what: "listen for the control stream", source })?;
    let address =
        listener.local_addr().map_err(|source| Error::Own { what: "listen for the control stream", source })?;
    let mut crew = Crew::new(options, fleet.clone(), address, output)?;
    let work = async {
        let result = tokio::select! {
            result = serve(options, board, &mut crew) => result,
            () = shutdown => if options.prompt.is_some() { Err(Error::Stopped) } else { Ok(()) },
        };
        crew.end().await;
        result
    };
    tokio::select! {
        result = work => result,
        served = fleet.serve(listener, std::future::pending()) => match served {
            Ok(()) => Err(Error::Stopped),
            Err(source) => Err(Error::Own { what: "serve the control stream", source }),
        },
    }
}

async fn serve(options: &Options, board: &Board, crew: &mut Crew<'_>) -> Result<(), Error> {
    let models = prepare(options, crew).await?;
    let first = models[0].planned.accepted.name.clone();
    let shown = crew.start(models).await?;
    let router = crew.introduce().await?;
    crew.ready().await?;
    match &options.prompt {
        Some(prompt) => crew.ask(router, &first, prompt).await,
        None => {
            board.fill(shown);
            crew.watch().await
        }
    }
}

async fn prepare(options: &Options, crew: &mut Crew<'_>) -> Result<Vec<Started>, Error> {
    let declared = read(&options.files)?;
    let accepted = declared.iter().map(|declared| accept(declared, Place::Local));
    let accepted: Vec<Accepted> = accepted.collect::<Result<_, _>>()?;
    one_name_each(&accepted)?;
    let mut models = Vec::new();
    for accepted in accepted {
        let planned = plan(accepted, crew.tools()).await?;
        let folder = crew.fetch(&planned).await?;
        models.push(Started { planned, folder });
    }
    Ok(models)
}

fn one_name_each(models: &[Accepted]) -> Result<(), Error> {
    let mut taken = BTreeSet::new();
    for accepted in models {
        for name in &accepted.model.served_names {
            if !taken.insert(name) {
                return Err(Error::NameTaken { origin: accepted.origin.clone(), name: name.clone() });
            }
        }
    }
    Ok(())
}
