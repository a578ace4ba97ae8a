//! `FILE.gguf --dequantize`: a model directory of a file of llama.cpp.

use crate::{COMPANIONS, args::Args, config};
use kto_cli::{
    Context, Error, Exit, Kind, Record, Result, Ui, atomic, disk, escape,
    output::{Output, print_path},
    units,
};
use kto_formats::{
    bnb::torch_name,
    model_dir::{QUANTIZED_FROM, refuse_output},
    python_json,
    safetensors_out::pt_metadata,
    tokenizer::TextTokenizer,
};
use kto_weights::{Content, Form, Item, Layout, gguf::GgufModel};
use safetensors::Dtype;
use serde_json::Value;

/// Runs the tool. The model is known to be a file.
pub fn run(args: &Args, ui: &Ui) -> Result<Exit> {
    if !args.dequantize {
        let place = escape(&args.model.display().to_string());
        return Err(Error::data(format!("{place}: a GGUF file; it can only become a directory of floats"))
            .with_hint("kto-quantize FILE.gguf --dequantize -o DIR"));
    }
    refuse_output(&args.output, &args.model)?;
    let model = GgufModel::open(&args.model)?;
    let dtype = args.dtype.map_or_else(|| model.dtype(), Dtype::from);
    let layout = Layout::plan(items(&model, dtype), args.max_shard_size)?;
    if args.dry_run {
        let mut out = Output::create(None)?;
        out.write(describe(args, &model, dtype, &layout).as_bytes())?;
        out.finish()?;
        return Ok(Exit::Ok);
    }
    let mut record = Record::new(&args.common);
    record.output(Some(&args.output));
    record.side(args.report.as_deref());
    record.file(&args.model);
    record.check()?;
    let fingerprint = model.fingerprint();
    let version = env!("CARGO_PKG_VERSION");
    let job =
        format!("kto-quantize {version} of {fingerprint}\nfiles of {} bytes\n{dtype}\n", args.max_shard_size);
    let if_changed = args.common.make.if_changed;
    let directory = atomic::AtomicDir::resume(&args.output, args.force, if_changed, &job)?;
    record.begin(&directory);
    let bytes = layout.bytes();
    disk::require_free(&args.output, bytes.saturating_sub(disk::used(directory.path())) + COMPANIONS)?;
    let mut metadata = pt_metadata();
    metadata.insert(QUANTIZED_FROM.into(), fingerprint);
    if let Err(error) = write(args, &model, dtype, &layout, &metadata, &directory, ui) {
        // What is wrong with the input will be wrong the next time.
        if matches!(error.kind(), Kind::Data | Kind::Internal) {
            directory.keep(false);
        }
        return Err(error);
    }
    record.commit(directory, &args.output)?;
    ui.note(format_args!("{} weights, {} MB", layout.items().len(), bytes.div_ceil(1_000_000)));
    print_path(&args.output)?;
    Ok(Exit::Ok)
}

fn items(model: &GgufModel, dtype: Dtype) -> Vec<Item<'_>> {
    let place = model.file.place();
    let item =
        |weight| Content::Encoded { form: Form::Float(dtype), values: model.values(weight), keep: None };
    let all = model.weights.iter();
    all.map(|w| Item { name: w.name.clone(), shape: w.shape.clone(), content: item(w), place: place.clone() })
        .collect()
}

fn write(
    args: &Args,
    model: &GgufModel,
    dtype: Dtype,
    layout: &Layout,
    metadata: &std::collections::BTreeMap<String, String>,
    directory: &atomic::AtomicDir,
    ui: &Ui,
) -> Result<()> {
    // Small, and refused before the weights are read.
    let path = directory.path();
    let tokenizer = model.tokenizer(ui)?;
    for (name, bytes) in &tokenizer {
        let file = path.join(name);
        if let Some(folder) = file.parent() {
            atomic::create_dir_all(folder)?;
        }
        atomic::write(&file, bytes)?;
    }
    if tokenizer.iter().any(|(name, _)| name == "tokenizer.json") {
        TextTokenizer::from_model_dir(path)
            .map_err(|e| Error::data(format!("its tokenizer: {e}")))
            .at(model.file.place())?;
    }
    let text = |value: &Value| python_json::pretty_sorted(value) + "\n";
    atomic::write(&path.join("generation_config.json"), text(&model.generation()).as_bytes())?;
    let report = args.report.as_ref().map(|path| Output::create(Some(path))).transpose()?;
    match report {
        None => layout.write(directory, metadata, ui, None)?,
        Some(mut report) => {
            let mut line = |item: &Item, errors: &kto_weights::Errors| {
                let line = config::report_line(&item.name, &item.shape, Form::Float(dtype), errors);
                report.write(line.as_bytes())
            };
            layout.write(directory, metadata, ui, Some(&mut line))?;
            report.finish()?;
        }
    }
    let mut config = model.config.clone();
    config.insert("dtype".into(), torch_name(dtype).into());
    config.insert("torch_dtype".into(), torch_name(dtype).into());
    atomic::write(&path.join("config.json"), text(&Value::Object(config)).as_bytes())
}

fn describe(args: &Args, model: &GgufModel, dtype: Dtype, layout: &Layout) -> String {
    format!(
        "model {}\noutput {}\n{} weights {}\nsize {} before, {} after\n",
        model.file.place(),
        escape(&args.output.display().to_string()),
        layout.items().len(),
        torch_name(dtype),
        units::size(model.bytes()),
        units::size(layout.bytes())
    )
}
