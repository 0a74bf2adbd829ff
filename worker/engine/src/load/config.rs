//! `config.json`, field by field, each within its range.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::files::ModelFiles;

const FILE: &str = "config.json";

/// Most bytes of a configuration.
const MOST: u64 = 1 << 20;

/// The fields of a configuration, or of an object in it.
#[derive(Debug, Clone)]
pub(crate) struct Fields {
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`Error`] if it is missing, too large, or not a JSON object.
    pub(crate) fn read(files: &dyn ModelFiles) -> Result<Self, Error> {
        let Some((_, size)) = files.list().into_iter().find(|(name, _)| name == FILE) else {
            return Err(refuse("missing".into()));
        };
        if size > MOST {
            return Err(refuse(format!("has {size} bytes; at most {MOST}")));
        }
        let text = files.read(FILE, 0..size).map_err(|source| Error::Read { file: FILE.into(), source })?;
        let map = serde_json::from_slice(&text).map_err(|error| refuse(format!("not a JSON object: {error}")))?;
        Ok(Fields { prefix: String::new(), map })
    }

    /// A field's value; `null` is as good as absent.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// The object in a field.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Fields>, Error> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields { prefix: format!("{}{name}.", self.prefix), map: map.clone() }))
            }
            Some(_) => Err(self.wrong(name, "an object")),
        }
    }

    /// A whole number in a range.
    pub(crate) fn size(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize, Error> {
        self.optional_size(name, range)?.ok_or_else(|| self.absent(name))
    }

    /// A whole number in a range, if given.
    pub(crate) fn optional_size(&self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, Error> {
        self.get(name).map(|_| self.present_size(name, range)).transpose()
    }

    fn present_size(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize, Error> {
        let number = self.get(name).and_then(Value::as_u64).and_then(|number| usize::try_from(number).ok());
        number.filter(|number| range.contains(number)).ok_or_else(|| {
            let (least, most) = range.into_inner();
            self.wrong(name, &format!("a whole number from {least} to {most}"))
        })
    }

    /// A whole number in a range, `default` if the field is absent. `null` is no number.
    pub(crate) fn size_or(&self, name: &str, range: RangeInclusive<usize>, default: usize) -> Result<usize, Error> {
        if self.map.contains_key(name) { self.present_size(name, range) } else { Ok(default) }
    }

    /// A number above 0, if given.
    pub(crate) fn optional_positive(&self, name: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_f64().filter(|number| *number > 0.0 && *number < 1e12) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(name, "a number above 0 and below 1e12")),
        }
    }

    /// A number above 0.
    pub(crate) fn positive(&self, name: &str) -> Result<f64, Error> {
        self.optional_positive(name)?.ok_or_else(|| self.absent(name))
    }

    /// A yes or no, `default` if the field is absent. `null` is no, as in the reference.
    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, Error> {
        match self.map.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(name, "true or false")),
        }
    }

    /// Refuses a field that is there and not what it should be.
    pub(crate) fn expect(&self, name: &str, accepted: &[Value]) -> Result<(), Error> {
        match self.get(name) {
            Some(value) if !accepted.contains(value) => {
                let accepted: Vec<String> = accepted.iter().map(Value::to_string).collect();
                Err(self.wrong(name, &accepted.join(" or ")))
            }
            _ => Ok(()),
        }
    }

    /// The refusal of a field's value.
    pub(crate) fn wrong(&self, name: &str, accepted: &str) -> Error {
        let mut value = self.get(name).unwrap_or(&Value::Null).to_string();
        if let Some((cut, _)) = value.char_indices().nth(64) {
            value.truncate(cut);
            value.push_str("..");
        }
        refuse(format!("{}{name} is {value}; it must be {accepted}", self.prefix))
    }

    fn absent(&self, name: &str) -> Error {
        refuse(format!("{}{name} is missing", self.prefix))
    }
}

/// A refusal of the configuration.
pub(crate) fn refuse(reason: String) -> Error {
    Error::Config { reason }
}
