//! Model directories, good ones and bad ones.

use super::*;
use crate::safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata};
use safetensors::Dtype;

/// Writes tensors `(name, value)` of four equal f32 values.
fn weights(path: &Path, tensors: &[(&str, f32)]) {
    let specs = tensors.iter().map(|(n, _)| TensorSpec::new(*n, Dtype::F32, [2, 2])).collect();
    let mut writer = SafetensorsWriter::new(path, specs, &pt_metadata()).unwrap();
    for (name, value) in tensors {
        writer.write(name, &value.to_le_bytes().repeat(4)).unwrap();
    }
    writer.finish().unwrap();
}

fn sharded(dir: &Path, map: &str) -> PathBuf {
    let dir = dir.join("sharded");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("config.json"), r#"{"model_type":"llama","hidden_size":2}"#).unwrap();
    weights(&dir.join("m-1.safetensors"), &[("a", 1.0)]);
    weights(&dir.join("m-2.safetensors"), &[("b", 2.0), ("c", 3.0)]);
    std::fs::write(dir.join("model.safetensors.index.json"), map).unwrap();
    dir
}

const INDEX: &str = r#"{"metadata":{"total_size":48},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors","c":"m-2.safetensors"}}"#;

fn refused(map: &str) -> (Kind, String) {
    let top = tempfile::tempdir().unwrap();
    let error = ModelDir::open(&sharded(top.path(), map)).err().unwrap();
    (error.kind(), error.to_string())
}

#[test]
fn shards_and_one_file_are_the_same_model() {
    let top = tempfile::tempdir().unwrap();
    let shards = ModelDir::open(&sharded(top.path(), INDEX)).unwrap();
    assert!(shards.notes.is_empty());
    assert_eq!(shards.tensors.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(shards.tensors.require("c").unwrap().to_f32().unwrap(), [3.0; 4]);
    let whole = top.path().join("whole");
    std::fs::create_dir(&whole).unwrap();
    std::fs::write(whole.join("config.json"), r#"{"hidden_size":2,"model_type":"llama","dtype":"float32"}"#)
        .unwrap();
    weights(&whole.join("model.safetensors"), &[("c", 3.0), ("b", 2.0), ("a", 1.0)]);
    let print = ModelDir::open(&whole).unwrap().fingerprint();
    assert_eq!((print.len(), &print), (64, &shards.fingerprint()));
    weights(&whole.join("model.safetensors"), &[("c", 3.0), ("b", 2.0), ("a", 1.5)]);
    assert_ne!(print, ModelDir::open(&whole).unwrap().fingerprint());
    assert!(same_origin("a+s", "s") && same_origin("s", "b+s") && !same_origin("a+s", "t"));
}

#[test]
fn an_index_cannot_lead_out_of_the_directory() {
    for name in [
        "../x.safetensors",
        "/etc/passwd",
        "..\\\\x.safetensors",
        "a\\u0000.safetensors",
        "",
        "..",
        "sub/x.safetensors",
    ] {
        let (kind, text) = refused(&INDEX.replace("m-1.safetensors", name));
        assert_eq!(kind, Kind::Data, "{name}: {text}");
        assert!(text.contains("points outside") || text.contains("is empty"), "{name}: {text}");
    }
    assert!(refused(&INDEX.replace("m-1.safetensors", "pytorch_model.bin")).1.contains("not a .safetensors"));
}

#[test]
fn wrong_indexes_are_explained() {
    let (kind, text) = refused(&INDEX.replace("m-1", "m-3"));
    assert!(kind == Kind::NoInput && text.contains("m-3.safetensors"), "{text}");
    let (kind, text) = refused(&INDEX.replace("\"a\":\"m-1", "\"a\":\"m-2"));
    assert!(kind == Kind::Data && text.contains("m-2.safetensors: no tensor \"a\""), "{text}");
    let (kind, text) = refused(&INDEX.replace("\"c\"", "\"d\""));
    assert!(kind == Kind::Data && text.contains("no tensor \"d\""), "{text}");
    assert!(refused("[]").1.contains("not a JSON object"));
    assert!(refused("{\"weight_map\":3}").1.contains("weight_map"));
    let top = tempfile::tempdir().unwrap();
    let model = ModelDir::open(&sharded(top.path(), &INDEX.replace("48", "49"))).unwrap();
    assert!(model.notes[0].contains("total_size says 49"));
}

/// A tensor that an index leaves out is named; one that it lists twice is refused, wherever the lists lie.
#[test]
fn every_tensor_is_accounted_for() {
    let top = tempfile::tempdir().unwrap();
    let map = INDEX.replace(",\"c\":\"m-2.safetensors\"", "");
    let model = ModelDir::open(&sharded(top.path(), &map)).unwrap();
    assert!(model.tensors.contains("c") && model.notes.len() == 1, "{:?}", model.notes);
    assert!(model.notes[0].ends_with("m-2.safetensors: tensor \"c\" is not in the index; it is used"));
    let (kind, text) = refused(&INDEX.replace("\"c\":", "\"a\":\"m-2.safetensors\",\"c\":"));
    assert!(kind == Kind::Data && text.ends_with("index.json: tensor \"a\" is listed twice"), "{text}");
    let (kind, text) = refused(&INDEX.replace("\"c\":", "\"b\":"));
    assert!(kind == Kind::Data && text.ends_with("tensor \"b\" is listed twice"), "{text}");
    let both = top.path().join("both");
    std::fs::create_dir(&both).unwrap();
    let dir = sharded(&both, INDEX);
    weights(&dir.join("m-1.safetensors"), &[("a", 1.0), ("b", 2.0)]);
    let text = ModelDir::open(&dir).err().unwrap().to_string();
    assert!(text.contains("tensor \"b\" is in "), "{text}");
}

#[test]
fn remote_code_is_refused() {
    let top = tempfile::tempdir().unwrap();
    let dir = sharded(top.path(), INDEX);
    let open = |config: &str| {
        std::fs::write(dir.join("config.json"), config).unwrap();
        ModelDir::open(&dir).map(drop).map_err(|e| e.to_string())
    };
    let text = open(r#"{"model_type":"x","auto_map":{"AutoModelForCausalLM":"modeling_x.X"}}"#).unwrap_err();
    assert!(text.ends_with("config.json: \"auto_map\" asks for remote code, which is never run"), "{text}");
    open(r#"{"model_type":"llama","auto_map":{"AutoModelForCausalLM":"m.LlamaForCausalLMX"}}"#).unwrap_err();
    open(r#"{"model_type":"phi3","auto_map":{"AutoModelForCausalLM":"modeling_phi3.Phi3ForCausalLM"}}"#)
        .unwrap();
    open(r#"{"model_type":"x","auto_map":null}"#).unwrap();
}

#[test]
fn an_output_cannot_lie_in_its_input() {
    let top = tempfile::tempdir().unwrap();
    let (input, link) = (top.path().join("in"), top.path().join("link"));
    std::fs::create_dir(&input).unwrap();
    std::os::unix::fs::symlink("in", &link).unwrap();
    for out in [input.clone(), link.clone(), input.join("a/b"), link.join("new"), input.join("../in")] {
        assert_eq!(refuse_output(&out, &input).unwrap_err().kind(), Kind::Usage, "{}", out.display());
    }
    refuse_output(&top.path().join("inside"), &input).unwrap();
    refuse_output(Path::new("new"), &input).unwrap();
}

#[test]
fn one_name_in_two_shards() {
    let top = tempfile::tempdir().unwrap();
    let dir = sharded(top.path(), INDEX);
    weights(&dir.join("m-1.safetensors"), &[("a", 1.0), ("b", 1.0)]);
    assert!(ModelDir::open(&dir).err().unwrap().to_string().contains("is in "));
}

#[test]
fn links_to_blobs_are_followed_and_loops_refused() {
    let top = tempfile::tempdir().unwrap();
    let dir = sharded(top.path(), INDEX);
    std::fs::create_dir(top.path().join("blobs")).unwrap();
    std::fs::rename(dir.join("m-1.safetensors"), top.path().join("blobs/0a1b")).unwrap();
    std::os::unix::fs::symlink("../blobs/0a1b", dir.join("m-1.safetensors")).unwrap();
    ModelDir::open(&dir).unwrap();
    std::fs::remove_file(dir.join("m-1.safetensors")).unwrap();
    std::os::unix::fs::symlink("m-1.safetensors", dir.join("m-1.safetensors")).unwrap();
    assert_eq!(ModelDir::open(&dir).err().unwrap().kind(), Kind::NoInput);
    std::fs::remove_file(dir.join("m-1.safetensors")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.join("m-1.safetensors")).unwrap();
    assert!(ModelDir::open(&dir).err().unwrap().to_string().contains("not a regular file"));
}

#[test]
fn other_directories_are_named() {
    let top = tempfile::tempdir().unwrap();
    let open = || ModelDir::open(top.path()).err().unwrap();
    assert_eq!(open().kind(), Kind::NoInput);
    std::fs::write(top.path().join("config.json"), "{}").unwrap();
    assert_eq!(open().kind(), Kind::NoInput);
    std::fs::write(top.path().join("adapter_config.json"), "{}").unwrap();
    assert!(open().to_string().contains("an adapter, not a model"));
    std::fs::write(top.path().join("m.gguf"), "GGUF").unwrap();
    assert!(open().to_string().contains("GGUF weights"));
    assert!(ModelDir::open(&top.path().join("m.gguf")).err().unwrap().to_string().contains("a GGUF file"));
    std::fs::write(top.path().join("pytorch_model.bin"), "").unwrap();
    assert!(open().to_string().contains("pickle"));
    std::fs::write(top.path().join("model.safetensors"), "version https://git-lfs.github.com/spec/v1")
        .unwrap();
    assert!(open().to_string().contains("git-lfs pointer"));
    std::fs::write(top.path().join("config.json"), "{\n\"a\":").unwrap();
    assert!(open().to_string().contains("config.json:2: not JSON"));
}
