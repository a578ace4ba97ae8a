//! Calls of functions, which some exports write as text.

use kto_formats::json;
use serde_json::{Value, json};

/// Reads `{"name": …, "arguments": …}`, or a list of such, as the `tool_calls` of a message.
pub fn calls(text: &str) -> Result<Vec<Value>, String> {
    let parsed =
        json::parse(text.as_bytes()).map_err(|f| format!("a function call is not JSON: {}", f.what))?;
    let calls = match parsed.value {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    calls.into_iter().map(call).collect()
}

fn call(mut call: Value) -> Result<Value, String> {
    if call.get("function").is_some() {
        return Ok(call);
    }
    let Some(name) = call.get("name").and_then(Value::as_str).map(str::to_owned) else {
        return Err("a function call has no \"name\"".into());
    };
    let arguments = call.get_mut("arguments").or(None).map(Value::take).unwrap_or_else(|| json!({}));
    // Models write the arguments as text, templates want an object.
    let arguments = match arguments {
        Value::String(text) => json::parse(text.as_bytes()).map_or(Value::String(text), |p| p.value),
        other => other,
    };
    Ok(json!({"type": "function", "function": {"name": name, "arguments": arguments}}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_come_as_objects_lists_and_text() {
        let expected = vec![json!({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}})];
        for text in [
            r#"{"name": "f", "arguments": {"x": 1}}"#,
            r#"[{"name": "f", "arguments": {"x": 1}}]"#,
            r#"{"name": "f", "arguments": "{\"x\": 1}"}"#,
        ] {
            assert_eq!(calls(text).unwrap(), expected, "{text}");
        }
        assert!(calls("f(x)").is_err());
        assert!(calls("{}").is_err());
    }
}
