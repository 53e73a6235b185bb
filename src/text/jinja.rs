//! Jinja as transformers sets it up for chat templates: what Python's strings and dicts can do, its
//! `tojson`, `raise_exception`, `strftime_now`, blocks without their line ends, undefined names that
//! are empty. Reads no file.

use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;
use std::fmt::{self, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

/// Instructions that one rendering may take: some thousand turns.
const FUEL: u64 = 1_000_000;
/// Calls of macros inside each other.
const MAX_DEPTH: usize = 100;

/// Marks what a template itself raised.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
pub struct Raised;

/// An environment without templates.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(call_method);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_DEPTH);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise);
    environment.add_function("strftime_now", |format: &str| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(format, since.as_secs())
    });
    environment
}

/// `source` with transformers' `{% generation %}` blocks, which mark what to train on, as plain ones.
pub fn without_generation(source: &str) -> String {
    let mut text = String::new();
    let mut rest = source;
    while let Some((before, (tag, after))) =
        rest.split_once("{%").and_then(|(before, rest)| Some((before, rest.split_once("%}")?)))
    {
        let word = tag.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'));
        let tag = match word {
            "generation" => tag.replace(word, "if true"),
            "endgeneration" => tag.replace(word, "endif"),
            _ => tag.into(),
        };
        text.extend([before, "{%", &tag, "%}"]);
        rest = after;
    }
    text + rest
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn raise(message: String) -> Result<Value, Error> {
    Err(invalid(message).with_source(Raised))
}

/// Methods of Python's types. `find` counts characters, and nothing occurs once more than it has
/// characters.
fn call_method(
    state: &State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let part = arguments.first().and_then(|part| part.as_str());
    let (Some(text), Some(part), 1) = (value.as_str(), part, arguments.len()) else {
        return unknown_method_callback(state, value, method, arguments);
    };
    let characters = |at: Option<usize>| at.map_or(-1, |at| text[..at].chars().count() as i64);
    Ok(match method {
        "find" => characters(text.find(part)).into(),
        "rfind" => characters(text.rfind(part)).into(),
        "count" => text.matches(part).count().into(),
        "removeprefix" => text.strip_prefix(part).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(part).unwrap_or(text).into(),
        _ => return unknown_method_callback(state, value, method, arguments),
    })
}

/// Python's `json.dumps(value, ensure_ascii=False)`.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?.map(|indent| indent.min(16));
    let separators: Option<Vec<String>> = options.get("separators")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(invalid("tojson: ensure_ascii is true; allowed: false"));
    }
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let (between, after_key) = match separators.as_deref() {
        Some([between, after_key]) => (between.clone(), after_key.clone()),
        Some(_) => return Err(invalid("tojson: separators must be two strings")),
        None => ((if indent.is_some() { "," } else { ", " }).into(), ": ".into()),
    };
    let value = serde_json::to_value(value).map_err(|e| invalid(format!("tojson: {e}")))?;
    let mut writer = JsonWriter { indent, between, after_key, sorted, text: String::new() };
    writer.value(&value, 0).map_err(|_| invalid("tojson: not possible"))?;
    Ok(writer.text)
}

/// Writes JSON as Python does.
struct JsonWriter {
    indent: Option<usize>,
    between: String,
    after_key: String,
    sorted: bool,
    text: String,
}

impl JsonWriter {
    fn value(&mut self, value: &Json, depth: usize) -> fmt::Result {
        match value {
            Json::Array(items) if !items.is_empty() => {
                let items = items.iter().map(|item| (None, item));
                self.list(['[', ']'], items.collect(), depth)
            }
            Json::Object(map) if !map.is_empty() => {
                let mut items: Vec<(Option<&String>, &Json)> =
                    map.iter().map(|(key, item)| (Some(key), item)).collect();
                if self.sorted {
                    items.sort_by_key(|(key, _)| *key);
                }
                self.list(['{', '}'], items, depth)
            }
            other => write!(self.text, "{other}"),
        }
    }

    fn list(
        &mut self,
        [open, close]: [char; 2],
        items: Vec<(Option<&String>, &Json)>,
        depth: usize,
    ) -> fmt::Result {
        self.text.push(open);
        for (i, (key, item)) in items.into_iter().enumerate() {
            if i > 0 {
                self.text.push_str(&self.between);
            }
            self.line(depth + 1);
            if let Some(key) = key {
                write!(self.text, "{}", Json::from(key.as_str()))?;
                self.text.push_str(&self.after_key);
            }
            self.value(item, depth + 1)?;
        }
        self.line(depth);
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Python's `strftime` for these seconds since 1970, in UTC.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[((days + 4) % 7) as usize]);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => text += &year.to_string(),
            Some('y') => text += &format!("{:02}", year % 100),
            Some('m') => text += &format!("{month:02}"),
            Some('B') => text += month_name,
            Some('b') => text += &month_name[..3],
            Some('d') => text += &format!("{day:02}"),
            Some('A') => text += day_name,
            Some('a') => text += &day_name[..3],
            Some('H') => text += &format!("{hour:02}"),
            Some('I') => text += &format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => text += if hour < 12 { "AM" } else { "PM" },
            Some('M') => text += &format!("{minute:02}"),
            Some('S') => text += &format!("{second:02}"),
            Some('F') => text += &format!("{year}-{month:02}-{day:02}"),
            Some('T') => text += &format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => text.push('%'),
            other => {
                let other = other.map_or(String::new(), String::from);
                let allowed = "Y y m B b d A a H I p M S F T %";
                return Err(invalid(format!("strftime_now: %{other}; allowed: {allowed}")));
            }
        }
    }
    Ok(text)
}

/// Year, month and day of a day since 1970-01-01, counted in eras of 400 years that begin in March.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(source: &str) -> Result<String, Error> {
        environment().render_str(source, ())
    }

    #[test]
    fn dates_are_pythons() {
        for (seconds, want) in [
            (0, "1970-01-01 Thursday 12 AM"),
            (951_782_400, "2000-02-29 Tuesday 12 AM"),
            (1_735_689_599, "2024-12-31 Tuesday 11 PM"),
            (1_795_428_000, "2026-11-23 Monday 10 AM"),
        ] {
            assert_eq!(strftime("%F %A %I %p", seconds).unwrap(), want);
        }
        assert_eq!(
            strftime("%d %b %Y %a %y %H:%M:%S %%", 86_399).unwrap(),
            "01 Jan 1970 Thu 70 23:59:59 %"
        );
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q; allowed: Y y"));
        assert!(strftime("%", 0).is_err());
        assert_eq!(eval("{{ strftime_now('%Y') | length }}").unwrap(), "4");
    }

    #[test]
    fn json_is_pythons() {
        for (options, want) in [
            ("", r#"{"b": [1, "é"], "a": {}}"#),
            ("sort_keys=true", r#"{"a": {}, "b": [1, "é"]}"#),
            ("separators=(',', ':')", r#"{"b":[1,"é"],"a":{}}"#),
            ("indent=1", "{\n \"b\": [\n  1,\n  \"é\"\n ],\n \"a\": {}\n}"),
        ] {
            let source = format!("{{{{ {{'b': [1, 'é'], 'a': {{}}}} | tojson({options}) }}}}");
            assert_eq!(eval(&source).unwrap(), want);
        }
        for options in ["ensure_ascii=true", "separators=['']", "colour=1"] {
            assert!(eval(&format!("{{{{ 1 | tojson({options}) }}}}")).is_err(), "{options}");
        }
    }

    #[test]
    fn strings_are_pythons() {
        for (source, want) in [
            ("'né|n'.find('|')", "2"),
            ("'nén'.rfind('n')", "2"),
            ("'abc'.count('')", "4"),
            ("'aXb'.removeprefix('a').removesuffix('b')", "X"),
            ("[true, none, 1]", "[True, None, 1]"),
            ("true", "True"),
            ("1", "1"),
            ("0", "0"),
            ("none", "None"),
            ("missing", ""),
            ("missing.further", "!"),
        ] {
            let got = eval(&format!("{{{{ {source} }}}}")).unwrap_or("!".into());
            assert_eq!(got, want, "{source}");
        }
    }

    #[test]
    fn generation_blocks_are_plain_blocks() {
        for (source, want) in [
            ("a{%- generation -%} b {% endgeneration %}c", "a{%- if true -%} b {% endif %}c"),
            ("{% if generation %}{{ generation }}", "{% if generation %}{{ generation }}"),
            ("{% generation", "{% generation"),
        ] {
            assert_eq!(without_generation(source), want);
        }
    }
}
