//! Every bad input: one line with its place, and the right code.

use super::{bytes, code, data, run, text, token_set, trl_tokens, words};
use kto_formats::{
    adapter::{Adapter, AdapterMeta},
    model_dir::{ModelDir, QUANTIZED_FROM},
    safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata},
    tokens::TokenSet,
};

/// Runs a command line and returns the exit code and standard error.
fn fault(line: &str, input: &[u8]) -> (i32, String) {
    let output = run(&words(line), input);
    (code(&output), text(&output.stderr))
}

fn generate(flags: &str, input: &[u8]) -> (i32, String) {
    fault(&format!("generate --model {} {flags}", data("stories260k")), input)
}

fn score(flags: &str, set: &TokenSet) -> (i32, String) {
    fault(&format!("score --model {} {flags}", data("trl/llama/model")), &bytes(set))
}

#[test]
fn a_bad_prompt_has_file_and_line() {
    for (flags, input, expected) in [
        (
            "",
            "{\"prompt\": \"a\"}\n{\"prompt\": 3}\n",
            "<stdin>:2: field \"prompt\" must be text or a message list, found 3",
        ),
        ("", "{\"prompt\": \"a\"}\n{\"prompt\": \n", "<stdin>:2:"),
        ("", "{\"text\": \"a\"}", "<stdin>:1: neither \"prompt\" nor \"messages\" is there"),
        ("--text", "ok\n\u{0}\n", ""),
        (
            "--ids",
            "{\"prompt_ids\": [1, 511]}\n{\"prompt_ids\": [1, 512]}",
            "<stdin>:2: prompt: token id 512 is outside the model's vocabulary of 512",
        ),
        ("--ids", "{\"prompt_ids\": []}", "<stdin>:1: the prompt has no tokens"),
        ("--ids", "{\"prompt_ids\": [1, -1]}", "<stdin>:1: field \"prompt_ids\" must be a list of token ids"),
        (
            "",
            "{\"prompt\": [{\"role\": \"bot\", \"content\": \"a\"}]}",
            "<stdin>:1: field \"prompt\": message 1: unknown role \"bot\"",
        ),
        (
            "",
            "{\"prompt\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": \"{\"}",
            "<stdin>:1: field \"tools\": not JSON",
        ),
    ] {
        let (code, stderr) = generate(&format!("--max-new-tokens 2 {flags}"), input.as_bytes());
        if expected.is_empty() {
            assert_eq!(code, 0, "{stderr}");
        } else {
            assert_eq!(code, 65, "{input}: {stderr}");
            assert!(stderr.starts_with(&format!("kto-eval: {expected}")), "{stderr}");
        }
    }
    let (code, stderr) = generate("", b"What is it?\n");
    assert!(code == 65 && stderr.ends_with("hint: --text takes lines of plain text\n"), "{stderr}");
    let (code, stderr) = generate("--text", b"ok\n\xff\n");
    assert_eq!(
        (code, stderr.lines().next()),
        (65, Some("kto-eval: <stdin>:2: invalid UTF-8 at byte 0 of the line"))
    );
}

#[test]
fn rows_before_a_bad_one_are_answered_whatever_the_batch() {
    for batch in [1, 2, 16] {
        let line =
            format!("generate --model {} --text --max-new-tokens 2 --batch {batch}", data("stories260k"));
        let output = run(&words(&line), b"Tom\nLily\nTim\n\xff\n");
        assert_eq!((code(&output), text(&output.stdout).lines().count()), (65, 3), "--batch {batch}");
    }
}

/// As in kto-tokenize: a row that is too long is named and passed over, the others are answered.
#[test]
fn prompts_without_room_are_named_and_passed_over() {
    let model = data("stories260k");
    let prompt = |n: usize| format!("{{\"prompt_ids\": {:?}}}\n", vec![403; n]);
    let input = [1, 512, 511, 600, 2].map(prompt).concat();
    let line = format!("generate --model {model} --ids --max-new-tokens 4");
    for batch in ["--batch 1", "--batch 2", "--batch 16"] {
        let output = run(&words(&format!("{line} {batch}")), input.as_bytes());
        assert_eq!(code(&output), 0, "{}", text(&output.stderr));
        let rows: Vec<serde_json::Value> =
            text(&output.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let made: Vec<Option<usize>> =
            rows.iter().map(|r| r["completion_ids"].as_array().map(Vec::len)).collect();
        assert_eq!((made[1], made[2], made[3], made.len()), (None, Some(1), None, 5), "{rows:?}");
        assert_eq!((&rows[1]["finish"], &rows[2]["finish"]), (&"too_long".into(), &"length".into()));
        let said = text(&output.stderr);
        assert!(
            said.contains(
                "2 prompts not answered, because they reach the 512 tokens that the model is made for: <stdin>:2, <stdin>:4\n"
            ) && said.contains("1 prompts leave less than 4 of the 512 tokens")
                && said.contains("their answers are shorter: <stdin>:3\n"),
            "{said}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("answers");
    let output = run(&words(&format!("{line} -o {}", out.display())), prompt(512).as_bytes());
    assert_eq!(code(&output), 65);
    let last = "kto-eval: no prompt of 1 is shorter than the 512 tokens that the model is made for\n";
    assert!(text(&output.stderr).ends_with(last) && !out.exists(), "{}", text(&output.stderr));
    let long = "Once upon a time. ".repeat(200) + "\nTom\n";
    let output = run(&words(&format!("generate --model {model} --text --max-new-tokens 4")), long.as_bytes());
    let lines: Vec<String> = text(&output.stdout).lines().map(str::to_string).collect();
    assert!(
        code(&output) == 0 && lines.len() == 2 && lines[0].is_empty() && !lines[1].is_empty(),
        "{lines:?}"
    );
}

#[test]
fn what_is_missing_is_66() {
    for line in [
        "generate --model nowhere".to_string(),
        "score --model nowhere x.kto.arrow".to_string(),
        format!("generate --model {} nowhere.jsonl", data("stories260k")),
        format!("score --model {} --adapter nowhere", data("trl/llama/model")),
        format!(
            "score --model {} --adapter {} --reference nowhere",
            data("trl/llama/model"),
            data("trl/llama/adapter_init")
        ),
    ] {
        let (code, stderr) = fault(&line, &bytes(&trl_tokens()));
        assert_eq!(code, 66, "{line}: {stderr}");
        assert!(stderr.contains("nowhere") || stderr.contains("x.kto.arrow"), "{stderr}");
    }
}

#[test]
fn token_files_must_be_the_models() {
    let outside = token_set(&[(vec![1], vec![2], true), (vec![3], vec![4, 9999], false)], 10_000, 8);
    let (code, stderr) = score("--no-kl", &outside);
    assert_eq!(code, 65, "{stderr}");
    assert!(stderr.contains("row 2: token id 9999 is outside the model's vocabulary of "), "{stderr}");
    let mut other = trl_tokens();
    other.meta.tokenizer = "0".repeat(64);
    let (code, stderr) = score("--no-kl", &other);
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("another tokenizer.json") && stderr.contains("--force-base"), "{stderr}");
    assert_eq!(score("--no-kl --force-base", &other).0, 0);
    let one = token_set(&[(vec![1], vec![2], true), (vec![1], vec![3], false)], 384, 8);
    let (code, stderr) = score(&format!("--adapter {}", data("trl/llama/adapter_init")), &one);
    assert_eq!(code, 65, "{stderr}");
    assert!(stderr.ends_with("hint: --no-kl\n"), "{stderr}");
    let (code, stderr) = score("", &token_set(&[], 384, 8));
    assert_eq!(code, 65, "{stderr}");
    let cut = &bytes(&trl_tokens())[..900];
    assert_eq!(fault(&format!("score --model {}", data("trl/llama/model")), cut).0, 65);
    assert_eq!(fault(&format!("score --model {}", data("trl/llama/model")), b"{\"prompt\": 1}\n").0, 65);
}

#[test]
fn an_adapter_of_another_base_is_78_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = Adapter::read(&super::testdata("trl/llama/adapter_init")).unwrap();
    let meta = AdapterMeta { base_fingerprint: Some("0".repeat(64)), ..AdapterMeta::default() };
    adapter.write(dir.path(), meta).unwrap();
    let shown = dir.path().display();
    let set = trl_tokens();
    for flags in [format!("--adapter {shown}"), format!("--reference {shown}")] {
        let (code, stderr) = score(&format!("--no-kl {flags}"), &set);
        assert_eq!(code, 78, "{stderr}");
        assert!(stderr.contains("was trained on another base model\nhint: --force-base"), "{stderr}");
        assert_eq!(score(&format!("--no-kl --force-base {flags}"), &set).0, 0);
    }
    let (code, stderr) = generate(&format!("--ids --adapter {}", data("trl/llama/adapter_init")), b"");
    assert_eq!(code, 65, "an adapter that does not fit: {stderr}");
}

#[test]
fn an_adapter_fits_the_4_bit_form_of_its_base_and_the_other_way_round() {
    let dir = tempfile::tempdir().unwrap();
    let (own, form) = (super::testdata("trl/llama/model"), dir.path().join("form"));
    let own = ModelDir::open(&own).unwrap();
    // The marks of a 4-bit form decide, so the same weights can bear them.
    std::fs::create_dir(&form).unwrap();
    std::fs::copy(own.path.join("config.json"), form.join("config.json")).unwrap();
    let mut metadata = pt_metadata();
    metadata.insert(QUANTIZED_FROM.into(), own.fingerprint());
    let specs = own.tensors.views().map(|v| TensorSpec::new(v.name, v.dtype, v.shape)).collect();
    let mut writer = SafetensorsWriter::new(&form.join("model.safetensors"), specs, &metadata).unwrap();
    own.tensors.views().for_each(|v| writer.write(v.name, v.data).unwrap());
    writer.finish().unwrap();
    let print = ModelDir::open(&form).unwrap().fingerprint();
    assert!(print.len() > 64 && print.ends_with(&own.fingerprint()));
    let adapter = Adapter::read(&super::testdata("trl/llama/adapter_init")).unwrap();
    let (on_form, on_own) = (dir.path().join("on_form"), dir.path().join("on_own"));
    adapter.write(&on_form, AdapterMeta { base_fingerprint: Some(print), ..AdapterMeta::default() }).unwrap();
    adapter
        .write(&on_own, AdapterMeta { base_fingerprint: Some(own.fingerprint()), ..AdapterMeta::default() })
        .unwrap();
    for model in [&own.path, &form] {
        for adapter in [&on_form, &on_own] {
            let line = format!("score --no-kl --model {} --adapter {}", model.display(), adapter.display());
            let (code, stderr) = fault(&line, &bytes(&trl_tokens()));
            assert_eq!(code, 0, "{line}: {stderr}");
        }
    }
}

#[test]
fn flags_that_make_no_sense_are_2() {
    for line in
        ["score", "generate", "", "score --model m --temperature 1", "score --model m -o x --summary -"]
    {
        assert_eq!(fault(line, b"").0, 2, "{line}");
    }
    assert_eq!(generate("--top-p 0", b"").0, 2);
    assert_eq!(generate("--ids --text", b"").0, 2);
    assert_eq!(generate("- -", b"").0, 2);
}

#[test]
fn no_output_replaces_what_is_read() {
    let top = tempfile::tempdir().unwrap();
    let model = top.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(data("trl/llama/model")).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let (rows, prompts) = (top.path().join("rows.kto.arrow"), top.path().join("prompts.jsonl"));
    std::fs::write(&rows, bytes(&trl_tokens())).unwrap();
    std::fs::write(&prompts, "{\"prompt_ids\": [1, 2]}\n").unwrap();
    let (model, rows, prompts) = (model.display(), rows.display(), prompts.display());
    for line in [
        format!("score --model {model} {rows} -o {model}/model.safetensors"),
        format!("score --model {model} {rows} -o {rows}"),
        format!("score --model {model} {rows} --summary {model}/config.json"),
        format!("score --model {model} {rows} -o {model}/x --depfile {model}/config.json"),
        format!("generate --ids --model {model} {prompts} -o {prompts}"),
        format!("generate --ids --model {model} {prompts} -o {model}/config.json"),
    ] {
        let (code, said) = fault(&line, b"");
        assert!(code == 2 && said.contains("overw"), "{line}: {code} {said}");
    }
}

#[test]
fn nothing_in_is_nothing_out() {
    let output = run(&words(&format!("generate --model {}", data("stories260k"))), b"");
    assert_eq!((code(&output), output.stdout.len(), output.stderr.len()), (0, 0, 0));
}
