//! How much memory is left for experts that this worker was not planned to hold.
//!
//! The limit is that of the control group that the worker runs in, or of the machine where there is none. What is in
//! use is what the kernel counts against it, without files that it can drop at once. The whole KV cache counts as used,
//! since it is promised to requests, and a tenth of the limit stays free for what steps need.

use std::fs;

const GROUP: &str = "/sys/fs/cgroup";

/// Bytes that are left, if `promised` are still to be taken for other things.
pub fn left(promised: u64) -> u64 {
    let read = |file: &str| fs::read_to_string(format!("{GROUP}/{file}")).ok();
    let group = || {
        let (limit, used) = (read("memory.max")?, read("memory.current")?);
        of_group(&limit, &used, &read("memory.stat")?)
    };
    let machine = || of_machine(&fs::read_to_string("/proc/meminfo").ok()?);
    let rooms = [group(), machine()].into_iter().flatten();
    rooms.map(|room| room.left(promised)).min().unwrap_or(0)
}

#[derive(Debug, PartialEq)]
struct Room {
    limit: u64,
    free: u64,
}

impl Room {
    fn left(&self, promised: u64) -> u64 {
        self.free.saturating_sub(promised).saturating_sub(self.limit / 10)
    }
}

/// Of a control group; none if it has no limit.
fn of_group(limit: &str, used: &str, stat: &str) -> Option<Room> {
    let limit = limit.trim().parse().ok()?;
    let used: u64 = used.trim().parse().ok()?;
    let files = field(stat, "inactive_file").unwrap_or(0);
    Some(Room { limit, free: u64::saturating_sub(limit, used.saturating_sub(files)) })
}

/// Of the machine; in /proc/meminfo values are in KiB.
fn of_machine(meminfo: &str) -> Option<Room> {
    let bytes = |name| field(meminfo, name).map(|kib| kib * 1024);
    Some(Room { limit: bytes("MemTotal:")?, free: bytes("MemAvailable:")? })
}

fn field(text: &str, name: &str) -> Option<u64> {
    let values = text.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let value = values.into_iter().find(|(key, _)| *key == name)?.1;
    value.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_can_be_dropped_are_free_and_promises_are_not() {
        let stat = "anon 300\nfile 500\ninactive_file 400\n";
        let room = of_group("1000\n", "800\n", stat).unwrap();
        assert_eq!(room, Room { limit: 1000, free: 600 });
        assert_eq!((room.left(0), room.left(450), room.left(9999)), (500, 50, 0));
        assert_eq!(of_group("max\n", "800\n", stat), None);
    }

    #[test]
    fn without_a_limit_the_machine_is_it() {
        let meminfo = "MemTotal:       1000 kB\nMemFree:         10 kB\nMemAvailable:    400 kB\n";
        assert_eq!(of_machine(meminfo), Some(Room { limit: 1_024_000, free: 409_600 }));
        assert_eq!(of_machine("nonsense"), None);
    }
}
