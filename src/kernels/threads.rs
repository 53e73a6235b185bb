//! How many threads compute, decided once.

use std::sync::OnceLock;

/// Number of compute threads: what the cgroup quota and the CPU affinity leave to this process.
///
/// The first call sizes rayon's global pool by it, unless somebody has built that pool already.
pub fn threads() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| {
        let count = std::thread::available_parallelism().map_or(1, |n| n.get());
        // An error means that the pool exists already, which is as good.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(count).build_global();
        rayon::current_num_threads()
    })
}

/// Runs `f` on one of the compute threads. Operations called from there start their parallel parts
/// without waking another thread first, which a step of many small operations notices.
pub fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    threads();
    rayon::scope(|_| f())
}
