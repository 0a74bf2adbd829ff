//! Reads single fields; a refusal names the field, its value and what is accepted.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::Refusal;

/// The fields of a body. `null` counts as absent.
pub(super) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn of(object: &'a Map<String, Value>) -> Self {
        Self(object)
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn boolean(&self, name: &str) -> Result<Option<bool>, Refusal> {
        let read = |value: &Value| value.as_bool().ok_or_else(|| self.wrong(name, "true or false"));
        self.get(name).map(read).transpose()
    }

    pub(super) fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Refusal> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let accepted = || format!("an integer from {} to {}", range.start(), range.end());
        match value.as_i64().filter(|value| range.contains(value)) {
            Some(value) => Ok(Some(value)),
            None => Err(self.wrong(name, &accepted())),
        }
    }

    pub(super) fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, Refusal> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let accepted = || format!("a number from {} to {}", range.start(), range.end());
        match value.as_f64().filter(|value| range.contains(value)) {
            Some(value) => Ok(Some(value as f32)),
            None => Err(self.wrong(name, &accepted())),
        }
    }

    pub(super) fn above_zero(&self, name: &str, most: f64) -> Result<Option<f32>, Refusal> {
        let accepted = || format!("a number above 0, at most {most}");
        let wrong = |_| self.wrong(name, &accepted());
        let value = self.number(name, 0.0..=most).map_err(wrong)?;
        if value == Some(0.0) {
            return Err(self.wrong(name, &accepted()));
        }
        Ok(value)
    }

    pub(super) fn token_ids(&self, name: &str) -> Result<Option<Vec<u32>>, Refusal> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        ids(value).map(Some).ok_or_else(|| self.wrong(name, "an array of token ids"))
    }

    /// The refusal of a field that is there.
    pub(super) fn wrong(&self, name: &str, accepted: &str) -> Refusal {
        wrong_value(name, self.0.get(name).unwrap_or(&Value::Null), accepted)
    }
}

/// Token ids, if the value is an array of them.
pub(super) fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

/// A checked integer that is not negative.
pub(super) fn count(value: i64) -> usize {
    usize::try_from(value).unwrap_or(0)
}

pub(super) fn wrong_value(name: &str, value: &Value, accepted: &str) -> Refusal {
    let found = match value {
        Value::Array(items) => format!("an array of {} items", items.len()),
        Value::Object(_) => "an object".to_owned(),
        // text may be the client's secret, so only its length is said
        Value::String(text) => format!("a string of {} bytes", text.len()),
        other => other.to_string(),
    };
    Refusal::invalid(name, format!("{name} is {found}; use {accepted}"))
}

/// A name made from input, short enough to be repeated.
pub(super) fn shortened(name: &str) -> String {
    name.chars().filter(|char| !char.is_control()).take(32).collect()
}
