//! Value parsers for flags that take a number, so that all tools refuse the same with the same words.

use std::time::Duration;

/// Parses a finite number.
pub fn finite(text: &str) -> Result<f64, String> {
    text.parse::<f64>().ok().filter(|x| x.is_finite()).ok_or_else(|| "not a number".to_string())
}

/// Parses a number above 0.
pub fn positive(text: &str) -> Result<f64, String> {
    finite(text).and_then(|x| if x > 0.0 { Ok(x) } else { Err("must be above 0".into()) })
}

/// Parses a number that is 0 or more.
pub fn not_negative(text: &str) -> Result<f64, String> {
    finite(text).and_then(|x| if x >= 0.0 { Ok(x) } else { Err("must not be below 0".into()) })
}

/// An amount of memory, or a share of what there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// Bytes.
    Bytes(u64),
    /// A share above 0, at most 1.
    Share(f64),
}

/// Parses `8GiB`, `900MiB`, `1.5G` (the same as GiB), `8GB` (powers of 1000), `50%`. A unit is needed.
pub fn size(text: &str) -> Result<Size, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (text[..split].parse::<f64>(), text[split..].trim().to_ascii_lowercase());
    let number = number.map_err(|_| "not a size such as 8GiB, 900MiB or 50%".to_string())?;
    let bytes = |scale: f64| match number * scale {
        bytes if bytes >= 1.0 && bytes < u64::MAX as f64 => Ok(Size::Bytes(bytes as u64)),
        _ => Err("must be at least one byte, and a number that a computer can hold".to_string()),
    };
    match unit.as_str() {
        "%" if number > 0.0 && number <= 100.0 => Ok(Size::Share(number / 100.0)),
        "%" => Err("must be above 0 and at most 100 %".into()),
        "kib" | "k" => bytes(1024.0),
        "mib" | "m" => bytes(1024f64.powi(2)),
        "gib" | "g" => bytes(1024f64.powi(3)),
        "tib" | "t" => bytes(1024f64.powi(4)),
        "kb" => bytes(1e3),
        "mb" => bytes(1e6),
        "gb" => bytes(1e9),
        "tb" => bytes(1e12),
        "" => Err("has no unit: KiB, MiB, GiB, TiB or %".into()),
        _ => Err("has an unknown unit; known are KiB, MiB, GiB, TiB, KB, MB, GB, TB and %".into()),
    }
}

/// Parses `90s`, `10m`, `2h`, `1d`, `1h30m`, `1.5h`. A unit is needed.
pub fn duration(text: &str) -> Result<Duration, String> {
    const WRONG: &str = "not a duration such as 90s, 10m, 2h or 1h30m";
    let (mut rest, mut seconds) = (text.trim(), 0.0);
    if rest.is_empty() {
        return Err(WRONG.into());
    }
    while !rest.is_empty() {
        let split = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..split].parse().map_err(|_| WRONG.to_string())?;
        let mut after = rest[split..].chars();
        let scale = match after.next() {
            Some('s') => 1.0,
            Some('m') => 60.0,
            Some('h') => 3600.0,
            Some('d') => 86_400.0,
            None => return Err("has no unit: s, m, h or d".into()),
            Some(_) => return Err(WRONG.into()),
        };
        seconds += number * scale;
        rest = after.as_str();
    }
    // A century: nobody waits longer, and a deadline stays within what a clock can hold.
    match seconds {
        s if s <= 0.0 => Err("must be above 0".into()),
        s if s > 3.2e9 => Err("is longer than a century".into()),
        s => Ok(Duration::from_secs_f64(s)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_the_ranges() {
        assert_eq!(positive("1e-300"), Ok(1e-300));
        assert!(positive("0").is_err() && positive("-1").is_err());
        assert_eq!(not_negative("0"), Ok(0.0));
        assert!(not_negative("-1e-300").is_err());
        for text in ["nan", "inf", "1e999", "x", ""] {
            assert_eq!(finite(text), Err("not a number".to_string()), "{text}");
        }
    }

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [
            ("90s", 90.0),
            ("10m", 600.0),
            ("2h", 7200.0),
            ("1d", 86_400.0),
            ("1h30m", 5400.0),
            ("0.5s", 0.5),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs_f64(seconds)), "{text}");
        }
        for text in
            ["", "10", "m", "10x", "-1s", "0s", "1h30", "1..2s", "1e3s", "inf", "99999999999d", "10 m"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("8GiB", 8 << 30),
            ("900MiB", 900 << 20),
            ("1.5G", 3 << 29),
            ("8 gb", 8_000_000_000),
            ("64k", 65_536),
            ("1t", 1 << 40),
        ] {
            assert_eq!(size(text), Ok(Size::Bytes(bytes)), "{text}");
        }
        assert_eq!((size("50%"), size("100 %")), (Ok(Size::Share(0.5)), Ok(Size::Share(1.0))));
        for text in [
            "8",
            "",
            "GiB",
            "-1G",
            "0MiB",
            "0%",
            "101%",
            "1e3M",
            "8Q",
            "1.2.3G",
            "inf",
            "99999999999T",
            "8GiB2",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
