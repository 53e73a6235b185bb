//! Policy: who runs next, in whole numbers. It knows lengths, blocks and order, but no tokens, clients or
//! clocks; what the core keeps with a sequence passes through as `T`.
//!
//! - Decodes come first: every running sequence that needs one row gets it. Prefill chunks fill what is
//!   left of the budget.
//! - Between tasks: start-time fair queueing. Each row that a task runs adds `1 / weight` to its virtual
//!   time, and the task with the least goes first.
//! - Inside a task: what was preempted, then the earliest due, then the oldest.
//! - What another sequence computed of the same beginning is taken over, block by block, even if it does
//!   so in the very step that is being planned: in each layer a step writes all its keys and values
//!   before any of its rows looks at them.
//! - A sequence takes blocks for its whole known length when it starts, then one at a time. When none is
//!   left, the youngest running sequence loses its own and waits again; the oldest is never preempted,
//!   so it always progresses. When the next in line does not fit, nobody overtakes it.
//!
//! Invariants ([`Scheduler::check_invariants`]): a block has one owner, or several for whom it is full and
//! the same; free + used = total; a sequence is either waiting, without blocks, or running, with blocks for what is computed; `computed < len` between
//! steps; the seats of the batch and of each task suffice.

use super::blocks::BlockPool;
use super::plan::{Chunk, Plan};
use super::prefix::Node;
use super::seq::{Content, Seq};
use crate::ids::{SeqId, TaskId};
use crate::task::Slo;
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// Virtual time of one row at weight 1. Weights are honoured to one part in this.
const ROW_COST: f64 = (1 << 20) as f64;

/// A sequence's place in the scheduler, for as long as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

/// What a step and the batch may hold.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Rows of one step.
    pub max_rows: usize,
    /// Running sequences; at most `max_rows`, so that all can decode in one step.
    pub max_running: usize,
    /// Rows of one sequence in a step.
    pub prefill_chunk: usize,
    /// The tasks, in the order of their ids.
    pub tasks: Vec<TaskLimits>,
}

/// What a task may use.
#[derive(Clone, Copy, Debug)]
pub struct TaskLimits {
    /// Its share of the machine relative to others; above 0.
    pub weight: f64,
    /// Its running sequences.
    pub max_batch: usize,
}

impl From<&Slo> for TaskLimits {
    fn from(slo: &Slo) -> Self {
        Self { weight: slo.weight, max_batch: slo.max_batch }
    }
}

/// Waiting order: first what was preempted (`false` sorts before `true`), then by due time, then by age.
type Rank = (bool, Instant, SeqId);

fn rank<T>(seq: &Seq<T>) -> Rank {
    (!seq.resumed, seq.due, seq.id)
}

#[derive(Debug)]
struct TaskQueue {
    waiting: BTreeMap<Rank, Slot>,
    running: usize,
    max_batch: usize,
    /// Virtual time of one row.
    row_cost: u128,
    virtual_time: u128,
    /// While planning: running sequences with a part of their prefill to do.
    unfinished: VecDeque<Slot>,
}

impl TaskQueue {
    fn new(limits: &TaskLimits) -> Self {
        Self {
            waiting: BTreeMap::new(),
            running: 0,
            max_batch: limits.max_batch.max(1),
            row_cost: ((ROW_COST / limits.weight.clamp(1e-6, 1e6)) as u128).max(1),
            virtual_time: 0,
            unfinished: VecDeque::new(),
        }
    }

    fn can_start(&self) -> bool {
        self.running < self.max_batch && !self.waiting.is_empty()
    }
}

/// All sequences, and the policy over them.
#[derive(Debug)]
pub struct Scheduler<T> {
    limits: Limits,
    pool: BlockPool,
    seqs: Vec<Option<Seq<T>>>,
    vacant: Vec<usize>,
    /// Oldest first.
    running: Vec<(SeqId, Slot)>,
    tasks: Vec<TaskQueue>,
    /// Virtual time that has been served to all who wanted it; a task that begins to queue starts from
    /// it, so that idling earns no credit.
    virtual_now: u128,
}

impl<T: Content> Scheduler<T> {
    /// A scheduler over `pool`. Limits below 1 count as 1.
    pub fn new(mut limits: Limits, pool: BlockPool) -> Self {
        limits.max_rows = limits.max_rows.max(1);
        limits.max_running = limits.max_running.clamp(1, limits.max_rows);
        limits.prefill_chunk = limits.prefill_chunk.max(1);
        let tasks = limits.tasks.iter().map(TaskQueue::new).collect();
        let (seqs, vacant, running) = (Vec::new(), Vec::new(), Vec::new());
        Self { limits, pool, seqs, vacant, running, tasks, virtual_now: 0 }
    }

    /// One more task; its id is the next one.
    pub fn add_task(&mut self, limits: &TaskLimits) {
        self.tasks.push(TaskQueue::new(limits));
    }

    /// Queues a sequence. Alone it must fit the pool, up to the length that it may grow to.
    pub fn add(&mut self, seq: Seq<T>) -> Slot {
        let slot = Slot(self.vacant.pop().unwrap_or(self.seqs.len()));
        self.enqueue(rank(&seq), seq.task, slot);
        if slot.0 == self.seqs.len() {
            self.seqs.push(Some(seq));
        } else {
            self.seqs[slot.0] = Some(seq);
        }
        slot
    }

    /// Takes a sequence out, waiting or running; its blocks are free again.
    pub fn remove(&mut self, slot: Slot) -> Seq<T> {
        let mut seq = self.seqs[slot.0].take().expect(LIVES);
        self.vacant.push(slot.0);
        let task = &mut self.tasks[usize::from(seq.task.0)];
        if seq.running {
            let found = self.running.binary_search_by_key(&seq.id, |&(id, _)| id);
            self.running.remove(found.expect("a running sequence has a seat"));
            task.running -= 1;
            self.pool.release(&mut seq.blocks);
        } else {
            task.waiting.remove(&rank(&seq));
        }
        seq
    }

    /// Decides the next step. Every sequence named in it runs its rows; then the caller says so with
    /// [`Scheduler::advance`], or removes it. If the step did not run, the caller says that with
    /// [`Scheduler::failed`] and removes all of them.
    pub fn plan(&mut self, plan: &mut Plan) {
        plan.clear();
        self.pool.keep_promised();
        self.plan_decodes(plan);
        self.plan_prefills(plan);
        plan.chunks.sort_unstable_by_key(|chunk| (chunk.mix, chunk.task, chunk.id));
    }

    /// Counts `rows` rows of a sequence as computed. When none is left to run, the caller either lets
    /// the sequence [`Scheduler::grow`] or removes it before the next plan.
    pub fn advance(&mut self, slot: Slot, rows: usize) {
        self.seq_mut(slot).computed += rows;
    }

    /// The planned step did not run, so that nothing may be found that it was to compute. Whoever shares
    /// that was planned too, and is to be removed.
    pub fn failed(&mut self) {
        self.pool.forget_promised();
    }

    /// Adds one token to a sequence.
    pub fn grow(&mut self, slot: Slot) {
        self.seq_mut(slot).len += 1;
    }

    fn plan_decodes(&mut self, plan: &mut Plan) {
        // The least of those that run: who wakes begins where the least served one is.
        let active = self.tasks.iter().filter(|task| task.running > 0);
        let least = active.map(|task| task.virtual_time).min();
        self.virtual_now = self.virtual_now.max(least.unwrap_or(0));
        let mut seat = 0;
        while let Some(&(_, slot)) = self.running.get(seat) {
            let (task, pending) = (self.seq(slot).task, self.seq(slot).pending());
            if pending > 1 {
                self.tasks[usize::from(task.0)].unfinished.push_back(slot);
            } else if self.make_room(slot, plan) {
                self.run(slot, 1, plan);
            }
            seat += 1;
        }
    }

    /// Takes blocks for all known tokens of a running sequence, from the youngest ones if need be. Those
    /// have not been planned yet: decodes are planned oldest first. False if it was itself the youngest.
    fn make_room(&mut self, slot: Slot, plan: &mut Plan) -> bool {
        while !self.allocate(slot) {
            let (_, youngest) = self.running.pop().expect("the sequence itself is running");
            self.preempt(youngest);
            plan.preempted += 1;
            if youngest == slot {
                return false;
            }
        }
        true
    }

    fn preempt(&mut self, slot: Slot) {
        let seq = self.seqs[slot.0].as_mut().expect(LIVES);
        self.pool.release(&mut seq.blocks);
        (seq.computed, seq.running, seq.resumed) = (0, false, true);
        (seq.remembered, seq.node) = (0, Node::Root(seq.body.variant()));
        let (rank, task) = (rank(seq), seq.task);
        self.tasks[usize::from(task.0)].running -= 1;
        self.enqueue(rank, task, slot);
    }

    fn enqueue(&mut self, rank: Rank, task: TaskId, slot: Slot) {
        let queue = &mut self.tasks[usize::from(task.0)];
        if queue.waiting.is_empty() {
            queue.virtual_time = queue.virtual_time.max(self.virtual_now);
        }
        queue.waiting.insert(rank, slot);
    }

    fn plan_prefills(&mut self, plan: &mut Plan) {
        let mut budget = self.limits.max_rows - plan.chunks.len();
        // What has just been preempted must not come back at once.
        let mut starting = plan.preempted == 0;
        while budget > 0 {
            let Some(task) = self.least_served(starting) else { break };
            let slot = match self.tasks[task].unfinished.pop_front() {
                Some(slot) => {
                    self.catch_up(slot, plan);
                    slot
                }
                None => match self.start(task, plan) {
                    Some(slot) => slot,
                    None => {
                        starting = false;
                        continue;
                    }
                },
            };
            self.virtual_now = self.virtual_now.max(self.tasks[task].virtual_time);
            let rows = self.seq(slot).pending().min(self.limits.prefill_chunk).min(budget);
            self.run(slot, rows, plan);
            budget -= rows;
        }
        self.tasks.iter_mut().for_each(|task| task.unfinished.clear());
    }

    /// The task with the least virtual time among those with prefill to do.
    fn least_served(&self, starting: bool) -> Option<usize> {
        let ready =
            |task: &TaskQueue| !task.unfinished.is_empty() || (starting && task.can_start());
        let tasks = self.tasks.iter().enumerate().filter(|(_, task)| ready(task));
        tasks.min_by_key(|(_, task)| task.virtual_time).map(|(index, _)| index)
    }

    /// Gives the first in a task's queue a seat and blocks for its whole known length, the first of them
    /// those that hold its beginning already. `None` if there is no room; then one block must stay free
    /// for each running sequence, which is about to need it.
    fn start(&mut self, task: usize, plan: &mut Plan) -> Option<Slot> {
        let (_, &slot) = self.tasks[task].waiting.first_key_value()?;
        let seq = self.seqs[slot.0].as_mut().expect(LIVES);
        // The last row gives the next token, so it runs in any case.
        let most = seq.body.skippable().min(seq.len - 1);
        let known = seq.body.tokens().get(..most).unwrap_or_default();
        let prefix = self.pool.find(seq.body.variant(), known);
        let need = self.pool.blocks_for(seq.len) - prefix.blocks.len();
        let seats = self.running.len();
        let free = self.pool.free_beside(&prefix);
        if seats >= self.limits.max_running || free < need + seats {
            return None;
        }
        plan.prefix_queried += most;
        plan.prefix_hit += prefix.blocks.len() * self.pool.block_size();
        (seq.remembered, seq.node) = (prefix.blocks.len(), prefix.node);
        seq.computed = seq.remembered * self.pool.block_size();
        seq.running = true;
        self.pool.take_up(prefix, &mut seq.blocks);
        self.pool.extend(&mut seq.blocks, seq.len);
        let id = seq.id;
        self.tasks[task].waiting.pop_first();
        self.tasks[task].running += 1;
        let seat = self.running.partition_point(|&(older, _)| older < id);
        self.running.insert(seat, (id, slot));
        Some(slot)
    }

    /// Takes over what others have computed meanwhile of that which a running sequence has yet to.
    fn catch_up(&mut self, slot: Slot, plan: &mut Plan) {
        let size = self.pool.block_size();
        let seq = self.seqs[slot.0].as_mut().expect(LIVES);
        let most = seq.body.skippable().min(seq.len - 1);
        let known = seq.body.tokens().get(..most).unwrap_or_default();
        for tokens in known.chunks_exact(size).skip(seq.remembered) {
            // Not what it has begun to fill itself.
            let own = &mut seq.blocks[seq.remembered];
            if seq.computed != seq.remembered * size {
                break;
            }
            let Some(node) = self.pool.take_over(seq.node, tokens, own) else { break };
            seq.node = node;
            seq.remembered += 1;
            seq.computed += size;
            plan.prefix_hit += size;
        }
    }

    fn allocate(&mut self, slot: Slot) -> bool {
        let seq = self.seqs[slot.0].as_mut().expect(LIVES);
        self.pool.extend(&mut seq.blocks, seq.len)
    }

    fn run(&mut self, slot: Slot, rows: usize, plan: &mut Plan) {
        let seq = self.seqs[slot.0].as_mut().expect(LIVES);
        let known = seq.body.tokens().len().min(seq.computed + rows);
        let full = seq.body.tokens()[..known].chunks_exact(self.pool.block_size());
        for tokens in full.skip(seq.remembered) {
            seq.node = self.pool.remember(seq.node, tokens, seq.blocks[seq.remembered]);
            seq.remembered += 1;
        }
        let queue = &mut self.tasks[usize::from(seq.task.0)];
        queue.virtual_time += queue.row_cost * rows as u128;
        let (mix, start) = (seq.body.variant().mix, seq.computed);
        plan.chunks.push(Chunk { slot, mix, task: seq.task, id: seq.id, start, rows });
    }

    /// A sequence.
    pub fn seq(&self, slot: Slot) -> &Seq<T> {
        self.seqs[slot.0].as_ref().expect(LIVES)
    }

    /// A sequence, to change its body.
    pub fn seq_mut(&mut self, slot: Slot) -> &mut Seq<T> {
        self.seqs[slot.0].as_mut().expect(LIVES)
    }

    /// All sequences, waiting and running.
    pub fn iter(&self) -> impl Iterator<Item = (Slot, &Seq<T>)> {
        let seqs = self.seqs.iter().enumerate();
        seqs.filter_map(|(index, seq)| seq.as_ref().map(|seq| (Slot(index), seq)))
    }

    /// Whether there is no sequence at all.
    pub fn is_empty(&self) -> bool {
        self.seqs.len() == self.vacant.len()
    }

    /// How many sequences run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// How many sequences wait.
    pub fn waiting(&self) -> usize {
        self.seqs.len() - self.vacant.len() - self.running.len()
    }

    /// How many sequences of each task run and wait, in the order of the ids.
    pub fn task_counts(&self) -> impl Iterator<Item = (usize, usize)> {
        self.tasks.iter().map(|task| (task.running, task.waiting.len()))
    }

    /// The block pool.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Asserts what must hold between steps. For tests and debug builds: it looks at everything.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn check_invariants(&self) {
        self.pool.check(self.iter().map(|(_, seq)| seq.blocks.as_slice()));
        assert!(self.running.is_sorted_by_key(|&(id, _)| id), "running sequences are out of order");
        assert!(self.running.len() <= self.limits.max_running, "too many sequences run");
        let mut counts = vec![(0, 0); self.tasks.len()];
        for (slot, seq) in self.iter() {
            assert!(seq.computed < seq.len, "{} has nothing to run", seq.id);
            let queue = &self.tasks[usize::from(seq.task.0)];
            let count = &mut counts[usize::from(seq.task.0)];
            if seq.running {
                count.0 += 1;
                let enough = self.pool.blocks_for(seq.computed);
                assert!(seq.blocks.len() >= enough, "{} lacks blocks", seq.id);
                let full = seq.computed / self.pool.block_size();
                assert!(seq.remembered <= full, "{} shares what it may write to", seq.id);
                assert!(self.running.contains(&(seq.id, slot)), "{} has no seat", seq.id);
            } else {
                count.1 += 1;
                assert!(seq.blocks.is_empty() && seq.computed == 0, "{} waits with KV", seq.id);
                assert_eq!(queue.waiting.get(&rank(seq)), Some(&slot), "{} is lost", seq.id);
            }
        }
        for (queue, &count) in self.tasks.iter().zip(&counts) {
            assert_eq!((queue.running, queue.waiting.len()), count, "a queue miscounts");
            assert!(queue.running <= queue.max_batch, "a task holds too many seats");
        }
        assert_eq!(self.running.len(), counts.iter().map(|count| count.0).sum::<usize>());
    }
}

const LIVES: &str = "a slot is used only while its sequence is in the scheduler";
