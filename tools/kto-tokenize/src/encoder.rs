//! One record to token ids, by TRL 1.16's rules.
//!
//! Source of the rules: trl/trainer/kto_trainer.py `_prepare_dataset` and trl/data_utils.py `common_prefix_length`.
//! The one difference is meant: control tokens in a row's own text stay text unless `allow_special` is set.

use kto_cli::{Context, Error, Result};
use kto_formats::{
    record::{Content, Record},
    template::ChatTemplate,
    tokenizer::TextTokenizer,
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
    /// Returns the ids of a record. Errors (65) lack the place.
    pub fn encode(&self, record: &Record) -> Result<Ids> {
        let (alone, mut full, shielded) = match (&record.prompt, &record.completion) {
            (Content::Text(prompt), Content::Text(completion)) => self.text(prompt, completion)?,
            (Content::Chat(prompt), Content::Chat(completion)) => self.chat(record, prompt, completion)?,
            _ => return Err(Error::data("prompt and completion must both be text or both be messages")),
        };
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
    fn text(&self, prompt: &str, completion: &str) -> Result<(Vec<u32>, Vec<u32>, bool)> {
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
        let alone = self.tokenizer.encode(prompt, true)?;
        Ok((alone, self.tokenizer.encode(&(joined + eos), true)?, false))
    }

    /// Conversational rows: the template alone says which control tokens there are.
    fn chat(
        &self,
        record: &Record,
        prompt: &[Value],
        completion: &[Value],
    ) -> Result<(Vec<u32>, Vec<u32>, bool)> {
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
        let alone = template.render_here(&messages[..prompt.len()], tools, kwargs, true)?;
        let full = template.render_here(&messages, tools, kwargs, false)?;
        let encode = |text: &str| match shielded {
            true => self.tokenizer.shield().encode(text, false),
            false => self.tokenizer.encode(text, false),
        };
        Ok((encode(&alone)?, encode(&full)?, shielded))
    }
}

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
