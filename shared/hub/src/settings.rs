//! The variables of the Hugging Face tools: where the cache is, whether the network may be asked, which hub, which token.
//!
//! Source of the names and their order: huggingface_hub 2.4, constants.py and utils/_auth.py.

use kto_cli::{Error, Result, input, surroundings};
use std::{
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

/// Where models are kept and come from.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// The network is not asked.
    pub offline: bool,
    /// The hub, without a slash at the end.
    pub endpoint: String,
    /// What proves who the user is.
    pub token: Option<Token>,
    /// Root certificates (PEM) in place of the built-in ones: a company's proxy has its own.
    pub certificates: Option<PathBuf>,
}

/// A secret. It cannot be printed.
#[derive(Clone)]
#[cfg_attr(not(feature = "download"), allow(dead_code, reason = "nothing is asked for"))]
pub struct Token(String);

impl Token {
    /// Returns the value of the header `Authorization`.
    #[cfg(feature = "download")]
    pub(crate) fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

const HUB: &str = "https://huggingface.co";

impl Settings {
    /// Reads the environment of the process. Errors: 78 when it names no place for the cache, or a token that is none.
    pub fn from_environment() -> Result<Self> {
        Self::from_variables(surroundings::variable)
    }

    /// Reads variables through `variable`, which returns None for one that is not set or empty.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let home = variable("HOME").map(PathBuf::from);
        let path = |name: &str| variable(name).map(|value| expand(&value, home.as_deref()));
        let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        let is_true = |name: &str| {
            text(name).is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.to_uppercase().as_str()))
        };
        let base = path("HF_HOME").or_else(|| {
            let caches = path("XDG_CACHE_HOME").or_else(|| home.as_ref().map(|h| h.join(".cache")));
            caches.map(|caches| caches.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let cache = cache.or_else(|| base.as_ref().map(|base| base.join("hub"))).ok_or_else(|| {
            Error::config("neither HF_HUB_CACHE, HF_HOME nor HOME says where the Hugging Face cache is")
        })?;
        let file = path("HF_TOKEN_PATH").or_else(|| base.map(|base| base.join("token")));
        let implicit = !is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN");
        let named = || text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        Ok(Self {
            cache,
            certificates: path("SSL_CERT_FILE"),
            offline: is_true("HF_HUB_OFFLINE") || is_true("TRANSFORMERS_OFFLINE"),
            endpoint: text("HF_ENDPOINT").unwrap_or_else(|| HUB.into()).trim_end_matches('/').into(),
            token: match implicit {
                true => {
                    named().or_else(|| file.and_then(|file| stored(&file))).map(token).transpose()?.flatten()
                }
                false => None,
            },
        })
    }
}

/// `~` is the home folder, as Python's expanduser has it.
fn expand(value: &OsString, home: Option<&Path>) -> PathBuf {
    let path = Path::new(value);
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.into(),
    }
}

/// What `hf auth login` left; no file is no token.
fn stored(file: &Path) -> Option<String> {
    let bytes = if file.is_file() { input::read(file, 4096).ok()? } else { return None };
    String::from_utf8(bytes).ok()
}

fn token(text: String) -> Result<Option<Token>> {
    let text = text.trim();
    match text.bytes().all(|b| b.is_ascii_graphic()) {
        _ if text.is_empty() => Ok(None),
        true => Ok(Some(Token(text.into()))),
        // What it is stays out of the message.
        false => Err(Error::config("the Hugging Face token holds characters that no token has")
            .with_hint("HF_TOKEN, or the file that `hf auth login` writes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_variables(|name| {
            pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v))
        })
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let cache = |pairs: &[(&str, &str)]| of(pairs).unwrap().cache.display().to_string();
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/m")]), "/h/m/hub");
        assert_eq!(cache(&[("HF_HOME", "/m"), ("HUGGINGFACE_HUB_CACHE", "/o")]), "/o");
        assert_eq!(
            cache(&[("HF_HOME", "/m"), ("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/o")]),
            "/c"
        );
        assert_eq!(of(&[]).unwrap_err().kind(), kto_cli::Kind::Config);
    }

    #[test]
    fn flags_endpoint_and_token() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let base = of(&[("HF_HOME", home)]).unwrap();
        assert!(!base.offline && base.token.is_none() && base.endpoint == HUB);
        assert!(of(&[("HF_HOME", home), ("HF_HUB_OFFLINE", "yes")]).unwrap().offline);
        assert!(!of(&[("HF_HOME", home), ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
        assert_eq!(of(&[("HF_HOME", home), ("HF_ENDPOINT", "http://a/")]).unwrap().endpoint, "http://a");
        let token = |pairs: &[(&str, &str)]| {
            of(&[&[("HF_HOME", home)], pairs].concat()).map(|s| s.token.map(|t| t.0))
        };
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(token(&[]).unwrap().as_deref(), Some("hf_file"));
        assert_eq!(token(&[("HF_TOKEN", " hf_env ")]).unwrap().as_deref(), Some("hf_env"));
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).unwrap(), None);
        let error = token(&[("HF_TOKEN", "secret\r\nX: y")]).unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
        assert_eq!(format!("{:?}", Token("secret".into())), "Token(…)");
    }
}
