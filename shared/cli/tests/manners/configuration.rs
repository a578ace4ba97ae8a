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

/// What a file or a variable turns on, a flag turns off.
#[test]
fn a_switch_is_turned_off_by_a_flag() {
    let dir = with("keep = true\n");
    let last = |arguments: &[&str], environment: &[(&str, &str)]| {
        let told = told(dir.path(), &[&["--config", "p.toml"], arguments].concat(), environment);
        told.split(' ').find(|word| word.starts_with("keep=")).unwrap().to_string()
    };
    assert_eq!(last(&[], &[]), "keep=true");
    for flag in ["--no-keep", "--no_keep", "--keep=false", "--keep=0"] {
        assert_eq!(last(&[flag], &[]), "keep=false", "{flag}");
        assert_eq!(last(&[flag], &[("KTO_KEEP", "1")]), "keep=false", "{flag}");
    }
    assert_eq!(last(&["--no-keep", "--keep"], &[]), "keep=true");
    let again = with("again = true\n");
    assert_eq!(told(again.path(), &["--config", "p.toml"], &[]), "again=Some(\"ever\")");
    assert!(told(again.path(), &["--config", "p.toml", "--no-again"], &[]).starts_with("lr="));
    // What it contradicts is free.
    assert!(told(dir.path(), &["--config", "p.toml", "--no-keep", "--drop"], &[]).contains("drop=true"));
    let arguments = ["tell", "--config", "p.toml", "--no-keep", "--no-again", "--print-config"];
    let printed = run(dir.path(), &arguments, &[]);
    let line =
        |key: &str| text(&printed.stdout).lines().find(|line| line.contains(key)).unwrap().replace("  ", "");
    assert!(line("keep").starts_with("keep = false") && line("keep").ends_with("# flag"), "{}", line("keep"));
    assert!(line("again").starts_with("# again is not set"), "{}", line("again"));
    assert_eq!(refused("", &["--keep=perhaps"], &[]).0, 2);
    assert_eq!(refused("", &["--no-rank"], &[]).0, 2);
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
fn a_complaint_of_the_tool_names_where_the_value_came_from() {
    let said = "--rank has a meaning with --keep only\n";
    let hint = "hint: probe --help\n";
    for (config, arguments, environment, code, expected) in [
        ("", &["--rank", "4"][..], &[][..], 2, format!("probe: {said}{hint}")),
        ("", &[], &[("KTO_RANK", "4")], 78, format!("probe: KTO_RANK=4: {said}")),
        ("\nrank = 4\n", &[], &[], 78, format!("probe: p.toml:2: {said}")),
        ("rank = 3\n", &["--rank", "4"], &[], 2, format!("probe: {said}{hint}")),
    ] {
        let dir = with(config);
        let all = [&["contradiction", "--config", "p.toml"], arguments].concat();
        let out = run(dir.path(), &all, environment);
        assert_eq!((out.status.code(), text(&out.stderr)), (Some(code), expected.as_str()), "{config}");
    }
    let dir = with("files = 'none/x'\n[probe]\nout = 'none/y'\n");
    let out = run(dir.path(), &["copy", "--config=p.toml", "-o", "y"], &[]);
    assert_eq!(out.status.code(), Some(66));
    let out = run(dir.path(), &["lines", "--config=p.toml"], &[]);
    assert_eq!(out.status.code(), Some(73));
    assert!(text(&out.stderr).starts_with("probe: p.toml:3: none/y: "), "{}", text(&out.stderr));
    let out = run(dir.path(), &["lines"], &[("KTO_OUT", "none/z")]);
    assert!(text(&out.stderr).starts_with("probe: KTO_OUT: none/z: "), "{}", text(&out.stderr));
}

#[test]
fn a_misspelt_variable_is_named_and_others_are_not() {
    let dir = with("");
    let warned = |name: &str, value: &str| {
        let out = run(dir.path(), &["tell"], &[(name, value)]);
        assert_eq!(out.status.code(), Some(0), "{name}");
        text(&out.stderr).to_string()
    };
    for (name, near) in [
        ("KTO_RNAK", "KTO_RANK"),
        ("KTO_LERNING_RATE", "KTO_LEARNING_RATE"),
        ("KTO_QIUET", "KTO_QUIET"),
        ("KTO_FROM_MANIFST", "KTO_FROM_MANIFEST"),
    ] {
        let said = format!("probe: warning: {name} is no variable of the KTO tools; {near} is\n");
        assert_eq!(warned(name, "0"), said);
    }
    // Set to nothing; another tool's, though it is like KTO_NOTE; nobody's; a word of its own; one in another case.
    for (name, value) in
        [("KTO_RNAK", ""), ("KTO_NOW", "1"), ("KTO_MY_PROJECT", "x"), ("KTO_HOME", "/x"), ("kto_rnak", "1")]
    {
        assert_eq!(warned(name, value), "", "{name}");
    }
    let out = run(dir.path(), &["tell", "-q"], &[("KTO_RNAK", "3")]);
    assert_eq!(text(&out.stderr), "");
    let out = run(dir.path(), &["tell", "--print-config"], &[("KTO_RNAK", "3")]);
    assert!(out.status.success() && text(&out.stderr).contains("KTO_RANK is"), "{}", text(&out.stderr));
}

#[test]
fn other_names_of_a_flag_are_variables_and_keys_too() {
    let dir = with("learning_rate = 3\n");
    assert!(told(dir.path(), &[], &[("KTO_LEARNING_RATE", "2")]).starts_with("lr=2 "));
    assert!(told(dir.path(), &["--config=p.toml"], &[]).starts_with("lr=3 "));
    assert!(told(dir.path(), &["--learning_rate", "1"], &[]).starts_with("lr=1 "));
    assert!(told(dir.path(), &["--learning_rate=1", "--note", "a_b"], &[]).contains("note=Some(\"a_b\")"));
    let out = run(dir.path(), &["tell", "--learning__rate", "1"], &[]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("'--learning__rate'"), "{}", text(&out.stderr));
}

#[test]
fn an_option_whose_value_may_be_missing_is_also_a_switch() {
    let dir = with("");
    for (value, expected) in [("1", "ever"), ("true", "ever"), ("on", "ever"), ("2", "2"), ("10m", "10m")] {
        let said = format!("again=Some(\"{expected}\")");
        assert_eq!(told(dir.path(), &[], &[("KTO_AGAIN", value)]), said);
    }
    for value in ["0", "no", ""] {
        assert!(told(dir.path(), &[], &[("KTO_AGAIN", value)]).starts_with("lr="), "{value}");
    }
}

#[test]
fn a_manifest_can_be_a_variable() {
    let dir = with("lr = 9\n");
    let manifest = "{\"tool\": \"probe\", \"configuration\": {\"job\": \"tell\", \"lr\": 2}}";
    fs::write(dir.path().join("m.json"), manifest).unwrap();
    let variable = ("KTO_FROM_MANIFEST", "m.json");
    let of = |arguments: &[&str], environment: &[(&str, &str)]| {
        let out = run(dir.path(), arguments, environment);
        (out.status.code().unwrap(), format!("{}{}", text(&out.stdout), text(&out.stderr)))
    };
    // Other variables do not touch a run that is repeated.
    let (code, said) = of(&[], &[variable, ("KTO_LR", "7"), ("KTO_QUIET", "1")]);
    assert!(code == 0 && said.starts_with("lr=2 "), "{said}");
    let (code, said) = of(&["tell", "--lr=3"], &[variable]);
    assert!(code == 0 && said.starts_with("lr=3 "), "{said}");
    assert_eq!(of(&[], &[("KTO_FROM_MANIFEST", "none.json")]).0, 66);
    // A file of configuration beside it is as wrong as beside the flag.
    for (arguments, environment, wrong) in [
        (&["--config=p.toml"][..], &[variable][..], true),
        (&[], &[variable, ("KTO_CONFIG", "p.toml")], true),
        (&["--from-manifest=m.json"], &[("KTO_CONFIG", "p.toml")], false),
    ] {
        let (code, said) = of(arguments, environment);
        // Of two variables the one that clap meets last is named.
        let found = said.starts_with("probe: KTO_") && said.contains("cannot be used with");
        assert_eq!((code, found), if wrong { (78, true) } else { (0, false) }, "{arguments:?}: {said}");
    }
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
