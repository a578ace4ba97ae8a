//! `--show N`: the first rows as a reader sees them, instead of a token file.
//!
//! Every token ends with a bar, so that the boundary between prompt and completion and the merged tokens show without
//! colour too; what is text in the row is escaped, so no row can drive the terminal.

use crate::{
    encoder::{Before, Ids},
    pass,
    plan::Plan,
    watch::Watch,
};
use kto_cli::{Result, escape, guard, input};
use kto_formats::{jsonl::JsonLines, tokenizer::TextTokenizer};
use std::fmt::Write as _;

/// Tokens before a piece that are decoded with it: some decoders drop a blank at the very beginning.
const CONTEXT: usize = 4;
/// Tokens of one character, at most.
const LONGEST: usize = 8;

const DIM: &str = "2";
const CUT: &str = "2;9";
const CONTROL: &str = "1;36";
const DESIRABLE: &str = "32";
const UNDESIRABLE: &str = "31";

/// Returns the text for the first `plan.show` rows of the inputs, and what of the tokenizer is not followed.
pub fn run(plan: &Plan, watch: &Watch) -> Result<(String, Vec<String>)> {
    guard::on_big_stack(|| {
        let mut encoder = watch.over(None, 0, || pass::encoder(plan))?;
        let (mut out, mut before) = (String::new(), Before::default());
        let mut left = plan.show.unwrap_or(0);
        for path in &plan.inputs {
            let input = input::open(path)?;
            let name = input.name.clone();
            watch.enter_input(&name);
            let mut lines = JsonLines::new(input);
            while left > 0
                && let Some(row) = lines.next_row()?
            {
                left -= 1;
                if encoder.template.is_none() && pass::is_chat(&row) {
                    encoder.template = Some(watch.over(None, 0, || pass::template(plan))?);
                }
                let place = format!("{}:{}", escape(&name), row.line);
                match watch.over(Some(0), row.line, || pass::encode(&encoder, &mut before, &name, row)) {
                    Ok(rows) => {
                        for ids in &rows {
                            print(&mut out, &encoder.tokenizer, plan, &place, ids)?;
                        }
                    }
                    Err(e) if plan.skip_errors => out.push_str(&format!("{e}\n\n")),
                    Err(e) => return Err(e),
                }
            }
        }
        Ok((out, encoder.tokenizer.notes))
    })
}

fn print(out: &mut String, tokenizer: &TextTokenizer, plan: &Plan, place: &str, ids: &Ids) -> Result<()> {
    let (prompt, completion) = (&ids.prompt[..], &ids.completion[..]);
    let limit = plan.max_length as usize;
    let (label, colour) = if ids.label { ("desirable", DESIRABLE) } else { ("undesirable", UNDESIRABLE) };
    let _ = write!(
        out,
        "{place}: {label}, prompt of {}, completion of {} tokens",
        prompt.len(),
        completion.len()
    );
    let dropped = prompt.len() >= limit;
    if dropped {
        let _ = write!(out, "; dropped, the prompt reaches the {limit} of --max-length");
    }
    out.push('\n');
    let kept = if dropped { 0 } else { completion.len().min(limit - prompt.len()) };
    let pieces = pieces(tokenizer, &[prompt, completion].concat(), prompt.len())?;
    let mut at = 0;
    for (heading, end, code) in [
        ("prompt", prompt.len(), None),
        ("completion", prompt.len() + kept, Some(colour)),
        ("not trained", prompt.len() + completion.len(), Some(CUT)),
    ] {
        if end == at {
            continue;
        }
        let _ = write!(out, "  {heading:<11} ");
        let mut fresh = false;
        for piece in pieces.iter().filter(|p| (at..end).contains(&p.start)) {
            if fresh {
                out.push_str("\n              ");
            }
            let control = piece.count == 1 && tokenizer.is_control(piece.id);
            let code = if control && code != Some(CUT) { Some(CONTROL) } else { code };
            paint(out, &escape(&piece.text), code.filter(|_| plan.colour));
            if piece.count > 1 {
                paint(out, &format!("×{}", piece.count), Some(DIM).filter(|_| plan.colour));
            }
            paint(out, "│", Some(DIM).filter(|_| plan.colour));
            fresh = piece.text.ends_with('\n');
        }
        out.push('\n');
        at = end;
    }
    out.push('\n');
    Ok(())
}

fn paint(out: &mut String, text: &str, code: Option<&str>) {
    let _ = match code {
        Some(code) => write!(out, "\x1b[{code}m{text}\x1b[0m"),
        None => write!(out, "{text}"),
    };
}

/// A token, or the tokens of a character that none of them holds whole.
struct Piece {
    text: String,
    start: usize,
    count: usize,
    id: u32,
}

/// Cuts ids into pieces; none crosses `boundary`.
fn pieces(tokenizer: &TextTokenizer, ids: &[u32], boundary: usize) -> Result<Vec<Piece>> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut start = 0_usize;
    for end in 1..=ids.len() {
        let context = start.saturating_sub(CONTEXT);
        let (before, whole) =
            (tokenizer.decode(&ids[context..start])?, tokenizer.decode(&ids[context..end])?);
        let text = match whole.strip_prefix(&before) {
            Some(text) => text.to_string(),
            None => tokenizer.decode(&ids[start..end])?,
        };
        let open = text.ends_with(char::REPLACEMENT_CHARACTER) && end - start < LONGEST;
        if open && end < ids.len() && end != boundary {
            continue;
        }
        pieces.push(Piece { text, start, count: end - start, id: ids[start] });
        start = end;
    }
    Ok(pieces)
}
