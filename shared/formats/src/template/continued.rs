//! A last message that is to be continued: the template renders it with a mark at its end, and the text is cut there.

use kto_cli::{Error, Result};
use serde_json::Value;

/// Stands at the end of the message while the template works. The blank at its end shows whether the template trims.
const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Marks the end of the last message's text and returns what it was.
pub fn mark(messages: &mut [Value]) -> Result<String> {
    let text = messages.last_mut().and_then(last_text);
    let text = text.ok_or_else(|| Error::data("the message to be continued has no text"))?;
    let said = text.clone();
    text.push_str(MARK);
    Ok(said)
}

/// The content of a message, or its last text part.
fn last_text(message: &mut Value) -> Option<&mut String> {
    match message.get_mut("content")? {
        Value::String(text) => Some(text),
        Value::Array(parts) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    }
}

/// Cuts a rendering at the mark.
pub fn cut(mut text: String, said: &str) -> Result<String> {
    let at = text.rfind(MARK.trim_end()).filter(|_| text.contains(said.trim()));
    let Some(at) = at else {
        return Err(Error::data("the answer to be continued is not in what the chat template made of it"));
    };
    let kept = text[at..].starts_with(MARK);
    text.truncate(at);
    if !kept {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}
