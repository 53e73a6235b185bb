//! The threads that compute: as many as the machine leaves to this process, the calling one among them.
//!
//! Work comes as numbered tasks that threads claim one by one, so that a free thread takes over what a
//! late one has not begun. In between the others spin for some ten microseconds, for the next product of
//! a step is never far, and then sleep: a machine that is shared gets its cores back. Invariants: when a
//! call returns no thread looks at its tasks any more; a call from inside a task, or while another thread's
//! call is at work, runs on its own thread alone.
#![allow(unsafe_code)]

use super::memory::Shared;
use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};

/// How often a thread looks for work before it sleeps; a look takes some ten nanoseconds.
const LOOKS: usize = 4000;

/// How many threads were asked for, if somebody did.
static ASKED: OnceLock<usize> = OnceLock::new();

/// Asks for a number of compute threads; before anything computes, and once.
///
/// # Errors
/// The number that is at work already.
pub fn set_threads(count: usize) -> Result<(), usize> {
    ASKED.set(count.max(1))
}

/// Number of compute threads: what was asked for, or what the cgroup quota and the CPU affinity leave to
/// this process.
pub fn threads() -> usize {
    *ASKED.get_or_init(|| thread::available_parallelism().map_or(1, |n| n.get()))
}

/// Runs `task(0)` to `task(tasks - 1)`, each once, on all compute threads, in no order.
pub fn each(tasks: usize, task: impl Fn(usize) + Sync) {
    static POOL: OnceLock<Pool> = OnceLock::new();
    if tasks > 1 && threads() > 1 && POOL.get_or_init(Pool::new).run(tasks, &task) {
        return;
    }
    (0..tasks).for_each(task);
}

/// Runs tasks over the parts of `data`, each of `size` elements but for the last.
pub fn each_part<T: Send>(data: &mut [T], size: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    let (len, data) = (data.len(), Shared::new(data.as_mut_ptr()));
    each(len.div_ceil(size), |i| {
        let (start, end) = (i * size, ((i + 1) * size).min(len));
        // SAFETY: parts lie inside the slice and do not overlap, and each has one task.
        let part = unsafe { std::slice::from_raw_parts_mut(data.get().add(start), end - start) };
        task(i, part);
    });
}

/// What the tasks give, in their order.
pub fn collect<T: Send>(tasks: usize, task: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut results: Vec<Option<T>> = (0..tasks).map(|_| None).collect();
    each_part(&mut results, 1, |i, result| result[0] = Some(task(i)));
    results.into_iter().flatten().collect()
}

/// A cache line (two, as they are fetched) of its own.
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// A call at work.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    tasks: usize,
}

struct Pool {
    /// Odd while a job can be joined; one more with each opening and each closing.
    state: Apart<AtomicUsize>,
    /// The first task that nobody has claimed.
    next: Apart<AtomicUsize>,
    /// Helpers that may be looking at the job.
    inside: Apart<AtomicUsize>,
    /// Written by who holds `calling`, while no job is open and nobody inside.
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    calling: Mutex<()>,
    helpers: OnceLock<Vec<Helper>>,
}

/// A thread beside the calling one.
struct Helper {
    thread: Thread,
    asleep: &'static AtomicBool,
}

// SAFETY: the job, which alone is not Sync, is written as its field says, and read by those who came
// inside while it was open; its tasks may run on any thread.
unsafe impl Sync for Pool {}
// SAFETY: as above.
unsafe impl Send for Pool {}

impl Pool {
    fn new() -> Self {
        Self {
            state: Apart::default(),
            next: Apart::default(),
            inside: Apart::default(),
            job: UnsafeCell::new(None),
            panic: Mutex::default(),
            calling: Mutex::default(),
            helpers: OnceLock::new(),
        }
    }

    /// Runs all tasks, unless another call is at work or there is no thread to be had: then none.
    fn run(&'static self, tasks: usize, task: &Task<'_>) -> bool {
        let Ok(calling) = self.calling.try_lock() else { return false };
        let helpers = self.helpers.get_or_init(|| self.spawn());
        // SAFETY: only the lifetime changes; nobody looks at the task after `close`.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        self.open(Job { task, tasks }, &helpers[..helpers.len().min(tasks - 1)]);
        self.take_tasks();
        self.close();
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(calling);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        true
    }

    fn open(&self, job: Job, helpers: &[Helper]) {
        // SAFETY: the caller holds `calling`, and the last job was closed.
        unsafe { *self.job.get() = Some(job) };
        self.next.0.store(0, SeqCst);
        self.state.0.fetch_add(1, SeqCst);
        for helper in helpers {
            if helper.asleep.swap(false, SeqCst) {
                helper.thread.unpark();
            }
        }
    }

    /// Lets nobody else in and waits for those who are. A helper comes inside before it looks whether the
    /// job is open, so whoever is not counted by now will find it closed.
    fn close(&self) {
        self.state.0.fetch_add(1, SeqCst);
        let mut looks = 0;
        while self.inside.0.load(SeqCst) > 0 {
            looks += 1;
            // A helper without a core gets this one.
            if looks < LOOKS { spin_loop() } else { thread::yield_now() }
        }
    }

    /// Claims and runs tasks until there are no more. For who opened the job, or is inside.
    fn take_tasks(&self) {
        // SAFETY: the job was written before it was opened, and is not written again before it is closed
        // and nobody inside.
        let Some(job) = (unsafe { *self.job.get() }) else { return };
        let run = AssertUnwindSafe(|| {
            loop {
                let i = self.next.0.fetch_add(1, SeqCst);
                if i >= job.tasks {
                    return;
                }
                // SAFETY: the call that lent the task has not returned.
                unsafe { (*job.task)(i) };
            }
        });
        if let Err(panic) = catch_unwind(run) {
            // Nobody waits for the rest.
            self.next.0.store(job.tasks, SeqCst);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }

    fn spawn(&'static self) -> Vec<Helper> {
        let spawn = |i| {
            let asleep: &'static AtomicBool = Box::leak(Box::default());
            let name = thread::Builder::new().name(format!("compute-{i}"));
            let spawned = name.spawn(move || self.help(asleep)).ok()?;
            Some(Helper { thread: spawned.thread().clone(), asleep })
        };
        // Where the system gives fewer, these do it all.
        (1..threads()).map_while(spawn).collect()
    }

    fn help(&self, asleep: &AtomicBool) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen, asleep);
            self.inside.0.fetch_add(1, SeqCst);
            if self.state.0.load(SeqCst) == seen {
                self.take_tasks();
            }
            self.inside.0.fetch_sub(1, SeqCst);
        }
    }

    /// Waits for another job than the one `seen`, and gives its state.
    fn wait(&self, seen: usize, asleep: &AtomicBool) -> usize {
        let open = || Some(self.state.0.load(SeqCst)).filter(|&s| s % 2 == 1 && s != seen);
        loop {
            for _ in 0..LOOKS {
                if let Some(state) = open() {
                    return state;
                }
                spin_loop();
            }
            // Who opens a job after this looks for sleepers.
            asleep.store(true, SeqCst);
            if let Some(state) = open() {
                asleep.store(false, SeqCst);
                return state;
            }
            while asleep.load(SeqCst) {
                thread::park();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whoever_calls() {
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for tasks in (0..300).chain([10_000]) {
                        let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                        each(tasks, |i| {
                            counts[i].fetch_add(1, SeqCst);
                        });
                        assert!(counts.iter().all(|c| c.load(SeqCst) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn tasks_may_call_in_their_turn() {
        let sums = collect(20, |i| collect(i, |j| j).into_iter().sum::<usize>());
        assert_eq!(sums, (0..20usize).map(|i| i * i.saturating_sub(1) / 2).collect::<Vec<_>>());
    }

    #[test]
    fn parts_are_whole_and_in_their_place() {
        let mut data = vec![0; 1000];
        each_part(&mut data, 64, |i, part| part.iter_mut().for_each(|x| *x += i));
        assert!(data.iter().enumerate().all(|(at, &x)| x == at / 64));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_no_other() {
        let fails = || each(100, |i| assert_ne!(i, 50, "task fifty"));
        let panic = catch_unwind(fails).expect_err("a task panicked");
        assert!(panic.downcast_ref::<String>().is_some_and(|text| text.contains("task fifty")));
        assert_eq!(collect(100, |i| i).len(), 100);
    }
}
