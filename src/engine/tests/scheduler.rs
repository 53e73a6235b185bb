//! The scheduler alone: properties over random histories, then the policies one by one.

use crate::engine::blocks::BlockPool;
use crate::engine::plan::Plan;
use crate::engine::prefix::Variant;
use crate::engine::scheduler::{Limits, Scheduler, Slot, TaskLimits};
use crate::engine::seq::{Content, Seq};
use crate::ids::{SeqId, TaskId};
use crate::telemetry::now;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// A sequence's length at its end, and its tokens: equal beginnings are shared.
#[derive(Clone, Debug)]
struct Text {
    last: usize,
    tokens: Vec<u32>,
}

impl Content for Text {
    fn variant(&self) -> Variant {
        Variant::default()
    }

    fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn skippable(&self) -> usize {
        self.tokens.len()
    }
}

/// A scheduler and all that it was told, so that each plan can be checked.
struct Rig {
    scheduler: Scheduler<Text>,
    limits: Limits,
    /// Positions in the whole pool.
    room: usize,
    /// Whether texts have equal beginnings.
    alike: bool,
    epoch: Instant,
    next_id: u64,
    /// Slot and length at the end, by id.
    live: BTreeMap<SeqId, (Slot, usize)>,
    ended: Vec<SeqId>,
    plan: Plan,
}

impl Rig {
    fn new(limits: Limits, blocks: usize, block_size: usize) -> Self {
        Self {
            scheduler: Scheduler::new(limits.clone(), BlockPool::new(blocks, block_size, true)),
            limits,
            room: blocks * block_size,
            alike: false,
            epoch: now(),
            next_id: 0,
            live: BTreeMap::new(),
            ended: Vec::new(),
            plan: Plan::default(),
        }
    }

    fn add(&mut self, task: usize, len: usize, growth: usize, due: u64) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        let len = len.clamp(1, self.room);
        let last = (len + growth).min(self.room);
        let due = self.epoch + Duration::from_secs(due);
        // Up to some place there are two texts, from there on each has its own.
        let alike = if self.alike { len * 2 / 3 } else { 0 };
        let own = |i| if i < alike { len % 2 } else { 2 + id.0 as usize } as u32;
        let text = Text { last, tokens: (0..last).map(own).collect() };
        let slot = self.scheduler.add(Seq::new(id, TaskId(task as u16), due, len, text));
        self.live.insert(id, (slot, last));
        id
    }

    fn remove(&mut self, id: SeqId) {
        let (slot, _) = self.live.remove(&id).unwrap();
        assert_eq!(self.scheduler.remove(slot).id, id);
        self.ended.push(id);
    }

    /// Plans, checks the plan, and runs it.
    fn step(&mut self) {
        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.plan(&mut plan);
        self.check(&plan);
        for chunk in &plan.chunks {
            self.scheduler.advance(chunk.slot, chunk.rows);
            let seq = self.scheduler.seq(chunk.slot);
            if seq.pending() > 0 {
                continue;
            }
            if seq.len < seq.body.last {
                self.scheduler.grow(chunk.slot)
            } else {
                self.remove(chunk.id)
            }
        }
        self.scheduler.check_invariants();
        self.plan = plan;
    }

    /// Plans a step that then fails.
    fn fail(&mut self) {
        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.plan(&mut plan);
        self.check(&plan);
        self.scheduler.failed();
        plan.chunks.iter().for_each(|chunk| self.remove(chunk.id));
        self.plan = plan;
    }

    fn check(&self, plan: &Plan) {
        assert!(plan.rows() <= self.limits.max_rows, "over the budget");
        assert!(plan.chunks.is_sorted_by_key(|chunk| chunk.task), "tasks are mixed");
        let planned: BTreeSet<SeqId> = plan.chunks.iter().map(|chunk| chunk.id).collect();
        assert_eq!(planned.len(), plan.chunks.len(), "a sequence has two chunks");
        for chunk in &plan.chunks {
            let seq = self.scheduler.seq(chunk.slot);
            assert_eq!((seq.id, seq.computed), (chunk.id, chunk.start));
            assert!((1..=self.limits.prefill_chunk).contains(&chunk.rows));
            assert!(chunk.start + chunk.rows <= seq.len);
            let blocks = self.scheduler.pool().blocks_for(chunk.start + chunk.rows);
            assert!(seq.running && seq.blocks.len() >= blocks, "no place for the rows");
        }
        for (_, seq) in self.scheduler.iter() {
            let decodes = seq.running && seq.pending() == 1;
            assert!(!decodes || planned.contains(&seq.id), "a decode waits for a prefill");
        }
        let idle = self.live.is_empty();
        assert_eq!(plan.chunks.is_empty(), idle, "there is work and none of it runs");
    }

    fn run_out(&mut self) {
        let mut steps = 0;
        while !self.live.is_empty() {
            self.step();
            steps += 1;
            assert!(steps < 20_000, "starved: {:?}", self.live);
        }
        let pool = self.scheduler.pool();
        assert_eq!((pool.used(), pool.free()), (0, pool.total()));
    }
}

#[derive(Clone, Debug)]
enum Op {
    Add { task: usize, len: usize, growth: usize, due: u64 },
    Remove(usize),
    Step,
    Fail,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..3usize, 1..40usize, 0..20usize, 0..50u64)
            .prop_map(|(task, len, growth, due)| Op::Add { task, len, growth, due }),
        1 => any::<usize>().prop_map(Op::Remove),
        4 => Just(Op::Step),
        1 => Just(Op::Fail),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    let task =
        (0.1..10.0f64, 1..6usize).prop_map(|(weight, max_batch)| TaskLimits { weight, max_batch });
    let tasks = proptest::collection::vec(task, 3);
    (1..40usize, 1..12usize, 1..16usize, tasks).prop_map(
        |(max_rows, max_running, prefill_chunk, tasks)| Limits {
            max_rows,
            max_running,
            prefill_chunk,
            tasks,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_every_sequence_ends_once_and_every_block_returns(
        limits in limits(),
        (blocks, block_size) in (1..20usize, 1..6usize),
        ops in proptest::collection::vec(op(), 1..120),
        alike: bool,
    ) {
        let mut rig = Rig::new(limits, blocks, block_size);
        rig.alike = alike;
        for op in ops {
            match op {
                Op::Add { task, len, growth, due } => { rig.add(task, len, growth, due); }
                Op::Remove(nth) if !rig.live.is_empty() => {
                    let id = *rig.live.keys().nth(nth % rig.live.len()).unwrap();
                    rig.remove(id);
                }
                Op::Remove(_) => {}
                Op::Step => rig.step(),
                Op::Fail => rig.fail(),
            }
            rig.scheduler.check_invariants();
        }
        rig.run_out();
        let distinct: BTreeSet<SeqId> = rig.ended.iter().copied().collect();
        prop_assert_eq!((distinct.len(), rig.ended.len()), (rig.next_id as usize, rig.next_id as usize));
    }
}

fn equal_tasks(count: usize, max_rows: usize, max_running: usize) -> Limits {
    let tasks = vec![TaskLimits { weight: 1.0, max_batch: usize::MAX }; count];
    Limits { max_rows, max_running, prefill_chunk: max_rows, tasks }
}

/// Keeps both tasks supplied for some steps and counts the rows of each.
fn contend(rig: &mut Rig, steps: usize) -> [usize; 2] {
    let mut rows = [0; 2];
    for _ in 0..steps {
        for task in 0..2 {
            while rig.scheduler.task_counts().nth(task).unwrap().1 < 8 {
                rig.add(task, 10, 3, 0);
            }
        }
        rig.step();
        for chunk in &rig.plan.chunks {
            rows[usize::from(chunk.task.0)] += chunk.rows;
        }
    }
    rows
}

#[test]
fn shares_follow_the_weights() {
    let mut limits = equal_tasks(2, 40, 16);
    limits.tasks[0].weight = 3.0;
    let mut rig = Rig::new(limits, 1000, 4);
    let [heavy, light] = contend(&mut rig, 1000);
    let ratio = heavy as f64 / light as f64;
    assert!((2.8..3.2).contains(&ratio), "weights 3 to 1 gave {ratio}");
}

#[test]
fn idling_earns_no_credit() {
    let mut rig = Rig::new(equal_tasks(2, 40, 16), 1000, 4);
    for _ in 0..500 {
        (0..4).for_each(|_| {
            rig.add(0, 10, 3, 0);
        });
        rig.step();
    }
    let [busy, newcomer] = contend(&mut rig, 50);
    let share = newcomer as f64 / (busy + newcomer) as f64;
    assert!((0.4..0.7).contains(&share), "the newcomer took {share}");
}

#[test]
fn idling_earns_no_credit_while_the_others_only_decode() {
    let mut rig = Rig::new(equal_tasks(2, 40, 16), 4000, 4);
    (0..8).for_each(|_| {
        rig.add(0, 1, 600, 0);
    });
    (0..500).for_each(|_| rig.step());
    let [busy, newcomer] = contend(&mut rig, 50);
    let share = newcomer as f64 / (busy + newcomer) as f64;
    assert!((0.4..0.7).contains(&share), "the newcomer took {share}");
}

#[test]
fn the_earliest_due_runs_first_then_the_oldest() {
    let mut rig = Rig::new(equal_tasks(1, 10, 1), 10, 10);
    let late = rig.add(0, 10, 0, 9);
    let soon = rig.add(0, 10, 0, 1);
    let also_soon = rig.add(0, 10, 0, 1);
    rig.run_out();
    assert_eq!(rig.ended, [soon, also_soon, late]);
}

#[test]
fn what_is_not_urgent_is_overtaken_only_until_it_is_due() {
    let mut rig = Rig::new(equal_tasks(1, 10, 1), 10, 10);
    let patient = rig.add(0, 10, 0, 30);
    for second in 0..40 {
        rig.add(0, 10, 0, second + 1);
        rig.step();
    }
    let place = rig.ended.iter().position(|&id| id == patient);
    assert_eq!(place, Some(29), "after those that were due before it");
}

#[test]
fn a_long_prompt_is_not_starved_by_short_ones_of_another_task() {
    let mut rig = Rig::new(equal_tasks(2, 64, 64), 16, 4);
    // Their lengths differ, so that there is never a moment when all of them have just ended.
    let crowd = |rig: &mut Rig, step: usize| {
        (0..4).for_each(|n| {
            rig.add(1, 3 + n, 4 + step * 5 % 9, 0);
        });
        rig.step();
    };
    (0..9).for_each(|step| crowd(&mut rig, step));
    let long = rig.add(0, 60, 1, 0);
    (9..60).for_each(|step| crowd(&mut rig, step));
    assert!(rig.ended.contains(&long), "it needs 15 of 16 blocks and never got them");
}

#[test]
fn the_youngest_is_preempted_and_comes_back_first() {
    let mut rig = Rig::new(equal_tasks(1, 64, 8), 4, 4);
    let old = rig.add(0, 4, 9, 0);
    let young = rig.add(0, 4, 9, 5);
    while rig.plan.preempted == 0 {
        rig.step();
    }
    let lost = rig.scheduler.seq(rig.live[&young].0);
    assert!(!lost.running && lost.resumed && lost.computed == 0 && lost.len > 4);
    assert!(rig.scheduler.seq(rig.live[&old].0).running);
    let urgent = rig.add(0, 4, 9, 0);
    let runs = |rig: &Rig, id| rig.scheduler.seq(rig.live[&id].0).running;
    while !runs(&rig, young) {
        assert!(!runs(&rig, urgent), "who was preempted comes before all who never ran");
        rig.step();
    }
    assert_eq!(rig.ended, [old]);
    rig.run_out();
}

#[test]
fn a_task_holds_no_more_seats_than_its_own() {
    let mut limits = equal_tasks(2, 64, 8);
    limits.tasks[0].max_batch = 2;
    let mut rig = Rig::new(limits, 100, 4);
    for task in [0, 0, 0, 0, 1, 1, 1, 1] {
        rig.add(task, 4, 8, 0);
    }
    rig.step();
    let running: Vec<usize> = rig.scheduler.task_counts().map(|counts| counts.0).collect();
    assert_eq!(running, [2, 4], "what one task may not use, the other gets");
}

#[test]
fn decodes_go_on_beside_a_long_prefill() {
    let mut limits = equal_tasks(2, 16, 8);
    limits.prefill_chunk = 8;
    let mut rig = Rig::new(limits, 100, 4);
    let decoding = rig.add(0, 1, 50, 0);
    rig.step();
    rig.add(1, 40, 0, 0);
    for _ in 0..5 {
        rig.step();
        let rows: Vec<_> = rig.plan.chunks.iter().map(|chunk| (chunk.id, chunk.rows)).collect();
        assert_eq!(rows, [(decoding, 1), (SeqId(1), 8)]);
    }
}

/// Rows of each chunk of the next step.
fn rows(rig: &mut Rig) -> Vec<usize> {
    rig.step();
    rig.plan.chunks.iter().map(|chunk| chunk.rows).collect()
}

#[test]
fn an_equal_beginning_is_computed_once_in_one_step() {
    let mut rig = Rig::new(equal_tasks(1, 64, 8), 100, 4);
    rig.alike = true;
    for _ in 0..3 {
        rig.add(0, 30, 2, 0);
    }
    assert_eq!(rows(&mut rig), [30, 10, 10], "20 of 30 tokens are the same");
    assert_eq!((rig.plan.prefix_queried, rig.plan.prefix_hit), (87, 40));
    assert_eq!(rows(&mut rig), [1, 1, 1]);
    rig.run_out();
}

#[test]
fn what_a_failed_step_was_to_compute_is_not_shared() {
    let mut rig = Rig::new(equal_tasks(1, 64, 8), 100, 4);
    rig.alike = true;
    rig.add(0, 30, 2, 0);
    rig.add(0, 30, 2, 0);
    rig.fail();
    rig.scheduler.check_invariants();
    rig.add(0, 30, 2, 0);
    assert_eq!(rows(&mut rig), [30]);
    rig.add(0, 30, 2, 0);
    assert_eq!(rows(&mut rig), [1, 10], "what has run is");
    rig.run_out();
}

#[test]
fn long_beginnings_are_computed_in_turn_and_caught_up_with() {
    let mut limits = equal_tasks(1, 16, 8);
    limits.prefill_chunk = 8;
    let mut rig = Rig::new(limits, 100, 4);
    rig.alike = true;
    let first = rig.add(0, 60, 1, 0);
    let second = rig.add(0, 60, 1, 0);
    let mut all = 0;
    while rig.live.contains_key(&first) || rig.live.contains_key(&second) {
        all += rows(&mut rig).iter().sum::<usize>();
    }
    assert_eq!(all, 60 + 20 + 2, "40 of 60 tokens are the same");
}
