//! Personal data in prompts and completions: e-mail, phone, IBAN, card, IP address, keys.
//!
//! Found by patterns and, where a number has one, by its checksum. A name or an address of the other kind is not found: this
//! is a net for what is certain, not a promise. Deliberately absent: guessing.

use kto_formats::record::{Content, Record};
use regex::{Regex, RegexSet};
use serde_json::Value;

/// What was found, in the order of the report.
pub const KINDS: [&str; 6] = ["email", "iban", "card", "ip", "key", "phone"];

/// Patterns of each kind; a checksum decides about those that have one.
const PATTERNS: [&str; 6] = [
    r"(?i)\b[a-z0-9._%+-]{1,64}@(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}\b",
    r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
    r"\b[0-9](?:[ -]?[0-9]){12,18}\b",
    r"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b|\b(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}\b|\b(?:[0-9a-fA-F]{1,4}:){2,6}:[0-9a-fA-F]{1,4}\b",
    r"\b(?:sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,}|hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|xox[abprs]-[0-9A-Za-z-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,4}(?:[ .-]?[0-9]{2,4}){2,4}\b|\(?\b[0-9]{3}\)?[ .-][0-9]{3}[ .-][0-9]{4}\b",
];

/// Finds personal data.
pub struct Finder {
    any: RegexSet,
    each: Vec<Regex>,
}

impl Finder {
    /// Compiles the patterns.
    pub fn new() -> Self {
        let compile = |p: &&str| Regex::new(p).expect("the patterns are constants and tested");
        Self {
            any: RegexSet::new(PATTERNS).expect("the patterns are constants and tested"),
            each: PATTERNS.iter().map(compile).collect(),
        }
    }

    /// Counts what is in a record, by kind.
    pub fn count(&self, record: &Record) -> [u64; 6] {
        let mut counts = [0; 6];
        for side in [&record.prompt, &record.completion] {
            for text in crate::filters::texts(side) {
                self.each_found(text, |kind, _| counts[kind] += 1);
            }
        }
        counts
    }

    /// Replaces what is in a record by its kind, such as `[EMAIL]`; returns how often, by kind.
    pub fn redact(&self, record: &mut Record) -> [u64; 6] {
        let mut counts = [0; 6];
        for side in [&mut record.prompt, &mut record.completion] {
            match side {
                Content::Text(text) => self.redact_text(text, &mut counts),
                Content::Chat(turns) => {
                    for turn in turns {
                        if let Some(Value::String(text)) = turn.get_mut("content") {
                            self.redact_text(text, &mut counts);
                        }
                    }
                }
            }
        }
        counts
    }

    fn redact_text(&self, text: &mut String, counts: &mut [u64; 6]) {
        let mut found = Vec::new();
        self.each_found(text, |kind, range| found.push((range, kind)));
        found.sort_by_key(|(range, _)| range.start);
        let (mut out, mut at) = (String::new(), 0);
        for (range, kind) in found {
            // Patterns may overlap: the first one counts.
            if range.start < at {
                continue;
            }
            out += &text[at..range.start];
            out += &format!("[{}]", KINDS[kind].to_uppercase());
            at = range.end;
            counts[kind] += 1;
        }
        if at > 0 {
            out += &text[at..];
            *text = out;
        }
    }

    fn each_found(&self, text: &str, mut each: impl FnMut(usize, std::ops::Range<usize>)) {
        // Nothing of any kind is without a digit, an @ or a dash, and most texts are soon done with.
        if !text.bytes().any(|b| b.is_ascii_digit() || b == b'@' || b == b'-' || b == b'_') {
            return;
        }
        for kind in &self.any.matches(text) {
            for found in self.each[kind].find_iter(text) {
                if is_real(kind, found.as_str()) {
                    each(kind, found.range());
                }
            }
        }
    }
}

/// Whether a match is what its kind says, by checksum and range.
fn is_real(kind: usize, text: &str) -> bool {
    match KINDS[kind] {
        "iban" => iban(text),
        "card" => luhn(text),
        "ip" if text.contains('.') => text.split('.').all(|part| part.parse::<u8>().is_ok()),
        "phone" => (8..=15).contains(&text.bytes().filter(u8::is_ascii_digit).count()),
        _ => true,
    }
}

/// ISO 13616: the country behind the rest, letters as numbers, the remainder by 97 is 1.
fn iban(text: &str) -> bool {
    let plain: String = text.chars().filter(|c| *c != ' ').collect();
    if !(15..=34).contains(&plain.len()) {
        return false;
    }
    let (head, tail) = plain.split_at(4);
    let digits = tail.chars().chain(head.chars()).filter_map(|c| c.to_digit(36));
    digits.fold(0_u32, |rest, digit| (rest * if digit > 9 { 100 } else { 10 } + digit) % 97) == 1
}

/// Luhn's sum, and a beginning and a length that an issuer uses.
fn luhn(text: &str) -> bool {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(10)).collect();
    let issued = matches!(
        (digits[0], digits[1], digits.len()),
        (4, _, 13 | 16 | 19)
            | (5, 1..=5, 16)
            | (2, 2..=7, 16)
            | (3, 4 | 7, 15)
            | (3, 0 | 6 | 8, 14)
            | (6, _, 16..=19)
    );
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(i, d)| match i % 2 {
            0 => *d,
            _ if *d > 4 => d * 2 - 9,
            _ => d * 2,
        })
        .sum();
    issued && sum.is_multiple_of(10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redacted(text: &str) -> String {
        let mut text = text.to_owned();
        Finder::new().redact_text(&mut text, &mut [0; 6]);
        text
    }

    #[test]
    fn what_is_certain_is_found() {
        for (text, expected) in [
            ("write to Ann.B+x@mail.example.org.", "write to [EMAIL]."),
            ("pay DE89 3704 0044 0532 0130 00 now", "pay [IBAN] now"),
            ("GB82WEST12345698765432", "[IBAN]"),
            ("card 4111 1111 1111 1111!", "card [CARD]!"),
            ("5500-0000-0000-0004", "[CARD]"),
            ("at 192.168.10.1:80", "at [IP]:80"),
            ("2001:0db8:85a3:0000:0000:8a2e:0370:7334", "[IP]"),
            ("key sk-abcdefghijklmnopqrstuvwx", "key [KEY]"),
            ("AKIAIOSFODNN7EXAMPLE", "[KEY]"),
            ("call +49 30 1234 5678 or (555) 123-4567", "call [PHONE] or [PHONE]"),
        ] {
            assert_eq!(redacted(text), expected);
        }
    }

    #[test]
    fn what_only_looks_like_it_is_left_alone() {
        for text in [
            "version 1.2.3.4000",
            "4111 1111 1111 1112",
            "DE89 3704 0044 0532 0130 01",
            "a@b",
            "2024-05-06",
            "the numbers 1234567 and 12345678901234567890",
            "0000 0000 0000 0000",
            "sk-short",
        ] {
            assert_eq!(redacted(text), text);
        }
    }
}
