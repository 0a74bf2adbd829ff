//! Fields of spans and events as text, in the words of [`DefaultFields`]. A span's text is made whether or not anything
//! is logged in it, so strings, which most fields are, take a short way: no colours, and one allocation for all.

use std::fmt::{self, Debug, Write as _};

use tracing::field::{Field, Visit};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{
        FormatFields,
        format::{DefaultFields, DefaultVisitor, Writer},
    },
};

/// Room for the fields of most spans.
const BYTES: usize = 512;

pub(super) struct Fields;

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> fmt::Result {
        if writer.has_ansi_escapes() {
            return DefaultFields::new().format_fields(writer, fields);
        }
        let mut text = Text(String::with_capacity(BYTES));
        fields.record(&mut text);
        writer.write_str(&text.0)
    }
}

struct Text(String);

impl Text {
    fn the_long_way(&mut self) -> DefaultVisitor<'_> {
        let is_empty = self.0.is_empty();
        DefaultVisitor::new(Writer::new(&mut self.0), is_empty)
    }
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        let name = field.name();
        if name == "message" || name.starts_with("r#") || name.starts_with("log.") {
            return self.the_long_way().record_str(field, value);
        }
        let space = if self.0.is_empty() { "" } else { " " };
        let _ = write!(self.0, "{space}{name}={value:?}"); // a string takes what comes
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.the_long_way().record_error(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.the_long_way().record_debug(field, value);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        error::Error,
        io::{self, Write},
        sync::{Arc, Mutex},
    };

    use opentelemetry_sdk::error::OTelSdkError;
    use tracing::{field::Empty, info, info_span};

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(fields: impl for<'a> FormatFields<'a> + Send + Sync + 'static, has_colours: bool) -> String {
        let log = Log::default();
        let writer = log.clone();
        let logger = tracing_subscriber::fmt().with_ansi(has_colours).without_time().fmt_fields(fields);
        tracing::subscriber::with_default(logger.with_writer(move || writer.clone()).finish(), || {
            let one = info_span!(
                "one",
                text = "\"b\"\n\u{1b}[31m",
                r#type = "t",
                number = 7,
                none = None::<&str>,
                late = Empty
            );
            let _one = one.enter();
            one.record("late", "too");
            let two = info_span!("two", late = Empty);
            let _two = two.enter();
            two.record("late", 0.5);
            let error: &dyn Error = &crate::telemetry::Error::Prometheus(OTelSdkError::AlreadyShutdown);
            info!(first = true, error, text = "x", "it \u{1b}[31m said {}", "so");
        });
        let text = log.0.lock().unwrap().clone();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn the_text_is_what_it_is_by_default() {
        for has_colours in [false, true] {
            let text = logged(Fields, has_colours);
            assert_eq!(text, logged(DefaultFields::new(), has_colours));
            assert!(text.contains("too") && text.contains("sources"), "{text}");
        }
    }
}
