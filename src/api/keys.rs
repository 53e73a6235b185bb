//! Who may ask. Keys are kept as hashes only, and compared in constant time; which paths need none is
//! said in one place, and everything else needs one once there are API keys: also what does not exist,
//! so that nobody learns what does.
//!
//! [`Keys::admit`] knows headers and a path alone, which is what requests of every wire have.

use super::http::App;
use super::http::call::discard;
use crate::error::{Error, Kind, Result};
use crate::telemetry::Record;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// A key that is kept nowhere: its SHA-256.
#[derive(Clone)]
struct Key([u8; 32]);

impl Key {
    fn new(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// Whether both are the same; how long that takes says nothing about either.
    fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

/// All keys of a server.
#[derive(Clone, Default)]
pub struct Keys {
    /// Each with its holder's name, if that is known.
    api: Vec<(Option<Arc<str>>, Key)>,
    admin: Option<Key>,
    metrics_public: bool,
}

/// As whom somebody is let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nobody in particular: the path or the server is open to all.
    Anyone,
    /// The holder of an API key, by the key's name.
    Holder(Option<Arc<str>>),
    /// The holder of the admin key, who may do what all others may.
    Administrator,
}

impl Keys {
    /// One more API key, whose holder the access log calls `name`.
    pub fn with_api_key(mut self, name: Option<&str>, key: &str) -> Self {
        self.api.push((name.map(Arc::from), Key::new(key.as_bytes())));
        self
    }

    /// The same, with this admin key.
    pub fn with_admin_key(self, key: &str) -> Self {
        Self { admin: Some(Key::new(key.as_bytes())), ..self }
    }

    /// The same, with the metrics open to all or not.
    pub fn with_metrics_public(self, metrics_public: bool) -> Self {
        Self { metrics_public, ..self }
    }

    /// Whether nobody needs a key.
    pub fn are_open(&self) -> bool {
        self.api.is_empty()
    }

    /// Whether somebody may change the server.
    pub fn have_admin(&self) -> bool {
        self.admin.is_some()
    }

    /// Lets a request for `path` in, or refuses it. Admin routes ask [`Keys::administer`] beside.
    ///
    /// # Errors
    /// `Unauthenticated` without a key, or with one that is not known.
    pub fn admit(&self, path: &str, headers: &HeaderMap) -> Result<Access> {
        if self.is_public(path) {
            return Ok(Access::Anyone);
        }
        match self.find(headers) {
            Some(access) => Ok(access),
            // Clients that must have a key send any; where none is needed, any will do.
            None if self.are_open() => Ok(Access::Anyone),
            None => Err(unauthenticated(headers)),
        }
    }

    /// Refuses whoever may not change the server.
    ///
    /// # Errors
    /// `Forbidden` for everybody if there is no admin key, and for an API key; else `Unauthenticated`.
    pub fn administer(&self, headers: &HeaderMap) -> Result<()> {
        if self.admin.is_none() {
            let message =
                "administration is off; the server was started without --enable-adapter-admin";
            return Err(Error::new(Kind::Forbidden, message));
        }
        match self.find(headers) {
            Some(Access::Administrator) => Ok(()),
            Some(_) => {
                Err(Error::new(Kind::Forbidden, "this needs the admin key; an API key is not one"))
            }
            None => Err(unauthenticated(headers)),
        }
    }

    /// The paths that need no key. Everything else does.
    pub fn is_public(&self, path: &str) -> bool {
        match path {
            "/livez" | "/readyz" | "/startupz" | "/health" => true,
            "/v2/health/live" | "/v2/health/ready" => true,
            "/metrics" | "/metrics/router" => self.metrics_public,
            "/inference.GRPCInferenceService/ServerLive"
            | "/inference.GRPCInferenceService/ServerReady" => true,
            _ => path.starts_with("/grpc.health.v1.Health/"),
        }
    }

    /// Whose key the headers hold. All keys are looked at, whichever is the right one.
    fn find(&self, headers: &HeaderMap) -> Option<Access> {
        let given = Key::new(bearer(headers)?);
        let mut found = None;
        for (name, key) in &self.api {
            if key.is(&given) {
                found = Some(Access::Holder(name.clone()));
            }
        }
        match &self.admin {
            Some(admin) if admin.is(&given) => Some(Access::Administrator),
            _ => found,
        }
    }
}

/// The key of `Authorization: Bearer KEY`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at(value.iter().position(|&b| b == b' ')?);
    scheme.eq_ignore_ascii_case(b"bearer").then(|| key.trim_ascii())
}

fn unauthenticated(headers: &HeaderMap) -> Error {
    let message = match bearer(headers) {
        Some(key) if !key.is_empty() => "the key is not one of this server's",
        _ => "a key is needed, in the header authorization: Bearer KEY",
    };
    Error::new(Kind::Unauthenticated, message)
}

/// The middleware of every route over HTTP. What it refuses is counted, and read within bounds: a client
/// that is still writing would not hear the answer.
pub async fn guard(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    request: Request,
    next: Next,
) -> Response {
    match app.let_in(&record, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => {
            discard(request.into_body(), &app.limits).await;
            error.into_response()
        }
    }
}

impl App {
    /// Lets a request in, or counts it as refused.
    pub fn let_in(&self, record: &Arc<Record>, request: &Request) -> Result<()> {
        let access = self.keys.admit(request.uri().path(), request.headers());
        let access = access.inspect_err(|error| self.service.count_refused(record, error))?;
        record.note(|facts| facts.key = access.name());
        Ok(())
    }
}

impl Access {
    /// What the access log says of it.
    pub fn name(&self) -> Option<Arc<str>> {
        match self {
            Self::Anyone => None,
            Self::Holder(name) => name.clone(),
            Self::Administrator => Some("admin".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "sk-0123456789abcdef";
    const ADMIN: &str = "admin-0123456789";

    fn headers(authorization: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if !authorization.is_empty() {
            headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        }
        headers
    }

    fn keys() -> Keys {
        let keys = Keys::default().with_api_key(Some("web"), WEB);
        keys.with_api_key(None, "sk-second0123456").with_admin_key(ADMIN)
    }

    fn refused(result: Result<Access>) -> (u16, Option<&'static str>) {
        let error = result.unwrap_err();
        assert!(!error.to_string().contains("sk-"), "{error}");
        (error.kind.row().http, error.public_code())
    }

    #[test]
    fn a_bearer_is_found_whatever_the_case_of_its_scheme() {
        let admit = |authorization: &str| keys().admit("/v1/models", &headers(authorization));
        for scheme in ["Bearer ", "bearer ", "BEARER  "] {
            let access = admit(&format!("{scheme}{WEB}")).unwrap();
            assert_eq!(access, Access::Holder(Some("web".into())));
        }
        assert_eq!(admit("Bearer sk-second0123456").unwrap(), Access::Holder(None));
        assert_eq!(admit(&format!("Bearer {ADMIN}")).unwrap(), Access::Administrator);
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            WEB,
            "Basic sk-0123456789abcdef",
            "Bearer SK-0123456789ABCDEF",
            "Bearer sk-0123456789abcde",
            "Bearer sk-0123456789abcdef0",
            "Bearer sk-0123456789abcdef sk-0123456789abcdef",
        ] {
            assert_eq!(refused(admit(bad)), (401, Some("invalid_api_key")), "{bad:?}");
        }
    }

    #[test]
    fn an_open_server_takes_any_key_and_an_admin_key_closes_nothing_else() {
        let open = Keys::default().with_admin_key(ADMIN);
        for authorization in ["", "Bearer unused"] {
            let headers = headers(authorization);
            assert_eq!(open.admit("/v1/models", &headers).unwrap(), Access::Anyone);
            assert_eq!(open.administer(&headers).unwrap_err().kind, Kind::Unauthenticated);
        }
        open.administer(&headers(&format!("Bearer {ADMIN}"))).unwrap();
    }

    #[test]
    fn only_the_admin_key_administers() {
        let administer = |keys: Keys, authorization: &str| {
            keys.administer(&headers(authorization)).err().map(|error| error.kind)
        };
        let web = format!("Bearer {WEB}");
        assert_eq!(administer(keys(), &format!("Bearer {ADMIN}")), None);
        assert_eq!(administer(keys(), &web), Some(Kind::Forbidden));
        assert_eq!(administer(keys(), "Bearer other"), Some(Kind::Unauthenticated));
        assert_eq!(administer(keys(), ""), Some(Kind::Unauthenticated));
        let off = Keys::default().with_api_key(None, WEB);
        assert_eq!(administer(off, &web), Some(Kind::Forbidden));
    }

    #[test]
    fn only_probes_are_public() {
        let nobody = HeaderMap::new();
        let public = |keys: &Keys, path: &str| keys.admit(path, &nobody).is_ok();
        for path in ["/livez", "/v2/health/ready", "/grpc.health.v1.Health/Watch"] {
            assert!(public(&keys(), path), "{path}");
        }
        for path in ["/", "/livez/", "/livez/../info", "/v2/health", "/grpc.health.v1.Health", "*"]
        {
            assert!(!public(&keys(), path), "{path}");
        }
        let metrics = keys().with_metrics_public(true);
        for path in ["/metrics", "/metrics/router"] {
            assert!(public(&metrics, path) && !public(&keys(), path), "{path}");
        }
    }
}
