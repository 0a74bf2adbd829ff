//! How the rows of a batch are split among the copies of their experts.
//!
//! **Problem.** Expert `e` has `n_e` rows and may be computed by the holders `H_e`. Holder `h` begins after `start_h`
//! and takes `row_h` a row. Find whole numbers `x_eh` with `sum over H_e of x_eh = n_e` so that the last holder that
//! got any rows is done as early as possible: the least `T` with `start_h + x_h * row_h <= T` wherever `x_h > 0`.
//!
//! For a given `T` holder `h` has room for `floor((T - start_h) / row_h)` rows, and whether all rows find room is a
//! question of flow from experts to holders, which has an answer in whole numbers. `T` is found by bisection.
//!
//! **Phases.** [`split`]: 1. each expert whole to whoever is done first, which bounds `T` from above, and experts with one
//! holder, which bound it from below; 2. bisection, down to half a percent; 3. holders that nobody needs at one percent more are left out, since each is a message.
//!
//! **Guarantees.** Within 2 % of the optimum; the same for the same values. Who computes a row never changes its bits, so
//! nothing but time depends on what is decided here.

/// How long a holder needs, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Holder {
    /// Until it begins: latency, and the rows that it has still to do.
    pub(super) start: f64,
    /// For each row; above 0.
    pub(super) row: f64,
}

/// The rows of one expert.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Group {
    /// How many.
    pub(super) rows: u32,
    /// Who may compute them, as places in the list of holders; at least one.
    pub(super) holders: Vec<usize>,
}

/// Of the distance between the bounds of `T`, where the bisection ends.
const CLOSE: f64 = 1.005;
/// How much later the last holder may be done if that saves messages.
const SPARED: f64 = 1.01;

/// Splits each group's rows: for each of its holders how many, in the order of [`Group::holders`].
pub(super) fn split(groups: &[Group], holders: &[Holder]) -> Vec<Vec<u32>> {
    if groups.iter().all(|group| group.holders.len() == 1) {
        // there is nothing to decide
        return groups.iter().map(|group| vec![group.rows]).collect();
    }
    let total: u64 = groups.iter().map(|group| u64::from(group.rows)).sum();
    let room = |by: f64| holders.iter().map(|holder| holder.room(by, total)).collect::<Vec<u64>>();
    let alone = groups.iter().map(|group| if group.holders.len() == 1 { group.clone() } else { group.without_rows() });
    let mut low = greedy(&alone.collect::<Vec<Group>>(), holders).finish(holders);
    let mut best = greedy(groups, holders);
    let mut high = best.finish(holders);
    let together = |by: f64| room(by).iter().sum::<u64>() >= total;
    while high > low * CLOSE {
        let middle = (low + high) / 2.0;
        match together(middle).then(|| fill(groups, room(middle))).flatten() {
            Some(flow) => (high, best) = (flow.finish(holders), flow),
            None => low = middle,
        }
    }
    thin(groups, holders, room(high * SPARED), &mut best);
    best.rows
}

impl Group {
    fn without_rows(&self) -> Self {
        Self { rows: 0, ..self.clone() }
    }
}

impl Holder {
    /// Rows that it can have done by then.
    fn room(&self, by: f64, total: u64) -> u64 {
        let rows = (by - self.start) / self.row;
        // a hair of rounding must not cost a row that fits exactly
        if rows <= 0.0 { 0 } else { (rows * (1.0 + 1e-12) + 1e-12).min(total as f64) as u64 }
    }
}

/// What goes where.
#[derive(Debug, Clone)]
struct Flow {
    rows: Vec<Vec<u32>>,
    /// Rows of each holder.
    load: Vec<u64>,
}

impl Flow {
    fn empty(groups: &[Group], holders: usize) -> Self {
        Self { rows: groups.iter().map(|group| vec![0; group.holders.len()]).collect(), load: vec![0; holders] }
    }

    fn finish(&self, holders: &[Holder]) -> f64 {
        let used = self.load.iter().zip(holders).filter(|(rows, _)| **rows > 0);
        used.map(|(&rows, holder)| holder.start + rows as f64 * holder.row).fold(0.0, f64::max)
    }
}

/// Each group whole to the holder that is done first, large groups first.
fn greedy(groups: &[Group], holders: &[Holder]) -> Flow {
    let mut flow = Flow::empty(groups, holders.len());
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_by_key(|&at| (groups[at].holders.len() > 1, u32::MAX - groups[at].rows));
    for at in order {
        let group = &groups[at];
        let done = |holder: usize| {
            holders[holder].start + (flow.load[holder] + u64::from(group.rows)) as f64 * holders[holder].row
        };
        let first = (0..group.holders.len()).min_by(|&a, &b| done(group.holders[a]).total_cmp(&done(group.holders[b])));
        if let Some(place) = first {
            flow.rows[at][place] += group.rows;
            flow.load[group.holders[place]] += u64::from(group.rows);
        }
    }
    flow
}

/// Finds a place for every row within the holders' room, if there is one.
fn fill(groups: &[Group], room: Vec<u64>) -> Option<Flow> {
    let mut flow = Flow::empty(groups, room.len());
    let mut through: Vec<Vec<usize>> = vec![Vec::new(); room.len()];
    for (at, group) in groups.iter().enumerate() {
        group.holders.iter().for_each(|&holder| through[holder].push(at));
    }
    for (at, group) in groups.iter().enumerate() {
        let mut left = group.rows;
        while left > 0 {
            let path = path(groups, &flow, &room, &through, at)?;
            left -= shift(groups, &mut flow, &room, at, &path, left);
        }
    }
    Some(flow)
}

/// One move of rows: a group gives some to a holder, after that holder gave as many of another group to the next.
struct Move {
    group: usize,
    /// Place in the group's holders that gets rows, and the one that loses them.
    to: usize,
    from: Option<usize>,
}

/// The shortest chain of moves from a group to a holder with room.
fn path(groups: &[Group], flow: &Flow, room: &[u64], through: &[Vec<usize>], start: usize) -> Option<Vec<Move>> {
    // for each holder reached: the group and places by which, and the holder before
    let mut reached: Vec<Option<(usize, usize, Option<usize>)>> = vec![None; room.len()];
    let mut queue = std::collections::VecDeque::new();
    for (to, &holder) in groups[start].holders.iter().enumerate() {
        if reached[holder].is_none() {
            reached[holder] = Some((start, to, None));
            queue.push_back(holder);
        }
    }
    while let Some(holder) = queue.pop_front() {
        if flow.load[holder] < room[holder] {
            return Some(back(groups, &reached, holder));
        }
        for &group in &through[holder] {
            let places = &groups[group].holders;
            let from = places.iter().position(|&place| place == holder).filter(|&at| flow.rows[group][at] > 0);
            let Some(from) = from else { continue };
            for (to, &next) in places.iter().enumerate() {
                if reached[next].is_none() {
                    reached[next] = Some((group, to, Some(from)));
                    queue.push_back(next);
                }
            }
        }
    }
    None
}

fn back(groups: &[Group], reached: &[Option<(usize, usize, Option<usize>)>], end: usize) -> Vec<Move> {
    let (mut moves, mut holder) = (Vec::new(), Some(end));
    while let Some((group, to, from)) = holder.and_then(|holder| reached[holder]) {
        moves.push(Move { group, to, from });
        holder = from.map(|from| groups[group].holders[from]);
    }
    moves
}

/// Moves as many rows as the path lets through, at most `most`.
fn shift(groups: &[Group], flow: &mut Flow, room: &[u64], start: usize, path: &[Move], most: u32) -> u32 {
    let end = path.first().map_or(0, |last| groups[last.group].holders[last.to]);
    let open = u32::try_from(room[end] - flow.load[end]).unwrap_or(u32::MAX);
    let given = path.iter().filter_map(|step| step.from.map(|from| flow.rows[step.group][from]));
    let rows = given.fold(most.min(open), u32::min);
    for step in path {
        flow.rows[step.group][step.to] += rows;
        if let Some(from) = step.from {
            flow.rows[step.group][from] -= rows;
        }
    }
    debug_assert!(path.last().is_some_and(|first| first.group == start));
    flow.load[end] += u64::from(rows);
    rows
}

/// Leaves out holders that are not needed within `room`, the least used first.
fn thin(groups: &[Group], holders: &[Holder], mut room: Vec<u64>, best: &mut Flow) {
    let alone = groups.iter().filter(|group| group.holders.len() == 1 && group.rows > 0);
    let needed: Vec<usize> = alone.map(|group| group.holders[0]).collect();
    let mut order: Vec<usize> = (0..holders.len()).filter(|&h| best.load[h] > 0 && !needed.contains(&h)).collect();
    order.sort_by_key(|&holder| best.load[holder]);
    let unused = (0..holders.len()).filter(|&holder| best.load[holder] == 0);
    unused.for_each(|holder| room[holder] = 0);
    for holder in order {
        let had = std::mem::take(&mut room[holder]);
        match fill(groups, room.clone()) {
            Some(fewer) => *best = fewer,
            None => room[holder] = had,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn finish(groups: &[Group], holders: &[Holder], rows: &[Vec<u32>]) -> f64 {
        let mut load = vec![0u64; holders.len()];
        for (group, rows) in groups.iter().zip(rows) {
            assert_eq!(rows.iter().sum::<u32>(), group.rows, "every row goes somewhere, once");
            group.holders.iter().zip(rows).for_each(|(&holder, &rows)| load[holder] += u64::from(rows));
        }
        let used = load.iter().zip(holders).filter(|(rows, _)| **rows > 0);
        used.map(|(&rows, holder)| holder.start + rows as f64 * holder.row).fold(0.0, f64::max)
    }

    /// All ways to split the rows of the groups from `at` on; the best finish.
    fn brute(groups: &[Group], holders: &[Holder], at: usize, rows: &mut Vec<Vec<u32>>) -> f64 {
        fn compositions(rows: u32, parts: usize) -> Vec<Vec<u32>> {
            if parts == 1 {
                return vec![vec![rows]];
            }
            let with = |first: u32| {
                let rest = compositions(rows - first, parts - 1);
                rest.into_iter().map(move |mut rest| {
                    rest.insert(0, first);
                    rest
                })
            };
            (0..=rows).flat_map(with).collect()
        }
        let Some(group) = groups.get(at) else { return finish(groups, holders, rows) };
        let mut best = f64::INFINITY;
        for parts in compositions(group.rows, group.holders.len()) {
            rows.push(parts);
            best = best.min(brute(groups, holders, at + 1, rows));
            rows.pop();
        }
        best
    }

    /// The optimum by Hall's theorem: all rows find room if for each set of holders those that only they can take do.
    fn hall(groups: &[Group], holders: &[Holder]) -> f64 {
        let set = |group: &Group| group.holders.iter().fold(0u32, |set, &holder| set | 1 << holder);
        let total: u64 = groups.iter().map(|group| u64::from(group.rows)).sum();
        let fits = |by: f64| {
            (0..1u32 << holders.len()).all(|chosen| {
                let inside = groups.iter().filter(|group| set(group) & !chosen == 0);
                let need: u64 = inside.map(|group| u64::from(group.rows)).sum();
                let members = holders.iter().enumerate().filter(|(at, _)| chosen >> at & 1 == 1);
                need <= members.map(|(_, holder)| holder.room(by, total)).sum()
            })
        };
        let (mut low, mut high) = (0.0, 1e6);
        for _ in 0..80 {
            let middle = (low + high) / 2.0;
            if fits(middle) { high = middle } else { low = middle }
        }
        high
    }

    fn problems(holders: usize, groups: usize, rows: u32) -> impl Strategy<Value = (Vec<Group>, Vec<Holder>)> {
        (1..=holders).prop_flat_map(move |count| {
            let holder = (0.0..20.0f64, prop_oneof![0.01..10.0f64, Just(1.0)]);
            let holder = holder.prop_map(|(start, row)| Holder { start, row });
            let all: Vec<usize> = (0..count).collect();
            let chosen = prop::sample::subsequence(all, 1..=count.min(3));
            let group = (1..=rows, chosen).prop_map(|(rows, holders)| Group { rows, holders });
            (prop::collection::vec(group, 1..=groups), prop::collection::vec(holder, count))
        })
    }

    proptest! {
        #[test]
        fn as_good_as_the_best_of_all_ways((groups, holders) in problems(3, 3, 5)) {
            let found = finish(&groups, &holders, &split(&groups, &holders));
            let best = brute(&groups, &holders, 0, &mut Vec::new());
            prop_assert!(found <= best * 1.02 + 1e-9, "{found} is not within 2 % of {best}");
        }

        #[test]
        fn as_good_as_the_optimum_of_large_batches((groups, holders) in problems(8, 40, 300)) {
            let found = finish(&groups, &holders, &split(&groups, &holders));
            let best = hall(&groups, &holders);
            prop_assert!(found <= best * 1.02 + 1e-9, "{found} is not within 2 % of {best}");
            prop_assert_eq!(split(&groups, &holders), split(&groups, &holders));
        }

        #[test]
        fn no_holder_is_asked_in_vain((groups, holders) in problems(5, 6, 20)) {
            let rows = split(&groups, &holders);
            let by = finish(&groups, &holders, &rows);
            let total: u64 = groups.iter().map(|group| u64::from(group.rows)).sum();
            let used = |holder: usize| {
                let own = groups.iter().zip(&rows).flat_map(|(group, rows)| group.holders.iter().zip(rows));
                own.filter(|(at, _)| **at == holder).any(|(_, &rows)| rows > 0)
            };
            for holder in (0..holders.len()).filter(|&holder| used(holder)) {
                let without = |at: usize| if at == holder || !used(at) { 0 } else { holders[at].room(by, total) };
                let room = (0..holders.len()).map(without).collect();
                prop_assert!(fill(&groups, room).is_none(), "{holder} is not needed");
            }
        }
    }

    fn group(rows: u32, holders: &[usize]) -> Group {
        Group { rows, holders: holders.to_vec() }
    }

    #[test]
    fn rows_of_one_expert_are_split_between_its_copies_by_their_pace() {
        let holders = [Holder { start: 0.0, row: 1.0 }, Holder { start: 0.0, row: 3.0 }];
        assert_eq!(split(&[group(400, &[0, 1])], &holders), [[300, 100]]);
    }

    #[test]
    fn a_few_rows_go_to_one_holder_where_a_second_saves_no_time() {
        let holders = [Holder { start: 1.0, row: 0.0001 }; 3];
        let rows = split(&[group(3, &[0, 1]), group(2, &[1, 2]), group(4, &[0, 1, 2])], &holders);
        assert_eq!(rows, [vec![0, 3], vec![2, 0], vec![0, 4, 0]]);
    }

    #[test]
    fn nothing_is_split_into_nothing() {
        assert!(split(&[], &[]).is_empty());
        assert_eq!(split(&[group(0, &[0])], &[Holder { start: 1.0, row: 1.0 }]), [[0]]);
    }
}
