//! Child processes: started from a [`Launch`], kept alive, and ended with their parent.
//!
//! Every child holds the reading end of a pipe as its standard input. What it is to read comes on that, so nothing lies
//! on the disk that a killed parent would leave. That it closes, whatever the parent died of, tells the child to end.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt as _,
    process::{ChildStdin, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};

use crate::launch::{Launch, Value};

/// The pause before the first restart; doubled by each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A child that lived so long had started well.
const LIVED: Duration = Duration::from_secs(5);

/// The path of a file that is handed over on standard input.
pub(super) const STANDARD_INPUT: &str = "-";

/// What becomes of a child.
#[derive(Debug)]
pub(super) enum Event {
    Started {
        name: String,
        pid: u32,
    },
    /// Nobody asked it to. It is started again after a pause.
    Died {
        name: String,
        how: String,
        deaths: u32,
        pause: Duration,
    },
}

/// A child that is kept alive.
pub(super) struct Child {
    stop: watch::Sender<bool>,
    keeper: JoinHandle<()>,
}

impl Child {
    /// Starts a child and, whenever it dies, another.
    pub(super) fn start(name: String, programs: &Path, launch: Launch, events: mpsc::Sender<Event>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let keeper = Keeper { name, programs: programs.to_owned(), launch, events };
        Self { stop, keeper: tokio::spawn(keeper.keep(stopped)) }
    }

    /// Tells the child to end, and kills it if it has not ended after `grace`.
    pub(super) async fn end(self, grace: Duration) {
        let Self { stop, mut keeper } = self;
        stop.send_replace(true);
        if tokio::time::timeout(grace, &mut keeper).await.is_err() {
            keeper.abort(); // drops the child, which kills it
            drop(keeper.await);
        }
    }
}

struct Keeper {
    name: String,
    programs: PathBuf,
    launch: Launch,
    events: mpsc::Sender<Event>,
}

impl Keeper {
    async fn keep(self, mut stopped: watch::Receiver<bool>) {
        let mut deaths = 0;
        loop {
            let start = Instant::now();
            let Some(how) = self.live(stopped.clone()).await else {
                return;
            };
            deaths = if start.elapsed() > LIVED { 1 } else { deaths + 1 };
            let pause = FIRST_PAUSE.saturating_mul(1 << (deaths - 1).min(10)).min(LONGEST_PAUSE);
            drop(self.events.send(Event::Died { name: self.name.clone(), how, deaths, pause }).await);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = told(&mut stopped) => return,
            }
        }
    }

    /// Runs the child once. Returns how it died, or nothing if it was told to end.
    async fn live(&self, mut stopped: watch::Receiver<bool>) -> Option<String> {
        let mut child = match command(&self.programs, &self.launch).stdout(Stdio::null()).spawn() {
            Ok(child) => child,
            Err(error) => return Some(format!("could not be started: {error}")),
        };
        let mut pipe = child.stdin.take();
        if let Some(pid) = child.id() {
            drop(self.events.send(Event::Started { name: self.name.clone(), pid }).await);
        }
        tokio::select! {
            (status, ()) = async { tokio::join!(child.wait(), self.hand_over(pipe.as_mut())) } => Some(match status {
                Ok(status) => format!("died ({status})"),
                Err(error) => format!("is lost: {error}"),
            }),
            () = told(&mut stopped) => {
                drop(pipe);
                drop(child.wait().await);
                None
            }
        }
    }

    /// Writes the files of the launch to the child's standard input, each a line.
    async fn hand_over(&self, pipe: Option<&mut ChildStdin>) {
        let Some(pipe) = pipe else { return };
        for file in self.launch.files.iter().filter(|file| file.path == STANDARD_INPUT) {
            // a child that does not read it says why
            drop(pipe.write_all(format!("{}\n", file.content).as_bytes()).await);
        }
    }
}

/// Waits until the child is to end.
async fn told(stopped: &mut watch::Receiver<bool>) {
    drop(stopped.wait_for(|stop| *stop).await);
}

/// How a child that runs once ended.
pub(super) enum Outcome {
    /// Its standard output.
    Good(Vec<u8>),
    /// What it said last on standard error.
    Bad(String),
}

/// Runs a child to its end.
pub(super) async fn run_once(programs: &Path, launch: &Launch) -> io::Result<Outcome> {
    let mut command = command(programs, launch);
    command.env("NO_COLOR", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let pipe = child.stdin.take();
    let output = child.wait_with_output().await?;
    drop(pipe);
    if output.status.success() {
        return Ok(Outcome::Good(output.stdout));
    }
    let said = last_words(&String::from_utf8_lossy(&output.stderr));
    Ok(Outcome::Bad(if said.is_empty() { output.status.to_string() } else { said }))
}

/// In a process group of its own: Ctrl-C is for the parent, which ends its children in order.
fn command(programs: &Path, launch: &Launch) -> Command {
    let mut command = Command::new(programs.join(launch.program.file_name()));
    command.env_remove("OTEL_SERVICE_NAME"); // who the parent is
    command.args(&launch.arguments).stdin(Stdio::piped()).kill_on_drop(true).process_group(0);
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "warn");
    }
    for variable in &launch.environment {
        if let Value::Text(text) = &variable.value {
            command.env(&variable.name, text);
        }
    }
    command
}

/// The error that a program ended with: the last that it logged, or else its last line.
fn last_words(text: &str) -> String {
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let logged = lines().filter_map(|line| line.split_once(" ERROR ")).next_back();
    let message = logged.and_then(|(_, said)| said.split_once(": ")).map(|(_, message)| message);
    message.or(lines().next_back()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_why_a_program_ended() {
        let text =
            "2026-01-01T00:00:00Z  WARN hub: slow\n2026-01-01T00:00:01Z ERROR worker: read config.json: line 3\n";
        assert_eq!(last_words(text), "read config.json: line 3");
        assert_eq!(last_words("usage\nno such flag\n\n"), "no such flag");
        assert_eq!(last_words(""), "");
    }
}
