//! From `main` to an exit code: the frame around every tool.

use crate::{
    Common, Context, EXIT_STATUS, Error, Exit, Kind, Result, Ui,
    config::{self, CONFIGURATION, Found, Resolution, Wrong},
    foreign, generate, guard,
    output::Output,
    signal, tool as running,
    ui::{self, report},
    underscores, version,
};
use clap::{
    ColorChoice, Command, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};
use std::{
    backtrace::{Backtrace, BacktraceStatus},
    env,
    ffi::OsString,
    io::{self, IsTerminal},
    panic::{self, AssertUnwindSafe, PanicHookInfo},
    path::Path,
    process::ExitCode,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// Parses the arguments, runs the tool, prints its one error line, returns the exit code.
///
/// Help and version go to standard output, usage errors end with 2, a panic with 70 and one line. Every tool also gets
/// the exit-code table in its long help, `--version`, and `--generate man|bash|zsh|fish`.
pub fn run<A: Parser>(
    tool: &'static str,
    common: impl Fn(&A) -> &Common,
    body: impl FnOnce(A, &Ui) -> Result<Exit>,
) -> ExitCode {
    running::set_name(tool);
    signal::soften_file_size_limit();
    set_panic_hook(tool, signal::out_of_memory_is_71());
    let argv: Vec<OsString> = env::args_os().collect();
    let mut colour = ui::colour(color_flag(&argv), io::stderr().is_terminal());
    let mut origins = Resolution::default();
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| {
        let command = dress(tool, A::command());
        let argv = underscores::without(&command, argv);
        if let Some(kind) = generate::asked(&argv) {
            return print(&generate::text(tool, command, &kind)?);
        }
        let (args, resolution) = match parse::<A>(tool, command, &argv)? {
            Parsed::Args(args, resolution) => (args, resolution),
            Parsed::Shown => return Ok(Exit::Ok),
        };
        colour = ui::colour(common(&args).color, io::stderr().is_terminal());
        let ui = Ui::new(tool, common(&args));
        resolution.warnings.iter().for_each(|text| ui.warn(text));
        origins = resolution.clone();
        let _ = common(&args).make.resolution.set(resolution);
        body(args, &ui)
    }));
    let result = outcome.unwrap_or_else(|payload| match payload.downcast::<Error>() {
        Ok(error) => Err(*error),
        Err(_) => Err(Error::internal("")), // The panic hook has printed the line.
    });
    ExitCode::from(finish(tool, result.map_err(|error| origins.placed(error)), colour))
}

enum Parsed<A> {
    Args(A, Resolution),
    /// Help, version or the configuration was printed.
    Shown,
}

fn finish(tool: &'static str, result: Result<Exit>, colour: bool) -> u8 {
    match result {
        Ok(exit) => exit.code(),
        Err(error) => {
            let silent = error.kind() == Kind::ClosedPipe || error.to_string().is_empty();
            let bare_usage = error.kind() == Kind::Usage && error.hint().is_none();
            let error = if bare_usage { error.with_hint(format!("{tool} --help")) } else { error };
            if !silent {
                report(tool, &error, colour);
            }
            error.kind().code()
        }
    }
}

/// Adds to a tool's definition what all tools have.
fn dress(tool: &'static str, command: Command) -> Command {
    static VERSION: OnceLock<String> = OnceLock::new();
    let command = command.name(tool).version(version::number()).max_term_width(100);
    with_exit_status(command)
        .long_version(VERSION.get_or_init(version::long).as_str())
        .mut_subcommands(with_exit_status)
}

fn with_exit_status(command: Command) -> Command {
    let own = command.get_after_long_help().map(|text| format!("{}\n\n", text.ansi())).unwrap_or_default();
    command.after_long_help(format!("{own}{CONFIGURATION}\n\n{EXIT_STATUS}"))
}

fn parse<A: Parser>(tool: &'static str, mut command: Command, argv: &[OsString]) -> Result<Parsed<A>> {
    let (error, place) = match config::resolve(tool, &command, argv) {
        Ok(Found::Print(text, warnings)) => {
            warnings.iter().for_each(|w| ui::say(format_args!("{tool}: warning: {w}")));
            return print(text.as_bytes()).map(|_| Parsed::Shown);
        }
        Ok(Found::Run(matches, resolution)) => match A::from_arg_matches(&matches) {
            Ok(args) => return Ok(Parsed::Args(args, resolution)),
            Err(error) => (error, None),
        },
        Err(Wrong::Other(error)) => return Err(error),
        Err(Wrong::Line(error)) => (error, None),
        Err(Wrong::Place(error, place)) => (error, Some(place)),
    };
    let error = error.format(&mut command);
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let text = error.render();
            let colour = ui::colour(color_flag(argv), io::stdout().is_terminal());
            print(if colour { text.ansi().to_string() } else { text.to_string() }.as_bytes())?;
            Ok(Parsed::Shown)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Err(Error::usage("no command")),
        kind => {
            let typed = match error.get(ContextKind::InvalidArg) {
                Some(ContextValue::String(name)) if kind == ErrorKind::UnknownArgument => name.as_str(),
                _ => "",
            };
            let said = usage(&error.render().to_string());
            // The most similar of our names is not what another program's option means.
            let error = match foreign::hint(tool, typed) {
                Some(hint) => said.with_hint(hint),
                None => said,
            };
            match place {
                Some(place) => Err(error.with_kind(Kind::Config)).at(place),
                None => Err(error),
            }
        }
    }
}

/// Turns clap's paragraphs into one line and a hint.
fn usage(text: &str) -> Error {
    let mut lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let first = lines.next().unwrap_or("wrong arguments");
    let rest: Vec<&str> = lines.collect();
    let mut message = first.strip_prefix("error: ").unwrap_or(first).to_string();
    if !rest.is_empty() {
        message += " ";
        message += &rest.join(if first.ends_with(':') { ", " } else { " " });
    }
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    match tip {
        Some(tip) => Error::usage(message).with_hint(tip),
        None => Error::usage(message),
    }
}

fn print(bytes: &[u8]) -> Result<Exit> {
    let mut out = Output::create(Some(Path::new("-")))?;
    out.write(bytes)?;
    out.finish()?;
    Ok(Exit::Ok)
}

/// The value of `--color` before the arguments are parsed; nonsense is found by the parser.
fn color_flag(argv: &[OsString]) -> ColorChoice {
    let mut choice = ColorChoice::Auto;
    for (i, arg) in argv.iter().enumerate() {
        let value = match arg.to_str() {
            Some("--") => break,
            Some("--color") => argv.get(i + 1).and_then(|v| v.to_str()),
            Some(text) => text.strip_prefix("--color="),
            None => None,
        };
        match value {
            Some("always") => choice = ColorChoice::Always,
            Some("never") => choice = ColorChoice::Never,
            _ => {}
        }
    }
    choice
}

fn set_panic_hook(tool: &'static str, out_of_memory: Arc<AtomicBool>) {
    panic::set_hook(Box::new(move |info| {
        if guard::is_silent() {
            return;
        }
        out_of_memory.store(false, Ordering::Relaxed);
        ui::say(format_args!("{tool}: internal error: {} ({}); please report", words(info), place(info)));
        let trace = Backtrace::capture(); // Only when RUST_BACKTRACE asks for it.
        if trace.status() == BacktraceStatus::Captured {
            ui::say(trace);
        }
    }));
}

fn words(info: &PanicHookInfo<'_>) -> String {
    match info.payload().downcast_ref::<Error>() {
        Some(error) => error.to_string(),
        None => guard::panic_text(info.payload()),
    }
}

/// File and line, without the folders of the machine that built it.
fn place(info: &PanicHookInfo<'_>) -> String {
    let Some(location) = info.location() else { return "unknown place".into() };
    let parts: Vec<&str> = location.file().rsplit('/').take(3).collect();
    let file = parts.into_iter().rev().collect::<Vec<_>>().join("/");
    format!("{file}:{}, {} {}", location.line(), version::number(), version::revision())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_paragraphs_become_one_line() {
        let missing = "error: the following required arguments were not provided:\n  --model <DIR>\n  --out <DIR>\n\nUsage: x\n";
        assert_eq!(
            usage(missing).to_string(),
            "the following required arguments were not provided: --model <DIR>, --out <DIR>"
        );
        let typo = "error: unexpected argument '--modle' found\n\n  tip: a similar argument exists: '--model'\n\nUsage: x\n";
        assert_eq!(usage(typo).to_string(), "unexpected argument '--modle' found");
        assert_eq!(usage(typo).hint(), Some("a similar argument exists: '--model'"));
        let value = "error: invalid value 'x' for '--order <O>'\n  [possible values: a, b]\n\nFor more";
        assert_eq!(usage(value).to_string(), "invalid value 'x' for '--order <O>' [possible values: a, b]");
    }

    #[test]
    fn the_color_flag_is_seen_before_parsing() {
        let of = |words: &[&str]| color_flag(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(of(&["x", "--color", "always"]), ColorChoice::Always);
        assert_eq!(of(&["x", "--color=never"]), ColorChoice::Never);
        assert_eq!(of(&["x", "--", "--color=never"]), ColorChoice::Auto);
    }
}
