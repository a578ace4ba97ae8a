//! How a byte-level tokenizer splits text before it merges: llama.cpp's names for the rules, for both directions.
//!
//! Source: llama.cpp's llama-vocab.cpp; the expressions are those of the models' own tokenizer.json.

use serde_json::{Value, json};

/// A rule that llama.cpp knows by name.
pub struct Rule {
    /// Its names; the first is written.
    names: &'static [&'static str],
    split: Split,
    /// Texts that are tokens are not merged; a text begins with BOS if nothing else is said.
    pub whole_and_bos: bool,
    /// Text is composed first.
    pub composed: bool,
}

#[derive(PartialEq)]
enum Split {
    /// GPT-2's own.
    Gpt2,
    /// Each digit alone, then GPT-2's.
    Digits,
    /// A regular expression.
    Regex(&'static str),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const fn rule(names: &'static [&'static str], split: Split) -> Rule {
    Rule { names, split, whole_and_bos: false, composed: false }
}

/// All of them. Of two that split alike the first is written.
static RULES: [Rule; 8] = [
    rule(&["gpt-2", "phi-2"], Split::Gpt2),
    rule(&["smollm"], Split::Digits),
    Rule {
        whole_and_bos: true,
        ..rule(&["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"], Split::Regex(LLAMA3))
    },
    rule(&["dbrx", "smaug-bpe"], Split::Regex(LLAMA3)),
    Rule { composed: true, ..rule(&["qwen2", "deepseek-r1-qwen"], Split::Regex(QWEN2)) },
    rule(&["stablelm2"], Split::Regex(QWEN2)),
    Rule { whole_and_bos: true, ..rule(&["tekken"], Split::Regex(TEKKEN)) },
    rule(&["gpt-4o"], Split::Regex(GPT4O)),
];

fn bytes(regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex})
}

impl Rule {
    /// Returns the rule of a name.
    pub fn named(name: &str) -> Option<&'static Self> {
        RULES.iter().find(|rule| rule.names.contains(&name))
    }

    /// Returns the rule of a file whose own words will replace it.
    pub fn any() -> &'static Self {
        &RULES[0]
    }

    /// Returns llama.cpp's name of what tokenizer.json has under `pre_tokenizer`, as far as it is known here.
    pub fn name_of(splitter: &Value) -> Option<&'static str> {
        let steps: Vec<&Value> = match splitter["type"].as_str() {
            Some("Sequence") => splitter["pretokenizers"].as_array()?.iter().collect(),
            _ => vec![splitter],
        };
        let whole = |step: &Value| step["type"] == "ByteLevel" && step["use_regex"] != false;
        let fits = |split: &Split| match (split, &steps[..]) {
            (Split::Gpt2, [only]) => whole(only),
            (Split::Digits, [digits, last]) => {
                digits["type"] == "Digits" && digits["individual_digits"] == true && whole(last)
            }
            (Split::Regex(regex), [split, last]) => {
                split["type"] == "Split" && split["pattern"]["Regex"] == *regex && last["type"] == "ByteLevel"
            }
            _ => false,
        };
        RULES.iter().find(|rule| fits(&rule.split)).map(|rule| rule.names[0])
    }

    /// Returns what tokenizer.json has under `pre_tokenizer`.
    pub fn splitter(&self) -> Value {
        match self.split {
            Split::Gpt2 => bytes(true),
            Split::Digits => json!({
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes(true)],
            }),
            Split::Regex(regex) => {
                let pattern = json!({"Regex": regex});
                let split =
                    json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
                json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
            }
        }
    }

    /// Returns what tokenizer.json has under `decoder`.
    pub fn decoder() -> Value {
        bytes(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_known_by_what_it_is_written_as() {
        for rule in &RULES {
            let name = Rule::name_of(&rule.splitter()).unwrap();
            assert!(Rule::named(name).is_some_and(|found| found.split == rule.split), "{name}");
        }
        assert_eq!(Rule::name_of(&RULES[3].splitter()), Some("llama-bpe"));
        assert_eq!(Rule::name_of(&json!({"type": "Whitespace"})), None);
        assert!(Rule::named("viking").is_none());
    }
}
