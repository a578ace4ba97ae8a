//! From the flags about the adapter to its settings as PEFT has them, and to what a fresh one looks like.
//!
//! Flags carry PEFT's names. Which modules the settings mean is decided by [`kto_formats::peft`], the same code that reads the result
//! back; so what is trained is what PEFT loads.

use crate::{
    args::{Args, BiasKind},
    plan::Inputs,
};
use kto_cli::{Context, Error, Result, escape};
use kto_formats::{
    adapter::{self, Adapter, AdapterConfig, Targets},
    peft::PeftConfig,
};
use kto_model::{
    architecture::Architecture,
    lora::LoraLayout,
    whole::{self, Shapes},
};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Rank and alpha of a fresh adapter when nobody says.
const RANK: u32 = 16;
const ALPHA: f64 = 16.0;

/// What the flags about the adapter come to.
pub struct Resolved {
    /// The settings of the adapter that will be trained.
    pub config: AdapterConfig,
    /// What a fresh one looks like.
    pub layout: Option<LoraLayout>,
    /// What is trained whole.
    pub whole: Shapes,
}

/// Resolves the flags about the adapter.
/// Errors: (2) flags that name no layer or contradict each other; (65) settings of a given one that cannot be trained.
pub fn resolve(args: &Args, inputs: &Inputs) -> Result<Resolved> {
    let (config, layout, whole) = match inputs.adapter {
        Some(adapter) => {
            let whole = given_whole(adapter, inputs.architecture).at("--init-adapter")?;
            (adapter.config.clone(), None, whole)
        }
        None => {
            let config = asked(args, inputs.architecture)?;
            check_patterns(&config, inputs.architecture)?;
            let layout = layout(&config, inputs.architecture)?;
            check_saved(&args.modules_to_save, inputs.architecture)?;
            let whole = layout.whole.clone();
            (config, Some(layout), whole)
        }
    };
    Ok(Resolved { config: AdapterConfig { lora_dropout: args.lora_dropout, ..config }, layout, whole })
}

/// Returns what a given adapter trains whole. Errors (65): it holds more than that, which would be used and not trained, or ties what
/// would be trained apart.
fn given_whole(adapter: &Adapter, architecture: &Architecture) -> Result<Shapes> {
    let all = whole::chosen(architecture, &adapter.config.peft()?)?;
    if let Some(name) = adapter.saved.keys().find(|name| !all.contains_key(*name)) {
        let text = "is in the file, but neither modules_to_save nor bias says that it is trained";
        return Err(Error::data(format!("\"{}\" {text}", escape(name)))
            .with_hint("kto-merge makes a base of the adapter"));
    }
    let tie = adapter.config.kept.get("ensure_weight_tying") == Some(&Value::Bool(true));
    if tie && whole::unties(architecture, all.keys()) {
        let text = "its \"ensure_weight_tying\" has embedding and head trained as one matrix; kto-train would train two";
        return Err(Error::data(text).with_hint(
            "kto-merge --base MODEL --adapter DIR -o MERGED, then --model MERGED with a fresh adapter",
        ));
    }
    Ok(all)
}

/// Refuses (2) names of --modules-to-save that name nothing, which PEFT passes over.
fn check_saved(names: &[String], architecture: &Architecture) -> Result<()> {
    let all = whole::parts(architecture);
    let named = |part: &str, name: &str| whole::within(part).any(|module| module.ends_with(name));
    let unknown = |name: &&String| !all.iter().any(|part| named(&part.name, name));
    match names.iter().find(unknown) {
        None => Ok(()),
        Some(name) => {
            let text = format!("--modules-to-save: no module of the model ends with \"{}\"", escape(name));
            Err(Error::usage(text).with_hint("such as embed_tokens,lm_head, norm or down_proj"))
        }
    }
}

/// Returns the settings of a fresh adapter.
fn asked(args: &Args, architecture: &Architecture) -> Result<AdapterConfig> {
    let mut kept = Map::new();
    let mut keep = |field: &str, value: Value| drop(kept.insert(field.into(), value));
    let target_modules = match targets("--target-modules", args.target_modules.as_deref(), architecture)? {
        Targets::Pattern(_) if !args.layers_to_transform.is_empty() => {
            let text = "--layers-to-transform needs a list of names in --target-modules, not a pattern";
            return Err(Error::usage(text));
        }
        targets => targets,
    };
    if let Some(text) = &args.exclude_modules {
        match targets("--exclude-modules", Some(text), architecture)? {
            Targets::Names(names) => keep("exclude_modules", json!(names)),
            Targets::Pattern(text) => keep("exclude_modules", json!(text)),
        }
    }
    if !args.layers_to_transform.is_empty() {
        let layers: BTreeSet<u64> = args.layers_to_transform.iter().flatten().copied().collect();
        if let Some(layer) = layers.iter().find(|l| **l >= architecture.layers as u64) {
            let blocks = architecture.layers;
            return Err(Error::usage(format!(
                "--layers-to-transform {layer}: the model has {blocks} blocks, from 0 on"
            )));
        }
        keep("layers_to_transform", json!(layers));
    }
    let ranks = args.rank_pattern.iter().map(|(pattern, rank)| (pattern.clone(), json!(rank)));
    let alphas = args.alpha_pattern.iter().map(|(pattern, alpha)| (pattern.clone(), adapter::whole(*alpha)));
    for (field, map) in [("rank_pattern", ranks.collect::<Map<_, _>>()), ("alpha_pattern", alphas.collect())]
    {
        if !map.is_empty() {
            keep(field, Value::Object(map));
        }
    }
    if args.modules_to_save.iter().any(String::is_empty) {
        return Err(Error::usage("--modules-to-save: an empty name"));
    }
    if !args.modules_to_save.is_empty() {
        keep("modules_to_save", json!(args.modules_to_save));
    }
    if let Some(name) = args.bias.and_then(BiasKind::peft_name) {
        keep("bias", json!(name));
    }
    if let Some(name) = args.init_lora_weights.and_then(|init| init.peft_name()) {
        keep("init_lora_weights", json!(name));
    }
    Ok(AdapterConfig {
        r: args.lora_r.unwrap_or(RANK) as usize,
        lora_alpha: args.lora_alpha.unwrap_or(ALPHA),
        target_modules,
        use_rslora: args.use_rslora,
        use_dora: args.use_dora,
        kept,
        ..Default::default()
    })
}

/// Refuses (2) a pattern that no adapted module matches: alone, with a number that nothing else has, it would change nothing.
fn check_patterns(config: &AdapterConfig, architecture: &Architecture) -> Result<()> {
    let mut plain = config.clone();
    plain.kept.retain(|field, _| field != "rank_pattern" && field != "alpha_pattern");
    let without = layout(&plain, architecture)?;
    let others = [
        ("rank_pattern", "--rank-pattern", json!(2 * config.r)),
        ("alpha_pattern", "--alpha-pattern", json!(2.0 * config.lora_alpha)),
    ];
    for (field, flag, other) in others {
        for pattern in config.kept.get(field).and_then(Value::as_object).into_iter().flat_map(Map::keys) {
            let mut alone = plain.clone();
            alone.kept.insert(field.into(), json!({ pattern: other }));
            let with = layout(&alone, architecture)?;
            if with.places().eq(without.places()) {
                let text = format!("{flag}: no adapted module matches \"{}\"", escape(pattern));
                return Err(Error::usage(text)
                    .with_hint("the end of a module's path, such as down_proj, or a regular expression"));
            }
        }
    }
    Ok(())
}

/// Returns what settings mean for the model.
fn layout(config: &AdapterConfig, architecture: &Architecture) -> Result<LoraLayout> {
    let usage = |e: Error| e.with_kind(kto_cli::Kind::Usage);
    let layout = LoraLayout::of_config(architecture, &config.peft().map_err(usage)?).map_err(usage)?;
    // Files hold patterns in the order of their texts.
    let file: Value = serde_json::from_str(&config.to_json()).unwrap_or_default();
    let back = PeftConfig::read(file.as_object().unwrap_or(&Map::new()))?;
    let back = LoraLayout::of_config(architecture, &back)?;
    if let Some((a, _)) = layout.places().zip(back.places()).find(|(a, b)| a != b) {
        let module = a.1.path(a.0);
        return Err(Error::usage(format!("two patterns with different numbers match \"{module}\""))
            .with_hint("--rank-pattern and --alpha-pattern with patterns that exclude each other"));
    }
    let odd = layout.places().find(|(_, _, place)| place.rank % 2 == 1);
    if let Some((layer, module, place)) = odd.filter(|_| layout.init == kto_model::lora::Init::Orthogonal) {
        let text =
            format!("an orthogonal start needs even ranks, \"{}\" has {}", module.path(layer), place.rank);
        return Err(Error::usage(text));
    }
    Ok(layout)
}

/// Reads `all-linear`, names with commas between them, or, when there is a character that no name has, a regular expression.
fn targets(flag: &str, text: Option<&str>, architecture: &Architecture) -> Result<Targets> {
    let known = || architecture.modules().iter().map(|m| m.name().to_string());
    let text = match text {
        None | Some("all-linear") => return Ok(Targets::Names(known().collect())),
        Some(text) => text,
    };
    let is_list = |c: char| c.is_ascii_alphanumeric() || "_.,- ".contains(c);
    if !text.chars().all(is_list) {
        return Ok(Targets::Pattern(text.into()));
    }
    let paths: Vec<String> = (0..architecture.layers)
        .flat_map(|l| architecture.modules().iter().map(move |module| module.path(l)))
        .collect();
    let mut names: Vec<String> = Vec::new();
    for name in text.split(',').map(str::trim) {
        let ends = |path: &String| path.strip_suffix(name).is_some_and(|r| r.is_empty() || r.ends_with('.'));
        if name.is_empty() || !paths.iter().any(ends) {
            let known: Vec<String> = known().collect();
            return Err(Error::usage(format!("{flag}: unknown module \"{}\"", escape(name))).with_hint(
                format!(
                    "all-linear, a regular expression for whole paths, or a list of {}",
                    known.join(", ")
                ),
            ));
        }
        if !names.iter().any(|known| known == name) {
            names.push(name.into());
        }
    }
    Ok(Targets::Names(names))
}

/// Reads `PATTERN=N` of --rank-pattern.
pub fn rank_pattern(text: &str) -> Result<(String, u32), String> {
    let (pattern, number) = pattern(text)?;
    match number.parse() {
        Ok(rank @ 1..=4096) => Ok((pattern, rank)),
        _ => Err(format!("\"{number}\" is no rank from 1 to 4096")),
    }
}

/// Reads `PATTERN=X` of --alpha-pattern.
pub fn alpha_pattern(text: &str) -> Result<(String, f64), String> {
    let (pattern, number) = pattern(text)?;
    kto_cli::number::positive(number).map(|alpha| (pattern, alpha))
}

/// A pattern may hold an equals sign, a number never does.
fn pattern(text: &str) -> Result<(String, &str), String> {
    let parts = text.rsplit_once('=').filter(|(pattern, _)| !pattern.is_empty());
    // A regular expression may hold commas and equals signs, but hardly a number between them.
    let is_list = |(pattern, _): &(&str, &str)| {
        let ends = pattern.split('=').skip(1).filter_map(|after| after.split_once(','));
        ends.clone().any(|(number, _)| number.parse::<f64>().is_ok())
    };
    if parts.as_ref().is_some_and(is_list) {
        return Err("one PATTERN=NUMBER: give the flag once for each".into());
    }
    parts
        .map(|(p, n)| (p.to_string(), n))
        .ok_or_else(|| "must be PATTERN=NUMBER, such as down_proj=32".into())
}

/// Reads a block's number, or `8-15`.
pub fn layers(text: &str) -> Result<Vec<u64>, String> {
    const MOST: u64 = 10_000;
    let wrong = || format!("\"{text}\" is no block's number and no range such as 8-15");
    let number = |text: &str| text.trim().parse::<u64>().ok().filter(|n| *n < MOST).ok_or_else(wrong);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    if first > last { Err(wrong()) } else { Ok((first..=last).collect()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_and_ranges() {
        assert_eq!(rank_pattern("down_proj=32"), Ok(("down_proj".into(), 32)));
        assert_eq!(rank_pattern("(?=x)y=1"), Ok(("(?=x)y".into(), 1)));
        assert_eq!(alpha_pattern("^a.b=0.5"), Ok(("^a.b".into(), 0.5)));
        assert_eq!(rank_pattern("a{1,2}=3"), Ok(("a{1,2}".into(), 3)));
        for text in ["q_proj=32,v_proj=4", "down_proj", "=3", "a=", "a=0", "a=5000", "a=x"] {
            assert!(rank_pattern(text).is_err(), "{text}");
        }
        assert!(alpha_pattern("a=-1").is_err());
        assert_eq!(layers("3"), Ok(vec![3]));
        assert_eq!(layers("1-3"), Ok(vec![1, 2, 3]));
        for text in ["", "a", "3-1", "1-", "-1", "1-99999"] {
            assert!(layers(text).is_err(), "{text}");
        }
    }
}
