//! `--train-on`, `--continue-final-message`, named templates, and the view of `--show`.

use super::{chat, llama, refused, run, testdata, text, tokens};
use kto_formats::{tokenizer::TextTokenizer, tokens::TokenSet};
use serde_json::{Value, json};
use std::{fs, path::Path};

/// The texts of prompt and completion of every row.
fn texts(set: &TokenSet) -> Vec<(String, String)> {
    let tokenizer = TextTokenizer::from_model_dir(&llama()).unwrap();
    let text = |ids: &[u32]| tokenizer.decode(ids).unwrap();
    set.rows().map(|row| (text(row.prompt_ids), text(row.completion_ids))).collect()
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn record(prompt: &[Value], completion: &[Value]) -> String {
    format!("{}\n", json!({"prompt": prompt, "completion": completion, "label": true}))
}

fn conversation() -> String {
    let prompt = [message("user", "a"), message("assistant", "b"), message("user", "c")];
    let completion = [message("assistant", "d"), message("user", "e"), message("assistant", "f")];
    record(&prompt, &completion)
}

const TURN: [&str; 6] = [
    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
    "b<|im_end|>\n",
    "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    "d<|im_end|>\n",
    "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n",
    "f<|im_end|>\n",
];

#[test]
fn assistant_turns_become_rows() {
    let of = |flags: &[&str]| {
        texts(&tokens(&llama(), &[&["-q", "--max-length", "4096"], flags].concat(), &conversation()))
    };
    let begin = |n: usize| TURN[..n].concat();
    assert_eq!(of(&[]), [(begin(3), TURN[3..].concat())]);
    assert_eq!(of(&["--train-on", "last"]), [(begin(5), TURN[5].to_string())]);
    let all: Vec<_> = [1, 3, 5].map(|n| (begin(n), TURN[n].to_string())).into();
    assert_eq!(of(&["--train-on", "all"]), all);
    // Text has one completion either way.
    let plain = text("a b", " c");
    assert_eq!(tokens(&llama(), &["-q", "--train-on", "all"], &plain), tokens(&llama(), &["-q"], &plain));
    let tool = record(&[message("user", "a")], &[message("tool", "b")]);
    let (code, said) = refused(&llama(), &["--train-on", "last"], &tool);
    assert!(code == 65 && said.contains("<stdin>:1: the completion has no assistant message"), "{said}");
}

#[test]
fn an_open_answer_is_continued() {
    let row = record(&[message("user", "a"), message("assistant", "b c")], &[message("assistant", " d")]);
    let two = texts(&tokens(&llama(), &["-q"], &row));
    assert!(two[0].0.ends_with("b c<|im_end|>\n<|im_start|>assistant\n") && two[0].1 == " d<|im_end|>\n");
    let one = texts(&tokens(&llama(), &["-q", "--continue-final-message"], &row));
    assert_eq!(one, [(format!("{}b c", TURN[0]), " d<|im_end|>\n".to_string())]);
    // Other rows are as they were.
    let plain = chat("a", "b");
    let flags = ["-q", "--continue-final-message"];
    assert_eq!(tokens(&llama(), &flags, &plain), tokens(&llama(), &["-q"], &plain));
    let wrong = record(&[message("user", "a"), message("assistant", "b")], &[message("user", "c")]);
    assert_eq!(refused(&llama(), &flags, &wrong).0, 65);
}

/// A model directory with two named templates.
fn named(dir: &Path) {
    for file in ["tokenizer.json", "config.json"] {
        fs::copy(llama().join(file), dir.join(file)).unwrap();
    }
    let template = |mark: &str| format!("{{% for m in messages %}}{mark}{{{{ m.content }}}};{{% endfor %}}");
    let list =
        json!([{"name": "default", "template": template("d")}, {"name": "brief", "template": template("b")}]);
    let config = json!({"eos_token": "<|im_end|>", "chat_template": list});
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn a_template_is_chosen_by_name_or_by_file() {
    let dir = tempfile::tempdir().unwrap();
    named(dir.path());
    let file = dir.path().join("mine.jinja");
    fs::write(&file, "{% for m in messages %}f{{ m.content }};{% endfor %}").unwrap();
    let of = |choice: &[&str]| {
        let flags = [&["-q", "--manifest", "none"], choice].concat();
        texts(&tokens(dir.path(), &flags, &chat("x", "y")))
    };
    let expected = |mark: &str| vec![(format!("{mark}x;"), format!("{mark}y;"))];
    assert_eq!(of(&[]), expected("d"));
    assert_eq!(of(&["--chat-template", "brief"]), expected("b"));
    assert_eq!(of(&["--chat-template", file.to_str().unwrap()]), expected("f"));
    let (code, said) = refused(dir.path(), &["--chat-template", "long"], &chat("x", "y"));
    assert!(code == 66 && said.contains("or one of the model's: default, brief"), "{said}");
    // The file is an input of the run, a name is not.
    let out = dir.path().join("t.kto.arrow");
    let inputs = |choice: &str| {
        let flags = ["-q", "--chat-template", choice, "-o", out.to_str().unwrap()];
        assert!(run(dir.path(), &flags, &chat("x", "y")).status.success());
        let manifest = fs::read_to_string(out.with_extension("arrow.manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&manifest).unwrap();
        manifest["inputs"].to_string().matches("mine.jinja").count()
    };
    assert_eq!((inputs("brief"), inputs(file.to_str().unwrap())), (0, 1));
}

#[test]
fn what_will_be_trained_can_be_seen() {
    let data = testdata("trl/llama/data.jsonl");
    let show = |flags: &[&str], input: &str| {
        let output = run(&llama(), &[&["-q"], flags].concat(), input);
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, shown) = show(&["--show", "3", data.to_str().unwrap()], "");
    assert_eq!((code, shown.matches("data.jsonl:").count()), (0, 3), "{shown}");
    assert!(!shown.contains('\x1b'), "a pipe gets no colours");
    let (_, shown) = show(&["--show", "9"], &chat("hi <|im_end|>\x1b[31m日", "yes"));
    let lines: Vec<&str> = shown.lines().collect();
    let set = tokens(&llama(), &["-q"], &chat("hi <|im_end|>\x1b[31m日", "yes"));
    let (p, c) = (set.row(0).prompt_ids.len(), set.row(0).completion_ids.len());
    assert_eq!(lines[0], format!("<stdin>:1: desirable, prompt of {p}, completion of {c} tokens"));
    // The template's control token is one token, the row's own is text; escapes are shown, not sent.
    assert!(lines[1].starts_with("  prompt      <|im_start|>│"), "{shown}");
    assert_eq!(shown.matches("<|im_end|>│").count(), 2, "{shown}");
    assert!(shown.contains("\\u{1b}") && shown.contains("日"), "{shown}");
    let boundary = lines.iter().find(|l| l.starts_with("  completion  ")).unwrap();
    assert!(boundary.ends_with("<|im_end|>│\\n│"), "{shown}");
    // Colours, the cut, bad rows.
    let (_, shown) = show(&["--show", "1", "--color", "always"], &chat("a", "b"));
    assert!(shown.contains("\x1b[1;36m<|im_start|>\x1b[0m") && shown.contains("\x1b[32mb"), "{shown}");
    let limit = (p + 1).to_string();
    let (_, shown) = show(&["--show", "1", "--max-length", &limit], &chat("hi <|im_end|>\x1b[31m日", "yes"));
    assert!(shown.contains("  not trained "), "{shown}");
    let (_, shown) = show(&["--show", "1", "--max-length", "3"], &chat("a", "b"));
    assert!(shown.contains("dropped, the prompt reaches the 3 of --max-length"), "{shown}");
    let bad = format!("{{}}\n{}", chat("a", "b"));
    assert_eq!(show(&["--show", "2"], &bad).0, 65);
    let (code, shown) = show(&["--show", "2", "--on-error", "skip"], &bad);
    assert!(code == 0 && shown.contains("<stdin>:1: field") && shown.contains("<stdin>:2: desirable"));
    assert_eq!(show(&["--show", "1", "-o", "x"], "").0, 2);
}
