//! Packing: ragged sequences laid end to end, as the model takes them, without padding.

use super::objective::Sequence;
use crate::kernels::IGNORE;

/// Several sequences as one run of rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Tokens of all rows.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// What follows each row, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// First row of each sequence, and the number of rows.
    pub starts: Vec<usize>,
}

impl Batch {
    /// Packs sequences in their order.
    pub fn pack<'a>(sequences: impl IntoIterator<Item = &'a Sequence>) -> Self {
        let mut batch = Self { starts: vec![0], ..Self::default() };
        for sequence in sequences {
            batch.tokens.extend(&sequence.tokens);
            batch.targets.extend(&sequence.targets);
            batch.positions.extend(0..sequence.len() as u32);
            batch.starts.push(batch.tokens.len());
        }
        batch
    }

    /// Number of rows that count in the loss.
    pub fn learnt(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORE).count()
    }
}

/// Groups sequences, in order, into batches of at most `rows` rows. A longer sequence gets a batch of
/// its own; none is split or lost.
pub fn group(sequences: &[Sequence], rows: usize) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut first = 0;
    let mut held = 0;
    for (i, sequence) in sequences.iter().enumerate() {
        if i > first && held + sequence.len() > rows {
            batches.push(Batch::pack(&sequences[first..i]));
            (first, held) = (i, 0);
        }
        held += sequence.len();
    }
    if first < sequences.len() {
        batches.push(Batch::pack(&sequences[first..]));
    }
    batches
}
