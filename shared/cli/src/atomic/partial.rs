//! The directory in which a long output grows, so that a run that was killed can be gone on with.
//!
//! It is called `NAME.partial` beside the target and visible, because it may be large. What it will become is written in it first; a
//! later run with the same job goes on, one with another job begins anew. A directory that does not say is nobody's: it is left alone.
//! Of what is in it only files are used that an earlier run finished and that are still what it finished: a journal holds size and seal
//! of each, from before it gets its name. All else is removed, links and folders without being followed.

use super::creating;
use crate::{Error, Kind, Result, escape, hash::sha256_hex, signal, stale};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Name of the file that says what the directory will become.
pub(super) const JOB: &str = ".kto-job";
/// Name of the list of files that are finished.
pub(super) const JOURNAL: &str = ".kto-finished";
/// What the target's name gets.
const SUFFIX: &str = ".partial";
/// Longest job or journal that is read, in bytes.
const LONGEST: u64 = 64 << 20;

/// A file as the run that finished it left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Bytes.
    pub size: u64,
    /// A hash over all of them, without blanks; how it is made is the writer's business.
    pub seal: String,
}

/// Returns the seal of a file that is there. An error says that it has none.
pub type Seal<'a> = dyn Fn(&Path) -> Result<String> + 'a;

/// A partial directory, locked.
pub(super) struct Partial {
    pub path: PathBuf,
    pub lock: File,
    /// Whether an earlier run with the same job has worked on it.
    pub resumed: bool,
    /// The files that an earlier run finished, by name. There is nothing else.
    pub finished: BTreeMap<String, Finished>,
    /// What was there and is not used, a line each.
    pub notes: Vec<String>,
}

/// Returns where the directory of `resolved` grows.
pub(super) fn path_of(resolved: &Path) -> PathBuf {
    let mut name = OsString::from(resolved.file_name().unwrap_or_default());
    name.push(SUFFIX);
    resolved.with_file_name(name)
}

/// Makes or opens the partial directory of `resolved` for a job. Errors: 73 when something else is there, 75 when another run
/// works on it.
pub(super) fn open(shown: &Path, resolved: &Path, job: &str, seal: &Seal) -> Result<Partial> {
    let path = path_of(resolved);
    let fail = |e: io::Error| creating(shown, &e);
    let place = escape(&path.display().to_string());
    match DirBuilder::new().create(&path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(fail(e)),
        _ => {}
    }
    if !fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir()) {
        return Err(Error::new(Kind::CantCreate, format!("{place}: in the way of the partial result")));
    }
    let lock = File::open(&path).map_err(fail)?;
    match lock.try_lock() {
        Ok(()) => stale::sweep_locked(&path),
        Err(TryLockError::WouldBlock) => {
            return Err(Error::new(Kind::TryAgain, format!("{place}: another run is writing it")));
        }
        // A file system without locks.
        Err(TryLockError::Error(_)) => stale::sweep(&path),
    }
    let marker = path.join(JOB);
    let (mut resumed, mut finished, mut notes) = (false, BTreeMap::new(), Vec::new());
    match text_of(&marker).map_err(fail)? {
        Some(text) if text == job => {
            resumed = true;
            finished = keep_finished(&path, job, seal, &mut notes)?;
        }
        Some(_) => {
            clear(&path, &marker).map_err(fail)?;
            notes.push(format!("{place}: of another command, or its inputs have changed since; begun anew"));
        }
        None if fs::read_dir(&path).map_err(fail)?.next().is_some() => {
            let text = format!("{place}: not empty, and not the partial result of an earlier run");
            return Err(Error::new(Kind::CantCreate, text).with_hint("move it away"));
        }
        None => {}
    }
    if !resumed {
        super::write(&marker, job.as_bytes())?;
    }
    Ok(Partial { path, lock, resumed, finished, notes })
}

/// Removes all that is not a regular file which the journal knows, of the size and with the seal that it says.
fn keep_finished(
    path: &Path,
    job: &str,
    seal: &Seal,
    notes: &mut Vec<String>,
) -> Result<BTreeMap<String, Finished>> {
    let fail = |e: io::Error| Error::writing(path, &e);
    let known = text_of(&path.join(JOURNAL)).map_err(fail)?.and_then(|text| parse(&text, job));
    let known = known.unwrap_or_default();
    let (mut finished, mut changed, mut others) = (BTreeMap::new(), Vec::new(), Vec::new());
    for entry in fs::read_dir(path).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == JOB {
            continue;
        }
        // Of a link itself, not of what it leads to.
        let metadata = entry.metadata().map_err(fail)?;
        // A second name of a file would let somebody else write to the result.
        let is_ours = |f: &&Finished| metadata.is_file() && metadata.nlink() == 1 && metadata.len() == f.size;
        if let Some(known) = known.get(&name).filter(is_ours) {
            match seal(&entry.path()) {
                Ok(found) if found == known.seal => {
                    finished.insert(name, known.clone());
                    continue;
                }
                Err(e) if signal::is_stop(e.kind()) => return Err(e),
                _ => {}
            }
        }
        let remove = if metadata.is_dir() { fs::remove_dir_all } else { fs::remove_file::<PathBuf> };
        remove(entry.path()).map_err(fail)?;
        match () {
            () if known.contains_key(&name) => changed.push(name),
            () if name != JOURNAL => others.push(name),
            () => {}
        }
    }
    let place = escape(&path.display().to_string());
    let mut say = |mut names: Vec<String>, what: &str| {
        names.sort();
        let names: Vec<String> = names.iter().map(|name| escape(name)).collect();
        if !names.is_empty() {
            notes.push(format!("{place}: {what}: {}", names.join(", ")));
        }
    };
    say(changed, "not what an earlier run finished, made again");
    say(others, "not finished by an earlier run, removed");
    // One that was damaged must not be taken for that of the run that begins.
    write_journal(path, job, &finished)?;
    Ok(finished)
}

/// Replaces the journal.
pub(super) fn write_journal(path: &Path, job: &str, finished: &BTreeMap<String, Finished>) -> Result<()> {
    let line = |(name, f): (&String, &Finished)| format!("{} {} {name}\n", f.size, f.seal);
    let lines: String = finished.iter().map(line).collect();
    super::write(&path.join(JOURNAL), format!("{lines}sealed {}\n", sealed(job, &lines)).as_bytes())
}

/// Reads a journal; `None` when it is not whole, or that of another job.
fn parse(text: &str, job: &str) -> Option<BTreeMap<String, Finished>> {
    let at = text.trim_end_matches('\n').rfind('\n').map_or(0, |at| at + 1);
    let (lines, last) = text.split_at(at);
    if last.trim_end().strip_prefix("sealed ") != Some(&sealed(job, lines)) {
        return None;
    }
    let entry = |line: &str| {
        let mut parts = line.splitn(3, ' ');
        let (size, seal) = (parts.next()?.parse().ok()?, parts.next()?.to_string());
        Some((parts.next()?.to_string(), Finished { size, seal }))
    };
    lines.lines().map(entry).collect()
}

fn sealed(job: &str, lines: &str) -> String {
    sha256_hex(format!("{} {job}{lines}", job.len()).as_bytes())
}

/// Reads a small file of ours: `None` for what is not there, no regular file, too long, or no text.
fn text_of(path: &Path) -> io::Result<Option<String>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() <= LONGEST => {}
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => return Ok(None),
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes).ok())
}

/// Removes everything, the marker last: a kill in between leaves a directory that still says whose it is.
fn clear(path: &Path, marker: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.path() == marker {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_file(marker)
}

#[cfg(test)]
mod tests {
    use super::super::AtomicDir;
    use super::*;
    use std::os::unix::fs::symlink;

    /// The seal of a file in these tests.
    fn seal(path: &Path) -> Result<String> {
        Ok(sha256_hex(&fs::read(path).unwrap()))
    }

    fn start(target: &Path, job: &str) -> Result<AtomicDir> {
        AtomicDir::resume(target, true, false, job, &seal)
    }

    /// Writes a file as a run does that finishes it.
    fn finish(dir: &AtomicDir, name: &str, text: &str) {
        dir.finish(name, Finished { size: text.len() as u64, seal: sha256_hex(text.as_bytes()) }).unwrap();
        fs::write(dir.path().join(name), text).unwrap();
        dir.keep(true);
    }

    fn names(path: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_same_job_goes_on_and_another_begins_anew() {
        let top = tempfile::tempdir().unwrap();
        let target = top.path().join("model");
        let partial = top.path().join("model.partial");
        let first = start(&target, "a").unwrap();
        assert!(!first.resumed() && first.path() == partial);
        finish(&first, "shard", "1");
        finish(&first, "other", "2");
        drop(first);
        let second = start(&target, "a").unwrap();
        assert!(second.resumed() && second.is_finished("shard") && second.is_finished("other"));
        assert!(second.notes().is_empty());
        assert_eq!(start(&target, "a").err().unwrap().kind(), Kind::TryAgain);
        second.keep(true);
        drop(second);
        let other = start(&target, "b").unwrap();
        assert!(!other.resumed() && !other.is_finished("shard") && !partial.join("shard").exists());
        assert_eq!(other.notes().len(), 1);
        fs::write(other.path().join("shard"), "2").unwrap();
        other.commit().unwrap();
        assert_eq!(names(top.path()), ["model"]);
        assert_eq!(names(&target), ["shard"]);
    }

    /// Runs `tamper` on a partial directory with one finished file, goes on, and returns whether the file is still used, what is there,
    /// and what is said.
    fn tampered(tamper: &dyn Fn(&Path)) -> (bool, Vec<OsString>, String) {
        let top = tempfile::tempdir().unwrap();
        let first = start(&top.path().join("model"), "a").unwrap();
        finish(&first, "shard", "12345");
        drop(first);
        fs::write(top.path().join("outside"), "12345").unwrap();
        tamper(&top.path().join("model.partial"));
        let second = start(&top.path().join("model"), "a").unwrap();
        let found = (second.is_finished("shard"), names(second.path()), second.notes().to_vec().join("\n"));
        drop(second);
        assert_eq!(
            fs::read_to_string(top.path().join("outside")).unwrap(),
            "12345",
            "written through a link"
        );
        found
    }

    #[test]
    fn only_what_was_finished_is_used() {
        let ours = [".kto-finished", ".kto-job", "shard"];
        let untouched = tampered(&|_| {});
        assert!(untouched.0 && untouched.1 == ours && untouched.2.is_empty(), "{untouched:?}");
        // A byte is another one.
        let (used, left, said) = tampered(&|p| fs::write(p.join("shard"), "12x45").unwrap());
        assert!(!used && left == ours[..2] && said.contains("made again: shard"), "{said}");
        // A link to the same bytes, by either way.
        for hard in [false, true] {
            let (used, left, said) = tampered(&|p| {
                fs::remove_file(p.join("shard")).unwrap();
                match hard {
                    true => fs::hard_link(p.join("../outside"), p.join("shard")).unwrap(),
                    false => symlink("../outside", p.join("shard")).unwrap(),
                }
            });
            assert!(!used && left == ours[..2] && said.contains("made again: shard"), "{said}");
        }
        // What no run has made, folders and links among it.
        let (used, left, said) = tampered(&|p| {
            fs::write(p.join("tokenizer.json"), "mine").unwrap();
            fs::create_dir(p.join("folder")).unwrap();
            fs::write(p.join("folder/x"), "").unwrap();
            symlink("../outside", p.join("config.json")).unwrap();
            symlink("..", p.join("up")).unwrap();
        });
        assert!(used && left == ours, "{left:?}");
        assert!(said.ends_with("removed: config.json, folder, tokenizer.json, up"), "{said}");
    }

    #[test]
    fn a_journal_that_is_not_whole_finishes_nothing() {
        let damage: [&dyn Fn(&Path); 5] = [
            &|p| fs::remove_file(p).unwrap(),
            &|p| fs::write(p, "").unwrap(),
            &|p| fs::write(p, fs::read_to_string(p).unwrap().replacen('5', "6", 1)).unwrap(),
            &|p| fs::write(p, &fs::read(p).unwrap()[..20]).unwrap(),
            &|p| {
                fs::rename(p, p.with_file_name("away")).unwrap();
                symlink("away", p).unwrap();
            },
        ];
        for (i, damage) in damage.into_iter().enumerate() {
            let (used, left, _) = tampered(&|p| damage(&p.join(JOURNAL)));
            assert!(!used && left == [".kto-finished", ".kto-job"], "{i}: {left:?}");
        }
    }

    #[test]
    fn a_run_killed_before_it_says_its_job_is_not_in_the_way() {
        let top = tempfile::tempdir().unwrap();
        let partial = top.path().join("m.partial");
        fs::create_dir(&partial).unwrap();
        // As of a process that was killed and still has its pid.
        let pid = rustix::process::getppid().unwrap().as_raw_nonzero();
        fs::write(partial.join(format!(".{JOB}.{pid}.kto-tmp")), "a jo").unwrap();
        let first = start(&top.path().join("m"), "a").unwrap();
        assert!(!first.resumed());
        assert_eq!(names(&partial), [JOB]);
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir(top.path().join("m.partial")).unwrap();
        fs::write(top.path().join("m.partial/mine"), "x").unwrap();
        assert_eq!(start(&top.path().join("m"), "a").err().unwrap().kind(), Kind::CantCreate);
        assert!(top.path().join("m.partial/mine").exists());
        fs::write(top.path().join("n.partial"), "x").unwrap();
        assert_eq!(start(&top.path().join("n"), "a").err().unwrap().kind(), Kind::CantCreate);
        // Neither is a link to a directory, nor one with a link for its job.
        symlink("m.partial", top.path().join("o.partial")).unwrap();
        assert_eq!(start(&top.path().join("o"), "a").err().unwrap().kind(), Kind::CantCreate);
        fs::write(top.path().join("job"), "a").unwrap();
        symlink("../job", top.path().join("m.partial").join(JOB)).unwrap();
        assert_eq!(start(&top.path().join("m"), "a").err().unwrap().kind(), Kind::CantCreate);
        assert_eq!(fs::read_to_string(top.path().join("job")).unwrap(), "a");
    }

    #[test]
    fn without_keep_nothing_is_left() {
        let top = tempfile::tempdir().unwrap();
        drop(start(&top.path().join("m"), "a").unwrap());
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0);
    }

    #[test]
    fn who_was_stopped_hears_how_it_goes_on() {
        let top = tempfile::tempdir().unwrap();
        let target = top.path().join("m");
        let said = || {
            let error = super::super::stopped(Error::new(Kind::Terminated, "stopped by SIGTERM"), &target);
            assert!(
                error.to_string().ends_with("/m: stopped by SIGTERM") && error.kind() == Kind::Terminated
            );
            error.hint().unwrap_or_default().to_string()
        };
        assert_eq!(said(), "the same command again begins anew");
        let dir = start(&target, "a").unwrap();
        finish(&dir, "shard", "1");
        drop(dir);
        assert!(said().ends_with("m.partial"), "{}", said());
        assert_eq!(super::super::stopped(Error::data("x"), &target).to_string(), "x");
    }
}
