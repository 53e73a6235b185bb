//! The routes over HTTP, as the sources register them.

use std::fs;
use std::path::Path;

/// The path of every route that is registered by a literal.
pub fn all() -> Vec<String> {
    let mut found = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api"), &mut found);
    assert!(found.iter().any(|route| route == super::COMPLETIONS), "{found:?}");
    found
}

fn walk(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            // Paths over gRPC are those of the descriptors.
            if !path.ends_with("grpc") {
                walk(&path, found);
            }
            continue;
        }
        let source = fs::read_to_string(&path).unwrap();
        for call in source.split(".route(").skip(1) {
            let literal = call.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'));
            found.extend(literal.map(|(path, _)| path.to_owned()));
        }
    }
}
