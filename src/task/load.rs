//! Reads the task files of a bundle and reports all their faults at once.

use super::{Control, ControlKind, Limits, Slo, Task, TaskTable};
use crate::ids::{TaskId, is_valid_name};
use crate::request::Params;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The template of a task that names none.
const RAW: &str = "{{ input }}";
/// The most tasks; each is a value of a metric label.
pub const MAX_TASKS: usize = 1000;
/// The most values of an integer control; each is a token.
const MAX_SPAN: i64 = 10_000;

impl TaskTable {
    /// The tasks of `bundle/tasks/*.toml` in the order of their names, then the bundle itself under
    /// `bundle_id`. A bundle without task files gets one task, `default`: raw completion.
    ///
    /// Returns every fault of every file, each with its file and key and what is allowed.
    pub fn load(bundle: &Path, bundle_id: &str) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        if !is_valid_name(bundle_id) {
            faults.push(format!("bundle id {bundle_id:?}; allowed: 1 to 64 of A-Z a-z 0-9 . _ -"));
        }
        let files = task_files(&bundle.join("tasks")).unwrap_or_else(|fault| {
            faults.push(fault);
            Vec::new()
        });
        if files.len() > MAX_TASKS {
            return Err(vec![format!("tasks: {} files; allowed: up to {MAX_TASKS}", files.len())]);
        }
        let mut tasks: Vec<Task> =
            files.iter().map(|file| load_task(file, bundle_id, &mut faults)).collect();
        if tasks.is_empty() && bundle_id != "default" {
            tasks.push(raw("default", "Continues a text."));
        }
        tasks.push(raw(bundle_id, "The model itself: continues raw text."));
        if faults.is_empty() { Ok(Self::new(tasks)) } else { Err(faults) }
    }
}

fn raw(name: &str, description: &str) -> Task {
    Task {
        id: TaskId(0),
        name: name.into(),
        description: description.into(),
        template: RAW.into(),
        chat_template: None,
        adapter: None,
        controls: BTreeMap::new(),
        defaults: Params::default(),
        limits: Limits::default(),
        slo: Slo::default(),
    }
}

/// The task files in a folder, sorted; none if there is no such folder.
fn task_files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let entries = entries.map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "toml"));
    files.sort();
    Ok(files)
}

/// Reads one file. What is at fault goes to `faults` and is replaced by a default, so that the
/// other faults are found too.
fn load_task(file: &Path, bundle_id: &str, faults: &mut Vec<String>) -> Task {
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    if name == bundle_id {
        let fault = "the name is the bundle's own id; choose another";
        faults.push(format!("tasks/{name}.toml: {fault}"));
    }
    let text = fs::read_to_string(file).unwrap_or_else(|e| {
        faults.push(format!("tasks/{name}.toml: {e}"));
        String::new()
    });
    parse(&name, &text, faults)
}

impl Task {
    /// Reads the text of a task file; all that is wrong with it comes back at once.
    pub fn parse(name: &str, text: &str) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        let task = parse(name, text, &mut faults);
        if faults.is_empty() { Ok(task) } else { Err(faults) }
    }
}

fn parse(name: &str, text: &str, faults: &mut Vec<String>) -> Task {
    let label = format!("tasks/{name}.toml");
    if !is_valid_name(name) {
        faults.push(format!("{label}: the name; allowed: 1 to 64 of A-Z a-z 0-9 . _ -"));
    }
    let table = text.parse::<Table>().unwrap_or_else(|e| {
        faults.push(format!("{label}: {}", e.to_string().trim_end()));
        Table::new()
    });
    let mut top = Section { label, path: String::new(), table, asked: Vec::new(), faults };
    let mut task = raw(name, "");
    task.description = top.take("description").unwrap_or_default();
    task.template = top.take("template").unwrap_or(task.template);
    task.chat_template = top.take("chat_template");
    task.adapter = top.take("adapter");
    if let Some(adapter) = task.adapter.as_deref().filter(|name| !is_valid_name(name)) {
        top.fault("adapter", &format!("is {adapter:?}; allowed: 1 to 64 of A-Z a-z 0-9 . _ -"));
    }
    task.controls = top.section("controls").map(controls).unwrap_or_default();
    task.defaults = top.section("defaults").map(defaults).unwrap_or_default();
    task.limits = top.section("limits").map(limits).unwrap_or_default();
    task.slo = top.section("slo").map(slo).unwrap_or_default();
    if let (Some(default), Some(limit)) = (task.defaults.max_tokens, task.limits.max_tokens)
        && default > limit
    {
        top.fault("defaults.max_tokens", &format!("is {default}, above limits.max_tokens {limit}"));
    }
    top.finish();
    task
}

fn controls(mut section: Section<'_>) -> BTreeMap<String, Control> {
    let names: Vec<String> = section.table.keys().cloned().collect();
    let mut controls = BTreeMap::new();
    for name in names {
        let plain = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_'));
        if !plain {
            section.fault(&name, "the name; allowed: a-z, then a-z 0-9 _");
        }
        if let Some(control) = section.section(&name).and_then(control) {
            controls.insert(name, control);
        }
    }
    controls
}

fn control(mut section: Section<'_>) -> Option<Control> {
    let kind = match section.need::<String>("kind").as_deref() {
        Some("integer") => section.need("range").and_then(|range| integer(&mut section, range)),
        Some("enum") => section.need("values").and_then(|values| words(&mut section, values)),
        Some(other) => {
            section.fault("kind", &format!("is {other:?}; allowed: \"integer\", \"enum\""));
            return None;
        }
        None => None,
    };
    let token: Option<String> = section.need("token");
    if token.as_ref().is_some_and(|t| t.matches("{}").count() != 1) {
        section.fault("token", "must hold {} once, where the value goes");
    }
    let default = section.take::<Value>("default").map(|v| match v {
        Value::String(word) => word,
        other => other.to_string(),
    });
    if let (Some(kind), Some(default)) = (&kind, &default)
        && !kind.values().contains(default)
    {
        let allowed = kind.allowed();
        section.fault("default", &format!("is {default}; allowed: {allowed}"));
    }
    section.finish();
    Some(Control { kind: kind?, token: token?, default })
}

fn integer(section: &mut Section<'_>, [minimum, maximum]: [i64; 2]) -> Option<ControlKind> {
    let span = maximum.checked_sub(minimum).filter(|span| (0..MAX_SPAN).contains(span));
    if span.is_none() {
        let allowed = format!("[lowest, highest], up to {MAX_SPAN} values");
        section.fault("range", &format!("is [{minimum}, {maximum}]; allowed: {allowed}"));
    }
    span.map(|_| ControlKind::Integer { minimum, maximum })
}

fn words(section: &mut Section<'_>, values: Vec<String>) -> Option<ControlKind> {
    let unique: std::collections::BTreeSet<_> = values.iter().collect();
    let fine = !values.is_empty()
        && unique.len() == values.len()
        && values.iter().all(|v| is_valid_name(v) && v != "none");
    if !fine {
        let allowed = "different words of A-Z a-z 0-9 . _ -, without \"none\"";
        section.fault("values", &format!("are {values:?}; allowed: {allowed}"));
    }
    fine.then_some(ControlKind::Enum(values))
}

/// Reads the parameters one by one, so that each fault is found.
fn defaults(section: Section<'_>) -> Params {
    let mut params = Params::default();
    for (key, value) in &section.table {
        let one = Table::from_iter([(key.clone(), value.clone())]);
        let one = Params::deserialize(one).map_err(|e| e.message().to_string());
        match one.and_then(|p| p.check().map(|()| p.clone()).map_err(|e| e.message)) {
            Ok(one) => params = one.over(&params),
            Err(e) => section.faults.push(format!("{}: {}{key}: {e}", section.label, section.path)),
        }
    }
    if let Err(e) = params.check() {
        section.faults.push(format!("{}: {}{}", section.label, section.path, e.message));
    }
    params
}

fn limits(mut section: Section<'_>) -> Limits {
    let limits = Limits {
        max_input_tokens: section.in_range("max_input_tokens", |&n: &u32| n >= 1, "1 or more"),
        max_tokens: section.in_range("max_tokens", |&n: &u32| n >= 1, "1 or more"),
    };
    section.finish();
    limits
}

fn slo(mut section: Section<'_>) -> Slo {
    let usual = Slo::default();
    let within_a_day = |&v: &f64| v > 0.0 && v <= 86_400_000.0;
    let count = |&n: &usize| (1..=1 << 20).contains(&n);
    let slo = Slo {
        ttft_ms: section.in_range("ttft_ms", within_a_day, "above 0, up to 86400000"),
        weight: section
            .in_range("weight", |&v: &f64| (0.001..=1000.0).contains(&v), "0.001 to 1000")
            .unwrap_or(usual.weight),
        max_batch: section.in_range("max_batch", count, "1 or more").unwrap_or(usual.max_batch),
        max_waiting: section
            .in_range("max_waiting", count, "1 or more")
            .unwrap_or(usual.max_waiting),
    };
    section.finish();
    slo
}

/// A table of the file, emptied key by key; what is left at the end is unknown.
struct Section<'a> {
    label: String,
    /// Dotted, with a dot at the end; empty for the top.
    path: String,
    table: Table,
    asked: Vec<String>,
    faults: &'a mut Vec<String>,
}

impl Section<'_> {
    fn fault(&mut self, key: &str, what: &str) {
        self.faults.push(format!("{}: {}{key} {what}", self.label, self.path));
    }

    fn take<T: for<'de> Deserialize<'de>>(&mut self, key: &str) -> Option<T> {
        self.asked.push(key.into());
        match T::deserialize(self.table.remove(key)?) {
            Ok(value) => Some(value),
            Err(e) => {
                self.fault(key, &format!("is not possible: {}", e.message()));
                None
            }
        }
    }

    fn need<T: for<'de> Deserialize<'de>>(&mut self, key: &str) -> Option<T> {
        if !self.table.contains_key(key) {
            self.fault(key, "is missing");
        }
        self.take(key)
    }

    fn in_range<T: for<'de> Deserialize<'de> + std::fmt::Display>(
        &mut self,
        key: &str,
        ok: impl Fn(&T) -> bool,
        allowed: &str,
    ) -> Option<T> {
        let value = self.take(key)?;
        if !ok(&value) {
            self.fault(key, &format!("is {value}; allowed: {allowed}"));
        }
        Some(value)
    }

    fn section(&mut self, key: &str) -> Option<Section<'_>> {
        let table = self.take(key)?;
        let path = format!("{}{key}.", self.path);
        let (label, asked) = (self.label.clone(), Vec::new());
        Some(Section { label, path, table, asked, faults: self.faults })
    }

    fn finish(mut self) {
        let allowed = self.asked.join(", ");
        for key in std::mem::take(&mut self.table).keys() {
            self.fault(key, &format!("is unknown; allowed: {allowed}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tasks")).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join("tasks").join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn a_bundle_without_tasks_gets_raw_completion() {
        let dir = tempfile::tempdir().unwrap();
        let table = TaskTable::load(dir.path(), "gpt2").unwrap();
        assert_eq!(table.names(), ["default", "gpt2"]);
        assert!(table.iter().all(|t| t.template == RAW && t.controls.is_empty()));
        assert_eq!(TaskTable::load(dir.path(), "default").unwrap().names(), ["default"]);
        assert!(TaskTable::load(dir.path(), "not a name").is_err());
    }

    #[test]
    fn a_full_task_is_read() {
        let dir = bundle(&[
            ("b.toml", ""),
            ("notes.md", "not a task"),
            (
                "a.toml",
                r#"
                description = "One"
                template = "<|a|>{{ controls.words }}{{ input }}"
                chat_template = "{{ messages[0].content }}"
                [controls.words]
                kind = "integer"
                range = [3, 60]
                token = "<|words:{}|>"
                default = 20
                [controls.tone]
                kind = "enum"
                values = ["calm", "loud"]
                token = "<|tone:{}|>"
                [defaults]
                temperature = 0.7
                max_tokens = 128
                stop = ["\n"]
                [limits]
                max_input_tokens = 100
                max_tokens = 200
                [slo]
                ttft_ms = 50
                weight = 2
                max_batch = 8
                max_waiting = 9
                "#,
            ),
        ]);
        let table = TaskTable::load(dir.path(), "m").unwrap();
        assert_eq!(table.names(), ["a", "b", "m"]);
        let a = table.find("a").unwrap();
        assert_eq!(a.controls["words"].default.as_deref(), Some("20"));
        assert_eq!(a.controls["words"].kind, ControlKind::Integer { minimum: 3, maximum: 60 });
        assert_eq!(a.controls["tone"].kind.allowed(), "calm, loud");
        assert_eq!((a.defaults.temperature, a.defaults.max_tokens), (Some(0.7), Some(128)));
        assert_eq!(a.chat_template.as_deref(), Some("{{ messages[0].content }}"));
        assert_eq!(a.limits, Limits { max_input_tokens: Some(100), max_tokens: Some(200) });
        let slo = Slo { ttft_ms: Some(50.0), weight: 2.0, max_batch: 8, max_waiting: 9 };
        assert_eq!(a.slo, slo);
        assert_eq!(table.find("b").unwrap().slo, Slo::default());
    }

    #[test]
    fn all_faults_of_all_files_are_reported() {
        let dir = bundle(&[
            ("broken.toml", "x = ["),
            ("m.toml", ""),
            ("not a name.toml", ""),
            (
                "image.toml",
                r#"
                descripton = "typo"
                template = 3
                adapter = "a/b"
                [controls.words]
                kind = "integer"
                range = [60, 3]
                token = "<|words|>"
                [controls.tone]
                kind = "enum"
                values = ["calm", "calm"]
                [controls.size]
                kind = "integer"
                range = [1, 5]
                token = "<|size:{}|>"
                default = 6
                [controls.Bad]
                kind = "float"
                token = "{}"
                [defaults]
                temperature = 9.0
                max_token = 3
                max_tokens = 300
                [limits]
                max_tokens = 200
                max_input_tokens = 0
                [slo]
                weight = -1.0
                ttft = 3
                "#,
            ),
        ]);
        let faults = TaskTable::load(dir.path(), "m").unwrap_err();
        let all = faults.join("\n");
        for want in [
            "tasks/broken.toml: TOML parse error at line 1",
            "tasks/m.toml: the name is the bundle's own id",
            "tasks/not a name.toml: the name; allowed",
            "tasks/image.toml: descripton is unknown; allowed: description, template, chat_template,",
            "tasks/image.toml: template is not possible: invalid type: integer",
            "tasks/image.toml: adapter is \"a/b\"; allowed: 1 to 64 of",
            "tasks/image.toml: controls.words.range is [60, 3]; allowed",
            "tasks/image.toml: controls.words.token must hold {} once",
            "tasks/image.toml: controls.tone.values are [\"calm\", \"calm\"]",
            "tasks/image.toml: controls.tone.token is missing",
            "tasks/image.toml: controls.size.default is 6; allowed: an integer 1 to 5",
            "tasks/image.toml: controls.Bad the name; allowed",
            "tasks/image.toml: controls.Bad.kind is \"float\"; allowed: \"integer\", \"enum\"",
            "tasks/image.toml: defaults.temperature: temperature is 9; allowed: 0 to 2",
            "tasks/image.toml: defaults.max_token: unknown field",
            "tasks/image.toml: defaults.max_tokens is 300, above limits.max_tokens 200",
            "tasks/image.toml: limits.max_input_tokens is 0; allowed: 1 or more",
            "tasks/image.toml: slo.weight is -1; allowed: 0.001 to 1000",
            "tasks/image.toml: slo.ttft is unknown; allowed: ttft_ms, weight, max_batch",
        ] {
            assert!(all.contains(want), "missing: {want}\nin:\n{all}");
        }
        assert_eq!(faults.len(), 19, "{all}");
    }

    #[test]
    fn the_shipped_tasks_are_sound() {
        let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/prompter");
        let table = TaskTable::load(&bundle, "prompter").unwrap();
        let names = ["assistant", "image", "music", "template", "video", "writing", "prompter"];
        assert_eq!(table.names(), names);
        for task in table.iter().filter(|t| t.name != "prompter") {
            let literal = format!("<|task:{}|>", task.name);
            assert!(task.template.starts_with(&literal), "{}", task.name);
            assert_eq!(task.controls["words"].kind.allowed(), "an integer 3 to 60");
        }
    }
}
