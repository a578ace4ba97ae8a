//! `TOOL --generate man|bash|zsh|fish`: the man page and the shell completions, from the same definition as `--help`.

use crate::{Error, Result};
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
    command.build();
    let subcommands: Vec<Command> =
        command.get_subcommands().filter(|c| c.get_name() != "help").cloned().collect();
    let page = Man::new(command.clone());
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    page.render_options_section(out)?;
    for sub in subcommands {
        let heading = format!("\n.SH \"COMMAND {}\"\n", sub.get_name().to_uppercase());
        out.extend_from_slice(heading.as_bytes());
        let about =
            sub.get_long_about().or_else(|| sub.get_about()).map(ToString::to_string).unwrap_or_default();
        out.extend_from_slice(roff(&about).as_bytes());
        Man::new(sub).render_options_section(out)?;
    }
    out.extend_from_slice(b"\n.SH EXTRA\n.nf\n");
    let extra = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    out.extend_from_slice(roff(&extra).as_bytes());
    out.extend_from_slice(format!("\n.fi\n.SH VERSION\n{tool} {}\n", crate::version::number()).as_bytes());
    Ok(())
}

/// Text as roff: a backslash is doubled, a leading dot or quote is no request.
fn roff(text: &str) -> String {
    text.lines()
        .map(|line| {
            let line = line.replace('\\', "\\\\").replace('-', "\\-");
            if line.starts_with(['.', '\'']) { format!("\\&{line}\n") } else { format!("{line}\n") }
        })
        .collect()
}
