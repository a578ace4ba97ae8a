//! `FILE.gguf --dequantize`: a model directory of a file of llama.cpp.

use crate::{args::Args, config, memory};
use kto_cli::{
    Context, Error, Exit, Kind, Record, Result, Ui, atomic, disk, escape,
    output::{Output, print_path},
    units,
};
use kto_formats::{
    bnb::torch_name,
    model_dir::{MERGED_FROM, QUANTIZED_FROM, refuse_output},
    python_json,
    safetensors_out::pt_metadata,
    tokenizer::TextTokenizer,
};
use kto_model::architecture::Architecture;
use kto_weights::{Content, Form, Item, Layout, MAX_SHARD, gguf::GgufModel};
use safetensors::Dtype;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

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
    let max_shard = args.max_shard_size.unwrap_or(MAX_SHARD);
    let layout = Layout::plan(items(&model, dtype), max_shard)?;
    if args.dry_run {
        model.tokenizer(ui)?;
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
    let making = Making { args, model: &model, dtype, layout: &layout, max_shard };
    making.run(&record, ui).map_err(|error| atomic::stopped(error, &args.output))?;
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

/// What is made, of what.
struct Making<'a> {
    args: &'a Args,
    model: &'a GgufModel,
    dtype: Dtype,
    layout: &'a Layout<'a>,
    max_shard: u64,
}

impl Making<'_> {
    fn run(&self, record: &Record, ui: &Ui) -> Result<()> {
        let (args, model) = (self.args, self.model);
        // Refused before anything is written.
        let mut files = model.tokenizer(ui)?;
        let text = |value: &Value| (python_json::pretty_sorted(value) + "\n").into_bytes();
        files.push(("generation_config.json".into(), text(&model.generation())));
        let config = text(&Value::Object(self.config()));
        let fingerprint = model.fingerprint();
        let mut job = format!(
            "kto-quantize {} of {fingerprint}\n{:?}\nfiles of {} bytes\n{}\n",
            env!("CARGO_PKG_VERSION"),
            model.file.stamp(),
            self.max_shard,
            self.dtype
        );
        if args.report.is_some() {
            // It measures every tensor: what another run has finished is of no use, nor this one's for another.
            job += &format!("with a report, at {:?}\n", std::time::SystemTime::now());
        }
        let if_changed = args.common.make.if_changed;
        let directory = kto_weights::resume(&args.output, args.force, if_changed, &job, ui)?;
        record.begin(&directory);
        let mut metadata = pt_metadata();
        metadata.insert(QUANTIZED_FROM.into(), fingerprint);
        metadata.extend(model.merged_from().map(|list| (MERGED_FROM.to_string(), list.to_string())));
        let small = files.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() + config.len();
        disk::require_free(&args.output, self.layout.room(&directory, &metadata)? + small as u64)?;
        let written = self.write(&directory, &metadata, &files, ui);
        if let Err(error) = written.and_then(|()| model.file.check_unchanged()) {
            // What is wrong with the input will be wrong the next time.
            if matches!(error.kind(), Kind::Data | Kind::Internal) || args.report.is_some() {
                directory.keep(false);
            }
            return Err(error);
        }
        atomic::write(&directory.path().join("config.json"), &config)?;
        record.commit(directory, &args.output)?;
        let (count, bytes) = (self.layout.items().len(), self.layout.bytes());
        ui.note(format_args!("{count} weights, {} MB", bytes.div_ceil(1_000_000)));
        Ok(())
    }

    fn config(&self) -> Map<String, Value> {
        let mut config = self.model.config.clone();
        // The newer and the older name.
        for field in ["dtype", "torch_dtype"] {
            config.insert(field.into(), torch_name(self.dtype).into());
        }
        config
    }

    /// Writes the weights, then the small files, and holds the tokenizer against its reader.
    fn write(
        &self,
        directory: &atomic::AtomicDir,
        metadata: &BTreeMap<String, String>,
        files: &[(String, Vec<u8>)],
        ui: &Ui,
    ) -> Result<()> {
        let path = directory.path();
        match &self.args.report {
            None => self.layout.write(directory, metadata, ui, None)?,
            Some(file) => {
                let mut report = Output::create(Some(file))?;
                let mut line = |item: &Item, errors: &kto_weights::Errors| {
                    let line = config::report_line(&item.name, &item.shape, Form::Float(self.dtype), errors);
                    report.write(line.as_bytes())
                };
                self.layout.write(directory, metadata, ui, Some(&mut line))?;
                report.finish()?;
            }
        }
        for (name, bytes) in files {
            let file = path.join(name);
            if let Some(folder) = file.parent() {
                atomic::create_dir_all(folder)?;
            }
            atomic::write(&file, bytes)?;
        }
        if !files.iter().any(|(name, _)| name == "tokenizer.json") {
            return Ok(());
        }
        match TextTokenizer::from_model_dir(path) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == Kind::Data => {
                Err(Error::data(format!("its tokenizer: {e}"))).at(self.model.file.place())
            }
            // That our own file cannot be read back is a failure of the disk.
            Err(e) => Err(e.with_kind(Kind::Io)),
        }
    }
}

fn describe(args: &Args, model: &GgufModel, dtype: Dtype, layout: &Layout) -> String {
    let report =
        args.report.as_ref().map(|report| format!("report {}\n", escape(&report.display().to_string())));
    let made = layout.items().iter().map(|item| (item.name.as_str(), item.shape.clone(), Form::Float(dtype)));
    let made: Vec<_> = made.collect();
    let architecture = Architecture::from_config(&Value::Object(model.config.clone()));
    let run = architecture.map_or(String::new(), |architecture| memory::lines(&architecture, &made));
    format!(
        "model {}\noutput {}\n{}{} weights {}\n{}{run}",
        model.file.place(),
        escape(&args.output.display().to_string()),
        report.unwrap_or_default(),
        layout.items().len(),
        torch_name(dtype),
        units::sizes(model.bytes(), layout.bytes(), true)
    )
}
