//! The result is an adapter: in the other form, of another rank, several in one, or the difference of two models.

use crate::{
    args::{AdapterForm, Args, Method},
    delta::{Change, Part},
    inputs::{self, EMBEDDING, HEAD, Inputs},
    low_rank::{Rows, factor},
    mix::Mix,
    origin,
};
use kto_cli::{Error, Exit, Record, Result, Ui, atomic, escape, output::print_path};
use kto_formats::{
    adapter,
    lora::{Ecosystem, LoraModule, LoraSet},
    model_dir::{ModelDir, refuse_output},
};
use kto_weights::{Held, Values, Weight, roles::role, weights};
use std::{collections::BTreeMap, path::Path};

/// Writes one adapter: the given one, or with --rank the best approximation to the mixture of all.
pub fn adapter(args: &Args, form: AdapterForm, ui: &Ui) -> Result<Exit> {
    let base = inputs::base(args, ui)?;
    let (set, base) = match args.rank {
        None => (converted(args, base.as_ref())?, base),
        Some(rank) => mixed(args, rank as usize, base, ui)?,
    };
    write(args, &set, form.into(), base.as_slice(), ui)
}

/// The adapter as it is.
fn converted(args: &Args, base: Option<&ModelDir>) -> Result<LoraSet> {
    let (adapters, weights) = inputs::adapters(args)?;
    let [weight] = weights[..] else {
        return Err(Error::usage("several adapters become one only with --rank"));
    };
    let mut set = adapters.into_iter().next().ok_or_else(|| Error::usage("--adapter is needed"))?;
    if let Some(base) = base {
        origin::check_base(base, &set, args.force_base)?;
    }
    if args.layers.is_some() {
        return Err(Error::usage("--layers needs --rank here"));
    }
    if args.method != Method::Linear {
        return Err(Error::usage("--method needs --rank here"));
    }
    let factor = weight * args.scale;
    if factor != 1.0 && set.modules.values().any(|m| m.magnitude.is_some()) {
        return Err(Error::usage("--scale: a DoRA adapter cannot be scaled as one")
            .with_hint("--rank makes it plain"));
    }
    set.modules.values_mut().for_each(|m| m.scale *= factor);
    Ok(set)
}

/// The change of one weight as a matrix.
struct Difference<'a> {
    base: &'a dyn Values,
    change: Change<'a>,
}

impl Rows for Difference<'_> {
    fn shape(&self) -> (usize, usize) {
        (self.base.len() / self.base.columns().max(1), self.base.columns())
    }
    fn read(&self, first: usize, out: &mut [f32]) {
        let columns = self.base.columns();
        self.base.read(first * columns, out);
        let before = out.to_vec();
        self.change.add_to(first, columns, out);
        out.iter_mut().zip(&before).for_each(|(o, b)| *o -= b);
    }
}

/// The best approximation to the mixture; gives the base back.
fn mixed(args: &Args, rank: usize, base: Option<ModelDir>, ui: &Ui) -> Result<(LoraSet, Option<ModelDir>)> {
    let given = base.map(|base| Inputs::open(args, base, ui)).transpose()?;
    let from_base = given.is_some();
    let (adapters, weights) = match &given {
        Some(inputs) => (inputs.adapters.clone(), inputs.weights.clone()),
        None => inputs::adapters(args)?,
    };
    if !from_base && adapters.iter().flat_map(|a| a.modules.values()).any(|m| m.magnitude.is_some()) {
        return Err(Error::usage("DoRA's change depends on the base").with_hint("--base DIR"));
    }
    if let Some(name) = adapters.iter().flat_map(|a| a.saved.keys()).next() {
        return Err(Error::data(format!("\"{}\" was trained whole and has no rank", escape(name)))
            .with_hint("merge into the base instead"));
    }
    let mut by_module: BTreeMap<&String, Vec<Part>> = BTreeMap::new();
    for (adapter, set) in adapters.iter().enumerate() {
        for (name, module) in &set.modules {
            by_module.entry(name).or_default().push(Part { module, weight: weights[adapter], adapter });
        }
    }
    let progress = ui.progress(by_module.len() as u64, "modules");
    let mut modules = BTreeMap::new();
    let mut least = (1.0, String::new());
    for (name, parts) in by_module {
        let m = parts[0].module;
        let (rows, columns) = (m.out_features, m.in_features);
        if let Some(other) =
            parts.iter().find(|p| (p.module.out_features, p.module.in_features) != (rows, columns))
        {
            let shape = [other.module.out_features, other.module.in_features];
            return Err(Error::data(format!(
                "\"{}\" has shapes [{rows}, {columns}] and {shape:?}",
                escape(name)
            )));
        }
        // Without a base plain changes are taken of zeros, of which they do not depend.
        let zeros = if from_base { Vec::new() } else { vec![0.0; rows * columns] };
        let weight_name = format!("{name}.weight");
        let stored = match &given {
            Some(inputs) => Weight::find(&inputs.base, inputs.base.tensors.require(&weight_name)?.name)?,
            None => None,
        };
        let held = Held { values: &zeros, columns };
        let base: &dyn Values = match &stored {
            Some(stored) => stored,
            None => &held,
        };
        let mix = Mix::new(args.method, args.density(), args.seed, name, &parts, base);
        let difference = Difference { base, change: Change { parts, mix, scale: args.scale } };
        put(&mut modules, &mut least, name, &difference, rank, args.seed)?;
        progress.add(1);
    }
    tell(ui, &least, rank);
    let first = &adapters[0];
    if args.method != Method::Linear && adapters.len() == 1 {
        ui.warn("--method has one adapter to mix");
    }
    let set = LoraSet {
        modules,
        saved: BTreeMap::new(),
        base_fingerprint: adapters.iter().find_map(|a| a.base_fingerprint.clone()),
        base_name: first.base_name.clone(),
        dropout: 0.0,
        ecosystem: first.ecosystem,
        of_part: first.of_part,
    };
    Ok((set, given.map(|inputs| inputs.base)))
}

fn put(
    modules: &mut BTreeMap<String, LoraModule>,
    least: &mut (f64, String),
    name: &str,
    rows: &dyn Rows,
    rank: usize,
    seed: u64,
) -> Result<()> {
    let (out_features, in_features) = rows.shape();
    let made = factor(rows, rank, seed)?;
    if made.share < least.0 {
        *least = (made.share, name.to_string());
    }
    let r = made.b.len() / out_features.max(1);
    let module =
        LoraModule { a: made.a, b: made.b, r, in_features, out_features, scale: 1.0, magnitude: None };
    modules.insert(name.to_string(), module);
    Ok(())
}

fn tell(ui: &Ui, least: &(f64, String), rank: usize) {
    if !least.1.is_empty() {
        ui.note(format_args!(
            "rank {rank} holds at least {:.2} % of the change (least: {})",
            100.0 * least.0,
            escape(&least.1)
        ));
    }
}

/// The difference of two models.
struct Models<'a> {
    base: Weight<'a>,
    tuned: Weight<'a>,
}

impl Rows for Models<'_> {
    fn shape(&self) -> (usize, usize) {
        (self.base.len() / self.base.columns().max(1), self.base.columns())
    }
    fn read(&self, first: usize, out: &mut [f32]) {
        let start = first * self.base.columns();
        let mut before = vec![0.0; out.len()];
        self.base.read(start, &mut before);
        self.tuned.read(start, out);
        out.iter_mut().zip(&before).for_each(|(t, b)| *t -= b);
    }
}

/// Writes the difference between `tuned` and the base as an adapter: the linear layers that differ.
pub fn extract(args: &Args, tuned: &Path, ui: &Ui) -> Result<Exit> {
    let (base, tuned) = (inputs::needed_base(args, ui)?, ModelDir::open(tuned)?);
    refuse_output(&args.output, &tuned.path)?;
    let rank = args.rank.unwrap_or(16) as usize;
    let names: Vec<&str> = weights(&base).collect();
    let progress = ui.progress(names.len() as u64, "weights");
    let (mut modules, mut least, mut others) = (BTreeMap::new(), (1.0, String::new()), Vec::new());
    for name in names {
        progress.add(1);
        let Some(other) = tuned.tensors.get(name) else {
            return Err(Error::data(format!(
                "{}: no tensor \"{}\", which the base has",
                escape(&tuned.path.display().to_string()),
                escape(name)
            )));
        };
        let (Some(a), Some(b)) = (Weight::find(&base, name)?, Weight::find(&tuned, other.name)?) else {
            continue;
        };
        if a.shape != b.shape {
            let name = escape(name);
            return Err(Error::data(format!(
                "\"{name}\" has shape {:?} in the base and {:?} in the other",
                a.shape, b.shape
            )));
        }
        kto_weights::check_finite_all(&a)?;
        kto_weights::check_finite_all(&b)?;
        let pair = Models { base: a, tuned: b };
        if !differs(&pair) {
            continue;
        }
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match role(module) {
            Some(kto_weights::roles::Role::Linear(_)) => {
                put(&mut modules, &mut least, module, &pair, rank, args.seed)?;
            }
            _ => others.push(name),
        }
    }
    for name in weights(&tuned).filter(|name| !base.tensors.contains(name)) {
        // A head of its own where the base's is the embedding may hold the same.
        let tied = if name == HEAD { base.tensors.get(EMBEDDING) } else { None };
        let tied = tied.map(|view| Weight::find(&base, view.name)).transpose()?.flatten();
        let same = match (tied, Weight::find(&tuned, name)?) {
            (Some(a), Some(b)) => a.shape == b.shape && !differs(&Models { base: a, tuned: b }),
            _ => false,
        };
        if !same {
            others.push(name);
        }
    }
    if modules.is_empty() {
        return Err(Error::data("no linear layer differs: there is nothing to extract"));
    }
    if !others.is_empty() {
        let shown: Vec<String> = others.iter().take(4).map(|n| escape(n)).collect();
        let more = if others.len() > shown.len() { ", …" } else { "" };
        let text = "differ too, or are missing in the base, and are not in the adapter";
        ui.warn(format_args!("{} other tensors {text}: {}{more}", others.len(), shown.join(", ")));
    }
    tell(ui, &least, rank);
    let set = LoraSet {
        modules,
        saved: BTreeMap::new(),
        base_fingerprint: Some(base.fingerprint()),
        base_name: base.path.to_str().map(str::to_string),
        dropout: 0.0,
        ecosystem: Ecosystem::Peft,
        of_part: base.is_part,
    };
    write(args, &set, args.to.map_or(Ecosystem::Peft, Ecosystem::from), &[base, tuned], ui)
}

fn differs(pair: &Models) -> bool {
    let (rows, columns) = pair.shape();
    let mut row = vec![0.0; columns];
    (0..rows).any(|i| {
        pair.read(i, &mut row);
        row.iter().any(|v| *v != 0.0)
    })
}

fn write(args: &Args, set: &LoraSet, form: Ecosystem, models: &[ModelDir], ui: &Ui) -> Result<Exit> {
    if args.dry_run {
        ui.note("nothing is written with --dry-run");
        return Ok(Exit::Ok);
    }
    let mut record = Record::new(&args.common);
    record.output(Some(&args.output));
    models.iter().for_each(|model| record.model(&model.path, || model.fingerprint()));
    args.adapters.iter().for_each(|path| record.directory(&adapter::directory(path)));
    record.marker(adapter::CONFIG);
    record.check()?;
    let directory =
        atomic::AtomicDir::create_if_changed(&args.output, args.force, args.common.make.if_changed)?;
    set.write(directory.path(), form)?;
    record.commit(directory, &args.output)?;
    ui.note(format_args!("{} modules of rank {}", set.modules.len(), set.rank()));
    print_path(&args.output)?;
    Ok(Exit::Ok)
}
