//! The golden runs of TRL: reading them, and what every case sets.

use kto_formats::tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash};
use kto_train::{LossKind, ScheduleKind};
use serde_json::Value;
use std::path::{Path, PathBuf};

pub const CASES: [&str; 8] = [
    "llama",
    "llama_apo",
    "llama_ga2",
    "llama_paired",
    "llama_text",
    "llama_refadapter",
    "llama_gc",
    "qwen2",
];

/// One golden run.
pub struct Case {
    pub name: &'static str,
    pub meta: Value,
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/trl")
}

impl Case {
    pub fn open(name: &'static str) -> Self {
        let meta = std::fs::read(root().join(name).join("meta.json")).expect("meta.json");
        Self { name, meta: serde_json::from_slice(&meta).expect("JSON") }
    }

    pub fn file(&self, key: &str) -> PathBuf {
        root().join(self.meta["files"][key].as_str().expect("a path"))
    }

    pub fn lines(&self, key: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.file(key)).expect(key);
        text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
    }

    pub fn number(&self, key: &str) -> f64 {
        self.meta[key].as_f64().expect(key)
    }

    pub fn batch(&self) -> usize {
        self.micro() * self.number("ga") as usize
    }

    pub fn micro(&self) -> usize {
        self.number("bs") as usize
    }

    pub fn loss(&self) -> LossKind {
        match self.meta["loss"].as_str() {
            Some("kto") => LossKind::Kto,
            Some("apo_zero_unpaired") => LossKind::ApoZero,
            other => panic!("loss {other:?}"),
        }
    }

    pub fn schedule(&self) -> ScheduleKind {
        match self.meta["sched"].as_str() {
            Some("linear") => ScheduleKind::Linear,
            Some("cosine") => ScheduleKind::Cosine,
            Some("constant") => ScheduleKind::Constant,
            other => panic!("schedule {other:?}"),
        }
    }

    pub fn reference_is_adapter(&self) -> bool {
        self.meta["ref"] == "init_adapter"
    }

    /// TRL's own token ids as a token set.
    pub fn tokens(&self) -> TokenSet {
        let ids = |v: &Value| -> Vec<u32> {
            v.as_array().expect("ids").iter().map(|x| x.as_u64().expect("id") as u32).collect()
        };
        let max_length = self.number("max_length") as u32;
        let mut set = TokenSet::new(TokenMeta { vocab_size: 384, max_length, ..Default::default() });
        for row in self.lines("tokenized") {
            let (prompt, completion) = (ids(&row["prompt_ids"]), ids(&row["completion_ids"]));
            let label = row["label"].as_bool().expect("label");
            set.push(TokenRow {
                prompt_ids: &prompt,
                completion_ids: &completion,
                label,
                prompt_hash: prompt_hash(&prompt),
            });
        }
        set
    }
}
