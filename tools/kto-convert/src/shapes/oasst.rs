//! OpenAssistant's trees: of the ranked replies to a prompt, the best and the worst make a pair.

use super::{Fields, Rules, Side, Unit, content::turn};
use crate::problem::{Problem, Reason};
use kto_formats::record::Content;
use serde_json::Value;

/// Depth of a tree, at most.
const DEPTH: usize = 100;

/// `message_tree_id`, `prompt` with `text`, `role`, `replies`.
pub fn convert(row: &mut Fields, _: &Rules<'_>) -> Result<Unit, Problem> {
    let root = row.shift_remove("prompt").unwrap_or_default();
    let mut found = Found::default();
    found.walk(&root, &mut Vec::new())?;
    Ok(Unit { left_out: found.left_out, paired: true, ..Unit::of("oasst tree", found.sides) })
}

#[derive(Default)]
struct Found {
    sides: Vec<Side>,
    left_out: Vec<Reason>,
}

impl Found {
    /// Takes the pairs below `message`; `path` is the dialogue before it.
    fn walk(&mut self, message: &Value, path: &mut Vec<Value>) -> Result<(), Problem> {
        let Some(text) = message.get("text").and_then(Value::as_str) else {
            return Err(Reason::Content.says("a message of the tree has no \"text\""));
        };
        let role = match message.get("role").and_then(Value::as_str) {
            Some("prompter" | "user") => "user",
            Some("assistant") => "assistant",
            other => {
                let found = other.map(kto_formats::json::quoted).unwrap_or_else(|| "none".into());
                return Err(Reason::Content.says(format!("a message of the tree has the role {found}")));
            }
        };
        if path.len() >= DEPTH {
            return Err(Reason::Content.says(format!("a tree deeper than {DEPTH} messages")));
        }
        path.push(turn(role, text.to_owned()));
        let replies = message.get("replies").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        if role == "user" {
            self.pair(replies, path);
        }
        for reply in replies.iter().filter(|r| !is_deleted(r)) {
            self.walk(reply, path)?;
        }
        path.pop();
        Ok(())
    }

    /// The best and the worst of the replies, if at least two have a rank.
    fn pair(&mut self, replies: &[Value], path: &[Value]) {
        let rank = |r: &Value| r.get("rank").and_then(Value::as_u64).filter(|_| !is_deleted(r));
        let mut ranked: Vec<(u64, &str)> =
            replies.iter().filter_map(|r| Some((rank(r)?, r.get("text")?.as_str()?))).collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        self.left_out.extend((ranked.len()..replies.len()).map(|_| Reason::NoRank));
        let side = |text: &str, label| Side {
            prompt: Content::Chat(path.to_vec()),
            completion: Content::Chat(vec![turn("assistant", text.to_owned())]),
            label,
        };
        match ranked.as_slice() {
            [best, between @ .., worst] => {
                self.sides.extend([side(best.1, true), side(worst.1, false)]);
                self.left_out.extend(between.iter().map(|_| Reason::Middle));
            }
            alone => self.left_out.extend(alone.iter().map(|_| Reason::NoRank)),
        }
    }
}

fn is_deleted(message: &Value) -> bool {
    message.get("deleted").and_then(Value::as_bool) == Some(true)
}
