//! `kto-eval models`: what the Hugging Face cache holds.

use crate::args::ModelsArgs;
use kto_cli::{Exit, Result, Ui, escape, output::Output, timestamp, units};
use kto_hub::{CachedModel, Settings, scan};
use serde_json::{Value, json};

/// Runs `kto-eval models`.
pub fn run(args: &ModelsArgs, ui: &Ui) -> Result<Exit> {
    let settings = Settings::from_environment()?;
    let models = scan(&settings.cache)?;
    let mut out = Output::create(None)?;
    if args.json {
        for model in &models {
            out.write(format!("{}\n", object(model)).as_bytes())?;
        }
    } else if !models.is_empty() {
        out.write(table(&models).as_bytes())?;
    }
    out.finish()?;
    let sum = |of: fn(&CachedModel) -> u64| units::size(models.iter().map(of).sum());
    ui.note(format_args!(
        "{} models, {} in {}; {} unused by any snapshot, {} of downloads that have not ended",
        models.len(),
        sum(|m| m.size),
        escape(&settings.cache.display().to_string()),
        sum(|m| m.unused),
        sum(|m| m.partial),
    ));
    Ok(Exit::Ok)
}

fn object(model: &CachedModel) -> Value {
    let time = |seconds: Option<i64>| seconds.map(timestamp);
    json!({
        "name": model.name,
        "path": model.path.display().to_string(),
        "snapshot": model.snapshot.as_ref().map(|path| path.display().to_string()),
        "size": model.size,
        "unused": model.unused,
        "partial": model.partial,
        "last_used": time(model.last_used),
        "last_modified": time(model.last_modified),
        "form": model.form,
        "complete": model.fault.is_none(),
        "fault": model.fault,
        "pickle": model.pickle,
        "remote_code": model.remote_code,
        "snapshots": model.snapshots,
    })
}

fn table(models: &[CachedModel]) -> String {
    let heading = ["MODEL", "SIZE", "LAST USED", "FORM", "STATE"].map(String::from);
    let rows: Vec<[String; 5]> = std::iter::once(heading).chain(models.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..4).map(width).collect();
    let mut text = String::new();
    for [name, size, used, form, state] in &rows {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| widths[i]);
        text.push_str(&format!("{name:a$}  {size:>b$}  {used:c$}  {form:d$}  {state}\n"));
    }
    text
}

fn row(model: &CachedModel) -> [String; 5] {
    let day = model.last_used.map_or("unknown".into(), |seconds| timestamp(seconds)[..10].to_string());
    let mut state =
        model.fault.as_deref().map_or("complete".into(), |fault| format!("incomplete: {}", escape(fault)));
    for (what, files) in [("pickle", &model.pickle), ("remote code", &model.remote_code)] {
        if let Some(first) = files.first() {
            let more = if files.len() > 1 { ", …" } else { "" };
            state.push_str(&format!("; {what} ({}{more})", escape(first)));
        }
    }
    [escape(&model.name), units::size(model.size), day, escape(&model.form), state]
}
