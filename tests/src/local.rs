//! A fleet in local mode, as a user starts it: the `modelfleet` program and the processes that it makes.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, bail, ensure};

use crate::poll::until;

/// The longest that a fleet may take to be ready, or to end.
const PATIENCE: Duration = Duration::from_secs(180);

/// One line of what `modelfleet local` prints on standard error: `NAME PID ADDRESS EXPERTS`.
#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    /// `router`, or the worker's name.
    pub name: String,
    /// Process id.
    pub pid: u32,
    /// Where it serves.
    pub address: String,
    /// The experts it holds, or `-`.
    pub experts: String,
}

impl Process {
    /// The loopback addresses that it listens on.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn listens(&self) -> anyhow::Result<Vec<String>> {
        const LISTENING: &str = "0A";
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid))?.filter_map(Result::ok);
        let links = descriptors.filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok());
        let own: BTreeSet<String> = links.map(|link| link.to_string_lossy().into_owned()).collect();
        let table = std::fs::read_to_string(format!("/proc/{}/net/tcp", self.pid))?;
        let rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
        let listening = rows.filter(|row| row[3] == LISTENING && own.contains(&format!("socket:[{}]", row[9])));
        let ports = listening.filter_map(|row| u16::from_str_radix(row[1].rsplit(':').next()?, 16).ok());
        Ok(ports.map(|port| format!("127.0.0.1:{port}")).collect())
    }

    /// The address at which it tells its metrics.
    ///
    /// # Errors
    /// If none of its addresses does.
    pub async fn admin(&self) -> anyhow::Result<String> {
        for address in self.listens()? {
            if self.address != address && metrics(&address).await.is_ok() {
                return Ok(address);
            }
        }
        bail!("{} tells its metrics nowhere", self.name)
    }
}

/// What `/metrics` at `address` says.
///
/// # Errors
/// If there is no such thing.
pub async fn metrics(address: &str) -> anyhow::Result<String> {
    metrics_over(&client()?, address).await
}

/// A client for [`metrics_over`].
///
/// # Errors
/// If there can be none.
pub fn client() -> anyhow::Result<reqwest::Client> {
    // A second call finds the first one's provider in place, which is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build()?)
}

/// As [`metrics`], for one who asks often: it takes long to make a client.
///
/// # Errors
/// If there is no such thing.
pub async fn metrics_over(client: &reqwest::Client, address: &str) -> anyhow::Result<String> {
    Ok(client.get(format!("http://{address}/metrics")).send().await?.error_for_status()?.text().await?)
}

/// A running `modelfleet local`. It is killed when dropped; its children end by themselves.
pub struct Fleet {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Fleet {
    /// Starts `modelfleet local FILE` with ports of the system's choice.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn start(file: &Path, environment: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut command = crate::command("modelfleet");
        command.arg("local").arg(file);
        for flag in ["--http", "--grpc", "--admin"] {
            command.args([flag, "127.0.0.1:0"]);
        }
        command.envs(environment.iter().copied());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let stderr = child.stderr.take().context("standard error is piped")?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                seen.lock().expect("no reader panics").push(String::from_utf8_lossy(&line).into_owned());
            }
        });
        Ok(Self { child, lines })
    }

    /// Waits until the fleet says `ready`.
    ///
    /// # Errors
    /// If it ends or three minutes pass before, with all that it printed.
    pub fn ready(&mut self) -> anyhow::Result<()> {
        let is_ready = until("the fleet is ready", PATIENCE, || {
            let is_ready = self.printed().iter().any(|line| line == "ready");
            ensure!(is_ready || self.child.try_wait()?.is_some(), "{:#?}", self.printed());
            Ok(is_ready)
        });
        ensure!(is_ready?, "the fleet ended: {:#?}", self.printed());
        Ok(())
    }

    /// All lines of standard error so far.
    pub fn printed(&self) -> Vec<String> {
        self.lines.lock().expect("no writer panics").clone()
    }

    /// Where its lines go, until its end and after.
    pub fn lines(&self) -> Arc<Mutex<Vec<String>>> {
        Arc::clone(&self.lines)
    }

    /// The processes that it printed, in order.
    pub fn processes(&self) -> Vec<Process> {
        self.printed().iter().filter_map(|line| process(line)).collect()
    }

    /// The workers as they were printed last, by name.
    pub fn workers(&self) -> Vec<Process> {
        let workers = self.processes().into_iter().filter(|process| process.name != "router");
        let latest: BTreeMap<String, Process> = workers.map(|process| (process.name.clone(), process)).collect();
        latest.into_values().collect()
    }

    /// `http://HOST:PORT` of the router.
    ///
    /// # Errors
    /// If the router has not been printed yet.
    pub fn url(&self) -> anyhow::Result<String> {
        let router = self.processes().into_iter().find(|process| process.name == "router");
        Ok(format!("http://{}", router.context("the router's line is missing")?.address))
    }

    /// `HOST:PORT` of the router's gRPC: what it listens on beside HTTP and the port that tells metrics.
    ///
    /// # Errors
    /// If there is no such port.
    pub async fn grpc(&self) -> anyhow::Result<String> {
        let router = self.processes().into_iter().find(|process| process.name == "router");
        let router = router.context("the router's line is missing")?;
        let admin = router.admin().await?;
        let other = router.listens()?.into_iter().find(|address| *address != router.address && *address != admin);
        other.context("the router has no third port")
    }

    /// `HOST:PORT` at which it tells its experts.
    ///
    /// # Errors
    /// If it has not said so yet.
    pub fn admin(&self) -> anyhow::Result<String> {
        let printed = self.printed();
        let told = printed.iter().find_map(|line| line.strip_prefix("experts: modelfleet experts NAME --local="));
        Ok(told.context("the line of the experts is missing")?.to_owned())
    }

    /// The process id of `modelfleet local` itself.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to stop (SIGTERM) and waits until it has ended, at most three minutes.
    ///
    /// # Errors
    /// If it does not end, or not well.
    pub fn stop(mut self) -> anyhow::Result<()> {
        signal(self.pid(), "TERM")?;
        let status = until("the fleet ends", PATIENCE, || {
            self.child.try_wait()?.with_context(|| format!("still running: {:#?}", self.printed()))
        })?;
        ensure!(status.success(), "ended with {status}: {:#?}", self.printed());
        Ok(())
    }

    /// Kills it (SIGKILL), as a crash would, and waits for it alone.
    ///
    /// # Errors
    /// If it cannot be killed.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill or to wait for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn process(line: &str) -> Option<Process> {
    let [name, pid, address, experts] = line.split_whitespace().collect::<Vec<_>>().try_into().ok()?;
    let pid = pid.parse().ok()?;
    Some(Process { name: name.to_owned(), pid, address: address.to_owned(), experts: experts.to_owned() })
}

/// Sends a signal to a process.
///
/// # Errors
/// If there is no such process.
pub fn signal(pid: u32, signal: &str) -> anyhow::Result<()> {
    let status = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status()?;
    ensure!(status.success(), "kill -{signal} {pid} failed");
    Ok(())
}

/// Whether a process still runs; one that has ended and waits to be collected does not.
pub fn runs(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    status.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with(['Z', 'X']))
}
