//! Whether a better placement is worth its move. What is done with the answer, advice or change, is the caller's.

use std::fmt;

use crate::placement::{Placement, Problem, Unplaceable, peaks, place};
use crate::units::{Bytes, Millis};

/// When a move is worth it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The least gain, in thousandths of the tokens per second that experts allow. Far above what the placement that was
    /// just made can lack, so that none follows at once.
    pub least_gain_permille: u64,
    /// How long a load is expected to last; a move must pay for itself in that time, and none follows before it is over.
    pub horizon: Millis,
    /// How many bytes of experts a worker loads in a second while it serves.
    pub load_rate: Bytes,
    /// How much slower the replica is meanwhile, in thousandths.
    pub slowdown_permille: u64,
    /// Rows that a layer must have seen for each expert, on average, so that noise does not move anything.
    pub rows_an_expert: u64,
}

impl Default for Policy {
    /// A twentieth faster, for ten minutes, at 200 MiB a second and a fifth slower; 64 rows an expert.
    fn default() -> Self {
        Policy {
            least_gain_permille: 50,
            horizon: Millis::from_secs(600),
            load_rate: Bytes(200 << 20),
            slowdown_permille: 200,
            rows_an_expert: 64,
        }
    }
}

/// What runs, and since when.
#[derive(Clone, Copy, Debug)]
pub struct Running<'a> {
    /// Where experts are.
    pub placement: &'a Placement,
    /// How long ago it was last changed; `None`: not since anyone knows.
    pub changed: Option<Millis>,
    /// How many bytes of experts each ordinal may hold while old and new ones are there. `None`: as many as it takes.
    pub room: Option<&'a [Bytes]>,
}

/// The answer, with what it was taken from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The placement that is worth the move.
    pub to: Option<Placement>,
    /// The figures, as far as they were needed.
    pub figures: Figures,
    /// Why.
    pub why: Why,
}

/// What a move would bring and cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Mean over peak load of the workers with the running placement, in thousandths.
    pub balance_permille: u64,
    /// The same with the new one.
    pub then_permille: u64,
    /// By how many thousandths the experts would be faster.
    pub gain_permille: u64,
    /// What all workers load.
    pub bytes: Bytes,
    /// How long the one with the most to load takes.
    pub takes: Millis,
}

/// Why a placement changes or stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The gain outweighs the move.
    Worth,
    /// A layer has seen too few rows.
    TooFewRows {
        /// Rows an expert, on average, in the layer with the fewest.
        rows: u64,
        /// As many are asked for.
        least: u64,
    },
    /// The last change has not had the time to pay for itself.
    TooSoon {
        /// How long it is still to have.
        left: Millis,
    },
    /// It would be hardly any faster.
    GainTooSmall {
        /// The gain that is asked for, in thousandths.
        least_permille: u64,
    },
    /// What loading costs is more than what the gain brings in its time.
    MoveCostsMore {
        /// Time lost by the slowdown.
        cost: Millis,
        /// Time won over the horizon.
        won: Millis,
    },
    /// A worker cannot hold its old and new experts at once.
    NoRoomToMove {
        /// Which one.
        ordinal: u32,
        /// Both together.
        need: Bytes,
        /// What it may hold.
        room: Bytes,
    },
    /// The problem has no placement.
    Unplaceable(Unplaceable),
}

/// Decides whether the running placement should give way to one for the measured loads.
///
/// `gain = peak now / peak then - 1`, where a peak is the sum over the layers of the fullest worker's rows, split as well
/// as can be. A move is worth it if the gain is at least the policy's, and `gain x horizon > slowdown x time to load`.
///
/// # Guarantees
/// The same load asked again after the move moves nothing, and at most one move falls into a horizon.
/// # Assumptions
/// The running placement meets the problem ([`Placement::meets`]); one that does not must change in any case. Without
/// loads in the problem the answer is [`Why::TooFewRows`].
pub fn decide(problem: &Problem<'_>, running: &Running<'_>, policy: &Policy) -> Decision {
    let mut figures = Figures::default();
    match weigh(problem, running, policy, &mut figures) {
        Ok(placement) => Decision { to: Some(placement), figures, why: Why::Worth },
        Err(why) => Decision { to: None, figures, why },
    }
}

fn weigh(
    problem: &Problem<'_>,
    running: &Running<'_>,
    policy: &Policy,
    figures: &mut Figures,
) -> Result<Placement, Why> {
    let loads = measured(problem, policy)?;
    let (now, best) = peaks(running.placement, loads);
    figures.balance_permille = permille(best, now);
    if let Some(left) = running.changed.map(|changed| policy.horizon.since(changed)).filter(|left| left.0 > 0) {
        return Err(Why::TooSoon { left });
    }
    let next = settled(problem, running.placement).map_err(Why::Unplaceable)?;
    let (then, _) = peaks(&next, loads);
    let to_load = next.loads_from(running.placement, problem.layers);
    let slowest = to_load.iter().max().copied().unwrap_or_default();
    figures.then_permille = permille(best, then);
    figures.gain_permille = permille(now, then).saturating_sub(1000);
    figures.bytes = to_load.iter().copied().sum();
    figures.takes = Millis(slowest.times(1000).0 / policy.load_rate.0.max(1));
    if figures.gain_permille < policy.least_gain_permille.max(1) {
        return Err(Why::GainTooSmall { least_permille: policy.least_gain_permille });
    }
    has_room(problem, running, &to_load)?;
    let cost = part(figures.takes, policy.slowdown_permille);
    let won = part(policy.horizon, figures.gain_permille);
    if won <= cost { Err(Why::MoveCostsMore { cost, won }) } else { Ok(next) }
}

/// The placement at which planning comes to rest, so that the next decision for the same load does not find a better one.
fn settled(problem: &Problem<'_>, running: &Placement) -> Result<Placement, Unplaceable> {
    /// Each round lowers a peak by a part of the mean; what is left after so many is far below any policy's gain.
    const ROUNDS: usize = 8;
    let mut next = place(problem, Some(running))?;
    for _ in 1..ROUNDS {
        let again = place(problem, Some(&next))?;
        if again == next {
            break;
        }
        next = again;
    }
    Ok(next)
}

/// The loads, if every layer has seen enough.
fn measured<'a>(problem: &Problem<'a>, policy: &Policy) -> Result<&'a [Vec<u64>], Why> {
    let loads = problem.loads.unwrap_or_default();
    let rows =
        |layer: usize| loads.get(layer).map_or(0, |rows| rows.iter().fold(0, |sum: u64, r| sum.saturating_add(*r)));
    let fewest = (0..problem.layers.len()).map(rows).min().unwrap_or_default();
    let (rows, least) = (fewest / u64::from(problem.experts.max(1)), policy.rows_an_expert);
    if fewest == 0 || rows < least { Err(Why::TooFewRows { rows, least }) } else { Ok(loads) }
}

fn has_room(problem: &Problem<'_>, running: &Running<'_>, to_load: &[Bytes]) -> Result<(), Why> {
    let held = running.placement.expert_bytes(problem.layers);
    for (ordinal, (room, new)) in (0..).zip(running.room.unwrap_or_default().iter().zip(to_load)) {
        let need = held.get(ordinal as usize).copied().unwrap_or_default().plus(*new);
        if new.0 > 0 && need > *room {
            return Err(Why::NoRoomToMove { ordinal, need, room: *room });
        }
    }
    Ok(())
}

fn permille(part: u128, whole: u128) -> u64 {
    (part * 1000).checked_div(whole).map_or(1000, |permille| u64::try_from(permille).unwrap_or(u64::MAX))
}

fn part(of: Millis, permille: u64) -> Millis {
    Millis(of.0.saturating_mul(permille) / 1000)
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Worth => f.write_str("worth the move"),
            Why::TooFewRows { rows, least } => write!(f, "{rows} rows an expert measured, {least} needed"),
            Why::TooSoon { left } => write!(f, "changed lately, {} s left", left.0.div_ceil(1000)),
            Why::GainTooSmall { least_permille } => write!(f, "less than {} faster", Percent(*least_permille)),
            Why::MoveCostsMore { cost, won } => write!(f, "the move costs {} ms, the gain is {} ms", cost.0, won.0),
            Why::NoRoomToMove { ordinal, need, room } => {
                write!(f, "worker {ordinal} would need {need} for old and new experts, it has {room}")
            }
            Why::Unplaceable(why) => why.fmt(f),
        }
    }
}

impl fmt::Display for Decision {
    /// `move 1.5Gi in 2100 ms: balance 81.2% -> 99.6%, 22.6% faster (worth the move)`, or `stay at 98.1% (why)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures { balance_permille, then_permille, gain_permille, bytes, takes } = self.figures;
        let (now, then, gain) = (Percent(balance_permille), Percent(then_permille), Percent(gain_permille));
        match self.to {
            Some(_) => {
                write!(f, "move {bytes} in {} ms: balance {now} -> {then}, {gain} faster ({})", takes.0, self.why)
            }
            None => write!(f, "stay at {now} ({})", self.why),
        }
    }
}

/// Thousandths, as percent with a decimal.
struct Percent(u64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}%", self.0 / 10, self.0 % 10)
    }
}
