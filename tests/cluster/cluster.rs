//! The cluster as the scenarios see it: commands, conditions that are waited for, faults, and its state when one fails.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tokio::{io::AsyncWriteExt, process::Command, time::sleep};

/// Where the product is installed.
pub(crate) const SYSTEM: &str = "modelfleet-system";
/// Where the scenarios' models are.
pub(crate) const MODELS: &str = "models";

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(200);

/// A running cluster in whose network this process is.
pub(crate) struct Cluster {
    script: PathBuf,
    /// A Python that has the `openai` package.
    pub(crate) python: PathBuf,
    /// The folder with the cluster's state.
    pub(crate) home: PathBuf,
}

impl Cluster {
    /// The cluster that `tests/cluster/cluster in` runs us inside of.
    pub(crate) fn from_environment() -> Option<Self> {
        let home = PathBuf::from(std::env::var_os("MODELFLEET_TEST_CLUSTER")?);
        let python = std::env::var_os("MODELFLEET_PYTHON").map_or_else(|| "python3".into(), PathBuf::from);
        Some(Self { script: tests::root().join("tests/cluster/cluster"), python, home })
    }

    /// Runs `kubectl` and returns what it prints.
    pub(crate) async fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        run("kubectl", arguments, "").await
    }

    /// Applies YAML or JSON in [`MODELS`], as a user does: with strict validation of fields.
    pub(crate) async fn apply(&self, manifest: &str) -> anyhow::Result<String> {
        run("kubectl", &["apply", "--namespace", MODELS, "--filename", "-"], manifest).await
    }

    /// Applies a file of `manifests/examples`.
    pub(crate) async fn apply_example(&self, name: &str) -> anyhow::Result<String> {
        let path = tests::root().join("manifests/examples").join(name);
        self.apply(&std::fs::read_to_string(&path).with_context(|| path.display().to_string())?).await
    }

    /// An object, or what `kubectl get ARGUMENTS` lists.
    pub(crate) async fn get(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mut all = vec!["get", "--output", "json"];
        all.extend(arguments);
        Ok(serde_json::from_str(&self.kubectl(&all).await?)?)
    }

    /// The items that `kubectl get KIND -n models -l SELECTOR` lists.
    pub(crate) async fn list(&self, kind: &str, selector: &str) -> anyhow::Result<Vec<Value>> {
        let list = self.get(&[kind, "--namespace", MODELS, "--selector", selector]).await?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// A ModelDeployment of the scenarios.
    pub(crate) async fn model(&self, name: &str) -> anyhow::Result<Model> {
        Ok(Model(self.get(&["modeldeployment", name, "--namespace", MODELS]).await?))
    }

    /// The worker pods of a model, by name.
    pub(crate) async fn workers(&self, model: &str) -> anyhow::Result<BTreeMap<String, Value>> {
        let selector = format!("modelfleet.io/model={model},app.kubernetes.io/component=worker");
        let pods = self.list("pods", &selector).await?.into_iter();
        Ok(pods.map(|pod| (text(&pod, "/metadata/name").to_owned(), pod)).collect())
    }

    /// Everything that belongs to a model: `KIND NAME`, and its generation where its kind has one.
    pub(crate) async fn children(&self, model: &str) -> anyhow::Result<BTreeMap<String, i64>> {
        const KINDS: &str = "statefulsets,services,configmaps,serviceaccounts,poddisruptionbudgets,jobs,pods";
        let objects = self.list(KINDS, &format!("modelfleet.io/model={model}")).await?;
        let title = |object: &Value| format!("{} {}", text(object, "/kind"), text(object, "/metadata/name"));
        let generation = |object: &Value| object["metadata"]["generation"].as_i64().unwrap_or(0);
        Ok(objects.iter().map(|object| (title(object), generation(object))).collect())
    }

    /// What `modelfleet experts MODEL` prints, with more arguments.
    pub(crate) async fn experts(&self, model: &str, more: &[&str]) -> anyhow::Result<String> {
        let program = tests::program("modelfleet").to_string_lossy().into_owned();
        run(&program, &[&["experts", model, "--namespace", MODELS], more].concat(), "").await
    }

    /// Deletes a model and waits until nothing of it is left.
    pub(crate) async fn delete(&self, model: &str) -> anyhow::Result<()> {
        self.kubectl(&["delete", "modeldeployment", model, "--namespace", MODELS, "--ignore-not-found"]).await?;
        self.until(&format!("nothing of {model} is left"), 150, async || {
            let left = self.children(model).await?;
            if left.is_empty() { Ok(()) } else { bail!("left: {left:?}") }
        })
        .await
    }

    /// Waits until a model is served as it was declared.
    pub(crate) async fn ready(&self, model: &str, seconds: u64) -> anyhow::Result<Model> {
        self.until(&format!("{model} is ready"), seconds, async || {
            let model = self.model(model).await?;
            model.expect("Ready", "True")?;
            ensure!(model.is_observed(), "an older generation is observed");
            Ok(model)
        })
        .await
    }

    /// The first IP address of a Service.
    pub(crate) async fn service(&self, namespace: &str, name: &str) -> anyhow::Result<String> {
        let service = self.get(&["service", name, "--namespace", namespace]).await?;
        Ok(text(&service, "/spec/clusterIP").to_owned())
    }

    /// The names of the pods of a part of the product, with their addresses.
    pub(crate) async fn pods_of(&self, part: &str) -> anyhow::Result<BTreeMap<String, String>> {
        let selector = format!("app.kubernetes.io/component={part}");
        let list = self.get(&["pods", "--namespace", SYSTEM, "--selector", &selector]).await?;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        let entry = |pod: &Value| (text(pod, "/metadata/name").to_owned(), text(pod, "/status/podIP").to_owned());
        Ok(pods.iter().map(entry).collect())
    }

    /// `tests/cluster/cluster VERB TARGET`; it proves itself that its fault bit.
    pub(crate) async fn fault(&self, verb: &str, target: &str) -> anyhow::Result<()> {
        let script = self.script.to_string_lossy().into_owned();
        run(&script, &[verb, target], "").await.map(drop)
    }

    /// Looks until it succeeds, at most `seconds`. The last failure says what was missing.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        seconds: u64,
        mut look: impl AsyncFnMut() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        loop {
            match look().await {
                Ok(found) => return Ok(found),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("waited {seconds} s until {what}")));
                }
                Err(_) => sleep(POLL).await, // polls
            }
        }
    }

    /// What a person would look at after a failure: models, pods, events, and the ends of our programs' logs.
    pub(crate) async fn state(&self) -> String {
        let mut state = String::new();
        let commands = [
            "get modeldeployments --all-namespaces --output yaml",
            "get pods --all-namespaces --output wide",
            "get events --all-namespaces --sort-by .lastTimestamp",
            "logs --namespace modelfleet-system --selector app.kubernetes.io/component=operator --prefix --tail 60",
            "logs --namespace modelfleet-system --selector app.kubernetes.io/component=router --prefix --tail 40",
            "logs --namespace models --selector app.kubernetes.io/component=worker --prefix --tail 30 --all-containers",
            "logs --namespace models --selector app.kubernetes.io/component=describe --prefix --tail 30",
        ];
        for command in commands {
            let arguments: Vec<_> = command.split(' ').collect();
            let printed = self.kubectl(&arguments).await.unwrap_or_else(|error| format!("{error:#}"));
            let lines: Vec<_> = printed.lines().collect();
            let _ = writeln!(state, "--- kubectl {command}");
            for line in &lines[lines.len().saturating_sub(250)..] {
                let _ = writeln!(state, "{line}");
            }
        }
        state
    }
}

/// Runs a program with text on its standard input and returns what it prints.
pub(crate) async fn run(program: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(tests::root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut stdin = child.stdin.take().context("standard input is piped")?;
    stdin.write_all(input.as_bytes()).await?;
    drop(stdin);
    let output = child.wait_with_output().await?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{program} {}: {} {err}{out}", arguments.join(" "), output.status);
    Ok(out.into_owned())
}

/// The string at a JSON pointer, `""` if there is none.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

/// A ModelDeployment as the API server tells it.
pub(crate) struct Model(pub(crate) Value);

impl Model {
    /// A printed column: `model`, `ready`, `shards` or `experts`.
    pub(crate) fn printed(&self, column: &str) -> &str {
        text(&self.0, &format!("/status/printed/{column}"))
    }

    /// The printed STATUS.
    pub(crate) fn summary(&self) -> &str {
        text(&self.0, "/status/summary")
    }

    /// A number of the status, 0 if there is none.
    pub(crate) fn number(&self, field: &str) -> i64 {
        self.0["status"][field].as_i64().unwrap_or(0)
    }

    /// Whether the status speaks of the spec as it is.
    pub(crate) fn is_observed(&self) -> bool {
        self.0["status"]["observedGeneration"] == self.0["metadata"]["generation"]
    }

    /// Status, reason and message of a condition.
    pub(crate) fn condition(&self, name: &str) -> Option<[&str; 3]> {
        let conditions = self.0["status"]["conditions"].as_array()?;
        let condition = conditions.iter().find(|condition| condition["type"] == name)?;
        Some(["/status", "/reason", "/message"].map(|field| text(condition, field)))
    }

    /// Fails unless the condition has this status.
    pub(crate) fn expect(&self, name: &str, status: &str) -> anyhow::Result<()> {
        let condition = self.condition(name);
        ensure!(
            condition.is_some_and(|[found, ..]| found == status),
            "{name} is {condition:?}; STATUS says: {}",
            self.summary()
        );
        Ok(())
    }
}
