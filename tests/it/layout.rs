//! Holds the shape of the code: who may import whom, where `unsafe` and candle may stand, and how
//! long a file may be. One crate cannot enforce that by itself, so this reads the sources as text,
//! without comments, strings and test modules (a test may use whatever it needs).
//!
//! A change that moves an arrow changes [`ROOMS`] and ARCHITECTURE.md together.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// No file is longer.
const MAX_LINES: usize = 500;

/// Imported by all, import none of the rest.
const LEAVES: &[&str] = &["ids", "error", "request", "task", "config", "metrics", "telemetry"];

/// One top-level module (a file or a folder) and what it may name.
struct Room {
    name: &'static str,
    /// Paths below `crate::` beside the leaves and itself; `*` is every room.
    imports: &'static [&'static str],
    /// Whether it may name candle.
    candle: bool,
}

const fn room(name: &'static str, imports: &'static [&'static str], candle: bool) -> Room {
    Room { name, imports, candle }
}

/// The arrows, all of them. A leaf is listed in [`LEAVES`] only.
const ROOMS: &[Room] = &[
    room("lib", &["*"], false),
    room("main", &["*"], true),
    room("cli", &["*"], true),
    room("bench", &["*"], true),
    room("eval", &["*"], true),
    room("bundle", &["*"], true),
    room("api", &["engine", "text", "adapter::registry"], false),
    room("text", &[], false),
    room("engine", &["model::step"], false),
    room("model", &["adapter", "kernels"], true),
    room("adapter", &["kernels"], true),
    room("train", &["model", "adapter", "kernels", "text"], true),
    room("kernels", &[], true),
];

/// The room that a file below `src/` belongs to: `api/http.rs` is in `api`, `ids.rs` is `ids`.
fn room_of(file: &str) -> &str {
    file.split('/').next().unwrap_or(file).trim_end_matches(".rs")
}

fn is_test_file(file: &str) -> bool {
    file.split('/').any(|part| matches!(part, "tests" | "tests.rs"))
}

/// `source` with comments, string and character literals blanked, so that only code is left.
fn code_only(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let skipped = literal_or_comment(rest);
        if skipped > 0 {
            out.extend(rest[..skipped].chars().map(|c| if c == '\n' { c } else { ' ' }));
            rest = &rest[skipped..];
        } else if c.is_alphanumeric() || c == '_' {
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

/// Bytes of the comment or literal that `text` starts with; 0 if it starts with neither.
fn literal_or_comment(text: &str) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return text.find("*/").map_or(text.len(), |end| end + 2);
    }
    let raw = text.strip_prefix('b').unwrap_or(text);
    if let Some(after) = raw.strip_prefix('r') {
        let hashes = after.len() - after.trim_start_matches('#').len();
        if after[hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let body = text.len() - after.len() + hashes + 1;
            return text[body..].find(&close).map_or(text.len(), |end| body + end + close.len());
        }
    }
    if raw.starts_with('"') {
        return quoted(text, text.len() - raw.len() + 1, '"');
    }
    let mut chars = raw.chars();
    match (chars.next(), chars.next(), chars.next()) {
        (Some('\''), Some('\\'), _) => quoted(text, text.len() - raw.len() + 1, '\''),
        (Some('\''), Some(c), Some('\'')) => text.len() - raw.len() + 2 + c.len_utf8(),
        _ => 0,
    }
}

/// Where the literal ends whose body starts at `body`, past its closing `quote`.
fn quoted(text: &str, body: usize, quote: char) -> usize {
    let mut escaped = false;
    for (i, c) in text[body..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return body + i + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// `code` without its inline `#[cfg(test)] mod … { … }`.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        rest = &rest[at + "#[cfg(test)]".len()..];
        let item = rest.trim_start();
        if item.starts_with("mod ") || item.starts_with("pub mod ") {
            let end = rest.find([';', '{']).unwrap_or(rest.len());
            let body = &rest[end..];
            rest = &body[if body.starts_with('{') { block(body) } else { 0 }..];
        }
    }
    kept + rest
}

/// Bytes of the `{ … }` that `text` starts with.
fn block(text: &str) -> usize {
    let mut depth = 0;
    for (i, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => return i + 1,
            '}' => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

/// The paths below the crate's root that `code` names, at most two segments each: `crate::a::b`,
/// `crate::{a::b, c}`, and `super::…` where it climbs to the root from a file `depth` modules down.
fn crate_paths(code: &str, depth: usize) -> BTreeSet<String> {
    let root = ["super::"].repeat(depth).concat();
    let mut paths = BTreeSet::new();
    for prefix in ["crate::", root.as_str()] {
        if prefix.is_empty() {
            continue;
        }
        for (at, _) in code.match_indices(prefix) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
                continue;
            }
            collect(&code[at + prefix.len()..], &mut paths);
        }
    }
    paths
}

/// Adds the path, or each path of the braced group, that `text` starts with.
fn collect(text: &str, paths: &mut BTreeSet<String>) {
    let Some(group) = text.strip_prefix('{') else {
        paths.insert(two_segments(text));
        return;
    };
    let body = &group[..block(text).saturating_sub(2).min(group.len())];
    let mut depth = 0;
    let mut start = 0;
    for (i, c) in body.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                paths.insert(two_segments(body[start..i].trim_start()));
                start = i + 1;
            }
            _ => {}
        }
    }
    paths.insert(two_segments(body[start..].trim_start()));
}

fn two_segments(text: &str) -> String {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
    let path = &text[..end.unwrap_or(text.len())];
    path.split("::").take(2).collect::<Vec<_>>().join("::")
}

/// Whether `word`, or a longer name that starts with it, stands in `code` as a name of its own.
fn names(code: &str, word: &str, whole: bool) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let after = &code[at + word.len()..];
        !(code[..at].ends_with(is_word) || whole && after.starts_with(is_word))
    })
}

/// What is wrong with one file below `src/`.
fn faults(file: &str, source: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let lines = source.lines().count();
    if lines > MAX_LINES {
        faults.push(format!("{file}: {lines} lines, more than {MAX_LINES}"));
    }
    let room = room_of(file);
    let code = code_only(source);
    if room != "kernels" && names(&code, "unsafe", true) {
        faults.push(format!("{file}: unsafe outside kernels"));
    }
    if is_test_file(file) {
        return faults;
    }
    let code = without_tests(&code);
    let rules = match ROOMS.iter().find(|r| r.name == room) {
        Some(rules) => rules,
        None if LEAVES.contains(&room) => &Room { name: "a leaf", imports: &[], candle: false },
        None => {
            faults.push(format!("{file}: {room} is in no room: give it a row in ROOMS"));
            return faults;
        }
    };
    if !rules.candle && names(&code, "candle", false) {
        faults.push(format!("{file}: candle in {room}"));
    }
    for shell in ["axum", "tonic"] {
        if room != "api" && names(&code, shell, false) {
            faults.push(format!("{file}: {shell} outside api"));
        }
    }
    let depth = file.split('/').count() - usize::from(file.ends_with("mod.rs"));
    for path in crate_paths(&code, depth) {
        let target = path.split("::").next().unwrap_or(&path);
        let is_room = ROOMS.iter().any(|r| r.name == target) || LEAVES.contains(&target);
        let open = rules.imports.contains(&"*") || target == room || LEAVES.contains(&target);
        let listed = rules.imports.iter().any(|&i| i == target || i == path);
        let kernels_leaf = room == "kernels" && LEAVES.contains(&target);
        if is_room && !(open || listed) || kernels_leaf {
            faults.push(format!("{file}: {room} may not name crate::{path}"));
        }
    }
    faults
}

/// All `.rs` files below `dir`, sorted.
fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|e| e.expect("the folder is readable").path()).collect();
    paths.sort();
    let nested = paths.into_iter().map(|path| {
        if path.is_dir() {
            rust_files(&path)
        } else if path.extension().is_some_and(|e| e == "rs") {
            vec![path]
        } else {
            Vec::new()
        }
    });
    nested.flatten().collect()
}

#[test]
fn the_sources_keep_their_rooms() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let src = root.join("src");
    let files = rust_files(&src);
    assert!(files.len() > 10, "found only {} files below {}", files.len(), src.display());
    let mut found = Vec::new();
    for path in files {
        let source = fs::read_to_string(&path).unwrap();
        let file = path.strip_prefix(&src).unwrap().to_str().unwrap().replace('\\', "/");
        found.extend(faults(&file, &source));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn tests_and_benches_keep_the_file_length() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for path in ["tests", "benches"].iter().flat_map(|dir| rust_files(&root.join(dir))) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= MAX_LINES, "{}: {lines} lines", path.display());
    }
}

#[test]
fn planted_violations_are_caught() {
    let planted = [
        ("api/http.rs", "use crate::model::decoder::Decoder;", "may not name"),
        ("api/http.rs", "fn f() { crate::kernels::matmul(); }", "may not name"),
        ("api/http.rs", "use candle_core::Tensor;", "candle in api"),
        ("engine/core.rs", "use crate::model::runner::CandleRunner;", "may not name"),
        ("engine/core.rs", "use axum::Router;", "axum outside api"),
        ("text/mod.rs", "use tonic_health::pb;", "tonic outside api"),
        ("engine/core.rs", "use super::super::text::Encoder;", "may not name"),
        ("ids.rs", "use crate::{error::Error, engine::Job};", "may not name crate::engine::Job"),
        ("ids.rs", "use super::engine::Job;", "may not name"),
        ("kernels/cpu.rs", "use crate::error::Error;", "may not name"),
        ("text/mod.rs", "unsafe { f() }", "unsafe outside kernels"),
        ("text/tests.rs", "unsafe { f() }", "unsafe outside kernels"),
        ("novel.rs", "", "is in no room"),
    ];
    for (file, source, expected) in planted {
        let found = faults(file, source);
        assert_eq!(found.len(), 1, "{file}: {source}: {found:?}");
        assert!(found[0].contains(expected), "{found:?}");
    }
    let long = "\n".repeat(MAX_LINES + 1);
    assert!(faults("text/mod.rs", &long)[0].contains("lines"));
}

#[test]
fn what_is_allowed_passes() {
    let allowed = [
        ("api/http.rs", "use crate::engine::{Event, Job}; use crate::{ids::TaskId, text};"),
        ("engine/core.rs", "use crate::model::step::{Runner, StepInput}; use super::Job;"),
        (
            "ids.rs",
            "//! Index in [`crate::engine::Job`]\nfn f() -> &str { \"crate::api::X unsafe\" }",
        ),
        ("kernels/cpu.rs", "// SAFETY: in bounds\nunsafe { candle_core::x() }"),
        (
            "engine/core.rs",
            "#[cfg(test)]\nmod tests { use crate::text::X; fn f() { if a { b() } } }",
        ),
        ("api/tests.rs", "use crate::model::decoder::Decoder;"),
        (
            "text/mod.rs",
            "#![allow(unsafe_code)] const Q: char = '\"'; const S: &str = r#\"unsafe\"#;",
        ),
        ("train/data.rs", "use crate::model::decoder::Decoder; fn f<'a>(x: &'a str) {}"),
    ];
    for (file, source) in allowed {
        assert_eq!(faults(file, source), Vec::<String>::new(), "{file}: {source}");
    }
}

/// ARCHITECTURE.md says the same as the code: the error table row by row, and every room by name.
#[test]
fn the_page_agrees_with_the_code() {
    use shoal::error::TABLE;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md");
    let page = fs::read_to_string(path).unwrap();
    let written: Vec<&str> = page
        .lines()
        .skip_while(|line| !line.starts_with("| kind | HTTP"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .collect();
    let expected = TABLE.iter().map(|row| {
        let retry = if row.retry { "yes" } else { "no" };
        format!("| {:?} | {} | {} | {retry} | {} |", row.kind, row.http, row.grpc, row.outcome)
    });
    assert_eq!(written, expected.collect::<Vec<_>>());
    for name in ROOMS.iter().map(|room| room.name).chain(LEAVES.iter().copied()) {
        let is_there = [format!("`{name}`"), format!("`{name}::")].iter().any(|n| page.contains(n));
        assert!(is_there || name == "lib", "ARCHITECTURE.md has no line on {name}");
    }
}
