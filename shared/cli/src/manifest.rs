//! The manifest of a run: what was asked for, what was read, what was written.
//!
//! Written by [`crate::Record`], read again for `--from-manifest`. Invariant: two runs of the same tool with the same
//! options on the same inputs differ in "environment" only.

use crate::{Error, Result, escape, input, version};
use rustix::system::uname;
use serde_json::{Map, Value, json};
use std::{
    env,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// Longest manifest that is read, in bytes.
const MOST: u64 = 64 << 20;
/// The form that is written.
const FORMAT: u64 = 1;

/// Returns the manifest without inputs, outputs and environment.
pub(crate) fn begin(tool: &str, configuration: Map<String, Value>) -> Map<String, Value> {
    let all = json!({
        "format": FORMAT,
        "tool": tool,
        "version": version::number(),
        "revision": version::revision(),
        "configuration": configuration,
    });
    match all {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Returns where and when a run took place. With SOURCE_DATE_EPOCH, the time is that.
pub(crate) fn environment(began: SystemTime) -> Value {
    let fixed = env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.trim().parse::<i64>().ok());
    let seconds = |time: SystemTime| {
        fixed.unwrap_or_else(|| time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64))
    };
    let system = uname();
    let text = |name: &std::ffi::CStr| name.to_string_lossy().into_owned();
    json!({
        "started": timestamp(seconds(began)),
        "finished": timestamp(seconds(SystemTime::now())),
        "host": text(system.nodename()),
        "system": format!("{} {} {}", text(system.sysname()), text(system.release()), text(system.machine())),
        "simd": version::simd(),
    })
}

/// Returns the configuration in the manifest at `path` of a run of `tool`. Errors: 66 for none, 78 for a file that is
/// no manifest, or that of another tool.
pub(crate) fn configuration(path: &Path, tool: &str) -> Result<Map<String, Value>> {
    let place = escape(&path.display().to_string());
    let bad = |what: String| Error::config(format!("{place}: {what}"));
    let value: Value = serde_json::from_slice(&input::read(path, MOST)?)
        .map_err(|e| bad(format!("not a manifest: {}", escape(&e.to_string()))))?;
    match value.get("tool").and_then(Value::as_str) {
        Some(found) if found == tool => {}
        Some(found) => return Err(bad(format!("a manifest of {}, not of {tool}", escape(found)))),
        None => return Err(bad("not a manifest: no \"tool\"".into())),
    }
    match value.get("configuration") {
        Some(Value::Object(map)) => Ok(map.clone()),
        _ => Err(bad("no \"configuration\"".into())),
    }
}

/// Whether two manifests say the same of everything but time and machine.
pub(crate) fn is_same(old: &[u8], new: &[u8]) -> bool {
    let rest = |bytes| match serde_json::from_slice(bytes) {
        Ok(Value::Object(mut map)) => {
            map.remove("environment");
            Some(map)
        }
        _ => None,
    };
    matches!((rest(old), rest(new)), (Some(old), Some(new)) if old == new)
}

/// Returns the text of a manifest.
pub(crate) fn text(manifest: &Map<String, Value>) -> Result<Vec<u8>> {
    let mut text =
        serde_json::to_vec_pretty(manifest).map_err(|e| Error::internal(format!("manifest: {e}")))?;
    text.push(b'\n');
    Ok(text)
}

/// Returns seconds since 1970 as RFC 3339 has them. Days to a date: H. Hinnant, chrono-compatible algorithms.
pub fn timestamp(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_date() {
        // date -u -d @N +%FT%TZ
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_767_225_600, "2026-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
        ] {
            assert_eq!(timestamp(seconds), text);
        }
    }

    #[test]
    fn only_the_environment_may_differ() {
        let a = br#"{"tool": "x", "environment": {"host": "a"}}"#;
        assert!(is_same(a, br#"{"environment": {"host": "b"}, "tool": "x"}"#));
        assert!(!is_same(a, br#"{"environment": {"host": "a"}, "tool": "y"}"#));
        assert!(!is_same(b"", b""));
    }
}
