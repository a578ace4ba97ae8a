//! Value parsers for flags that take a real number, so that all tools refuse the same with the same words.

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
}
