//! The experts of a model as text: layers by experts, or one layer as a table.

use std::fmt::Write as _;

use super::{Expert, LayerExperts, ModelExperts, Moving, ReplicaExperts, WorkerExperts};
use crate::table::{aligned, experts};

/// A load from none to twice the mean of its layer, in quarters of the mean.
const SHADES: [char; 9] = ['·', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Experts without a gap between them.
const GROUP: usize = 16;
/// What stands before the experts of a line, at most.
const BEFORE: usize = 29;
/// The experts of a worker are counted where naming them takes more than this.
const NAMED: usize = 40;

/// What is drawn on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Canvas {
    /// Characters of a line.
    pub columns: usize,
    /// ANSI colours are understood, and wanted.
    pub colour: bool,
}

/// Draws each layer as a line of experts, or as many as it takes: the shade is the load beside the layer's mean. Where
/// experts of a layer have different numbers of copies, those stand below.
pub fn draw(model: &ModelExperts, canvas: Canvas) -> String {
    each(model, |replica| {
        let load = match replica.told() {
            0 => "no worker told its load\n".to_owned(),
            _ => format!("rows since {}: ▄ mean of a layer, █ its double, · none\n", who_told(replica)),
        };
        let (layers, workers) = (aligned(&layers(replica, canvas)), aligned(&workers(replica)));
        format!("{load}\n{layers}\n{workers}")
    })
}

/// Lists the experts of each layer that is left, with rows, copies and holders.
pub fn table(model: &ModelExperts) -> String {
    each(model, |replica| {
        let mut text = String::new();
        for layer in &replica.layers {
            let rows = layer.rows().map_or("no worker told its load".to_owned(), |rows| {
                format!("{rows} rows since {}", who_told(replica))
            });
            // writing to a String cannot fail
            let _ = write!(text, "layer {}: {rows}\n\n{}", layer.layer, aligned(&rows_of(layer, replica)));
        }
        let unknown = replica.workers.iter().filter_map(|worker| Some((worker.ordinal, worker.unknown.as_ref()?)));
        for (at, (ordinal, why)) in unknown.enumerate() {
            let _ = writeln!(text, "{}worker {ordinal} is not in it: {why}", if at == 0 { "\n" } else { "" });
        }
        text
    })
}

/// A heading for each replica, and what is said of it.
fn each(model: &ModelExperts, say: impl Fn(&ReplicaExperts) -> String) -> String {
    if model.replicas.is_empty() {
        let status = if model.status.is_empty() { "not known yet" } else { &model.status };
        return format!("{} has no replica; its status: {status}\n", model.model);
    }
    let one = |replica: &ReplicaExperts| {
        let rest = match (replica.placed, replica.layers.is_empty()) {
            (false, _) => "its placement is not recorded\n".to_owned(),
            (true, true) => "no routed experts\n".to_owned(),
            (true, false) => say(replica),
        };
        format!("{}{rest}", heading(&model.model, replica))
    };
    model.replicas.iter().map(one).collect::<Vec<_>>().join("\n")
}

fn heading(model: &str, replica: &ReplicaExperts) -> String {
    let live = replica.workers.iter().filter(|worker| worker.live).count();
    let draining = if replica.draining { ", draining" } else { "" };
    let (revision, number, shards) = (&replica.revision, replica.replica, replica.shards);
    let mut text = format!("{model}: revision {revision}, replica {number}, workers {live}/{shards}{draining}\n");
    if let Some(copies) = replica.min_copies {
        let skew = replica.skew_percent.map_or("unknown".to_owned(), |skew| format!("{skew} %"));
        let moving = match replica.moving {
            None => "",
            Some(Moving::Loading) => ", experts move: the next holders load",
            Some(Moving::Dropping) => ", experts move: the last holders keep theirs",
        };
        // writing to a String cannot fail
        let _ = writeln!(text, "minimum copies {copies}, skew {skew}{moving}");
    }
    text
}

/// `4 workers started`, `3 of 4 workers started`.
fn who_told(replica: &ReplicaExperts) -> String {
    let (told, all) = (replica.told(), replica.workers.len());
    match (told == all, all) {
        (true, 1) => "the worker started".to_owned(),
        (true, _) => format!("the {all} workers started"),
        (false, _) => format!("{told} of {all} workers started"),
    }
}

fn layers(replica: &ReplicaExperts, canvas: Canvas) -> Vec<[String; 5]> {
    let mut lines = vec![["LAYER", "ROWS", "COPIES", "FROM", "EXPERTS"].map(str::to_owned)];
    for layer in &replica.layers {
        let (fewest, most) = copies(layer);
        let copies = if fewest == most { fewest.to_string() } else { format!("{fewest}-{most}") };
        let rows = layer.rows().map_or("?".to_owned(), short);
        let mut before = [layer.layer.to_string(), rows, copies];
        for part in layer.experts.chunks(a_line(layer.experts.len(), canvas.columns)) {
            let [number, rows, copies] = std::mem::take(&mut before);
            let from = part.first().map_or(0, |expert| expert.expert).to_string();
            let loads = in_groups(part, |expert| load(expert, layer, canvas));
            lines.push([number, rows, copies, from, loads]);
            if fewest != most {
                let counts = in_groups(part, |expert| count(expert, canvas));
                lines.push([String::new(), String::new(), String::new(), String::new(), counts]);
            }
        }
    }
    lines
}

/// How many experts stand in a line: whole groups, as many in each line as can be.
fn a_line(experts: usize, columns: usize) -> usize {
    let groups = experts.div_ceil(GROUP).max(1);
    let fit = (columns.saturating_sub(BEFORE) + 1) / (GROUP + 1);
    let lines = groups.div_ceil(fit.max(1));
    groups.div_ceil(lines) * GROUP
}

fn in_groups(experts: &[Expert], cell: impl Fn(&Expert) -> String) -> String {
    let group = |experts: &[Expert]| experts.iter().map(&cell).collect::<String>();
    experts.chunks(GROUP).map(group).collect::<Vec<_>>().join(" ")
}

fn copies(layer: &LayerExperts) -> (u32, u32) {
    let copies = || layer.experts.iter().map(|expert| expert.copies);
    (copies().min().unwrap_or(0), copies().max().unwrap_or(0))
}

fn load(expert: &Expert, layer: &LayerExperts, canvas: Canvas) -> String {
    let Some((rows, total)) = expert.rows.zip(layer.rows()) else {
        return "?".to_owned();
    };
    let shade = shade(rows, total, layer.experts.len());
    let colour = match shade {
        0 => Colour::Dim,
        1..=5 => Colour::Plain,
        6 | 7 => Colour::Yellow,
        _ => Colour::Red,
    };
    colour.paint(SHADES[shade], canvas)
}

/// The load in quarters of the mean, rounded; one that is not none is shown, and so is one beyond the scale.
fn shade(rows: u64, total: u64, experts: usize) -> usize {
    if rows == 0 {
        return 0;
    }
    let (rows, total) = (u128::from(rows) * experts as u128, u128::from(total));
    let quarters = (rows * 8 + total) / (2 * total).max(1);
    quarters.clamp(1, 8) as usize
}

fn count(expert: &Expert, canvas: Canvas) -> String {
    let lacking = (expert.copies as usize) < expert.holders.len();
    let colour = match expert.copies {
        0 => Colour::Red,
        _ if lacking => Colour::Yellow,
        _ => Colour::Plain,
    };
    colour.paint(char::from_digit(expert.copies, 10).unwrap_or('+'), canvas)
}

#[derive(Clone, Copy)]
enum Colour {
    Plain,
    Dim,
    Yellow,
    Red,
}

impl Colour {
    fn paint(self, cell: char, canvas: Canvas) -> String {
        let code = match self {
            _ if !canvas.colour => return cell.to_string(),
            Self::Plain => return cell.to_string(),
            Self::Dim => 2,
            Self::Yellow => 33,
            Self::Red => 31,
        };
        format!("\x1b[{code}m{cell}\x1b[0m")
    }
}

/// At most five characters.
fn short(rows: u64) -> String {
    let units = ["", "k", "M", "G", "T", "P"];
    let mut scaled = rows;
    for unit in units {
        if scaled < 10_000 {
            return format!("{scaled}{unit}");
        }
        scaled /= 1000;
    }
    format!("{scaled}E")
}

fn workers(replica: &ReplicaExperts) -> Vec<[String; 5]> {
    let header = ["WORKER", "POD", "NODE", "EXPERTS", "STATE"].map(str::to_owned);
    let line = |worker: &WorkerExperts| {
        let named = experts(&worker.experts);
        let held: usize = worker.experts.values().map(Vec::len).sum();
        let layers = worker.experts.values().filter(|experts| !experts.is_empty()).count();
        let held = if named.len() > NAMED { format!("{held} in {layers} layers") } else { named };
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        [worker.ordinal.to_string(), or_none(&worker.pod), or_none(&worker.node), held, state(worker)]
    };
    std::iter::once(header).chain(replica.workers.iter().map(line)).collect()
}

fn state(worker: &WorkerExperts) -> String {
    match (&worker.pod, worker.live, &worker.unknown) {
        (None, ..) => "no pod".to_owned(),
        (_, true, None) => "serves".to_owned(),
        (_, true, Some(why)) => format!("serves, load unknown: {why}"),
        (_, false, None) => "not ready".to_owned(),
        (_, false, Some(why)) => format!("not ready, load unknown: {why}"),
    }
}

fn rows_of(layer: &LayerExperts, replica: &ReplicaExperts) -> Vec<[String; 5]> {
    let header = ["EXPERT", "ROWS", "SHARE", "COPIES", "HOLDERS"].map(str::to_owned);
    let total = layer.rows();
    let line = |expert: &Expert| {
        let unknown = || "?".to_owned();
        let share = expert.rows.zip(total).map_or_else(unknown, |(rows, total)| percent(rows, total));
        let rows = expert.rows.map_or_else(unknown, |rows| rows.to_string());
        let holders: Vec<String> = expert.holders.iter().map(|holder| named(*holder, replica)).collect();
        let holders = if holders.is_empty() { "-".to_owned() } else { holders.join(", ") };
        [expert.expert.to_string(), rows, share, expert.copies.to_string(), holders]
    };
    std::iter::once(header).chain(layer.experts.iter().map(line)).collect()
}

/// `2 (node-b)`, `3 (node-c, not ready)`.
fn named(holder: u32, replica: &ReplicaExperts) -> String {
    let worker = replica.workers.iter().find(|worker| worker.ordinal == holder);
    let node = worker.and_then(|worker| worker.node.as_deref()).unwrap_or("no node");
    let state = if worker.is_some_and(|worker| worker.live) { "" } else { ", not ready" };
    format!("{holder} ({node}{state})")
}

fn percent(rows: u64, total: u64) -> String {
    let permille = u128::from(rows) * 1000 / u128::from(total.max(1));
    format!("{}.{} %", permille / 10, permille % 10)
}
