//! The seam between a forward pass and the holders of experts that are not here.
//!
//! **Architecture Invariant.** No sockets and no runtime: the caller of `step` owns both.

use std::future::{Future, ready};

use bytes::Bytes;
use half::bf16;

use crate::layers::kernels;

/// How a row travels, and how every expert's input and output row is rounded, local ones too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireDtype {
    /// Two bytes a value, for models of bf16 and f16.
    Bf16,
    /// Four bytes a value, for models of f32.
    F32,
}

impl WireDtype {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            WireDtype::Bf16 => 2,
            WireDtype::F32 => 4,
        }
    }

    /// Rounds values to the wire: to the nearest, ties to even.
    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * self.size()];
        match self {
            WireDtype::Bf16 => kernels::round_to_bf16(values, &mut bytes),
            WireDtype::F32 => {
                for (bytes, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *bytes = value.to_le_bytes();
                }
            }
        }
        bytes
    }

    /// Reads a row into `values`, which has as many.
    pub(crate) fn decode(self, row: &[u8], values: &mut [f32]) {
        match self {
            WireDtype::Bf16 => {
                for (value, bytes) in values.iter_mut().zip(row.as_chunks::<2>().0) {
                    *value = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
            WireDtype::F32 => {
                for (value, bytes) in values.iter_mut().zip(row.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
        }
    }
}

/// Rows for experts of one layer, and which expert is to see which row.
#[derive(Debug, Clone, Copy)]
pub struct ExpertBatch<'a> {
    /// The layer, counted from the first of the model.
    pub layer: usize,
    /// `[unique rows, hidden]`, little endian, in the wire dtype.
    pub rows: &'a Bytes,
    /// For each pair, its row in `rows`.
    pub pair_rows: &'a [u32],
    /// For each pair, its expert. Pairs are sorted by expert, then row.
    pub pair_experts: &'a [u32],
}

/// What came back for a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replies {
    /// `[pairs, hidden]`, little endian, in the wire dtype and the batch's pair order. A missing
    /// pair has a row here too, of any value.
    pub rows: Bytes,
    /// Indices of pairs without an answer.
    pub missing: Vec<u32>,
}

/// Carries rows to the holders of experts and back.
pub trait Exchange {
    /// Names a batch on its way.
    type Ticket;

    /// Sends a batch without waiting. Only pairs whose expert is not held here are in it.
    fn send(&mut self, batch: &ExpertBatch<'_>) -> Self::Ticket;

    /// Whether a step of so many rows goes in two halves, of which one computes while rows of the other
    /// travel. Asked once in each step of several sequences, before it sends anything. If so, two batches
    /// are on their way at once, which are joined in the order they were sent; each half reads the weights
    /// anew.
    fn overlaps(&mut self, _rows: usize) -> bool {
        false
    }

    /// Waits for the answers to a batch. If the future is dropped, the step must end: the next
    /// one gives up what was on its way.
    fn join(&mut self, ticket: Self::Ticket) -> impl Future<Output = Replies>;
}

/// The exchange of a worker that holds every expert. Whatever it is asked for is missing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPeers;

impl Exchange for NoPeers {
    type Ticket = u32;

    fn send(&mut self, batch: &ExpertBatch<'_>) -> u32 {
        u32::try_from(batch.pair_experts.len()).unwrap_or(u32::MAX)
    }

    fn join(&mut self, pairs: u32) -> impl Future<Output = Replies> {
        ready(Replies { rows: Bytes::new(), missing: (0..pairs).collect() })
    }
}
