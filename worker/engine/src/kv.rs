//! The paged cache of latents: who may use which page, and what is in it.
//!
//! Memory for a page is taken when it is first written, and then kept for the next user.

use std::ops::Range;

/// Tokens of a page.
pub(crate) const PAGE_TOKENS: usize = 16;

/// Some tokens of one sequence that go through the model together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice<'a> {
    /// The sequence's place among those that run.
    pub(crate) sequence: usize,
    /// The first token's position in the sequence.
    pub(crate) start: usize,
    /// The tokens.
    pub(crate) tokens: &'a [u32],
    /// The sequence's pages, in order.
    pub(crate) pages: &'a [u32],
}

impl Slice<'_> {
    /// The tokens' positions in the sequence.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.start..self.start + self.tokens.len()
    }
}

/// Hands out pages, each to one sequence at a time.
#[derive(Debug)]
pub(crate) struct Pages {
    total: usize,
    /// Pages below this number were handed out at least once.
    fresh: usize,
    free: Vec<u32>,
}

impl Pages {
    /// As many pages as `tokens` take, the last one perhaps not full.
    pub(crate) fn new(tokens: usize) -> Self {
        Pages { total: tokens.div_ceil(PAGE_TOKENS).min(u32::MAX as usize), fresh: 0, free: Vec::new() }
    }

    /// All pages there are, used or not.
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Pages in use.
    pub(crate) fn used(&self) -> usize {
        self.fresh - self.free.len()
    }

    /// Pages for `tokens`, or `None` if fewer are free; then nothing is taken.
    pub(crate) fn take(&mut self, tokens: usize) -> Option<Vec<u32>> {
        let count = tokens.div_ceil(PAGE_TOKENS);
        if count > self.total - self.used() {
            return None;
        }
        let again = count.min(self.free.len());
        let mut pages = self.free.split_off(self.free.len() - again);
        for _ in again..count {
            pages.push(u32::try_from(self.fresh).expect("there are at most u32::MAX pages"));
            self.fresh += 1;
        }
        Some(pages)
    }

    /// Takes pages back from a sequence that ended.
    pub(crate) fn release(&mut self, pages: Vec<u32>) {
        self.free.extend(pages);
        debug_assert!(self.free.len() <= self.fresh, "a page was given back twice");
    }
}

/// The latents of all layers, by page.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: usize,
    width: usize,
    /// `[layers, PAGE_TOKENS, width]` each, empty until first written.
    pages: Vec<Vec<f32>>,
}

impl Cache {
    /// `width`: values cached for a token and layer.
    pub(crate) fn new(layers: usize, width: usize) -> Self {
        Cache { layers, width, pages: Vec::new() }
    }

    /// Bytes of one page.
    pub(crate) fn page_bytes(&self) -> u64 {
        (self.layers * PAGE_TOKENS * self.width * size_of::<f32>()) as u64
    }

    /// Writes the latent of one token; what was there is forgotten.
    ///
    /// # Shapes
    /// `latent`: `[width]`, its key already rotated.
    /// # Units
    /// `position` counts tokens from the beginning of the sequence whose `pages` are given.
    pub(crate) fn write(&mut self, layer: usize, pages: &[u32], position: usize, latent: &[f32]) {
        let page = pages[position / PAGE_TOKENS] as usize;
        if self.pages.len() <= page {
            self.pages.resize_with(page + 1, Vec::new);
        }
        let values = &mut self.pages[page];
        if values.is_empty() {
            values.resize(self.layers * PAGE_TOKENS * self.width, 0.0);
        }
        let start = (layer * PAGE_TOKENS + position % PAGE_TOKENS) * self.width;
        values[start..start + self.width].copy_from_slice(latent);
    }

    /// The latents of a sequence's first `length` tokens, page by page: `[up to PAGE_TOKENS, width]`.
    pub(crate) fn read(&self, layer: usize, pages: &[u32], length: usize) -> impl Iterator<Item = &[f32]> {
        let span = PAGE_TOKENS * self.width;
        pages.iter().take(length.div_ceil(PAGE_TOKENS)).enumerate().map(move |(index, &page)| {
            let tokens = PAGE_TOKENS.min(length - index * PAGE_TOKENS);
            let start = layer * span;
            &self.pages[page as usize][start..start + tokens * self.width]
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_page_has_two_owners_and_none_is_lost(
            total in 0usize..40,
            actions in prop::collection::vec((any::<bool>(), 0usize..200), 0..60),
        ) {
            let mut pages = Pages::new((total * PAGE_TOKENS).saturating_sub(3));
            let mut owners: Vec<Vec<u32>> = Vec::new();
            for (take, size) in actions {
                let free = total - owners.iter().map(Vec::len).sum::<usize>();
                if take {
                    match pages.take(size) {
                        Some(taken) => {
                            prop_assert_eq!(taken.len(), size.div_ceil(PAGE_TOKENS));
                            owners.push(taken);
                        }
                        None => prop_assert!(size.div_ceil(PAGE_TOKENS) > free),
                    }
                } else if !owners.is_empty() {
                    pages.release(owners.swap_remove(size % owners.len()));
                }
                let held: Vec<u32> = owners.iter().flatten().copied().collect();
                prop_assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), held.len());
                prop_assert!(held.iter().all(|&page| (page as usize) < total));
                prop_assert_eq!(pages.used(), held.len());
            }
        }
    }

    #[test]
    fn latents_come_back_in_order_from_pages_in_any_order() {
        let mut cache = Cache::new(2, 3);
        let pages = [4, 0, 7];
        for position in 0..40 {
            for layer in 0..2 {
                let value = (layer * 100 + position) as f32;
                cache.write(layer, &pages, position, &[value; 3]);
            }
        }
        for layer in 0..2 {
            let read: Vec<f32> = cache.read(layer, &pages, 37).flatten().copied().collect();
            let want: Vec<f32> = (0..37).flat_map(|at| [(layer * 100 + at) as f32; 3]).collect();
            assert_eq!(read, want);
        }
    }
}
