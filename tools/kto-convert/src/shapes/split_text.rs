//! Where the prompt of a text pair ends.
//!
//! TRL cuts at the first character that differs, which on HH-RLHF moves the beginning of every fifth completion into the
//! prompt. Here a dialogue is cut at its marker, and other text never inside a word. Prompt + completion is always the
//! text as it was.

use crate::problem::{Problem, Reason};
use kto_cli::Error;

const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

/// Byte positions at which the completions begin.
#[derive(Debug, PartialEq)]
pub struct Split {
    pub chosen: usize,
    pub rejected: usize,
    /// The texts before them are not the same.
    pub differ: bool,
}

impl Split {
    fn shared(at: usize) -> Self {
        Self { chosen: at, rejected: at, differ: false }
    }
}

/// True for a dialogue in HH-RLHF's form.
pub fn is_dialogue(text: &str) -> bool {
    text.starts_with(HUMAN)
}

/// Splits behind the last "\n\nAssistant:" that both sides share. When a human turn is left behind it, the prompts
/// differ and each side is split before its own last assistant turns.
pub fn dialogue(chosen: &str, rejected: &str) -> Result<Split, Problem> {
    let shared = &chosen[..common(chosen, rejected)];
    if let Some(at) = shared.rfind(ASSISTANT).map(|at| at + ASSISTANT.len())
        && !chosen[at..].contains(HUMAN)
        && !rejected[at..].contains(HUMAN)
    {
        return Ok(Split::shared(at));
    }
    Ok(Split { chosen: last_run(chosen, "chosen")?, rejected: last_run(rejected, "rejected")?, differ: true })
}

/// Begin of the last assistant turns, behind their first marker.
fn last_run(text: &str, field: &str) -> Result<usize, Problem> {
    let human = text.rfind(HUMAN).unwrap_or(0);
    let found = text[human..].find(ASSISTANT).map(|at| human + at + ASSISTANT.len());
    found.ok_or_else(|| {
        Reason::LastTurn
            .says(format!("field \"{field}\": no \"\\n\\nAssistant:\" behind the last \"\\n\\nHuman:\""))
    })
}

/// Splits behind the last `marker` that both sides share.
pub fn after_marker(chosen: &str, rejected: &str, marker: &str) -> Result<Split, Problem> {
    let shared = &chosen[..common(chosen, rejected)];
    let found = shared.rfind(marker).map(|at| Split::shared(at + marker.len()));
    found.ok_or_else(|| {
        Reason::NoPrompt.says("the --split-after text is not in the part that both sides share")
    })
}

/// Splits at the last blank of the part that both sides share, such that both keep something to say. As in TRL, a space
/// goes to the completion; a line end stays in the prompt.
pub fn plain(chosen: &str, rejected: &str) -> Result<Split, Problem> {
    let shared = &chosen[..common(chosen, rejected)];
    let says = |at: usize| [chosen, rejected].iter().all(|text| !text[at..].trim().is_empty());
    let at = shared.char_indices().rev().find_map(|(i, c)| {
        match c {
            '\n' => Some(i + 1),
            // Half of a line end; its LF decides.
            '\r' => None,
            c if c.is_whitespace() => Some(i),
            _ => None,
        }
        .filter(|at| says(*at))
    });
    match at {
        Some(at) if chosen != rejected && !shared[..at].trim().is_empty() => Ok(Split::shared(at)),
        _ => {
            let what = if chosen == rejected {
                "\"chosen\" and \"rejected\" are the same text, so nothing tells where the prompt ends"
            } else {
                "\"chosen\" and \"rejected\" share no first words that could be the prompt"
            };
            let hint = "--split-after TEXT names what ends the prompt, or give a \"prompt\" column";
            Err(Reason::NoPrompt.error(Error::data(what).with_hint(hint)))
        }
    }
}

/// Length in bytes of the longest common beginning, at a character boundary of both.
fn common(a: &str, b: &str) -> usize {
    let mut end = a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
    while !a.is_char_boundary(end) {
        end -= 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The prompt of a plain pair.
    fn prompt<'a>(chosen: &'a str, rejected: &str) -> Option<&'a str> {
        plain(chosen, rejected).ok().map(|s| &chosen[..s.chosen])
    }

    #[test]
    fn plain_text_is_never_cut_inside_a_word() {
        assert_eq!(
            prompt("Q: hi A: yes", "Q: hi A: no"),
            Some("Q: hi A:"),
            "as TRL: the space goes to the completion"
        );
        assert_eq!(prompt("sky is blue", "sky is blood"), Some("sky is"), "not \"sky is bl\"");
        assert_eq!(prompt("Q\nA:\nyes", "Q\nA:\nno"), Some("Q\nA:\n"));
        assert_eq!(prompt("Q\r\nyes", "Q\r\nno"), Some("Q\r\n"));
        assert_eq!(prompt("Q:  yes", "Q:  no"), Some("Q: "), "one space moves");
        assert_eq!(prompt("say yes", "say yes please"), Some("say"), "both sides keep something to say");
        assert_eq!(prompt("Q\nyes\n", "Q\nyes\nplease"), Some("Q\n"));
        assert_eq!(
            prompt("le café\u{301} a", "le café\u{301}x a"),
            Some("le"),
            "accents stay on their letters"
        );
        assert_eq!(prompt("é è", "é ê"), Some("é"), "bytes shared inside a character do not count");
    }

    #[test]
    fn plain_text_without_a_prompt_is_refused() {
        for (a, b) in [
            ("same", "same"),
            ("a b", "a b"),
            ("abc", "abcd"),
            ("yes ", "no"),
            ("", "x"),
            (" x", " y"),
            ("", ""),
        ] {
            assert_eq!(prompt(a, b), None, "{a:?} {b:?}");
        }
    }

    #[test]
    fn dialogues_are_cut_behind_the_shared_marker() {
        let cut = |a: &str, b: &str| {
            dialogue(a, b).map(|s| (a[s.chosen..].to_owned(), b[s.rejected..].to_owned(), s.differ))
        };
        let p = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:";
        let of = |x: &str, y: &str| cut(&format!("{p}{x}"), &format!("{p}{y}")).unwrap();
        assert_eq!(of(" I am", " I was"), (" I am".into(), " I was".into(), false));
        assert_eq!(of(" I", " I"), (" I".into(), " I".into(), false));
        assert_eq!(of("", " I"), ("".into(), " I".into(), false));
        // A side that speaks twice keeps both turns.
        assert_eq!(of(" x\n\nAssistant: y", " z"), (" x\n\nAssistant: y".into(), " z".into(), false));
        assert_eq!(of(" x\n\nHuman: d\n\nAssistant: y", " z"), (" y".into(), " z".into(), true));
        assert!(cut("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a").is_err());
        assert!(cut("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c").is_err());
    }

    #[test]
    fn a_marker_of_the_user_ends_the_prompt() {
        let split = after_marker("do\n### R: I think so", "do\n### R: I think not", "### R:").unwrap();
        assert_eq!(split, Split::shared(9));
        assert!(after_marker("a", "b", "### R:").is_err());
    }
}
