//! A prompt and a completion from two columns, made alike: both text or both messages, nothing said twice.

use super::{is_reply, split_chat, unpaired::not_empty, within};
use crate::problem::{Problem, Reason};
use kto_formats::{chat, json::quoted, record::Content};
use serde_json::{Value, json};

/// What [`join`] made.
pub struct Joined {
    pub prompt: Content,
    pub completion: Content,
    /// Something was changed: text became a message, or a repeated prompt was taken away.
    pub mixed: bool,
}

/// Makes prompt and completion alike. `field` names the completion in errors.
pub fn join(prompt: Content, completion: Content, field: &str) -> Result<Joined, Problem> {
    not_empty(&prompt)?;
    let (prompt, completion, mixed) = match (prompt, completion) {
        (prompt @ Content::Text(_), completion @ Content::Text(_)) => (prompt, completion, false),
        (prompt @ Content::Chat(_), Content::Text(text)) => {
            (prompt, Content::Chat(vec![json!({"role": "assistant", "content": text})]), true)
        }
        (prompt, Content::Chat(mut turns)) => {
            if is_whole(&prompt, &turns) {
                let completion = turns.split_off(within(split_chat::last_run(&turns), field)?);
                (Content::Chat(turns), Content::Chat(completion), true)
            } else {
                within(replies_only(&turns), field)?;
                let (prompt, mixed) = match prompt {
                    Content::Text(text) => {
                        (Content::Chat(vec![json!({"role": "user", "content": text})]), true)
                    }
                    chat => (chat, false),
                };
                (prompt, Content::Chat(turns), mixed)
            }
        }
    };
    Ok(Joined { prompt, completion, mixed })
}

/// True when `turns` is the whole dialogue, which begins with (or, for a text, asks) the prompt.
pub fn is_whole(prompt: &Content, turns: &[Value]) -> bool {
    match prompt {
        Content::Chat(prompt) => turns.len() > prompt.len() && turns.starts_with(prompt),
        Content::Text(text) => turns.iter().any(|m| {
            chat::role(m) == "user" && m.get("content").and_then(Value::as_str) == Some(text.as_str())
        }),
    }
}

/// Refuses a completion with turns that the model does not say: training on them would teach it the user's part.
pub fn replies_only(turns: &[Value]) -> Result<(), Problem> {
    if let Some(i) = turns.iter().position(|m| !is_reply(m)) {
        let role = quoted(chat::role(&turns[i]));
        let what = format!(
            "message {}: a turn of {role} in a completion, which does not begin with the prompt",
            i + 1
        );
        return Err(Reason::Content.says(what));
    }
    split_chat::ends_with_assistant(turns)
}
