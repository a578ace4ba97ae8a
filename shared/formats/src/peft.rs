//! Every LoRA setting of PEFT's adapter_config.json: which modules are adapted, with which rank and scale, and what is
//! trained beside them.
//!
//! Called by [`crate::adapter_config`], which refuses what the engine cannot do. Rules as in PEFT 0.21.2
//! (tuners/tuners_utils.py `check_target_module_exists`, utils/other.py `get_pattern_key`), held against it by
//! testdata/peft. Patterns are Python's regular expressions; theirs and ours agree on what such files hold, and the
//! engine of ours gives up (65) instead of running for ever. Deliberately absent: fields of other methods than LoRA.

use crate::json::short;
use kto_cli::{Error, Result, escape};
use serde_json::{Map, Value};
use std::fmt;

/// Largest rank that is believed.
const MAX_RANK: u64 = 65_536;
/// Characters of a pattern, and patterns of a file, at most.
const LONGEST: usize = 4096;
const MOST: usize = 4096;
/// Initialisations that subtract something from the base weights, so that the adapter does not fit the base as stored.
const CHANGES_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];
/// What `target_modules` and `exclude_modules` may say instead of names.
const ALL_LINEAR: &str = "all-linear";

/// A regular expression of a file.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    regex: fancy_regex::Regex,
}

impl Pattern {
    /// `frame` has `{}` where the pattern goes.
    fn new(field: &str, text: &str, frame: &str) -> Result<Self> {
        let wrong = |why: String| {
            let text: String = text.chars().take(60).collect();
            Error::data(format!("field \"{field}\": the pattern \"{}\" {why}", escape(&text)))
        };
        if text.len() > LONGEST {
            return Err(wrong(format!("has more than {LONGEST} characters")));
        }
        let regex =
            fancy_regex::RegexBuilder::new(&frame.replacen("{}", text, 1)).backtrack_limit(100_000).build();
        let regex =
            regex.map_err(|e| wrong(format!("is no regular expression: {}", escape(&e.to_string()))))?;
        Ok(Self { text: text.into(), regex })
    }

    fn matches(&self, module: &str) -> Result<bool> {
        self.regex.is_match(module).map_err(|_| self.too_slow())
    }

    fn too_slow(&self) -> Error {
        Error::data(format!("the pattern \"{}\" takes too long", escape(&self.text)))
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

/// A choice of modules.
#[derive(Clone, Debug)]
pub enum Modules {
    /// Full names, or ends of names at a dot.
    Names(Vec<String>),
    /// A whole name must match.
    Pattern(Pattern),
    /// Every linear layer but the head. PEFT saves the names instead; hand-written files have it.
    AllLinear,
}

impl Modules {
    /// None for a missing, null or empty value.
    fn read(object: &Map<String, Value>, field: &str) -> Result<Option<Self>> {
        match object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) if text == ALL_LINEAR => Ok(Some(Self::AllLinear)),
            Some(Value::String(text)) => {
                Pattern::new(field, text, "^(?:{})$").map(|p| Some(Self::Pattern(p)))
            }
            Some(value) => Ok(Some(names(field, value)?).filter(|names| !names.is_empty()).map(Self::Names)),
        }
    }

    fn holds(&self, module: &str) -> Result<bool> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|name| is_end(module, name))),
            Self::Pattern(pattern) => pattern.matches(module),
            Self::AllLinear => Ok(module != "lm_head"),
        }
    }
}

/// Which biases were trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// None of them.
    None,
    /// All of the model.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

/// The settings of a LoRA adapter, as PEFT has them.
#[derive(Clone, Debug)]
pub struct PeftConfig {
    /// Rank of the modules that no pattern names.
    pub r: usize,
    /// Numerator of their scale.
    pub lora_alpha: f64,
    /// Probability of dropping an input element in training.
    pub lora_dropout: f64,
    /// Scale by alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// Weight-decomposed LoRA: a magnitude for every output.
    pub use_dora: bool,
    /// B has a bias.
    pub lora_bias: bool,
    /// The base's weights are transposed (GPT-2).
    pub fan_in_fan_out: bool,
    /// Which biases were trained.
    pub bias: Bias,
    /// `true`, `false`, or the name of a method.
    pub init_lora_weights: String,
    /// Modules that are trained whole, by the ends of their names.
    pub modules_to_save: Vec<String>,
    target: Option<Modules>,
    exclude: Option<Modules>,
    layers: Option<Vec<u64>>,
    layer_patterns: Vec<Pattern>,
    /// As it keeps LoRA away from them.
    saved: Vec<Pattern>,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
}

impl PeftConfig {
    /// Reads the fields of adapter_config.json. Errors (65) name the field and what is in it.
    pub fn read(object: &Map<String, Value>) -> Result<Self> {
        let target = Modules::read(object, "target_modules")?;
        let layers = layers(object)?;
        if layers.is_some() && !matches!(target, Some(Modules::Names(_))) {
            return Err(Error::data("\"layers_to_transform\" needs a list in \"target_modules\""));
        }
        let modules_to_save = match object.get("modules_to_save") {
            None | Some(Value::Null) => Vec::new(),
            Some(value) => names("modules_to_save", value)?,
        };
        let saved =
            modules_to_save.iter().map(|m| Pattern::new("modules_to_save", m, r"^(?:^|.*\.){}(?:$|\..*)"));
        let alpha = object.get("lora_alpha").ok_or_else(|| Error::data("no field \"lora_alpha\""))?;
        let dropout = object.get("lora_dropout").map_or(Ok(0.0), |v| number("lora_dropout", v))?;
        if !(0.0..1.0).contains(&dropout) {
            return Err(wrong("lora_dropout", "a number from 0 to below 1", &Value::from(dropout)));
        }
        Ok(Self {
            r: rank("r", object.get("r").ok_or_else(|| Error::data("no field \"r\""))?)?,
            lora_alpha: number("lora_alpha", alpha)?,
            lora_dropout: dropout,
            use_rslora: flag(object, "use_rslora")?,
            use_dora: flag(object, "use_dora")?,
            lora_bias: flag(object, "lora_bias")?,
            fan_in_fan_out: flag(object, "fan_in_fan_out")?,
            bias: bias(object)?,
            init_lora_weights: init(object)?,
            saved: saved.collect::<Result<_>>()?,
            modules_to_save,
            target,
            exclude: Modules::read(object, "exclude_modules")?,
            layers,
            layer_patterns: layer_patterns(object)?,
            ranks: patterns(object, "rank_pattern", rank)?,
            alphas: patterns(object, "alpha_pattern", number)?,
        })
    }

    /// Returns whether a linear layer of the base, by its full name, has a pair of matrices.
    pub fn adapts(&self, module: &str) -> Result<bool> {
        if self.spares(module)? || self.exclude.as_ref().is_some_and(|e| matches!(e, Modules::AllLinear)) {
            return Ok(false);
        }
        if let Some(exclude) = &self.exclude
            && exclude.holds(module)?
        {
            return Ok(false);
        }
        let Some(target) = &self.target else { return Ok(false) };
        if !target.holds(module)? {
            return Ok(false);
        }
        match (&self.layers, target) {
            // A full name is meant as it stands.
            (Some(_), Modules::Names(names)) if names.iter().any(|name| name == module) => Ok(true),
            (Some(layers), _) => Ok(self.layer_of(module)?.is_some_and(|layer| layers.contains(&layer))),
            (None, _) => Ok(true),
        }
    }

    /// Returns whether a module is trained whole. PEFT looks at the end of the name alone, so `norm` names `input_layernorm` too.
    pub fn saves(&self, module: &str) -> bool {
        self.modules_to_save.iter().any(|name| module.ends_with(name.as_str()))
    }

    /// Returns whether `modules_to_save` keeps LoRA away from a module. This rule of PEFT's goes by whole parts of the name.
    fn spares(&self, module: &str) -> Result<bool> {
        self.saved.iter().try_fold(false, |found, pattern| Ok(found || pattern.matches(module)?))
    }

    /// Returns the rank of a module.
    pub fn rank(&self, module: &str) -> Result<usize> {
        Ok(first(&self.ranks, module)?.copied().unwrap_or(self.r))
    }

    /// Returns the factor of a module's B·A: alpha/r, or alpha/√r with rank-stabilised LoRA.
    pub fn scale(&self, module: &str) -> Result<f64> {
        let alpha = first(&self.alphas, module)?.copied().unwrap_or(self.lora_alpha);
        let r = self.rank(module)? as f64;
        Ok(alpha / if self.use_rslora { r.sqrt() } else { r })
    }

    /// Returns whether the initialisation has changed the base's weights.
    pub fn changes_base(&self) -> bool {
        CHANGES_BASE.iter().any(|name| self.init_lora_weights.starts_with(name))
    }

    /// The number of the layer that a module lies in: the first one in its name, or the one behind a pattern.
    fn layer_of(&self, module: &str) -> Result<Option<u64>> {
        if self.layer_patterns.is_empty() {
            let parts: Vec<&str> = module.split('.').collect();
            // `model.layers.3.mlp`: something, a name, the number, something.
            let inner = parts.get(2..parts.len().saturating_sub(1)).unwrap_or_default();
            return Ok(inner
                .iter()
                .find(|p| p.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|p| p.parse().ok()));
        }
        for pattern in &self.layer_patterns {
            let found = pattern.regex.captures(module).map_err(|_| pattern.too_slow())?;
            if let Some(number) = found.as_ref().and_then(|found| found.name("idx")) {
                return Ok(number.as_str().parse().ok());
            }
        }
        Ok(None)
    }
}

/// Whether `name` is `module`, or its end at a dot.
fn is_end(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn first<'a, T>(patterns: &'a [(Pattern, T)], module: &str) -> Result<Option<&'a T>> {
    for (pattern, value) in patterns {
        if pattern.matches(module)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn patterns<T>(
    object: &Map<String, Value>,
    field: &str,
    value: impl Fn(&str, &Value) -> Result<T>,
) -> Result<Vec<(Pattern, T)>> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Object(map)) if map.len() <= MOST => map
            .iter()
            // PEFT writes `^` for a name that must begin there.
            .map(|(key, item)| Ok((Pattern::new(field, key, r"^(?:.*\.)?(?:{})$")?, value(field, item)?)))
            .collect(),
        Some(other) => Err(wrong(field, "an object of patterns and numbers", other)),
    }
}

fn layers(object: &Map<String, Value>) -> Result<Option<Vec<u64>>> {
    let field = "layers_to_transform";
    let expected = "a layer's number, or a list of such";
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(list)) if list.is_empty() => Ok(None),
        Some(value) => {
            let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            let layers: Option<Vec<u64>> = list.iter().map(Value::as_u64).collect();
            layers.map(Some).ok_or_else(|| wrong(field, expected, value))
        }
    }
}

fn layer_patterns(object: &Map<String, Value>) -> Result<Vec<Pattern>> {
    let field = "layers_pattern";
    let texts = match object.get(field) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(text)) if text.is_empty() => Vec::new(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(value) => names(field, value)?,
    };
    texts.iter().map(|text| Pattern::new(field, text, r"^(?:^|.*?\.)(?:{})\.(?P<idx>\d+)\.")).collect()
}

fn bias(object: &Map<String, Value>) -> Result<Bias> {
    match object.get("bias") {
        None | Some(Value::Null) => Ok(Bias::None),
        Some(value) => match value.as_str() {
            Some("none") => Ok(Bias::None),
            Some("all") => Ok(Bias::All),
            Some("lora_only") => Ok(Bias::LoraOnly),
            _ => Err(wrong("bias", "none, all or lora_only", value)),
        },
    }
}

fn init(object: &Map<String, Value>) -> Result<String> {
    match object.get("init_lora_weights") {
        None | Some(Value::Null) => Ok("true".into()),
        Some(Value::Bool(flag)) => Ok(flag.to_string()),
        Some(Value::String(name)) => Ok(name.clone()),
        Some(other) => Err(wrong("init_lora_weights", "true, false or the name of a method", other)),
    }
}

fn rank(field: &str, value: &Value) -> Result<usize> {
    let rank = value.as_u64().filter(|r| (1..=MAX_RANK).contains(r));
    rank.map(|r| r as usize).ok_or_else(|| wrong(field, "a whole number from 1 to 65536", value))
}

fn number(field: &str, value: &Value) -> Result<f64> {
    value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| wrong(field, "a number", value))
}

fn flag(object: &Map<String, Value>, field: &str) -> Result<bool> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| wrong(field, "true or false", value)),
    }
}

fn names(field: &str, value: &Value) -> Result<Vec<String>> {
    let list = value.as_array().filter(|list| list.len() <= MOST);
    let names: Option<Vec<String>> =
        list.and_then(|list| list.iter().map(|name| name.as_str().map(str::to_string)).collect());
    names.ok_or_else(|| wrong(field, "a list of strings", value))
}

/// The error of a field whose value is of the wrong kind.
pub(crate) fn wrong(field: &str, expected: &str, found: &Value) -> Error {
    Error::data(format!("field \"{field}\" must be {expected}, found {}", short(found)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(fields: Value) -> Result<PeftConfig> {
        let Value::Object(mut object) = fields else { panic!("an object") };
        for (key, value) in [("r", json!(4)), ("lora_alpha", json!(8))] {
            object.entry(key).or_insert(value);
        }
        PeftConfig::read(&object)
    }

    #[test]
    fn modules_ranks_and_scales_are_those_of_peft() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/peft/configs.jsonl");
        let (mut cases, mut adapted) = (0, 0);
        for line in std::fs::read_to_string(path).unwrap().lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            let config = PeftConfig::read(row["config"].as_object().unwrap()).unwrap();
            for module in row["linear"].as_array().unwrap() {
                let module = module.as_str().unwrap();
                let expected = row["adapted"].get(module);
                let place = format!("{} {module}", row["name"]);
                assert_eq!(config.adapts(module).unwrap(), expected.is_some(), "{place}");
                let Some(expected) = expected else { continue };
                assert_eq!(json!(config.rank(module).unwrap()), expected[0], "{place}");
                assert_eq!(json!(config.scale(module).unwrap()), expected[1], "{place}");
                adapted += 1;
            }
            for name in row["saved"].as_object().unwrap().keys().filter(|name| !name.contains(".lora_")) {
                let module = name.trim_start_matches("base_model.model.").rsplit_once('.').unwrap().0;
                let whole = config.saves(module);
                assert!(whole || config.bias != Bias::None, "{name}");
            }
            cases += 1;
        }
        assert_eq!((cases, adapted), (23, 135));
    }

    #[test]
    fn a_layer_is_the_first_number_in_a_name() {
        let layer = |fields: Value, module: &str| config(fields).unwrap().layer_of(module).unwrap();
        assert_eq!(layer(json!({}), "model.layers.3.experts.0.up"), Some(3));
        assert_eq!(layer(json!({}), "layers.3.up"), None);
        assert_eq!(layer(json!({}), "model.layers.3"), None);
        let blocks = json!({"layers_pattern": ["h", "layers"]});
        assert_eq!(layer(blocks.clone(), "layers.3.up"), Some(3));
        assert_eq!(layer(blocks, "model.blocks.3.up"), None);
    }

    #[test]
    fn wrong_fields_are_named() {
        for (field, value) in [
            ("r", json!(0)),
            ("lora_alpha", json!("16")),
            ("lora_dropout", json!(1.0)),
            ("target_modules", json!([1])),
            ("target_modules", json!("(")),
            ("exclude_modules", json!(7)),
            ("layers_to_transform", json!([-1])),
            ("layers_pattern", json!("[")),
            ("rank_pattern", json!({"q": 0})),
            ("alpha_pattern", json!({"q": "x"})),
            ("alpha_pattern", json!([1])),
            ("modules_to_save", json!("lm_head")),
            ("bias", json!("some")),
            ("init_lora_weights", json!(1)),
            ("use_dora", json!("yes")),
        ] {
            let error = config(json!({ field: value })).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(&format!("\"{field}\"")), "{error}");
        }
        let error =
            config(json!({"layers_to_transform": [0], "target_modules": ".*q"})).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("needs a list"), "{error}");
    }

    #[test]
    fn patterns_end() {
        let slow = config(json!({"target_modules": "(x+x+)+(?=y)y"})).unwrap();
        let error = slow.adapts(&"x".repeat(64)).unwrap_err().to_string();
        assert!(error.contains("takes too long"), "{error}");
        assert!(config(json!({"target_modules": "x".repeat(5000)})).is_err());
    }
}
