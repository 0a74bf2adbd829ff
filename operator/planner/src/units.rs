//! Counts that must not be mixed. Sums and products stop at the largest number: a description comes from a file that
//! somebody else wrote.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// A number of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tokens(pub u64);

/// A moment or a span, in milliseconds. Moments count from any fixed point, the same for all in one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Bytes {
    /// The sum.
    pub fn plus(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_add(other.0))
    }

    /// The difference, nothing if `other` is more.
    pub fn minus(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }

    /// So many of them.
    pub fn times(self, count: u64) -> Bytes {
        Bytes(self.0.saturating_mul(count))
    }
}

impl Tokens {
    /// So many of them.
    pub fn times(self, count: u64) -> Tokens {
        Tokens(self.0.saturating_mul(count))
    }
}

impl Millis {
    /// The time from `earlier` to this moment, nothing if it lies ahead.
    pub fn since(self, earlier: Millis) -> Millis {
        Millis(self.0.saturating_sub(earlier.0))
    }

    /// A span of so many seconds.
    pub fn from_secs(seconds: u64) -> Millis {
        Millis(seconds.saturating_mul(1000))
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(parts: I) -> Bytes {
        parts.fold(Bytes(0), Bytes::plus)
    }
}

impl fmt::Display for Bytes {
    /// As a Kubernetes quantity, rounded up to a tenth: `1.5Gi`, `96Mi`, `512`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 5] =
            [(1 << 50, "Pi"), (1 << 40, "Ti"), (1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
        let Some((unit, name)) = UNITS.into_iter().find(|(unit, _)| self.0 >= *unit) else {
            return write!(f, "{}", self.0);
        };
        let tenths = (u128::from(self.0) * 10).div_ceil(u128::from(unit));
        match tenths % 10 {
            0 => write!(f, "{}{name}", tenths / 10),
            tenth => write!(f, "{}.{tenth}{name}", tenths / 10),
        }
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_as_quantities_rounded_up() {
        let cases = [
            (0, "0"),
            (1023, "1023"),
            (1 << 20, "1Mi"),
            ((1 << 20) + 1, "1.1Mi"),
            (3 << 29, "1.5Gi"),
            (u64::MAX, "16384Pi"),
        ];
        for (bytes, text) in cases {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn sums_and_products_stop_at_the_largest_number() {
        assert_eq!(Bytes(u64::MAX).plus(Bytes(1)), Bytes(u64::MAX));
        assert_eq!(Bytes(u64::MAX).times(2), Bytes(u64::MAX));
        assert_eq!(Bytes(1).minus(Bytes(2)), Bytes(0));
        assert_eq!(Millis(1).since(Millis(2)), Millis(0));
    }
}
