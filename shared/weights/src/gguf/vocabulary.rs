//! The tokenizer in a GGUF file as the files of transformers: tokenizer.json, tokenizer_config.json, chat templates.
//!
//! Two kinds are made: byte-level BPE ("gpt2"), whose splitting rule llama.cpp knows by a name, and SentencePiece's BPE ("llama"), whose merges
//! follow from the scores. What a file does not say (blanks that belong to control tokens, normalizers) is as the models of that rule have it;
//! files of our own writer say it ([`super::tokenizer::DETAILS`]). Source: llama.cpp's llama-vocab.cpp, transformers 5.23's integrations/gguf.
//! Where none can be made the model is made without one, with a warning.

use super::{model::token_id, splitting::Rule, tokenizer::DETAILS};
use kto_cli::{Error, Result, Ui, escape};
use kto_formats::{
    gguf::{GgufReader, GgufValue},
    python_json,
};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};

/// Longest text of a token, in bytes: the merges that give it are looked for at each of its letters.
const LONGEST: usize = 1024;
/// Most merges that are looked for: Gemma's 262,144 tokens have about half a million.
const MOST_MERGES: usize = 1 << 21;
/// Most bytes of them together, far below what is read as a tokenizer.json.
const LONGEST_MERGES: usize = 64 << 20;
/// Longest [`DETAILS`], in bytes.
const LONGEST_DETAILS: usize = 16 << 20;

/// Kinds of tokens in llama.cpp's numbers.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The vocabulary of a file.
struct Vocabulary<'a> {
    file: &'a GgufReader,
    tokens: Vec<&'a str>,
    kinds: &'a [i32],
    /// `model_type` of config.json.
    model_type: &'a str,
}

/// Makes the files. `config` is config.json. Errors (65): the lists of tokens do not fit together or to the model.
pub fn files(file: &GgufReader, config: &Map<String, Value>, ui: &Ui) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    templates(file, &mut files)?;
    let hint = "put the original tokenizer.json and tokenizer_config.json into the result";
    let kind = file.text("tokenizer.ggml.model").unwrap_or("none");
    let without = |why: String| ui.warn(format!("no tokenizer is made: {why}; {hint}"));
    let Some(GgufValue::Strings(tokens)) = file.get("tokenizer.ggml.tokens") else {
        without("the file has no list of tokens".into());
        return Ok(files);
    };
    let rows = config.get("vocab_size").and_then(Value::as_u64).unwrap_or(0) as usize;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let vocabulary = Vocabulary::new(file, tokens, rows, model_type)?;
    let details = details(file);
    let json = match (kind, rule_of(file)) {
        ("llama", _) => vocabulary.sentencepiece()?,
        ("gpt2", Some(rule)) => vocabulary.byte_level(rule)?,
        // Our own files say the rule whatever its name.
        ("gpt2", None) if details.is_some() => vocabulary.byte_level(Rule::any())?,
        ("gpt2", None) => {
            let name = escape(file.text("tokenizer.ggml.pre").unwrap_or("none"));
            without(format!("its splitting rule \"{name}\" is not known here"));
            return Ok(files);
        }
        (other, _) => {
            without(format!("a tokenizer of kind \"{}\" is not known here", escape(other)));
            return Ok(files);
        }
    };
    let mut json = json;
    let mut settings = vocabulary.settings(config);
    if let Some(details) = details {
        put_details(&mut json, &mut settings, details);
    }
    let text = |value: &Value| (python_json::pretty_sorted(value) + "\n").into_bytes();
    // The largest of the files, and in an order that is not the alphabet's.
    files.push(("tokenizer.json".into(), json.to_string().into_bytes()));
    files.push(("tokenizer_config.json".into(), text(&Value::Object(settings))));
    Ok(files)
}

fn rule_of(file: &GgufReader) -> Option<&'static Rule> {
    Rule::named(file.text("tokenizer.ggml.pre")?)
}

/// What our own writer says beyond llama.cpp's keys.
fn details(file: &GgufReader) -> Option<Map<String, Value>> {
    let text = file.text(DETAILS).filter(|text| text.len() <= LONGEST_DETAILS)?;
    serde_json::from_str(text).ok()
}

fn put_details(json: &mut Value, settings: &mut Map<String, Value>, mut details: Map<String, Value>) {
    if let Some(Value::Object(model)) = details.remove("model") {
        for (field, value) in model {
            if !matches!(field.as_str(), "vocab" | "merges") {
                json["model"][field] = value;
            }
        }
    }
    match details.remove("config") {
        Some(Value::Object(config)) => *settings = config,
        // There was none, so what is put around a text is as tokenizer.json says.
        _ => settings.retain(|field, _| !field.starts_with("add_")),
    }
    for field in ["normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"] {
        if let Some(value) = details.remove(field) {
            json[field] = value;
        }
    }
}

/// Adds the chat template, and those with names.
fn templates(file: &GgufReader, files: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if let Some(text) = file.text("tokenizer.chat_template") {
        files.push(("chat_template.jinja".into(), text.as_bytes().to_vec()));
    }
    let Some(GgufValue::Strings(names)) = file.get("tokenizer.chat_templates") else { return Ok(()) };
    for name in names {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
            return Err(Error::data(format!("chat template \"{}\": no name of a file", escape(name))));
        }
        if let Some(text) = file.text(&format!("tokenizer.chat_template.{name}")) {
            let path = format!("additional_chat_templates/{name}.jinja");
            files.push((path, text.as_bytes().to_vec()));
        }
    }
    Ok(())
}

impl<'a> Vocabulary<'a> {
    fn new(file: &'a GgufReader, tokens: &'a [String], rows: usize, model_type: &'a str) -> Result<Self> {
        if tokens.len() > rows {
            let text = format!("{} tokens, {rows} rows of the embedding", tokens.len());
            return Err(Error::data(text));
        }
        if let Some(id) = tokens.iter().position(|token| token.len() > LONGEST) {
            return Err(Error::data(format!("token {id} has {} bytes, at most {LONGEST}", tokens[id].len())));
        }
        let kinds = match file.get("tokenizer.ggml.token_type") {
            Some(GgufValue::Ints(kinds)) if kinds.len() == tokens.len() => &kinds[..],
            None => &[],
            _ => return Err(Error::data("\"tokenizer.ggml.token_type\" is not one number for each token")),
        };
        let mut this = Self { file, tokens: tokens.iter().map(String::as_str).collect(), kinds, model_type };
        if this.is_gemma() {
            this.respell();
        }
        Ok(this)
    }

    /// In Gemma's files a run of blanks is written as blanks, where transformers looks it up in SentencePiece's spelling.
    fn respell(&mut self) {
        const RUN: &str = "▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁";
        for token in &mut self.tokens {
            if token.len() > 1 && token.bytes().all(|b| b == b' ') {
                *token = RUN.get(..token.len() * "▁".len()).unwrap_or(token);
            }
        }
    }

    fn is_gemma(&self) -> bool {
        self.model_type.starts_with("gemma")
    }

    /// Whether blanks behind a control token belong to it: of Phi 3's all but these, which llama.cpp knows by the model's name.
    fn takes_blanks(&self, id: usize) -> bool {
        let phi = self.model_type == "phi3" && self.file.text("tokenizer.ggml.model") == Some("llama");
        phi && !matches!(self.tokens[id], "<unk>" | "<s>" | "<|endoftext|>")
    }

    fn kind(&self, id: usize) -> i32 {
        self.kinds.get(id).copied().unwrap_or(1)
    }

    /// Whether a token only fills a row.
    fn fills(&self, id: usize) -> bool {
        self.kind(id) == UNUSED && self.tokens[id] == format!("[PAD{id}]")
    }

    /// Ids by text. Of equal texts the first counts.
    fn ids(&self) -> BTreeMap<&'a str, usize> {
        let mut ids = BTreeMap::new();
        for (id, token) in self.tokens.iter().enumerate().filter(|(id, _)| !self.fills(*id)) {
            ids.entry(*token).or_insert(id);
        }
        ids
    }

    fn added(&self) -> Vec<Value> {
        let wanted = |id: &usize| matches!(self.kind(*id), UNKNOWN | CONTROL | USER_DEFINED);
        let mut seen = std::collections::HashSet::new();
        let all = (0..self.tokens.len()).filter(wanted).filter(|id| seen.insert(self.tokens[*id]));
        all.filter(|id| !self.tokens[*id].is_empty())
            .map(|id| {
                json!({
                    "id": id,
                    "content": self.tokens[id],
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": self.takes_blanks(id),
                    "normalized": false,
                    "special": self.kind(id) != USER_DEFINED,
                })
            })
            .collect()
    }

    fn named(&self, name: &str) -> Option<(&'a str, u32)> {
        let id = token_id(self.file, name)?;
        let token = self.tokens.get(id as usize)?;
        Some((token, id))
    }

    fn flag(&self, name: &str) -> Option<bool> {
        match self.file.get(&format!("tokenizer.ggml.{name}")) {
            Some(GgufValue::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    /// Whether a text begins with BOS and ends with EOS.
    fn adds(&self) -> (bool, bool) {
        let usual = match self.file.text("tokenizer.ggml.model") {
            Some("llama") => true,
            _ => rule_of(self.file).is_some_and(|rule| rule.whole_and_bos),
        };
        let bos = self.flag("add_bos_token").unwrap_or(usual) && self.named("bos").is_some();
        (bos, self.flag("add_eos_token").unwrap_or(false) && self.named("eos").is_some())
    }

    fn post_processor(&self) -> Value {
        let (bos, eos) = self.adds();
        let (bos, eos) = (self.named("bos").filter(|_| bos), self.named("eos").filter(|_| eos));
        let special = |token: Option<(&str, u32)>, kind: u32| {
            token.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": kind}}))
        };
        let around = |id: &str, kind: u32| {
            let text = json!({"Sequence": {"id": id, "type_id": kind}});
            [special(bos, kind), Some(text), special(eos, kind)].into_iter().flatten().collect::<Vec<Value>>()
        };
        let mut tokens = Map::new();
        for (text, id) in [bos, eos].into_iter().flatten() {
            tokens.insert(text.into(), json!({"id": text, "ids": [id], "tokens": [text]}));
        }
        let pair = [around("A", 0), around("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": pair,
            "special_tokens": tokens,
        })
    }

    fn merges_of_file(&self) -> Result<Option<Vec<[&'a str; 2]>>> {
        let Some(GgufValue::Strings(list)) = self.file.get("tokenizer.ggml.merges") else { return Ok(None) };
        let pair = |merge: &'a String| {
            // A blank within the first would be written as another letter in both kinds.
            let (a, b) = merge.split_once(' ')?;
            (!a.is_empty() && !b.is_empty()).then_some([a, b])
        };
        let all: Option<Vec<_>> = list.iter().map(pair).collect();
        all.map(Some).ok_or_else(|| Error::data("\"tokenizer.ggml.merges\" holds a text that is no pair"))
    }

    fn document(&self, model: Value, parts: [Value; 3]) -> Value {
        let [normalizer, splitter, decoder] = parts;
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added(),
            "normalizer": normalizer,
            "pre_tokenizer": splitter,
            "post_processor": self.post_processor(),
            "decoder": decoder,
            "model": model,
        })
    }

    fn byte_level(&self, rule: &Rule) -> Result<Value> {
        let merges = self.merges_of_file()?;
        let merges = merges.ok_or_else(|| Error::data("no \"tokenizer.ggml.merges\""))?;
        let ids = self.ids();
        let known = |[a, b]: &[&str; 2]| ids.contains_key(*a) && ids.contains_key(*b);
        if let Some([a, b]) = merges.iter().find(|merge| !known(merge)) {
            let (a, b) = (escape(a), escape(b));
            return Err(Error::data(format!("merge \"{a} {b}\" is of tokens that are not in the list")));
        }
        let normalizer = if rule.composed { json!({"type": "NFC"}) } else { Value::Null };
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": rule.whole_and_bos,
            "vocab": ids,
            "merges": merges,
        });
        Ok(self.document(model, [normalizer, rule.splitter(), Rule::decoder()]))
    }

    fn sentencepiece(&self) -> Result<Value> {
        let ids = self.ids();
        let merges = match self.merges_of_file()? {
            Some(merges) => merges,
            // Gemma's scores do not follow its merges; the order of the tokens does.
            None if self.is_gemma() => self.merges(&ids, &|id| -(id as f64))?,
            None => match self.file.get("tokenizer.ggml.scores") {
                Some(GgufValue::Floats(scores)) if scores.len() == self.tokens.len() => {
                    self.merges(&ids, &|id| f64::from(scores[id]))?
                }
                _ => return Err(Error::data("\"tokenizer.ggml.scores\" is not one number for each token")),
            },
        };
        let unknown = (0..self.tokens.len()).find(|id| self.kind(*id) == UNKNOWN);
        let unknown = unknown.map(|id| self.tokens[id]).or(self.named("unknown").map(|(text, _)| text));
        let bytes = (0..self.tokens.len()).any(|id| self.kind(id) == BYTE);
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": bytes,
            "ignore_merges": false,
            "vocab": ids,
            "merges": merges,
        });
        let prefix = self.flag("add_space_prefix").unwrap_or(true);
        let replace =
            |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let normalizer = match prefix {
            true => json!({
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")],
            }),
            false => replace(" ", "▁"),
        };
        let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let decoder = json!({"type": "Sequence", "decoders": decoders});
        Ok(self.document(model, [normalizer, Value::Null, decoder]))
    }

    /// The merges that give each token from two others, the highest score first, as transformers orders them. Errors (65): tokens that
    /// are beginnings and ends of each other have more than any tokenizer.
    fn merges(
        &self,
        ids: &BTreeMap<&'a str, usize>,
        score: &dyn Fn(usize) -> f64,
    ) -> Result<Vec<[&'a str; 2]>> {
        let (mut found, mut bytes) = (Vec::new(), 0);
        let by_text: HashMap<&str, usize> = ids.iter().map(|(text, id)| (*text, *id)).collect();
        for (id, token) in self.tokens.iter().enumerate() {
            if by_text.get(token) != Some(&id) {
                continue;
            }
            let mut own = Vec::new();
            for (at, _) in token.char_indices().skip(1) {
                let (a, b) = token.split_at(at);
                if let Some(left) = by_text.get(a)
                    && let Some(right) = by_text.get(b)
                {
                    own.push((*left, *right, [a, b]));
                }
            }
            bytes += own.len() * token.len();
            if found.len() + own.len() > MOST_MERGES || bytes > LONGEST_MERGES {
                let most = format!("at most {MOST_MERGES} of {} MiB together", LONGEST_MERGES >> 20);
                return Err(Error::data(format!("\"tokenizer.ggml.tokens\" gives too many merges, {most}")));
            }
            own.sort_by_key(|(left, right, _)| (*left, *right));
            found.extend(
                own.into_iter()
                    .map(|(_, _, [a, b])| (score(id), a.chars().count(), b.chars().count(), [a, b])),
            );
        }
        // Stable: of equal ones the first token's first.
        found.sort_by(|x, y| y.0.total_cmp(&x.0).then(y.1.cmp(&x.1)).then(y.2.cmp(&x.2)));
        Ok(found.into_iter().map(|(_, _, _, pair)| pair).collect())
    }

    /// tokenizer_config.json.
    fn settings(&self, config: &Map<String, Value>) -> Map<String, Value> {
        let mut fields = Map::new();
        let mut put = |field: &str, value: Value| fields.insert(field.into(), value);
        // As tokenizer.json is written, which is as llama.cpp does it; transformers' Llama class would have rules of its own.
        put("tokenizer_class", json!("PreTrainedTokenizerFast"));
        let (bos, eos) = self.adds();
        put("add_bos_token", json!(bos));
        put("add_eos_token", json!(eos));
        put("clean_up_tokenization_spaces", json!(false));
        if let Some(length) = config.get("max_position_embeddings") {
            put("model_max_length", length.clone());
        }
        for (field, name) in
            [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
        {
            if let Some((text, _)) = self.named(name) {
                put(field, json!(text));
            }
        }
        fields
    }
}

#[cfg(test)]
mod tests;
