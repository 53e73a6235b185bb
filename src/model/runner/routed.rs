//! The tasks of a step's rows, which gates are told, and the experts that the rows went to.

use crate::model::Routes;
use crate::model::step::{Routing, StepInput};
use std::iter::repeat_n;

pub struct Routed<'a> {
    /// The rows that are left behind the last layer's attention, sorted.
    kept: &'a [u32],
    /// Tasks of all rows, and of the kept ones.
    gates: [Vec<Option<u32>>; 2],
    routing: Routing,
}

impl<'a> Routed<'a> {
    pub fn new(input: &StepInput, kept: &'a [u32]) -> Self {
        let all = input.slices.iter().flat_map(|s| repeat_n(s.gate, s.rows.len()));
        let all: Vec<_> = all.collect();
        let of_kept = kept.iter().map(|&row| all[row as usize]).collect();
        Self { kept, gates: [all, of_kept], routing: Routing::default() }
    }

    pub fn gates(&self, kept: bool) -> &[Option<u32>] {
        &self.gates[usize::from(kept)]
    }

    /// Puts down the next layer with experts.
    pub fn add(&mut self, kept: bool, routes: &Routes) {
        let Routing { experts, entropy } = &mut self.routing;
        if !kept {
            experts.extend(&routes.experts);
            entropy.extend(&routes.entropy);
            return;
        }
        let (k, rows, before) = (routes.top_k, self.gates[0].len(), entropy.len());
        entropy.resize(before + rows, f32::NAN);
        experts.resize((before + rows) * k, Routing::NONE);
        for (i, &row) in self.kept.iter().enumerate() {
            let at = before + row as usize;
            entropy[at] = routes.entropy[i];
            experts[at * k..(at + 1) * k].copy_from_slice(&routes.experts[i * k..(i + 1) * k]);
        }
    }

    pub fn into_routing(self) -> Routing {
        self.routing
    }
}
