//! Sizes of files as users write them, for `--max-shard-size`.

/// Reads a size as `500MB`, `2GiB`, `512M` or plain bytes; M and MB are 10^6, MiB is 2^20. For clap.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 =
        digits.parse().map_err(|_| format!("\"{text}\" is not a size such as 500MB or 2GiB"))?;
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kb" => 1000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        other => return Err(format!("unknown unit \"{other}\"; use MB, GB, MiB or GiB")),
    };
    let size = number * unit as f64;
    if !(1.0..=1e18).contains(&size) {
        return Err(format!("\"{text}\" is not between 1 byte and 10^18"));
    }
    Ok(size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("5GB", 5_000_000_000), ("2GiB", 2 << 30), ("512m", 512_000_000), ("1.5k", 1500), ("7", 7)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "x", "5XB", "0", "-1", "nan", "1e30", "5 GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
