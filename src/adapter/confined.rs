//! Which folders may be read for whoever administers adapters from outside.

use super::{CONFIG_FILE, WEIGHTS_FILE};
use crate::error::{Error, Kind, Result};
use std::path::{Component, Path, PathBuf};

/// The folder that `path` names below `root`, and nowhere else: links and `..` are followed before that
/// is judged, for the folder and for an adapter's files in it. Of what is outside nothing is said, not
/// even whether it exists.
///
/// # Errors
/// `NotFound` if there is no such folder; `Forbidden` if it, or a file in it, is not below the root.
pub fn confined(root: &Path, path: &str) -> Result<PathBuf> {
    let outside = || {
        let message = "lora_path is outside of the folder that adapters are loaded from";
        Error::new(Kind::Forbidden, message).with_param("lora_path")
    };
    let missing = |_| {
        let shown: String = path.chars().take(256).collect();
        Error::not_found(format!("lora_path: there is no {shown}")).with_param("lora_path")
    };
    let real_root = root.canonicalize().map_err(missing)?;
    let asked = root.join(path);
    if !stays_below(&asked, root) && !stays_below(&asked, &real_root) {
        return Err(outside());
    }
    let folder = asked.canonicalize().map_err(missing)?;
    let files = [CONFIG_FILE, WEIGHTS_FILE].map(|name| folder.join(name));
    // A file that is not there is a fault that loading names.
    let real_files = files.iter().filter_map(|file| file.canonicalize().ok());
    match real_files.chain([folder.clone()]).all(|real| real.starts_with(&real_root)) {
        true => Ok(folder),
        false => Err(outside()),
    }
}

/// Whether a path is below `root` as it is written.
fn stays_below(path: &Path, root: &Path) -> bool {
    let Ok(rest) = path.strip_prefix(root) else { return false };
    let mut depth = 0i32;
    rest.components().all(|part| {
        match part {
            Component::ParentDir => depth -= 1,
            Component::Normal(_) => depth += 1,
            _ => {}
        }
        depth >= 0
    })
}
