//! From a `ModelDeployment` on a laptop to a model that can be started: validated, described, fetched, planned.

use std::{
    io,
    path::{Path, PathBuf},
};

use planner::{ModelDescription, NoRoom, Outcome, Plan};

use super::{
    child::{self, run_once},
    read::{Declared, Origin, model_name},
};
use crate::{
    launch::{self, Hub, Launch, Read, Site},
    validate::{Place, Refusal, ValidModel, validate},
};

/// Why a model cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The object is not accepted.
    #[error("{origin}: {}", sentences(.refusals))]
    Refused {
        /// Where it was read.
        origin: Origin,
        /// All that is wrong with it.
        refusals: Vec<Refusal>,
    },
    /// The model's folder cannot be used.
    #[error("{origin}: spec.model.source is {model_source}; {} cannot be read", .folder.display())]
    Folder {
        /// Where it was read.
        origin: Origin,
        /// As written.
        model_source: String,
        /// The folder that it means.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The worker program cannot read the model.
    #[error("{origin}: spec.model.source is {model_source}; {why}")]
    Unreadable {
        /// Where it was read.
        origin: Origin,
        /// As written.
        model_source: String,
        /// What the program says.
        why: String,
    },
    /// The worker program cannot be run.
    #[error("run modelfleet-worker {command}")]
    Run {
        /// Its command.
        command: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The description is not what we understand.
    #[error("read the description of {model}")]
    Description {
        /// NAMESPACE/NAME.
        model: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The plan does not work out.
    #[error("{origin}: {why}")]
    NoRoom {
        /// Where it was read.
        origin: Origin,
        /// What does not fit, and what would.
        why: NoRoom,
    },
}

/// A model that is accepted and whose place is known.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// NAMESPACE/NAME.
    pub name: String,
    /// The object, with the proof that it is good.
    pub model: ValidModel,
    /// Where it was read.
    pub origin: Origin,
    /// The source as programs understand it: `file://` with an absolute path, or `hf://`.
    pub source: String,
    /// The source as written, for messages.
    pub written_source: String,
}

impl Accepted {
    fn revision(&self) -> Option<&str> {
        self.model.spec.model.revision.as_deref()
    }
}

/// An accepted model with its weights known and its experts placed.
#[derive(Clone, Debug)]
pub struct Planned {
    /// What was accepted.
    pub accepted: Accepted,
    /// What it weighs.
    pub description: ModelDescription,
    /// Who holds what.
    pub plan: Plan,
}

/// Where programs lie and what they may keep.
#[derive(Clone, Copy, Debug)]
pub struct Tools<'a> {
    /// The folder of our programs.
    pub programs: &'a Path,
    /// Models that were fetched stay here.
    pub cache: &'a Path,
}

/// Validates an object for `place`, and finds its source.
///
/// # Errors
/// [`Error::Refused`], or [`Error::Folder`] if the folder of a `file://` source is not there.
pub fn accept(declared: &Declared, place: Place) -> Result<Accepted, Error> {
    let origin = declared.origin.clone();
    let model = validate(&declared.deployment, place)
        .map_err(|refusals| Error::Refused { origin: origin.clone(), refusals })?;
    let written_source = declared.deployment.spec.model.source.clone();
    let source = match written_source.strip_prefix("file://") {
        Some(path) => {
            let folder = origin.folder().join(path);
            match directory(&folder) {
                Ok(absolute) => format!("file://{}", absolute.display()),
                Err(source) => return Err(Error::Folder { origin, model_source: written_source, folder, source }),
            }
        }
        None => written_source.clone(),
    };
    Ok(Accepted { name: model_name(&declared.deployment), model, origin, source, written_source })
}

/// Where a folder really is.
fn directory(folder: &Path) -> io::Result<PathBuf> {
    let absolute = folder.canonicalize()?;
    if absolute.is_dir() { Ok(absolute) } else { Err(io::ErrorKind::NotADirectory.into()) }
}

/// Asks the worker program what the model weighs, and plans it.
///
/// # Errors
/// See [`Error`].
pub async fn plan(accepted: Accepted, tools: Tools<'_>) -> Result<Planned, Error> {
    let read = reading(&accepted, accepted.revision(), &[], "");
    let json = run(&accepted, "describe", &launch::describe(&read), tools).await?;
    let description: ModelDescription =
        serde_json::from_slice(&json).map_err(|source| Error::Description { model: accepted.name.clone(), source })?;
    match planner::plan(&description, &accepted.model.request(None)) {
        Outcome::Planned(plan) => Ok(Planned { accepted, description, plan }),
        Outcome::NoRoom(why) => Err(Error::NoRoom { origin: accepted.origin, why }),
    }
}

/// The folder with the model's files; those of a hub are fetched into the cache first, telling `operators` how it goes.
///
/// # Errors
/// See [`Error`].
pub(super) async fn fetch(
    planned: &Planned,
    tools: Tools<'_>,
    operators: &[String],
    id: &str,
) -> Result<PathBuf, Error> {
    let accepted = &planned.accepted;
    if let Some(folder) = accepted.source.strip_prefix("file://") {
        return Ok(folder.into());
    }
    let folder = tools.cache.join("models").join(&planned.description.content_hash);
    let commit = Some(planned.description.resolved_revision.as_str()).filter(|commit| !commit.is_empty());
    let read = reading(accepted, commit.or(accepted.revision()), operators, id);
    run(accepted, "fetch", &launch::fetch(&read, &folder.to_string_lossy()), tools).await?;
    Ok(folder)
}

fn reading<'a>(accepted: &'a Accepted, revision: Option<&'a str>, operators: &'a [String], id: &'a str) -> Read<'a> {
    const HUB: &Hub = &Hub { endpoint: None, token_file: None, ca_file: None, proxy: None, no_proxy: None };
    let hub = HUB; // from the user's environment, which children inherit
    Read {
        site: Site::Child { id },
        source: &accepted.source,
        revision,
        model: &accepted.name,
        operators,
        hub,
        telemetry: &[],
    }
}

async fn run(accepted: &Accepted, command: &'static str, launch: &Launch, tools: Tools<'_>) -> Result<Vec<u8>, Error> {
    match run_once(tools.programs, launch).await {
        Ok(child::Outcome::Good(output)) => Ok(output),
        Ok(child::Outcome::Bad(why)) => Err(Error::Unreadable {
            origin: accepted.origin.clone(),
            model_source: accepted.written_source.clone(),
            why,
        }),
        Err(source) => Err(Error::Run { command, source }),
    }
}

fn sentences(refusals: &[Refusal]) -> String {
    refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_is_no_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.yaml");
        std::fs::write(
            &file,
            "apiVersion: modelfleet.io/v1alpha1\nkind: ModelDeployment\nmetadata: {name: a}\n\
             spec: {model: {source: \"file://model.yaml\"}}\n",
        )
        .unwrap();
        let declared = super::super::read::read(&[file]).unwrap().remove(0);
        let error = accept(&declared, Place::Local).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        assert!(error.to_string().ends_with("model.yaml cannot be read"), "{error}");
        assert_eq!(source.as_deref(), Some("not a directory"));
    }
}
