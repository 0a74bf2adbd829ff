//! Reads the YAML that a user names: `ModelDeployment`s, and nothing else.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
};

use crds::ModelDeployment;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaProps;
use serde::Deserialize as _;
use serde_yaml::Value;

/// A `ModelDeployment` and where it was read.
#[derive(Clone, Debug)]
pub struct Declared {
    /// As written, with a namespace.
    pub deployment: ModelDeployment,
    /// For messages.
    pub origin: Origin,
}

/// One document of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file, as the user named it.
    pub file: PathBuf,
    /// Counted from 1.
    pub document: usize,
}

impl Origin {
    /// Where relative sources start.
    pub fn folder(&self) -> &Path {
        self.file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.document > 1 { write!(f, ", document {}", self.document) } else { Ok(()) }
    }
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("read {}", .file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not YAML, or not the types of the fields. The source says in which line.
    #[error("{origin} is not a ModelDeployment")]
    Yaml {
        /// Where.
        origin: Origin,
        /// What is wrong, with line and column.
        source: serde_yaml::Error,
    },
    /// Another kind of object.
    #[error(
        "{origin} has apiVersion {api_version} and kind {kind}; only modelfleet.io/v1alpha1, ModelDeployment can run here"
    )]
    Kind {
        /// Where.
        origin: Origin,
        /// As written.
        api_version: String,
        /// As written.
        kind: String,
    },
    /// Fields that do not exist would be ignored.
    #[error("{origin}: {field} is not a field of a ModelDeployment; {accepted}")]
    UnknownField {
        /// Where.
        origin: Origin,
        /// Its path.
        field: String,
        /// The fields that there are in its place.
        accepted: String,
    },
    /// Models are told apart by name.
    #[error("{origin}: metadata.name is missing")]
    NoName {
        /// Where.
        origin: Origin,
    },
    /// A name that no object can have.
    #[error("{origin}: metadata.{field} is {value}; use {accepted}")]
    Name {
        /// Where.
        origin: Origin,
        /// `name` or `namespace`.
        field: &'static str,
        /// As written.
        value: String,
        /// What would do.
        accepted: &'static str,
    },
    /// Two models have one name.
    #[error("{origin}: metadata.name is {name}; a model before it has this name already")]
    Twice {
        /// Where the second is.
        origin: Origin,
        /// NAMESPACE/NAME.
        name: String,
    },
    /// There was no document in any file.
    #[error("no ModelDeployment in {}", .files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", "))]
    Nothing {
        /// All files.
        files: Vec<PathBuf>,
    },
}

/// Reads all documents of all files; empty documents are passed over.
///
/// # Errors
/// See [`Error`]; the first that is met.
pub fn read(files: &[PathBuf]) -> Result<Vec<Declared>, Error> {
    let mut all: Vec<Declared> = Vec::new();
    let mut names = BTreeSet::new();
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|source| Error::File { file: file.clone(), source })?;
        for declared in parse(&text, file)? {
            let name = model_name(&declared.deployment);
            if !names.insert(name.clone()) {
                return Err(Error::Twice { origin: declared.origin, name });
            }
            all.push(declared);
        }
    }
    if all.is_empty() { Err(Error::Nothing { files: files.to_vec() }) } else { Ok(all) }
}

/// NAMESPACE/NAME
pub fn model_name(deployment: &ModelDeployment) -> String {
    let metadata = &deployment.metadata;
    format!("{}/{}", metadata.namespace.as_deref().unwrap_or("default"), metadata.name.as_deref().unwrap_or_default())
}

fn parse(text: &str, file: &Path) -> Result<Vec<Declared>, Error> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text); // as some editors begin a file
    let mut all = Vec::new();
    for (index, document) in serde_yaml::Deserializer::from_str(text).enumerate() {
        let origin = Origin { file: file.to_owned(), document: index + 1 };
        let not_yaml = |source| Error::Yaml { origin: origin.clone(), source };
        let value = Value::deserialize(document).map_err(not_yaml)?;
        if value.is_null() {
            continue;
        }
        check_kind(&value, &origin)?;
        check_fields(&value, &origin)?;
        check_name(&value, "name", &origin)?;
        check_name(&value, "namespace", &origin)?;
        let typed = serde_yaml::Deserializer::from_str(text).nth(index);
        let typed = typed.expect("the same text has the same documents"); // again from the text: a value has no lines
        let mut deployment = ModelDeployment::deserialize(typed).map_err(not_yaml)?;
        if deployment.metadata.name.as_deref().unwrap_or_default().is_empty() {
            return Err(Error::NoName { origin });
        }
        deployment.metadata.namespace.get_or_insert_with(|| "default".to_owned());
        all.push(Declared { deployment, origin });
    }
    Ok(all)
}

fn check_kind(value: &Value, origin: &Origin) -> Result<(), Error> {
    let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or("(none)").to_owned();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    if api_version == "modelfleet.io/v1alpha1" && kind == "ModelDeployment" {
        return Ok(());
    }
    Err(Error::Kind { origin: origin.clone(), api_version, kind })
}

/// The API server refuses the same.
fn check_name(value: &Value, field: &'static str, origin: &Origin) -> Result<(), Error> {
    let Some(found) = value.get("metadata").and_then(|metadata| metadata.get(field)).filter(|found| !found.is_null())
    else {
        return Ok(());
    };
    let refuse = |value: String, accepted| Err(Error::Name { origin: origin.clone(), field, value, accepted });
    let Some(name) = found.as_str() else {
        let shown = serde_yaml::to_string(found).unwrap_or_default();
        return refuse(shown.trim().to_owned(), "a text; put it in quotes");
    };
    let most = if field == "name" { 253 } else { 63 };
    let is_label = |label: &str| {
        label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            && !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let has_form = if field == "name" { name.split('.').all(is_label) } else { is_label(name) };
    if name.is_empty() || has_form && name.len() <= most {
        return Ok(());
    }
    let accepted = match field {
        "name" => "at most 253 of a-z, 0-9, '-' and '.', with a letter or digit at both ends of each part",
        _ => "at most 63 of a-z, 0-9 and '-', with a letter or digit at both ends",
    };
    refuse(name.to_owned(), accepted)
}

/// The API server checks this by the same schema.
fn check_fields(value: &Value, origin: &Origin) -> Result<(), Error> {
    let definition = crds::definition();
    let schema =
        definition.spec.versions.iter().find_map(|version| version.schema.as_ref()?.open_api_v3_schema.as_ref());
    let unknown = schema.and_then(|schema| unknown_field(value, schema, ""));
    match unknown {
        Some((field, accepted)) => Err(Error::UnknownField { origin: origin.clone(), field, accepted }),
        None => Ok(()),
    }
}

/// The path of the first field that the schema does not know, and which it knows there. `metadata` is Kubernetes' own,
/// and not looked into.
fn unknown_field(value: &Value, schema: &JSONSchemaProps, path: &str) -> Option<(String, String)> {
    if let (Some(items), Some(schema)) = (value.as_sequence(), item_schema(schema)) {
        let unknown = |(index, item)| unknown_field(item, schema, &format!("{path}[{index}]"));
        return items.iter().enumerate().find_map(unknown);
    }
    let (fields, properties) = (value.as_mapping()?, schema.properties.as_ref()?);
    fields.iter().find_map(|(name, value)| {
        let name = name.as_str().unwrap_or("(not text)");
        let inner = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        match (properties.get(name), inner.as_str()) {
            (_, "apiVersion" | "kind" | "metadata") => None,
            (Some(schema), _) => unknown_field(value, schema, &inner),
            (None, _) => {
                let known: Vec<&str> = properties.keys().map(String::as_str).collect();
                let parent = if path.is_empty() { "it" } else { path };
                Some((inner, format!("{parent} has {}", known.join(", "))))
            }
        }
    })
}

fn item_schema(schema: &JSONSchemaProps) -> Option<&JSONSchemaProps> {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaPropsOrArray;
    match schema.items.as_ref()? {
        JSONSchemaPropsOrArray::Schema(schema) => Some(schema),
        JSONSchemaPropsOrArray::Schemas(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: modelfleet.io/v1alpha1\nkind: ModelDeployment\nmetadata: {name: a}\n\
                        spec:\n  model: {source: \"file://m\"}\n";

    fn refused(text: &str) -> String {
        let error = parse(text, Path::new("some/models.yaml")).unwrap_err();
        let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        format!("{error}{source}")
    }

    #[test]
    fn several_documents_are_several_models() {
        let text = format!("---\n{GOOD}---\n{}---\n", GOOD.replace("name: a", "name: b, namespace: team"));
        let all = parse(&text, Path::new("some/models.yaml")).unwrap();
        let names: Vec<String> = all.iter().map(|declared| model_name(&declared.deployment)).collect();
        assert_eq!(names, ["default/a", "team/b"]);
        assert_eq!(all[0].origin.folder(), Path::new("some"));
        assert_eq!(all[1].origin.to_string(), "some/models.yaml, document 2");
    }

    #[test]
    fn a_file_without_a_folder_starts_here() {
        let origin = Origin { file: "models.yaml".into(), document: 1 };
        assert_eq!(origin.folder(), Path::new("."));
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        let text = refused("apiVersion: v1\nkind: Service\nmetadata: {name: a}\n");
        assert_eq!(
            text,
            "some/models.yaml has apiVersion v1 and kind Service; only modelfleet.io/v1alpha1, ModelDeployment can run here"
        );
    }

    #[test]
    fn bad_yaml_is_refused_with_its_line() {
        let text = refused(&format!("{GOOD}  replicas: [\n"));
        assert!(text.contains("line 7"), "{text}");
    }

    #[test]
    fn wrong_types_are_refused_with_field_and_line() {
        let text = refused(&format!("{GOOD}  replicas: many\n"));
        assert!(text.contains("spec.replicas") && text.contains("line 6"), "{text}");
    }

    #[test]
    fn unknown_fields_are_refused_by_path() {
        let text = refused(&GOOD.replace("{source:", "{sources: x, source:"));
        assert_eq!(
            text,
            "some/models.yaml: spec.model.sources is not a field of a ModelDeployment; spec.model has \
             credentialsRef, maxContextTokens, revision, servedNames, source"
        );
        let text = format!("{GOOD}  scheduling:\n    tolerations: [{{key: a}}, {{operater: Exists}}]\n");
        assert!(refused(&text).contains("spec.scheduling.tolerations[1].operater"), "{}", refused(&text));
    }

    #[test]
    fn a_model_needs_a_name() {
        assert_eq!(refused(&GOOD.replace("{name: a}", "{}")), "some/models.yaml: metadata.name is missing");
    }

    #[test]
    fn names_that_no_object_can_have_are_refused() {
        for (metadata, words) in [
            ("name: Tiny_R1", "metadata.name is Tiny_R1; use at most 253 of a-z"),
            ("name: a..b", "metadata.name is a..b; use"),
            ("name: -a", "metadata.name is -a; use"),
            (&format!("name: {}", "a".repeat(254)), "use at most 253"),
            ("name: 123", "metadata.name is 123; use a text; put it in quotes"),
            ("name: a, namespace: a.b", "metadata.namespace is a.b; use at most 63 of a-z"),
        ] {
            let text = refused(&GOOD.replace("{name: a}", &format!("{{{metadata}}}")));
            assert!(text.contains(words), "{text}");
        }
        for name in ["a", "1.b-c", "'123'", &"a".repeat(253)] {
            let text = GOOD.replace("{name: a}", &format!("{{name: {name}}}"));
            assert!(parse(&text, Path::new("a.yaml")).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        assert_eq!(parse(&format!("\u{feff}{GOOD}"), Path::new("a.yaml")).unwrap().len(), 1);
    }

    #[test]
    fn two_models_of_one_name_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("two.yaml");
        std::fs::write(&file, format!("{GOOD}---\n{GOOD}")).unwrap();
        let error = read(&[file]).unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("document 2: metadata.name is default/a; a model before it has this name already")
        );
    }

    #[test]
    fn files_without_a_model_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("none.yaml");
        std::fs::write(&file, "# nothing\n").unwrap();
        assert!(read(&[file]).unwrap_err().to_string().starts_with("no ModelDeployment in "));
        assert!(read(&["absent.yaml".into()]).unwrap_err().to_string().starts_with("read absent.yaml"));
    }
}
