//! The header of one safetensors file, checked against the file's size.

use std::fmt;

use candle_core::DType;
use safetensors::tensor::{Dtype, TensorInfo};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::error::Error;
use crate::files::ModelFiles;

/// Most bytes of a header; the largest we know has a tenth of it.
const MOST: u64 = 32 << 20;

/// Bytes read at once in the hope that the header is in them.
const FIRST: u64 = 64 << 10;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) name: String,
    /// `None` for a type that is well formed and that we do not compute with.
    pub(super) dtype: Option<DType>,
    pub(super) dtype_name: String,
    pub(super) shape: Vec<usize>,
    /// First byte in the file, and the one after the last.
    pub(super) span: (u64, u64),
}

/// Reads the tensors that a file says it holds, in the order of their bytes.
///
/// # Errors
/// [`Error`] with file, tensor and reason, if a tensor is named twice or its bytes are not as many
/// as its shape asks for, not in the file, another's as well, or apart from the others.
pub(super) fn read(files: &dyn ModelFiles, file: &str, size: u64) -> Result<Vec<Stored>, Error> {
    let (start, text) = text(files, file, size)?;
    let entries: Entries = serde_json::from_slice(&text)
        .map_err(|error| refuse(file, format!("header is not a JSON object of tensors: {error}")))?;
    let mut tensors = Vec::with_capacity(entries.0.len());
    for (name, entry) in entries.0 {
        if name != "__metadata__" {
            tensors.push(tensor(file, name, &entry, start, size)?);
        }
    }
    tensors.sort_by(|a, b| (a.span, &a.name).cmp(&(b.span, &b.name)));
    whole(file, &tensors, start, size)?;
    Ok(tensors)
}

/// Returns where the tensors' bytes start, and the header.
fn text(files: &dyn ModelFiles, file: &str, size: u64) -> Result<(u64, Vec<u8>), Error> {
    let read = |range: std::ops::Range<u64>| {
        files.read(file, range).map_err(|source| Error::Read { file: file.into(), source })
    };
    let mut bytes = read(0..FIRST.min(size))?;
    let Some(length) = bytes.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)) else {
        return Err(refuse(file, format!("{size} bytes are too few for a header")));
    };
    if length > MOST {
        return Err(refuse(file, format!("header says it has {length} bytes; at most {MOST}")));
    }
    let end = 8 + length;
    if end > size {
        return Err(refuse(file, format!("header says it has {length} bytes; the file has {size}")));
    }
    if end > bytes.len() as u64 {
        bytes.extend(read(bytes.len() as u64..end)?);
    }
    bytes.truncate(end as usize);
    if bytes.len() as u64 != end {
        return Err(refuse(file, "file ended while its header was read".into()));
    }
    Ok((end, bytes.split_off(8)))
}

fn tensor(file: &str, name: String, entry: &RawValue, start: u64, size: u64) -> Result<Stored, Error> {
    let reason = |reason: String| Error::Tensor { file: file.into(), tensor: name.clone(), reason };
    let info: TensorInfo = serde_json::from_str(entry.get()).map_err(|error| reason(error.to_string()))?;
    let (first, last) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
    if last < first {
        return Err(reason(format!("its bytes end at {last}, before their start at {first}")));
    }
    if last > size - start {
        let there = size - start;
        return Err(reason(format!("its bytes end at {last}; the file has {there} for tensors")));
    }
    let dtype_name = format!("{:?}", info.dtype);
    let bits = info.shape.iter().try_fold(info.dtype.bitsize() as u64, |bits, &length| bits.checked_mul(length as u64));
    let held = last - first;
    if bits.is_none_or(|bits| bits.div_ceil(8) != held) {
        let shape = &info.shape;
        return Err(reason(format!("{dtype_name} of shape {shape:?} is not {held} bytes")));
    }
    let dtype = match info.dtype {
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F16 => Some(DType::F16),
        Dtype::F32 => Some(DType::F32),
        _ => None,
    };
    Ok(Stored { dtype, dtype_name, shape: info.shape, span: (start + first, start + last), name })
}

/// Refuses names given twice and bytes that belong to two tensors or to none.
fn whole(file: &str, tensors: &[Stored], start: u64, size: u64) -> Result<(), Error> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let (tensor, reason) = (twice[0].into(), "named twice".into());
        return Err(Error::Tensor { file: file.into(), tensor, reason });
    }
    let mut end = start;
    for (at, tensor) in tensors.iter().enumerate() {
        let first = tensor.span.0;
        if first != end {
            let reason = if first < end {
                format!("its bytes overlap those of {}", tensors[at - 1].name)
            } else {
                format!("the {} bytes before its own belong to no tensor", first - end)
            };
            return Err(Error::Tensor { file: file.into(), tensor: tensor.name.clone(), reason });
        }
        end = tensor.span.1;
    }
    if end != size {
        return Err(refuse(file, format!("its last {} bytes belong to no tensor", size - end)));
    }
    Ok(())
}

fn refuse(file: &str, reason: String) -> Error {
    Error::File { file: file.into(), reason }
}

/// The header's entries as they stand, so that a name given twice is seen twice.
struct Entries(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}
