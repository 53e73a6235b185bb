//! What computed an answer, for those who ask with `debug.routing`.

use crate::api::ticket::{End, Ticket};
use crate::request::ExpertUse;
use serde::Serialize;

/// The adapters of an answer; `None` where nobody asked.
#[derive(Clone, Debug, Default)]
pub struct Reported(Option<Vec<AdapterPart>>);

/// `debug` of one text.
#[derive(Serialize)]
pub struct Debug<'a> {
    adapters: &'a [AdapterPart],
    routing: Vec<Layer<'a>>,
}

#[derive(Clone, Debug, Serialize)]
struct AdapterPart {
    name: String,
    generation: u64,
    weight: f32,
}

/// How many rows each expert of a layer computed.
#[derive(Serialize)]
struct Layer<'a> {
    layer: usize,
    rows_per_expert: &'a [u64],
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
