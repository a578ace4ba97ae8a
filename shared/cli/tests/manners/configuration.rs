//! Flag, environment, file, default: which value counts, and what is said about a wrong one.

use super::{probe, text};
use std::{fs, path::Path, process::Output};
use tempfile::TempDir;

/// A directory with a file `p.toml`.
fn with(config: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("p.toml"), config).unwrap();
    dir
}

fn run(dir: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    probe(arguments).current_dir(dir).envs(environment.iter().copied()).output().unwrap()
}

/// What the probe was told, or its complaint.
fn told(dir: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let out = run(dir, &[&["tell"], arguments].concat(), environment);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    text(&out.stdout).trim_end().into()
}

/// Exit code and standard error.
fn refused(config: &str, arguments: &[&str], environment: &[(&str, &str)]) -> (i32, String) {
    let dir = with(config);
    let out = run(dir.path(), &[&["tell", "--config", "p.toml"], arguments].concat(), environment);
    assert_eq!(text(&out.stdout), "");
    (out.status.code().unwrap(), text(&out.stderr).into())
}

#[test]
fn flag_then_environment_then_file_then_default() {
    let dir = with("lr = 3.0\nrank = 3\n");
    let both = ["--config", "p.toml"];
    let lr = |arguments: &[&str], environment: &[(&str, &str)]| {
        told(dir.path(), arguments, environment).split(' ').next().unwrap().to_string()
    };
    assert_eq!(lr(&[], &[]), "lr=0.5");
    assert_eq!(lr(&both, &[]), "lr=3");
    assert_eq!(lr(&[], &[("KTO_CONFIG", "p.toml")]), "lr=3");
    assert_eq!(lr(&both, &[("KTO_LR", "2")]), "lr=2");
    assert_eq!(lr(&both, &[("KTO_LR", "")]), "lr=3");
    assert_eq!(lr(&[&both[..], &["--lr", "1"]].concat(), &[("KTO_LR", "2")]), "lr=1");
    assert_eq!(lr(&[&both[..], &["--learning-rate=1"]].concat(), &[("KTO_LR", "2")]), "lr=1");
}

#[test]
fn every_form_of_a_value() {
    let dir = with(
        "learning-rate = 1e-5\nrank = 0x10\ntags = [\"a\", \"b\"]\nnote = \"-x # \\\"=\\u00e9\"\nhow = 'slow'\nkeep = true\ndrop = false\n",
    );
    let expected = "lr=0.00001 rank=Some(16) tags=[\"a\", \"b\"] note=Some(\"-x # \\\"=é\") how=Some(Slow) keep=true drop=false";
    assert_eq!(told(dir.path(), &["--config=p.toml"], &[]), expected);
    let environment = [
        ("KTO_LR", "1e-5"),
        ("KTO_RANK", "16"),
        ("KTO_TAGS", "a,b"),
        ("KTO_NOTE", "-x # \"=é"),
        ("KTO_HOW", "slow"),
        ("KTO_KEEP", "yes"),
        ("KTO_DROP", "0"),
    ];
    assert_eq!(told(dir.path(), &[], &environment), expected);
    let flags = ["--lr=1e-5", "--rank=16", "--tags=a,b", "--note=-x # \"=é", "--how", "slow", "--keep"];
    assert_eq!(told(dir.path(), &flags, &[]), expected);
    // A switch of the file is turned off by the environment.
    assert!(
        told(dir.path(), &["--config=p.toml"], &[("KTO_KEEP", "off")]).ends_with("keep=false drop=false")
    );
}

#[test]
fn tables_are_for_one_tool() {
    let dir = with(
        "rank = 1\n[kto-train]\nnever-heard-of = 1\n[probe]\nrank = 2\nlr = 2\n[kto-eval.score]\nx = 1\n",
    );
    assert!(told(dir.path(), &["--config", "p.toml"], &[]).starts_with("lr=2 rank=Some(2)"));
    let (code, said) = refused("[prob]\nrank = 2\n", &[], &[]);
    assert_eq!(
        (code, said.as_str()),
        (78, "probe: p.toml:1: unknown table \"prob\"\nhint: did you mean \"probe\"?\n")
    );
}

#[test]
fn a_wrong_file_is_78_with_its_line() {
    for (config, said) in [
        ("# x\n\nrnak = 1\n", "p.toml:3: unknown key \"rnak\"\nhint: did you mean \"rank\"?\n"),
        ("zzzzzz = 1\n", "p.toml:1: unknown key \"zzzzzz\"\n"),
        ("config = 'x'\n", "p.toml:1: unknown key \"config\"\n"),
        ("lr = true\n", "p.toml:1: \"lr\" must be a number or string, found true\n"),
        ("\nlr = 'fast'\n", "p.toml:2: invalid value 'fast' for '--lr <X>': not a number\n"),
        ("lr = -1\n", "p.toml:1: invalid value '-1' for '--lr <X>': must be above 0\n"),
        ("keep = 1\n", "p.toml:1: \"keep\" must be true or false, found a number\n"),
        ("note = 3\n", "p.toml:1: \"note\" must be a string, found a number\n"),
        ("rank = [1]\n", "p.toml:1: \"rank\" must be a number or string, found a list\n"),
        ("tags = [1]\n", "p.toml:1: \"tags\" must be a list of strings, found a list\n"),
        ("tags = []\n", "p.toml:1: \"tags\" must be a string, found an empty list\n"),
        ("note = 2020-01-01\n", "p.toml:1: \"note\" must be a string, found a date\n"),
        ("[probe]\nlr = {a = 1}\n", "p.toml:2: \"lr\" must be a number or string, found a table\n"),
        ("verbose = 999\n", "p.toml:1: \"verbose\" must be a small whole number, found a number\n"),
        ("how = 'odd'\n", "p.toml:1: invalid value 'odd' for '--how <HOW>' [possible values: fast, slow]\n"),
    ] {
        let (code, found) = refused(config, &[], &[]);
        let found = found.strip_prefix("probe: ").unwrap().to_string();
        let found = found.strip_suffix("hint: probe --help\n").map(str::to_string).unwrap_or(found);
        assert_eq!((code, found.as_str()), (78, said), "{config}");
    }
    let (code, said) = refused("lr = \n", &[], &[]);
    assert!(code == 78 && said.starts_with("probe: p.toml:1: not TOML: "), "{said}");
    let out = run(with("").path(), &["tell", "--config", "none.toml"], &[]);
    assert_eq!(out.status.code(), Some(66));
}

#[test]
fn a_wrong_variable_is_78_with_its_name() {
    for (name, value, said) in [
        ("KTO_LR", "fast", "KTO_LR: invalid value 'fast' for '--lr <X>': not a number\n"),
        ("KTO_KEEP", "maybe", "KTO_KEEP: --keep is on (1) or off (0), found \"maybe\"\n"),
        ("KTO_HOW", "odd", "KTO_HOW: invalid value 'odd' for '--how <HOW>' [possible values: fast, slow]\n"),
    ] {
        let (code, found) = refused("", &[], &[(name, value)]);
        assert_eq!((code, found.as_str()), (78, format!("probe: {said}").as_str()), "{name}");
    }
    // What is typed is wrong usage, as ever; and it hides a wrong variable.
    let (code, found) = refused("", &["--lr", "fast"], &[]);
    assert!(code == 2 && found.starts_with("probe: invalid value 'fast'"), "{found}");
    assert_eq!(told(with("").path(), &["--lr", "1"], &[("KTO_LR", "fast")]).split(' ').next(), Some("lr=1"));
}

#[test]
fn conflicts_and_requirements_see_every_layer() {
    let conflict = "the argument '--drop' cannot be used with '--keep'";
    let (code, said) = refused("keep = true\n", &["--drop"], &[]);
    assert!(code == 78 && said.contains("p.toml:1: ") && said.contains("cannot be used with"), "{said}");
    let (code, said) = refused("", &[], &[("KTO_KEEP", "1"), ("KTO_DROP", "1")]);
    assert!(code == 78 && said.contains("KTO_"), "{said}");
    let (code, said) = refused("", &["--keep", "--drop"], &[]);
    assert!(code == 2 && said.contains("cannot be used with"), "{said} ({conflict})");
    let dir = with("job = 'tell'\n");
    let out = run(dir.path(), &["--config", "p.toml"], &[]);
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), ""));
    let out = run(dir.path(), &["--lr", "1"], &[]);
    assert_eq!(out.status.code(), Some(2));
    assert!(
        text(&out.stderr).starts_with("probe: the following required arguments were not provided: <JOB>")
    );
}

#[test]
fn positional_arguments_come_from_the_file_when_none_is_typed() {
    let dir = with("job = 'copy'\nfiles = ['p.toml', '-odd']\n");
    fs::write(dir.path().join("-odd"), "odd\n").unwrap();
    let out = run(dir.path(), &["--config", "p.toml"], &[]);
    assert!(text(&out.stdout).ends_with("'-odd']\nodd\n"), "{}", text(&out.stderr));
    let out = run(dir.path(), &["--config", "p.toml", "copy", "--", "-odd"], &[]);
    assert_eq!(text(&out.stdout), "odd\n");
}

#[test]
fn what_is_printed_has_origins_and_gives_the_same_run() {
    let dir = with("\nlr = 1e-5\nnote = 'q\"\\'\nkeep = true\n");
    let arguments = ["--config=p.toml", "--tags=x,y z", "-vv"];
    let environment = [("KTO_RANK", "7"), ("KTO_KEEP", "0")];
    let out = run(dir.path(), &[&["tell", "--print-config"], &arguments[..]].concat(), &environment);
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), ""));
    let printed = text(&out.stdout);
    for line in [
        "[probe]",
        "job = \"tell\" # flag",
        "lr = 1e-5 # p.toml:2",
        "rank = 7 # KTO_RANK",
        "tags = [\"x\", \"y z\"] # flag",
        "note = \"q\\\"\\\\\" # p.toml:3",
        "keep = false # KTO_KEEP",
        "drop = false # default",
        "verbose = 2 # flag",
        "color = \"auto\" # default",
        "# how is not set",
    ] {
        let found = printed.lines().any(|l| l.split_whitespace().eq(line.split_whitespace()));
        assert!(found, "{line} in\n{printed}");
    }
    fs::write(dir.path().join("again.toml"), printed).unwrap();
    let first = run(dir.path(), &[&["tell"], &arguments[..]].concat(), &environment);
    let again = run(dir.path(), &["--config", "again.toml"], &[]);
    assert_eq!((text(&again.stdout), text(&again.stderr)), (text(&first.stdout), ""));
    // A default that is spelled out contradicts nothing.
    let out = run(dir.path(), &["tell", "--slow", "--print-config"], &[]);
    assert!(text(&out.stdout).contains("usual = \"fast\"") && text(&out.stdout).contains("slow = true"));
    fs::write(dir.path().join("again.toml"), &out.stdout).unwrap();
    assert!(told(dir.path(), &["--config", "again.toml"], &[]).contains("how=Some(Slow)"));
    let out = run(dir.path(), &["tell", "--slow", "--usual", "fast"], &[]);
    assert_eq!(out.status.code(), Some(2));
    // What is required may be missing; what is wrong may not.
    let out = run(dir.path(), &["--print-config"], &[]);
    assert!(out.status.success() && text(&out.stdout).contains("# job is not set\n"));
    assert_eq!(run(dir.path(), &["--print-config", "--lr=0"], &[]).status.code(), Some(2));
}
