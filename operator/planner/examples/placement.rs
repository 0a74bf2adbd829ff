//! What planning by load is worth: 58 layers of 256 experts, planned on one load and judged on another that drifted.
//! `tests/bench/placement` runs it, beside the planner of others where one is at hand.
//!
//! `placement loads DIR` writes the loads; `placement judge DIR` plans, reads what others planned, and prints the table.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a measurement that cannot go on says so and ends")]

use std::fs;
use std::path::Path;

use planner::placement::{Placement, Problem, balance, place};
use planner::{Bytes, MoeLayer};

const LAYERS: u32 = 58;
const EXPERTS: u32 = 256;
/// Of one expert and layer of DeepSeek-V3 in FP8, as published.
const EXPERT_BYTES: u64 = 44_040_192;
const FLEETS: [(u32, u32); 3] = [(8, 288), (32, 288), (32, 320)];
const SKEWS: [f64; 2] = [0.5, 1.0];
const DRIFTS: [f64; 2] = [0.15, 0.40];
/// The kernel counts in steps of some milliseconds, so a time is a mean of many.
const ROUNDS: u32 = 50;

/// splitmix64, and the normal distribution by Box and Muller.
struct Draws(u64);

impl Draws {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64 + f64::EPSILON
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

fn skewed(skew: f64) -> Vec<Vec<u64>> {
    let mut draws = Draws(7);
    let layer = |_| (0..EXPERTS).map(|_| ((draws.normal() * skew).exp() * 10_000.0) as u64 + 1).collect();
    (0..LAYERS).map(layer).collect()
}

fn drifted(loads: &[Vec<u64>], drift: f64, seed: u64) -> Vec<Vec<u64>> {
    let mut draws = Draws(seed);
    let mut drift = |rows: &u64| (*rows as f64 * (draws.normal() * drift).exp()) as u64 + 1;
    loads.iter().map(|layer| layer.iter().map(&mut drift).collect()).collect()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["loads", folder] => write_loads(Path::new(folder)),
        ["judge", folder] => judge(Path::new(folder)),
        _ => panic!("placement loads|judge DIR"),
    }
}

/// `SKEW.DRIFT`, a line a layer; drift 0 is what is planned on.
fn write_loads(folder: &Path) {
    for skew in SKEWS {
        let loads = skewed(skew);
        write(folder, &format!("{skew:.2}.0.00"), &loads);
        for drift in DRIFTS {
            write(folder, &format!("{skew:.2}.{drift:.2}"), &drifted(&loads, drift, 11));
        }
    }
}

fn write(folder: &Path, name: &str, loads: &[Vec<u64>]) {
    let line = |layer: &Vec<u64>| layer.iter().map(u64::to_string).collect::<Vec<_>>().join(" ") + "\n";
    fs::write(folder.join(name), loads.iter().map(line).collect::<String>()).unwrap();
}

fn judge(folder: &Path) {
    let layers: Vec<MoeLayer> =
        (0..LAYERS).map(|layer| MoeLayer { layer, expert_bytes: Bytes(EXPERT_BYTES) }).collect();
    println!(
        "| skew, drift | workers / slots | planner | balance planned | drifted, best split | drifted, even split | next plan loads | CPU: plan, next |"
    );
    println!("|-|-|-|-|-|-|-|-|");
    for (shards, slots) in FLEETS {
        let room = vec![Bytes(u64::from(LAYERS * slots / shards) * EXPERT_BYTES); shards as usize];
        for skew in SKEWS {
            let loads = skewed(skew);
            for drift in DRIFTS {
                let after = drifted(&loads, drift, 11);
                let problem = |loads| Problem {
                    layers: &layers,
                    experts: EXPERTS,
                    shards,
                    loads: Some(loads),
                    room: Some(&room),
                    ..Problem::default()
                };
                let (first, plan_ms) = timed(|| place(&problem(&loads), None).unwrap());
                let (next, replan_ms) = timed(|| place(&problem(&after), Some(&first)).unwrap());
                let row = Row { name: "modelfleet", shards, slots, skew, drift };
                row.print(&problem(&loads), [&first, &next], [&loads, &after], [plan_ms, replan_ms]);
                let name = |drift: f64| folder.join(format!("{shards}.{slots}.{skew:.2}.{drift:.2}"));
                if let (Some((first, plan_ms)), Some((next, replan_ms))) =
                    (read(&name(0.0), shards), read(&name(drift), shards))
                {
                    let row = Row { name: "EPLB", ..row };
                    row.print(&problem(&loads), [&first, &next], [&loads, &after], [plan_ms, replan_ms]);
                }
            }
        }
    }
}

struct Row {
    name: &'static str,
    shards: u32,
    slots: u32,
    skew: f64,
    drift: f64,
}

impl Row {
    fn print(&self, problem: &Problem<'_>, plans: [&Placement; 2], loads: [&Vec<Vec<u64>>; 2], ms: [f64; 2]) {
        let Row { name, shards, slots, skew, drift } = self;
        println!(
            "| {skew:.1}, {drift:.2} | {shards} / {slots} | {name} | {:.3} | {:.3} | {:.3} | {:.1} GiB, to {:.3} | {:.1} ms, {:.1} ms |",
            balance(plans[0], loads[0]),
            balance(plans[0], loads[1]),
            even(plans[0], loads[1]),
            plans[1].bytes_from(plans[0], problem.layers).0 as f64 / f64::from(1 << 30),
            balance(plans[1], loads[1]),
            ms[0],
            ms[1],
        );
    }
}

/// The mean over the layers of mean load over peak load, if each copy gets the same part of its expert's rows.
fn even(placement: &Placement, loads: &[Vec<u64>]) -> f64 {
    let mut sum = 0.0;
    for (layer, rows) in placement.layers.iter().zip(loads) {
        let mut load = vec![0.0; placement.shards as usize];
        for (holders, rows) in layer.experts.iter().zip(rows) {
            for holder in holders {
                load[*holder as usize] += *rows as f64 / holders.len() as f64;
            }
        }
        sum += load.iter().sum::<f64>() / load.len() as f64 / load.iter().fold(0.0, |most: f64, load| most.max(*load));
    }
    sum / loads.len() as f64
}

/// The answer, and the mean time that this thread ran for it, in milliseconds.
fn timed<T>(mut plan: impl FnMut() -> T) -> (T, f64) {
    let mut planned = plan();
    let begun = ran();
    for _ in 0..ROUNDS {
        planned = plan();
    }
    (planned, (ran() - begun) as f64 / 1e6 / f64::from(ROUNDS))
}

/// Nanoseconds that this thread ran, whatever else the machine did.
fn ran() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("Linux counts the time of a thread");
    text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds come first")
}

/// What another planner wrote: its milliseconds, then a line a layer, the expert of each slot, worker by worker.
fn read(path: &Path, shards: u32) -> Option<(Placement, f64)> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.lines();
    let ms = lines.next()?.parse().expect("milliseconds");
    let layers = (0..).zip(lines).map(|(layer, line)| {
        let slots: Vec<usize> = line.split(' ').map(|expert| expert.parse().expect("an expert")).collect();
        let mut experts = vec![Vec::new(); EXPERTS as usize];
        for (slot, expert) in slots.iter().enumerate() {
            experts[*expert].push((slot * shards as usize / slots.len()) as u32);
        }
        // two copies on one worker are one
        experts.iter_mut().for_each(|holders: &mut Vec<u32>| holders.dedup());
        planner::placement::LayerPlacement { layer, experts }
    });
    Some((Placement { shards, layers: layers.collect() }, ms))
}
