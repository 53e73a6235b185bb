//! Who may ask: every route, with every kind of key, and web pages of other origins.

use crate::harness::{AUTHORISED, BUNDLE, COMPLETIONS, Reply, Server, Setup, repeater, routes};
use hyper::Method;
use serde_json::json;
use shoal::api::Keys;

const HOLDER: (&str, &str) = ("authorization", "Bearer sk-0123456789abcdef");
const ADMINISTRATOR: (&str, &str) = AUTHORISED;
const STRANGER: (&str, &str) = ("authorization", "Bearer sk-fedcba9876543210");

/// What may be asked without a key, of all that the sources list.
const PUBLIC: &[&str] =
    &["/livez", "/readyz", "/startupz", "/health", "/v2/health/live", "/v2/health/ready"];
/// What only the administrator may do.
const ADMIN: &[(Method, &str)] = &[
    (Method::GET, "/v1/adapters"),
    (Method::POST, "/v1/load_lora_adapter"),
    (Method::POST, "/v1/unload_lora_adapter"),
    (Method::POST, "/v1/tasks"),
];

fn keys() -> Keys {
    let keys = Keys::default().with_api_key(Some("web"), "sk-0123456789abcdef");
    keys.with_admin_key(ADMINISTRATOR.1.strip_prefix("Bearer ").unwrap())
}

async fn server(keys: Keys, origins: &[&str]) -> Server {
    let origins = origins.iter().map(|&origin| origin.into()).collect();
    Server::with(Setup { keys, origins, ..Setup::default() }, repeater()).await
}

fn all_routes() -> Vec<String> {
    let asked = |route: String| route.replace("{task}", "image").replace(['{', '}'], "");
    routes::all().into_iter().map(asked).collect()
}

fn refusal(reply: &Reply) -> (u16, String, Option<String>) {
    let (status, kind, _, code) = reply.error();
    (status, kind, code)
}

#[tokio::test]
async fn every_route_but_the_probes_needs_a_key_and_so_does_what_does_not_exist() {
    let server = server(keys(), &[]).await;
    let ask = async |method: &Method, path: &str, headers: &[(&str, &str)]| {
        server.client.call(method.clone(), path, headers, "").await
    };
    let mut paths = all_routes();
    paths.extend(["/nowhere", "/v1/nowhere", "/v2/health/nowhere"].map(String::from));
    for path in &paths {
        for method in [Method::GET, Method::POST, Method::DELETE, Method::OPTIONS] {
            for headers in [&[][..], &[STRANGER]] {
                let reply = ask(&method, path, headers).await;
                if PUBLIC.contains(&path.as_str()) {
                    assert_ne!(reply.status, 401, "{method} {path}");
                    continue;
                }
                if path.starts_with("/v2")
                    || ["/", "/generate", "/generate_stream"].contains(&path.as_str())
                {
                    // These wires say it in their own words.
                    let said = reply.json()["error"].as_str().map(|text| text.contains("key"));
                    assert_eq!((reply.status, said), (401, Some(true)), "{method} {path}");
                } else {
                    let want = (401, "authentication_error".into(), Some("invalid_api_key".into()));
                    assert_eq!(refusal(&reply), want, "{method} {path}");
                }
                assert_eq!(reply.header("www-authenticate"), "Bearer");
                assert!(!reply.header("x-request-id").is_empty());
            }
            for key in [HOLDER, ADMINISTRATOR] {
                assert_ne!(ask(&method, path, &[key]).await.status, 401, "{method} {path}");
            }
        }
    }
    assert_eq!(ask(&Method::GET, "/nowhere", &[HOLDER]).await.error().0, 404);
    assert_eq!(ask(&Method::DELETE, "/v1/models", &[HOLDER]).await.error().0, 405);
    let body = json!({"model": BUNDLE, "prompt": "a|"});
    for key in [HOLDER, ADMINISTRATOR] {
        assert_eq!(server.client.post_with(COMPLETIONS, &[key], &body).await.status, 200);
    }
}

#[tokio::test]
async fn an_api_key_does_not_administer() {
    let all = all_routes();
    for (keys, status) in [(keys(), 200), (Keys::default().with_api_key(None, &HOLDER.1[7..]), 403)]
    {
        let server = server(keys, &[]).await;
        for (method, path) in ADMIN {
            assert!(all.iter().any(|route| route == path), "{path}");
            let reply = server.client.call(method.clone(), path, &[HOLDER], "").await;
            assert_eq!(refusal(&reply), (403, "permission_error".into(), None), "{path}");
        }
        let reply = server.client.get_with("/v1/tasks", &[HOLDER]).await;
        assert_eq!(reply.status, 200, "the list is no administration");
        let list = server.client.get_with("/v1/adapters", &[ADMINISTRATOR]).await;
        assert_eq!(list.status, if status == 200 { 200 } else { 401 });
    }
}

#[tokio::test]
async fn whoever_is_still_writing_hears_of_the_key() {
    let server = server(keys(), &[]).await;
    let body = " ".repeat(5_000_000);
    for path in [COMPLETIONS, "/nowhere"] {
        let reply = server.client.call(Method::POST, path, &[], body.clone()).await;
        assert_eq!(reply.error().0, 401);
    }
}

#[tokio::test]
async fn metrics_may_be_public() {
    let closed = server(keys(), &[]).await;
    assert_eq!(closed.client.get("/metrics").await.status, 401);
    let open = server(keys().with_metrics_public(true), &[]).await;
    assert_eq!(open.client.get("/metrics").await.status, 200);
    assert_eq!(open.client.get("/info").await.status, 401);
}

#[tokio::test]
async fn pages_of_other_origins_ask_only_where_they_were_let_in() {
    let page = ("origin", "https://a.example");
    let preflight = [
        page,
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,x-stainless-lang"),
    ];
    let options = async |server: &Server, headers: &[(&str, &str)]| {
        server.client.call(Method::OPTIONS, COMPLETIONS, headers, "").await
    };
    let off = server(Keys::default(), &[]).await;
    let reply = off.client.get_with("/v1/models", &[page]).await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, ""));
    assert_eq!(options(&off, &preflight).await.status, 405);
    for (origins, allowed) in [
        (&["https://b.example", "https://a.example"][..], "https://a.example"),
        (&["*"], "*"),
        (&["https://b.example"], ""),
    ] {
        let server = server(keys(), origins).await;
        let reply = options(&server, &preflight).await;
        assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, allowed));
        assert_eq!(reply.header("access-control-allow-methods"), "GET,POST,OPTIONS");
        let headers = "authorization,x-stainless-lang";
        assert_eq!(reply.header("access-control-allow-headers"), headers);
        assert_eq!(reply.header("access-control-allow-credentials"), "");
        let refused = server.client.get_with("/v1/models", &[page]).await;
        let answered = server.client.get_with("/v1/models", &[page, HOLDER]).await;
        assert_eq!((refused.status, answered.status), (401, 200));
        for reply in [refused, answered] {
            assert_eq!(reply.header("access-control-allow-origin"), allowed);
            let exposed = "x-request-id,retry-after,server-timing";
            assert_eq!(reply.header("access-control-expose-headers"), exposed);
        }
    }
}
