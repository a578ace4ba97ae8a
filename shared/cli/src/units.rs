//! Times and sizes as people read them.

/// Returns seconds as `12 s`, `3 min 20 s`, `5 h 02 min`.
pub fn duration(seconds: f64) -> String {
    let s = seconds as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

/// Returns bytes as `700 B`, `612 KiB`, `8.5 MiB`, `1.42 GiB`: three digits, powers of 1024.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    // 999.5 and more would be shown as 1000.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    let digits = match value {
        _ if unit == 0 => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Returns a plan's line about the sizes of something before and after, in bytes; what is not `exact` is the most that it may be.
pub fn sizes(before: u64, after: u64, exact: bool) -> String {
    let most = if exact { "" } else { "at most " };
    format!("size {} before, {most}{} ({after} bytes) after\n", size(before), size(after))
}

/// Returns bytes rounded up to a value that a flag takes and that is not less: `613MiB`.
pub fn flag(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

/// Returns a rate with one decimal, large ones without.
pub fn rate(per_second: f64) -> String {
    let digits = if per_second < 99.95 { 1 } else { 0 };
    format!("{per_second:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_unit() {
        assert_eq!([12.9, 200.0, 18_120.0].map(duration), ["12 s", "3 min 20 s", "5 h 02 min"]);
        assert_eq!(
            [0, 999, 1023, 1024, 10_240].map(size),
            ["0 B", "999 B", "1.00 KiB", "1.00 KiB", "10.0 KiB"]
        );
        assert_eq!(size(612 << 20), "612 MiB");
        assert_eq!(size(3 << 29), "1.50 GiB");
        assert_eq!(sizes(3 << 29, 1500, true), "size 1.50 GiB before, 1.46 KiB (1500 bytes) after\n");
        assert_eq!(sizes(9, 5, false), "size 9 B before, at most 5 B (5 bytes) after\n");
        assert_eq!([1, 1 << 20, (1 << 20) + 1].map(flag), ["1MiB", "1MiB", "2MiB"]);
        assert_eq!(size(u64::MAX), "16777216 TiB");
        assert_eq!([3.16, 99.94, 99.96, 12_345.6].map(rate), ["3.2", "99.9", "100", "12346"]);
    }
}
