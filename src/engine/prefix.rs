//! What full KV blocks hold: a tree whose nodes are blocks' worth of tokens, so that a sequence can take
//! over what another one computed.
//!
//! Keys and values follow from the tokens up to theirs *and* from the weights that ran: the root of a
//! tree is a [`Variant`], which a reloaded adapter never shares with its predecessor. Nodes are compared
//! by their content, not by a hash of it, and a node's number is never given twice: no two contents are
//! ever taken for one another.

use crate::ids::BlockId;
use std::collections::HashMap;
use std::sync::Arc;

/// What beside the tokens decides keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Variant {
    /// [`Mix::key`](crate::model::step::Mix::key) of the adapters; 0 is the base alone.
    pub mix: u64,
    /// The task as the gates of experts count it.
    pub gate: Option<u32>,
}

/// A place in the forest: nothing yet, or all tokens up to a block's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// Before the first token.
    Root(Variant),
    /// After a block, by its number.
    Block(u64),
}

impl Default for Node {
    fn default() -> Self {
        Self::Root(Variant::default())
    }
}

/// What a block holds: these tokens, after all that its parent stands for.
type Content = (Node, Arc<[u32]>);

/// Finds blocks by content.
#[derive(Debug, Default)]
pub struct PrefixIndex {
    blocks: HashMap<Content, (BlockId, u64)>,
    contents: HashMap<BlockId, Content>,
    next: u64,
}

impl PrefixIndex {
    /// The block that holds `tokens` after `parent`, and the place that it leads to.
    pub fn find(&self, parent: Node, tokens: &[u32]) -> Option<(BlockId, Node)> {
        let found = self.blocks.get(&(parent, tokens.into()));
        found.map(|&(block, number)| (block, Node::Block(number)))
    }

    /// Notes that `block` holds `tokens` after `parent`, unless another block is known to. Gives the
    /// place that they lead to.
    pub fn insert(&mut self, parent: Node, tokens: &[u32], block: BlockId) -> Node {
        let content: Content = (parent, tokens.into());
        if let Some(&(_, number)) = self.blocks.get(&content) {
            return Node::Block(number);
        }
        let number = self.next;
        self.next += 1;
        self.blocks.insert(content.clone(), (block, number));
        self.contents.insert(block, content);
        Node::Block(number)
    }

    /// Whether the block can be found.
    pub fn contains(&self, block: BlockId) -> bool {
        self.contents.contains_key(&block)
    }

    /// Forgets what a block held. What came after it can no longer be reached.
    pub fn remove(&mut self, block: BlockId) {
        if let Some(content) = self.contents.remove(&block) {
            self.blocks.remove(&content);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Node = Node::Root(Variant { mix: 0, gate: None });

    #[test]
    fn content_is_told_apart_by_tokens_parent_and_variant() {
        let mut index = PrefixIndex::default();
        let first = index.insert(ROOT, &[1, 2], BlockId(0));
        let second = index.insert(first, &[1, 2], BlockId(1));
        assert_ne!(first, second);
        assert_eq!(index.find(ROOT, &[1, 2]), Some((BlockId(0), first)));
        assert_eq!(index.find(first, &[1, 2]), Some((BlockId(1), second)));
        assert_eq!(index.find(ROOT, &[2, 1]), None);
        for variant in [Variant { mix: 1, gate: None }, Variant { mix: 0, gate: Some(0) }] {
            assert_eq!(index.find(Node::Root(variant), &[1, 2]), None);
        }
    }

    #[test]
    fn the_first_block_with_a_content_stays_the_one_that_is_found() {
        let mut index = PrefixIndex::default();
        let node = index.insert(ROOT, &[5], BlockId(0));
        assert_eq!(index.insert(ROOT, &[5], BlockId(1)), node);
        assert!(index.contains(BlockId(0)) && !index.contains(BlockId(1)));
    }

    #[test]
    fn what_followed_a_forgotten_block_is_out_of_reach() {
        let mut index = PrefixIndex::default();
        let first = index.insert(ROOT, &[1], BlockId(0));
        index.insert(first, &[2], BlockId(1));
        index.remove(BlockId(0));
        assert_eq!(index.find(ROOT, &[1]), None);
        let again = index.insert(ROOT, &[1], BlockId(2));
        assert_eq!(index.find(again, &[2]), None, "it may have been another history");
    }
}
