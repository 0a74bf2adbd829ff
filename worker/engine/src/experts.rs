//! The routed experts that this worker holds, for its own sequences and for everybody else's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::error::{Error, ExpertsError};
use crate::exchange::{ExpertBatch, WireDtype};
use crate::files::LocalFiles;
use crate::layers::mlp::Mlp;
use crate::layers::threads;
use crate::load::{Loader, Mode, Shelf};
use crate::models::{ByLayer, Family, Shape};

/// Which routed experts a worker keeps in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held(Option<BTreeMap<usize, BTreeSet<usize>>>);

impl Held {
    /// All of them.
    pub fn all() -> Self {
        Held(None)
    }

    /// Those listed, by layer. A layer that is not listed has none here.
    pub fn from_layers(layers: BTreeMap<usize, BTreeSet<usize>>) -> Self {
        Held(Some(layers))
    }

    /// Those of both together.
    pub fn and(self, other: Self) -> Self {
        let (Some(mut layers), Some(others)) = (self.0, other.0) else {
            return Held(None);
        };
        for (layer, experts) in others {
            layers.entry(layer).or_default().extend(experts);
        }
        Held(Some(layers))
    }

    /// Whether an expert of a layer is among them.
    pub(crate) fn holds(&self, layer: usize, expert: usize) -> bool {
        let Some(layers) = &self.0 else { return true };
        layers.get(&layer).is_some_and(|experts| experts.contains(&expert))
    }

    /// Refuses layers and experts that a model does not have.
    pub(crate) fn check(&self, moe_layers: &[usize], experts: usize) -> Result<(), Error> {
        for (layer, held) in self.0.iter().flatten() {
            let reason = if !moe_layers.contains(layer) {
                format!("layer {layer} has no routed experts")
            } else if let Some(expert) = held.iter().find(|&&expert| expert >= experts) {
                format!("layer {layer} has {experts} experts, so there is no expert {expert}")
            } else {
                continue;
            };
            return Err(Error::Held { reason });
        }
        Ok(())
    }
}

/// Where experts are read from, while the worker runs too.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) files: LocalFiles,
    pub(crate) family: Family,
    pub(crate) shelf: Shelf,
}

impl Source {
    fn shape(&self) -> &Shape {
        self.family.shape()
    }

    /// Reads one expert, or only counts it. Returns it with its bytes.
    fn expert(&self, mode: Mode, layer: usize, expert: usize) -> Result<(Mlp, u64), Error> {
        let mut unheard = |_, _| {};
        let loader = Loader::new(&self.files, &self.shelf, mode, 0, &mut unheard);
        let mlp = self.family.expert(&loader.weights(), layer, expert)?;
        Ok((mlp, loader.tally().expert_bytes()))
    }
}

/// The experts of one layer that were in memory at one moment, by number.
pub(crate) type Table = Vec<Option<Arc<Mlp>>>;

/// Routed experts in memory. Shared between the step loop, the threads that serve peers and whoever loads more.
///
/// # Guarantees
/// Loading and forgetting hold up nobody who computes: what a step or a call has begun with stays in memory until it
/// ends. Which experts are here changes no bit of any answer.
/// # Assumptions
/// The model's files do not change while they are served.
#[derive(Debug)]
pub struct Experts {
    hidden: usize,
    dtype: WireDtype,
    source: Source,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    /// Replaced whole, so that a reader holds the lock for a moment only.
    table: RwLock<Arc<Table>>,
    /// Rows given to each expert.
    routed: Vec<AtomicU64>,
}

impl Experts {
    pub(crate) fn new(source: Source, dtype: WireDtype, layers: ByLayer) -> Self {
        let layer = |experts: Vec<Option<Mlp>>| Layer {
            routed: experts.iter().map(|_| AtomicU64::new(0)).collect(),
            table: RwLock::new(Arc::new(experts.into_iter().map(|expert| expert.map(Arc::new)).collect())),
        };
        Experts { hidden: source.shape().hidden, dtype, source, layers: layers.into_iter().map(layer).collect() }
    }

    /// Computes what each pair's expert makes of its row: `[pairs, hidden]`, little endian, in the
    /// wire dtype. Pairs of one expert that follow each other are computed together.
    ///
    /// # Errors
    /// [`ExpertsError`] if the batch does not fit or names an expert that is not here; then nothing
    /// is computed.
    pub fn run(&self, batch: &ExpertBatch<'_>) -> Result<Vec<u8>, ExpertsError> {
        self.run_on(&self.table(batch.layer), batch)
    }

    /// As [`Experts::run`], with the experts of a table that was taken before.
    pub(crate) fn run_on(&self, table: &Table, batch: &ExpertBatch<'_>) -> Result<Vec<u8>, ExpertsError> {
        self.check(table, batch)?;
        let (mut calls, mut rest) = (Vec::new(), batch.pair_rows);
        for pairs in batch.pair_experts.chunk_by(|a, b| a == b) {
            let (rows, others) = rest.split_at(pairs.len());
            calls.push((find(table, batch.layer, pairs[0] as usize)?, rows));
            rest = others;
        }
        let work = |(expert, rows): &(&Mlp, &[u32])| rows.len() * expert.multiplications();
        let weights = calls.iter().map(|(expert, _)| expert.multiplications()).sum();
        let threads = threads::worth(calls.iter().map(work).sum(), weights);
        // fewer calls than threads leave these to their products
        let threads = if calls.len() < threads { 1 } else { threads };
        let mut answers = vec![Vec::new(); calls.len()];
        threads::share(threads, calls.into_iter().zip(&mut answers).collect(), |((expert, rows), answer)| {
            *answer = self.answer(expert, batch.rows, rows);
        });
        Ok(answers.concat())
    }

    /// What an expert makes of some of the rows.
    fn answer(&self, expert: &Mlp, rows: &[u8], wanted: &[u32]) -> Vec<u8> {
        let row_bytes = self.hidden * self.dtype.size();
        let mut x = vec![0.0; wanted.len() * self.hidden];
        for (to, &row) in x.chunks_exact_mut(self.hidden).zip(wanted) {
            self.dtype.decode(&rows[row as usize * row_bytes..][..row_bytes], to);
        }
        self.dtype.encode(&expert.forward(&x))
    }

    fn check(&self, table: &Table, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        let (bytes, row) = (batch.rows.len(), self.hidden * self.dtype.size());
        if !bytes.is_multiple_of(row) {
            return Err(ExpertsError::Rows { bytes, row });
        }
        let (rows, experts) = (batch.pair_rows.len(), batch.pair_experts.len());
        if rows != experts {
            let reason = format!("{rows} rows are named for {experts} experts");
            return Err(ExpertsError::Pairs { reason });
        }
        if let Some(named) = batch.pair_rows.iter().find(|&&named| named as usize >= bytes / row) {
            let reason = format!("row {named} is named; {} were sent", bytes / row);
            return Err(ExpertsError::Pairs { reason });
        }
        let mut experts = batch.pair_experts.iter();
        experts.try_for_each(|&expert| find(table, batch.layer, expert as usize).map(|_| ()))
    }

    /// The experts of a layer that are here now; none for a layer that has none.
    pub(crate) fn table(&self, layer: usize) -> Arc<Table> {
        let read = |layer: &Layer| layer.table.read().unwrap_or_else(PoisonError::into_inner).clone();
        self.layers.get(layer).map(read).unwrap_or_default()
    }

    /// Refuses a placement with layers or experts that the model does not have.
    ///
    /// # Errors
    /// [`Error::Held`] with what was named and what exists.
    pub fn check_held(&self, held: &Held) -> Result<(), Error> {
        let shape = self.source.shape();
        held.check(&shape.moe_layers, shape.experts)
    }

    /// Reads an expert from the model's files; nothing happens if it is here. May block for as long as that takes.
    ///
    /// # Errors
    /// [`Error`] if there is no such expert, or it cannot be read.
    pub fn load(&self, layer: usize, expert: usize) -> Result<(), Error> {
        self.known(layer, expert)?;
        if !self.holds(layer, expert) {
            let (mlp, _) = self.source.expert(Mode::Read, layer, expert)?;
            self.put(layer, expert, Some(Arc::new(mlp)));
        }
        Ok(())
    }

    /// Forgets an expert. Its memory is free once nobody computes with it any more.
    pub fn forget(&self, layer: usize, expert: usize) {
        if self.holds(layer, expert) {
            self.put(layer, expert, None);
        }
    }

    /// Bytes that an expert takes in memory.
    ///
    /// # Errors
    /// [`Error`] if there is no such expert.
    pub fn weigh(&self, layer: usize, expert: usize) -> Result<u64, Error> {
        self.known(layer, expert)?;
        Ok(self.source.expert(Mode::Check, layer, expert)?.1)
    }

    fn known(&self, layer: usize, expert: usize) -> Result<(), Error> {
        self.check_held(&Held::from_layers(BTreeMap::from([(layer, BTreeSet::from([expert]))])))
    }

    fn put(&self, layer: usize, expert: usize, mlp: Option<Arc<Mlp>>) {
        let mut table = self.layers[layer].table.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Table::clone(&table);
        next[expert] = mlp;
        *table = Arc::new(next);
    }

    /// Layer and number of the experts of `held` that are not here.
    pub fn missing(&self, held: &Held) -> Vec<(usize, usize)> {
        self.named(|layer, expert, here| !here && held.holds(layer, expert))
    }

    /// Layer and number of the experts here that are not of `held`.
    pub fn beyond(&self, held: &Held) -> Vec<(usize, usize)> {
        self.named(|layer, expert, here| here && !held.holds(layer, expert))
    }

    fn named(&self, wanted: impl Fn(usize, usize, bool) -> bool) -> Vec<(usize, usize)> {
        let of_layer = |layer: usize| self.table(layer).iter().map(Option::is_some).collect::<Vec<bool>>();
        let all =
            (0..self.layers.len()).flat_map(|layer| (0..).zip(of_layer(layer)).map(move |(e, here)| (layer, e, here)));
        all.filter(|&(layer, expert, here)| wanted(layer, expert, here))
            .map(|(layer, expert, _)| (layer, expert))
            .collect()
    }

    /// Counts rows that sequences of this worker gave to experts, wherever they were computed.
    pub(crate) fn count(&self, layer: usize, experts: impl IntoIterator<Item = u32>) {
        let Some(layer) = self.layers.get(layer) else { return };
        for expert in experts {
            layer.routed[expert as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Rows that sequences of this worker gave to each expert since it was loaded, for each layer that has experts. A
    /// step that is tried again counts again, as it costs again.
    pub fn routed(&self) -> Vec<(usize, Vec<u64>)> {
        let rows = |layer: &Layer| layer.routed.iter().map(|rows| rows.load(Ordering::Relaxed)).collect();
        let layers = self.layers.iter().enumerate().filter(|(_, layer)| !layer.routed.is_empty());
        layers.map(|(index, layer)| (index, rows(layer))).collect()
    }

    /// How rows travel.
    pub fn dtype(&self) -> WireDtype {
        self.dtype
    }

    /// Values of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Whether this expert is in memory.
    pub fn holds(&self, layer: usize, expert: usize) -> bool {
        find(&self.table(layer), layer, expert).is_ok()
    }

    /// How many experts are in memory, and their bytes.
    pub fn weight(&self) -> (u64, u64) {
        let tables = (0..self.layers.len()).map(|layer| self.table(layer));
        tables.fold((0, 0), |(count, bytes), table| {
            let here = || table.iter().flatten();
            (count + here().count() as u64, bytes + here().map(|mlp| mlp.bytes()).sum::<u64>())
        })
    }
}

fn find(table: &Table, layer: usize, expert: usize) -> Result<&Mlp, ExpertsError> {
    let held = table.get(expert).and_then(Option::as_deref);
    held.ok_or(ExpertsError::NotHeld { layer, expert })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_shares_together_are_both() {
        let held = |layers: &[(usize, &[usize])]| {
            let own = |experts: &[usize]| experts.iter().copied().collect();
            Held::from_layers(layers.iter().map(|(layer, experts)| (*layer, own(experts))).collect())
        };
        let both = held(&[(1, &[0, 2]), (2, &[1])]).and(held(&[(1, &[2, 3]), (4, &[])]));
        assert_eq!(both, held(&[(1, &[0, 2, 3]), (2, &[1]), (4, &[])]));
        assert_eq!(both.and(Held::all()), Held::all());
        assert!(Held::all().and(held(&[])).holds(9, 9));
    }
}
