//! From one input row to its records: columns renamed, shape found, what is odd about it named.
//!
//! Called by [`crate::run`] for every row. Decides nothing about the run: a [`Problem`] goes back to the caller.

use crate::{
    args::Policy,
    plan::Plan,
    problem::{Problem, Reason},
    shapes::{self, Fields, Rules, Shape, Side},
};
use kto_cli::{Error, escape};
use kto_formats::{
    json::{self, quoted},
    record::{Content, Record, columns},
};
use serde_json::{Value, json};

/// Columns of other media.
pub const MEDIA: [&str; 6] = ["image", "images", "video", "videos", "audio", "audios"];
/// Columns that the output uses for itself.
pub const OURS: [&str; 3] = ["prompt", "completion", "label"];
/// Columns of shapes; null in them means "not this shape" and is not carried.
pub const SHAPE_COLUMNS: [&str; 4] = ["chosen", "rejected", "messages", "conversations"];

/// A row, converted.
pub struct Converted {
    /// The shape's name in the summary.
    pub shape: &'static str,
    /// The line of the dispatch table.
    pub found: &'static Shape,
    /// One record, or pairs of chosen and rejected, or rated ones.
    pub records: Vec<Record>,
    /// The records come from a comparison.
    pub paired: bool,
    /// Why completions of the row are not among the records.
    pub left_out: Vec<Reason>,
    /// The two sides are equal.
    pub tie: bool,
    /// The two sides have different prompts.
    pub differ: bool,
    /// Text and messages were made alike, or a repeated prompt taken away.
    pub mixed: bool,
    /// A column gave way to the record's own of the same name.
    pub replaced: bool,
}

/// Converts the value of a row.
pub fn convert(value: Value, table: bool, plan: &Plan) -> Result<Converted, Problem> {
    let Value::Object(mut row) = value else {
        let error = Error::data(format!("a row must be a JSON object, found {}", json::describe(&value)));
        let hint = "--in-format json reads a JSON array";
        return Err(Reason::Unreadable.error(if value.is_array() { error.with_hint(hint) } else { error }));
    };
    let covered = rename(&mut row, &plan.map)?;
    refuse_media(&row)?;
    if table {
        shapes::parse_cells(&mut row)?;
    }
    let rules = rules(plan, table);
    let found = shapes::find(&row, &rules, plan.from)?;
    let mut unit = found.convert(&mut row, &rules)?;
    for side in &mut unit.sides {
        if plan.chat {
            make_chat(side);
        }
        if plan.trim {
            trim(&mut side.prompt);
            trim(&mut side.completion);
        }
    }
    let replaced = drop_columns(&mut row) || covered;
    let tools = carried(&mut row, "tools", table)?;
    let chat_template_kwargs = carried(&mut row, "chat_template_kwargs", table)?;
    if plan.rows.drop_extra {
        row = Fields::new();
    }
    let tie = unit.paired
        && matches!(unit.sides.as_slice(), [a, b] if a.prompt == b.prompt && a.completion == b.completion);
    let (last, mut extra) = (unit.sides.len(), Some(row));
    let record = |(i, side): (usize, Side)| Record {
        prompt: side.prompt,
        completion: side.completion,
        label: side.label,
        tools: tools.clone(),
        chat_template_kwargs: chat_template_kwargs.clone(),
        extra: if i + 1 == last { extra.take() } else { extra.clone() }.unwrap_or_default(),
    };
    let records = unit.sides.into_iter().enumerate().map(record).collect();
    Ok(Converted {
        shape: unit.shape,
        found,
        records,
        paired: unit.paired,
        left_out: unit.left_out,
        tie,
        differ: unit.differ,
        mixed: unit.mixed,
        replaced,
    })
}

/// What the plan says about shapes, for rows of a table or of another input.
pub fn rules(plan: &Plan, table: bool) -> Rules<'_> {
    let shapes = &plan.shapes;
    Rules {
        labels: &plan.labels,
        table,
        keep_differing: plan.rows.prompts_differ == Policy::Keep,
        split_after: shapes.split_after.as_deref(),
        dialogue_as_text: shapes.dialogue_as_text,
        both_bad: shapes.both_bad,
        min_margin: shapes.min_margin,
        min_ratio: shapes.min_ratio,
        score: shapes.score.as_deref(),
    }
}

/// Makes a text of the user and a text of the assistant messages.
fn make_chat(side: &mut Side) {
    for (content, role) in [(&mut side.prompt, "user"), (&mut side.completion, "assistant")] {
        if let Content::Text(text) = content {
            let text = std::mem::take(text);
            *content = Content::Chat(vec![json!({"role": role, "content": text})]);
        }
    }
}

fn trim(content: &mut Content) {
    let cut = |text: &mut String| {
        let kept = text.trim();
        if kept.len() < text.len() {
            *text = kept.to_owned();
        }
    };
    match content {
        Content::Text(text) => cut(text),
        Content::Chat(turns) => {
            for turn in turns {
                if let Some(Value::String(text)) = turn.get_mut("content") {
                    cut(text);
                }
            }
        }
    }
}

/// Gives columns the names of the fields they are mapped to; returns whether another column of such a name gave way.
/// All columns are taken before any is named, so that a map may swap two.
fn rename(row: &mut Fields, map: &[(String, String)]) -> Result<bool, Problem> {
    if let Some((field, column)) = map.iter().find(|(_, column)| !row.contains_key(column)) {
        let what = format!(
            "no column {}, named by --map {field}={}{}",
            quoted(column),
            escape(column),
            columns(row)
        );
        return Err(Reason::MissingField.says(what));
    }
    let taken: Vec<Value> =
        map.iter().map(|(_, column)| row.shift_remove(column).unwrap_or_default()).collect();
    let mut covered = false;
    for ((field, _), value) in map.iter().zip(taken) {
        covered |= row.insert(field.clone(), value).is_some_and(|old| !old.is_null());
    }
    Ok(covered)
}

fn refuse_media(row: &Fields) -> Result<(), Problem> {
    let empty = |v: &Value| match v {
        Value::Null => true,
        Value::Array(a) => a.is_empty(),
        Value::String(s) => s.is_empty(),
        _ => false,
    };
    match row.iter().find(|(name, value)| MEDIA.contains(&name.as_str()) && !empty(value)) {
        Some((media, _)) => {
            Err(Reason::Multimodal.says(format!("field {}: only text can be trained on", quoted(media))))
        }
        None => Ok(()),
    }
}

/// Removes what must not stand beside the record's own fields; returns whether any held something.
fn drop_columns(row: &mut Fields) -> bool {
    if row.is_empty() {
        return false;
    }
    for column in SHAPE_COLUMNS {
        if row.get(column).is_some_and(Value::is_null) {
            row.shift_remove(column);
        }
    }
    OURS.iter().filter(|column| row.shift_remove(**column).is_some_and(|v| !v.is_null())).count() > 0
}

/// Takes a column for the chat template. A table has an empty cell where there is none, and JSON text in the others.
fn carried(row: &mut Fields, column: &str, table: bool) -> Result<Option<Value>, Problem> {
    if row.is_empty() {
        return Ok(None);
    }
    match row.shift_remove(column) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if table && text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) if table => {
            let fault =
                |f: json::Fault| Error::data(format!("column {} is not JSON: {}", quoted(column), f.what));
            Ok(Some(json::parse(text.as_bytes()).map_err(|f| Reason::Content.error(fault(f)))?.value))
        }
        Some(value) => Ok(Some(value)),
    }
}
