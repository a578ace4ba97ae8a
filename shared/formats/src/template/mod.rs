//! Chat templates: from a list of messages to the text a chat model was trained on.
//!
//! Templates are Jinja programs that come with models, written for Python's jinja2 inside transformers. minijinja runs
//! them; `environment` holds what makes it agree with Python, `pystyle` how Python prints values, `clock` the one
//! function that reads the time, `source` where a model directory keeps its templates, `continued` how a turn is left open. Called by kto-tokenize and
//! kto-eval.
//!
//! A template is untrusted input. Its source is capped, every render has a budget of fuel (time and memory) that grows
//! with the conversation, the output is capped, and everything runs on a stack of 256 MiB. Nothing can be read or
//! included from outside. What fuel cannot stop (compiling a pathological source) is the caller's watchdog's job.
//! Deliberately absent: multimodal content, the assistant mask of `{% generation %}` (the tags are accepted).

mod clock;
mod continued;
mod environment;
mod pystyle;
mod source;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod hostile;

use crate::tokenizer::TokenizerConfig;
use kto_cli::{Error, Result, escape, guard, hash};
use minijinja::{Environment, ErrorKind};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Bytes of a template's source, at most.
const SOURCE_CAP: usize = 64 << 10;
/// Bytes of a rendering, at most.
const OUTPUT_CAP: usize = 16 << 20;
/// Fuel of a render: a constant, plus so much for each message, plus as much for each byte of its context.
const FUEL: (u64, u64, u64) = (200_000, 4_000, 2);
/// The only template of the environment. The name has no extension, so nothing is HTML-escaped.
const NAME: &str = "chat_template";

/// A compiled chat template and the variables that come with its tokenizer.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The template for rows with tools, where the model has one of its own for them.
    with_tools: bool,
    variables: Vec<(String, String)>,
    fingerprint: String,
}

impl ChatTemplate {
    /// Loads the templates of a model directory: `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, else
    /// `chat_template` in tokenizer_config.json. `choice` is the name of one of them or, if none is called so, a file
    /// that is used in their place, with that directory's special tokens.
    /// Errors: 65 when there is none or it does not compile, 66 when a file cannot be read.
    pub fn load(dir: &Path, choice: Option<&Path>) -> Result<Self> {
        let config = TokenizerConfig::from_model_dir(dir)?;
        let sources = match choice {
            None => source::of_model_dir(dir, &config)?,
            Some(choice) => source::chosen(choice, dir, &config)?,
        };
        Self::compile(sources, &config)
    }

    /// Returns the file that `choice` means, when it is not the name of one of the model's templates.
    pub fn file_of_choice(dir: &Path, choice: &Path) -> Result<Option<PathBuf>> {
        source::file_of_choice(choice, dir, &TokenizerConfig::from_model_dir(dir)?)
    }

    fn compile(sources: source::Sources, config: &TokenizerConfig) -> Result<Self> {
        let mut environment = environment::new(clock::Clock::System);
        let mut all = sources.default.text.clone();
        add(&mut environment, NAME, &sources.default)?;
        if let Some(tools) = &sources.tools {
            add(&mut environment, TOOLS, tools)?;
            all.push('\0');
            all.push_str(&tools.text);
        }
        Ok(Self {
            environment,
            with_tools: sources.tools.is_some(),
            variables: config.template_variables(),
            fingerprint: hash::sha256_hex(all.as_bytes()),
        })
    }

    /// Fixes the time that `strftime_now` sees: seconds since 1970, UTC. Without it the system's clock is read.
    pub fn set_now(&mut self, seconds: i64) {
        environment::set_clock(&mut self.environment, clock::Clock::Fixed(seconds));
    }

    /// Returns the SHA-256 (hex) of the template's source as it was read.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Renders `messages` as transformers' `apply_chat_template(tokenize=False)` does: keys that are null are left out,
    /// reasoning is known under all its names, `tools` is a list (or null), `kwargs` are more variables.
    /// Errors (65): what the template raised, or what it could not do.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        kwargs: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        guard::on_big_stack(|| self.render_here(messages, tools, kwargs, add_generation_prompt))
    }

    /// [`ChatTemplate::render`] without a thread of its own, for callers on a stack of at least 64 MiB.
    pub fn render_here(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        kwargs: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let context = environment::context(messages, tools, kwargs, add_generation_prompt, &self.variables)?;
        let name = if self.with_tools && tools.is_some() { TOOLS } else { NAME };
        render(&self.environment, name, messages.len(), context)
    }

    /// Renders a conversation whose last message is to be continued: the text ends where that message's does, without
    /// what closes a turn. As transformers' `continue_final_message`: where the template trims the message, so is the
    /// result. Errors (65): the last message is no text, or the template leaves it out.
    pub fn render_continued(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        kwargs: Option<&Value>,
    ) -> Result<String> {
        let mut marked = messages.to_vec();
        let said = continued::mark(&mut marked)?;
        let text = self.render_here(&marked, tools, kwargs, false)?;
        continued::cut(text, &said)
    }
}

const TOOLS: &str = "chat_template_tool_use";

fn add(environment: &mut Environment<'static>, name: &'static str, source: &source::Source) -> Result<()> {
    let text = source.prepared()?;
    let compiled = guard::catch("chat template", || {
        guard::on_big_stack(|| environment.add_template_owned(name, text).map_err(|e| explain(&e)))
    })?;
    compiled.map_err(|e| Error::data(format!("{}: {e}", escape(&source.name))))
}

fn render(
    environment: &Environment<'_>,
    name: &str,
    messages: usize,
    context: environment::Context,
) -> Result<String> {
    let mut environment = environment.clone();
    environment.set_fuel(Some(FUEL.0 + FUEL.1 * messages as u64 + FUEL.2 * context.bytes as u64));
    let rendered = guard::catch("chat template", || {
        environment.get_template(name).and_then(|template| template.render(context.value))
    })?;
    let text = rendered.map_err(|e| explain(&e))?;
    if text.len() > OUTPUT_CAP {
        return Err(Error::data(format!(
            "the chat template made {} bytes, the limit is {OUTPUT_CAP}",
            text.len()
        )));
    }
    Ok(text)
}

/// One line for what minijinja reports over several.
fn explain(error: &minijinja::Error) -> Error {
    if let Some(message) = environment::raised(error) {
        return Error::data(format!("the chat template refuses: {}", escape(message)));
    }
    let line = error.line().map_or(String::new(), |n| format!(" line {n}"));
    match error.kind() {
        ErrorKind::OutOfFuel => {
            Error::data(format!("chat template{line}: exceeded its budget of work or memory"))
        }
        kind => {
            let detail = error.detail().map_or(String::new(), |d| format!(": {}", escape(d)));
            Error::data(format!("chat template{line}: {kind}{detail}"))
        }
    }
}
