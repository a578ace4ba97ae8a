//! Exports of observability tools: Langfuse traces with scores, LangSmith runs with feedback.

use super::{
    Fields, Rules, Side, Unit,
    content::{checked, parse_cell, turn, turns_of},
    is_reply, split_chat,
};
use crate::problem::{Problem, Reason};
use kto_formats::{
    json::{describe, quoted},
    record::Content,
};
use serde_json::Value;

/// Langfuse: `input`, `output`, `scores` (name, value, dataType).
pub fn langfuse(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    ["input", "output", "scores"].into_iter().try_for_each(|field| parse_cell(row, field))?;
    let scores = match row.shift_remove("scores") {
        Some(Value::Array(scores)) => scores,
        other => {
            let what =
                format!("field \"scores\" must be a list, found {}", describe(&other.unwrap_or_default()));
            return Err(Reason::Content.says(what));
        }
    };
    let named: Vec<(&str, &Value)> =
        scores.iter().filter_map(|s| Some((s.get("name")?.as_str()?, s))).collect();
    let score = choose(&named, rules)?;
    let boolean = score.get("dataType").and_then(Value::as_str) == Some("BOOLEAN");
    let value = ["stringValue", "value"].into_iter().filter_map(|k| score.get(k)).find(|v| !v.is_null());
    let label = match value {
        Some(value) if boolean => rules.labels.bit("score", value)?,
        Some(value) => rules.labels.read("score", value, rules.table)?,
        None => return Err(Reason::NoRating.says("the score has no value")),
    };
    unit("langfuse", row, ("input", "output"), label)
}

/// LangSmith: `inputs`, `outputs`, `feedback_stats` (key: n, avg).
pub fn lang_smith(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    ["inputs", "outputs", "feedback_stats"].into_iter().try_for_each(|field| parse_cell(row, field))?;
    let stats = match row.shift_remove("feedback_stats") {
        Some(Value::Object(stats)) => stats,
        _ => return Err(Reason::NoRating.says("field \"feedback_stats\" is empty")),
    };
    let named: Vec<(&str, &Value)> = stats.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let score = choose(&named, rules)?;
    let label = match score.get("avg").filter(|v| !v.is_null()) {
        Some(average) if rules.labels.thresholds().is_some() => {
            rules.labels.read("feedback_stats", average, rules.table)?
        }
        Some(average) => rules.labels.bit("feedback_stats", average)?,
        None => return Err(Reason::NoRating.says("the feedback has no average")),
    };
    unit("langsmith", row, ("inputs", "outputs"), label)
}

/// The score that `--score` names, or the only one.
fn choose<'a>(scores: &[(&str, &'a Value)], rules: &Rules<'_>) -> Result<&'a Value, Problem> {
    let names = || scores.iter().map(|(name, _)| quoted(name)).collect::<Vec<_>>().join(", ");
    match (rules.score, scores) {
        (_, []) => Err(Reason::NoRating.says("no score")),
        (Some(wanted), _) => match scores.iter().find(|(name, _)| *name == wanted) {
            Some((_, score)) => Ok(score),
            None => Err(Reason::NoRating.says(format!("no score {} (found {})", quoted(wanted), names()))),
        },
        (None, [(_, only)]) => Ok(only),
        (None, _) => {
            let error = kto_cli::Error::data(format!("several scores: {}", names()));
            Err(Reason::Label.error(error.with_hint("--score NAME chooses one")))
        }
    }
}

fn unit(
    shape: &'static str,
    row: &mut Fields,
    (input, output): (&str, &str),
    label: bool,
) -> Result<Unit, Problem> {
    let mut prompt = asked(input, row.shift_remove(input).unwrap_or_default())?;
    let mut said = answered(output, row.shift_remove(output).unwrap_or_default())?;
    if !said.iter().all(is_reply) {
        let at = split_chat::last_run(&said)?;
        let answer = said.split_off(at);
        prompt = said;
        said = answer;
    }
    split_chat::ends_with_assistant(&said)?;
    let side =
        Side { prompt: Content::Chat(checked(input, prompt)?), completion: Content::Chat(said), label };
    Ok(Unit::one(shape, side))
}

/// Names of the part of an input or output that holds what was said.
const PARTS: [&str; 12] = [
    "messages",
    "input",
    "question",
    "query",
    "prompt",
    "text",
    "output",
    "answer",
    "response",
    "content",
    "result",
    "completion",
];

/// What is inside `{"messages": …}`, `{"question": …}` and the like.
fn inner(field: &str, value: Value, role: &str) -> Result<Vec<Value>, Problem> {
    let Value::Object(mut fields) = value else { return turns_of(field, value, role) };
    if fields.contains_key("role") {
        return turns_of(field, Value::Object(fields), role);
    }
    // LangChain's generations and OpenAI's choices.
    if let Some(Value::Array(choices)) = fields.get_mut("choices")
        && let Some(message) = choices.first_mut().and_then(|c| c.get_mut("message"))
    {
        return turns_of(field, message.take(), role);
    }
    let part = PARTS.iter().find_map(|name| fields.shift_remove(*name).filter(|v| !v.is_null()));
    match part {
        Some(part) => turns_of(field, part, role),
        None => {
            let found: Vec<String> = fields.keys().take(8).map(|k| quoted(k)).collect();
            let what =
                format!("field {}: no part that holds text (found {})", quoted(field), found.join(", "));
            Err(Reason::NoPrompt.says(what))
        }
    }
}

fn asked(field: &str, value: Value) -> Result<Vec<Value>, Problem> {
    inner(field, value, "user")
}

fn answered(field: &str, value: Value) -> Result<Vec<Value>, Problem> {
    match inner(field, value, "assistant")? {
        said if said.is_empty() => Ok(vec![turn("assistant", String::new())]),
        said => Ok(said),
    }
}
