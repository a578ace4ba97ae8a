//! Models that are refused, and whether kto-train would say the same.

use crate::{Edit, edited, find, golden, refused, run, text};
use safetensors::Dtype;
use std::{fs, path::Path};

#[test]
fn bad_models_are_refused_by_name() {
    assert_eq!(refused(Path::new("/nonexistent"), &[]).0, 66);
    let (code, message) = refused(&golden("tiny_llama_bnb4"), &[]);
    assert!(code == 65 && message.contains("already quantized"), "{message}");
    let up = "model.layers.1.mlp.up_proj.weight";
    let edits: [(Edit, &str); 7] = [
        (&|t| find(t, up).1[6..8].copy_from_slice(&[0xc0, 0x7f]), "up_proj.weight\": NaN at index 3"),
        (
            &|t| find(t, "lm_head.weight").1[..2].copy_from_slice(&[0x80, 0x7f]),
            "lm_head.weight\": infinity at index 0",
        ),
        (&|t| t.retain(|t| t.0.name != up), "no tensor \"model.layers.1.mlp.up_proj.weight\""),
        (&|t| find(t, up).0.dtype = Dtype::I16, "dtype I16"),
        (
            &|t| {
                let mut router = find(t, up).clone();
                router.0.name = up.replace("up_proj", "router");
                t.push(router);
                t.sort_by(|a, b| a.0.name.cmp(&b.0.name));
            },
            "router.weight\" of shape [160, 64] is no layer of a decoder of the family \"llama\"",
        ),
        (&|t| t.retain(|t| !t.0.name.contains("layers.1.")), "no tensor \"model.layers.1."),
        (
            &|t| t.iter_mut().for_each(|t| t.0.name = t.0.name.replace("layers.1.", "layers.2.")),
            "no tensor \"model.layers.1.",
        ),
    ];
    for (edit, says) in edits {
        let top = tempfile::tempdir().unwrap();
        let (code, message) = refused(&edited(top.path(), edit, |c| c), &[]);
        assert!(code == 65 && message.contains(says), "{code} {message}");
    }
    let top = tempfile::tempdir().unwrap();
    let model = edited(top.path(), &|_| {}, |c| c);
    let whole = fs::read(model.join("model.safetensors")).unwrap();
    fs::write(model.join("model.safetensors"), &whole[..whole.len() - 1]).unwrap();
    let (code, message) = refused(&model, &[]);
    assert!(code == 65 && message.contains("cut short"), "{message}");
}

#[test]
fn every_form_names_the_file_of_a_bad_value() {
    let top = tempfile::tempdir().unwrap();
    let model =
        edited(top.path(), &|t| find(t, "lm_head.weight").1[..2].copy_from_slice(&[0x80, 0x7f]), |c| c);
    let says =
        format!("{}: tensor \"lm_head.weight\": infinity at", model.join("model.safetensors").display());
    for form in ["nf4", "int8", "mlx", "gguf"] {
        let (code, message) = refused(&model, &["-q", "--form", form]);
        assert!(code == 65 && message.contains(&says), "{form}: {message}");
    }
}

/// Which tensors a family has, and of which shapes, is known in one place; what it says is what kto-train says.
#[test]
fn the_configuration_and_the_tensors_must_agree() {
    let swap: Edit = &|t| {
        find(t, "model.layers.0.mlp.down_proj.weight").0.shape.reverse();
    };
    let none: Edit = &|_| {};
    let set = |field: &'static str, from: &'static str, to: &'static str| {
        move |c: String| {
            let (from, to) = (format!("\"{field}\": {from}"), format!("\"{field}\": {to}"));
            assert!(c.contains(&from), "{from}");
            c.replace(&from, &to)
        }
    };
    type Config<'a> = &'a dyn Fn(String) -> String;
    let wrong: [(Edit, Config, &str); 8] = [
        (
            swap,
            &|c| c,
            "model: tensor \"model.layers.0.mlp.down_proj.weight\": shape [160, 64], expected [64, 160]",
        ),
        (none, &set("hidden_size", "64", "0"), "config.json: \"hidden_size\" must be an integer from 1 to"),
        (
            none,
            &set("hidden_size", "64", "128"),
            "\"model.embed_tokens.weight\": shape [256, 64], expected [256, 128]",
        ),
        (
            none,
            &set("num_key_value_heads", "2", "3"),
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        (none, &set("num_key_value_heads", "2", "4"), "k_proj.weight\": shape [32, 64], expected [64, 64]"),
        (none, &set("num_hidden_layers", "2", "1"), "config.json says 1 blocks (num_hidden_layers)"),
        (none, &set("model_type", "\"llama\"", "\"gpt2\""), "model_type \"gpt2\" is not supported"),
        (none, &set("model_type", "\"llama\"", "\"mixtral\""), "model_type \"mixtral\" is not supported"),
    ];
    for (edit, config, says) in wrong {
        let top = tempfile::tempdir().unwrap();
        let model = edited(top.path(), edit, config);
        for form in [&[][..], &["--form", "mlx", "--group-size", "32"], &["--form", "gguf"], &["--plan"]] {
            let (code, message) = refused(&model, form);
            assert!(code == 65 && message.contains(says), "{form:?}: {code} {message}");
            let family = says.starts_with("model_type");
            assert!(
                !family || message.contains("hint: supported families: llama, mistral, qwen2"),
                "{message}"
            );
        }
        // Floats are no other model.
        let (code, message) = refused(&model, &["--dequantize", "--dtype", "f32"]);
        assert!(code == 65 && message.contains(says), "{message}");
    }
}

#[test]
fn a_group_that_no_row_fits_is_what_is_wrong() {
    let (code, message) = refused(&golden("tiny_llama_bf16"), &["--form", "mlx", "--group-size", "128"]);
    assert!(code == 2 && !message.contains("--skip"), "{message}");
    assert!(
        message.contains("no multiple of the group of 128\nhint: a smaller --group-size, or"),
        "{message}"
    );
}

/// It is copied, for who reads only the weights.
#[test]
fn a_tokenizer_that_is_none_is_named() {
    let top = tempfile::tempdir().unwrap();
    let model = edited(top.path(), &|_| {}, |c| c);
    let out = top.path().join("out");
    fs::write(model.join("tokenizer.json"), "{\"model\": {\"vocab\":").unwrap();
    let output = run(&[text(&model), "-o", text(&out)]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("warning: ") && said.contains("tokenizer.json: no JSON object: EOF"), "{said}");
    assert!(said.contains("it is copied as it is") && out.join("tokenizer.json").exists());
}

/// A name that says GGUF gets a file of that form, or is refused.
#[test]
fn a_directory_is_not_called_like_a_file() {
    let top = tempfile::tempdir().unwrap();
    let (model, out) = (golden("tiny_llama_bf16"), top.path().join("x.GGUF"));
    let output = run(&[text(&model), "-o", text(&out)]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(2) && said.contains("hint: --form gguf makes such a file"),
        "{said}"
    );
    let output = run(&[text(&golden("tiny_llama_bnb4")), "-o", text(&out), "--dequantize"]);
    assert!(output.status.code() == Some(2) && !out.exists());
    let output = run(&[text(&model), "-o", text(&out), "--form", "nf4"]);
    assert!(output.status.code() == Some(2) && !out.exists());
}

/// A plan names what would be written, a report too.
#[test]
fn a_plan_names_the_report() {
    let model = golden("tiny_llama_bf16");
    for more in [&[][..], &["--form", "gguf", "--type", "Q8_0"]] {
        let top = tempfile::tempdir().unwrap();
        let (out, report) = (top.path().join("out"), top.path().join("r.jsonl"));
        let flags = [text(&model), "-q", "-o", text(&out), "--report", text(&report), "--plan"];
        let output = run(&[&flags[..], more].concat());
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && said.contains(&format!("\nreport {}\n", report.display())),
            "{said}"
        );
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0);
    }
}
