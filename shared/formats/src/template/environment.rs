//! A minijinja environment that behaves like the jinja2 environment of transformers.

use super::{clock::Clock, pystyle};
use kto_cli::{Error as CliError, Result};
use minijinja::{
    Environment, Error, ErrorKind, State,
    syntax::SyntaxConfig,
    value::{Kwargs, Value, ValueKind},
};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

/// Marks the errors that come from the template's own `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// Returns the message of `raise_exception`, when `error` came from there.
pub fn raised(error: &minijinja::Error) -> Option<&str> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = next {
        if let Some(raised) = cause.downcast_ref::<Raised>() {
            return Some(&raised.0);
        }
        next = cause.source();
    }
    None
}

/// Returns an environment without templates: transformers' white space rules, Python's methods, functions and printing.
pub fn new(clock: Clock) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("white space settings are always valid"));
    environment.set_unknown_method_callback(pycompat::unknown_method_callback);
    environment.set_formatter(pystyle::print);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    set_clock(&mut environment, clock);
    environment
}

/// Sets what `strftime_now` sees.
pub fn set_clock(environment: &mut Environment<'static>, clock: Clock) {
    environment.add_function("strftime_now", move |format: String| clock.strftime(&format));
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let text = pystyle::str(message)?;
    Err(Error::new(ErrorKind::InvalidOperation, "raised by the template").with_source(Raised(text)))
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`: Python's `json.dumps`, not
/// Jinja's HTML-safe filter.
fn tojson(
    state: &State,
    value: &Value,
    ensure_ascii: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let style = pystyle::JsonStyle {
        ascii: match ensure_ascii {
            Some(given) => given,
            None => options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        },
        indent: options.get::<Option<Value>>("indent")?.as_ref().map(indent).transpose()?.flatten(),
        separators: options
            .get::<Option<Value>>("separators")?
            .as_ref()
            .map(separators)
            .transpose()?
            .flatten(),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let text = pystyle::json(value, &style)?;
    state.consume_fuel(text.len() as u64 / 8)?;
    Ok(text)
}

/// An indent of `json.dumps`: a number of blanks or the text itself.
fn indent(value: &Value) -> Result<Option<String>, Error> {
    const MOST: usize = 64;
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => Ok(None),
        ValueKind::String => Ok(value.as_str().map(str::to_string)),
        _ => match value.as_usize() {
            Some(width) if width <= MOST => Ok(Some(" ".repeat(width))),
            _ => Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: an indent above {MOST}"))),
        },
    }
}

/// The pair `(item_separator, key_separator)`.
fn separators(value: &Value) -> Result<Option<(String, String)>, Error> {
    if value.is_none() || value.is_undefined() {
        return Ok(None);
    }
    let parts: Vec<Value> = value.try_iter()?.take(3).collect();
    match parts.as_slice() {
        [item, key] => Ok(Some((pystyle::str(item)?, pystyle::str(key)?))),
        _ => Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair")),
    }
}

/// The variables of one render, and how much text is in them.
pub struct Context {
    pub value: Value,
    pub bytes: usize,
}

/// Names under which a message's reasoning is passed; the first is the standard one.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Builds the variables as transformers 5.23 does. `kwargs` win over the special tokens.
pub fn context(
    messages: &[Json],
    tools: Option<&Json>,
    kwargs: Option<&Json>,
    add_generation_prompt: bool,
    special: &[(String, String)],
) -> Result<Context> {
    let mut bytes = 0;
    let mut variables: Vec<(String, Value)> =
        special.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str()))).collect();
    if let Some(kwargs) = kwargs {
        let Json::Object(map) = kwargs else {
            return Err(CliError::data("field \"chat_template_kwargs\" must be an object"));
        };
        bytes += size(kwargs);
        variables.extend(map.iter().map(|(name, value)| (name.clone(), plain(value))));
    }
    bytes += messages.iter().map(size).sum::<usize>() + tools.map_or(0, size);
    let messages: Vec<Value> = messages.iter().map(message).collect();
    variables.push(("messages".into(), Value::from(messages)));
    variables.push(("tools".into(), tools.map_or(Value::from(()), plain)));
    variables.push(("documents".into(), Value::from(())));
    variables.push(("add_generation_prompt".into(), Value::from(add_generation_prompt)));
    Ok(Context { value: Value::from_pairs(variables), bytes })
}

/// A message without null fields; its reasoning under the names that templates read.
fn message(message: &Json) -> Value {
    let Json::Object(fields) = message else { return plain(message) };
    let given = || fields.iter().filter(|(_, value)| !value.is_null());
    let mut kept: Vec<(String, Value)> = Vec::with_capacity(fields.len() + 2);
    let find = |name: &str| given().find(|(key, _)| *key == name).map(|(_, value)| plain(value));
    let reasoning = REASONING.iter().find_map(|name| find(name));
    if let Some(reasoning) = &reasoning {
        kept.push(("thinking".into(), find("thinking").unwrap_or_else(|| reasoning.clone())));
        kept.push(("reasoning_content".into(), reasoning.clone()));
    }
    let set = |key: &str| reasoning.is_some() && (key == "thinking" || key == "reasoning_content");
    kept.extend(given().filter(|(key, _)| !set(key)).map(|(key, value)| (key.clone(), plain(value))));
    Value::from_pairs(kept)
}

/// A JSON value as a template sees it.
fn plain(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(plain).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, item)| (key.clone(), plain(item)))),
    }
}

/// Bytes of text in a value, with a few for every other thing.
fn size(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len() + 8,
        Json::Array(items) => 8 + items.iter().map(size).sum::<usize>(),
        Json::Object(map) => 8 + map.iter().map(|(key, item)| key.len() + size(item)).sum::<usize>(),
        _ => 8,
    }
}
