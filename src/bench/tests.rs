use super::*;
use crate::bench::load::arrivals;
use crate::bench::report::Percentiles;
use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use clap::Parser;
use futures::{StreamExt, stream};
use std::convert::Infallible;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn args(line: &str) -> Args {
    Cli::try_parse_from(["bench"].into_iter().chain(line.split_whitespace())).unwrap().args
}

#[test]
fn percentiles_are_nearest_rank() {
    let p = Percentiles::of((1..=200).rev().map(f64::from).collect()).unwrap();
    assert_eq!((p.p50, p.p90, p.p99, p.max), (100.0, 180.0, 198.0, 200.0));
    let p = Percentiles::of(vec![3.0, 1.0, 2.0]).unwrap();
    assert_eq!((p.p50, p.p90, p.p99, p.max), (2.0, 3.0, 3.0, 3.0));
    let p = Percentiles::of(vec![7.0]).unwrap();
    assert_eq!((p.p50, p.p99), (7.0, 7.0));
    assert_eq!(Percentiles::of(Vec::new()), None);
}

#[test]
fn the_schedule_is_poisson_and_repeats() {
    let schedule = |seed| arrivals(50.0, seed).take(10_000).collect::<Vec<_>>();
    let a = schedule(3);
    assert_eq!(a, schedule(3));
    assert_ne!(a, schedule(4));
    let gaps: Vec<f64> = a.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
    let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
    let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
    assert!((mean * 50.0 - 1.0).abs() < 0.05, "mean gap {mean}");
    // An exponential distribution's deviation equals its mean.
    assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "deviation {}", variance.sqrt());
}

#[test]
fn tasks_and_inputs_take_turns() {
    let load = |name: &str, inputs: &[&str]| TaskLoad {
        name: name.into(),
        inputs: inputs.iter().map(ToString::to_string).collect(),
    };
    let mut workload = Workload {
        tasks: vec![load("image", &["a", "b"]), load("music", &["c"])],
        completions: false,
        common: Map::from_iter([("max_tokens".to_owned(), json!(8))]),
        seed: 5,
        timeout: Duration::from_secs(1),
    };
    let sent: Vec<_> = (0..4)
        .map(|i| {
            let (path, body) = workload.request(i);
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["seed"], 5 + i);
            assert_eq!(body["max_tokens"], 8);
            (path, body["input"].as_str().unwrap().to_owned())
        })
        .collect();
    let expected = [("image", "a"), ("music", "c"), ("image", "b"), ("music", "c")]
        .map(|(task, input)| (format!("/v1/tasks/{task}/generate"), input.to_owned()));
    assert_eq!(sent, expected);
    workload.completions = true;
    let (path, body) = workload.request(1);
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((path.as_str(), &body["model"]), ("/v1/completions", &json!("music")));
    assert_eq!(
        (&body["prompt"], &body["stream_options"]["include_usage"]),
        (&json!("c"), &json!(true))
    );
}

#[test]
fn impossible_options_are_refused() {
    for line in [
        "http://h --streams 0",
        "http://h --rate 0",
        "http://h --duration -1",
        "http://h --requests 0",
        "http://h --ignore-eos",
        "http://h --timeout inf",
    ] {
        assert!(check(&args(&line.replace(" -1", "=-1"))).is_err(), "{line}");
    }
    let limit = check(&args("http://h --requests 3")).unwrap();
    assert_eq!((limit.requests, limit.duration), (Some(3), None));
    for url in ["127.0.0.1:8000", "https://h", "/v1"] {
        assert!(Client::new(url).is_err(), "{url}");
    }
}

fn frame(text: &str, finish: Option<&str>) -> String {
    let choice = json!({"index": 0, "text": text, "finish_reason": finish});
    format!("data: {}\n\n", json!({"choices": [choice]}))
}

/// Answers by the task's name: `ok` streams three tokens in pieces that cut frames and letters apart.
async fn generate(Path(task): Path<String>) -> Response {
    let good = [frame("ö", None), frame("", None), frame("c", Some("stop"))].concat();
    let usage = r#"data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}"#;
    let text = match task.as_str() {
        "ok" => format!("{good}: ping\n\n{usage}\n\ndata: [DONE]\n\n"),
        "counts" => format!("{good}data: [DONE]\n\n"),
        "empty" => format!("{}data: [DONE]\n\n", frame("", Some("stop"))),
        "cut" => good,
        "broken" => "data: {\n\n".to_owned(),
        "fails" => {
            frame("a", None) + "data: {\"error\": {\"code\": null, \"type\": \"server_error\"}}\n\n"
        }
        "stalls" => frame("a", None),
        _ => return (StatusCode::TOO_MANY_REQUESTS, "later").into_response(),
    };
    let pieces: Vec<_> =
        text.as_bytes().chunks(7).map(|c| Ok::<_, Infallible>(c.to_vec())).collect();
    let body = stream::iter(pieces);
    if task == "stalls" {
        return axum::body::Body::from_stream(body.chain(stream::pending())).into_response();
    }
    axum::body::Body::from_stream(body).into_response()
}

/// The URL of a server on a free port.
async fn serve() -> String {
    let listing = || async { r#"{"object": "list", "data": [{"id": "ok"}, {"id": "counts"}]}"# };
    let app = Router::new()
        .route("/base/v1/tasks", get(listing))
        .route("/base/v1/tasks/{task}/generate", post(generate));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/base/", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    url
}

#[tokio::test]
async fn good_replies_are_counted_and_timed() {
    let args = args(&format!("{} --streams 1,3 --requests 12", serve().await));
    let mut shown = 0;
    let report = measure(&args, |_| shown += 1).await.unwrap();
    assert_eq!((report.runs.len(), shown), (2, 2));
    for run in &report.runs {
        let names: Vec<_> = run.rows.iter().map(|r| r.task.as_str()).collect();
        assert_eq!(names, ["ok", "counts", "all"]);
        let all = run.total().unwrap();
        assert_eq!((all.requests, all.failed(), all.tokens), (12, 0, 36));
        assert_eq!(all.prompt_tokens, 30);
        let (ttft, end) = (all.ttft_ms.unwrap(), all.end_to_end_ms.unwrap());
        assert!(0.0 < ttft.p50 && ttft.p50 <= end.p50 && end.max <= run.seconds * 1e3);
        let rate = all.tokens as f64 / run.seconds;
        assert!((all.tokens_per_second - rate).abs() < 1e-9);
    }
    let text = report.runs[1].to_string();
    assert!(text.starts_with("closed loop, 3 streams: "), "{text}");
    assert_eq!(text.lines().count(), 5, "{text}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["runs"][1]["load"], json!({"streams": 3}));
    assert_eq!(json["options"]["requests"], 12);
}

#[tokio::test]
async fn failures_are_counted_by_kind() {
    let tasks = "ok,cut,broken,fails,stalls,full,empty";
    let line = format!("{} --tasks {tasks} --streams 7 --requests 14 --timeout 0.3", serve().await);
    let args = Args { warmup: 0, ..args(&line) };
    let report = measure(&args, |_| ()).await.unwrap();
    let rows = &report.runs[0].rows;
    let kinds: Vec<_> = rows[..7]
        .iter()
        .map(|row| row.errors.iter().map(|(k, e)| format!("{k} {}", e.count)).collect::<String>())
        .collect();
    let expected = [
        "",
        "cut short 2",
        "malformed 2",
        "in stream: server_error 2",
        "timeout 2",
        "http 429 2",
        "",
    ];
    assert_eq!(kinds, expected);
    assert_eq!(rows[5].errors["http 429"].first, "later");
    assert_eq!((rows[6].tokens, rows[6].ttft_ms), (0, None));
    assert_eq!((rows[7].requests, rows[7].failed(), rows[7].tokens), (14, 10, 6));
}

#[tokio::test]
async fn open_loop_latency_counts_from_the_intended_arrival() {
    let line = format!("{} --tasks ok --rate 200 --requests 20", serve().await);
    let report = measure(&args(&line), |_| ()).await.unwrap();
    let run = &report.runs[0];
    let all = run.total().unwrap();
    assert_eq!((all.requests, all.failed()), (20, 0));
    // No reply can be faster than its own request was late.
    assert!(all.end_to_end_ms.unwrap().max >= run.generator_lag_ms.unwrap().max);
    let last = arrivals(200.0, 1).nth(19).unwrap().as_secs_f64();
    assert!(run.seconds >= last, "{} < {last}", run.seconds);
}

#[tokio::test]
async fn a_server_that_is_away_is_an_error() {
    // Bound but not listening: connections are refused and nobody else gets the port.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    let fault = measure(&args(&url), |_| ()).await.unwrap_err();
    assert!(format!("{fault:#}").contains("cannot reach"), "{fault:#}");
    let report = measure(&args(&format!("{url} --tasks ok --requests 2")), |_| ()).await.unwrap();
    assert_eq!(report.runs[0].rows[0].errors["connect"].count, 2);
}
