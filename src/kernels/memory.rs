//! Buffers: aligned words, scratch that threads keep, and outputs that are written before they are read.
#![allow(unsafe_code)]

use memmap2::MmapMut;
use std::cell::RefCell;
use std::{fmt, io};

/// Words that begin on a cache line.
#[derive(Default)]
pub struct Words {
    /// With room to spare in front.
    all: Vec<u32>,
    start: usize,
    len: usize,
}

impl Words {
    /// `count` zeros; the system hands out their memory as it is touched.
    pub fn zeros(count: usize) -> Self {
        Self::aligned(vec![0; count + LINE], count)
    }

    fn aligned(all: Vec<u32>, count: usize) -> Self {
        let beyond = all.as_ptr().addr() % 64 / size_of::<u32>();
        Self { all, start: (LINE - beyond) % LINE, len: count }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The first word.
    pub fn as_ptr(&self) -> *const u32 {
        self.as_slice().as_ptr()
    }

    /// The first word.
    pub fn as_mut_ptr(&mut self) -> *mut u32 {
        self.as_mut_slice().as_mut_ptr()
    }

    /// All of them.
    pub fn as_slice(&self) -> &[u32] {
        &self.all[self.start..self.start + self.len]
    }

    /// All of them.
    pub fn as_mut_slice(&mut self) -> &mut [u32] {
        &mut self.all[self.start..self.start + self.len]
    }
}

/// Not what they are: there are millions.
impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} words", self.len)
    }
}

/// Words of zeros that the system hands out as they are touched, in large pages where it has them: a
/// step that writes to new places must not stop for each 4 KB.
pub struct Pages {
    map: MmapMut,
}

impl Pages {
    /// `count` zeros; an error if there is not that much memory to be had.
    pub fn zeros(count: usize) -> io::Result<Self> {
        let bytes = count.checked_mul(size_of::<u32>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let map = MmapMut::map_anon(bytes)?;
        // Without large pages it works as well, only slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { map })
    }

    /// All of them.
    pub fn as_slice(&self) -> &[u32] {
        // SAFETY: mapped memory is aligned to pages, and any bits are words.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.map.len() / 4) }
    }

    /// The first word; good for writing all of them.
    pub fn as_mut_ptr(&mut self) -> *mut u32 {
        self.map.as_mut_ptr().cast()
    }
}

/// Not what they are: there are millions.
impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of pages", self.map.len())
    }
}

/// Words in a cache line.
const LINE: usize = 64 / size_of::<u32>();

/// Runs `f` with `count` words of any value, which this thread keeps for the next caller. When `f`
/// asks again (directly or because its thread takes over other work while it waits), it gets a
/// buffer of its own.
pub fn with_scratch<R>(count: usize, f: impl FnOnce(*mut u32) -> R) -> R {
    thread_local!(static KEPT: RefCell<Words> = RefCell::default());
    KEPT.with(|kept| match kept.try_borrow_mut() {
        Ok(mut words) => {
            if words.len() < count {
                *words = Words::zeros(count);
            }
            f(words.as_mut_ptr())
        }
        Err(_) => f(Words::zeros(count).as_mut_ptr()),
    })
}

/// A pointer that may cross threads; whoever uses it sees to it that they write to different places.
#[derive(Debug)]
pub struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: only the address crosses; each use is an unsafe block with its own reason.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Shares a place.
    pub fn new(p: *mut T) -> Self {
        Self(p)
    }

    /// The place.
    pub fn get(self) -> *mut T {
        self.0
    }
}

/// A vector of `len` elements, all written by `fill`: memory is not set to zero first.
///
/// # Safety
/// `fill` must write all `len` elements, and read none that it has not written.
pub unsafe fn filled(len: usize, fill: impl FnOnce(Shared<f32>)) -> Vec<f32> {
    let mut out = Vec::with_capacity(len);
    fill(Shared::new(out.as_mut_ptr()));
    // SAFETY: the capacity is there, and the caller says that everything was written.
    unsafe { out.set_len(len) };
    out
}

/// Asks the allocator to keep what is freed. A training step frees and allocates the same hundreds of
/// megabytes again and again; giving them back in between costs more than some of the arithmetic.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        use std::sync::Once;
        const TRIM_THRESHOLD: c_int = -1;
        const TOP_PAD: c_int = -2;
        const MMAP_THRESHOLD: c_int = -3;
        unsafe extern "C" {
            fn mallopt(param: c_int, value: c_int) -> c_int;
        }
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // SAFETY: glibc's own function, safe to call at any time; the values are within its limits.
            unsafe {
                mallopt(MMAP_THRESHOLD, 32 << 20);
                mallopt(TRIM_THRESHOLD, c_int::MAX);
                mallopt(TOP_PAD, 64 << 20);
            }
        });
    }
}
