//! Inputs: named files or standard input, plain, gzip or Zstandard by their first bytes.
//!
//! Every byte that a tool reads comes through here, so that messages carry the name and sizes are bounded.

use crate::{Error, Kind, Result, escape};
use flate2::bufread::GzDecoder;
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Cursor, IsTerminal, Read},
    path::{Path, PathBuf},
};

/// Read size of a plain file; large enough that the system call does not count.
const BUFFER: usize = 256 << 10;

/// An open input and the name that messages use for it.
pub struct Input {
    /// `<stdin>` or the path as given, safe for a terminal.
    pub name: String,
    /// The decoded bytes. Errors of a cut or corrupt compressed stream have kind `InvalidData`; [`error`] maps them.
    pub reader: Box<dyn BufRead + Send>,
}

/// Opens `path`; `-` is standard input. Gzip and Zstandard are recognised by their first bytes and decoded; other archives
/// and UTF-16 are refused (65). Missing files, directories and unreadable files are 66.
pub fn open(path: &Path) -> Result<Input> {
    if path == Path::new("-") {
        if is_closed() {
            return Err(Error::new(Kind::NoInput, "standard input is closed").with_hint("name a FILE"));
        }
        if rustix::fs::fstat(io::stdin()).is_ok_and(|s| (s.st_mode & 0o170_000) == 0o040_000) {
            return Err(Error::new(Kind::NoInput, "<stdin>: is a directory").with_hint("name it as FILE"));
        }
        return decode("<stdin>".into(), io::stdin());
    }
    decode(escape(&path.display().to_string()), open_file(path)?)
}

/// Whether the process was started without a standard input. Rust's start-up puts /dev/null in its place, for reading and
/// writing; nobody else opens it so.
fn is_closed() -> bool {
    use std::os::unix::fs::MetadataExt;
    let null = std::fs::metadata("/dev/null").map(|m| m.rdev()).ok();
    let stdin = rustix::fs::fstat(io::stdin())
        .ok()
        .filter(|s| (s.st_mode & 0o170_000) == 0o020_000)
        .map(|s| s.st_rdev);
    let flags = rustix::fs::fcntl_getfl(io::stdin()).ok();
    let read_write = flags.is_some_and(|f| f.contains(rustix::fs::OFlags::RDWR));
    read_write && stdin.is_some() && stdin == null
}

/// Opens a file as it is, for mapping into memory. Directories and whatever cannot be opened are 66.
pub fn open_file(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|e| Error::reading(path, &e).with_kind(Kind::NoInput))?;
    if file.metadata().map_err(|e| Error::reading(path, &e))?.is_dir() {
        return Err(Error::new(
            Kind::NoInput,
            format!("{}: is a directory", escape(&path.display().to_string())),
        ));
    }
    Ok(file)
}

/// Returns the inputs to read: the given files, or standard input when none is given.
/// Usage error when `-` appears twice, or when standard input would be a terminal.
pub fn or_stdin(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if paths.iter().filter(|p| p.as_path() == Path::new("-")).count() > 1 {
        return Err(Error::usage("standard input (-) can be read only once"));
    }
    if !paths.is_empty() {
        return Ok(paths.to_vec());
    }
    if io::stdin().is_terminal() {
        return Err(
            Error::usage("no input").with_hint("name a FILE, or pipe data in (--help shows examples)")
        );
    }
    Ok(vec![PathBuf::from("-")])
}

/// Reads a whole input of at most `cap` bytes (after decoding); a larger one is bad data (65).
pub fn read(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let Input { name, reader } = open(path)?;
    let mut bytes = Vec::new();
    reader.take(cap.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| error(&name, &e))?;
    if bytes.len() as u64 > cap {
        return Err(Error::data(format!("{name}: larger than {cap} bytes")));
    }
    Ok(bytes)
}

/// Reads a whole UTF-8 text of at most `cap` bytes, like [`read`]; other bytes are bad data (65) with their offset.
pub fn read_text(path: &Path, cap: u64) -> Result<String> {
    String::from_utf8(read(path, cap)?).map_err(|e| {
        let (name, at) = (escape(&path.display().to_string()), e.utf8_error().valid_up_to());
        Error::data(format!("{name}: invalid UTF-8 at byte {at}"))
    })
}

/// Returns the error of reading from an open input: 65 when its bytes are wrong, else 74.
pub fn error(name: &str, error: &io::Error) -> Error {
    let error = Error::reading(Path::new(name), error);
    if error.kind() == Kind::NoInput { error.with_kind(Kind::Io) } else { error }
}

fn decode(name: String, mut raw: impl Read + Send + 'static) -> Result<Input> {
    let mut head = Vec::with_capacity(6);
    raw.by_ref().take(6).read_to_end(&mut head).map_err(|e| error(&name, &e))?;
    if let Some((what, hint)) = refused(&head) {
        return Err(Error::data(format!("{name}: {what}")).with_hint(hint));
    }
    let (gzip, zstd) = (head.starts_with(&[0x1f, 0x8b]), head.starts_with(b"\x28\xb5\x2f\xfd"));
    let whole = Cursor::new(head).chain(raw);
    if !gzip && !zstd {
        return Ok(Input { name, reader: Box::new(BufReader::with_capacity(BUFFER, whole)) });
    }
    let counted = Counted { inner: BufReader::with_capacity(BUFFER, whole), read: 0 };
    let reader: Box<dyn BufRead + Send> = if gzip {
        let (decoder, form) = (Members { decoder: Some(GzDecoder::new(counted)) }, "gzip");
        let read =
            |d: &Members<_>| d.decoder.as_ref().map_or(0, |d: &GzDecoder<Counted<_>>| d.get_ref().read);
        Box::new(BufReader::with_capacity(BUFFER, Decoded { decoder, form, read }))
    } else {
        let (decoder, form) = (unzstd(counted).map_err(|e| error(&name, &e))?, "Zstandard");
        Box::new(BufReader::with_capacity(BUFFER, Decoded { decoder, form, read: |d| d.get_ref().read }))
    };
    Ok(Input { name, reader })
}

/// Decodes all frames of a Zstandard stream, whose window is bounded: a hostile one could ask for 2 GiB.
fn unzstd<R: BufRead>(inner: R) -> io::Result<zstd::stream::read::Decoder<'static, R>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(inner)?;
    decoder.window_log_max(27)?;
    Ok(decoder)
}

/// Forms we recognise only to say what to do about them.
fn refused(head: &[u8]) -> Option<(&'static str, &'static str)> {
    const FORMS: [(&[u8], &str, &str); 6] = [
        (b"PK\x03\x04", "this is a zip archive, which is not read", "unzip -p FILE"),
        (b"\xfd7zXZ\0", "this is xz data, which is not read", "xz -dc FILE"),
        (b"BZh", "this is bzip2 data, which is not read", "bzip2 -dc FILE"),
        (b"7z\xbc\xaf\x27\x1c", "this is a 7z archive, which is not read", "7z x -so FILE"),
        (b"\xff\xfe", "this looks like UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8 FILE"),
        (b"\xfe\xff", "this looks like UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8 FILE"),
    ];
    FORMS.iter().find(|(magic, ..)| head.starts_with(magic)).map(|(_, what, hint)| (*what, *hint))
}

/// Counts compressed bytes, for the message about a cut stream.
struct Counted<R> {
    inner: R,
    read: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.read += n as u64;
        Ok(n)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }
    fn consume(&mut self, n: usize) {
        self.read += n as u64;
        self.inner.consume(n);
    }
}

/// Decodes all members of a gzip stream, one behind the other.
struct Members<R> {
    /// Of the current member.
    decoder: Option<GzDecoder<R>>,
}

/// Bytes behind a member that begin none.
#[derive(Debug)]
struct Behind;

impl std::fmt::Display for Behind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no gzip")
    }
}

impl std::error::Error for Behind {}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(decoder) = &mut self.decoder {
            let n = decoder.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            match decoder.get_mut().fill_buf()? {
                [] => return Ok(0),
                [0x1f] | [0x1f, 0x8b, ..] => {}
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, Behind)),
            }
            self.decoder = self.decoder.take().map(|decoder| GzDecoder::new(decoder.into_inner()));
        }
        Ok(0)
    }
}

/// Says in our words what is wrong with a compressed stream.
struct Decoded<D> {
    decoder: D,
    form: &'static str,
    /// Compressed bytes that the decoder has read.
    read: fn(&D) -> u64,
}

impl<D: Read> Read for Decoded<D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buffer).map_err(|e| {
            let (at, form) = ((self.read)(&self.decoder), self.form);
            let wrong = |what| io::Error::new(io::ErrorKind::InvalidData, what);
            if e.get_ref().is_some_and(|e| e.is::<Behind>()) {
                return wrong(format!("the {form} stream ends at byte {at}, what follows it is none"));
            }
            match e.kind() {
                io::ErrorKind::UnexpectedEof => wrong(format!("{form} stream ends early at byte {at}")),
                io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
                    wrong(format!("corrupt {form} stream before byte {at} ({e})"))
                }
                // Errors of zstd have no kind of their own; those of the system have a number.
                io::ErrorKind::Other if e.raw_os_error().is_none() => {
                    wrong(format!("corrupt {form} stream before byte {at} ({e})"))
                }
                _ => e,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn read_bytes(bytes: Vec<u8>) -> Result<Vec<u8>> {
        let mut input = decode("x".into(), Cursor::new(bytes))?;
        let mut out = Vec::new();
        input.reader.read_to_end(&mut out).map_err(|e| error(&input.name, &e))?;
        Ok(out)
    }

    #[test]
    fn plain_short_and_gzip_bytes_come_out_the_same() {
        for text in [&b""[..], b"\x1f", b"{}", b"a\nb\n", &[b'z'; 700_000]] {
            assert_eq!(read_bytes(text.to_vec()).unwrap(), text);
            assert_eq!(read_bytes(gzip(text)).unwrap(), text);
        }
        let members = [gzip(b"one\n"), gzip(b"two\n")].concat();
        assert_eq!(read_bytes(members).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn gzip_cut_anywhere_or_damaged_is_bad_data() {
        let whole = gzip(b"some text that is long enough to have a body");
        for cut in 2..whole.len() {
            let error = read_bytes(whole[..cut].to_vec()).unwrap_err();
            assert_eq!(error.kind(), Kind::Data);
            assert!(error.to_string().contains("gzip stream ends early at byte"), "{cut}: {error}");
        }
        let mut bad_sum = whole.clone();
        let at = whole.len() - 6;
        bad_sum[at] ^= 1;
        assert_eq!(read_bytes(bad_sum).unwrap_err().kind(), Kind::Data);
        for behind in [&b"g"[..], b"garbage", &[b'x'; 100], &[0; 512], b"\x1f\x8c"] {
            let error = read_bytes([&whole, behind].concat()).unwrap_err();
            let says = format!("x: the gzip stream ends at byte {}, what follows it is none", whole.len());
            assert_eq!((error.kind(), error.to_string()), (Kind::Data, says));
        }
    }

    #[test]
    fn zstandard_is_read_and_cut_anywhere_or_damaged_is_bad_data() {
        let text = "some text that is long enough to have a body ".repeat(9);
        let whole = zstd::encode_all(text.as_bytes(), 3).unwrap();
        assert_eq!(read_bytes(whole.clone()).unwrap(), text.as_bytes());
        let frames = [whole.clone(), zstd::encode_all(&b"more"[..], 1).unwrap()].concat();
        assert_eq!(read_bytes(frames).unwrap(), [text.as_bytes(), b"more"].concat());
        for cut in 4..whole.len() {
            let error = read_bytes(whole[..cut].to_vec()).unwrap_err();
            assert_eq!(error.kind(), Kind::Data);
            assert!(error.to_string().contains("Zstandard stream ends early at byte"), "{cut}: {error}");
        }
        let mut damaged = whole.clone();
        damaged[6] ^= 0xff;
        assert_eq!(read_bytes(damaged).unwrap_err().kind(), Kind::Data);
        assert_eq!(read_bytes([whole, b"garbage".to_vec()].concat()).unwrap_err().kind(), Kind::Data);
    }

    #[test]
    fn other_forms_are_named_with_the_command_that_helps() {
        for (bytes, hint) in
            [(&b"PK\x03\x04...."[..], "unzip"), (b"BZh....", "bzip2"), (b"\xff\xfea\0", "iconv")]
        {
            let error = read_bytes(bytes.to_vec()).unwrap_err();
            assert_eq!(error.kind(), Kind::Data);
            assert!(error.hint().is_some_and(|h| h.contains(hint)), "{error}");
        }
    }

    #[test]
    fn sizes_are_capped_after_decoding() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bomb.gz");
        std::fs::write(&path, gzip(&vec![0; 1 << 20])).unwrap();
        assert_eq!(read(&path, 1 << 20).unwrap().len(), 1 << 20);
        assert_eq!(read(&path, (1 << 20) - 1).unwrap_err().kind(), Kind::Data);
        assert_eq!(read(dir.path(), 1).unwrap_err().kind(), Kind::NoInput);
        assert_eq!(read(&dir.path().join("none"), 1).unwrap_err().kind(), Kind::NoInput);
    }

    #[test]
    fn standard_input_is_named_once() {
        let dash = PathBuf::from("-");
        assert_eq!(or_stdin(&[dash.clone(), dash.clone()]).unwrap_err().kind(), Kind::Usage);
        assert_eq!(or_stdin(&["a".into(), dash.clone()]).unwrap(), [PathBuf::from("a"), dash]);
    }
}
