//! Tables for people: pure text.

use std::collections::{BTreeMap, BTreeSet};

/// Lines of cells in aligned columns; the last column is not padded.
pub(crate) fn aligned<const COLUMNS: usize>(lines: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let line = |line: &[String; COLUMNS]| {
        let padded: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    lines.iter().map(line).collect()
}

/// The experts of a worker: `0-3,8` if all layers have the same, else by layers: `1-2:0-3 3:4-7`; `-` for none.
pub(crate) fn experts(held: &BTreeMap<u32, Vec<u32>>) -> String {
    let sets: BTreeSet<&Vec<u32>> = held.values().collect();
    match sets.len() {
        0 => "-".to_owned(),
        1 => sets.first().map_or_else(String::new, |experts| ranges(experts)),
        _ => by_layers(held),
    }
}

fn by_layers(held: &BTreeMap<u32, Vec<u32>>) -> String {
    let mut parts: Vec<(Vec<u32>, &Vec<u32>)> = Vec::new();
    for (layer, experts) in held {
        match parts.last_mut() {
            Some((layers, same)) if *same == experts => layers.push(*layer),
            _ => parts.push((vec![*layer], experts)),
        }
    }
    let part = |(layers, experts): &(Vec<u32>, &Vec<u32>)| format!("{}:{}", ranges(layers), ranges(experts));
    parts.iter().map(part).collect::<Vec<_>>().join(" ")
}

/// Ascending numbers, those in a row as `FIRST-LAST`; `-` for none.
pub(crate) fn ranges(numbers: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    if ranges.is_empty() {
        return "-".to_owned();
    }
    let range = |(first, last): &(u32, u32)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(layers: &[(u32, &[u32])]) -> BTreeMap<u32, Vec<u32>> {
        layers.iter().map(|(layer, experts)| (*layer, experts.to_vec())).collect()
    }

    #[test]
    fn experts_in_a_row_are_a_range() {
        assert_eq!(experts(&held(&[(1, &[0, 1, 2, 3]), (2, &[0, 1, 2, 3])])), "0-3");
        assert_eq!(experts(&held(&[(1, &[0, 2, 3, 9])])), "0,2-3,9");
    }

    #[test]
    fn layers_that_differ_are_told_apart() {
        let held = held(&[(1, &[0, 1]), (2, &[0, 1]), (3, &[4]), (4, &[])]);
        assert_eq!(experts(&held), "1-2:0-1 3:4 4:-");
    }

    #[test]
    fn a_dense_model_has_no_experts() {
        assert_eq!(experts(&BTreeMap::new()), "-");
        assert_eq!(experts(&held(&[(1, &[])])), "-");
    }

    #[test]
    fn columns_are_aligned() {
        let lines = [["NAME", "PID", "EXPERTS"], ["router", "12345", "-"], ["tiny-r1-0-0", "7", "0-3"]];
        let expected = "NAME         PID    EXPERTS\n\
                        router       12345  -\n\
                        tiny-r1-0-0  7      0-3\n";
        assert_eq!(aligned(&lines.map(|line| line.map(str::to_owned))), expected);
    }
}
