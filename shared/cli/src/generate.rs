//! `TOOL --generate man|bash|zsh|fish`: the man page and the shell completions, from the same definition as `--help`.

use crate::{EXIT_STATUS, Error, Result, config::CONFIGURATION};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use std::{ffi::OsString, io};

/// Returns what `--generate KIND` or `--generate=KIND`, as the only argument, asks for.
pub(crate) fn asked(argv: &[OsString]) -> Option<String> {
    match argv {
        [_, flag, kind] if flag == "--generate" => Some(kind.to_string_lossy().into_owned()),
        [_, both] => both.to_str()?.strip_prefix("--generate=").map(str::to_string),
        _ => None,
    }
}

/// Returns the text for `kind`.
pub(crate) fn text(tool: &'static str, mut command: Command, kind: &str) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let shell = match kind {
        "man" => {
            man(tool, command, &mut out).map_err(|e| Error::internal(format!("man page: {e}")))?;
            return Ok(out);
        }
        "bash" => Shell::Bash,
        "zsh" => Shell::Zsh,
        "fish" => Shell::Fish,
        other => return Err(Error::usage(format!("--generate {other}: man, bash, zsh or fish"))),
    };
    clap_complete::generate(shell, &mut command, tool, &mut out);
    Ok(out)
}

/// One page for the whole tool: subcommands follow as sections of their own.
fn man(tool: &str, mut command: Command, out: &mut Vec<u8>) -> io::Result<()> {
    // A page has room for what the short help leaves out.
    command = everything(command);
    command.build();
    let subcommands: Vec<Command> =
        command.get_subcommands().filter(|c| c.get_name() != "help").cloned().collect();
    let page = Man::new(command.clone());
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    let mut description = Vec::new();
    page.render_description_section(&mut description)?;
    out.extend_from_slice(keep_layout(&description).as_bytes());
    page.render_options_section(out)?;
    for sub in subcommands {
        let heading = format!("\n.SH \"COMMAND {}\"\n", sub.get_name().to_uppercase());
        out.extend_from_slice(heading.as_bytes());
        let about =
            sub.get_long_about().or_else(|| sub.get_about()).map(ToString::to_string).unwrap_or_default();
        out.extend_from_slice(keep_layout(roff(&about).as_bytes()).as_bytes());
        let extra = sub.get_after_long_help().map(ToString::to_string).unwrap_or_default();
        Man::new(sub).render_options_section(out)?;
        out.extend_from_slice(sections(own_part(&extra)).as_bytes());
    }
    let extra = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    out.extend_from_slice(sections(&extra).as_bytes());
    out.extend_from_slice(format!(".SH VERSION\n{tool} {}\n", crate::version::number()).as_bytes());
    Ok(())
}

fn everything(command: Command) -> Command {
    command.mut_args(|arg| arg.hide_short_help(false)).mut_subcommands(everything)
}

/// A subcommand's text without what stands once, at the end of the page.
fn own_part(text: &str) -> &str {
    text.trim_end_matches(EXIT_STATUS).trim_end().trim_end_matches(CONFIGURATION)
}

/// The text behind the options, as laid out; a line at the margin that ends with a colon heads a section.
fn sections(text: &str) -> String {
    let mut out = String::from("\n");
    for line in text.lines() {
        match line.strip_suffix(':') {
            Some(heading) if !line.starts_with(' ') => {
                out += &format!(".fi\n.SH {}\n.nf\n", heading.to_uppercase())
            }
            _ => out += &roff(line),
        }
    }
    out + ".fi\n"
}

/// Keeps the layout of indented lines, which are lists and examples.
fn keep_layout(page: &[u8]) -> String {
    let mut out = String::new();
    let mut inside = false;
    for line in String::from_utf8_lossy(page).lines() {
        let indented = line.starts_with("  ");
        if indented != inside {
            out += if indented { ".nf\n" } else { ".fi\n" };
            inside = indented;
        }
        out += line;
        out.push('\n');
    }
    if inside { out + ".fi\n" } else { out }
}

/// Text as roff: a backslash is spelled out, a leading dot or quote is no request.
fn roff(text: &str) -> String {
    let escaped = |line: &str| line.replace('\\', "\\e").replace('-', "\\-");
    let mut lines = text.lines().map(escaped).collect::<Vec<_>>();
    if lines.is_empty() {
        lines.push(String::new());
    }
    lines
        .iter()
        .map(|line| if line.starts_with(['.', '\'']) { format!("\\&{line}\n") } else { format!("{line}\n") })
        .collect()
}
