//! The model's chat template: a conversation to the text that the model continues.
//!
//! A template comes with the model, so it is untrusted code. It runs with a bounded number of steps and a bounded
//! output, can load nothing, and sees nothing but the conversation.

use std::{
    io::{self, Write},
    path::Path,
    time::SystemTime,
};

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};
use minijinja_contrib::pycompat;
use serde::Serialize;

use crate::text::{self, read_capped};

/// Steps that rendering may take; a long conversation takes some thousands.
const FUEL: u64 = 2_000_000;
/// Largest output in bytes: above the largest request body.
const OUTPUT_BYTES: usize = 8 << 20;
/// Largest template, and largest `tokenizer_config.json`.
const TEMPLATE_BYTES: u64 = 4 << 20;
const NAME: &str = "chat_template";

/// One turn of a conversation, as a template sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// system, user or assistant.
    pub role: String,
    /// The text of all parts.
    pub content: String,
    /// Who speaks, where several have the same role.
    pub name: Option<String>,
    /// An earlier thought of the assistant.
    pub reasoning_content: Option<String>,
}

impl Message {
    /// As a template sees it: what is not there is undefined.
    fn value(&self) -> Value {
        let optional = [("name", &self.name), ("reasoning_content", &self.reasoning_content)];
        let optional = optional.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        Value::from_pairs([("role", &self.role), ("content", &self.content)].into_iter().chain(optional))
    }
}

/// Why a model has no usable template.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot load the chat template")]
    Read(#[from] text::Error),
    /// `tokenizer_config.json` is not JSON.
    #[error("tokenizer_config.json is not JSON")]
    Config(#[from] serde_json::Error),
    /// The template does not compile.
    #[error("the chat template does not compile")]
    Compile(#[source] Error),
}

/// Why a conversation cannot be rendered. The words may be shown to the client.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// The template refuses it, in its own words.
    #[error("the model's chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template takes too many steps.
    #[error("the model's chat template takes more than {FUEL} steps for this conversation")]
    Fuel,
    /// The template writes too much.
    #[error("the model's chat template makes more than {OUTPUT_BYTES} bytes of this conversation")]
    Output,
}

/// A compiled template with the model's special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: Vec<(&'static str, Value)>,
}

impl ChatTemplate {
    /// Loads `chat_template.jinja`, or else the one in `tokenizer_config.json`; `None` if there is none.
    ///
    /// # Errors
    /// If a file is unreadable or above its cap, or the template does not compile.
    pub fn load(dir: &Path) -> Result<Option<Self>, LoadError> {
        let config: serde_json::Value = match read_capped(dir, "tokenizer_config.json", TEMPLATE_BYTES) {
            Ok(bytes) => serde_json::from_slice(&bytes)?,
            Err(error) if missing(&error) => serde_json::Value::Null,
            Err(error) => return Err(error.into()),
        };
        let source = match read_capped(dir, "chat_template.jinja", TEMPLATE_BYTES) {
            Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if missing(&error) => named(&config["chat_template"]),
            Err(error) => return Err(error.into()),
        };
        source.map(|source| Self::compile(source, &config)).transpose()
    }

    /// Compiles a template; `config` is the content of `tokenizer_config.json`.
    ///
    /// # Errors
    /// If the template does not compile.
    pub fn compile(source: String, config: &serde_json::Value) -> Result<Self, LoadError> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_syntax(whitespace());
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source).map_err(LoadError::Compile)?;
        let tokens = ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"];
        let tokens = tokens.into_iter().map(|name| (name, Value::from(spelling(&config[name])))).collect();
        Ok(Self { environment, tokens })
    }

    /// Renders a conversation up to where the assistant speaks.
    ///
    /// # Errors
    /// If the template refuses it, or takes too many steps or makes too much text of it.
    pub fn render(&self, messages: &[Message]) -> Result<String, RenderError> {
        let tokens = Value::from_pairs(self.tokens.iter().cloned());
        let messages: Vec<Value> = messages.iter().map(Message::value).collect();
        let context = context! { messages, add_generation_prompt => true, ..tokens };
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let mut output = Capped { text: Vec::new(), full: false };
        match template.render_captured_to(context, &mut output) {
            _ if output.full => Err(RenderError::Output),
            Err(error) => Err(refused(error)),
            Ok(_) => String::from_utf8(output.text).map_err(|_| RenderError::Refused("it makes no text".into())),
        }
    }
}

/// Blocks take the white space around them, as where the templates come from.
fn whitespace() -> SyntaxConfig {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    syntax.expect("only delimiters can be wrong, and they are the usual ones")
}

/// Output up to [`OUTPUT_BYTES`].
struct Capped {
    text: Vec<u8>,
    full: bool,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > OUTPUT_BYTES {
            self.full = true;
            return Err(io::Error::other("output above its cap"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn missing(error: &text::Error) -> bool {
    matches!(error, text::Error::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

fn refused(error: Error) -> RenderError {
    match error.kind() {
        ErrorKind::OutOfFuel => RenderError::Fuel,
        _ => RenderError::Refused(error.detail().map_or_else(|| error.kind().to_string(), str::to_owned)),
    }
}

/// The template in `tokenizer_config.json`: a string, or a list of named ones of which `default` is taken.
fn named(value: &serde_json::Value) -> Option<String> {
    let default = || value.as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
    value.as_str().or_else(default).map(str::to_owned)
}

/// A special token is a string, or an object with its content.
pub(crate) fn spelling(value: &serde_json::Value) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The current day in UTC, by the directives that chat templates use.
fn strftime_now(format: String) -> Result<String, Error> {
    let days = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs() / 86_400);
    strftime(&format, days)
        .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "strftime_now knows %Y %m %d %e %B %b %A %a %y %j %%"))
}

fn strftime(format: &str, days_since_1970: u64) -> Option<String> {
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
    const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (year, day_of_year, month, day) = civil(days_since_1970);
    let (month_name, weekday) = (MONTHS[month], WEEKDAYS[(days_since_1970 % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        out += &match chars.next()? {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{:02}", month + 1),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'j' => format!("{day_of_year:03}"),
            'B' => month_name.to_owned(),
            'b' => month_name[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        };
    }
    Some(out)
}

/// Year, day of the year from 1, month from 0, day of the month from 1.
fn civil(mut days: u64) -> (u64, u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let day_of_year = days + 1;
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, day_of_year, month, days + 1)
}

/// `tojson` as Hugging Face has it: Python's spacing, no ASCII or HTML escapes.
fn to_json(value: Value, options: minijinja::value::Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed = |error: serde_json::Error| {
        Error::new(ErrorKind::InvalidOperation, "tojson cannot write this value").with_source(error)
    };
    let mut out = Vec::new();
    if let Some(indent) = indent {
        let spaces = vec![b' '; indent.min(16)];
        let pretty = serde_json::ser::PrettyFormatter::with_indent(&spaces);
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty)).map_err(failed)?;
    } else {
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonSpacing)).map_err(failed)?;
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// `{"a": 1, "b": [1, 2]}`.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into(), name: None, reasoning_content: None }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, RenderError> {
        ChatTemplate::compile(source.to_owned(), &json!({"bos_token": {"content": "<s>"}})).unwrap().render(messages)
    }

    #[test]
    fn the_template_of_the_small_model_ends_inside_a_thought() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1");
        let template = ChatTemplate::load(&dir).unwrap().unwrap();
        let turns = [message("user", "1 + 1?"), message("assistant", "thought</think>\n2"), message("user", "2 + 2?")];
        assert_eq!(
            template.render(&turns).unwrap(),
            "<｜begin▁of▁sentence｜><｜User｜>1 + 1?<｜Assistant｜>2<｜end▁of▁sentence｜><｜User｜>2 + 2?<｜Assistant｜><think>\n"
        );
    }

    #[test]
    fn a_template_in_the_tokenizer_config_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let template =
            |dir: &Path| ChatTemplate::load(dir).unwrap().map(|t| t.render(&[message("user", "x")]).unwrap());
        assert_eq!(template(dir.path()), None);
        let write = |config: serde_json::Value| {
            std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        };
        write(json!({"chat_template": "one {{ messages[0].content }}"}));
        assert_eq!(template(dir.path()).unwrap(), "one x");
        write(json!({"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]}));
        assert_eq!(template(dir.path()).unwrap(), "b");
    }

    #[test]
    fn python_methods_and_json_are_as_templates_expect() {
        let turns = [message("user", " <b> & 'é' ")];
        assert_eq!(
            render("{{ bos_token }}{{ messages[0]['content'].strip() | upper }} {{ messages | tojson }}", &turns)
                .unwrap(),
            "<s><B> & 'É' [{\"role\": \"user\", \"content\": \" <b> & 'é' \"}]"
        );
        assert_eq!(render("{{ {'a': [1]} | tojson(indent=2) }}", &turns).unwrap(), "{\n  \"a\": [\n    1\n  ]\n}");
        assert_eq!(render("{% for m in messages %}{% break %}{% endfor %}x", &turns).unwrap(), "x");
    }

    #[test]
    fn a_template_that_refuses_is_quoted() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert_eq!(error.to_string(), "the model's chat template refuses this conversation: roles must alternate");
    }

    #[test]
    fn a_template_that_does_not_end_runs_out_of_fuel() {
        let endless = "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(endless, &[]), Err(RenderError::Fuel)));
    }

    #[test]
    fn a_template_that_makes_a_gigabyte_is_cut() {
        let turns = [message("user", &"x".repeat(100_000))];
        let endless = "{% for a in range(10000) %}{{ messages[0].content }}{% endfor %}";
        assert!(matches!(render(endless, &turns), Err(RenderError::Output | RenderError::Fuel)));
        let doubling =
            "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        assert!(render(doubling, &[]).is_err());
    }

    #[test]
    fn a_template_loads_nothing_and_sees_no_attributes() {
        assert!(render("{% include '/etc/passwd' %}", &[]).is_err());
        assert!(render("{{ messages.__class__.__mro__ }}", &[]).is_err());
    }

    #[test]
    fn a_template_that_is_none_is_refused_at_load() {
        assert!(matches!(ChatTemplate::compile("{% for %}".into(), &json!({})), Err(LoadError::Compile(_))));
    }

    #[test]
    fn days_have_the_names_of_the_calendar() {
        assert_eq!(strftime("%d %b %Y, %A", 0).unwrap(), "01 Jan 1970, Thursday");
        assert_eq!(strftime("%Y-%m-%d %j %a", 19_782).unwrap(), "2024-02-29 060 Thu");
        assert_eq!(strftime("%e %B %y%%", 20_820).unwrap(), " 2 January 27%");
        assert_eq!(strftime("%H", 0), None);
    }
}
