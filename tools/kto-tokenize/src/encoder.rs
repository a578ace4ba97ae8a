//! One record to token ids, by TRL 1.16's rules.
//!
//! Source of the rules: trl/trainer/kto_trainer.py `_prepare_dataset` and trl/data_utils.py `common_prefix_length`.
//! The one difference is meant: control tokens in a row's own text stay text unless `allow_special` is set.

use crate::{args::TrainOn, turns};
use kto_cli::{Context, Error, Result};
use kto_formats::{
    record::{Content, Record},
    template::ChatTemplate,
    tokenizer::{Prefix, TextTokenizer},
};
use serde_json::Value;

/// What turns records into ids. Shared by all threads.
pub struct Encoder {
    pub tokenizer: TextTokenizer,
    /// Loaded when the first conversational row comes.
    pub template: Option<ChatTemplate>,
    /// The text of the end-of-sequence token.
    pub eos: Option<String>,
    pub allow_special: bool,
    /// What of a conversation is trained on.
    pub train_on: TrainOn,
    /// A completion continues the assistant's message that the prompt ends with.
    pub continue_final: bool,
}

/// What is kept of the row before: the sides of a pair come one behind the other and have one prompt.
#[derive(Default)]
pub struct Before {
    /// The prompt of a text row and its ids.
    prompt: String,
    ids: Vec<u32>,
    /// The beginning of a conversation.
    prefix: Prefix,
}

/// A row as ids. Not cut.
#[derive(Debug)]
pub struct Ids {
    pub prompt: Vec<u32>,
    pub completion: Vec<u32>,
    pub label: bool,
    /// The prompt alone has tokens that prompt + completion does not begin with.
    pub boundary_moved: bool,
    /// Control tokens in the text were kept as text.
    pub shielded: bool,
}

impl Encoder {
    /// Returns the ids of a record's trained turns. Errors (65) lack the place.
    pub fn encode(&self, record: &Record, before: &mut Before) -> Result<Vec<Ids>> {
        match (&record.prompt, &record.completion) {
            (Content::Text(prompt), Content::Text(completion)) => {
                Ok(vec![self.ids(record, self.text(prompt, completion, before)?)?])
            }
            (Content::Chat(prompt), Content::Chat(completion)) => {
                let turns = self.chat(record, prompt, completion, &mut before.prefix)?;
                turns.into_iter().map(|turn| self.ids(record, turn)).collect()
            }
            _ => Err(Error::data("prompt and completion must both be text or both be messages")),
        }
    }

    /// Parts the tokens where those of the prompt alone end, and checks them.
    fn ids(&self, record: &Record, (alone, mut full, shielded): Encoded) -> Result<Ids> {
        let common = alone.iter().zip(&full).take_while(|(a, b)| a == b).count();
        let completion = full.split_off(common);
        let size = self.tokenizer.vocab_size();
        if let Some(id) = full.iter().chain(&completion).find(|id| **id >= size) {
            let what = format!("token id {id}, the model's vocabulary ends at {}", size - 1);
            return Err(Error::data(what).with_hint("tokenizer.json and config.json are not of one model"));
        }
        if full.is_empty() && !alone.is_empty() {
            let what =
                "the first token of prompt + completion spans both, so the prompt has no token of its own";
            return Err(Error::data(what).with_hint("a blank or line end between the two keeps them apart"));
        }
        if full.is_empty() {
            return Err(Error::data(
                "the prompt has no tokens, so the first token of the completion has no context",
            ));
        }
        if completion.is_empty() {
            return Err(Error::data("the completion has no tokens"));
        }
        Ok(Ids {
            prompt: full,
            completion,
            label: record.label,
            boundary_moved: common < alone.len(),
            shielded,
        })
    }

    /// Text rows: the EOS text is appended unless it is there, and BOS and the like are added.
    fn text(&self, prompt: &str, completion: &str, before: &mut Before) -> Result<Encoded> {
        let eos = self.eos.as_deref().ok_or_else(|| {
            Error::data("text rows need an end-of-sequence token and the model names none")
                .with_hint("--eos TOKEN names one")
        })?;
        let body = completion.strip_suffix(eos).unwrap_or(completion);
        let joined = format!("{prompt}{body}");
        if !self.allow_special {
            let shield = self.tokenizer.shield();
            // A token can also come about where prompt and completion meet.
            if let Some(covered) = shield.cover(&joined)? {
                let alone = shield.cover(prompt)?;
                let alone = shield.encode(alone.as_deref().unwrap_or(prompt), true)?;
                return Ok((alone, shield.encode(&(covered + eos), true)?, true));
            }
        }
        if before.prompt != prompt || before.ids.is_empty() {
            before.ids = self.tokenizer.encode(prompt, true)?;
            prompt.clone_into(&mut before.prompt);
        }
        Ok((before.ids.clone(), self.tokenizer.encode(&(joined + eos), true)?, false))
    }

    /// Conversational rows: the template alone says which control tokens there are.
    fn chat(
        &self,
        record: &Record,
        prompt: &[Value],
        completion: &[Value],
        known: &mut Prefix,
    ) -> Result<Vec<Encoded>> {
        let template =
            self.template.as_ref().ok_or_else(|| Error::internal("no chat template was loaded"))?;
        let mut messages: Vec<Value> = prompt.iter().chain(completion).cloned().collect();
        let mut kwargs = record.chat_template_kwargs.clone();
        let mut tools = tools(record)?;
        let mut shielded = false;
        if !self.allow_special {
            let shield = self.tokenizer.shield();
            for value in messages.iter_mut().chain(&mut kwargs).chain(&mut tools) {
                shielded |= shield.cover_json(value)?;
            }
        }
        let (tools, kwargs) = (tools.as_ref(), kwargs.as_ref());
        let prompt = prompt.len();
        let begun = messages[..prompt].to_vec();
        let continues = self.continue_final && turns::join(&mut messages, prompt)?;
        let prompt = if continues { prompt - 1 } else { prompt };
        let turns = turns::trained(&messages, prompt, self.train_on)?.into_iter().map(|turn| {
            let alone = match continues && turn.start == prompt {
                true => template.render_continued(&begun, tools, kwargs)?,
                false => template.render_here(&messages[..turn.start], tools, kwargs, true)?,
            };
            let full = template.render_here(&messages[..turn.end], tools, kwargs, false)?;
            if shielded {
                let shield = self.tokenizer.shield();
                return Ok((shield.encode(&alone, false)?, shield.encode(&full, false)?, true));
            }
            let alone = self.tokenizer.encode_prompt(&alone, known)?;
            Ok((alone, self.tokenizer.encode_behind(&full, known)?, false))
        });
        turns.collect()
    }
}

/// The prompt's tokens, those of prompt and completion, and whether control tokens were kept as text.
type Encoded = (Vec<u32>, Vec<u32>, bool);

/// The row's tools: a list, or a JSON text of one. `chat_template_kwargs` may name others, as in TRL.
fn tools(record: &Record) -> Result<Option<Value>> {
    let own = record.chat_template_kwargs.as_ref().and_then(|kwargs| kwargs.get("tools"));
    match own.or(record.tools.as_ref()) {
        Some(Value::String(text)) => {
            let parsed: Value = serde_json::from_str(text)
                .map_err(|e| Error::data(format!("not JSON: {e}")))
                .at("field \"tools\"")?;
            Ok(Some(parsed).filter(|tools| !tools.is_null()))
        }
        Some(Value::Null) | None => Ok(None),
        Some(tools @ Value::Array(_)) => Ok(Some(tools.clone())),
        Some(_) => Err(Error::data("field \"tools\" must be a list, or a JSON text of one")),
    }
}
