//! Reads a model's files: first everything is checked, then only what this worker holds is read.

mod config;
mod header;
mod shelf;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

pub(crate) use config::{Fields, refuse};
pub(crate) use shelf::Shelf;

use crate::error::Error;
use crate::exchange::WireDtype;
use crate::files::ModelFiles;
use crate::layers::matrix::Matrix;

/// What loading a model does with each tensor that the model names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Checks and counts it. What stands in for it has its shape and takes no memory.
    Check,
    /// Reads it.
    Read,
}

/// What the tensors named so far weigh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) parameters: u64,
    pub(crate) dense_bytes: u64,
    /// Bytes of the routed experts by layer, and how many experts were named.
    pub(crate) experts: BTreeMap<usize, (u64, u64)>,
    by_dtype: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// The type that most bytes are stored in.
    pub(crate) fn dtype(&self) -> &'static str {
        self.by_dtype.iter().max_by_key(|&(_, bytes)| bytes).map_or("f32", |(name, _)| name)
    }

    /// How rows of this model's experts travel.
    pub(crate) fn wire(&self) -> WireDtype {
        if self.dtype() == "f32" { WireDtype::F32 } else { WireDtype::Bf16 }
    }

    /// Bytes of all experts named.
    pub(crate) fn expert_bytes(&self) -> u64 {
        self.experts.values().map(|(bytes, _)| bytes).sum()
    }
}

/// A walk over the tensors that a model names.
pub(crate) struct Loader<'a> {
    files: &'a dyn ModelFiles,
    shelf: &'a Shelf,
    mode: Mode,
    tally: RefCell<Tally>,
    total: u64,
    done: Cell<u64>,
    progress: RefCell<&'a mut dyn FnMut(u64, u64)>,
}

impl<'a> Loader<'a> {
    /// `total`: bytes that `progress` is told there are to read.
    pub(crate) fn new(
        files: &'a dyn ModelFiles,
        shelf: &'a Shelf,
        mode: Mode,
        total: u64,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let (tally, done) = (RefCell::default(), Cell::new(0));
        Loader { files, shelf, mode, tally, total, done, progress: RefCell::new(progress) }
    }

    /// The model's tensors, from the top of their names.
    pub(crate) fn weights(&self) -> Weights<'_, 'a> {
        Weights { loader: self, prefix: String::new(), expert_of: None }
    }

    /// What was named.
    pub(crate) fn tally(&self) -> Tally {
        self.tally.borrow().clone()
    }
}

/// The tensors whose names begin alike.
pub(crate) struct Weights<'w, 'f> {
    loader: &'w Loader<'f>,
    prefix: String,
    expert_of: Option<usize>,
}

impl<'w, 'f> Weights<'w, 'f> {
    /// Those one name further down.
    pub(crate) fn at(&self, name: impl std::fmt::Display) -> Weights<'w, 'f> {
        let prefix = format!("{}{name}.", self.prefix);
        Weights { loader: self.loader, prefix, expert_of: self.expert_of }
    }

    /// Those of one routed expert, counted as such.
    pub(crate) fn expert(&self, layer: usize, expert: usize) -> Weights<'w, 'f> {
        let loader = self.loader;
        loader.tally.borrow_mut().experts.entry(layer).or_default().1 += 1;
        Weights { expert_of: Some(layer), ..self.at(expert) }
    }

    /// A matrix in the file's type.
    pub(crate) fn matrix(&self, name: &str, outputs: usize, inputs: usize) -> Result<Matrix, Error> {
        self.keep(name, &self.tensor(name, &[outputs, inputs])?)
    }

    /// A vector, widened to f32.
    pub(crate) fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, Error> {
        let tensor = self.tensor(name, &[length])?;
        tensor.to_dtype(DType::F32).and_then(|tensor| tensor.to_vec1()).map_err(|source| self.failed(name, source))
    }

    /// Parts the matrix that makes keys and values out of latents: for each head the keys' part
    /// transposed, `[rank, key]`, and the values' part, `[value, rank]`.
    pub(crate) fn key_value_heads(
        &self,
        name: &str,
        heads: usize,
        key: usize,
        value: usize,
        rank: usize,
    ) -> Result<(Vec<Matrix>, Vec<Matrix>), Error> {
        let whole = self.tensor(name, &[heads * (key + value), rank])?;
        let part = |start: usize, rows: usize| whole.narrow(0, start, rows).map_err(|source| self.failed(name, source));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for start in (0..heads).map(|head| head * (key + value)) {
            let transposed = part(start, key)?.t().map_err(|source| self.failed(name, source))?;
            keys.push(self.keep(name, &transposed)?);
            values.push(self.keep(name, &part(start + key, value)?)?);
        }
        Ok((keys, values))
    }

    fn keep(&self, name: &str, tensor: &Tensor) -> Result<Matrix, Error> {
        let matrix = match self.loader.mode {
            Mode::Check => Matrix::unread(tensor),
            Mode::Read => Matrix::new(tensor),
        };
        matrix.map_err(|source| self.failed(name, source))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        let (loader, full) = (self.loader, format!("{}{name}", self.prefix));
        let entry = loader.shelf.find(&full, shape)?;
        self.count(entry.dtype, entry.bytes());
        match loader.mode {
            Mode::Check => Tensor::zeros(1, entry.dtype, &Device::Cpu)
                .and_then(|zero| zero.broadcast_as(shape))
                .map_err(|source| self.failed(name, source)),
            Mode::Read => {
                let bytes = loader.shelf.read(loader.files, &full, entry)?;
                let tensor = Tensor::from_raw_buffer(&bytes, entry.dtype, shape, &Device::Cpu)
                    .map_err(|source| self.failed(name, source))?;
                loader.done.set(loader.done.get() + entry.bytes());
                (loader.progress.borrow_mut())(loader.done.get(), loader.total);
                Ok(tensor)
            }
        }
    }

    fn count(&self, dtype: DType, bytes: u64) {
        let mut tally = self.loader.tally.borrow_mut();
        tally.parameters += bytes / dtype.size_in_bytes() as u64;
        *tally.by_dtype.entry(dtype.as_str()).or_default() += bytes;
        match self.expert_of {
            Some(layer) => tally.experts.entry(layer).or_default().0 += bytes,
            None => tally.dense_bytes += bytes,
        }
    }

    fn failed(&self, name: &str, source: candle_core::Error) -> Error {
        Error::Keep { tensor: format!("{}{name}", self.prefix), source: Box::new(source) }
    }
}
