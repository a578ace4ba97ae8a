//! The short way beside the general one.

use super::Direct;
use crate::{Args, Plan, readers::Piece, work::Worker};
use clap::Parser;
use kto_formats::{
    chunks::{Chunk, Source},
    jsonl::LineChunks,
    rows::ReadOptions,
};
use std::fmt::Write as _;

/// A simple generator, for rows that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }
    fn text(&mut self, most: usize) -> String {
        const PARTS: [&str; 24] = [
            "word",
            " ",
            "a",
            "é",
            "🤔",
            r"\n",
            r"\n\n",
            r"\t",
            r#"\""#,
            r"\\",
            r"\/",
            r"\u2019",
            r"\ud83e\udd14",
            r"\u0000",
            r"\u001F",
            r"\u000b",
            r"\u005c",
            r"\b",
            "/",
            "\u{7f}",
            "Human:",
            r"\n\nHuman:",
            r"\n\nAssistant:",
            "long enough to fill more than one block of a search",
        ];
        (0..self.below(most + 1)).map(|_| self.one(&PARTS)).collect()
    }
    fn dialogue(&mut self, rounds: usize) -> String {
        let mut text = String::new();
        for _ in 0..rounds {
            let (asked, said) = (self.text(4), self.text(4));
            let gap = self.one(&["", "", r"\n", r"\n\nHuman: more"]);
            let _ = write!(text, r"\n\nHuman: {asked}{gap}\n\nAssistant: {said}");
        }
        text + &format!(r"\n\nHuman: {}\n\nAssistant:", self.text(3))
    }
    fn turns(&mut self, first: &str, count: usize) -> String {
        let mut list = String::from("[");
        for i in 0..count {
            let usual = if (i == 0) == (first == "user") { "user" } else { "assistant" };
            let role = match self.below(12) {
                0 => self.one(&["tool", "system", "bot", "user"]),
                _ => usual,
            };
            let (gap, content) = (self.one(&[", ", ",", " , "]), self.text(4));
            let _ = match self.below(15) {
                0 => write!(
                    list,
                    r#"{}{{"content": "{content}"{gap}"role": "{role}"}}"#,
                    if i > 0 { gap } else { "" }
                ),
                1 => write!(
                    list,
                    r#"{}{{"role": "{role}"{gap}"content": "{content}", "x": 1}}"#,
                    if i > 0 { gap } else { "" }
                ),
                _ => write!(
                    list,
                    r#"{}{{"role":"{role}"{gap}"content": "{content}"}}"#,
                    if i > 0 { gap } else { "" }
                ),
            };
        }
        list + "]"
    }
    fn row(&mut self) -> String {
        let mut fields: Vec<(String, String)> = Vec::new();
        let mut add = |name: &str, value: String| fields.push((name.into(), value));
        let text = |text: String| format!("\"{text}\"");
        match self.below(6) {
            0 | 1 => {
                let rounds = self.below(3);
                let p = self.dialogue(rounds);
                let same = self.text(2);
                add("chosen", text(format!("{p}{same}{}", self.text(3))));
                add("rejected", text(format!("{p}{same}{}", self.text(3))));
            }
            2 => {
                add("prompt", text(self.text(3)));
                add("chosen", text(self.text(3)));
                add("rejected", text(self.text(3)));
            }
            3 => {
                let p = self.turns("user", 1);
                let p = p.strip_suffix(']').unwrap_or_default().to_owned();
                for side in ["chosen", "rejected"] {
                    let count = self.below(3);
                    let more = self.turns("assistant", count);
                    let more = more.strip_prefix('[').unwrap_or_default();
                    add(side, format!("{p}{}{more}", if more == "]" { "" } else { ", " }));
                }
            }
            4 => {
                add("prompt", self.turns("user", 2));
                add(self.one(&["completion", "chosen"]), self.turns("assistant", 1));
                add("rejected", self.turns("assistant", 1));
                add("label", self.one(&["true", "false", "1", "null"]).into());
            }
            _ => {
                add("prompt", text(self.text(3)));
                add("completion", text(self.text(3)));
                add(self.one(&["label", "kto_tag"]), self.one(&["true", "false", "\"yes\""]).into());
            }
        }
        for _ in 0..self.below(10) / 7 {
            let name = self.one(&[
                "id",
                "note",
                "score",
                "label",
                "prompt",
                "messages",
                "image",
                "tools",
                "n\\u0061me",
                "question",
                "kto_error",
                "score_chosen",
            ]);
            let value = match self.below(4) {
                0 => text(self.text(3)),
                _ => self
                    .one(&[
                        "1",
                        "-0",
                        "1.50",
                        "1e5",
                        "1E400",
                        "01",
                        "12345678901234567890123",
                        "null",
                        "true",
                        "[]",
                        r#"{"a" : [1, {"b":"\u00e9"}]}"#,
                        "[1.5]",
                        "{\"a\":1,\"a\":2}",
                        "[}",
                        "tru",
                    ])
                    .to_owned(),
            };
            fields.insert(self.below(fields.len() + 1), (name.into(), value));
        }
        let mut row = String::from("{");
        for (i, (name, value)) in fields.iter().enumerate() {
            let _ = write!(
                row,
                "{}\"{name}\":{}{value}",
                if i > 0 { self.one(&[", ", ",", " ,\t"]) } else { "" },
                self.one(&[" ", "", "  "])
            );
        }
        row + self.one(&["}\n", "}\r\n", "} \n", "}\n", "}\n", "}\n", "\n", "}}\n"])
    }
}

/// What the rows become, with and without the short way.
fn both(plan: &Plan, rows: &str) -> (String, String) {
    let run = |short: bool| {
        let mut lines = LineChunks::new("in".into(), rows.as_bytes(), ReadOptions::default());
        let mut all = String::new();
        let worker = Worker::new(plan);
        let worker = if short { worker } else { worker.without_copies() };
        while let Some(chunk) = lines.next_chunk().unwrap() {
            let chunk: Chunk = chunk;
            let done = worker.run(Piece { chunk, input: 0, table: false });
            all += std::str::from_utf8(&done.bytes).unwrap();
            for meta in &done.metas {
                let _ = writeln!(
                    all,
                    "{} {} {} {} {} {:?}",
                    meta.end, meta.second, meta.ends_row, meta.label, meta.hash, meta.place
                );
            }
            let _ = writeln!(
                all,
                "{} {:?} {:?}",
                done.report.json(),
                done.warnings,
                done.end.map(|e| e.to_string())
            );
        }
        all
    };
    (run(false), run(true))
}

#[test]
fn the_short_way_gives_what_the_general_one_does() {
    let mut random = Random(11);
    let rows: Vec<String> = (0..3000).map(|_| random.row()).collect();
    let mut taken = 0;
    for flags in [
        &["--on-error", "skip"][..],
        &["--on-error", "skip", "--dialogues", "text"],
        &["--on-error", "skip", "--drop-extra", "--ties", "keep", "--empty", "keep"],
        &["--on-error", "skip", "--from", "hh-rlhf"],
        &["--on-error", "skip", "--from", "paired", "--order", "trl"],
    ] {
        let plan = Plan::new(&Args::parse_from([&["kto-convert", "in"], flags].concat())).unwrap();
        for row in &rows {
            let (general, short) = both(&plan, row);
            assert_eq!(short, general, "{flags:?} {row}");
            let text = row.as_bytes().trim_ascii();
            taken += usize::from(Direct::default().take(text, &plan, &mut Vec::new()).is_some());
        }
        let (general, short) = both(&plan, &rows.concat());
        assert_eq!(short, general, "{flags:?}");
    }
    assert!(taken > 1000, "only {taken} rows took the short way");
}
