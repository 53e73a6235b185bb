//! The adapters that requests can name: which are loaded, in which generation, and who goes when there
//! is no room.
//!
//! A loaded adapter never changes. Loading under a name that is taken makes a new generation beside the
//! old one, which lives on for as long as a request runs with it. Its weights, and so whatever is
//! computed with them, are told apart by [`Mix::key`], which no two generations share.
//!
//! Knows names, folders and limits; must not know requests or sockets. Loading reads files and packs
//! weights: it takes its time, and holds no lock meanwhile.

pub use super::confined::confined;

use super::{Limits, Loaded, Mix, Part, Shape, load};
use crate::error::{Error, Kind, Result};
use crate::ids::is_valid_name;
use crate::metrics::{AdapterMetrics, Metrics};
use crate::telemetry::now;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// The most adapters in one mixture.
pub const MAX_PARTS: usize = 8;
/// The largest weight of an adapter in a mixture, either way.
pub const MAX_WEIGHT: f32 = 4.0;
/// When somebody else's load is likely to be over.
const RETRY_BUSY: Duration = Duration::from_secs(1);
/// So many of the mixtures that were asked for last are remembered.
const MIXTURES: usize = 64;

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

impl Bounds {
    /// None: for who runs a bundle once, as it is.
    pub const NONE: Self =
        Self { max_adapters: usize::MAX, max_rank: usize::MAX, max_bytes: usize::MAX };
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
    /// The tasks that the mixtures of task adapters among them know.
    pub tasks: Vec<String>,
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
    /// Mixtures that requests asked for lately, the latest last.
    mixtures: VecDeque<Mixture>,
    /// Counts uses.
    clock: u64,
}

/// A mixture by the keys and the bits of the weights of its parts.
struct Mixture {
    parts: Vec<(u64, u32)>,
    mix: Arc<Mix>,
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

    /// [`Registry::read`] and [`Registry::admit`] in one.
    ///
    /// # Errors
    /// As those.
    pub fn load(&self, wanted: &Wanted) -> Result<Info> {
        self.admit(wanted, self.read(wanted)?)
    }

    /// Reads an adapter, which nobody can name yet. Blocks while it does.
    ///
    /// # Errors
    /// `Conflict` if the name is taken or of another generation; `Invalid` for a name that may not be
    /// one, a folder that cannot be honoured exactly, or one that exceeds a limit; `NotFound` if there
    /// is no such folder; `Overloaded` while another one is being read.
    pub fn read(&self, wanted: &Wanted) -> Result<Loaded> {
        if !is_valid_name(&wanted.name) {
            let allowed = "allowed: 1 to 64 of A-Z a-z 0-9 . _ -";
            let message = format!("lora_name {:?}; {allowed}", wanted.name);
            return Err(Error::invalid("lora_name", message));
        }
        let _loading = match self.loading.try_lock() {
            Ok(guard) => guard,
            // What panicked while it read has left nothing behind.
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let error = Error::new(Kind::Overloaded, "another adapter is being loaded");
                return Err(error.with_code("lora_load_busy").with_retry_after(RETRY_BUSY));
            }
        };
        check_place(&self.state(), wanted)?;
        let begin = now();
        let loaded = self.read_folder(&wanted.path);
        let metrics = self.metrics.adapters();
        metrics.load_seconds.observe(begin.elapsed().as_secs_f64());
        if loaded.is_err() {
            metrics.loads.with_label_values(&["error"]).inc();
        }
        loaded
    }

    fn read_folder(&self, path: &Path) -> Result<Loaded> {
        if !path.is_dir() {
            let message = format!("lora_path: {} is no folder", path.display());
            return Err(Error::not_found(message).with_param("lora_path"));
        }
        let limits = Limits { max_rank: self.bounds.max_rank, max_bytes: self.bounds.max_bytes };
        load(path, &self.shape, &limits)
            .map_err(|faults| Error::invalid("lora_path", faults.to_string()))
    }

    /// Gives what was read its name, and room: those not used for longest go if there is none. An
    /// adapter that takes another's place stays pinned if that was. Until this succeeds nothing has
    /// changed.
    ///
    /// # Errors
    /// `Conflict` if the name is taken, of another generation, or there is no room; `Invalid` if it is
    /// of another shape or rank than allowed.
    pub fn admit(&self, wanted: &Wanted, loaded: Loaded) -> Result<Info> {
        let metrics = self.metrics.adapters();
        let mut state = self.state();
        let admitted = self.admit_to(&mut state, wanted, loaded);
        let outcome = if admitted.is_ok() { "ok" } else { "error" };
        metrics.loads.with_label_values(&[outcome]).inc();
        self.publish(&state);
        admitted
    }

    fn admit_to(&self, state: &mut State, wanted: &Wanted, loaded: Loaded) -> Result<Info> {
        check_place(state, wanted)?;
        if loaded.rank > self.bounds.max_rank {
            let (rank, most) = (loaded.rank, self.bounds.max_rank);
            let message = format!("lora_path: rank {rank}; allowed: 1 to {most}");
            let error = Error::invalid("lora_path", message);
            return Err(error.with_code("lora_rank_limit_exceeded"));
        }
        for victim in self.victims(state, &wanted.name, loaded.bytes)? {
            self.retire(state, &victim);
            self.metrics.adapters().evictions.inc();
        }
        let replaced = self.retire(state, &wanted.name);
        let generation = state.generations.entry(wanted.name.clone()).or_default();
        *generation += 1;
        let info = Info {
            name: wanted.name.clone(),
            generation: *generation,
            kind: loaded.kind.name(),
            rank: loaded.rank,
            bytes: loaded.bytes,
            pinned: wanted.pinned || replaced.is_some_and(|old| old.pinned),
            tasks: loaded.tasks.clone(),
        };
        let last_used = state.tick();
        let resident = Resident { info: info.clone(), loaded, mixes: HashMap::new(), last_used };
        state.adapters.insert(info.name.clone(), resident);
        label(&info, self.metrics.adapters()).set(1);
        Ok(info)
    }

    /// The adapters to give up so that one of `bytes` fits, which may replace the one called `name`.
    fn victims(&self, state: &State, name: &str, bytes: usize) -> Result<Vec<String>> {
        let Bounds { max_adapters, max_bytes, .. } = self.bounds;
        let mut others: Vec<&Resident> =
            state.adapters.values().filter(|r| r.info.name != name).collect();
        let mut used: usize = others.iter().map(|r| r.info.bytes).sum();
        // The pinned last, which never go; then the latest used, so that the end goes first.
        others.sort_by_key(|r| (!r.info.pinned, std::cmp::Reverse(r.last_used)));
        let mut victims = Vec::new();
        while others.len() >= max_adapters || used.saturating_add(bytes) > max_bytes {
            match others.pop() {
                Some(idle) if !idle.info.pinned => {
                    used -= idle.info.bytes;
                    victims.push(idle.info.name.clone());
                }
                _ => {
                    let message = format!(
                        "no room for an adapter of {bytes} bytes beside those that are pinned; \
                         allowed: {max_adapters} adapters and {max_bytes} bytes"
                    );
                    let error = Error::new(Kind::Conflict, message);
                    return Err(error.with_code("lora_limit_exceeded"));
                }
            }
        }
        Ok(victims)
    }

    /// Takes an adapter out, and what was mixed with it.
    fn retire(&self, state: &mut State, name: &str) -> Option<Info> {
        let old = state.adapters.remove(name)?;
        let keys: Vec<u64> = old.mixes.values().map(|mix| mix.key).collect();
        state.mixtures.retain(|m| !m.parts.iter().any(|(key, _)| keys.contains(key)));
        let Info { name, generation, kind, rank, .. } = &old.info;
        let labels = [name, &generation.to_string(), *kind, &rank.to_string()];
        // It was registered when the adapter was.
        let _ = self.metrics.adapters().info.remove_label_values(&labels);
        Some(old.info)
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
        let info = self.retire(&mut state, name).ok_or_else(|| unknown(name))?;
        self.publish(&state);
        Ok(info)
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
        let tasks = state.tasks_of(name);
        Ok(Chosen { mix, parts: vec![(name.to_owned(), generation, 1.0)], tasks })
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
        let tasks = asked.iter().flat_map(|(name, _)| state.tasks_of(name)).collect();
        Ok(match &chosen[..] {
            [] => None,
            [(mix, 1.0)] => Some(Chosen { mix: mix.clone(), parts, tasks }),
            _ => Some(Chosen { mix: state.interned(&chosen), parts, tasks }),
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

    fn tasks_of(&self, name: &str) -> Vec<String> {
        self.adapters.get(name).map_or_else(Vec::new, |resident| resident.info.tasks.clone())
    }

    /// The mixture of these, the same one as long as it is remembered.
    fn interned(&mut self, chosen: &[(Arc<Mix>, f32)]) -> Arc<Mix> {
        let name: Vec<(u64, u32)> =
            chosen.iter().map(|(mix, weight)| (mix.key, weight.to_bits())).collect();
        let known = self.mixtures.iter().position(|mixture| mixture.parts == name);
        if let Some(mixture) = known.and_then(|place| self.mixtures.remove(place)) {
            let mix = mixture.mix.clone();
            self.mixtures.push_back(mixture);
            return mix;
        }
        if self.mixtures.len() >= MIXTURES {
            self.mixtures.pop_front();
        }
        let mut parts = Vec::new();
        for (mix, weight) in chosen {
            let scaled = |part: &Part| Part { deltas: part.deltas.clone(), weight: *weight };
            parts.extend(mix.parts.iter().map(scaled));
        }
        let mix = Arc::new(Mix { key: new_key(), parts });
        self.mixtures.push_back(Mixture { parts: name, mix: mix.clone() });
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
    let message = format!("no adapter named {shown:?} is loaded; see /v1/models");
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
