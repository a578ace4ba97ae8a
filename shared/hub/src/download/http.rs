//! Requests to the hub: addresses, redirections, the token, and what an answer means for the user.

use crate::{ModelName, Settings, settings::Token};
use kto_cli::{Context, Error, Kind, Result, escape, input, version};
use std::{io::Read, path::Path, time::Duration};
use ureq::{
    Agent, Body,
    http::{HeaderMap, Response},
    tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem},
};

/// Redirections followed, at most.
const HOPS: usize = 5;
/// Bytes of a file of certificates, at most.
const MOST_CERTIFICATES: u64 = 16 << 20;
/// Bytes of a list of files, at most.
const LISTING: u64 = 64 << 20;
/// A connection, and the head of an answer, must be there after this.
const PATIENCE: Duration = Duration::from_secs(20);
/// A body must end after this; what has come by then is kept, and the next request goes on from there.
const BODY: Duration = Duration::from_secs(600);

/// A connection to the hub.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
}

/// A file on the hub.
pub struct Source<'a> {
    pub client: &'a Client,
    pub name: &'a ModelName,
    pub commit: &'a str,
    pub file: &'a str,
}

/// What the hub says of a file before it sends it.
pub struct Meta {
    /// Name of the blob: the SHA-256 of a large file, git's hash of a small one.
    pub etag: String,
    /// Bytes.
    pub size: Option<u64>,
}

/// A body on its way.
pub struct Part {
    /// Where in the file it begins.
    pub from: u64,
    /// Its bytes.
    pub reader: Box<dyn Read>,
}

impl Client {
    /// Returns a client that has not connected yet.
    ///
    /// Errors: 66 when the file of certificates is missing, 65 when it holds none.
    pub fn new(settings: &Settings) -> Result<Self> {
        let roots = settings.certificates.as_deref().map(roots).transpose()?.unwrap_or(RootCerts::WebPki);
        let config = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_recv_body(Some(BODY))
            .user_agent(format!("kto-tools/{}", version::number()));
        let (endpoint, token) = (settings.endpoint.clone(), settings.token.clone());
        Ok(Self { agent: config.build().into(), endpoint, token })
    }

    /// Returns the hub's description of a revision, as JSON.
    pub fn listing(&self, name: &ModelName) -> Result<Vec<u8>> {
        let (endpoint, repo, revision) = (&self.endpoint, &name.repo, quote(&name.revision, ""));
        let url = format!("{endpoint}/api/models/{repo}/revision/{revision}?blobs=true");
        let answer = self.follow("GET", url, None)?;
        let answer = self.accept(answer, name, None)?;
        let mut text = Vec::new();
        let mut reader = answer.into_body().into_reader().take(LISTING);
        reader.read_to_end(&mut text).map_err(|e| self.unreachable(&e.to_string()))?;
        Ok(text)
    }

    /// Sends a request and follows redirections. The token goes to the hub's own host only.
    fn follow(&self, method: &str, mut url: String, range: Option<u64>) -> Result<Response<Body>> {
        for _ in 0..=HOPS {
            let request = match method {
                "HEAD" => self.agent.head(&url),
                _ => self.agent.get(&url),
            };
            let mut request = request.header("Accept-Encoding", "identity");
            if let Some(token) = self.token.as_ref().filter(|_| host(&url) == host(&self.endpoint)) {
                request = request.header("Authorization", token.bearer());
            }
            if let Some(from) = range {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let answer = request.call().map_err(|e| self.unreachable(&e.to_string()))?;
            let named = text(answer.headers(), "x-linked-etag").is_some();
            let target = text(answer.headers(), "location").filter(|_| answer.status().is_redirection());
            match target {
                // A file's description ends where the bytes lie elsewhere.
                Some(target) if !(method == "HEAD" && named) => url = absolute(&url, target),
                _ => return Ok(answer),
            }
        }
        Err(Error::new(Kind::Unavailable, format!("the hub redirects more than {HOPS} times")))
    }

    /// Takes an answer that holds what was asked for; every other one becomes a line for the user.
    fn accept(&self, answer: Response<Body>, name: &ModelName, file: Option<&str>) -> Result<Response<Body>> {
        let status = answer.status().as_u16();
        if status < 400 {
            return Ok(answer);
        }
        let code = text(answer.headers(), "x-error-code").unwrap_or_default();
        let said = text(answer.headers(), "x-error-message").map(escape).unwrap_or_default();
        let no_input = |what: String| Error::new(Kind::NoInput, what);
        let token = "HF_TOKEN=… or `hf auth login` names an account that may read it";
        Err(match (code, status) {
            ("GatedRepo", _) => no_input("the model is gated: its owner grants access".into())
                .with_hint(format!("ask for it at {}/{}; {token}", self.endpoint, name.repo)),
            ("RevisionNotFound", _) => {
                no_input(format!("the hub has no revision \"{}\" of it", name.revision))
            }
            ("EntryNotFound", _) => no_input("the hub lists this file but does not have it".into()),
            (_, 401 | 404) if file.is_none() => {
                no_input("the hub has no such model, or it is private".into()).with_hint(token)
            }
            (_, 401 | 403) => {
                let said = if said.is_empty() { status.to_string() } else { format!("{status}: {said}") };
                no_input(format!("the hub refuses access ({said})")).with_hint(token)
            }
            (_, 404) => no_input("the hub lists this file but does not have it".into()),
            (_, 429) => Error::new(Kind::TryAgain, "the hub asks for fewer requests (429)")
                .with_hint("run it again later, what has been fetched is kept; HF_TOKEN=… raises the limit"),
            (_, 500..) => Error::new(Kind::TryAgain, format!("the hub fails ({status}); try again later")),
            _ => Error::new(Kind::Unavailable, format!("the hub answers {status}")),
        })
    }

    fn unreachable(&self, why: &str) -> Error {
        let endpoint = escape(&self.endpoint);
        Error::new(Kind::Unavailable, format!("cannot reach {endpoint}: {}", escape(why)))
            .with_hint("HF_HUB_OFFLINE=1 uses what the cache holds, HF_ENDPOINT names a mirror")
    }
}

impl Source<'_> {
    fn url(&self) -> String {
        let (endpoint, repo) = (&self.client.endpoint, &self.name.repo);
        format!("{endpoint}/{repo}/resolve/{}/{}", self.commit, quote(self.file, "/"))
    }

    /// Returns the file's description.
    pub fn meta(&self) -> Result<Meta> {
        let answer = self.client.follow("HEAD", self.url(), None)?;
        let answer = self.client.accept(answer, self.name, Some(self.file))?;
        let headers = answer.headers();
        if text(headers, "x-repo-commit").is_some_and(|commit| commit != self.commit) {
            return Err(Error::data("the hub describes this file of another commit"));
        }
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
        if etag.is_empty() || etag.len() > 128 || !etag.bytes().all(is_name) {
            return Err(Error::data("the hub does not name this file's content (ETag)")
                .with_hint("check HF_ENDPOINT"));
        }
        let linked = text(headers, "x-linked-size");
        let size =
            linked.or_else(|| text(headers, "content-length").filter(|_| !answer.status().is_redirection()));
        Ok(Meta { etag, size: size.and_then(|size| size.parse().ok()) })
    }

    /// Asks for the bytes from `from` on. The server may answer with the whole file. None: it has no such bytes.
    pub fn part(&self, from: u64) -> Result<Option<Part>> {
        let answer = self.client.follow("GET", self.url(), Some(from).filter(|from| *from > 0))?;
        if answer.status().as_u16() == 416 {
            return Ok(None);
        }
        let answer = self.client.accept(answer, self.name, Some(self.file))?;
        let begins = match answer.status().as_u16() {
            206 => start(answer.headers()).unwrap_or(from),
            _ => 0,
        };
        Ok(Some(Part { from: begins, reader: Box::new(answer.into_body().into_reader()) }))
    }
}

/// The certificates of SSL_CERT_FILE.
fn roots(path: &Path) -> Result<RootCerts> {
    let pem = input::read(path, MOST_CERTIFICATES).at("SSL_CERT_FILE")?;
    let certificates: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    match certificates.is_empty() {
        true => Err(Error::data(format!(
            "SSL_CERT_FILE: {}: no certificates",
            escape(&path.display().to_string())
        ))),
        false => Ok(RootCerts::new_with_certs(&certificates)),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// The first byte of `Content-Range: bytes 5-9/10`.
fn start(headers: &HeaderMap) -> Option<u64> {
    text(headers, "content-range")?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Scheme, host and port of an address.
fn host(url: &str) -> &str {
    let after = url.find("://").map_or(0, |at| at + 3);
    let end = url[after..].find(['/', '?', '#']).map_or(url.len(), |at| after + at);
    &url[..end]
}

/// The address that a redirection names: a whole one, or one below the same host.
fn absolute(base: &str, target: &str) -> String {
    match target.starts_with('/') {
        true if target.starts_with("//") => format!("{}:{target}", base.split(':').next().unwrap_or("https")),
        true => format!("{}{target}", host(base)),
        false => target.into(),
    }
}

/// Percent-encodes all but letters, digits, `-._~` and the characters in `kept`.
fn quote(text: &str, kept: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if byte.is_ascii_alphanumeric() || "-._~".contains(c) || (byte.is_ascii() && kept.contains(c)) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(host("http://127.0.0.1:80/a?b"), "http://127.0.0.1:80");
        assert_eq!(host("https://h"), "https://h");
        assert_eq!(absolute("https://h/a/b", "/c?d"), "https://h/c?d");
        assert_eq!(absolute("https://h/a", "//x/y"), "https://x/y");
        assert_eq!(absolute("https://h/a", "http://x/y"), "http://x/y");
        assert_eq!(quote("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(quote("a b/é.json", "/"), "a%20b/%C3%A9.json");
    }
}
