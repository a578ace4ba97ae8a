//! How much memory this process holds and how much more it may have, as the system tells it.
//!
//! Read by the progress line, by timing.jsonl and by the memory plan. Where the system does not say (only Linux has
//! /proc), the answer is `None` and nothing is guessed.

use std::{fs, path::Path};

/// Memory in physical pages, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// The program's own data: what a limit of a job counts.
    pub anonymous: u64,
    /// Pages of mapped files, which the system can take back at any time.
    pub file: u64,
}

/// Returns the largest resident set of this process so far, in bytes.
pub fn peak_resident() -> Option<u64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Returns the resident set of this process.
pub fn resident() -> Option<Resident> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let file = field(&status, "RssFile:")? + field(&status, "RssShmem:")?;
    Some(Resident { anonymous: field(&status, "RssAnon:")?, file })
}

/// Returns how many bytes this process can still take without swapping: what the machine has free or can free, and
/// what the limits of its control groups leave.
pub fn available() -> Option<u64> {
    let free = fs::read_to_string("/proc/meminfo").ok().and_then(|text| field(&text, "MemAvailable:"));
    let limited = fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|groups| room_in_groups(Path::new("/sys/fs/cgroup"), &groups));
    [free, limited].into_iter().flatten().min()
}

/// Returns the bytes of a line such as `VmHWM:   1948 kB`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Names of the files of one version of control groups.
struct Names {
    limit: &'static str,
    used: &'static str,
    /// The field of memory.stat with the pages that the kernel drops first.
    cache: &'static str,
}

const V1: Names =
    Names { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", cache: "total_inactive_file " };
const V2: Names = Names { limit: "memory.max", used: "memory.current", cache: "inactive_file " };

/// Returns what is left of the tightest memory limit on the way from this process's groups to the root.
/// `groups` is /proc/self/cgroup. Inside a container the path in it may not exist: its root then holds the limit.
fn room_in_groups(root: &Path, groups: &str) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (top, names) = match controllers {
            "" => (root.to_path_buf(), V2),
            list if list.split(',').any(|c| c == "memory") => (root.join("memory"), V1),
            _ => continue,
        };
        let own = top.join(path.trim_start_matches('/'));
        for group in own.ancestors().take_while(|group| group.starts_with(&top)) {
            least = [least, room(group, &names)].into_iter().flatten().min();
        }
    }
    least
}

fn room(group: &Path, names: &Names) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number; version 1 writes a huge one, which no machine's free memory reaches.
    let (limit, used) = (number(names.limit)?, number(names.used)?);
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix(names.cache)?.parse().ok()).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_its_size() {
        if cfg!(target_os = "linux") {
            let block = std::hint::black_box(vec![1u8; 32 << 20]);
            let now = resident().unwrap();
            assert!(now.anonymous >= block.len() as u64);
            assert!(peak_resident().unwrap() >= block.len() as u64);
            assert!(available().unwrap() > 0);
        }
    }

    #[test]
    fn fields_are_kibibytes() {
        let text = "VmPeak:\t 9 kB\nVmHWM:\t    1948 kB\nThreads:\t3\n";
        assert_eq!(field(text, "VmHWM:"), Some(1948 * 1024));
        assert_eq!((field(text, "RssAnon:"), field(text, "Threads:")), (None, None));
    }

    #[test]
    fn the_tightest_group_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let room = |groups: &str| room_in_groups(dir.path(), groups);
        assert_eq!(room("0::/\n9:cpu:/x\n"), None);
        write("job/step/memory.max", "max\n");
        write("job/step/memory.current", "10\n");
        write("job/memory.max", "1000\n");
        write("job/memory.current", "700\n");
        write("job/memory.stat", "anon 300\ninactive_file 400\n");
        assert_eq!(room("0::/job/step\n"), Some(700));
        assert_eq!(room("0::/elsewhere\n"), None);
        // A container sees its own group as the root.
        write("memory.max", "500\n");
        write("memory.current", "600\n");
        assert_eq!(room("0::/not/seen/here\n"), Some(0));
        write("memory/a/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/a/memory.usage_in_bytes", "5\n");
        write("memory/memory.limit_in_bytes", "100\n");
        write("memory/memory.usage_in_bytes", "90\n");
        write("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 30\n");
        assert_eq!(room("4:cpu,memory:/a\n"), Some(40));
    }
}
