//! The door: bounded queues, and the refusal of what would come too late.
//!
//! A [`Permit`] is a place in a task's queue. It travels inside the job and is given up when the core
//! first runs the sequence or drops it; a client that leaves does not free it by leaving. One mutex holds
//! the counts; it is held for a few comparisons, never across a send or a step.

use super::meter::Meter;
use crate::error::{Error, Kind, Result};
use crate::ids::TaskId;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Retry-After is at most this: the estimate is not worth more.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Counts who waits, in the shell's view: a job waits from `submit` on.
#[derive(Debug)]
pub struct Gate {
    /// Over all tasks.
    pub max_waiting: usize,
    queues: Mutex<Queues>,
}

#[derive(Debug)]
struct Queues {
    waiting: usize,
    tasks: Vec<Queue>,
    /// Sequences of all tasks that begin to run, per second.
    drain: Option<f64>,
}

#[derive(Debug)]
struct Queue {
    max_waiting: usize,
    /// When those that wait are due, in the order in which they will run.
    dues: Vec<Instant>,
    /// Sequences that begin to run per second while some wait; `None` until enough is measured.
    drain: Option<f64>,
}

impl Queue {
    fn new(max_waiting: usize) -> Self {
        Self { max_waiting, dues: Vec::new(), drain: None }
    }
}

/// When a job wants to run.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// When it arrived.
    pub arrived: Instant,
    /// Its place in the queue: the earlier, the sooner.
    pub due: Instant,
    /// After this its client no longer waits.
    pub latest: Option<Instant>,
}

/// A place in a task's queue, until dropped.
#[derive(Debug)]
pub struct Permit {
    gate: Arc<Gate>,
    task: TaskId,
    due: Instant,
}

impl Gate {
    /// A gate for tasks with these queue lengths, and a length over all.
    pub fn new(max_waiting: usize, per_task: impl Iterator<Item = usize>) -> Arc<Self> {
        let tasks = per_task.map(Queue::new).collect();
        let queues = Mutex::new(Queues { waiting: 0, tasks, drain: None });
        Arc::new(Self { max_waiting, queues })
    }

    /// One more task, with a queue of this length.
    pub fn add_task(&self, max_waiting: usize) {
        self.lock().tasks.push(Queue::new(max_waiting));
    }

    /// Takes a place in the queue of `task`.
    ///
    /// # Errors
    /// [`Kind::Overloaded`] if the queue is full or, as far as the measured rate can tell, the job
    /// would not begin before its client stops waiting.
    pub fn enter(self: &Arc<Self>, task: TaskId, wish: Wish) -> Result<Permit> {
        let mut queues = self.lock();
        let Queues { waiting, tasks, drain } = &mut *queues;
        let Some(queue) = tasks.get_mut(usize::from(task.0)) else {
            return Err(Error::not_found("the engine has no such task"));
        };
        if *waiting >= self.max_waiting {
            return Err(overloaded("the queue is full", *waiting, *drain));
        }
        if queue.dues.len() >= queue.max_waiting {
            let message = "the task's queue is full";
            return Err(overloaded(message, queue.dues.len(), queue.drain));
        }
        let ahead = queue.dues.partition_point(|&due| due <= wish.due);
        if let (Some(drain), Some(latest)) = (queue.drain, wish.latest) {
            let patience = latest.saturating_duration_since(wish.arrived).as_secs_f64();
            if ahead as f64 / drain > patience {
                let message = "the request would wait in the queue beyond its deadline";
                return Err(overloaded(message, ahead, queue.drain));
            }
        }
        queue.dues.insert(ahead, wish.due);
        *waiting += 1;
        Ok(Permit { gate: self.clone(), task, due: wish.due })
    }

    /// Learns how fast the queues drain.
    pub fn learn(&self, meter: &Meter) {
        let mut queues = self.lock();
        queues.drain = meter.drain();
        for (queue, drain) in queues.tasks.iter_mut().zip(meter.task_drains()) {
            queue.drain = drain;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        // Each change is one insertion or removal: there is no half-changed state to be poisoned.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut queues = self.gate.lock();
        queues.waiting -= 1;
        let dues = &mut queues.tasks[usize::from(self.task.0)].dues;
        if let Ok(place) = dues.binary_search(&self.due) {
            dues.remove(place);
        }
    }
}

fn overloaded(message: &str, waiting: usize, drain: Option<f64>) -> Error {
    let least = Duration::from_secs(1);
    let after = drain.map_or(least, |drain| {
        let seconds = (waiting as f64 / drain).ceil().min(LONGEST_RETRY.as_secs_f64());
        Duration::from_secs_f64(seconds).max(least)
    });
    Error::new(Kind::Overloaded, format!("{message}; try again in {} s", after.as_secs()))
        .with_retry_after(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::now;

    const A: TaskId = TaskId(0);
    const B: TaskId = TaskId(1);

    fn patient(arrived: Instant) -> Wish {
        Wish { arrived, due: arrived + Duration::from_secs(30), latest: None }
    }

    /// A meter that saw both tasks queue for ten seconds and start `per_second` sequences each.
    fn meter(per_second: usize) -> Meter {
        let mut meter = Meter::new(2);
        for _ in 0..10 {
            for task in [A, B] {
                (0..per_second).for_each(|_| meter.started(task));
            }
            meter.step([(1, 1), (1, 1)].into_iter(), 1, Duration::from_secs(1));
        }
        meter
    }

    #[test]
    fn queues_are_bounded_by_task_and_in_all() {
        let gate = Gate::new(3, [2, 2].into_iter());
        let wish = patient(now());
        let first = gate.enter(A, wish).unwrap();
        let _second = gate.enter(A, wish).unwrap();
        let full = gate.enter(A, wish).unwrap_err();
        assert_eq!((full.kind, full.retry_after), (Kind::Overloaded, Some(Duration::from_secs(1))));
        let _third = gate.enter(B, wish).unwrap();
        assert_eq!(gate.enter(B, wish).unwrap_err().kind, Kind::Overloaded, "three wait in all");
        drop(first);
        gate.enter(B, wish).unwrap();
        assert_eq!(gate.enter(TaskId(2), wish).unwrap_err().kind, Kind::NotFound);
    }

    #[test]
    fn retry_after_follows_the_drain_rate() {
        let gate = Gate::new(100, [20, 100].into_iter());
        gate.learn(&meter(2));
        let wish = patient(now());
        let _held: Vec<Permit> = (0..20).map(|_| gate.enter(A, wish).unwrap()).collect();
        let full = gate.enter(A, wish).unwrap_err();
        assert_eq!(full.retry_after, Some(Duration::from_secs(10)), "20 that wait, 2 a second");
    }

    #[test]
    fn what_would_come_too_late_is_refused() {
        let gate = Gate::new(100, [100, 100].into_iter());
        let arrived = now();
        let latest = arrived + Duration::from_secs(4);
        let hurried = Wish { arrived, due: latest, latest: Some(latest) };
        let early = Wish { due: arrived, ..hurried };
        let _held: Vec<Permit> = (0..10).map(|_| gate.enter(A, early).unwrap()).collect();
        gate.enter(A, hurried).expect("nothing was measured yet");
        gate.learn(&meter(2));
        let refused = gate.enter(A, hurried).unwrap_err();
        assert_eq!(refused.kind, Kind::Overloaded, "10 ahead at 2 a second take 5 s");
        gate.enter(A, Wish { due: arrived - Duration::from_secs(1), ..hurried })
            .expect("it would run first");
        gate.enter(B, hurried).expect("nobody waits there");
    }
}
