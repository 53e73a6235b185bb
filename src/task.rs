//! A task: one TOML file that turns a model into an endpoint. Everything unknown or out of range is
//! refused at load with the file, the key and what is allowed.

mod load;

pub use load::MAX_TASKS;

use crate::ids::TaskId;
use crate::request::Params;
use std::collections::BTreeMap;
use std::sync::Arc;

/// One task, checked.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its place in the table.
    pub id: TaskId,
    /// The file's stem; what clients put in `model`.
    pub name: String,
    /// One line for people.
    pub description: String,
    /// Source of the prompt template (minijinja): `{{ input }}`, `{{ controls.words }}`.
    pub template: String,
    /// Source of its chat template (Jinja as transformers has it): `messages`, `controls`.
    pub chat_template: Option<String>,
    /// The adapter that serves it.
    pub adapter: Option<String>,
    /// Control name to its meaning.
    pub controls: BTreeMap<String, Control>,
    /// What a request leaves open.
    pub defaults: Params,
    /// What a request may not exceed.
    pub limits: Limits,
    /// Latency objective and share of the machine.
    pub slo: Slo,
}

/// A wanted outcome that a client may ask for; it becomes a control token of the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Control {
    /// What values it takes.
    pub kind: ControlKind,
    /// The token's text with `{}` for the value, such as `<|words:{}|>`. Absent: `none`.
    pub token: String,
    /// The value when a request gives none; without it the token of `none` is used.
    pub default: Option<String>,
}

/// The values of a control.
#[derive(Clone, Debug, PartialEq)]
pub enum ControlKind {
    /// An integer in `minimum..=maximum`.
    Integer {
        /// Smallest.
        minimum: i64,
        /// Largest.
        maximum: i64,
    },
    /// One of these words.
    Enum(Vec<String>),
}

impl ControlKind {
    /// Every value, as it stands in the token.
    pub fn values(&self) -> Vec<String> {
        match self {
            Self::Integer { minimum, maximum } => {
                (*minimum..=*maximum).map(|n| n.to_string()).collect()
            }
            Self::Enum(values) => values.clone(),
        }
    }

    /// The values in words, for messages.
    pub fn allowed(&self) -> String {
        match self {
            Self::Integer { minimum, maximum } => format!("an integer {minimum} to {maximum}"),
            Self::Enum(values) => values.join(", "),
        }
    }
}

/// Limits of a task; `None` leaves it to the context.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Limits {
    /// Longest rendered prompt.
    pub max_input_tokens: Option<u32>,
    /// Largest `max_tokens`.
    pub max_tokens: Option<u32>,
}

/// Scheduling of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Slo {
    /// Wanted time to the first token, in milliseconds.
    pub ttft_ms: Option<f64>,
    /// Share of the machine relative to other tasks; above 0.
    pub weight: f64,
    /// Most sequences of this task in a step.
    pub max_batch: usize,
    /// Most sequences of this task that wait; beyond it requests are refused as overloaded.
    pub max_waiting: usize,
}

impl Default for Slo {
    fn default() -> Self {
        Self { ttft_ms: None, weight: 1.0, max_batch: 256, max_waiting: 1024 }
    }
}

/// All tasks of a server; one of them is the bundle itself: raw text, no template.
#[derive(Clone, Debug)]
pub struct TaskTable {
    tasks: Vec<Arc<Task>>,
    bundle: usize,
}

impl TaskTable {
    /// A table of these tasks, of which the last is the bundle itself; their ids become their places.
    pub fn new(tasks: Vec<Task>) -> Self {
        let number = |(i, task): (usize, Task)| Arc::new(Task { id: TaskId(i as u16), ..task });
        let tasks: Vec<_> = tasks.into_iter().enumerate().map(number).collect();
        Self { bundle: tasks.len().saturating_sub(1), tasks }
    }

    /// The same and one more task, which gets the next id.
    pub fn with(&self, task: Task) -> Self {
        let mut table = self.clone();
        table.tasks.push(Arc::new(Task { id: TaskId(self.tasks.len() as u16), ..task }));
        table
    }

    /// All tasks, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Task>> {
        self.tasks.iter()
    }

    /// The bundle itself.
    pub fn bundle(&self) -> &Arc<Task> {
        &self.tasks[self.bundle]
    }

    /// All but the bundle itself.
    pub fn named(&self) -> impl Iterator<Item = &Arc<Task>> {
        let bundle = self.bundle().id;
        self.tasks.iter().filter(move |task| task.id != bundle)
    }

    /// The task with this id.
    pub fn get(&self, id: TaskId) -> &Arc<Task> {
        &self.tasks[usize::from(id.0)]
    }

    /// The task that a client calls `name`.
    pub fn find(&self, name: &str) -> Option<&Arc<Task>> {
        self.tasks.iter().find(|t| t.name == name)
    }

    /// Names in the order of the ids.
    pub fn names(&self) -> Vec<String> {
        self.tasks.iter().map(|t| t.name.clone()).collect()
    }
}
