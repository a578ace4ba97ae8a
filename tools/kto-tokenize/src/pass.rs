//! The pass over the inputs: batches of rows are read in order, tokenized in parallel, appended in order.

use crate::{
    encoder::{Before, Encoder, Ids},
    plan::Plan,
    report::Report,
    watch::Watch,
};
use kto_cli::{Context, Error, Result, escape, input, output};
use kto_formats::{
    jsonl::JsonLines,
    record::Record,
    rows::Row,
    template::ChatTemplate,
    tokenizer::TextTokenizer,
    tokens::{TokenMeta, TokenRow, TokenSpool, prompt_hash},
};
use rayon::prelude::*;
use std::path::Path;

/// Rows that are in memory as JSON at a time.
const BATCH: usize = 1024;
/// Compiling and rendering a template needs a deep stack.
const STACK: usize = 256 << 20;

/// Reads and tokenizes everything. Errors carry `name:line`.
pub fn run(plan: &Plan, watch: &Watch) -> Result<(TokenSpool, Report)> {
    let encoder = watch.over(None, 0, || encoder(plan))?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(plan.threads).stack_size(STACK);
    let pool = pool.thread_name(|i| format!("tokenize-{i}")).build();
    let pool = pool.map_err(Error::threads)?;
    let meta = TokenMeta {
        tokenizer: encoder.tokenizer.fingerprint().into(),
        vocab_size: encoder.tokenizer.vocab_size(),
        max_length: plan.max_length,
        ..TokenMeta::default()
    };
    let report = Report::new(encoder.tokenizer.notes.clone(), encoder.tokenizer.max_length());
    let mut pass =
        Pass { plan, watch, pool, encoder, set: TokenSpool::new(meta).map_err(|e| spooling(&e))?, report };
    for path in &plan.inputs {
        pass.input(input::open(path)?)?;
    }
    pass.finish()
}

/// Loads the tokenizer.
pub fn encoder(plan: &Plan) -> Result<Encoder> {
    let tokenizer = TextTokenizer::from_model_dir(&plan.model)?;
    let eos = plan.eos.clone().or_else(|| tokenizer.eos_token().map(str::to_string));
    if let Some(eos) = plan.eos.as_deref().filter(|eos| tokenizer.id(eos).is_none()) {
        return Err(Error::data(format!("--eos: the tokenizer has no token \"{}\"", escape(eos))));
    }
    Ok(Encoder {
        tokenizer,
        template: None,
        eos,
        allow_special: plan.allow_special,
        train_on: plan.train_on,
        continue_final: plan.continue_final,
    })
}

/// Loads the chat template.
pub fn template(plan: &Plan) -> Result<ChatTemplate> {
    let mut template = ChatTemplate::load(&plan.model, plan.template.as_deref())?;
    if let Some(seconds) = plan.now {
        template.set_now(seconds);
    }
    Ok(template)
}

/// Returns whether a row is conversational: only such rows need a template.
pub fn is_chat(row: &Row) -> bool {
    row.value.as_ref().is_ok_and(|v| v.get("prompt").is_some_and(|p| p.is_array()))
}

struct Pass<'a> {
    plan: &'a Plan,
    watch: &'a Watch,
    pool: rayon::ThreadPool,
    encoder: Encoder,
    set: TokenSpool,
    report: Report,
}

impl Pass<'_> {
    fn input(&mut self, input: input::Input) -> Result<()> {
        let name = input.name.clone();
        self.watch.enter_input(&name);
        let mut lines = JsonLines::new(input);
        let mut batch = Vec::new();
        loop {
            match lines.next_row() {
                Ok(Some(row)) => batch.push(row),
                // The rows before a broken place come first: one of them may be the first bad one.
                end => {
                    self.batch(&name, &mut batch)?;
                    return end.map(|_| ());
                }
            }
            if batch.len() == BATCH {
                self.batch(&name, &mut batch)?;
            }
        }
    }

    fn batch(&mut self, name: &str, rows: &mut Vec<Row>) -> Result<()> {
        self.load_template(rows)?;
        let (encoder, watch) = (&self.encoder, self.watch);
        let encode = |before: &mut Before, row: Row| {
            let line = row.line;
            let ids = watch.over(rayon::current_thread_index(), line, || encode(encoder, before, name, row));
            watch.add_done(1);
            (line, ids)
        };
        let done: Vec<(u64, Result<Vec<Ids>>)> = self
            .pool
            .install(|| rows.par_drain(..).with_max_len(16).map_init(Before::default, encode).collect());
        for (line, ids) in done {
            let place = format!("{}:{line}", escape(name));
            self.report.rows += 1;
            match ids {
                Ok(turns) => turns.into_iter().try_for_each(|ids| self.push(&place, ids))?,
                Err(error) if self.plan.skip_errors && error.kind() == kto_cli::Kind::Data => {
                    self.report.skip(error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Only conversational rows need a template, and a model without one can still take text.
    fn load_template(&mut self, rows: &[Row]) -> Result<()> {
        if self.encoder.template.is_some() || !rows.iter().any(is_chat) {
            return Ok(());
        }
        let plan = self.plan;
        let template = self.watch.over(None, 0, || template(plan))?;
        self.set.meta.template = template.fingerprint().into();
        self.encoder.template = Some(template);
        Ok(())
    }

    fn push(&mut self, place: &str, mut ids: Ids) -> Result<()> {
        let limit = self.plan.max_length as usize;
        self.report.turns += 1;
        self.report.note(place, &ids);
        if ids.prompt.len() >= limit {
            self.report.dropped.note(place);
            return Ok(());
        }
        if ids.prompt.len() + ids.completion.len() > limit {
            self.report.truncated.note(place);
        }
        self.report.measure(&ids);
        ids.completion.truncate(limit);
        let row = TokenRow {
            prompt_ids: &ids.prompt,
            completion_ids: &ids.completion,
            label: ids.label,
            prompt_hash: prompt_hash(&ids.prompt),
        };
        self.set.push(row).map_err(|e| spooling(&e))
    }

    fn finish(mut self) -> Result<(TokenSpool, Report)> {
        self.set.meta.dropped = self.report.dropped.count;
        self.set.meta.truncated = self.report.truncated.count;
        if self.set.is_empty() && !self.plan.allow_empty {
            let error = Error::data(self.report.nothing_left());
            return Err(match self.report.dropped.count {
                0 => error.with_hint("--allow-empty writes a token file without rows"),
                _ => error.with_hint(format!("--max-length {} keeps more", 2 * self.plan.max_length)),
            });
        }
        Ok((self.set, self.report))
    }
}

/// The error of the temporary file that holds batches.
fn spooling(error: &std::io::Error) -> Error {
    output::error(Path::new("temporary file"), error)
        .with_hint("TMPDIR=DIR names a directory with more space")
}

/// Returns the rows of a record. Errors carry `name:line`.
pub fn encode(encoder: &Encoder, before: &mut Before, name: &str, row: Row) -> Result<Vec<Ids>> {
    let line = row.line;
    let value = row.value?;
    Record::from_value(value)
        .and_then(|record| encoder.encode(&record, before))
        .at(format_args!("{}:{line}", escape(name)))
}
