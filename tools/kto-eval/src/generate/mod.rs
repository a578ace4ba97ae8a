//! `kto-eval generate`: prompts in, answers out, in the same order.

mod answer;
mod encode;
mod prompts;
mod room;
mod stops;

use crate::{
    args::GenerateArgs,
    models::{Policy, set_threads},
};
use answer::Answer;
use encode::Encoder;
use kto_cli::{
    Common, Context, Error, Exit, Record, Result, Ui, input, output,
    output::Output,
    signal::{self, AtOnce},
};
use kto_formats::template::ChatTemplate;
use kto_kernels::random;
use kto_model::{
    generate::{Request, Sampling, generate_batch},
    partners::purpose,
};
use prompts::{Prompt, Prompts};
use room::Room;
use std::{io::Write, path::Path};
use stops::Stops;

/// Positions to begin with; more are made when a prompt needs them.
const POSITIONS: usize = 512;

/// Runs `kto-eval generate`.
pub fn run(args: &GenerateArgs, common: &Common, ui: &Ui) -> Result<Exit> {
    let paths = input::or_stdin(&args.files)?;
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::usage("--stop: an empty text would end every answer at once"));
    }
    let mut record = Record::new(common);
    record.output(args.output.as_deref());
    record.files(&paths);
    if let Some(choice) = &args.chat_template {
        record.files(&ChatTemplate::file_of_choice(&args.model.model, choice)?);
    }
    record.check()?;
    set_threads(args.model.threads)?;
    let mut policy = Policy::open(&args.model, POSITIONS, ui)?;
    policy.note(&args.model, &mut record);
    record.check_sides()?;
    let encoder = match args.ids {
        true => None,
        false => Some(Encoder::open(args, ui)?),
    };
    let stops = Stops::read(&args.model.model, encoder.as_ref().and_then(Encoder::eos_id))?;
    let mut prompts = Prompts::new(paths, args)?;
    let mut out = Output::create(args.output.as_deref())?.if_changed(common.make.if_changed);
    let progress = ui.progress(0, "tokens");
    let mut room = Room::new(policy.base.architecture.max_positions, args.max_new_tokens as usize);
    let mut outcome = Ok(true);
    while let Ok(true) = outcome {
        let mut batch = Vec::new();
        // What came before a bad row is answered before the error is reported, whatever the batch.
        outcome = read_batch(&mut prompts, encoder.as_ref(), &mut policy, (args, &mut room), &mut batch);
        let job = Job { args, policy: &policy, encoder: encoder.as_ref(), stops: &stops };
        for (prompt, answer) in batch.iter().zip(job.answer(&batch, &progress)?) {
            answer.write(&prompt.prompt, args, &mut out)?;
        }
        if let Output::Stdout(out) = &mut out {
            out.flush().map_err(|e| output::error(Path::new("standard output"), &e))?;
        }
    }
    room.print(ui);
    outcome?;
    room.check()?;
    out.finish()?;
    record.finish()?;
    Ok(Exit::Ok)
}

/// A prompt and its tokens.
struct Ready {
    prompt: Prompt,
    ids: Vec<u32>,
    /// Tokens that its answer may have; 0 where the model has no room for any.
    limit: usize,
}

/// Reads and encodes the next prompts; false at the end of the input. Errors carry the prompt's place.
fn read_batch(
    prompts: &mut Prompts,
    encoder: Option<&Encoder>,
    policy: &mut Policy,
    (args, room): (&GenerateArgs, &mut Room),
    batch: &mut Vec<Ready>,
) -> Result<bool> {
    let is_piped = args.files.is_empty() || args.files.iter().any(|p| p == Path::new("-"));
    while batch.len() < args.batch as usize {
        let prompt = {
            // Whoever types or pipes prompts may take long.
            let _at_once = is_piped.then(AtOnce::begin);
            prompts.next()?
        };
        let Some(prompt) = prompt else { return Ok(false) };
        let ids = match (encoder, &prompt.ids) {
            (Some(encoder), _) => encoder.encode(&prompt).at(&prompt.place)?,
            (None, ids) => ids.clone(),
        };
        if ids.is_empty() {
            return Err(Error::data("the prompt has no tokens")).at(&prompt.place);
        }
        policy.base.architecture.check_ids(&ids, "prompt").at(&prompt.place)?;
        let limit = room.of(ids.len(), &prompt.place);
        if limit > 0 {
            policy.reserve(ids.len() + limit)?;
        }
        batch.push(Ready { prompt, ids, limit });
    }
    Ok(true)
}

/// What answers a batch.
struct Job<'a> {
    args: &'a GenerateArgs,
    policy: &'a Policy,
    encoder: Option<&'a Encoder>,
    stops: &'a Stops,
}

impl Job<'_> {
    fn answer(&self, batch: &[Ready], progress: &kto_cli::Progress) -> Result<Vec<Answer>> {
        let requests: Vec<Request> = batch.iter().map(|r| self.request(r)).collect();
        let stop = |i: usize, made: &[u32]| {
            signal::check()?;
            progress.add(1);
            if made.last().is_some_and(|id| self.stops.contains(*id)) {
                return Ok(true);
            }
            match self.encoder {
                Some(encoder) if !self.args.stop.is_empty() => {
                    let tail = &made[made.len().saturating_sub(self.stop_tokens())..];
                    Ok(answer::find_stop(&encoder.completion(&batch[i].ids, tail)?, &self.args.stop)
                        .is_some())
                }
                _ => Ok(false),
            }
        };
        let made = generate_batch(&self.policy.base, self.policy.lora.as_ref(), &requests, stop)?;
        let answer = |(ready, (ids, stopped)): (&Ready, (Vec<u32>, bool))| {
            if ready.limit == 0 {
                return Ok(Answer::too_long());
            }
            Answer::new(&ready.ids, ids, stopped, self.stops, self.encoder, &self.args.stop)
                .at(&ready.prompt.place)
        };
        batch.iter().zip(made).map(answer).collect()
    }

    fn request<'r>(&self, ready: &'r Ready) -> Request<'r> {
        let seed = random::key(&[self.args.seed, purpose("generate"), ready.prompt.number]);
        let sampling = Sampling { temperature: self.args.temperature, top_p: self.args.top_p, seed };
        // What gets no answer takes no place in the caches.
        let prompt = if ready.limit == 0 { &[][..] } else { &ready.ids };
        Request { prompt, limit: ready.limit, sampling }
    }

    /// Tokens at the end of an answer that are sure to hold a stop text that has just been completed: a token that
    /// shows at all shows at least a byte, and a few show nothing until the next.
    fn stop_tokens(&self) -> usize {
        self.args.stop.iter().map(String::len).max().unwrap_or(0) + 8
    }
}
