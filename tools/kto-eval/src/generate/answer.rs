//! One answer: where it ends, and the line that is written for it.

use super::{
    encode::Encoder,
    prompts::{Body, Prompt},
    stops::Stops,
};
use crate::args::GenerateArgs;
use kto_cli::{Error, Result, output::Output};
use serde_json::{Map, Value, json};

/// What the model said to one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The new tokens, without the one that ended them.
    ids: Vec<u32>,
    /// Their text, cut before a stop text.
    text: String,
    finish: Finish,
}

/// Why an answer is no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finish {
    /// The model, or a stop text, has ended it.
    Stop,
    /// The limit, or the end of the model's room.
    Length,
    /// There is none: the prompt takes all of the room.
    TooLong,
}

impl Answer {
    /// Takes the new tokens, the stopping one included.
    pub fn new(
        prompt: &[u32],
        mut ids: Vec<u32>,
        stopped: bool,
        stops: &Stops,
        encoder: Option<&Encoder>,
        texts: &[String],
    ) -> Result<Self> {
        if stopped && ids.last().is_some_and(|id| stops.contains(*id)) {
            ids.pop();
        }
        let mut text = match encoder {
            Some(encoder) => encoder.completion(prompt, &ids)?,
            None => String::new(),
        };
        if let Some(at) = find_stop(&text, texts) {
            text.truncate(at);
        }
        let finish = if stopped { Finish::Stop } else { Finish::Length };
        Ok(Self { ids, text, finish })
    }

    /// Returns what stands for the answer to a prompt that leaves no room for one.
    pub fn too_long() -> Self {
        Self { ids: Vec::new(), text: String::new(), finish: Finish::TooLong }
    }

    /// Writes the answer as one line of JSON, or with `--text` as it is.
    pub fn write(&self, prompt: &Prompt, args: &GenerateArgs, out: &mut Output) -> Result<()> {
        let mut line = if args.text {
            self.text.clone().into_bytes()
        } else {
            serde_json::to_vec(&self.row(prompt, args.ids)).map_err(|e| Error::internal(e.to_string()))?
        };
        line.push(b'\n');
        out.write(&line)
    }

    fn row(&self, prompt: &Prompt, ids: bool) -> Map<String, Value> {
        let mut row = Map::new();
        let answered = self.finish != Finish::TooLong;
        if ids {
            row.insert("prompt_ids".into(), json!(prompt.ids));
            row.insert("completion_ids".into(), json!(answered.then_some(&self.ids)));
        } else {
            let body = match &prompt.body {
                Body::Text(text) => json!(text),
                Body::Chat(messages) => json!(messages),
            };
            row.insert("prompt".into(), body);
            row.insert("completion".into(), json!(answered.then_some(&self.text)));
        }
        let finish = match self.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::TooLong => "too_long",
        };
        row.insert("finish".into(), json!(finish));
        row.insert("tokens".into(), json!(self.ids.len()));
        for (key, value) in &prompt.columns {
            if !row.contains_key(key) {
                row.insert(key.clone(), value.clone());
            }
        }
        row
    }
}

/// Returns where the first of the stop texts begins.
pub fn find_stop(text: &str, stops: &[String]) -> Option<usize> {
    stops.iter().filter_map(|stop| text.find(stop.as_str())).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_stop_text_counts() {
        let stops = ["bc".to_string(), "b".to_string(), "é".to_string()];
        assert_eq!(find_stop("aabc", &stops), Some(2));
        assert_eq!(find_stop("aé b", &stops), Some(1));
        assert_eq!(find_stop("aa", &stops), None);
    }
}
