//! Where an argument's value comes from: flag, environment, file, default.
//!
//! Works on any clap command: an argument's id is its key in the file and, in capitals behind
//! `SHOAL_`, its environment variable. Values of the environment and the file become defaults of the
//! argument, so that clap reads every value the same way.

use clap::builder::OsStringValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use toml::{Table, Value};

/// Environment variables; tests hand in their own.
pub type Environment = BTreeMap<String, String>;

/// The file with further values; its flag is `--config`.
const FILE: &str = "config_file";
const FILE_VARIABLE: &str = "SHOAL_CONFIG";
const PRINT: &str = "print_config";
/// Variables that others set, read where ours is absent.
const ALIASES: &[(&str, &str)] = &[
    ("port", "PORT"),
    ("log", "RUST_LOG"),
    ("api_keys", "SHOAL_API_KEY"),
    ("otlp_endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    ("otlp_service_name", "OTEL_SERVICE_NAME"),
];

/// Why there is nothing to run.
#[derive(Debug)]
pub enum Stop {
    /// Help, the version or the configuration was asked for: this is it.
    Say(String),
    /// Everything that is wrong with the arguments and their other sources.
    Faults(Vec<String>),
}

/// The variables of this process that are Unicode.
pub fn environment() -> Environment {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Parses `argv` with `command`, whose subcommands get their other sources of values, `--config` and
/// `--print-config`. A subcommand with a `--config` of its own reads no file.
pub fn resolve(
    command: Command,
    argv: &[OsString],
    environment: &Environment,
) -> Result<ArgMatches, Stop> {
    let command = command.mut_subcommands(add_flags);
    let lenient = command.clone().mut_subcommands(accept_anything);
    let given = match lenient.try_get_matches_from(argv) {
        Ok(given) => given,
        // The same again, in the words of the command as it is.
        Err(error) => return Err(usage(command.try_get_matches_from(argv).err().unwrap_or(error))),
    };
    let Some((name, given)) = given.subcommand() else {
        return command.try_get_matches_from(argv).map_err(usage);
    };
    let sub = command.find_subcommand(name).expect("it was just parsed").clone();
    let mut faults = Vec::new();
    let file = File::read(&command, &sub, given, environment, &mut faults);
    let mut defaults = BTreeMap::new();
    for arg in sub.get_arguments() {
        let Some(found) = find(arg, given, environment, &file) else { continue };
        match check(&sub, arg, &found) {
            Err(fault) => faults.push(fault),
            Ok(()) if found.is_default => {
                defaults.insert(arg.get_id().to_string(), found.values);
            }
            Ok(()) => {}
        }
    }
    if !faults.is_empty() {
        return Err(Stop::Faults(faults));
    }
    let with_defaults = |arg: Arg| match defaults.get(arg.get_id().as_str()) {
        Some(values) => arg.required(false).default_values(values.clone()),
        None => arg,
    };
    let command = command.mut_subcommand(name, |sub| sub.mut_args(with_defaults));
    let matches = command.try_get_matches_from(argv).map_err(usage)?;
    match matches.subcommand() {
        Some((_, matches)) if matches.get_flag(PRINT) => Err(Stop::Say(print(&sub, matches))),
        _ => Ok(matches),
    }
}

fn add_flags(command: Command) -> Command {
    let own_config = command.get_arguments().any(|arg| arg.get_long() == Some("config"));
    let command = command.arg(
        Arg::new(PRINT)
            .long("print-config")
            .action(ArgAction::SetTrue)
            .help("Print what the configuration comes to, as TOML, and end"),
    );
    if own_config {
        return command;
    }
    command.arg(Arg::new(FILE).long("config").value_name("FILE").help(
        "TOML file with values for flags that are not given [environment: SHOAL_CONFIG; every \
         other flag has such a variable too]",
    ))
}

fn is_flag(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

/// Whether the argument is about configuration, not a part of it.
fn is_ours(id: &str) -> bool {
    id == FILE || id == PRINT
}

/// The same arguments, with no demands on their values.
fn accept_anything(command: Command) -> Command {
    command.mut_args(|arg| {
        let arg = arg.required(false);
        if is_flag(&arg) { arg } else { arg.value_parser(OsStringValueParser::new()) }
    })
}

fn usage(error: clap::Error) -> Stop {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Stop::Say(error.to_string()),
        _ => {
            let text = error.to_string();
            let text = text.trim_start_matches("error: ").trim_end();
            Stop::Faults(vec![text.to_string()])
        }
    }
}

/// A value that was found before the argument's own default.
struct Found {
    /// The flag, variable or key.
    place: String,
    values: Vec<String>,
    /// Whether clap has to be told.
    is_default: bool,
}

fn find(arg: &Arg, given: &ArgMatches, environment: &Environment, file: &File) -> Option<Found> {
    let id = arg.get_id().as_str();
    if given.value_source(id) == Some(ValueSource::CommandLine) {
        let values = match is_flag(arg) {
            true => vec!["true".into()],
            false => given.get_raw(id)?.map(|v| v.to_string_lossy().into_owned()).collect(),
        };
        let place = arg.get_long().map_or_else(|| id.to_uppercase(), |long| format!("--{long}"));
        return Some(Found { place, values, is_default: false });
    }
    if is_ours(id) {
        return None;
    }
    let variable = |name: &str| {
        let value = environment.get(name).filter(|value| !value.is_empty())?;
        // Kubernetes sets SHOAL_PORT to an address where a Service is called shoal.
        if id == "port" && value.starts_with("tcp://") {
            return None;
        }
        Some(Found { place: name.into(), values: vec![value.clone()], is_default: true })
    };
    let alias = || ALIASES.iter().find(|(alias, _)| *alias == id).and_then(|(_, v)| variable(v));
    let own = format!("SHOAL_{}", id.to_uppercase());
    // A command's own --config is not the file that this variable names for all commands.
    let own = Some(own).filter(|own| own != FILE_VARIABLE);
    own.and_then(|own| variable(&own)).or_else(alias).or_else(|| file.find(id))
}

/// The keys of the file, as text.
#[derive(Default)]
struct File {
    path: String,
    values: BTreeMap<String, Vec<String>>,
}

impl File {
    fn read(
        command: &Command,
        sub: &Command,
        given: &ArgMatches,
        environment: &Environment,
        faults: &mut Vec<String>,
    ) -> Self {
        if !sub.get_arguments().any(|arg| arg.get_id() == FILE) {
            return Self::default();
        }
        let flag = given.get_raw(FILE).and_then(|mut v| v.next()).map(OsString::from);
        let variable = || environment.get(FILE_VARIABLE).filter(|v| !v.is_empty());
        let Some(path) = flag.or_else(|| variable().map(OsString::from)) else {
            return Self::default();
        };
        let mut file = Self { path: path.to_string_lossy().into_owned(), ..Self::default() };
        let text = fs::read_to_string(&path).map_err(|e| e.to_string());
        let table = text.and_then(|text| text.parse::<Table>().map_err(|e| at_line(&text, &e)));
        let table = table.unwrap_or_else(|e| {
            faults.push(format!("{}: {e}", file.path));
            Table::new()
        });
        let ids = |c: &Command| -> Vec<String> {
            c.get_arguments().map(|a| a.get_id().to_string()).filter(|id| !is_ours(id)).collect()
        };
        let known: BTreeSet<String> = command.get_subcommands().flat_map(ids).collect();
        for (key, value) in table {
            match texts(&value) {
                _ if !known.contains(&key) => {
                    let allowed = ids(sub).join(", ");
                    faults.push(format!("{}: {key} is unknown; allowed: {allowed}", file.path));
                }
                Some(values) => {
                    file.values.insert(key, values);
                }
                None => faults.push(format!("{}: {key} must be a value or a list", file.path)),
            }
        }
        file
    }

    fn find(&self, id: &str) -> Option<Found> {
        let values = self.values.get(id)?.clone();
        Some(Found { place: format!("{}: {id}", self.path), values, is_default: true })
    }
}

/// What is wrong with a file's syntax, and in which line. Not the line itself: it may hold a key.
fn at_line(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    format!("line {}: {}", before.matches('\n').count() + 1, error.message())
}

/// A TOML value as it would be written after a flag.
fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(items) => {
            items.iter().map(|v| texts(v).filter(|t| t.len() == 1)?.pop()).collect()
        }
        Value::Table(_) => None,
        other => Some(vec![other.to_string()]),
    }
}

/// Whether the argument takes these values; the error says what it takes.
fn check(sub: &Command, arg: &Arg, found: &Found) -> Result<(), String> {
    // What is hidden is a secret.
    let value = if arg.is_hide_set() { "not possible".into() } else { found.values.join(", ") };
    let fault = |reason: &str| Err(format!("{} is {value}: {reason}", found.place));
    if is_flag(arg) {
        return match found.values.as_slice() {
            [value] if value == "true" || value == "false" => Ok(()),
            _ => fault("allowed: true, false"),
        };
    }
    let mut argv = vec!["shoal".to_string()];
    match arg.get_long() {
        Some(long) => argv.extend(found.values.iter().map(|v| format!("--{long}={v}"))),
        None => argv.extend(std::iter::once("--".into()).chain(found.values.iter().cloned())),
    }
    let alone = sub.clone().mut_args(|arg| arg.required(false));
    let Err(error) = alone.try_get_matches_from(argv) else { return Ok(()) };
    let valid = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) => format!("allowed: {}", values.join(", ")),
        _ => error.source().map_or_else(|| error.kind().to_string(), ToString::to_string),
    };
    fault(&valid)
}

/// What the arguments came to, as a file that `--config` reads.
fn print(sub: &Command, matches: &ArgMatches) -> String {
    let mut text = String::new();
    for arg in sub.get_arguments() {
        let id = arg.get_id().as_str();
        // What is hidden is a secret.
        if is_ours(id) || arg.is_hide_set() {
            continue;
        }
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let values: Vec<Value> = match is_flag(arg) {
            true => vec![matches.get_flag(id).into()],
            false => matches
                .get_raw(id)
                .map(|raw| raw.map(|v| typed(&v.to_string_lossy())).collect())
                .unwrap_or_default(),
        };
        let several = matches!(arg.get_action(), ArgAction::Append);
        let line = match values.as_slice() {
            [] => format!("# {id} ="),
            [value] if !several => format!("{id} = {value}"),
            values => format!("{id} = {}", Value::from(values.to_vec())),
        };
        let _ = writeln!(text, "# {help}\n{line}\n");
    }
    text.truncate(text.trim_end().len());
    text + "\n"
}

/// A value as TOML: bare where it can be.
fn typed(text: &str) -> Value {
    if let Ok(number) = text.parse::<i64>() {
        return number.into();
    }
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => number.into(),
        _ => text.parse::<bool>().map_or_else(|_| text.into(), Value::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Dtype, Serve};
    use clap::{Args, FromArgMatches, Parser};

    #[derive(Parser, Debug)]
    #[command(name = "shoal", version)]
    enum Cli {
        /// Serves.
        Serve(Box<Serve>),
        /// Lists.
        Other(Other),
        /// Follows a recipe.
        Make(Make),
    }

    #[derive(Args, Debug)]
    struct Make {
        #[arg(long)]
        config: Option<String>,
        #[arg(long, default_value_t = 1)]
        steps: u32,
    }

    #[derive(Args, Debug, PartialEq)]
    struct Other {
        url: String,
        #[arg(long)]
        eager: bool,
        #[arg(long, value_delimiter = ',', default_value = "1,2")]
        many: Vec<u32>,
        #[arg(long, conflicts_with = "many")]
        rate: Option<f64>,
    }

    fn run(argv: &[&str], environment: &[(&str, &str)]) -> Result<Cli, Stop> {
        let argv: Vec<OsString> = ["shoal"].iter().chain(argv).map(OsString::from).collect();
        let environment = environment.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let matches = resolve(<Cli as clap::CommandFactory>::command(), &argv, &environment)?;
        Ok(Cli::from_arg_matches(&matches).expect("resolve has parsed them"))
    }

    fn serve(argv: &[&str], environment: &[(&str, &str)]) -> Serve {
        match run(&[&["serve"], argv].concat(), environment).unwrap() {
            Cli::Serve(serve) => *serve,
            _ => unreachable!("the command is serve"),
        }
    }

    fn faults(argv: &[&str], environment: &[(&str, &str)]) -> Vec<String> {
        match run(argv, environment) {
            Err(Stop::Faults(faults)) => faults,
            other => panic!("not refused: {other:?}"),
        }
    }

    fn said(argv: &[&str], environment: &[(&str, &str)]) -> String {
        match run(argv, environment) {
            Err(Stop::Say(text)) => text,
            other => panic!("nothing said: {other:?}"),
        }
    }

    #[test]
    fn flag_over_environment_over_file_over_default() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "port = 3\nhost = \"::1\"\ndtype = \"f32\"\nmany = [7]\nkeep_alive = 0.5\n";
        fs::write(&file, text).unwrap();
        let path = file.path().to_str().unwrap();
        let port = |argv: &[&str], environment: &[(&str, &str)]| serve(argv, environment).port;
        let config = ("SHOAL_CONFIG", path);
        assert_eq!(port(&[], &[]), 8000);
        assert_eq!(port(&[], &[config]), 3);
        assert_eq!(port(&["--config", path], &[]), 3);
        assert_eq!(port(&[], &[config, ("PORT", "4")]), 4);
        assert_eq!(port(&[], &[config, ("PORT", "4"), ("SHOAL_PORT", "5")]), 5);
        assert_eq!(port(&["--port", "6"], &[config, ("SHOAL_PORT", "5")]), 6);
        let all = serve(&["else/where"], &[config, ("SHOAL_BUNDLE", "x"), ("SHOAL_DTYPE", "bf16")]);
        assert_eq!((all.bundle.to_str(), all.host.as_str()), (Some("else/where"), "::1"));
        assert_eq!(all.compute.dtype, Dtype::Bf16);
        assert_eq!(all.keep_alive.as_millis(), 500);
        assert_eq!(serve(&[], &[("SHOAL_BUNDLE", "x")]).bundle.to_str(), Some("x"));
    }

    #[test]
    fn variables_that_are_not_meant_for_us_are_left_alone() {
        let kubernetes = ("SHOAL_PORT", "tcp://10.0.0.1:8000");
        assert_eq!(serve(&[], &[kubernetes, ("SHOAL_SERVICE_HOST", "x")]).port, 8000);
        assert_eq!(serve(&[], &[("SHOAL_THREADS", "")]).compute.threads, None);
    }

    #[test]
    fn a_recipe_is_not_the_file_of_flags() {
        let environment = [("SHOAL_CONFIG", "/no/server.toml"), ("SHOAL_STEPS", "7")];
        let Ok(Cli::Make(make)) = run(&["make"], &environment) else { panic!("not parsed") };
        assert_eq!((make.config, make.steps), (None, 7));
        let Ok(Cli::Make(make)) = run(&["make", "--config", "a.toml"], &environment) else {
            panic!("not parsed")
        };
        assert_eq!(make.config.as_deref(), Some("a.toml"));
    }

    #[test]
    fn all_faults_of_all_sources_are_reported_at_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "prot = 3\nlog = \"a=b=c\"\nhost = { a = 1 }\nurl = \"fine\"\n").unwrap();
        let path = file.path().to_str().unwrap();
        let environment = [("SHOAL_PORT", "70000"), ("SHOAL_DTYPE", "f8"), ("SHOAL_MAX_ROWS", "0")];
        let argv =
            ["serve", "--config", path, "--keep-alive", "soon", "--served-model-name", "a b"];
        let all = faults(&argv, &environment).join("\n");
        for want in [
            "prot is unknown; allowed: bundle, host, port,",
            "host must be a value or a list",
            ": log is a=b=c: ",
            "SHOAL_PORT is 70000: 70000 is not in 0..=65535",
            "SHOAL_DTYPE is f8: allowed: auto, f32, bf16",
            "SHOAL_MAX_ROWS is 0: 0 is not in 1..=65536",
            "--keep-alive is soon: allowed: seconds",
            "--served-model-name is a b: allowed: 1 to 64",
        ] {
            assert!(all.contains(want), "missing: {want}\nin:\n{all}");
        }
        assert_eq!(all.lines().count(), 8, "{all}");
        assert!(faults(&["serve", "--config", "/none"], &[])[0].starts_with("/none: "));
        assert!(faults(&["serve", "--prot", "1"], &[])[0].contains("--prot"));
        assert!(faults(&["other"], &[])[0].contains("<URL>"));
        assert_eq!(faults(&[], &[]).len(), 1);
    }

    #[test]
    fn every_command_has_every_source() {
        let other = |argv: &[&str], environment: &[(&str, &str)]| match run(argv, environment) {
            Ok(Cli::Other(other)) => other,
            result => panic!("{result:?}"),
        };
        let plain = Other { url: "u".into(), eager: false, many: vec![1, 2], rate: None };
        assert_eq!(other(&["other", "u"], &[]), plain);
        let environment = [("SHOAL_URL", "v"), ("SHOAL_EAGER", "true"), ("SHOAL_MANY", "4,5")];
        let want = Other { url: "v".into(), eager: true, many: vec![4, 5], rate: Some(2.0) };
        assert_eq!(other(&["other", "--rate", "2"], &environment), want);
        assert_eq!(
            faults(&["other", "u"], &[("SHOAL_EAGER", "yes")]),
            ["SHOAL_EAGER is yes: allowed: true, false"]
        );
        let help = said(&["other", "--help"], &[]);
        assert!(help.contains("--print-config") && help.contains(" <URL>"), "{help}");
        assert!(said(&["--version"], &[]).starts_with("shoal "));
    }

    #[test]
    fn the_printed_configuration_reads_back_as_itself() {
        let argv = ["serve", "b", "--port", "9", "--keep-alive", "0.25", "--host", "1"];
        let printed = said(&[&argv[..], &["--print-config"]].concat(), &[]);
        assert!(printed.contains("# Port to listen on"), "{printed}");
        assert!(
            printed.contains("\nport = 9\n") && printed.contains("\n# threads =\n"),
            "{printed}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, &printed).unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(said(&["serve", "--config", path, "--print-config"], &[]), printed);
        let many = said(&["other", "u", "--print-config"], &[]);
        assert!(many.contains("many = [1, 2]") && many.contains("eager = false"), "{many}");
    }
}
