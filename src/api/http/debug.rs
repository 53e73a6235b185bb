//! What computed an answer, for those who ask with `debug.routing`.

use crate::api::ticket::{End, Ticket};
use crate::request::ExpertUse;
use serde::Serialize;
use utoipa::ToSchema;

/// The adapters of an answer; `None` where nobody asked.
#[derive(Clone, Debug, Default)]
pub struct Reported(Option<Vec<AdapterPart>>);

/// `debug` of one text.
#[derive(Serialize, ToSchema)]
pub struct Debug<'a> {
    /// What was added to the base weights.
    pub adapters: &'a [AdapterPart],
    /// One entry for every layer of experts.
    pub routing: Vec<Layer<'a>>,
}

/// One adapter, as it was used.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AdapterPart {
    /// Its id.
    pub name: String,
    /// Which of those that had this id.
    pub generation: u64,
    /// What its delta was multiplied with.
    pub weight: f32,
}

/// How many rows each expert of a layer computed.
#[derive(Serialize, ToSchema)]
#[schema(as = ExpertLayer)]
pub struct Layer<'a> {
    /// The transformer block.
    pub layer: usize,
    /// By expert.
    pub rows_per_expert: &'a [u64],
}

impl<'a> Layer<'a> {
    fn of(used: &'a ExpertUse) -> Self {
        Self { layer: used.layer, rows_per_expert: &used.rows }
    }
}

impl Reported {
    /// What is to be said of a ticket's adapters.
    pub fn of(ticket: &Ticket) -> Self {
        let part = |(name, generation, weight): &(String, u64, f32)| AdapterPart {
            name: name.clone(),
            generation: *generation,
            weight: *weight,
        };
        Self(ticket.debug().map(|parts| parts.iter().map(part).collect()))
    }

    /// What is to be said of a text that has ended.
    pub fn debug<'a>(&'a self, end: Option<&'a End>) -> Option<Debug<'a>> {
        self.0.as_ref().zip(end).map(|(adapters, end)| Debug {
            adapters,
            routing: end.experts.iter().map(Layer::of).collect(),
        })
    }
}
