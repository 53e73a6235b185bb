//! The KV block pool: how many sequences use each block, and what is in those that nobody uses.
//!
//! A block is *free* (it holds nothing of worth), *used* (by one sequence, or by several that share a
//! prefix), or *idle*: nobody uses it, but its content is known, and whoever needs that content may take
//! it up again. Idle blocks count as free; the one that was idle longest is overwritten first. A shared
//! block is full, or will be when the step that is being planned has run, so that none of those who
//! share it ever writes to it again.

use super::prefix::{Node, PrefixIndex, Variant};
use crate::ids::BlockId;
use std::collections::BTreeMap;

/// The blocks of one runner's KV cache.
#[derive(Debug)]
pub struct BlockPool {
    /// A stack: the block used last is the one whose memory is still in a cache.
    free: Vec<BlockId>,
    /// Unused blocks whose content is known, by when they were last used.
    idle: BTreeMap<u64, BlockId>,
    /// By block.
    users: Vec<Users>,
    /// `None`: nothing is remembered.
    index: Option<PrefixIndex>,
    /// Blocks that are remembered although the step that fills them has yet to run.
    promised: Vec<BlockId>,
    /// Counts releases.
    clock: u64,
    block_size: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Users {
    count: u32,
    /// When it was last released, while it is idle.
    idle_since: Option<u64>,
}

/// Blocks that hold the beginning of a text.
#[derive(Debug, Default)]
pub struct Prefix {
    /// In order, all of them full.
    pub blocks: Vec<BlockId>,
    /// The place that they lead to.
    pub node: Node,
    /// How many of them nobody uses.
    idle: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks of `block_size` positions each (at least one), that remembers what
    /// is in blocks if `remembers`.
    pub fn new(total: usize, block_size: usize, remembers: bool) -> Self {
        Self {
            free: (0..total as u32).rev().map(BlockId).collect(),
            idle: BTreeMap::new(),
            users: vec![Users::default(); total],
            index: remembers.then(PrefixIndex::default),
            promised: Vec::new(),
            clock: 0,
            block_size: block_size.max(1),
        }
    }

    /// Positions per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// How many blocks hold `positions` positions.
    pub fn blocks_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_size)
    }

    /// The blocks that hold the longest known beginning of `tokens`.
    pub fn find(&self, variant: Variant, tokens: &[u32]) -> Prefix {
        let mut prefix = Prefix { node: Node::Root(variant), ..Prefix::default() };
        let Some(index) = &self.index else { return prefix };
        for part in tokens.chunks_exact(self.block_size) {
            let Some((block, node)) = index.find(prefix.node, part) else { break };
            prefix.idle += usize::from(self.users[block.0 as usize].count == 0);
            prefix.blocks.push(block);
            prefix.node = node;
        }
        prefix
    }

    /// Blocks that are left for others when a sequence takes up `prefix`.
    pub fn free_beside(&self, prefix: &Prefix) -> usize {
        self.free() - prefix.idle
    }

    /// Takes up the blocks of a prefix that was just found, as the beginning of an empty `table`.
    pub fn take_up(&mut self, prefix: Prefix, table: &mut Vec<BlockId>) {
        prefix.blocks.iter().for_each(|&block| self.share(block));
        *table = prefix.blocks;
    }

    /// One more user of a block that is known.
    fn share(&mut self, block: BlockId) {
        let users = &mut self.users[block.0 as usize];
        users.count += 1;
        if let Some(since) = users.idle_since.take() {
            self.idle.remove(&since);
        }
    }

    /// Puts the block that is known to hold `tokens` after `parent` in the place of `own`, which is given
    /// back; gives the place after them.
    pub fn take_over(&mut self, parent: Node, tokens: &[u32], own: &mut BlockId) -> Option<Node> {
        let (block, node) = self.index.as_ref()?.find(parent, tokens)?;
        self.give_back(std::mem::replace(own, block));
        self.share(block);
        Some(node)
    }

    /// Remembers that `block`, which is full when the next step has run, holds `tokens` after `parent`;
    /// gives the place after them.
    pub fn remember(&mut self, parent: Node, tokens: &[u32], block: BlockId) -> Node {
        let Some(index) = &mut self.index else { return parent };
        let node = index.insert(parent, tokens, block);
        // It is not in there if another one is known to hold the same.
        if index.contains(block) {
            self.promised.push(block);
        }
        node
    }

    /// The step has run: what it was to fill is full.
    pub fn keep_promised(&mut self) {
        self.promised.clear();
    }

    /// The step has failed: what it was to fill holds nothing of worth.
    pub fn forget_promised(&mut self) {
        if let Some(index) = &mut self.index {
            self.promised.drain(..).for_each(|block| index.remove(block));
        }
    }

    /// Extends `table` until it holds `positions` positions. Takes all that is missing, or returns
    /// false and takes nothing.
    pub fn extend(&mut self, table: &mut Vec<BlockId>, positions: usize) -> bool {
        let missing = self.blocks_for(positions).saturating_sub(table.len());
        if missing > self.free() {
            return false;
        }
        table.extend(std::iter::from_fn(|| self.take()).take(missing));
        true
    }

    fn take(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.forget_oldest()?,
        };
        self.users[block.0 as usize] = Users { count: 1, idle_since: None };
        Some(block)
    }

    fn forget_oldest(&mut self) -> Option<BlockId> {
        let (_, block) = self.idle.pop_first()?;
        if let Some(index) = &mut self.index {
            index.remove(block);
        }
        Some(block)
    }

    /// Gives back all blocks of `table`.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        // The last first: it is of use only to whoever has all before it.
        table.drain(..).rev().for_each(|block| self.give_back(block));
    }

    fn give_back(&mut self, block: BlockId) {
        let users = &mut self.users[block.0 as usize];
        users.count -= 1;
        if users.count > 0 {
            return;
        }
        if self.index.as_ref().is_some_and(|index| index.contains(block)) {
            self.clock += 1;
            users.idle_since = Some(self.clock);
            self.idle.insert(self.clock, block);
        } else {
            self.free.push(block);
        }
    }

    /// Blocks that nobody uses.
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that sequences use.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.users.len()
    }

    /// Asserts that each block is free, idle, or used by as many of these `tables` as it counts.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) {
        let mut counts = vec![0; self.total()];
        tables.flatten().for_each(|block| counts[block.0 as usize] += 1);
        let known = |block: BlockId| self.index.as_ref().is_some_and(|i| i.contains(block));
        for (block, (users, count)) in (0..).map(BlockId).zip(self.users.iter().zip(&counts)) {
            assert_eq!(users.count, *count, "block {} miscounts its users", block.0);
            assert!(*count < 2 || known(block), "block {} has two owners", block.0);
        }
        let mut unused = vec![false; self.total()];
        for block in self.free.iter().chain(self.idle.values()) {
            let seen = &mut unused[block.0 as usize];
            assert!(!*seen && counts[block.0 as usize] == 0, "block {} is not free", block.0);
            *seen = true;
        }
        assert!(self.idle.values().all(|&block| known(block)), "an idle block is unknown");
        let lost = unused.iter().zip(&counts).any(|(&unused, &count)| !unused && count == 0);
        assert!(!lost, "a block is lost");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Variant = Variant { mix: 0, gate: None };

    /// Fills the table's blocks with `tokens`.
    fn fill(pool: &mut BlockPool, table: &[BlockId], tokens: &[u32]) {
        let mut node = Node::Root(BASE);
        for (&block, part) in table.iter().zip(tokens.chunks_exact(pool.block_size())) {
            node = pool.remember(node, part, block);
        }
    }

    #[test]
    fn a_table_grows_by_whole_blocks_or_not_at_all() {
        let mut pool = BlockPool::new(3, 4, true);
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, 5));
        assert_eq!((table.len(), pool.free(), pool.used()), (2, 1, 2));
        assert!(pool.extend(&mut table, 8), "still inside the second block");
        assert_eq!(table.len(), 2);
        assert!(!pool.extend(&mut table, 13), "four blocks are more than there are");
        assert_eq!((table.len(), pool.free()), (2, 1));
        pool.check([table.as_slice()].into_iter());
        pool.release(&mut table);
        assert_eq!((table.len(), pool.free()), (0, 3));
    }

    #[test]
    #[should_panic(expected = "miscounts")]
    fn a_block_with_two_owners_is_found() {
        let mut pool = BlockPool::new(2, 4, false);
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, 1));
        pool.check([table.as_slice(), table.as_slice()].into_iter());
    }

    #[test]
    fn a_known_beginning_is_shared_and_outlives_its_users() {
        let mut pool = BlockPool::new(4, 2, true);
        let (mut first, mut second) = (Vec::new(), Vec::new());
        assert!(pool.extend(&mut first, 5));
        fill(&mut pool, &first, &[1, 2, 3, 4, 5]);
        let prefix = pool.find(BASE, &[1, 2, 3, 4, 9]);
        assert_eq!((prefix.blocks.as_slice(), prefix.idle), (&first[..2], 0));
        pool.take_up(prefix, &mut second);
        pool.check([first.as_slice(), &second].into_iter());
        pool.release(&mut first);
        assert_eq!((pool.used(), pool.free()), (2, 2), "the second still uses two");
        pool.release(&mut second);
        assert_eq!(pool.free(), 4);
        assert_eq!(pool.find(BASE, &[1, 2, 3, 4]).blocks.len(), 2, "idle, but known");
        assert_eq!(pool.find(Variant { mix: 7, gate: None }, &[1, 2]).blocks.len(), 0);
    }

    #[test]
    fn what_was_idle_longest_is_overwritten_first() {
        let mut pool = BlockPool::new(2, 1, true);
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, 2));
        fill(&mut pool, &table, &[1, 2]);
        pool.release(&mut table);
        assert!(pool.extend(&mut table, 1));
        assert_eq!(pool.find(BASE, &[1, 2]).blocks.len(), 1, "the end goes before the beginning");
        let prefix = pool.find(BASE, &[1]);
        assert_eq!((pool.free(), pool.free_beside(&prefix)), (1, 0));
        pool.check([table.as_slice()].into_iter());
    }

    #[test]
    fn a_pool_that_remembers_nothing_finds_nothing() {
        let mut pool = BlockPool::new(1, 1, false);
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, 1));
        fill(&mut pool, &table, &[1]);
        pool.release(&mut table);
        assert_eq!(pool.find(BASE, &[1]).blocks.len(), 0);
    }
}
