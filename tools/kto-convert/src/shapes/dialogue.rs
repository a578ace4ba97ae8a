//! HH-RLHF text as messages: "\n\nHuman: …\n\nAssistant: …".
//!
//! The blank behind a marker belongs to the marker, all other blanks to the turn. A role that speaks twice in a row has one
//! turn, joined by an empty line, because chat templates want roles to alternate.

use super::content::turn;
use kto_formats::record::Content;
use serde_json::Value;

const MARKERS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];

/// A prompt, parsed.
#[derive(Clone)]
pub struct Prompt {
    turns: Vec<Value>,
    /// What the assistant said just before, which belongs to its answer.
    begun: Vec<Value>,
}

/// Parses the prompt, which ends with a marker of the assistant.
pub fn prompt(text: &str) -> Prompt {
    let mut asked = turns(text.strip_suffix(MARKERS[1].0).unwrap_or(text));
    let begun = asked.iter().rposition(|turn| turn["role"] != "assistant").map_or(0, |last| last + 1);
    let begun = asked.split_off(begun);
    merge(&mut asked);
    Prompt { turns: asked, begun }
}

/// Parses the completion behind a prompt.
pub fn side(prompt: Prompt, completion: &str) -> (Content, Content) {
    let mut said = prompt.begun;
    said.extend(turns(&format!("{}{completion}", MARKERS[1].0)));
    merge(&mut said);
    (Content::Chat(prompt.turns), Content::Chat(said))
}

fn turns(text: &str) -> Vec<Value> {
    // One search for what all markers begin with, not one for each marker; a third line end before one is the turn's.
    let markers = memchr::memchr_iter(b'\n', text.as_bytes()).filter_map(|at| {
        let found = MARKERS.iter().find(|(marker, _)| text[at..].starts_with(marker));
        found.map(|(marker, role)| (at, at + marker.len(), *role))
    });
    let mut turns = Vec::new();
    let mut open: Option<(usize, &str)> = None;
    for (at, behind, role) in markers {
        turns.extend(open.map(|(from, role)| said(role, &text[from..at])));
        open = Some((behind, role));
    }
    turns.extend(open.map(|(from, role)| said(role, &text[from..])));
    turns
}

fn said(role: &str, text: &str) -> Value {
    turn(role, text.strip_prefix(' ').unwrap_or(text).to_owned())
}

fn merge(turns: &mut Vec<Value>) {
    turns.dedup_by(|next, last| {
        if next["role"] != last["role"] {
            return false;
        }
        let text = |v: &Value| v["content"].as_str().unwrap_or_default().to_owned();
        last["content"] = Value::String(format!("{}\n\n{}", text(last), text(next)));
        true
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(asked: &str, completion: &str) -> (Content, Content) {
        side(prompt(asked), completion)
    }

    #[test]
    fn turns_keep_their_blanks() {
        let (prompt, said) = parse("\n\nHuman: a \n\nAssistant:b\n\nHuman:  c\n\nAssistant:", " d\n");
        let expected =
            vec![turn("user", "a ".into()), turn("assistant", "b".into()), turn("user", " c".into())];
        assert_eq!(
            (prompt, said),
            (Content::Chat(expected), Content::Chat(vec![turn("assistant", "d\n".into())]))
        );
    }

    #[test]
    fn a_role_that_speaks_twice_has_one_turn() {
        let (prompt, said) = parse("\n\nHuman: a\n\nHuman: b\n\nAssistant:", " x\n\nAssistant: y");
        assert_eq!(prompt, Content::Chat(vec![json!({"role": "user", "content": "a\n\nb"})]));
        let answer = Content::Chat(vec![json!({"role": "assistant", "content": "x\n\ny"})]);
        assert_eq!(said, answer);
        let (prompt, said) = parse("\n\nHuman: a\n\nAssistant: x\n\nAssistant:", " y");
        assert_eq!((prompt, said), (Content::Chat(vec![turn("user", "a".into())]), answer));
    }
}
