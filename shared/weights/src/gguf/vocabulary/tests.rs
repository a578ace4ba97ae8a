//! Small vocabularies of other writers; whole tokenizers are in kto-quantize's tests.

use super::*;
use kto_formats::gguf::header;
use std::path::Path;

fn list(all: &[&str]) -> GgufValue {
    GgufValue::Strings(all.iter().map(|t| t.to_string()).collect())
}

fn key(name: &str, value: GgufValue) -> (String, GgufValue) {
    (format!("tokenizer.{name}"), value)
}

fn text(value: &str) -> GgufValue {
    GgufValue::String(value.into())
}

const TOKENS: [&str; 15] =
    ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "▁abc", "ä", "äb"];

fn sentencepiece() -> Vec<(String, GgufValue)> {
    let scores =
        [0.0, 0.0, 0.0, -9.0, -8.0, -8.0, -8.0, -1.0, -1.0, -2.0, -0.5, -3.0, -2.0, -8.0, -1.0].to_vec();
    let kinds = [&[UNKNOWN, CONTROL, CONTROL][..], &[1; 12]].concat();
    vec![
        key("ggml.model", text("llama")),
        key("ggml.tokens", list(&TOKENS)),
        key("ggml.scores", GgufValue::Floats(scores)),
        key("ggml.token_type", GgufValue::Ints(kinds)),
        key("ggml.bos_token_id", GgufValue::U32(1)),
        key("ggml.eos_token_id", GgufValue::U32(2)),
        key("chat_template", text("{{ x }}")),
    ]
}

fn open(path: &Path, bytes: &[u8]) -> Result<GgufReader> {
    std::fs::write(path, bytes).unwrap();
    GgufReader::open(path)
}

fn made(keys: &[(String, GgufValue)]) -> Result<Vec<(String, Vec<u8>)>> {
    let top = tempfile::tempdir().unwrap();
    let file = open(&top.path().join("m.gguf"), &header(keys, &[]).bytes).unwrap();
    let config = json!({"model_type": "llama", "vocab_size": 16, "max_position_embeddings": 8});
    files(&file, config.as_object().unwrap(), &Ui::silent("test"))
}

fn document(files: &[(String, Vec<u8>)], name: &str) -> Value {
    let (_, bytes) = files.iter().find(|(n, _)| n == name).unwrap();
    serde_json::from_slice(bytes).unwrap()
}

/// The order is that of transformers' `generate_merges` for these tokens and scores.
#[test]
fn merges_follow_from_scores() {
    let files = made(&sentencepiece()).unwrap();
    let json = document(&files, "tokenizer.json");
    let merges = json!([
        ["▁", "a"],
        ["a", "b"],
        ["b", "c"],
        ["ä", "b"],
        ["▁ab", "c"],
        ["▁a", "bc"],
        ["ab", "c"],
        ["▁", "abc"],
        ["a", "bc"],
        ["▁a", "b"],
        ["▁", "ab"]
    ]);
    assert_eq!(json["model"]["merges"], merges);
    assert_eq!(
        (&json["model"]["unk_token"], &json["model"]["byte_fallback"]),
        (&json!("<unk>"), &json!(false))
    );
    assert_eq!(json["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
    assert_eq!(json["added_tokens"].as_array().unwrap().len(), 3);
    let settings = document(&files, "tokenizer_config.json");
    assert_eq!((&settings["add_bos_token"], &settings["eos_token"]), (&json!(true), &json!("</s>")));
    assert!(files.iter().any(|(name, bytes)| name == "chat_template.jinja" && bytes == b"{{ x }}"));
}

/// Every beginning and end of a token is one too.
#[test]
fn merges_without_bound_are_refused() {
    let of = |tokens: Vec<String>| {
        let top = tempfile::tempdir().unwrap();
        let count = tokens.len();
        let mut keys = sentencepiece();
        keys.retain(|(name, _)| !name.ends_with("token_type"));
        keys[1].1 = GgufValue::Strings(tokens);
        keys[2].1 = GgufValue::Floats(vec![0.0; count]);
        let file = open(&top.path().join("m.gguf"), &header(&keys, &[]).bytes).unwrap();
        let config = json!({"model_type": "llama", "vocab_size": count});
        files(&file, config.as_object().unwrap(), &Ui::silent("test"))
    };
    let runs = |most: usize| (1..=most).map(|n| "a".repeat(n)).collect::<Vec<_>>();
    assert!(of(runs(500)).is_ok());
    let message = "\"tokenizer.ggml.tokens\" gives too many merges, at most 2097152 of 64 MiB together";
    // 523,776 of 512 letters on average.
    assert_eq!(of(runs(1024)).unwrap_err().to_string(), message);
    // 3.4 million short ones.
    let pairs = (0..150).flat_map(|a| (0..150).map(move |b| "a".repeat(a) + &"b".repeat(b)));
    let error = of(pairs.skip(1).collect()).unwrap_err();
    assert!(error.kind() == kto_cli::Kind::Data && error.to_string() == message);
}

#[test]
fn lists_that_do_not_fit_are_refused_by_name() {
    let with = |name: &str, value: GgufValue| {
        let mut keys = sentencepiece();
        keys.retain(|(k, _)| *k != format!("tokenizer.{name}"));
        keys.push(key(name, value));
        made(&keys)
    };
    let refusal = |name, value| with(name, value).unwrap_err().to_string();
    assert!(refusal("ggml.scores", GgufValue::Floats(vec![0.0])).contains("tokenizer.ggml.scores"));
    assert!(refusal("ggml.token_type", GgufValue::Ints(vec![1])).contains("tokenizer.ggml.token_type"));
    assert!(refusal("ggml.tokens", list(&["a"; 17])).contains("17 tokens, 16 rows"));
    assert!(refusal("ggml.tokens", list(&["a".repeat(2000).as_str()])).contains("2000 bytes"));
    assert!(refusal("ggml.merges", list(&["ab"])).contains("no pair"));
    assert!(refusal("chat_templates", list(&["../x"])).contains("no name of a file"));
    let named = with("chat_templates", list(&["tool_use"])).unwrap();
    assert!(named.iter().all(|(name, _)| !name.contains("tool_use")));
    // Nothing that is not known costs more than the tokenizer.
    for kind in ["bert", "t5", "rwkv"] {
        assert_eq!(with("ggml.model", text(kind)).unwrap().len(), 1);
    }
    let byte_level = |pre: &str| {
        let mut keys = sentencepiece();
        keys[0].1 = text("gpt2");
        keys.push(key("ggml.pre", text(pre)));
        keys.push(key("ggml.merges", list(&["a b"])));
        made(&keys).unwrap()
    };
    assert_eq!(byte_level("viking").len(), 1);
    let json = document(&byte_level("llama-bpe"), "tokenizer.json");
    assert_eq!(
        (&json["model"]["ignore_merges"], &json["model"]["merges"]),
        (&json!(true), &json!([["a", "b"]]))
    );
    let mut keys = sentencepiece();
    keys[0].1 = text("gpt2");
    keys.push(key("ggml.pre", text("qwen2")));
    assert!(made(&keys).unwrap_err().to_string().contains("no \"tokenizer.ggml.merges\""));
    keys.push(key("ggml.merges", list(&["a x"])));
    assert!(made(&keys).unwrap_err().to_string().contains("merge \"a x\""));
}

#[test]
fn runs_of_blanks_are_respelled_for_gemma() {
    let top = tempfile::tempdir().unwrap();
    let keys = [key("ggml.tokens", list(&["a", " ", "  ", "   a", "    "]))];
    let file = open(&top.path().join("m.gguf"), &header(&keys, &[]).bytes).unwrap();
    let Some(GgufValue::Strings(tokens)) = file.get("tokenizer.ggml.tokens") else { panic!() };
    let of = |kind| Vocabulary::new(&file, tokens, 8, kind).unwrap().tokens.clone();
    assert_eq!(of("gemma2"), ["a", " ", "▁▁", "   a", "▁▁▁▁"]);
    assert_eq!(of("llama"), ["a", " ", "  ", "   a", "    "]);
}

#[test]
fn a_damaged_vocabulary_never_panics() {
    let top = tempfile::tempdir().unwrap();
    let path = top.path().join("m.gguf");
    let mut keys = sentencepiece();
    keys.push((
        DETAILS.into(),
        text("{\"model\":{\"fuse_unk\":false},\"decoder\":null,\"config\":{\"x\":1}}"),
    ));
    let bytes = header(&keys, &[]).bytes;
    let config = json!({"model_type": "gemma2", "vocab_size": 16, "max_position_embeddings": 8});
    for at in 0..bytes.len() {
        for value in [bytes[at] ^ 1, 0xff] {
            let mut bad = bytes.clone();
            bad[at] = value;
            if let Ok(file) = open(&path, &bad) {
                let _ = files(&file, config.as_object().unwrap(), &Ui::silent("test"));
            }
        }
    }
}
