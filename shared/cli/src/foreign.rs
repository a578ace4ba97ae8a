//! Options of TRL, Unsloth and mlx-lm that have no counterpart of the same meaning here, and what is done instead.
//!
//! Called where a flag or a key of a file is unknown: the most similar name of ours would be a wrong advice. Names with a counterpart
//! are aliases in the tools' own definitions, not here.

/// A tool, names of others' options with hyphens, and what to do.
type Hint = (&'static str, &'static [&'static str], &'static str);

const HINTS: &[Hint] = &[
    (
        "kto-train",
        &["use-peft", "train", "fine-tune-type"],
        "leave it out: kto-train always trains an adapter",
    ),
    (
        "kto-train",
        &["load-in-4bit", "bnb-4bit-quant-type", "use-bnb-nested-quant", "bnb-4bit-use-double-quant"],
        "kto-quantize MODEL -o DIR, then --model DIR",
    ),
    ("kto-train", &["load-in-8bit"], "kto-quantize MODEL -o DIR --form int8, then --model DIR"),
    ("kto-train", &["iters", "num-iters"], "--max-steps N"),
    ("kto-train", &["batch-size"], "--batch N"),
    (
        "kto-train",
        &["gradient-accumulation-steps", "grad-accumulation-steps"],
        "--batch N is the whole batch of a step: per-device size times accumulation",
    ),
    (
        "kto-train",
        &["max-length", "max-seq-length", "max-prompt-length", "max-completion-length"],
        "kto-tokenize --max-length N: the token file says where rows are cut",
    ),
    (
        "kto-train",
        &["dataset-name", "dataset-path", "train-file", "dataset-config", "dataset-train-split"],
        "--data FILE, which kto-convert and kto-tokenize make of a data set",
    ),
    ("kto-train", &["dataset-test-split"], "--eval-data FILE"),
    ("kto-train", &["dataset-num-proc", "dataloader-num-workers"], "--threads N"),
    ("kto-train", &["tokenizer-name", "tokenizer-name-or-path"], "kto-tokenize --model MODEL"),
    ("kto-train", &["chat-template-path", "chat-template"], "kto-tokenize --chat-template FILE"),
    ("kto-train", &["bf16", "fp16", "torch-dtype"], "--dtype, on a GPU; the CPU computes in f32"),
    ("kto-train", &["use-cpu", "no-cuda"], "--device cpu"),
    (
        "kto-train",
        &["gradient-checkpointing", "grad-checkpoint", "use-gradient-checkpointing", "activation-offloading"],
        "leave it out: the memory plan decides; --memory SIZE bounds it, --dry-run shows it",
    ),
    (
        "kto-train",
        &["precompute-ref-log-probs", "precompute-ref-batch-size"],
        "leave it out: references are scored once, before the first step",
    ),
    (
        "kto-train",
        &[
            "use-liger-kernel",
            "use-liger-loss",
            "attn-implementation",
            "per-device-eval-batch-size",
            "packing",
        ],
        "leave it out: results do not depend on it here",
    ),
    ("kto-train", &["remove-unused-columns", "lora-task-type", "task-type"], "leave it out"),
    (
        "kto-train",
        &["mask-prompt", "train-on-responses-only"],
        "leave it out: completions alone are trained; kto-tokenize --train-on chooses turns",
    ),
    ("kto-train", &["disable-dropout"], "leave it out: --lora-dropout is 0 unless it is given"),
    (
        "kto-train",
        &["ref-adapter-name", "model-adapter-name", "reference-free", "ref-model"],
        "--reference base, or --reference init-adapter",
    ),
    ("kto-train", &["force-use-ref-model", "sync-ref-model"], "leave it out: the reference does not change"),
    (
        "kto-train",
        &["logging-steps", "steps-per-report", "logging-strategy"],
        "leave it out: metrics.jsonl has every step",
    ),
    (
        "kto-train",
        &["report-to", "run-name", "wandb"],
        "leave it out: metrics.jsonl and eval.jsonl in --out have the numbers",
    ),
    (
        "kto-train",
        &["eval-strategy", "do-eval", "steps-per-eval", "val-batches"],
        "--eval-data FILE, --eval-every N",
    ),
    ("kto-train", &["eval-on-start"], "kto-eval score --model MODEL FILE"),
    ("kto-train", &["save-strategy", "save-every"], "--checkpoint-every N|TIME"),
    (
        "kto-train",
        &["metric-for-best-model", "greater-is-better"],
        "leave it out: the best evaluation is the one with the lowest loss",
    ),
    ("kto-train", &["resume-from-checkpoint"], "--resume, or --resume=DIR"),
    (
        "kto-train",
        &["resume-adapter-file", "adapter-path", "adapter-file"],
        "--init-adapter DIR to start from, --out DIR to write to",
    ),
    (
        "kto-train",
        &["num-layers", "lora-layers"],
        "--layers-to-transform 8-15 names blocks; all are adapted without it",
    ),
    ("kto-train", &["lora-parameters", "lora-rank", "r"], "--lora-r N, --lora-alpha X"),
    ("kto-train", &["overwrite-output-dir"], "--force"),
    ("kto-train", &["trust-remote-code"], "leave it out: code of a model is never run"),
    ("kto-train", &["push-to-hub", "hub-model-id", "hub-token"], "leave it out: nothing is uploaded"),
    ("kto-train", &["test"], "kto-eval score --model MODEL --adapter RUN FILE"),
    (
        "kto-tokenize",
        &["max-seq-length", "max-prompt-length", "max-completion-length"],
        "--max-length N, of prompt and completion",
    ),
    ("kto-tokenize", &["tokenizer", "tokenizer-name", "tokenizer-name-or-path"], "--model DIR|NAME"),
    (
        "kto-quantize",
        &["load-in-4bit", "bnb-4bit-quant-type"],
        "--form nf4, which is the default, or --form fp4",
    ),
    ("kto-quantize", &["load-in-8bit"], "--form int8"),
    (
        "kto-quantize",
        &["double-quant", "bnb-4bit-use-double-quant", "use-bnb-nested-quant"],
        "leave it out: it is the default; --no-double-quant stores the scales in f32",
    ),
    ("kto-quantize", &["q-mode", "quant-predicate"], "--form mlx with --bits, --group-size or --recipe"),
    ("kto-quantize", &["outtype", "quant-type"], "--form gguf --type TYPE"),
    ("kto-quantize", &["outfile"], "-o FILE"),
    ("kto-quantize", &["model-name-or-path", "hf-path"], "the model stands first: kto-quantize MODEL -o DIR"),
    ("kto-quantize", &["mlx-path"], "-o DIR"),
    ("kto-merge", &["de-quantize"], "leave it out: --form decides"),
    ("kto-merge", &["export-gguf", "gguf-path"], "--form gguf -o FILE"),
    ("kto-merge", &["combination-type"], "--method METHOD"),
    ("kto-merge", &["upload-repo"], "leave it out: nothing is uploaded"),
    ("kto-merge", &["model", "model-name-or-path", "base-model-name-or-path"], "--base DIR|NAME"),
    ("kto-eval", &["adapter-path"], "--adapter DIR"),
    ("kto-eval", &["max-tokens"], "--max-new-tokens N"),
    ("kto-eval", &["temp"], "--temperature X"),
    ("kto-merge", &["adapter-path"], "--adapter DIR"),
    ("kto-merge", &["save-path"], "-o DIR"),
];

/// Returns what `tool` has in place of another program's option, which may be given with hyphens in front and underscores in it.
pub(crate) fn hint(tool: &str, option: &str) -> Option<&'static str> {
    let name = option.trim_start_matches('-').replace('_', "-");
    let name = name.split('=').next().unwrap_or_default();
    HINTS.iter().find(|(of, names, _)| *of == tool && names.contains(&name)).map(|(_, _, hint)| *hint)
}

/// Returns the names that are known of others' options, for a tool's tests: none may be one of its own.
pub fn names(tool: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let own = HINTS.iter().filter(move |(of, _, _)| *of == tool);
    own.flat_map(|(_, names, hint)| names.iter().map(move |name| (*name, *hint)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_hint_whatever_its_spelling() {
        assert_eq!(hint("kto-train", "--use_peft"), hint("kto-train", "use-peft"));
        assert!(hint("kto-train", "--load_in_4bit=true").is_some_and(|h| h.starts_with("kto-quantize")));
        assert_eq!((hint("kto-train", "lr"), hint("kto-merge", "use-peft")), (None, None));
        for tool in ["kto-train", "kto-tokenize", "kto-quantize", "kto-eval", "kto-merge"] {
            let all: Vec<&str> = names(tool).map(|(name, _)| name).collect();
            let once: std::collections::BTreeSet<&str> = all.iter().copied().collect();
            assert_eq!(all.len(), once.len(), "{tool}");
            assert!(all.iter().all(|name| !name.contains('_')), "{tool}");
        }
    }
}
