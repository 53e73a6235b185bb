//! Files as memory.
#![allow(unsafe_code)]

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::path::Path;

/// Maps a file for reading.
///
/// Whoever truncates the file while it is mapped makes the next read of the lost pages end the
/// process (SIGBUS), and whoever writes to it changes what is read. Model files are replaced by
/// renaming a new one into place, never rewritten.
pub fn map_file(path: impl AsRef<Path>) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the mapping is read-only and private to us; that nobody changes the file under it is the
    // condition stated above, which no program can enforce.
    unsafe { Mmap::map(&file) }
}
