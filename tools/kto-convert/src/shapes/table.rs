//! The dispatch table, and how a row finds its line in it.

use super::{
    Fields, Rules, Unit, advice, arena, ask, implicit, logs, messages, oasst, openwebui, paired, rated,
    unpaired, votes,
};
use crate::problem::{Problem, Reason};
use kto_cli::Error;
use kto_formats::{json::quoted, record::columns};
use serde_json::Value;

/// A shape: which fields make it, and how they become completions.
pub struct Shape {
    /// What `--from` calls it.
    pub name: &'static str,
    /// All of these are there and not null.
    needs: &'static [&'static str],
    /// What must hold as well.
    also: fn(&Fields) -> bool,
    /// There must be a label as well.
    labelled: bool,
    convert: fn(&mut Fields, &Rules<'_>) -> Result<Unit, Problem>,
    /// What becomes of it, for `--explain`.
    pub words: &'static str,
}

type Convert = fn(&mut Fields, &Rules<'_>) -> Result<Unit, Problem>;

const fn shape(
    name: &'static str,
    needs: &'static [&'static str],
    also: fn(&Fields) -> bool,
    convert: Convert,
    words: &'static str,
) -> Shape {
    Shape { name, needs, also, labelled: false, convert, words }
}

const fn labelled(shape: Shape) -> Shape {
    Shape { labelled: true, ..shape }
}

/// The shapes, more telling ones first.
#[rustfmt::skip]
static SHAPES: [Shape; 24] = [
    shape("openwebui", &["data"], |r| r.contains_key("snapshot") && r.contains_key("meta"), openwebui::convert,
        "the dialogue up to meta.message_id, data.rating is the label"),
    shape("langsmith", &["inputs", "outputs", "feedback_stats"], any, logs::lang_smith,
        "inputs are the prompt, outputs the completion, feedback_stats the label"),
    shape("langfuse", &["input", "output", "scores"], any, logs::langfuse,
        "input is the prompt, output the completion, a score the label"),
    shape("openai", &["input"], |r| has(r, "preferred_output") || has(r, "preferred_completion"), messages::open_ai,
        "input.messages are the prompt, preferred_output is chosen, non_preferred_output rejected"),
    shape("llamafactory-v1", &["chosen_messages", "rejected_messages"], any, messages::v1,
        "the shared turns are the prompt, the rest chosen and rejected"),
    shape("swift", &["messages"], |r| has(r, "rejected_response") || has(r, "rejected_messages"), messages::swift,
        "the last assistant turn is chosen, rejected_response rejected"),
    shape("shp", &["history", "human_ref_A", "human_ref_B"], any, votes::shp,
        "history is the prompt, labels 1 makes human_ref_A the chosen one"),
    shape("alpacaeval", &["output_1", "output_2"], |r| r.contains_key("preference"), votes::alpaca_eval,
        "instruction is the prompt, a preference below 1.5 makes output_1 the chosen one"),
    shape("arena", &["conversation_a", "conversation_b"], any, arena::conversations,
        "winner says which conversation is chosen"),
    shape("arena-table", &["response_a", "response_b", "prompt"], |r| has(r, "winner_model_a"), arena::table,
        "winner_model_a or winner_model_b says which response is chosen"),
    shape("stack-exchange", &["question", "response_j", "response_k"], any, votes::stack_exchange,
        "question is the prompt, response_j chosen, response_k rejected"),
    shape("ultrafeedback", &["completions"], is_question, rated::completions,
        "every rated completion gets a label by --desirable and --undesirable; without them the best and the worst make a pair"),
    shape("distilabel", &["ratings"], |r| has(r, "generations") || has(r, "responses"), rated::generations,
        "every rated generation gets a label by --desirable and --undesirable; without them the best and the worst make a pair"),
    shape("oasst", &["message_tree_id", "prompt"], |r| r.get("prompt").is_some_and(Value::is_object), oasst::convert,
        "of the ranked replies to a prompt the best is chosen, the worst rejected"),
    labelled(shape("kto", &["prompt", "completion"], any, unpaired::convert,
        "prompt, completion, label as they are")),
    shape("paired", &["prompt", "chosen", "rejected"], |r| !is_question_only(r), paired::convert,
        "prompt with chosen and with rejected"),
    shape("sharegpt-pair", &["conversations", "chosen", "rejected"], any, messages::share_gpt_pair,
        "conversations are the prompt"),
    shape("question-pair", &[], |r| is_question_only(r) && is_pair(r), ask::pair,
        "system and question (or instruction and input) are the prompt"),
    shape("hh-rlhf", &["chosen", "rejected"], is_dialogue, implicit::convert,
        "the turns up to the last \"\\n\\nAssistant:\" that both sides share are the prompt"),
    shape("implicit", &["chosen", "rejected"], any, implicit::convert,
        "what both sides begin with is the prompt"),
    labelled(shape("messages", &["messages"], any, messages::convert,
        "the last assistant turns are the completion")),
    labelled(shape("sharegpt", &["conversations"], any, messages::share_gpt,
        "the last assistant turns are the completion")),
    labelled(shape("question-answer", &[], is_answer, ask::one,
        "system, instruction and input (or question) are the prompt")),
    shape("text", &["text"], any, |_, _| Err(no_prompt()),
        "cannot be used"),
];

/// Fields that hint at a shape when no shape is complete: its own error says what is missing.
const SIGNS: [(&str, &str); 8] = [
    ("completion", "kto"),
    ("chosen", "implicit"),
    ("rejected", "implicit"),
    ("messages", "messages"),
    ("conversations", "sharegpt"),
    ("generations", "distilabel"),
    ("output_1", "alpacaeval"),
    ("prompt", "kto"),
];

fn any(_: &Fields) -> bool {
    true
}

/// Whether a row has a value there. A short row is looked through: comparing lengths is faster than hashing the name.
pub(super) fn has(row: &Fields, field: &str) -> bool {
    match row.len() {
        0..=16 => row.iter().any(|(name, value)| name == field && !value.is_null()),
        _ => row.get(field).is_some_and(|v| !v.is_null()),
    }
}

fn is_question(row: &Fields) -> bool {
    ask::first(row, &ask::QUESTIONS).is_some()
}

/// A question of another name than TRL's `prompt`, or with a system text beside it.
fn is_question_only(row: &Fields) -> bool {
    let question = ask::first(row, &ask::QUESTIONS);
    let beside = ["system", "system_prompt", "query"].iter().any(|f| has(row, f) && row[*f].is_string());
    question.is_some_and(|q| q != "prompt" || (beside && row["prompt"].is_string()))
}

fn is_pair(row: &Fields) -> bool {
    ask::first(row, &ask::CHOSEN).is_some() && ask::first(row, &ask::REJECTED).is_some()
}

fn is_answer(row: &Fields) -> bool {
    is_question(row) && ask::first(row, &ask::ANSWERS).is_some()
}

fn is_dialogue(row: &Fields) -> bool {
    let starts = |f: &str| row.get(f).and_then(Value::as_str).is_some_and(super::split_text::is_dialogue);
    starts("chosen") && starts("rejected")
}

fn no_prompt() -> Problem {
    let error = Error::data("only a \"text\": nothing tells prompt from completion");
    Reason::NoPrompt.error(error.with_hint("KTO needs a prompt and a labelled completion: --map prompt=…,completion=…, or dialogues as HH-RLHF writes them"))
}

/// The names that `--from` takes.
pub fn names() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|shape| shape.name)
}

/// The shape of a name.
pub fn named(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().find(|shape| shape.name == name)
}

impl Shape {
    fn is_complete(&self, row: &Fields, rules: &Rules<'_>) -> bool {
        self.needs.iter().all(|field| has(row, field))
            && (self.also)(row)
            && (!self.labelled || rules.labels.is_known_for(row))
    }

    /// Names the first field that the shape needs and the row has not, beside those that it has.
    fn missing(&self, row: &Fields, rules: &Rules<'_>) -> Result<(), Problem> {
        if let Some(field) = self.needs.iter().find(|f| !row.contains_key(**f)) {
            let what = format!("field {} is missing{}", quoted(field), columns(row));
            let usual = || format!("--map {field}=COLUMN names the column that holds it");
            let hint = advice::hint(row).unwrap_or_else(usual);
            return Err(Reason::MissingField.error(Error::data(what).with_hint(hint)));
        }
        if self.labelled { rules.labels.missing(row) } else { Ok(()) }
    }

    /// Takes the completions of a row out of its fields.
    pub fn convert(&self, row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
        self.missing(row, rules)?;
        (self.convert)(row, rules)
    }
}

/// Finds the shape of a row: the one that `--from` names, or the first whose fields are all there, or the likeliest.
pub fn find(
    row: &Fields,
    rules: &Rules<'_>,
    from: Option<&'static Shape>,
) -> Result<&'static Shape, Problem> {
    if let Some(shape) = from {
        return Ok(shape);
    }
    let complete = SHAPES.iter().find(|shape| shape.is_complete(row, rules));
    let likely =
        || SIGNS.iter().find(|(field, _)| row.contains_key(*field)).and_then(|(_, name)| named(name));
    let answer = || is_answer(row).then(|| named("question-answer")).flatten();
    complete.or_else(likely).or_else(answer).ok_or_else(|| {
        let error = Error::data(format!("no known shape{}", columns(row)));
        let usual = || "--map prompt=COLUMN,completion=COLUMN,label=COLUMN names the columns".into();
        Reason::UnknownShape.error(error.with_hint(advice::hint(row).unwrap_or_else(usual)))
    })
}
