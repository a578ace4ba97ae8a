//! Several rated answers to one question: UltraFeedback, distilabel, Argilla.
//!
//! With thresholds every answer gets its own label; without them the best and the worst make a pair.

use super::{
    Fields, Rules, Side, Unit,
    ask::question,
    content::{parse_cell, turns_of},
    is_reply,
    votes::number,
};
use crate::{
    labels::Rated,
    problem::{Problem, Reason},
};
use kto_formats::{json::quoted, record::Content};
use serde_json::Value;

/// `completions`: objects with `response` and `overall_score`, `rating` or `annotations`.
pub fn completions(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    parse_cell(row, "completions")?;
    let Some(Value::Array(list)) = row.shift_remove("completions") else {
        return Err(Reason::Content.says("field \"completions\" must be a list"));
    };
    let mut answers = Vec::new();
    for (i, mut one) in list.into_iter().enumerate() {
        let rating = rating(&one);
        let said = ["response", "completion", "text", "content"].iter().find_map(|key| {
            let value = one.get_mut(*key)?.take();
            (!value.is_null()).then_some(value)
        });
        let missing = || Reason::MissingField.says(format!("completion {}: no \"response\"", i + 1));
        answers.push((said.ok_or_else(missing)?, rating));
    }
    unit("rated completions", row, rules, answers)
}

fn rating(completion: &Value) -> Option<f64> {
    let known = ["overall_score", "rating", "score", "overall_rating"];
    known.iter().find_map(|key| number(completion.get(*key)?)).or_else(|| {
        let notes = completion.get("annotations")?.as_object()?;
        let ratings: Vec<f64> = notes
            .values()
            .filter_map(|note| number(note.get("Rating").or_else(|| note.get("rating")).unwrap_or(note)))
            .collect();
        (!ratings.is_empty()).then(|| ratings.iter().sum::<f64>() / ratings.len() as f64)
    })
}

/// `generations` (or `responses`) and `ratings`, two lists of one length.
pub fn generations(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let field = if row.contains_key("generations") { "generations" } else { "responses" };
    parse_cell(row, field)?;
    parse_cell(row, "ratings")?;
    let (Some(Value::Array(said)), Some(Value::Array(ratings))) =
        (row.shift_remove(field), row.shift_remove("ratings"))
    else {
        return Err(Reason::Content.says(format!("fields \"{field}\" and \"ratings\" must be lists")));
    };
    if said.len() != ratings.len() {
        let what = format!("{} {field}, {} ratings", said.len(), ratings.len());
        return Err(Reason::Content.says(what));
    }
    let answers = said.into_iter().zip(ratings.iter().map(number)).collect();
    unit("rated generations", row, rules, answers)
}

fn unit(
    shape: &'static str,
    row: &mut Fields,
    rules: &Rules<'_>,
    answers: Vec<(Value, Option<f64>)>,
) -> Result<Unit, Problem> {
    let prompt = question(row)?;
    let mut rated = Vec::new();
    let mut left_out = Vec::new();
    for (i, (said, rating)) in answers.into_iter().enumerate() {
        let field = format!("answer {}", i + 1);
        let said = match turns_of(&field, said, "assistant")? {
            turns if turns.iter().all(is_reply) => turns,
            _ => {
                let what = format!("{}: turns that the model does not say", quoted(&field));
                return Err(Reason::Content.says(what));
            }
        };
        match rating {
            Some(rating) => rated.push((said, rating)),
            None => left_out.push(Reason::NoRating),
        }
    }
    let side = |said: Vec<Value>, label| Side {
        prompt: Content::Chat(prompt.clone()),
        completion: Content::Chat(said),
        label,
    };
    let mut sides = Vec::new();
    if let Some(thresholds) = rules.labels.thresholds() {
        for (said, rating) in rated {
            match thresholds.rate(rating)? {
                Rated::Label(label) => sides.push(side(said, label)),
                Rated::Middle => left_out.push(Reason::Middle),
            }
        }
        return Ok(Unit { left_out, ..Unit::of(shape, sides) });
    }
    // The first of the best and the first of the worst.
    let best = (0..rated.len()).reduce(|a, b| if rated[b].1 > rated[a].1 { b } else { a });
    let worst = (0..rated.len()).reduce(|a, b| if rated[b].1 < rated[a].1 { b } else { a });
    let (Some(best), Some(worst)) = (best, worst) else {
        return Ok(Unit { left_out, ..Unit::of(shape, sides) });
    };
    let margin = rated[best].1 - rated[worst].1;
    let weak = rules.min_margin.is_some_and(|least| margin < least);
    let reason = if margin == 0.0 {
        Reason::Tie
    } else if weak {
        Reason::Margin
    } else {
        Reason::Middle
    };
    let pair = reason == Reason::Middle;
    left_out.extend((0..rated.len()).filter(|i| !pair || (*i != best && *i != worst)).map(|_| reason));
    if pair {
        sides.extend([side(rated[best].0.clone(), true), side(rated[worst].0.clone(), false)]);
    }
    Ok(Unit { left_out, paired: pair, ..Unit::of(shape, sides) })
}
