//! Scores and votes of a comparison: SHP, StackExchange pairs, AlpacaEval, and the margins of scored pairs.

use super::{
    Fields, Rules, Unit,
    ask::question,
    content::{turn, turns},
    table::has,
};
use crate::problem::{Problem, Reason};
use kto_formats::json::{describe, quoted};
use serde_json::Value;

/// A number, also one that is written as text.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::String(text) => text.trim().parse().ok().filter(|x: &f64| x.is_finite()),
        _ => None,
    }
}

/// Columns of the scores of a pair.
pub const SCORES: [[&str; 2]; 3] = [
    ["score_chosen", "score_rejected"],
    ["chosen_score", "rejected_score"],
    ["chosen_rating", "rejected_rating"],
];

/// Refuses a scored pair whose scores are equal or too near. The scores stay in the row.
pub fn margin(row: &Fields, rules: &Rules<'_>) -> Result<(), Problem> {
    for [good, bad] in SCORES {
        if !has(row, good) {
            continue;
        }
        let (Some(good), Some(bad)) = (row.get(good).and_then(number), row.get(bad).and_then(number)) else {
            continue;
        };
        if good == bad {
            return Err(Reason::Tie.says(format!("both sides have the score {good}")));
        }
        if rules.min_margin.is_some_and(|least| (good - bad).abs() < least) {
            return Err(Reason::Margin.says(format!("scores {good} and {bad} are nearer than --min-margin")));
        }
    }
    Ok(())
}

/// SHP: the history of a thread and two comments; `labels` 1 says that the first is the better one.
pub fn shp(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let label = row.shift_remove("labels").unwrap_or_default();
    let first = match number(&label) {
        Some(1.0) => true,
        Some(0.0) => false,
        _ => {
            let what = format!("field \"labels\" must be 1 or 0, found {}", describe(&label));
            return Err(Reason::Label.says(what));
        }
    };
    if let Some(least) = rules.min_ratio
        && let Some(ratio) = row.get("score_ratio").and_then(number)
        && ratio < least
    {
        return Err(Reason::Margin.says(format!("score_ratio {ratio} is below --min-ratio")));
    }
    let prompt = turns(row, "history", "user")?;
    let a = turns(row, "human_ref_A", "assistant")?;
    let b = turns(row, "human_ref_B", "assistant")?;
    Ok(if first { Unit::answers("shp", prompt, a, b) } else { Unit::answers("shp", prompt, b, a) })
}

/// StackExchange pairs: `response_j` is the better one.
pub fn stack_exchange(row: &mut Fields, _: &Rules<'_>) -> Result<Unit, Problem> {
    let prompt = turns(row, "question", "user")?;
    let chosen = turns(row, "response_j", "assistant")?;
    let rejected = turns(row, "response_k", "assistant")?;
    Ok(Unit::answers("stack-exchange", prompt, chosen, rejected))
}

/// AlpacaEval: two outputs and a preference from 1 (the first) to 2 (the second); 1.5 and 0 are ties.
pub fn alpaca_eval(row: &mut Fields, _: &Rules<'_>) -> Result<Unit, Problem> {
    let value = row.shift_remove("preference").unwrap_or_default();
    let preference = match number(&value) {
        Some(x) if x == 0.0 || (1.0..=2.0).contains(&x) => x,
        None if value.is_null() => return Err(Reason::NoRating.says("field \"preference\" is null")),
        _ => {
            let what = format!("field \"preference\" must be from 1 to 2, found {}", describe(&value));
            return Err(Reason::Label.says(what));
        }
    };
    if preference == 0.0 || preference == 1.5 {
        return Err(Reason::Tie.says(format!("preference {preference} is for neither")));
    }
    let prompt = question(row)?;
    let one = turns(row, "output_1", "assistant")?;
    let two = turns(row, "output_2", "assistant")?;
    Ok(match preference < 1.5 {
        true => Unit::answers("alpacaeval", prompt, one, two),
        false => Unit::answers("alpacaeval", prompt, two, one),
    })
}

/// Names a text of one role for a message list.
pub fn said(role: &str, value: &Value, field: &str) -> Result<Value, Problem> {
    match value {
        Value::String(text) => Ok(turn(role, text.clone())),
        other => {
            let what = format!("field {}: must hold texts, found {}", quoted(field), describe(other));
            Err(Reason::Content.says(what))
        }
    }
}
