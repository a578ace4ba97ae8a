//! Options of a subcommand from file, environment and manifest.

use super::{bytes, code, read_json, rows, run, scores::trl, text, tool, trl_tokens};
use std::fs;

/// `kto-eval score` on the golden tokens with a file of options and variables; standard output.
fn score(config: &str, more: &[&str], environment: &[(&str, &str)]) -> std::process::Output {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("e.toml"), config).unwrap();
    let tokens = dir.path().join("t.kto.arrow");
    fs::write(&tokens, bytes(&trl_tokens())).unwrap();
    let mut args = trl("--no-kl --config e.toml -q");
    args.push(tokens.display().to_string());
    args.extend(more.iter().map(|m| m.to_string()));
    tool().args(args).current_dir(&dir).envs(environment.iter().copied()).output().unwrap()
}

fn beta_of(output: &std::process::Output) -> f64 {
    assert_eq!(code(output), 0, "{}", text(&output.stderr));
    serde_json::from_str::<serde_json::Value>(&text(&output.stdout)).unwrap()["beta"].as_f64().unwrap()
}

#[test]
fn a_subcommand_takes_its_options_from_every_layer() {
    let summary = ["--summary", "-"];
    assert_eq!(beta_of(&score("[kto-eval]\nbeta = 0.7\n", &summary, &[])), 0.7);
    assert_eq!(beta_of(&score("beta = 0.7\n[kto-eval.score]\nbeta = 0.6\n", &summary, &[])), 0.6);
    assert_eq!(beta_of(&score("beta = 0.7\nsummary = '-'\n", &[], &[("KTO_BETA", "0.5")])), 0.5);
    assert_eq!(beta_of(&score("beta = 0.7\n", &["--summary=-", "--beta=0.4"], &[("KTO_BETA", "0.5")])), 0.4);
}

#[test]
fn one_file_serves_both_subcommands() {
    // temperature is an option of generate only.
    assert_eq!(beta_of(&score("[kto-eval]\ntemperature = 0.5\nbeta = 0.7\nsummary = '-'\n", &[], &[])), 0.7);
    let output = score("[kto-eval]\ntemprature = 0.5\n", &[], &[]);
    assert_eq!(code(&output), 78);
    assert_eq!(
        text(&output.stderr),
        "kto-eval: e.toml:2: unknown key \"temprature\"\nhint: did you mean \"temperature\"?\n"
    );
    let output = score("[kto-eval.score]\ntemperature = 0.5\n", &[], &[]);
    assert_eq!(code(&output), 78, "not of score");
    let output = score("no-rows = true\n", &["--output", "x"], &[]);
    assert!(
        code(&output) == 78 && text(&output.stderr).contains("e.toml:1: the argument"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_manifest_repeats_a_subcommand() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    fs::write(file("t.kto.arrow"), bytes(&trl_tokens())).unwrap();
    let mut args = trl("--no-kl -q --beta 0.3");
    args.extend([
        file("t.kto.arrow"),
        "--output".into(),
        file("rows"),
        "--fail-if".into(),
        "rows!=20".into(),
    ]);
    assert_eq!(code(&run(&args, b"")), 0);
    let manifest = read_json(&dir.path().join("rows.manifest.json"));
    assert_eq!(
        (manifest["tool"].as_str(), manifest["configuration"]["beta"].as_f64()),
        (Some("kto-eval score"), Some(0.3))
    );
    let again = ["score", "-q", "--from-manifest", &file("rows.manifest.json"), "--output", &file("again")];
    let output = run(&again, b"");
    assert_eq!((code(&output), text(&output.stderr).as_str()), (0, ""));
    assert_eq!(fs::read(file("again")).unwrap(), fs::read(file("rows")).unwrap());
    let other = ["generate", "--from-manifest", &file("rows.manifest.json")];
    let output = run(&other, b"");
    assert!(code(&output) == 78 && text(&output.stderr).contains("a manifest of kto-eval score"));
    // Nothing is written beside standard output.
    let before = fs::read_dir(dir.path()).unwrap().count();
    rows(&trl("--no-kl -q"), &bytes(&trl_tokens()));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before);
}
