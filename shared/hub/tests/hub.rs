//! Downloads from a hub on loopback that behaves as the real one, and badly on request.
#![cfg(feature = "download")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod server;

use kto_cli::{Kind, Ui};
use kto_hub::{ModelName, Need, Settings, locate_named, scan};
use server::{File, Hub, Trouble};
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

const NAME: &str = "org/tiny";

/// A cache of its own for a test, and the settings that lead to it.
struct Cache {
    dir: tempfile::TempDir,
    endpoint: String,
    more: Vec<(&'static str, String)>,
}

impl Cache {
    fn new(hub: &Hub) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), endpoint: hub.endpoint(), more: Vec::new() }
    }

    fn set(&mut self, name: &'static str, value: &str) {
        self.more.push((name, value.into()));
    }

    fn settings(&self) -> Settings {
        Settings::from_variables(|name| match name {
            "HF_HUB_CACHE" => Some(self.dir.path().into()),
            "HF_HOME" => Some(self.dir.path().join("home").into()),
            "HF_ENDPOINT" => Some(OsString::from(&self.endpoint)),
            other => self.more.iter().find(|(n, _)| *n == other).map(|(_, value)| OsString::from(value)),
        })
        .unwrap()
    }

    fn get(&self, name: &str, need: &Need) -> kto_cli::Result<PathBuf> {
        locate_named(&self.settings(), &ModelName::parse(name).unwrap(), need, &Ui::silent("test"))
    }

    /// Everything: the kind and text of the refusal.
    fn refused(&self) -> (Kind, String) {
        let error = self.get(NAME, &ANY).unwrap_err();
        (error.kind(), format!("{error} | {}", error.hint().unwrap_or_default()))
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("models--org--tiny")
    }
}

const ANY: Need = Need::Weights(|_| Ok(()));

/// A safetensors file with one tensor.
fn weights(name: &str) -> Vec<u8> {
    let header = format!("{{\"{name}\":{{\"dtype\":\"F32\",\"shape\":[4096],\"data_offsets\":[0,16384]}}}}");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..16384_u32).map(|i| (i % 251) as u8));
    bytes
}

fn tiny() -> Vec<File> {
    vec![
        File::small("config.json", r#"{"model_type": "llama"}"#),
        File::small("tokenizer.json", "{}"),
        File::small("additional_chat_templates/rag.jinja", "{{ messages }}"),
        File::small("README.md", "not fetched"),
        File::small("modeling_tiny.py", "not fetched"),
        File::large("pytorch_model.bin", b"not fetched".to_vec()),
        File::large("model.safetensors", weights("a")),
    ]
}

#[test]
fn a_model_comes_whole_and_is_then_at_home() {
    let hub = Hub::start(tiny());
    let mut cache = Cache::new(&hub);
    let snapshot = cache.get(NAME, &ANY).unwrap();
    assert_eq!(snapshot, cache.folder().join("snapshots").join(server::COMMIT));
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights("a"));
    let mut names: Vec<_> = fs::read_dir(&snapshot).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["additional_chat_templates", "config.json", "model.safetensors", "tokenizer.json"]);
    // The layout of huggingface_hub.
    let link = fs::read_link(snapshot.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(server::sha256(&weights("a"))));
    let link = fs::read_link(snapshot.join("additional_chat_templates/rag.jinja")).unwrap();
    assert!(link.starts_with("../../../blobs"), "{link:?}");
    assert_eq!(fs::read_to_string(cache.folder().join("refs/main")).unwrap(), server::COMMIT);
    assert!(cache.dir.path().join(".locks/models--org--tiny").is_dir());
    assert!(cache.dir.path().join("CACHEDIR.TAG").is_file());
    // Nothing is asked for twice, and nothing at all offline.
    let asked = hub.requests();
    assert_eq!(cache.get(NAME, &ANY).unwrap(), snapshot);
    cache.set("HF_HUB_OFFLINE", "1");
    assert_eq!(cache.get(NAME, &ANY).unwrap(), snapshot);
    assert_eq!(hub.requests(), asked);
}

#[test]
fn only_what_is_needed_is_fetched() {
    let hub = Hub::start(tiny());
    let cache = Cache::new(&hub);
    let snapshot = cache.get(NAME, &Need::Tokenizer).unwrap();
    assert!(snapshot.join("tokenizer.json").exists() && !snapshot.join("model.safetensors").exists());
    // The weights follow when they are needed.
    cache.get(NAME, &ANY).unwrap();
    assert!(snapshot.join("model.safetensors").exists());
    // A configuration that is refused costs no weights.
    let other = Cache::new(&hub);
    let refuse = Need::Weights(|_| Err(kto_cli::Error::data("model_type \"x\" is not supported")));
    let error = other.get(NAME, &refuse).unwrap_err();
    assert_eq!(error.to_string(), "org/tiny: model_type \"x\" is not supported");
    assert!(!other.folder().join("blobs").join(server::sha256(&weights("a"))).exists());
}

#[test]
fn shards_come_by_their_index() {
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "sub-2.safetensors"}}"#;
    let mut files = vec![
        File::small("config.json", "{}"),
        File::small("model.safetensors.index.json", index),
        File::large("model-1.safetensors", weights("a")),
        File::large("sub-2.safetensors", weights("b")),
        File::large("consolidated.safetensors", weights("c")),
    ];
    let snapshot = Cache::new(&Hub::start(files.clone())).get(NAME, &ANY).map(|path| path.join("x"));
    assert!(snapshot.is_ok());
    files.remove(3);
    let hub = Hub::start(files.clone());
    let (kind, text) = Cache::new(&hub).refused();
    assert!(kind == Kind::Data && text.contains("names sub-2.safetensors, which the model lacks"), "{text}");
    files[1] = File::small("model.safetensors.index.json", r#"{"weight_map": {"a": "../../x.safetensors"}}"#);
    let hub = Hub::start(files);
    let (kind, text) = Cache::new(&hub).refused();
    assert!(kind == Kind::Data && text.contains("points outside the model directory"), "{text}");
}

#[test]
fn a_broken_download_goes_on_where_it_ended() {
    let hub = Hub::start(tiny());
    // Every body of the large file ends after 5000 bytes: four requests, three of them with a range.
    hub.trouble(Trouble::Cut(5000));
    let cache = Cache::new(&hub);
    let snapshot = cache.get(NAME, &ANY).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights("a"));
    assert!(hub.ranges() >= 3, "{}", hub.ranges());

    // A server without ranges sends all of it again, and never gets through.
    hub.trouble(Trouble::CutWithoutRanges(5000));
    let cache = Cache::new(&hub);
    let (kind, text) = cache.refused();
    assert!(kind == Kind::Io && text.contains("model.safetensors: the connection ends after"), "{text}");
    assert!(text.contains("what has been fetched is kept"), "{text}");
    // The next run has a better server, and takes over what is there.
    let partial = cache.folder().join("blobs").join(format!("{}.incomplete", server::sha256(&weights("a"))));
    assert_eq!(fs::metadata(&partial).unwrap().len(), 5000);
    hub.trouble(Trouble::None);
    cache.get(NAME, &ANY).unwrap();
    assert_eq!(hub.last_range(), Some(5000));
    assert!(!partial.exists());

    // What an earlier run left may be wrong: then all of it comes again.
    let cache = Cache::new(&hub);
    cache.get(NAME, &Need::Tokenizer).unwrap();
    let partial = cache.folder().join("blobs").join(format!("{}.incomplete", server::sha256(&weights("a"))));
    fs::write(&partial, vec![7; 3000]).unwrap();
    let snapshot = cache.get(NAME, &ANY).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights("a"));
}

#[test]
fn wrong_bytes_never_get_a_name() {
    let hub = Hub::start(tiny());
    for (trouble, said) in [
        (Trouble::WrongBytes("model.safetensors"), "model.safetensors: what the hub sent has the SHA-256"),
        (Trouble::WrongBytes("config.json"), "config.json: what the hub sent has the git hash"),
    ] {
        hub.trouble(trouble);
        let cache = Cache::new(&hub);
        let (kind, text) = cache.refused();
        assert!(kind == Kind::Data && text.contains(said), "{text}");
        let left = fs::read_dir(cache.folder().join("blobs")).unwrap();
        assert_eq!(left.filter(|e| e.as_ref().unwrap().path().extension().is_some()).count(), 0);
        assert!(!cache.folder().join("refs/main").exists());
        hub.trouble(Trouble::None);
        cache.get(NAME, &ANY).unwrap();
    }
}

#[test]
fn refusals_of_the_hub_are_one_line() {
    let hub = Hub::start(tiny());
    for (trouble, kind, said) in [
        (Trouble::Status(404, "RepoNotFound"), Kind::NoInput, "no such model, or it is private"),
        (Trouble::Status(401, ""), Kind::NoInput, "HF_TOKEN"),
        (Trouble::Status(403, "GatedRepo"), Kind::NoInput, "the model is gated"),
        (Trouble::Status(404, "RevisionNotFound"), Kind::NoInput, "no revision \"main\""),
        (Trouble::Status(429, ""), Kind::TryAgain, "fewer requests"),
        (Trouble::Status(503, ""), Kind::TryAgain, "the hub fails (503)"),
        (Trouble::Status(418, ""), Kind::Unavailable, "the hub answers 418"),
        (Trouble::NoJson, Kind::Data, "list of files is not JSON"),
        (Trouble::Loop, Kind::Unavailable, "redirects more than 5 times"),
    ] {
        hub.trouble(trouble);
        let (found, text) = Cache::new(&hub).refused();
        assert_eq!(found, kind, "{text}");
        assert!(text.starts_with("org/tiny: ") && text.contains(said) && !text.contains('\n'), "{text}");
    }
    hub.trouble(Trouble::None);
    let mut cache = Cache::new(&hub);
    cache.set("HF_HUB_OFFLINE", "1");
    let (kind, text) = cache.refused();
    assert!(kind == Kind::NoInput && text.contains("HF_HUB_OFFLINE forbids"), "{text}");
    let mut nobody = Cache::new(&hub);
    // Port 9 of loopback: nobody listens there.
    nobody.endpoint = "http://127.0.0.1:9".into();
    let (kind, text) = nobody.refused();
    assert!(kind == Kind::Unavailable && text.contains("cannot reach http://127.0.0.1:9"), "{text}");
}

#[test]
fn models_without_safetensors_are_refused_before_anything_is_fetched() {
    let hub = Hub::start(vec![
        File::small("config.json", "{}"),
        File::large("pytorch_model.bin", b"pickle".to_vec()),
    ]);
    let cache = Cache::new(&hub);
    let (kind, text) = cache.refused();
    assert!(kind == Kind::Data && text.contains("has pickle weights (pytorch_model.bin)"), "{text}");
    assert!(!cache.folder().exists());
    let hub = Hub::start(vec![
        File::small("config.json", "{}"),
        File::small("additional_chat_templates/../../../x.jinja", "evil"),
        File::large("model.safetensors", weights("a")),
    ]);
    let cache = Cache::new(&hub);
    let listed = cache.get(NAME, &ANY);
    assert!(listed.is_ok(), "a name that is no companion is passed over");
    assert!(!cache.dir.path().parent().unwrap().join("x.jinja").exists());
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let hub = Hub::start(tiny());
    hub.require("hf_secret");
    let cache = Cache::new(&hub);
    let (kind, text) = cache.refused();
    assert!(kind == Kind::NoInput && text.contains("private"), "{text}");
    let mut cache = Cache::new(&hub);
    cache.set("HF_TOKEN", "hf_wrong");
    let (_, text) = cache.refused();
    assert!(!text.contains("hf_wrong"), "{text}");
    let mut cache = Cache::new(&hub);
    cache.set("HF_TOKEN", "hf_secret");
    cache.get(NAME, &ANY).unwrap();
    // Large files lie on another host, which must not learn it.
    assert!(hub.storage_requests() > 0);
    assert_eq!(hub.storage_tokens(), 0);
}

#[test]
fn revisions_are_kept_apart() {
    let hub = Hub::start(tiny());
    let cache = Cache::new(&hub);
    let main = cache.get(NAME, &ANY).unwrap();
    let tag = cache.get("org/tiny@refs/pr/1", &ANY).unwrap();
    assert_eq!(main, tag);
    assert_eq!(fs::read_to_string(cache.folder().join("refs/refs/pr/1")).unwrap(), server::COMMIT);
    let commit = cache.get(&format!("org/tiny@{}", server::COMMIT), &ANY).unwrap();
    assert_eq!(commit, main);
    assert!(!cache.folder().join("refs").join(server::COMMIT).exists());
}

#[test]
fn two_at_a_time_share_the_work() {
    let hub = Hub::start(tiny());
    let cache = Cache::new(&hub);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| cache.get(NAME, &ANY).unwrap())).collect();
        let paths: Vec<_> = runs.into_iter().map(|run| run.join().unwrap()).collect();
        assert!(paths.windows(2).all(|pair| pair[0] == pair[1]));
    });
    assert_eq!(hub.storage_requests(), 1);
}

#[test]
fn the_list_of_the_cache_says_what_is_wrong() {
    let hub = Hub::start(tiny());
    let cache = Cache::new(&hub);
    assert!(scan(cache.dir.path()).unwrap().is_empty());
    let snapshot = cache.get(NAME, &ANY).unwrap();
    let one = || scan(cache.dir.path()).unwrap().remove(0);
    let model = one();
    assert_eq!((model.name.as_str(), model.form.as_str(), &model.fault), (NAME, "f32", &None));
    assert!(model.size > 16384 && model.unused == 0 && model.partial == 0);
    assert_eq!(model.snapshots[server::COMMIT], ["main"]);
    assert!(model.last_used.is_some() && model.pickle.is_empty() && model.remote_code.is_empty());

    let blobs = cache.folder().join("blobs");
    fs::write(blobs.join("old"), "1234").unwrap();
    fs::write(blobs.join("x.incomplete"), "123").unwrap();
    fs::write(snapshot.join("modeling.py"), "").unwrap();
    fs::write(snapshot.join("pytorch_model.bin"), "").unwrap();
    fs::write(snapshot.join("tokenizer_config.json"), r#"{"auto_map": {}}"#).unwrap();
    let model = one();
    assert_eq!((model.unused, model.partial), (4, 3));
    assert_eq!(model.pickle, ["pytorch_model.bin"]);
    assert_eq!(model.remote_code, ["modeling.py", "tokenizer_config.json"]);
    fs::remove_file(blobs.join(server::sha256(&weights("a")))).unwrap();
    assert_eq!(one().fault.as_deref(), Some("lacks the bytes of model.safetensors"));
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    let model = one();
    assert_eq!((model.form.as_str(), model.fault.as_deref()), ("pickle", Some("no safetensors")));
    fs::create_dir_all(cache.dir.path().join("models--a--b/refs")).unwrap();
    assert_eq!(scan(cache.dir.path()).unwrap()[0].fault.as_deref(), Some("no snapshot"));
}
