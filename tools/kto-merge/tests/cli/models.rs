//! What becomes of bases: never overwritten, their forms told in config.json, what was trained whole scaled too.

use super::*;

fn copied(from: &Path, to: &Path) -> PathBuf {
    fs::create_dir(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    to.to_path_buf()
}

/// The result is an adapter; the models beside it are inputs all the same.
#[test]
fn an_adapter_replaces_no_model() {
    let top = tempfile::tempdir().unwrap();
    let base = copied(&llama().0, &top.path().join("base"));
    let config = base.join("config.json");
    let tuned = top.path().join("tuned");
    merged(&base, &llama().1, &tuned, &["-q"]);
    let to = ["--to", "mlx", "--force"];
    for (out, more) in [
        (base.clone(), &to[..]),
        (top.path().join("a"), &["--to", "mlx", "--manifest", text(&config)]),
        (top.path().join("b"), &["--to", "peft", "--rank", "2", "--manifest", text(&config)]),
    ] {
        let output = run(&base, &llama().1, &out, more);
        assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let extract = ["--base", text(&base), "--extract", text(&tuned), "--rank", "4"];
    let call = |more: &[&str]| Command::new(TOOL).args(extract).args(more).output().unwrap();
    let out = top.path().join("c");
    assert_eq!(call(&["-o", text(&out), "--manifest", text(&config)]).status.code(), Some(2));
    assert!(ModelDir::open(&base).is_ok());
    // Its manifest tells both models, and make knows the directory by a file that is there.
    let rule = top.path().join("rule");
    assert!(call(&["-q", "-o", text(&out), "--depfile", text(&rule)]).status.success());
    let manifest = fs::read_to_string(out.join("manifest.json")).unwrap();
    assert!(manifest.contains("base") && manifest.contains("tuned"), "{manifest}");
    assert!(fs::read_to_string(&rule).unwrap().contains("tuned/model.safetensors"));
    let other = top.path().join("d");
    let depfile = ["--manifest", "none", "--depfile", text(&rule)];
    assert!(call(&[&["-q", "-o", text(&other)][..], &depfile].concat()).status.success());
    assert!(fs::read_to_string(&rule).unwrap().contains("d/adapter_config.json:"));
}

#[test]
fn what_was_trained_whole_is_scaled_and_seen() {
    let top = tempfile::tempdir().unwrap();
    let (base, adapter) = (testdata("families/qwen2"), testdata("adapters/whole-head"));
    let head = |scale: &str| {
        let made = merged(&base, &adapter, &top.path().join(scale), &["--dtype", "f32", "--scale", scale]);
        ["lm_head", "model.embed_tokens"]
            .map(|name| made.tensors.require(&format!("{name}.weight")).unwrap().to_f32().unwrap())
    };
    let ([none, embedding], [half, _], [whole, _]) = (head("0"), head("0.5"), head("1"));
    assert!(none == embedding && whole != embedding);
    for ((h, w), e) in half.iter().zip(&whole).zip(&embedding) {
        assert!((h - (w + e) / 2.0).abs() < 1e-6);
    }
    // A head of its own where the base has none is told of when the difference becomes an adapter.
    let whole = top.path().join("1");
    let extract = ["--base", text(&base), "--extract", text(&whole), "--rank", "2"];
    let output = Command::new(TOOL).args(extract).args(["-o", text(&top.path().join("x"))]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("not in the adapter: lm_head.weight"), "{said}");
}

/// The settings of the base are those of the result only where the form is the same.
#[test]
fn a_result_of_another_form_says_so() {
    let top = tempfile::tempdir().unwrap();
    let adapter = small_adapter(&top.path().join("adapter"), None);
    let made =
        merged(&testdata("bnb/tiny_llama_int8"), &adapter, &top.path().join("nf4"), &["--form", "nf4"]);
    let settings = &made.config["quantization_config"];
    assert!(settings["load_in_4bit"] == true && settings["load_in_8bit"] == false, "{settings}");
    // 32 columns have no groups of 64.
    let (code, message) =
        refused(&testdata("families/llama-biases"), &testdata("adapters/dora-biases"), &["--form", "mlx"]);
    assert!(code == 2 && message.contains("no matrix of the model fits"), "{message}");
}

/// A name on the hub is a base for every command, not for merging alone.
#[test]
fn a_base_has_a_name_for_adapters_too() {
    let top = tempfile::tempdir().unwrap();
    let of_name = top.path().join("models--some--base");
    fs::create_dir_all(of_name.join("snapshots")).unwrap();
    fs::create_dir_all(of_name.join("refs")).unwrap();
    fs::write(of_name.join("refs/main"), "0123456789abcdef0123456789abcdef01234567").unwrap();
    let snapshot = of_name.join("snapshots/0123456789abcdef0123456789abcdef01234567");
    let base = copied(&llama().0, &snapshot);
    let tuned = top.path().join("tuned");
    merged(&base, &llama().1, &tuned, &["-q"]);
    let adapter = llama().1;
    for (i, more) in [
        &["--adapter", text(&adapter), "--to", "mlx"][..],
        &["--adapter", text(&adapter), "--to", "peft", "--rank", "2"],
        &["--extract", text(&tuned), "--rank", "2"],
    ]
    .into_iter()
    .enumerate()
    {
        let out = top.path().join(i.to_string());
        let call = ["-q", "--base", "some/base", "-o", text(&out)];
        let mut command = Command::new(TOOL);
        command.args(call).args(more).env("HF_HUB_CACHE", top.path()).env("HF_HUB_OFFLINE", "1");
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(out.join("adapter_config.json").exists());
    }
}
