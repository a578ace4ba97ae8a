//! From the hub into the cache.
//!
//! The hub lists a revision's files; the small ones come first, because configuration and index decide about the rest.
//! The reference is written last: while a newer commit is on its way, the revision still means the older one, which may
//! be whole. Files are linked into the snapshot one by one, so an interrupted download goes on where it ended.

mod blob;
mod http;

use crate::{ModelName, Need, Settings, files::relative, name::is_commit};
use blob::Place;
use http::Client;
use kto_cli::{Context, Error, Progress, Result, Ui, atomic, escape, input, units};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// What marks a folder for programs that make backups: it can be made again.
const TAG: (&str, &str) = ("CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n");

/// Downloads what a tool needs of a model and returns the snapshot.
pub fn fetch(settings: &Settings, name: &ModelName, need: &Need, ui: &Ui) -> Result<PathBuf> {
    Download { settings, name, client: Client::new(settings)?, ui }.run(need).at(name)
}

struct Download<'a> {
    settings: &'a Settings,
    name: &'a ModelName,
    client: Client,
    ui: &'a Ui,
}

impl Download<'_> {
    fn run(&self, need: &Need) -> Result<PathBuf> {
        let listing = Listing::read(&self.client.listing(self.name)?)?;
        let listed: BTreeSet<&str> = listing.files.keys().map(String::as_str).collect();
        let small = need.small(&listed)?;
        let folder = self.settings.cache.join(self.name.folder());
        let place = Place {
            locks: self.settings.cache.join(".locks").join(self.name.folder()),
            blobs: folder.join("blobs"),
            snapshot: folder.join("snapshots").join(&listing.commit),
        };
        for dir in [&place.locks, &place.blobs, &place.snapshot] {
            fs::create_dir_all(dir).map_err(|e| Error::writing(dir, &e))?;
        }
        self.tag()?;
        self.files(&listing, &place, small.into_iter().map(str::to_string).collect())?;
        self.files(&listing, &place, need.weights(&place.snapshot, &listed)?)?;
        if !self.name.is_commit() {
            write_reference(&folder.join("refs").join(&self.name.revision), &listing.commit)?;
        }
        Ok(place.snapshot)
    }

    /// Fetches files that the snapshot lacks.
    fn files(&self, listing: &Listing, place: &Place, names: Vec<String>) -> Result<()> {
        let mut wanted = Vec::new();
        for name in names {
            let path = place.snapshot.join(relative(&name)?);
            if !path.exists() {
                wanted.push((name, path));
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let total =
            wanted.iter().map(|(name, _)| listing.files.get(name).copied().flatten().unwrap_or(0)).sum();
        let (count, cache) = (wanted.len(), escape(&self.settings.cache.display().to_string()));
        self.ui.note(format_args!(
            "{}: fetching {count} files, {}, into {cache}",
            self.name,
            units::size(total)
        ));
        let progress: Progress = self.ui.progress(total, "bytes");
        for (name, path) in &wanted {
            let source =
                http::Source { client: &self.client, name: self.name, commit: &listing.commit, file: name };
            blob::fetch(&source, place, path, self.ui, &progress).at(escape(name))?;
        }
        Ok(())
    }

    fn tag(&self) -> Result<()> {
        let path = self.settings.cache.join(TAG.0);
        if path.exists() { Ok(()) } else { atomic::write(&path, TAG.1.as_bytes()) }
    }
}

fn write_reference(path: &Path, commit: &str) -> Result<()> {
    if path.is_file() && input::read(path, 4096).is_ok_and(|old| old == commit.as_bytes()) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|e| Error::writing(folder, &e))?;
    }
    atomic::write(path, commit.as_bytes())
}

/// What the hub says of a revision: its commit, its files, and how long they are where it says so.
struct Listing {
    commit: String,
    files: BTreeMap<String, Option<u64>>,
}

impl Listing {
    fn read(text: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Error::data(format!("the hub's list of files {what}"));
        let value: Value = serde_json::from_slice(text).map_err(|_| wrong("is not JSON"))?;
        let commit = value.get("sha").and_then(Value::as_str).filter(|sha| is_commit(sha));
        let commit = commit.ok_or_else(|| wrong("names no commit"))?.to_string();
        let siblings = value.get("siblings").and_then(Value::as_array).ok_or_else(|| wrong("is empty"))?;
        let mut files = BTreeMap::new();
        for sibling in siblings {
            let name = sibling.get("rfilename").and_then(Value::as_str);
            let name = name.ok_or_else(|| wrong("has an entry without a name"))?;
            files.insert(name.to_string(), sibling.get("size").and_then(Value::as_u64));
        }
        Ok(Self { commit, files })
    }
}
