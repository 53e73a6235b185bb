//! What a request's `model` can name: tasks, the bundle itself, adapters. Tasks and adapters may come
//! while requests run, so a request takes hold of what it needs when it is admitted, and keeps it.

use crate::adapter::registry::{Chosen, Info, Registry, Wanted};
use crate::engine::EngineHandle;
use crate::error::{Error, Kind, Result};
use crate::metrics::Metrics;
use crate::request::Request;
use crate::task::{MAX_TASKS, Task, TaskTable};
use crate::text::Prompts;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// The tasks of one moment, and their prompts.
pub struct Listing {
    /// All tasks.
    pub tasks: TaskTable,
    /// Their templates.
    pub prompts: Arc<Prompts>,
}

/// What a request is for.
pub struct Target {
    /// Whose queue, limits and metrics.
    pub task: Arc<Task>,
    /// Whether the prompt is raw text.
    pub raw: bool,
    /// The templates.
    pub prompts: Arc<Prompts>,
    /// What it adds to the base weights.
    pub adapters: Option<Chosen>,
    /// Its task as the gates of experts count it.
    pub gate: Option<u32>,
}

/// Everything that can be named.
pub struct Catalog {
    listing: RwLock<Arc<Listing>>,
    adapters: Option<Arc<Registry>>,
    /// Held while a name is given or taken away, so that none is given twice.
    naming: Mutex<()>,
}

impl Catalog {
    /// A catalog of these tasks and, where the model can have some, adapters.
    pub fn new(tasks: TaskTable, prompts: Prompts, adapters: Option<Arc<Registry>>) -> Self {
        let listing = Listing { tasks, prompts: Arc::new(prompts) };
        Self { listing: RwLock::new(Arc::new(listing)), adapters, naming: Mutex::new(()) }
    }

    /// The tasks as they are now.
    pub fn listing(&self) -> Arc<Listing> {
        self.listing.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The adapters, if the model can have some.
    pub fn adapters(&self) -> Option<&Arc<Registry>> {
        self.adapters.as_ref()
    }

    /// The adapters that are loaded.
    pub fn adapter_list(&self) -> Vec<Info> {
        self.adapters.as_ref().map_or_else(Vec::new, |adapters| adapters.list())
    }

    /// The task of this name, or the bundle itself for an adapter's name.
    pub fn find(&self, name: &str) -> Result<(Arc<Task>, Arc<Listing>)> {
        let listing = self.listing();
        let adapter = || self.adapters.as_ref().is_some_and(|adapters| adapters.contains(name));
        let task = match listing.tasks.find(name) {
            Some(task) => task.clone(),
            None if adapter() => listing.tasks.bundle().clone(),
            None => return Err(unknown(name)),
        };
        Ok((task, listing))
    }

    /// Takes hold of all that `request` names. The task was found by [`Catalog::find`].
    pub fn target(
        &self,
        request: &Request,
        (task, listing): (Arc<Task>, Arc<Listing>),
        engine: &EngineHandle,
    ) -> Result<Target> {
        let raw = task.id == listing.tasks.bundle().id;
        let own = match raw {
            true => Some(&request.model).filter(|model| **model != task.name),
            false => task.adapter.as_ref(),
        };
        if let (Some(_), false) = (&request.task, raw) {
            let message = format!("task is for raw text; {} is a task itself", task.name);
            return Err(Error::invalid("task", message));
        }
        let row = if raw { request.task.as_deref() } else { Some(task.name.as_str()) };
        let adapters = self.chosen(request, own.map(String::as_str), row)?;
        let gate = row.and_then(|row| engine.gate(row));
        if let (Some(named), None) = (&request.task, gate) {
            let gates = engine.experts().map_or(&[][..], |experts| &experts.tasks);
            check_named(named, adapters.as_ref(), gates)?;
        }
        Ok(Target { raw, prompts: listing.prompts.clone(), adapters, gate, task })
    }

    fn chosen(
        &self,
        request: &Request,
        own: Option<&str>,
        row: Option<&str>,
    ) -> Result<Option<Chosen>> {
        let asked = request.adapters.as_ref();
        match (&self.adapters, asked, own) {
            (Some(adapters), Some(asked), _) => adapters.mixture(asked, row),
            (Some(adapters), None, Some(own)) => adapters.one(own, row).map(Some),
            (None, Some(asked), _) if !asked.is_empty() => {
                Err(Error::invalid("adapters", "this server has no adapters"))
            }
            _ => Ok(None),
        }
    }

    /// Adds a task, given the text of its file.
    ///
    /// # Errors
    /// `Conflict` if the name is taken; `Invalid` with everything that is wrong with the text.
    pub fn add_task(
        &self,
        name: &str,
        text: &str,
        engine: &EngineHandle,
        metrics: &Metrics,
    ) -> Result<Arc<Task>> {
        let _naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.listing();
        self.check_new(name, &now)?;
        let task = Task::parse(name, text).map_err(faulty)?;
        let tasks = now.tasks.with(task);
        let task = tasks.find(name).expect("it was just added").clone();
        let mut prompts = Prompts::clone(&now.prompts);
        prompts.add(&task).map_err(faulty)?;
        // From here on only a missing adapter or an ended engine can be in the way.
        if let Some(adapter) = &task.adapter
            && !self.adapters.as_ref().is_some_and(|adapters| adapters.pin(adapter))
        {
            let message = format!("adapter {adapter:?} is not loaded; see /v1/adapters");
            return Err(Error::invalid("toml", message));
        }
        engine.add_task(&task.slo, metrics.add_task(name))?;
        let listing = Listing { tasks, prompts: Arc::new(prompts) };
        *self.listing.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(listing);
        Ok(task)
    }

    /// Reads an adapter and makes it known. Blocks while it reads.
    ///
    /// # Errors
    /// Those of [`Registry::load`]; `Conflict` if a task or the bundle has the name.
    pub fn load_adapter(&self, wanted: &Wanted) -> Result<Info> {
        let registry = self.registry()?;
        self.check_no_task(&wanted.name)?;
        let loaded = registry.read(wanted)?;
        let _naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_no_task(&wanted.name)?;
        registry.admit(wanted, loaded)
    }

    /// Forgets an adapter that no task needs.
    ///
    /// # Errors
    /// Those of [`Registry::unload`]; `Conflict` if a task needs it.
    pub fn unload_adapter(&self, name: &str, expected_generation: Option<u64>) -> Result<Info> {
        let _naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = self.listing().tasks.iter().find(|t| t.adapter.as_deref() == Some(name))
        {
            let message = format!("task {} needs the adapter {name}", task.name);
            return Err(Error::new(Kind::Conflict, message).with_code("lora_adapter_in_use"));
        }
        self.registry()?.unload(name, expected_generation)
    }

    fn registry(&self) -> Result<&Arc<Registry>> {
        let none = || Error::new(Kind::Forbidden, "this server has no adapters");
        self.adapters.as_ref().ok_or_else(none)
    }

    /// Refuses one task too many, and a name that a task, the bundle or an adapter has.
    fn check_new(&self, name: &str, now: &Listing) -> Result<()> {
        if now.tasks.iter().count() > MAX_TASKS {
            let message = format!("there are {MAX_TASKS} tasks already, which is the most");
            return Err(Error::new(Kind::Conflict, message));
        }
        if self.adapters.as_ref().is_some_and(|adapters| adapters.contains(name)) {
            return Err(taken(name, "an adapter"));
        }
        self.check_no_task(name)
    }

    /// Refuses a name that a task or the bundle has.
    fn check_no_task(&self, name: &str) -> Result<()> {
        match self.listing().tasks.find(name) {
            Some(_) => Err(taken(name, "a task or the bundle")),
            None => Ok(()),
        }
    }
}

/// Refuses the name of a task on which nothing depends.
fn check_named(task: &str, chosen: Option<&Chosen>, gates: &[String]) -> Result<()> {
    let mixed = chosen.map_or(&[][..], |chosen| &chosen.tasks);
    let known: Vec<&str> = gates.iter().chain(mixed).map(String::as_str).collect();
    if known.contains(&task) {
        return Ok(());
    }
    let allowed = if known.is_empty() { "none here".to_owned() } else { known.join(", ") };
    Err(Error::invalid("task", format!("task is {task:?}; allowed: {allowed}")))
}

fn unknown(name: &str) -> Error {
    let shown: String = name.chars().take(64).collect();
    let message = format!("no model or task named {shown:?}; see /v1/models");
    Error::not_found(message).with_param("model").with_code("model_not_found")
}

fn taken(name: &str, by: &str) -> Error {
    Error::new(Kind::Conflict, format!("{name} is the name of {by}")).with_code("name_taken")
}

fn faulty(faults: Vec<String>) -> Error {
    Error::invalid("toml", faults.join("; "))
}
