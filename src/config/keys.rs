//! Who may ask and who may administer: where keys come from, and what a key must be. What is read here
//! goes to `api::keys`, which keeps hashes only; nothing here prints a key, nor does a complaint.

use crate::ids::is_valid_name;
use clap::Args;
use std::fmt;
use std::path::{Path, PathBuf};

/// The shortest key that is worth the name.
const MIN_KEY: usize = 16;

/// Who may ask, and from where.
#[derive(Args, Clone, Debug)]
pub struct Keys {
    /// File with API keys, one a line, as KEY or NAME: KEY; with them every route but the probes needs
    /// one [environment also: SHOAL_API_KEYS, the keys themselves, between commas]
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// The API keys themselves: for the environment, where nobody else reads them
    #[arg(long, hide = true, value_delimiter = ',')]
    pub api_keys: Vec<Secret>,
    /// Let /metrics be read without a key
    #[arg(long)]
    pub metrics_public: bool,
    /// Let the holder of the admin key load and unload adapters and add tasks
    #[arg(long)]
    pub enable_adapter_admin: bool,
    /// File with the admin key [environment also: SHOAL_ADMIN_KEY, the key itself]
    #[arg(long)]
    pub admin_key_file: Option<PathBuf>,
    /// The admin key itself: for the environment, where nobody else reads it
    #[arg(long, hide = true)]
    pub admin_key: Option<Secret>,
    /// Web pages that may call this server, as SCHEME://HOST or SCHEME://HOST:PORT; * is all; between commas, or given
    /// several times
    #[arg(long, value_delimiter = ',', value_parser = origin)]
    pub cors_allow_origin: Vec<String>,
}

/// A text that is never printed.
#[derive(Clone)]
pub struct Secret(String);

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// An API key as it was given.
#[derive(Clone, Debug)]
pub struct NamedKey {
    /// What the access log calls its holder.
    pub name: Option<String>,
    /// The key.
    pub key: Secret,
}

impl Secret {
    /// The text, for what makes a hash of it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl Keys {
    /// The admin key, if administration is enabled.
    ///
    /// # Errors
    /// What is wrong with the key, or that there is none.
    pub fn admin(&self) -> Result<Option<Secret>, String> {
        if !self.enable_adapter_admin {
            return Ok(None);
        }
        let key = match (&self.admin_key_file, &self.admin_key) {
            (Some(path), _) => read("--admin-key-file", path)?,
            (None, Some(key)) => key.0.clone(),
            (None, None) => {
                let needs =
                    "--enable-adapter-admin needs a key: --admin-key-file or SHOAL_ADMIN_KEY";
                return Err(needs.into());
            }
        };
        checked(key.trim(), "the admin key").map(Some)
    }

    /// All API keys, of the file and of the environment.
    ///
    /// # Errors
    /// What is wrong with one of them; that a file or a variable is given and has none: the server would
    /// be open.
    pub fn api(&self) -> Result<Vec<NamedKey>, String> {
        let mut keys = Vec::new();
        if let Some(path) = &self.api_key_file {
            let text = read("--api-key-file", path)?;
            for (number, line) in (1..).zip(text.lines()) {
                let place = || format!("--api-key-file {}, line {number}", path.display());
                keys.extend(entry(line, place)?);
            }
        }
        for (number, given) in (1..).zip(&self.api_keys) {
            keys.extend(entry(&given.0, || format!("SHOAL_API_KEYS, key {number}"))?);
        }
        let given = self.api_key_file.is_some() || !self.api_keys.is_empty();
        if given && keys.is_empty() {
            return Err("--api-key-file or SHOAL_API_KEYS is given, but has no key".into());
        }
        if let Some(admin) = self.admin()?
            && keys.iter().any(|named| named.key.0 == admin.0)
        {
            return Err("the admin key is among the API keys; it must be one of its own".into());
        }
        Ok(keys)
    }
}

fn read(flag: &str, path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| format!("{flag} {}: {e}", path.display()))
}

/// The key of one line: `KEY`, `NAME: KEY`, or none in a comment and an empty line. Keys hold no white
/// space, so that a colon in one is no name's end.
fn entry(line: &str, place: impl Fn() -> String) -> Result<Option<NamedKey>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (name, key) = match line.split_once(char::is_whitespace) {
        None => (None, line),
        Some((name, key)) => {
            let name = name.strip_suffix(':').filter(|name| is_valid_name(name));
            let allowed = "allowed: KEY or NAME: KEY, the name 1 to 64 of A-Z a-z 0-9 . _ -";
            (Some(name.ok_or_else(|| format!("{}; {allowed}", place()))?.to_owned()), key.trim())
        }
    };
    Ok(Some(NamedKey { name, key: checked(key, &place())? }))
}

fn checked(key: &str, what: &str) -> Result<Secret, String> {
    match key.len() >= MIN_KEY && key.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(Secret(key.to_owned())),
        false => Err(format!("{what}; allowed: {MIN_KEY} or more letters, digits and signs")),
    }
}

/// An origin as browsers send it: no path, not even a slash.
fn origin(text: &str) -> Result<String, String> {
    let host = text.split_once("://").filter(|(scheme, _)| !scheme.is_empty());
    let fit = |host: &str| {
        !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic() && !b"/?#@*".contains(&b))
    };
    match text == "*" || host.is_some_and(|(_, host)| fit(host)) {
        // As browsers write it.
        true => Ok(text.to_ascii_lowercase()),
        false => Err("allowed: * or SCHEME://HOST[:PORT], without a path".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(file: &str, environment: &[&str]) -> (tempfile::NamedTempFile, Keys) {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&path, file).unwrap();
        let keys = Keys {
            api_key_file: Some(path.path().to_owned()),
            api_keys: environment.iter().map(|&key| Secret(key.into())).collect(),
            metrics_public: false,
            enable_adapter_admin: true,
            admin_key_file: None,
            admin_key: Some(Secret("admin-0123456789".into())),
            cors_allow_origin: Vec::new(),
        };
        (path, keys)
    }

    #[test]
    fn keys_come_from_a_file_and_from_the_environment() {
        let text = "# ours\n\nsk-0123456789:ab==\n  web:  sk-0123456789abcd  \r\n";
        let (_file, keys) = keys(text, &["sk-fedcba9876543210", " ci: sk-fedcba98765432=1"]);
        let all = keys.api().unwrap();
        let all: Vec<_> = all.iter().map(|k| (k.name.as_deref(), k.key.reveal())).collect();
        let want = [
            (None, "sk-0123456789:ab=="),
            (Some("web"), "sk-0123456789abcd"),
            (None, "sk-fedcba9876543210"),
            (Some("ci"), "sk-fedcba98765432=1"),
        ];
        assert_eq!(all, want);
    }

    #[test]
    fn complaints_name_the_place_and_never_the_key() {
        for (file, environment, want) in [
            ("# none\n", &[][..], "has no key"),
            ("", &[""], "has no key"),
            ("\nsk-short\n", &[], "line 2; allowed: 16 or more"),
            ("we/b: sk-0123456789abcdef", &[], "line 1; allowed: KEY or NAME: KEY"),
            ("sk-0123456789abcdef sk-second0123456789", &[], "line 1; allowed: KEY or"),
            ("sk-0123456789\u{e9}abcdef", &[], "line 1; allowed: 16 or more"),
            ("sk-0123456789abcdef", &["sk-short"], "SHOAL_API_KEYS, key 1; allowed"),
            ("admin-0123456789", &[], "the admin key is among the API keys"),
        ] {
            let (_file, keys) = keys(file, environment);
            let fault = keys.api().unwrap_err();
            assert!(fault.contains(want) && !fault.contains("sk-"), "{fault}");
            let printed = format!("{keys:?}");
            assert!(!printed.contains("admin-0") && !printed.contains("sk-"), "{printed}");
        }
    }

    #[test]
    fn origins_are_what_browsers_send() {
        for good in ["*", "https://a.example", "http://[::1]:8080", "tauri://localhost"] {
            assert_eq!(origin(good).as_deref(), Ok(good));
        }
        assert_eq!(origin("https://A.Example").as_deref(), Ok("https://a.example"));
        for bad in ["", "a.example", "://a", "https://", "https://a.example/", "https://*.a", "a b"]
        {
            assert!(origin(bad).unwrap_err().starts_with("allowed: *"), "{bad}");
        }
    }
}
