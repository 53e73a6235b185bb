//! The KV block pool: which blocks nobody uses.
//!
//! It knows no sequences. A block is either in the pool or in exactly one sequence's table; taking and
//! giving back move ids between the two, so that free + used = total always holds.

use crate::ids::BlockId;

/// The free blocks of one runner's KV cache.
#[derive(Debug)]
pub struct BlockPool {
    /// A stack: the block used last is the one whose memory is still in a cache.
    free: Vec<BlockId>,
    total: usize,
    block_size: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks of `block_size` positions each (at least one).
    pub fn new(total: usize, block_size: usize) -> Self {
        let free = (0..total as u32).rev().map(BlockId).collect();
        Self { free, total, block_size: block_size.max(1) }
    }

    /// How many blocks hold `positions` positions.
    pub fn blocks_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_size)
    }

    /// Extends `table` until it holds `positions` positions. Takes all that is missing, or returns
    /// false and takes nothing.
    pub fn extend(&mut self, table: &mut Vec<BlockId>, positions: usize) -> bool {
        let missing = self.blocks_for(positions).saturating_sub(table.len());
        let Some(rest) = self.free.len().checked_sub(missing) else { return false };
        table.extend(self.free.drain(rest..).rev());
        true
    }

    /// Takes back all blocks of `table`.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        self.free.extend(table.drain(..).rev());
    }

    /// Blocks that nobody uses.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that sequences use.
    pub fn used(&self) -> usize {
        self.total - self.free.len()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Asserts that the free blocks and these `tables` are together all blocks, each once.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) {
        let mut owned = vec![false; self.total];
        let mut own = |block: &BlockId| {
            let seen = &mut owned[block.0 as usize];
            assert!(!*seen, "block {} has two owners", block.0);
            *seen = true;
        };
        tables.flatten().for_each(&mut own);
        self.free.iter().for_each(&mut own);
        assert!(owned.iter().all(|&seen| seen), "a block is lost");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_grows_by_whole_blocks_or_not_at_all() {
        let mut pool = BlockPool::new(3, 4);
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
    #[should_panic(expected = "two owners")]
    fn a_block_with_two_owners_is_found() {
        let mut pool = BlockPool::new(2, 4);
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, 1));
        pool.check([table.as_slice(), table.as_slice()].into_iter());
    }
}
