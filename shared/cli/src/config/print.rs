//! `--print-config`: the configuration as a file that `--config` takes.

use super::{Resolution, Value, file::Origin};

/// Returns the table of the tool; behind each value stands its origin.
pub(super) fn toml(resolution: &Resolution) -> String {
    let mut lines = vec![(format!("[{}]", resolution.tables.join(".")), String::new())];
    for setting in &resolution.settings {
        let origin = setting.origin.to_string();
        lines.push(match text(&setting.value) {
            Some(value) => (format!("{} = {value}", setting.key), format!("# {origin}")),
            None if setting.origin == Origin::Default => {
                let derived = setting.derived.as_ref().map(|text| format!("# default: {text}"));
                (format!("# {} is not set", setting.key), derived.unwrap_or_default())
            }
            None => (format!("# {} is not set", setting.key), format!("# {origin}")),
        });
    }
    let width = lines.iter().filter(|(_, origin)| !origin.is_empty()).map(|(l, _)| l.chars().count());
    let width = width.max().unwrap_or(0).min(40);
    let line = |(text, origin): (String, String)| match origin.is_empty() {
        true => format!("{text}\n"),
        false => format!("{text:<width$}  {origin}\n"),
    };
    lines.into_iter().map(line).collect()
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::Unset => None,
        Value::Bool(on) => Some(on.to_string()),
        Value::Number(text) => Some(text.clone()),
        Value::Text(text) => Some(quoted(text)),
        Value::List(list) => {
            Some(format!("[{}]", list.iter().filter_map(text).collect::<Vec<_>>().join(", ")))
        }
    }
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out += "\\n",
            '\t' => out += "\\t",
            '\r' => out += "\\r",
            c if c.is_control() => out += &format!("\\u{:04X}", u32::from(c)),
            c => out.push(c),
        }
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;
    use toml::de::DeValue;

    #[test]
    fn strings_are_read_back() {
        for text in ["", "plain", "q\"u\\o", "a\nb\tc\r", "\u{1}\u{7f}\u{85}", "héé – 漢字", "# no comment"]
        {
            let quoted = quoted(text);
            let value = DeValue::parse(&quoted).unwrap_or_else(|e| panic!("{quoted}: {e}"));
            assert!(matches!(value.get_ref(), DeValue::String(s) if s == text), "{quoted}");
        }
    }
}
