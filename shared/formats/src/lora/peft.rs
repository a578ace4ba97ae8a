//! Adapters in the files of PEFT.
//!
//! Names begin with `base_model.model.`. A linear layer has `lora_A.weight` (R, in) and `lora_B.weight` (out, R), with DoRA
//! `lora_magnitude_vector` (out); an embedding `lora_embedding_A` (R, vocabulary) and `lora_embedding_B` (hidden, R); modules of
//! `modules_to_save` their plain names; a trained bias of a layer with matrices `base_layer.bias`.

use super::{Ecosystem, LoraModule, LoraSet, Saved, finite};
use crate::{
    adapter::{self, AdapterMeta, PREFIX, WEIGHTS},
    adapter_config::{self, AdapterConfig, Targets, whole},
    mmap::shown,
    model_dir::read_json,
    peft::PeftConfig,
    safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata, standard_order},
    tensors::{TensorStore, push_floats},
    text_part,
};
use kto_cli::{Context, Error, Result, atomic, escape};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

pub fn read(dir: &Path) -> Result<LoraSet> {
    let place = shown(&dir.join(adapter::CONFIG));
    let settings = read_json(&dir.join(adapter::CONFIG))?;
    // First: of another kind of adapter, that is what is wrong.
    let config = adapter_config::from_object(&settings).at(&place)?;
    let peft = PeftConfig::read(&settings).at(&place)?;
    let path = dir.join(WEIGHTS);
    if !path.exists() && dir.join("adapter_model.bin").exists() {
        return Err(Error::data(format!(
            "{}: pickle weights can run code when loaded; only safetensors are read",
            shown(&dir.join("adapter_model.bin"))
        )));
    }
    let store = TensorStore::open_file(&path)?;
    let (modules, saved) = tensors(&store, &peft).at(shown(&path))?;
    let own_name = |name: &str| name.strip_prefix(PREFIX).and_then(text_part::inside);
    Ok(LoraSet {
        modules,
        saved,
        base_fingerprint: store.metadata().get(adapter::FINGERPRINT).cloned(),
        base_name: config.base_model_name_or_path,
        dropout: config.lora_dropout,
        ecosystem: Ecosystem::Peft,
        of_part: store.names().any(|name| own_name(name).is_some()),
    })
}

/// The parts of a module, as the file names them; a name may have had the adapter's name in it, which PEFT leaves out.
const PARTS: [&str; 6] = [
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
];

/// What stands in names of a layer's own tensors where it has matrices: a trained bias, or an adapted embedding itself.
const BASE_LAYER: &str = ".base_layer";

type Tensors = (BTreeMap<String, LoraModule>, BTreeMap<String, Saved>);

fn tensors(store: &TensorStore, peft: &PeftConfig) -> Result<Tensors> {
    let (mut names, mut saved) = (BTreeSet::new(), BTreeMap::new());
    for view in store.views() {
        let Some(rest) = view.name.strip_prefix(PREFIX) else {
            return Err(Error::data(format!(
                "tensor \"{}\": its name does not begin with {PREFIX}",
                escape(view.name)
            )));
        };
        match PARTS.iter().find_map(|part| rest.strip_suffix(part)) {
            Some(module) => drop(names.insert(module)),
            None if rest.contains("lora_") => {
                return Err(Error::data(format!(
                    "tensor \"{}\" is not a part of a LoRA layer",
                    escape(view.name)
                )));
            }
            None if rest.contains(".original_module.") => {
                return Err(Error::data(format!(
                    "tensor \"{}\" is written where bias is \"all\" and a module of modules_to_save has a bias; not supported",
                    escape(view.name)
                )));
            }
            None => {
                let values = finite(&view)?;
                let name = rest.replace(".modules_to_save", "").replace(BASE_LAYER, "");
                saved.insert(text_part::adapted(&name)?, Saved { shape: view.shape.to_vec(), values });
            }
        }
    }
    let mut modules = BTreeMap::new();
    for module in names {
        modules.insert(text_part::adapted(module)?, read_module(store, module, peft)?);
    }
    Ok((modules, saved))
}

fn read_module(store: &TensorStore, module: &str, peft: &PeftConfig) -> Result<LoraModule> {
    let get = |part: &str| store.get(&format!("{PREFIX}{module}{part}"));
    let linear = get(".lora_A.weight").is_some() || get(".lora_B.weight").is_some();
    let (a_name, b_name) = if linear {
        (".lora_A.weight", ".lora_B.weight")
    } else {
        (".lora_embedding_A", ".lora_embedding_B")
    };
    let (a, b) = match (get(a_name), get(b_name)) {
        (Some(a), Some(b)) => (a, b),
        (Some(found), None) | (None, Some(found)) => {
            let missing = if found.name.ends_with(a_name) { b_name } else { a_name };
            return Err(Error::data(format!(
                "tensor \"{}\" has no \"{}\"",
                escape(found.name),
                escape(&format!("{PREFIX}{module}{missing}"))
            )));
        }
        (None, None) => return Err(Error::data(format!("\"{}\" has no LoRA matrices", escape(module)))),
    };
    let (&[r, columns], &[rows, other]) = (a.shape, b.shape) else {
        return Err(Error::data(format!(
            "tensor \"{}\": shapes {:?} and {:?} are not two matrices",
            escape(a.name),
            a.shape,
            b.shape
        )));
    };
    let stated = peft.rank(module)?;
    if r != stated {
        a.expect_shape(&[stated, columns])?;
    }
    if other != r {
        b.expect_shape(&[rows, r])?;
    }
    let scale = peft.scale(module)?;
    let (a_values, b_values) = (finite(&a)?, finite(&b)?);
    let magnitude = get(".lora_magnitude_vector").or_else(|| get(".lora_magnitude_vector.weight"));
    let magnitude = match (magnitude, peft.use_dora) {
        (Some(view), true) if linear => {
            if view.len() != rows {
                view.expect_shape(&[rows])?;
            }
            Some(finite(&view)?)
        }
        (None, false) => None,
        (Some(view), _) => {
            return Err(Error::data(format!("tensor \"{}\": DoRA where there is none", escape(view.name))));
        }
        (None, true) => {
            return Err(Error::data(format!(
                "\"{}\": use_dora, but no lora_magnitude_vector",
                escape(module)
            )));
        }
    };
    if linear {
        return Ok(LoraModule {
            a: a_values,
            b: b_values,
            r,
            in_features: columns,
            out_features: rows,
            scale,
            magnitude,
        });
    }
    // An embedding's matrices are stored the other way round: A (R, vocabulary), B (hidden, R).
    let (a, b) = (transposed(&b_values, rows, r), transposed(&a_values, r, columns));
    Ok(LoraModule { a, b, r, in_features: rows, out_features: columns, scale, magnitude })
}

/// Returns a (rows, columns) matrix as (columns, rows).
pub fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

/// Writes a directory, the settings last.
pub fn write(set: &LoraSet, dir: &Path) -> Result<()> {
    let meta = AdapterMeta { base_fingerprint: set.base_fingerprint.clone(), of_part: set.of_part };
    write_weights(&dir.join(WEIGHTS), &set.modules, &set.saved, &meta)?;
    let mut config = config(set)?;
    if set.of_part {
        config = text_part::settings(&config, set.modules.keys().map(String::as_str));
    }
    let saved: BTreeSet<&str> = set.saved.keys().filter_map(|name| name.strip_suffix(".weight")).collect();
    if !saved.is_empty() {
        config.kept.insert("modules_to_save".into(), json!(saved));
    }
    atomic::write(&dir.join(adapter::CONFIG), config.to_json().as_bytes())
}

/// Values that are written at a time.
const PIECE: usize = 1 << 18;

/// Writes adapter_model.safetensors.
pub fn write_weights(
    path: &Path,
    modules: &BTreeMap<String, LoraModule>,
    saved: &BTreeMap<String, Saved>,
    meta: &AdapterMeta,
) -> Result<()> {
    let mut specs = Vec::new();
    let mut values: BTreeMap<String, Cow<[f32]>> = BTreeMap::new();
    fn put<'a>(
        (specs, values): (&mut Vec<TensorSpec>, &mut BTreeMap<String, Cow<'a, [f32]>>),
        name: String,
        shape: Vec<usize>,
        data: Cow<'a, [f32]>,
    ) -> Result<()> {
        if data.len() != shape.iter().product::<usize>() {
            return Err(Error::internal(format!("{name}: {} values for shape {shape:?}", data.len())));
        }
        specs.push(TensorSpec::new(name.clone(), Dtype::F32, shape));
        values.insert(name, data);
        Ok(())
    }
    let mut put = |name: String, shape: Vec<usize>, data| {
        let name = if meta.of_part { text_part::outside(&name) } else { name };
        put((&mut specs, &mut values), format!("{PREFIX}{name}"), shape, data)
    };
    for (module, m) in modules {
        if is_embedding(module) {
            let a = transposed(&m.b, m.out_features, m.r);
            let b = transposed(&m.a, m.r, m.in_features);
            put(format!("{module}.lora_embedding_A"), vec![m.r, m.out_features], a.into())?;
            put(format!("{module}.lora_embedding_B"), vec![m.in_features, m.r], b.into())?;
            continue;
        }
        put(format!("{module}.lora_A.weight"), vec![m.r, m.in_features], (&m.a).into())?;
        put(format!("{module}.lora_B.weight"), vec![m.out_features, m.r], (&m.b).into())?;
        if let Some(magnitude) = &m.magnitude {
            put(format!("{module}.lora_magnitude_vector"), vec![m.out_features], magnitude.into())?;
        }
    }
    for (name, saved) in saved {
        let adapted = name.rsplit_once('.').filter(|(module, _)| modules.contains_key(*module));
        let name = adapted.map_or(name.clone(), |(module, own)| format!("{module}{BASE_LAYER}.{own}"));
        put(name, saved.shape.clone(), (&saved.values).into())?;
    }
    standard_order(&mut specs);
    let mut metadata = pt_metadata();
    if let Some(fingerprint) = &meta.base_fingerprint {
        metadata.insert(adapter::FINGERPRINT.into(), fingerprint.clone());
    }
    let mut writer = SafetensorsWriter::new(path, specs.clone(), &metadata)?;
    let mut bytes = Vec::new();
    for spec in specs {
        // A whole head is large: no second copy of it.
        for piece in values[&spec.name].chunks(PIECE) {
            bytes.clear();
            push_floats(Dtype::F32, piece, &mut bytes)?;
            writer.write(&spec.name, &bytes)?;
        }
    }
    writer.finish()
}

/// Whether a module is an embedding, whose matrices are stored the other way round.
pub fn is_embedding(module: &str) -> bool {
    module.rsplit('.').next() == Some("embed_tokens")
}

/// Returns the settings that give this set: rank and alpha of most modules, and patterns for the others.
pub fn config(set: &LoraSet) -> Result<AdapterConfig> {
    let alpha = |m: &LoraModule| m.scale * m.r as f64;
    let mut counts: Vec<((usize, f64), usize)> = Vec::new();
    for m in set.modules.values() {
        match counts.iter_mut().find(|(key, _)| *key == (m.r, alpha(m))) {
            Some((_, n)) => *n += 1,
            None => counts.push(((m.r, alpha(m)), 1)),
        }
    }
    let ((r, common), _) = counts.into_iter().max_by_key(|(_, n)| *n).unwrap_or(((1, 1.0), 0));
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (module, m) in &set.modules {
        if m.r != r {
            ranks.insert(module.clone(), json!(m.r));
        }
        if alpha(m) != common {
            alphas.insert(module.clone(), whole(alpha(m)));
        }
    }
    let targets: BTreeSet<&str> = set.modules.keys().map(|m| m.rsplit('.').next().unwrap_or(m)).collect();
    // Names that other, unadapted modules have too would be adapted by PEFT; then the full names are needed.
    let blocks: BTreeSet<&str> =
        set.modules.keys().filter_map(|m| m.strip_prefix("model.layers.")?.split('.').next()).collect();
    let complete = set.modules.len() == targets.len() * blocks.len().max(1);
    let targets: Vec<String> = match complete {
        true => targets.into_iter().map(str::to_string).collect(),
        false => set.modules.keys().cloned().collect(),
    };
    let dora = set.modules.values().any(|m| m.magnitude.is_some());
    if dora && !set.modules.values().all(|m| m.magnitude.is_some()) {
        return Err(Error::data("DoRA in some modules only cannot be written for PEFT"));
    }
    let mut kept = Map::new();
    for (field, map) in [("rank_pattern", ranks), ("alpha_pattern", alphas)] {
        if !map.is_empty() {
            kept.insert(field.into(), Value::Object(map));
        }
    }
    Ok(AdapterConfig {
        r,
        lora_alpha: common,
        lora_dropout: set.dropout,
        target_modules: Targets::Names(targets),
        base_model_name_or_path: set.base_name.clone(),
        use_rslora: false,
        use_dora: dora,
        kept,
    })
}
