//! From a prompt to token ids as kto-tokenize makes them, and from new ids back to text.

use super::prompts::{Body, Prompt};
use crate::args::GenerateArgs;
use kto_cli::{Context, Error, Result, Ui, guard};
use kto_formats::{chat, template::ChatTemplate, tokenizer::TextTokenizer};
use serde_json::{Value, json};
use std::{path::PathBuf, sync::OnceLock};

/// Tokenizer and chat template of a model.
pub struct Encoder {
    tokenizer: TextTokenizer,
    /// Loaded when the first conversational prompt comes: a model for plain text has none.
    template: OnceLock<ChatTemplate>,
    template_choice: Option<PathBuf>,
    model: PathBuf,
    chat: bool,
    allow_special: bool,
}

impl Encoder {
    /// Loads the tokenizer.
    pub fn open(args: &GenerateArgs, ui: &Ui) -> Result<Self> {
        let model = args.model.model.clone();
        let tokenizer = TextTokenizer::from_model_dir(&model)?;
        tokenizer.notes.iter().for_each(|note| ui.warn(note));
        let this = Self {
            tokenizer,
            template: OnceLock::new(),
            template_choice: args.chat_template.clone(),
            model,
            chat: args.chat,
            allow_special: args.allow_special,
        };
        if args.chat || args.chat_template.is_some() {
            this.template()?;
        }
        Ok(this)
    }

    /// Returns the tokenizer's end-of-sequence token.
    pub fn eos_id(&self) -> Option<u32> {
        self.tokenizer.eos_id()
    }

    /// Returns the prompt's ids. Errors (65) lack the place.
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        match &prompt.body {
            Body::Text(text) if self.chat => {
                self.messages(&[json!({"role": "user", "content": text})], prompt)
            }
            Body::Text(text) => self.text(text),
            Body::Chat(messages) => self.messages(messages, prompt),
        }
    }

    /// A plain text gets what the tokenizer puts in front of one (BOS), not what it puts behind.
    fn text(&self, text: &str) -> Result<Vec<u32>> {
        let covered = if self.allow_special { None } else { self.tokenizer.shield().cover(text)? };
        let ids = |special| match &covered {
            Some(covered) => self.tokenizer.shield().encode(covered, special),
            None => self.tokenizer.encode(text, special),
        };
        let (mut whole, plain) = (ids(true)?, ids(false)?);
        let places = 0..=whole.len().saturating_sub(plain.len());
        if let Some(start) = places.rev().find(|i| whole[*i..].starts_with(&plain)) {
            whole.truncate(start + plain.len());
        }
        Ok(whole)
    }

    /// Messages go through the template. An assistant's message at the end is one to be continued.
    fn messages(&self, messages: &[Value], prompt: &Prompt) -> Result<Vec<u32>> {
        let mut messages = messages.to_vec();
        let (mut tools, mut kwargs) = (tools(prompt)?, prompt.column("chat_template_kwargs").cloned());
        let mut covered = false;
        if !self.allow_special {
            for value in messages.iter_mut().chain(&mut kwargs).chain(&mut tools) {
                covered |= self.tokenizer.shield().cover_json(value)?;
            }
        }
        let open = messages.last().filter(|m| chat::role(m) == "assistant");
        let (template, tools, kwargs) = (self.template()?, tools.as_ref(), kwargs.as_ref());
        let text = match open {
            Some(_) => guard::on_big_stack(|| template.render_continued(&messages, tools, kwargs))?,
            None => template.render(&messages, tools, kwargs, true)?,
        };
        match covered {
            true => self.tokenizer.shield().encode(&text, false),
            false => self.tokenizer.encode(&text, false),
        }
    }

    /// Returns the text that `made` adds to a prompt. Some decoders drop a blank at the very beginning, so the whole is
    /// decoded and the prompt's text cut off.
    pub fn completion(&self, prompt: &[u32], made: &[u32]) -> Result<String> {
        // A few tokens are context enough.
        let context = &prompt[prompt.len().saturating_sub(8)..];
        let whole = self.tokenizer.decode(&[context, made].concat())?;
        match whole.strip_prefix(&self.tokenizer.decode(context)?) {
            Some(rest) => Ok(rest.to_string()),
            None => self.tokenizer.decode(made),
        }
    }

    fn template(&self) -> Result<&ChatTemplate> {
        if let Some(template) = self.template.get() {
            return Ok(template);
        }
        let template = ChatTemplate::load(&self.model, self.template_choice.as_deref())?;
        Ok(self.template.get_or_init(|| template))
    }
}

/// The row's tools: a list, or a JSON text of one.
fn tools(prompt: &Prompt) -> Result<Option<Value>> {
    match prompt.column("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(list)) => Ok(Some(Value::Array(list.clone()))),
        Some(Value::String(text)) => {
            let parsed: Value = serde_json::from_str(text)
                .map_err(|e| Error::data(format!("not JSON: {e}")))
                .at("field \"tools\"")?;
            Ok(Some(parsed).filter(|tools| !tools.is_null()))
        }
        Some(_) => Err(Error::data("field \"tools\" must be a list, or a JSON text of one")),
    }
}
