//! The adapters that requests can name: which are loaded, in which generation, and who goes when there
//! is no room.
//!
//! A loaded adapter never changes. Loading under a name that is taken makes a new generation beside the
//! old one, which lives on for as long as a request runs with it. Its weights, and so whatever is
//! computed with them, are told apart by [`Mix::key`], which no two generations share.
//!
//! Knows names, folders and limits; must not know requests or sockets. Loading reads files and packs
//! weights: it takes its time, and holds no lock meanwhile.

use super::{Limits, Loaded, Mix, Part, Shape, load};
use crate::error::{Error, Kind, Result};
use crate::ids::is_valid_name;
use crate::metrics::{AdapterMetrics, Metrics};
use crate::telemetry::now;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// The most adapters in one mixture.
pub const MAX_PARTS: usize = 8;
/// The largest weight of an adapter in a mixture, either way.
pub const MAX_WEIGHT: f32 = 4.0;
/// When somebody else's load is likely to be over.
const RETRY_BUSY: Duration = Duration::from_secs(1);
/// So many mixtures are remembered before those that nobody uses are forgotten.
const MIXTURES: usize = 256;

/// What a registry may hold.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Adapters at once.
    pub max_adapters: usize,
    /// Largest rank of one.
    pub max_rank: usize,
    /// Bytes in memory, of all together.
    pub max_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { max_adapters: 128, max_rank: 256, max_bytes: 1 << 30 }
    }
}

/// What is to be loaded.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// What requests will call it.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// Whether it may take the place of one that has the name.
    pub in_place: bool,
    /// The generation that it takes the place of, if that matters; 0 is none.
    pub expected_generation: Option<u64>,
    /// Whether it is never given up to make room.
    pub pinned: bool,
}

impl Wanted {
    /// A new adapter of this name from this folder.
    pub fn new(name: &str, path: &Path) -> Self {
        let (name, path) = (name.to_owned(), path.to_owned());
        Self { name, path, in_place: false, expected_generation: None, pinned: false }
    }
}

/// A loaded adapter, for those who list them.
#[derive(Clone, Debug)]
pub struct Info {
    /// What requests call it.
    pub name: String,
    /// How often a name was loaded, from 1.
    pub generation: u64,
    /// `lora` or `mta`.
    pub kind: &'static str,
    /// Largest rank among its matrices.
    pub rank: usize,
    /// Bytes in memory.
    pub bytes: usize,
    /// Whether it is never given up to make room.
    pub pinned: bool,
    /// The tasks that a mixture of task adapters knows.
    pub tasks: Vec<String>,
}

/// What a request runs with.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// For the engine.
    pub mix: Arc<Mix>,
    /// Name, generation and weight of each part.
    pub parts: Vec<(String, u64, f32)>,
}

/// All loaded adapters of one model.
pub struct Registry {
    shape: Shape,
    bounds: Bounds,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    /// Held while an adapter is being read: one at a time.
    loading: Mutex<()>,
}

#[derive(Default)]
struct State {
    adapters: BTreeMap<String, Resident>,
    /// The last generation of each name that was ever loaded.
    generations: HashMap<String, u64>,
    /// Mixtures that requests asked for, by the keys and the bits of the weights of their parts.
    mixtures: HashMap<Vec<(u64, u32)>, Weak<Mix>>,
    /// Counts uses.
    clock: u64,
}

struct Resident {
    info: Info,
    loaded: Loaded,
    /// By task; `None` is without one.
    mixes: HashMap<Option<String>, Arc<Mix>>,
    last_used: u64,
}

impl Registry {
    /// An empty registry for a model of this shape.
    pub fn new(shape: Shape, bounds: Bounds, metrics: Arc<Metrics>) -> Self {
        Self { shape, bounds, metrics, state: Mutex::default(), loading: Mutex::new(()) }
    }

    /// Reads an adapter and makes it known, giving up those not used for longest if there is no room.
    /// Until this succeeds nothing has changed. Blocks while it reads.
    ///
    /// # Errors
    /// `Conflict` if the name is taken or of another generation; `Invalid` for a name that may not be
    /// one, a folder that cannot be honoured exactly, or one that exceeds a limit; `NotFound` if there
    /// is no such folder; `Overloaded` while another one is being read.
    pub fn load(&self, wanted: &Wanted) -> Result<Info> {
        if !is_valid_name(&wanted.name) {
            let message =
                format!("lora_name {:?}; allowed: 1 to 64 of A-Z a-z 0-9 . _ -", wanted.name);
            return Err(Error::invalid("lora_name", message));
        }
        let Ok(_loading) = self.loading.try_lock() else {
            let error = Error::new(Kind::Overloaded, "another adapter is being loaded");
            return Err(error.with_code("lora_load_busy").with_retry_after(RETRY_BUSY));
        };
        check_place(&self.state(), wanted)?;
        let begin = now();
        let loaded = self.read(&wanted.path);
        let metrics = self.metrics.adapters();
        metrics.load_seconds.observe(begin.elapsed().as_secs_f64());
        let outcome = if loaded.is_ok() { "ok" } else { "error" };
        metrics.loads.with_label_values(&[outcome]).inc();
        self.admit(wanted, loaded?)
    }

    fn read(&self, path: &Path) -> Result<Loaded> {
        if !path.is_dir() {
            let message = format!("lora_path: {} is no folder", path.display());
            return Err(Error::not_found(message).with_param("lora_path"));
        }
        let limits = Limits { max_rank: self.bounds.max_rank, max_bytes: self.bounds.max_bytes };
        load(path, &self.shape, &limits)
            .map_err(|faults| Error::invalid("lora_path", faults.to_string()))
    }

    /// Gives what was read its name, and room.
    fn admit(&self, wanted: &Wanted, loaded: Loaded) -> Result<Info> {
        let mut state = self.state();
        // Somebody may have unloaded it meanwhile; nobody else loads.
        check_place(&state, wanted)?;
        let metrics = self.metrics.adapters();
        self.make_room(&mut state, &wanted.name, loaded.bytes)?;
        let generation = state.generations.entry(wanted.name.clone()).or_default();
        *generation += 1;
        let info = Info {
            name: wanted.name.clone(),
            generation: *generation,
            kind: loaded.kind.name(),
            rank: loaded.rank,
            bytes: loaded.bytes,
            pinned: wanted.pinned,
            tasks: loaded.tasks.clone(),
        };
        let last_used = state.tick();
        let resident = Resident { info: info.clone(), loaded, mixes: HashMap::new(), last_used };
        if let Some(old) = state.adapters.insert(info.name.clone(), resident) {
            retire(&old.info, metrics);
        }
        label(&info, metrics).set(1);
        self.publish(&state);
        Ok(info)
    }

    /// Gives up adapters until one of `bytes` fits, which may replace the one called `name`.
    fn make_room(&self, state: &mut State, name: &str, bytes: usize) -> Result<()> {
        loop {
            let others = || state.adapters.values().filter(|r| r.info.name != name);
            let used: usize = others().map(|r| r.info.bytes).sum();
            if others().count() < self.bounds.max_adapters && used + bytes <= self.bounds.max_bytes
            {
                return Ok(());
            }
            let idle = others().filter(|r| !r.info.pinned).min_by_key(|r| r.last_used);
            let Some(victim) = idle.map(|r| r.info.name.clone()) else {
                let Bounds { max_adapters, max_bytes, .. } = self.bounds;
                let message = format!(
                    "no room for an adapter of {bytes} bytes beside those that are pinned; allowed: \
                     {max_adapters} adapters and {max_bytes} bytes"
                );
                return Err(Error::new(Kind::Conflict, message).with_code("lora_limit_exceeded"));
            };
            if let Some(victim) = state.adapters.remove(&victim) {
                retire(&victim.info, self.metrics.adapters());
                self.metrics.adapters().evictions.inc();
            }
        }
    }

    /// Forgets an adapter. Requests that run with it keep it.
    ///
    /// # Errors
    /// `NotFound` if there is none of this name; `Conflict` if it is of another generation.
    pub fn unload(&self, name: &str, expected_generation: Option<u64>) -> Result<Info> {
        let mut state = self.state();
        let resident = state.adapters.get(name).ok_or_else(|| unknown(name))?;
        if let Some(expected) = expected_generation
            && expected != resident.info.generation
        {
            return Err(mismatch(name, expected, resident.info.generation));
        }
        let resident = state.adapters.remove(name).ok_or_else(|| unknown(name))?;
        retire(&resident.info, self.metrics.adapters());
        self.publish(&state);
        Ok(resident.info)
    }

    /// Pins an adapter, so that it is never given up to make room. False if there is none of this name.
    pub fn pin(&self, name: &str) -> bool {
        let mut state = self.state();
        let found = state.adapters.get_mut(name);
        found.map(|resident| resident.info.pinned = true).is_some()
    }

    /// Whether there is an adapter of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.state().adapters.contains_key(name)
    }

    /// All loaded adapters, by name.
    pub fn list(&self) -> Vec<Info> {
        self.state().adapters.values().map(|resident| resident.info.clone()).collect()
    }

    /// The adapter of this name, as `task` has it where it is a mixture of task adapters.
    ///
    /// # Errors
    /// `NotFound` if there is none of this name.
    pub fn one(&self, name: &str, task: Option<&str>) -> Result<Chosen> {
        let mut state = self.state();
        let (mix, generation) = state.mix(name, task)?;
        Ok(Chosen { mix, parts: vec![(name.to_owned(), generation, 1.0)] })
    }

    /// `Σ weight · adapter`; `None` for no adapters at all.
    ///
    /// # Errors
    /// `NotFound` if there is none of one of the names; `Invalid` for too many parts, and for weights that
    /// are not finite or too large.
    pub fn mixture(&self, asked: &[(String, f32)], task: Option<&str>) -> Result<Option<Chosen>> {
        check_mixture(asked)?;
        let mut state = self.state();
        let mut chosen: Vec<(Arc<Mix>, f32)> = Vec::new();
        let mut parts = Vec::new();
        for (name, weight) in asked {
            let (mix, generation) = state.mix(name, task).map_err(|e| e.with_param("adapters"))?;
            chosen.push((mix, *weight));
            parts.push((name.clone(), generation, *weight));
        }
        Ok(match &chosen[..] {
            [] => None,
            [(mix, 1.0)] => Some(Chosen { mix: mix.clone(), parts }),
            _ => Some(Chosen { mix: state.interned(&chosen), parts }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is made of insertions and removals that cannot fail half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        let metrics = self.metrics.adapters();
        metrics.resident.set(state.adapters.len() as i64);
        let bytes: usize = state.adapters.values().map(|r| r.info.bytes).sum();
        metrics.resident_bytes.set(bytes as i64);
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// One adapter alone, and its generation. It counts as a use.
    fn mix(&mut self, name: &str, task: Option<&str>) -> Result<(Arc<Mix>, u64)> {
        let now = self.tick();
        let resident = self.adapters.get_mut(name).ok_or_else(|| unknown(name))?;
        resident.last_used = now;
        // All tasks that a mixture of task adapters does not know are one.
        let known = |task: &&str| resident.loaded.tasks.iter().any(|t| t == task);
        let task = task.filter(known).map(str::to_owned);
        let mix = match resident.mixes.get(&task) {
            Some(mix) => mix.clone(),
            None => {
                let deltas = resident.loaded.deltas(task.as_deref());
                let mix =
                    Arc::new(Mix { key: new_key(), parts: vec![Part { deltas, weight: 1.0 }] });
                resident.mixes.insert(task, mix.clone());
                mix
            }
        };
        Ok((mix, resident.info.generation))
    }

    /// The mixture of these, the same one for as long as somebody uses it.
    fn interned(&mut self, chosen: &[(Arc<Mix>, f32)]) -> Arc<Mix> {
        let name: Vec<(u64, u32)> =
            chosen.iter().map(|(mix, weight)| (mix.key, weight.to_bits())).collect();
        if let Some(mix) = self.mixtures.get(&name).and_then(Weak::upgrade) {
            return mix;
        }
        if self.mixtures.len() >= MIXTURES {
            self.mixtures.retain(|_, mix| mix.strong_count() > 0);
        }
        let mut parts = Vec::new();
        for (mix, weight) in chosen {
            let scaled = |part: &Part| Part { deltas: part.deltas.clone(), weight: *weight };
            parts.extend(mix.parts.iter().map(scaled));
        }
        let mix = Arc::new(Mix { key: new_key(), parts });
        self.mixtures.insert(name, Arc::downgrade(&mix));
        mix
    }
}

/// A number that no mix had before; 0 is the base alone.
fn new_key() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn check_place(state: &State, wanted: &Wanted) -> Result<()> {
    let generation = state.adapters.get(&wanted.name).map(|resident| resident.info.generation);
    if let Some(expected) = wanted.expected_generation
        && expected != generation.unwrap_or(0)
    {
        return Err(mismatch(&wanted.name, expected, generation.unwrap_or(0)));
    }
    if generation.is_some() && !wanted.in_place {
        let message = format!("{} is loaded already; load_inplace replaces it", wanted.name);
        let error = Error::new(Kind::Conflict, message).with_param("lora_name");
        return Err(error.with_code("lora_adapter_already_loaded"));
    }
    Ok(())
}

fn check_mixture(asked: &[(String, f32)]) -> Result<()> {
    if asked.len() > MAX_PARTS {
        let message = format!("adapters has {} entries; allowed: up to {MAX_PARTS}", asked.len());
        return Err(Error::invalid("adapters", message));
    }
    let bad = |weight: &f32| !weight.is_finite() || weight.abs() > MAX_WEIGHT;
    match asked.iter().find(|(_, weight)| bad(weight)) {
        Some((name, weight)) => {
            let message = format!(
                "adapters: the weight of {name} is {weight}; allowed: -{MAX_WEIGHT} to {MAX_WEIGHT}"
            );
            Err(Error::invalid("adapters", message))
        }
        None => Ok(()),
    }
}

fn unknown(name: &str) -> Error {
    let shown: String = name.chars().take(64).collect();
    let message = format!("no adapter named {shown:?} is loaded; see /v1/adapters");
    Error::not_found(message).with_code("lora_adapter_not_found")
}

fn mismatch(name: &str, expected: u64, found: u64) -> Error {
    let message = format!("{name} is of generation {found}, not {expected}");
    let error = Error::new(Kind::Conflict, message).with_param("expected_generation");
    error.with_code("lora_generation_mismatch")
}

fn label(info: &Info, metrics: &AdapterMetrics) -> prometheus::IntGauge {
    let (generation, rank) = (info.generation.to_string(), info.rank.to_string());
    metrics.info.with_label_values(&[&info.name, &generation, info.kind, &rank])
}

fn retire(info: &Info, metrics: &AdapterMetrics) {
    let (generation, rank) = (info.generation.to_string(), info.rank.to_string());
    // It was registered when the adapter was.
    let _ = metrics.info.remove_label_values(&[&info.name, &generation, info.kind, &rank]);
}

/// The folder that `path` names below `root`, and nowhere else: links and `..` are followed before that
/// is judged, for the folder and for each file in it.
///
/// # Errors
/// `NotFound` if there is no such folder; `Forbidden` if it, or a file in it, is not below the root.
pub fn confined(root: &Path, path: &str) -> Result<PathBuf> {
    let outside = || {
        let message = "lora_path is outside of the folder that adapters are loaded from";
        Error::new(Kind::Forbidden, message).with_param("lora_path")
    };
    let missing = |_| {
        let shown: String = path.chars().take(256).collect();
        Error::not_found(format!("lora_path: there is no {shown}")).with_param("lora_path")
    };
    let root = root.canonicalize().map_err(|e| Error::internal("the adapter root is gone", e))?;
    let folder = root.join(path).canonicalize().map_err(missing)?;
    if !folder.starts_with(&root) {
        return Err(outside());
    }
    for entry in std::fs::read_dir(&folder).map_err(missing)?.flatten() {
        let file = entry.path().canonicalize().map_err(missing)?;
        if !file.starts_with(&root) {
            return Err(outside());
        }
    }
    Ok(folder)
}
