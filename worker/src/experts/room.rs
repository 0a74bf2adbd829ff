//! How much memory is left for experts that this worker was not planned to hold.
//!
//! The limit is that of the control group (version 2 or 1) that the worker runs in, or of the machine where that is less.
//! What is in use is what the kernel counts against it, without files that it can drop at once. The whole KV cache counts
//! as used, since it is promised to requests, and a tenth of the limit stays free for what steps need.

use std::fs;

/// Where a container finds its own control group.
const GROUP: &str = "/sys/fs/cgroup";
/// The files of a group: limit, use, and details with the name of the files that can be dropped.
const VERSIONS: [[&str; 4]; 2] = [
    ["memory.max", "memory.current", "memory.stat", "inactive_file"],
    ["memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"],
];

/// Bytes that are left, if `promised` are still to be taken for other things.
pub fn left(promised: u64) -> u64 {
    let read = |file: &str| fs::read_to_string(format!("{GROUP}/{file}")).ok();
    let group = |[limit, used, stat, files]: [&str; 4]| of_group(&read(limit)?, &read(used)?, &read(stat)?, files);
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|meminfo| of_machine(&meminfo));
    let rooms = VERSIONS.into_iter().filter_map(group).chain(machine);
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
fn of_group(limit: &str, used: &str, stat: &str, files: &str) -> Option<Room> {
    let limit = limit.trim().parse().ok()?;
    let used: u64 = used.trim().parse().ok()?;
    let files = field(stat, files).unwrap_or(0);
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
        let room = of_group("1000\n", "800\n", stat, VERSIONS[0][3]).unwrap();
        assert_eq!(room, Room { limit: 1000, free: 600 });
        assert_eq!((room.left(0), room.left(450), room.left(9999)), (500, 50, 0));
        assert_eq!(of_group("max\n", "800\n", stat, VERSIONS[0][3]), None);
        let stat = "inactive_file 1\ntotal_inactive_file 400\n";
        assert_eq!(of_group("1000\n", "800\n", stat, VERSIONS[1][3]), Some(Room { limit: 1000, free: 600 }));
    }

    #[test]
    fn without_a_limit_the_machine_is_it() {
        let meminfo = "MemTotal:       1000 kB\nMemFree:         10 kB\nMemAvailable:    400 kB\n";
        assert_eq!(of_machine(meminfo), Some(Room { limit: 1_024_000, free: 409_600 }));
        assert_eq!(of_machine("nonsense"), None);
    }
}
