//! Where each tensor of a model lies: one safetensors file, several, or those that an index lists.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use candle_core::DType;
use serde::Deserialize;

use super::header::{self, Stored};
use crate::error::Error;
use crate::files::ModelFiles;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Most bytes of an index.
const INDEX_MOST: u64 = 64 << 20;

/// Where one tensor lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    file: usize,
    pub(crate) dtype: DType,
    span: (u64, u64),
}

impl Entry {
    pub(crate) fn bytes(&self) -> u64 {
        self.span.1 - self.span.0
    }
}

/// All tensors of a model, by name.
#[derive(Debug)]
pub(crate) struct Shelf {
    names: Vec<String>,
    tensors: HashMap<String, (usize, Stored)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shelf {
    /// Reads the headers of the weight files.
    ///
    /// # Errors
    /// [`Error`] if there are none, one is damaged, or they and the index disagree.
    pub(crate) fn open(files: &dyn ModelFiles) -> Result<Self, Error> {
        let list: BTreeMap<String, u64> = files.list().into_iter().collect();
        let index = list.get(INDEX).map(|&size| index(files, size)).transpose()?;
        let names = weight_files(&list, index.as_ref())?;
        let mut shelf = Shelf { names, tensors: HashMap::new() };
        for at in 0..shelf.names.len() {
            shelf.add(files, at, list[&shelf.names[at]])?;
        }
        for (tensor, file) in index.iter().flat_map(|index| &index.weight_map) {
            shelf.listed(tensor, file)?;
        }
        Ok(shelf)
    }

    fn add(&mut self, files: &dyn ModelFiles, file: usize, size: u64) -> Result<(), Error> {
        for stored in header::read(files, &self.names[file], size)? {
            let tensor = stored.name.clone();
            if let Some((other, _)) = self.tensors.insert(tensor.clone(), (file, stored)) {
                let reason = format!("also in {}", self.names[other]);
                return Err(Error::Tensor { file: self.names[file].clone(), tensor, reason });
            }
        }
        Ok(())
    }

    fn listed(&self, tensor: &str, file: &str) -> Result<(), Error> {
        let reason = match self.tensors.get(tensor) {
            Some((at, _)) if self.names[*at] == file => return Ok(()),
            Some((at, _)) => format!("listed in {file}; it is in {}", self.names[*at]),
            None => format!("listed in {file}, which does not hold it"),
        };
        Err(Error::Tensor { file: INDEX.into(), tensor: tensor.into(), reason })
    }

    /// Finds a tensor of this shape: as it is named, or as one expert's part of a layer's stack.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none, or its shape or type is another.
    pub(crate) fn find(&self, tensor: &str, shape: &[usize]) -> Result<Entry, Error> {
        match Part::of(tensor, shape).filter(|part| self.tensors.contains_key(&part.stack)) {
            Some(part) if !self.tensors.contains_key(tensor) => self.find_part(&part),
            _ => self.find_whole(tensor, shape),
        }
    }

    fn find_part(&self, part: &Part) -> Result<Entry, Error> {
        let experts = self.tensors[&part.stack].1.shape.first().copied().unwrap_or(0);
        let whole = self.find_whole(&part.stack, &[experts, part.expert_shape[0], part.expert_shape[1]])?;
        if part.expert >= experts {
            let reason = format!("has {experts} experts, so there is no expert {}", part.expert);
            let file = self.names[whole.file].clone();
            return Err(Error::Tensor { file, tensor: part.stack.clone(), reason });
        }
        let row = (part.expert_shape[1] * whole.dtype.size_in_bytes()) as u64;
        let first = whole.span.0 + row * (part.expert * part.expert_shape[0] + part.rows.start) as u64;
        Ok(Entry { span: (first, first + row * part.rows.len() as u64), ..whole })
    }

    fn find_whole(&self, tensor: &str, shape: &[usize]) -> Result<Entry, Error> {
        let refuse = |file: &str, reason| Err(Error::Tensor { file: file.into(), tensor: tensor.into(), reason });
        let Some((file, stored)) = self.tensors.get(tensor) else {
            let searched = if self.names.len() == 1 { &self.names[0] } else { "*.safetensors" };
            return refuse(searched, "missing".into());
        };
        let name = &self.names[*file];
        if stored.shape != shape {
            let found = &stored.shape;
            return refuse(name, format!("has shape {found:?}; config.json asks for {shape:?}"));
        }
        let Some(dtype) = stored.dtype else {
            let dtype = &stored.dtype_name;
            return refuse(name, format!("is of type {dtype}; BF16, F16 and F32 are accepted"));
        };
        Ok(Entry { file: *file, dtype, span: stored.span })
    }

    /// Reads a tensor's bytes from the files that the shelf was opened on.
    ///
    /// # Errors
    /// [`Error`] if they cannot be read, or the file became shorter.
    pub(crate) fn read(&self, files: &dyn ModelFiles, tensor: &str, entry: Entry) -> Result<Vec<u8>, Error> {
        let file = &self.names[entry.file];
        let bytes = files
            .read(file, entry.span.0..entry.span.1)
            .map_err(|source| Error::Read { file: file.clone(), source })?;
        if bytes.len() as u64 != entry.bytes() {
            let reason = format!("{} of {} bytes could be read", bytes.len(), entry.bytes());
            return Err(Error::Tensor { file: file.clone(), tensor: tensor.into(), reason });
        }
        Ok(bytes)
    }

    /// The names of all tensors.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

/// One expert's matrix as rows of the tensor that transformers 5 keeps a layer's experts in.
///
/// # Source
/// transformers `DeepseekV3Experts`: `gate_up_proj` `[experts, 2 * inner, hidden]`, gate before up, and
/// `down_proj` `[experts, hidden, inner]`.
struct Part {
    stack: String,
    expert: usize,
    /// Rows and columns of each expert in the stack.
    expert_shape: [usize; 2],
    rows: Range<usize>,
}

impl Part {
    /// Reads `LAYER.experts.NUMBER.MATRIX.weight`; `shape`: the matrix's.
    fn of(tensor: &str, shape: &[usize]) -> Option<Self> {
        let (experts, name) = tensor.split_once(".experts.")?;
        let (number, matrix) = name.strip_suffix(".weight")?.split_once('.')?;
        let &[rows, columns] = shape else {
            return None;
        };
        let (stacked, count, start) = match matrix {
            "gate_proj" => ("gate_up_proj", 2 * rows, 0),
            "up_proj" => ("gate_up_proj", 2 * rows, rows),
            "down_proj" => ("down_proj", rows, 0),
            _ => return None,
        };
        Some(Part {
            stack: format!("{experts}.experts.{stacked}"),
            expert: number.parse().ok()?,
            expert_shape: [count, columns],
            rows: start..start + rows,
        })
    }
}

fn index(files: &dyn ModelFiles, size: u64) -> Result<Index, Error> {
    let refuse = |reason| Error::File { file: INDEX.into(), reason };
    if size > INDEX_MOST {
        return Err(refuse(format!("has {size} bytes; at most {INDEX_MOST}")));
    }
    let text = files.read(INDEX, 0..size).map_err(|source| Error::Read { file: INDEX.into(), source })?;
    serde_json::from_slice(&text).map_err(|error| refuse(format!("not an index: {error}")))
}

/// The files to open: those of the index, else the usual single one, else all there are.
fn weight_files(list: &BTreeMap<String, u64>, index: Option<&Index>) -> Result<Vec<String>, Error> {
    if let Some(index) = index {
        let named: BTreeSet<&String> = index.weight_map.values().collect();
        for file in &named {
            let reason = if file.contains(['/', '\\']) {
                format!("names {file:?}; files beside it are accepted")
            } else if !list.contains_key(*file) {
                format!("names {file}, which is missing")
            } else {
                continue;
            };
            return Err(Error::File { file: INDEX.into(), reason });
        }
        return Ok(named.into_iter().cloned().collect());
    }
    if list.contains_key(SINGLE) {
        return Ok(vec![SINGLE.into()]);
    }
    let all: Vec<String> = list.keys().filter(|name| name.ends_with(".safetensors")).cloned().collect();
    if all.is_empty() {
        let pickled = |name: &&String| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end));
        let reason = match list.keys().find(pickled) {
            Some(name) => format!("missing; {name} is not opened, as it can hold code"),
            None => "missing; weights are read from *.safetensors".into(),
        };
        return Err(Error::File { file: SINGLE.into(), reason });
    }
    Ok(all)
}
