//! What a run has read, and whether the run in --out is the one that is asked for (`--if-changed`).

use crate::{args::Args, plan::Plan, run_dir, shown, stored::Stored};
use kto_cli::{Error, Exit, Record, Result, output};

/// What --if-changed finds in --out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The run that is asked for, finished.
    Done,
    /// Another run, which --force gives up.
    Replace,
    /// No run, or one that is looked at without --if-changed too.
    GoOn,
}

/// Fails (73) when the rule for make or the copy of the manifest cannot be written.
pub fn check(args: &Args) -> Result<()> {
    let mut record = Record::new(&args.common);
    record.output(Some(&args.out));
    record.file(&args.data);
    args.eval_data.iter().for_each(|path| record.file(path));
    record.check()
}

/// Compares the plan of the run in --out. Error (78): it is another one, field by field, and --force is not given.
pub fn verdict(args: &Args, plan: &Plan) -> Result<Verdict> {
    let stored = Stored::read(&args.out).filter(|_| args.common.make.if_changed && !args.dry_run);
    // Of what was only being copied nothing is kept.
    let stored = stored.filter(|stored| stored.copied_from().is_none());
    let Some((stored, old)) = stored.as_ref().and_then(|stored| Some((stored, stored.plan()?))) else {
        return Ok(Verdict::GoOn);
    };
    let differences = run_dir::differences(old, plan);
    match (differences.is_empty(), stored.is_finished()) {
        (true, true) => Ok(Verdict::Done),
        (false, _) if args.force => Ok(Verdict::Replace),
        (false, true) => {
            let told = run_dir::told(&differences);
            let text = format!("{}: another run is in this directory: {told}", shown(&args.out));
            Err(Error::config(text).with_hint("--force to replace it, or another --out"))
        }
        (_, false) => Ok(Verdict::GoOn),
    }
}

/// Ends without touching the run.
pub fn done(args: &Args, plan: &Plan) -> Result<Exit> {
    run_dir::finish(&args.out, &record(args, plan))?;
    output::print_path(&args.out)?;
    Ok(Exit::Ok)
}

/// Returns what the run reads and writes.
pub fn record(args: &Args, plan: &Plan) -> Record {
    let mut record = Record::new(&args.common);
    record.known_model(&args.model_dir, plan.base.clone());
    record.file(&args.data);
    args.eval_data.iter().for_each(|path| record.file(path));
    args.init_adapter.iter().for_each(|path| record.directory(path));
    record
}
