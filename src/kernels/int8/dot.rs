//! The innermost loops: a few rows of bytes times one panel, sums in registers; for each instruction set.

use crate::kernels::simd::{LINE, prefetch};
use std::sync::OnceLock;

/// Which instructions multiply bytes; only those that this machine has can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
enum Set {
    Portable,
    Avx2,
    /// AVX2 with dot products of bytes (AVX-VNNI).
    AvxVnni,
    /// AVX-512 with dot products of bytes.
    Avx512Vnni,
}

impl Level {
    /// The best that this machine has.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self(Set::Portable)))
    }

    /// All that this machine has, the best last.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut found = vec![Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let vnni = avx2 && is_x86_feature_detected!("avxvnni");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni");
            let sets = [(avx2, Set::Avx2), (vnni, Set::AvxVnni), (avx512, Set::Avx512Vnni)];
            found.extend(sets.into_iter().filter(|(has, _)| *has).map(|(_, set)| Self(set)));
        }
        found
    }

    /// Rounds a row to bytes, `u = x / scale + 128`, and gives the scale: NaN if the row is not finite.
    /// There must be words enough.
    pub fn round(self, line: &[f32], words: &mut [u32]) -> f32 {
        assert!(line.len() <= 4 * words.len(), "a row does not fit its words");
        // SAFETY: words are bytes without further meaning, and there are enough of them.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), line.len()) };
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this variant exists only where `available` found the features.
            Set::Avx512Vnni => unsafe { x86::round_avx512(line, bytes) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Set::Avx2 | Set::AvxVnni => unsafe { x86::round_avx2(line, bytes) },
            _ => round(line, bytes),
        }
    }
}

/// Written so that compilers find vectors in it: the largest by its bits, rounding by an addition.
#[inline(always)]
fn round(line: &[f32], bytes: &mut [u8]) -> f32 {
    let largest = line.iter().fold(0u32, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return f32::NAN;
    }
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    for (byte, x) in bytes.iter_mut().zip(line) {
        // 1.5 * 2^23 leaves no room for a fraction: the integer is in the low bits.
        *byte = (x * inverse + 12_582_912.0).to_bits() as u8 ^ 0x80;
    }
    largest / 127.0
}

/// Rows whose sums are in registers together.
const GROUP: usize = 6;

/// Rows of words times one panel.
#[derive(Clone, Copy)]
pub struct Strip {
    /// Rows of words, each of four activations.
    pub a: *const u32,
    /// Words from one row to the next.
    pub lda: usize,
    /// A scale for each row.
    pub row_scales: *const f32,
    pub rows: usize,
    /// The panel: `k` rows of `width` words, each of four weights.
    pub b: *const u32,
    /// Words of the inner dimension.
    pub k: usize,
    /// A multiple of 16, at most 64.
    pub width: usize,
    /// For each of `width` columns.
    pub scales: *const f32,
    /// For each of `width` columns.
    pub offsets: *const i32,
    /// For each column.
    pub bias: Option<*const f32>,
    pub c: *mut f32,
    /// Elements from one output row to the next.
    pub ldc: usize,
    /// Columns that exist.
    pub columns: usize,
    /// The panel that will be wanted after this one, of the same size.
    pub next: Option<*const u32>,
}

/// Words of a panel that will be wanted soon, asked for while others are multiplied, so that neither
/// memory nor arithmetic waits for the other.
#[derive(Clone, Copy)]
struct Ahead {
    at: *const u32,
    /// Ask with each of so many words of the inner dimension.
    every: usize,
}

impl Ahead {
    /// Words that are on their way while a panel comes from memory for its first rows: what memory needs
    /// to be kept busy, which several rows' arithmetic between two loads would not leave room for.
    const DISTANCE: usize = 8192 / size_of::<u32>();
    const NOTHING: Self = Self { at: std::ptr::null(), every: usize::MAX };
}

/// A vector of `LANES` 32-bit integers, or of as many words of four bytes, or of f32.
///
/// # Safety
/// All functions need the machine to have the instructions; those with pointers need as many elements
/// there as they say. No alignment is needed.
#[allow(clippy::missing_safety_doc)]
trait Lanes: Copy {
    const LANES: usize;
    type V: Copy;

    unsafe fn load(p: *const i32) -> Self::V;
    unsafe fn splat(word: u32) -> Self::V;
    /// `acc` and the four products of unsigned bytes of `a` by signed ones of `b`.
    unsafe fn dot(acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Writes `bias + sums * row_scale * scales`, the first `n` of them.
    unsafe fn finish(
        sums: Self::V,
        row_scale: f32,
        scales: *const f32,
        bias: Option<*const f32>,
        out: *mut f32,
        n: usize,
    );
}

impl Strip {
    /// Computes the strip.
    ///
    /// # Safety
    /// All pointers must be good for the sizes above, `c` for writing by this thread alone.
    pub unsafe fn run(self, level: Level) {
        // SAFETY: passed on from the caller; a level exists only where the machine has it.
        unsafe {
            match level.0 {
                #[cfg(target_arch = "x86_64")]
                Set::Avx512Vnni => x86::strip_avx512(self),
                #[cfg(target_arch = "x86_64")]
                Set::AvxVnni => x86::strip_vnni(self),
                #[cfg(target_arch = "x86_64")]
                Set::Avx2 => x86::strip_avx2(self),
                _ => self.columns_of::<Portable, 2>(),
            }
        }
    }

    /// Parts of the panel, `NV` vectors of columns at a time.
    #[inline(always)]
    unsafe fn columns_of<L: Lanes, const NV: usize>(self) {
        for at in (0..self.width).step_by(NV * L::LANES) {
            if at >= self.columns {
                return;
            }
            // SAFETY: passed on; the part is inside the panel.
            unsafe {
                let part = Self {
                    b: self.b.add(at),
                    scales: self.scales.add(at),
                    offsets: self.offsets.add(at),
                    bias: self.bias.map(|bias| bias.add(at)),
                    c: self.c.add(at),
                    columns: (self.columns - at).min(NV * L::LANES),
                    next: self.next.map(|next| next.wrapping_add(at)),
                    ..self
                };
                part.row_groups::<L, NV>();
            }
        }
    }

    #[inline(always)]
    unsafe fn row_groups<L: Lanes, const NV: usize>(mut self) {
        let mut ahead = Ahead { at: self.b.wrapping_add(Ahead::DISTANCE), every: 1 };
        // All groups of rows but the first find the panel in the cache; they fetch the next one.
        let others = self.rows.div_ceil(GROUP).saturating_sub(1).max(1);
        let mut next = self.next.map_or(Ahead::NOTHING, |at| Ahead { at, every: others });
        while self.rows > 0 {
            // SAFETY: passed on; each group advances by the rows that it computed.
            unsafe {
                let done = match self.rows {
                    GROUP.. => self.group::<L, GROUP, NV>(ahead),
                    5 => self.group::<L, 5, NV>(ahead),
                    4 => self.group::<L, 4, NV>(ahead),
                    3 => self.group::<L, 3, NV>(ahead),
                    2 => self.group::<L, 2, NV>(ahead),
                    _ => self.group::<L, 1, NV>(ahead),
                };
                self.rows -= done;
                self.a = self.a.add(done * self.lda);
                self.row_scales = self.row_scales.add(done);
                self.c = self.c.add(done * self.ldc);
            }
            ahead = next;
            next.at = next.at.wrapping_add(self.k.div_ceil(others) * self.width);
        }
    }

    #[inline(always)]
    unsafe fn group<L: Lanes, const MR: usize, const NV: usize>(&self, mut ahead: Ahead) -> usize {
        // SAFETY: passed on; the last vector of a row touches only the columns that exist.
        unsafe {
            let first: [L::V; NV] =
                std::array::from_fn(|v| L::load(self.offsets.add(v * L::LANES)));
            let mut sums = [first; MR];
            let rows: [*const u32; MR] = std::array::from_fn(|r| self.a.add(r * self.lda));
            let mut b = self.b.cast::<i32>();
            let mut due = ahead.every;
            for k in 0..self.k {
                due -= 1;
                if due == 0 {
                    due = ahead.every;
                    for line in 0..(NV * L::LANES).div_ceil(LINE) {
                        prefetch::<false>(ahead.at.wrapping_add(line * LINE));
                    }
                    ahead.at = ahead.at.wrapping_add(self.width);
                }
                let columns: [L::V; NV] = std::array::from_fn(|v| L::load(b.add(v * L::LANES)));
                for (sums, row) in sums.iter_mut().zip(&rows) {
                    let a = L::splat(*row.add(k));
                    for (sum, &column) in sums.iter_mut().zip(&columns) {
                        *sum = L::dot(*sum, a, column);
                    }
                }
                b = b.add(self.width);
            }
            for (r, sums) in sums.iter().enumerate() {
                let row_scale = *self.row_scales.add(r);
                for (v, &sum) in sums.iter().enumerate() {
                    let at = v * L::LANES;
                    let n = self.columns.saturating_sub(at).min(L::LANES);
                    let bias = self.bias.map(|bias| bias.add(at));
                    let out = self.c.add(r * self.ldc + at);
                    L::finish(sum, row_scale, self.scales.add(at), bias, out, n);
                }
            }
        }
        MR
    }
}

/// Whatever the target has; the plain definition.
#[derive(Clone, Copy)]
struct Portable;

// SAFETY (all blocks): the trait's condition.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Portable {
    const LANES: usize = 8;
    type V = [i32; 8];

    #[inline(always)]
    unsafe fn load(p: *const i32) -> [i32; 8] {
        unsafe { p.cast::<[i32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(word: u32) -> [i32; 8] {
        [word as i32; 8]
    }
    #[inline(always)]
    unsafe fn dot(acc: [i32; 8], a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| {
            let products = a[i].to_le_bytes().into_iter().zip(b[i].to_le_bytes());
            acc[i] + products.map(|(a, b)| i32::from(a) * i32::from(b as i8)).sum::<i32>()
        })
    }
    #[inline(always)]
    unsafe fn finish(
        sums: [i32; 8],
        row_scale: f32,
        scales: *const f32,
        bias: Option<*const f32>,
        out: *mut f32,
        n: usize,
    ) {
        for (i, sum) in sums.into_iter().enumerate().take(n) {
            unsafe {
                let start = bias.map_or(0.0, |bias| *bias.add(i));
                *out.add(i) = start + sum as f32 * (row_scale * *scales.add(i));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[path = "x86.rs"]
mod x86;
