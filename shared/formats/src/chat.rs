//! Message lists: what each message must have before a chat template may see it.
//!
//! Called by the record reader and by kto-convert's shapes. A message is kept as the object it came as; only what no
//! template could render right is refused: an unknown role, content that is not text, images and sound.

use crate::json::{describe, quoted};
use kto_cli::{Error, Result};
use serde_json::Value;

/// Roles that the chat templates in use know.
pub const ROLES: [&str; 8] =
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"];

/// Checks a message list. Errors (65) name the message by its number, from 1.
pub fn check(messages: &[Value]) -> Result<()> {
    if messages.is_empty() {
        return Err(Error::data("the message list is empty"));
    }
    messages.iter().enumerate().try_for_each(|(i, message)| {
        fault(message).map_or(Ok(()), |what| Err(Error::data(format!("message {}: {what}", i + 1))))
    })
}

fn fault(message: &Value) -> Option<String> {
    let Value::Object(fields) = message else {
        return Some(format!("must be an object with \"role\" and \"content\", found {}", describe(message)));
    };
    match fields.get("role") {
        None => return Some("has no \"role\"".into()),
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => {}
        Some(Value::String(role)) => return Some(format!("unknown role {}", quoted(role))),
        Some(other) => return Some(format!("\"role\" must be text, found {}", describe(other))),
    }
    match fields.get("content") {
        Some(Value::String(_)) => None,
        Some(Value::Array(parts)) => parts.iter().find_map(part_fault),
        None | Some(Value::Null) if has_tool_calls(message) => None,
        None => Some("has no \"content\"".into()),
        Some(other) => Some(format!("\"content\" must be text, found {}", describe(other))),
    }
}

/// What is wrong with a content part: only `{"type": "text", "text": …}` is text.
fn part_fault(part: &Value) -> Option<String> {
    match part.get("type").and_then(Value::as_str) {
        Some("text") if part.get("text").is_some_and(Value::is_string) => None,
        Some("text") => Some("a text part has no \"text\"".into()),
        Some(kind) => Some(format!("a content part of type {} (only text can be trained on)", quoted(kind))),
        None => Some("a content part has no \"type\"".into()),
    }
}

/// The role of a checked message; empty for anything else.
pub fn role(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

/// True when the message calls tools.
pub fn has_tool_calls(message: &Value) -> bool {
    message.get("tool_calls").is_some_and(|calls| calls.as_array().is_some_and(|a| !a.is_empty()))
}

/// True when a message says nothing: no text but blanks, and no tool calls.
pub fn is_blank(message: &Value) -> bool {
    let text = match message.get("content") {
        Some(Value::String(text)) => text.trim().is_empty(),
        Some(Value::Array(parts)) => {
            parts.iter().all(|p| p.get("text").and_then(Value::as_str).is_none_or(|t| t.trim().is_empty()))
        }
        _ => true,
    };
    text && !has_tool_calls(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_no_template_can_render_is_refused() {
        for (messages, expected) in [
            (json!([]), "the message list is empty"),
            (json!(["hi"]), "message 1: must be an object with \"role\" and \"content\", found \"hi\""),
            (
                json!([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]),
                "message 2: unknown role \"bot\"",
            ),
            (json!([{"role": "user", "content": null}]), "message 1: \"content\" must be text, found null"),
            (json!([{"role": "user"}]), "message 1: has no \"content\""),
            (
                json!([{"role": "user", "content": [{"type": "image_url"}]}]),
                "message 1: a content part of type \"image_url\" (only text can be trained on)",
            ),
        ] {
            assert_eq!(check(messages.as_array().unwrap()).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn tool_calls_need_no_content() {
        let call = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {}}]});
        assert!(check(std::slice::from_ref(&call)).is_ok());
        assert!(!is_blank(&call));
        assert!(is_blank(&json!({"role": "assistant", "content": " \n"})));
    }
}
