//! What happens to a worker, and the proof that it did.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    local::{Process, runs, signal},
    poll::until,
};
use anyhow::{Context, ensure};

/// How long a frozen process is frozen, at most: longer than the router waits for a sign of life.
const LONGEST_FREEZE: Duration = Duration::from_secs(5);
/// A fault that does not show by then has not bitten.
const SHOWS: Duration = Duration::from_secs(10);

/// What happens to a worker.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT after a while.
    Freeze(Duration),
    /// All connections to it are reset.
    Reset,
}

impl Fault {
    /// One at random; resets where they are possible.
    pub fn drawn(draw: &mut fastrand::Rng, can_reset: bool) -> Self {
        match draw.u32(..if can_reset { 3 } else { 2 }) {
            0 => Self::Kill,
            1 => Self::Freeze(LONGEST_FREEZE.mul_f64(draw.f64().powi(2))),
            _ => Self::Reset,
        }
    }
}

/// The faults so far. Those who are frozen go on when it is dropped.
pub struct Faults {
    kills: usize,
    freezes: usize,
    resets: usize,
    can_reset: bool,
    frozen: Vec<(u32, Instant)>,
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} kills, {} freezes, {} resets", self.kills, self.freezes, self.resets)
    }
}

impl Faults {
    /// None yet.
    #[expect(clippy::new_without_default, reason = "it tries what this machine lets it do")]
    pub fn new() -> Self {
        Self { kills: 0, freezes: 0, resets: 0, can_reset: can_reset(), frozen: Vec::new() }
    }

    /// Whether connections can be reset here.
    pub fn can_reset(&self) -> bool {
        self.can_reset
    }

    /// How many have bitten.
    pub fn bitten(&self) -> usize {
        self.kills + self.freezes + self.resets
    }

    /// Does it to `worker`, unless that is gone or frozen, and counts it once it has bitten.
    ///
    /// # Errors
    /// If it does not bite.
    pub fn inject(&mut self, fault: Fault, worker: &Process) -> anyhow::Result<()> {
        let pid = worker.pid;
        if !runs(pid) || self.frozen.iter().any(|&(frozen, _)| frozen == pid) {
            return Ok(());
        }
        match fault {
            Fault::Kill => {
                signal(pid, "KILL")?;
                shows("a killed process ends", || !runs(pid))?;
                self.kills += 1;
            }
            Fault::Freeze(time) => {
                signal(pid, "STOP")?;
                self.frozen.push((pid, Instant::now() + time));
                shows("a stopped process stops", || state(pid) == Some('T'))?;
                self.freezes += 1;
            }
            Fault::Reset => {
                let port = worker.address.rsplit(':').next().context("an address has a port")?;
                self.resets += usize::from(reset(port)? > 0);
            }
        }
        Ok(())
    }

    /// Lets those go on whose time is over.
    pub fn thaw(&mut self, now: Instant) {
        self.frozen.retain(|&(pid, until)| {
            let is_over = until <= now;
            if is_over {
                go_on(pid);
            }
            !is_over
        });
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.frozen.iter().for_each(|&(pid, _)| go_on(pid));
    }
}

fn go_on(pid: u32) {
    if runs(pid) {
        let _ = signal(pid, "CONT"); // it may end in between
    }
}

/// The letter of a process's state.
fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

fn shows(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    until(what, SHOWS, || holds().then_some(()).context("not yet"))
}

/// Resets connections to a port of this machine; how many there were.
fn reset(port: &str) -> anyhow::Result<usize> {
    let output =
        Command::new("ss").args(["-KHtn", "state", "established", "dst", "127.0.0.1", "dport", "=", port]).output()?;
    ensure!(output.status.success(), "ss: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).lines().count())
}

/// Whether this machine lets us reset connections: it has `ss`, its kernel can, and we may.
fn can_reset() -> bool {
    let resets_own = || -> anyhow::Result<bool> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let mut client = std::net::TcpStream::connect(("127.0.0.1", port))?;
        reset(&port.to_string())?;
        Ok(std::io::Read::read(&mut client, &mut [0]).is_err())
    };
    resets_own().unwrap_or(false)
}
