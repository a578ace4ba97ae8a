//! A hub on loopback: lists a model, redirects large files to a storage of its own, knows ranges and tokens, and makes
//! trouble on request. It ends with its owner.

use kto_cli::hash::sha256_hex;
use sha1::{Digest, Sha1};
use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

/// The commit that every revision stands for.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the model.
#[derive(Clone)]
pub struct File {
    name: String,
    bytes: Vec<u8>,
    /// Lies in the storage, named by its SHA-256.
    large: bool,
}

impl File {
    pub fn small(name: &str, text: &str) -> Self {
        Self { name: name.into(), bytes: text.into(), large: false }
    }
    pub fn large(name: &str, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), bytes, large: true }
    }
    fn etag(&self) -> String {
        if self.large { sha256(&self.bytes) } else { git(&self.bytes) }
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    sha256_hex(bytes)
}

fn git(bytes: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0", bytes.len()));
    hash.update(bytes);
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// What goes wrong.
#[derive(Clone, Copy)]
pub enum Trouble {
    None,
    /// Bodies of the storage end after so many bytes.
    Cut(usize),
    /// The same, and ranges are not understood.
    CutWithoutRanges(usize),
    /// The bytes of this file are others.
    WrongBytes(&'static str),
    /// The list of files is refused with a status and an error code.
    Status(u16, &'static str),
    /// The list of files is a page.
    NoJson,
    /// The list of files redirects to itself.
    Loop,
}

struct State {
    files: Vec<File>,
    storage: String,
    trouble: Mutex<Trouble>,
    token: Mutex<Option<String>>,
    requests: AtomicUsize,
    storage_requests: AtomicUsize,
    storage_tokens: AtomicUsize,
    ranges: AtomicUsize,
    last_range: Mutex<Option<usize>>,
    stop: AtomicBool,
}

/// The running hub.
pub struct Hub {
    state: Arc<State>,
    endpoint: String,
    threads: Vec<JoinHandle<()>>,
}

impl Hub {
    pub fn start(files: Vec<File>) -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, storage) = (listen(), listen());
        let address = |l: &TcpListener| format!("http://{}", l.local_addr().unwrap());
        let state = Arc::new(State {
            files,
            storage: address(&storage),
            trouble: Mutex::new(Trouble::None),
            token: Mutex::default(),
            requests: AtomicUsize::new(0),
            storage_requests: AtomicUsize::new(0),
            storage_tokens: AtomicUsize::new(0),
            ranges: AtomicUsize::new(0),
            last_range: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let endpoint = address(&hub);
        let serve = |listener: TcpListener, is_storage: bool| {
            let state = Arc::clone(&state);
            thread::spawn(move || {
                for stream in listener.incoming() {
                    if state.stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let state = Arc::clone(&state);
                    // A client that leaves early is no fault of the hub.
                    thread::spawn(move || drop(state.answer(stream.unwrap(), is_storage)));
                }
            })
        };
        let threads = vec![serve(hub, false), serve(storage, true)];
        Self { state, endpoint, threads }
    }

    pub fn endpoint(&self) -> String {
        self.endpoint.clone()
    }
    pub fn trouble(&self, trouble: Trouble) {
        *self.state.trouble.lock().unwrap() = trouble;
    }
    pub fn require(&self, token: &str) {
        *self.state.token.lock().unwrap() = Some(token.into());
    }
    pub fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }
    pub fn storage_requests(&self) -> usize {
        self.state.storage_requests.load(Ordering::SeqCst)
    }
    pub fn storage_tokens(&self) -> usize {
        self.state.storage_tokens.load(Ordering::SeqCst)
    }
    pub fn ranges(&self) -> usize {
        self.state.ranges.load(Ordering::SeqCst)
    }
    pub fn last_range(&self) -> Option<usize> {
        *self.state.last_range.lock().unwrap()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        for url in [&self.endpoint, &self.state.storage] {
            let _ = TcpStream::connect(url.trim_start_matches("http://"));
        }
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// A request: method, path, headers.
struct Request {
    method: String,
    path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    fn read(reader: &mut impl BufRead) -> Option<Self> {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let mut words = line.split_whitespace();
        let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.push((name.to_lowercase(), value.into())),
                None => return Some(Self { method, path, headers }),
            }
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

impl State {
    /// Answers one request and closes the connection.
    fn answer(&self, stream: TcpStream, is_storage: bool) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let Some(request) = Request::read(&mut reader) else { return Ok(()) };
        self.requests.fetch_add(1, Ordering::SeqCst);
        let trouble = *self.trouble.lock().unwrap();
        let known = self
            .token
            .lock()
            .unwrap()
            .as_ref()
            .is_none_or(|token| request.header("authorization") == Some(&format!("Bearer {token}")));
        let mut reply = Reply { stream, head: request.method == "HEAD" };
        if is_storage {
            self.storage_requests.fetch_add(1, Ordering::SeqCst);
            self.storage_tokens
                .fetch_add(usize::from(request.header("authorization").is_some()), Ordering::SeqCst);
            let name = request.path.trim_start_matches('/');
            let file = self.files.iter().find(|file| file.name == name).unwrap();
            return self.body(&mut reply, &request, file, trouble);
        }
        if !known {
            return reply.send(401, &[], b"");
        }
        match request.path.strip_prefix("/api/models/org/tiny/revision/") {
            Some(_) => match trouble {
                Trouble::Status(status, code) => reply.send(status, &[("X-Error-Code", code)], b"{}"),
                Trouble::NoJson => reply.send(200, &[], b"<html>"),
                Trouble::Loop => reply.send(302, &[("Location", &request.path)], b""),
                _ => reply.send(200, &[("Content-Type", "application/json")], self.listing().as_bytes()),
            },
            None => self.file(&mut reply, &request, trouble),
        }
    }

    fn listing(&self) -> String {
        let file = |f: &File| serde_json::json!({"rfilename": f.name, "size": f.bytes.len()});
        let files: Vec<_> = self.files.iter().map(file).collect();
        serde_json::json!({"sha": COMMIT, "siblings": files}).to_string()
    }

    fn file(&self, reply: &mut Reply, request: &Request, trouble: Trouble) -> std::io::Result<()> {
        let prefix = format!("/org/tiny/resolve/{COMMIT}/");
        let name = request.path.strip_prefix(&prefix);
        let Some(file) = name.and_then(|name| self.files.iter().find(|file| file.name == name)) else {
            return reply.send(404, &[("X-Error-Code", "EntryNotFound")], b"");
        };
        let etag = format!("\"{}\"", file.etag());
        if file.large {
            let (place, size) = (format!("{}/{}", self.storage, file.name), file.bytes.len().to_string());
            let headers = [
                ("Location", place.as_str()),
                ("X-Linked-Etag", &etag),
                ("X-Linked-Size", &size),
                ("X-Repo-Commit", COMMIT),
                ("ETag", "\"of the redirection\""),
            ];
            return reply.send(302, &headers, b"");
        }
        let bytes = self.bytes(file, trouble);
        reply.send(200, &[("ETag", &etag), ("X-Repo-Commit", COMMIT)], &bytes)
    }

    fn bytes(&self, file: &File, trouble: Trouble) -> Vec<u8> {
        let mut bytes = file.bytes.clone();
        if matches!(trouble, Trouble::WrongBytes(name) if name == file.name) {
            bytes[0] ^= 1;
        }
        bytes
    }

    /// A body of the storage, from the asked byte on.
    fn body(
        &self,
        reply: &mut Reply,
        request: &Request,
        file: &File,
        trouble: Trouble,
    ) -> std::io::Result<()> {
        let bytes = self.bytes(file, trouble);
        let asked =
            request.header("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        if let Some(from) = asked {
            self.ranges.fetch_add(1, Ordering::SeqCst);
            *self.last_range.lock().unwrap() = Some(from);
        }
        let (from, cut) = match trouble {
            Trouble::CutWithoutRanges(cut) => (None, cut),
            Trouble::Cut(cut) => (asked, cut),
            _ => (asked, usize::MAX),
        };
        let rest = &bytes[from.unwrap_or(0)..];
        let range = format!("bytes {}-{}/{}", from.unwrap_or(0), bytes.len() - 1, bytes.len());
        let headers = [("Content-Range", range.as_str())];
        let (status, headers) = if from.is_some() { (206, &headers[..]) } else { (200, &headers[..0]) };
        reply.head(status, headers, rest.len())?;
        reply.stream.write_all(&rest[..rest.len().min(cut)])
    }
}

struct Reply {
    stream: TcpStream,
    head: bool,
}

impl Reply {
    fn head(&mut self, status: u16, headers: &[(&str, &str)], length: usize) -> std::io::Result<()> {
        let mut text = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n");
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        self.stream.write_all((text + "\r\n").as_bytes())
    }

    fn send(&mut self, status: u16, headers: &[(&str, &str)], body: &[u8]) -> std::io::Result<()> {
        self.head(status, headers, body.len())?;
        if self.head { Ok(()) } else { self.stream.write_all(body) }
    }
}
