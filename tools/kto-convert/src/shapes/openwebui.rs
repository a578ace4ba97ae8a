//! Open WebUI's feedback export: a thumb, and the whole chat as a tree of messages.
//!
//! The rated message is `meta.message_id`. Its dialogue is found by walking `parentId` back from it: the chat's `currentId` is
//! elsewhere, because the user may have gone on or tried another answer.

use super::{Fields, Rules, Side, Unit, content::turn, split_chat};
use crate::problem::{Problem, Reason};
use kto_formats::{
    json::{describe, quoted},
    record::Content,
};
use serde_json::Value;

/// Messages on the way from an answer to the chat's beginning, at most: a ring of parents ends here.
const LONGEST: usize = 10_000;

/// `data.rating`, `meta.message_id`, `snapshot.chat.chat.history.messages`.
pub fn convert(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let rating = row["data"].get("rating").cloned().unwrap_or_default();
    let label = match (rules.labels.thresholds(), row["data"].pointer("/details/rating")) {
        (Some(_), Some(stars)) => rules.labels.read("data.details.rating", stars, rules.table)?,
        _ if rating.is_null() => return Err(Reason::NoRating.says("field \"data\": \"rating\" is null")),
        _ => thumb(&rating)?,
    };
    let meta = row.get("meta").and_then(|m| m.get("message_id")).and_then(Value::as_str);
    let id = meta.ok_or_else(|| Reason::MissingField.says("field \"meta\": no \"message_id\""))?;
    let messages = row["snapshot"].pointer("/chat/chat/history/messages").and_then(Value::as_object);
    let messages =
        messages.ok_or_else(|| Reason::NoConversation.says("the chat was not kept with the rating"))?;
    let mut turns = Vec::new();
    let mut next = Some(id);
    while let Some(id) = next {
        let Some(message) = messages.get(id).filter(|_| turns.len() < LONGEST) else {
            let what = format!("field \"snapshot\": no message {}, or a ring of parents", quoted(id));
            return Err(Reason::Content.says(what));
        };
        if message
            .get("files")
            .and_then(Value::as_array)
            .is_some_and(|files| files.iter().any(|f| f.get("type").and_then(Value::as_str) == Some("image")))
        {
            return Err(Reason::Multimodal
                .says("field \"snapshot\": a message with an image: only text can be trained on"));
        }
        let text = |key: &str| message.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        turns.push(turn(&text("role"), text("content")));
        next = message.get("parentId").and_then(Value::as_str);
    }
    turns.reverse();
    let mut turns = super::content::checked("snapshot", turns)?;
    let completion = turns.split_off(split_chat::last_run(&turns)?);
    ["data", "snapshot"].into_iter().for_each(|field| drop(row.shift_remove(field)));
    let side = Side { prompt: Content::Chat(turns), completion: Content::Chat(completion), label };
    Ok(Unit::one("openwebui", side))
}

/// 1 or -1, also as text.
fn thumb(rating: &Value) -> Result<bool, Problem> {
    match super::votes::number(rating) {
        Some(1.0) => Ok(true),
        Some(-1.0) => Ok(false),
        _ => {
            let what = format!("field \"data\": \"rating\" must be 1 or -1, found {}", describe(rating));
            Err(Reason::Label.says(what))
        }
    }
}
