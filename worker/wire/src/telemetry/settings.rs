//! What the standard `OTEL_*` variables say: which signals are exported, and over which protocol.
//!
//! As OpenTelemetry specifies, an empty value is none, a signal's own variable goes before the common one, and a value
//! that cannot be honoured is told and passed over.

use std::{env, fmt, net::IpAddr, path::PathBuf, time::Duration};

use http::Uri;
use tracing::warn;

/// What the specification gives an export.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// What is exported.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Signal {
    Traces,
    Metrics,
    Logs,
}

/// How it is exported.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Protocol {
    Grpc,
    HttpProtobuf,
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Traces => "traces",
            Self::Metrics => "metrics",
            Self::Logs => "logs",
        })
    }
}

/// Variables by name.
pub(super) struct Settings<F = fn(&str) -> Option<String>>(F);

impl Settings {
    /// Those of this process.
    pub(super) fn of_process() -> Self {
        Self(|name| env::var(name).ok())
    }
}

impl<F: Fn(&str) -> Option<String>> Settings<F> {
    /// How a signal is exported, or `None` if it is not: it needs an endpoint, or `otlp` among its exporters.
    pub(super) fn export(&self, signal: Signal) -> Option<Protocol> {
        if self.is_disabled() {
            return None;
        }
        let named = self.exporters(signal);
        let asked = match named.as_slice() {
            [] => self.either(signal, "ENDPOINT").is_some(),
            _ => named.iter().any(|name| name == "otlp"),
        };
        asked.then(|| self.protocol(signal))
    }

    /// Whether the collector is on this machine, by its address or as `localhost`.
    pub(super) fn is_local(&self, signal: Signal) -> bool {
        let endpoint = self.either(signal, "ENDPOINT").and_then(|endpoint| endpoint.parse::<Uri>().ok());
        let host = endpoint.as_ref().and_then(Uri::host).unwrap_or("localhost");
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        address.map_or(host == "localhost", |address| address.is_loopback())
    }

    /// How long one export may take.
    pub(super) fn timeout(&self, signal: Signal) -> Duration {
        let millis = self.of(signal, "TIMEOUT").into_iter().find_map(|(name, value)| {
            let millis = value.parse().ok();
            if millis.is_none() {
                warn!(name, value, "passed over: it takes milliseconds");
            }
            millis
        });
        millis.map_or(DEFAULT_TIMEOUT, Duration::from_millis)
    }

    /// The file that `CERTIFICATE`, `CLIENT_CERTIFICATE` or `CLIENT_KEY` names.
    pub(super) fn file(&self, signal: Signal, suffix: &str) -> Option<PathBuf> {
        self.either(signal, suffix).map(PathBuf::from)
    }

    fn is_disabled(&self) -> bool {
        const NAME: &str = "OTEL_SDK_DISABLED";
        let value = self.get(NAME).unwrap_or_default().to_lowercase();
        if !matches!(value.as_str(), "" | "true" | "false") {
            warn!(name = NAME, value, "passed over: it takes true or false");
        }
        value == "true"
    }

    fn exporters(&self, signal: Signal) -> Vec<String> {
        let name = format!("OTEL_{}_EXPORTER", signal.to_string().to_uppercase());
        let value = self.get(&name).unwrap_or_default().to_lowercase();
        let known = |exporter: &str| match (exporter, signal) {
            ("otlp" | "none", _) | ("prometheus", Signal::Metrics) => true,
            _ => {
                warn!(name, value = exporter, "passed over: it takes otlp or none, and prometheus for metrics");
                false
            }
        };
        value.split(',').map(str::trim).filter(|part| !part.is_empty() && known(part)).map(str::to_owned).collect()
    }

    fn protocol(&self, signal: Signal) -> Protocol {
        let spoken = self.of(signal, "PROTOCOL").into_iter().find_map(|(name, value)| {
            let protocol = match value.to_lowercase().as_str() {
                "grpc" => Some(Protocol::Grpc),
                "http/protobuf" => Some(Protocol::HttpProtobuf),
                _ => None,
            };
            if protocol.is_none() {
                warn!(name, value, "passed over: it takes grpc or http/protobuf");
            }
            protocol
        });
        spoken.unwrap_or(Protocol::Grpc)
    }

    fn either(&self, signal: Signal, suffix: &str) -> Option<String> {
        self.of(signal, suffix).into_iter().next().map(|(_, value)| value)
    }

    /// The variables of an exporter that are set, the signal's own first.
    fn of(&self, signal: Signal, suffix: &str) -> Vec<(String, String)> {
        let own = format!("OTEL_EXPORTER_OTLP_{}_{suffix}", signal.to_string().to_uppercase());
        let common = format!("OTEL_EXPORTER_OTLP_{suffix}");
        [own, common].into_iter().filter_map(|name| self.get(&name).map(|value| (name, value))).collect()
    }

    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use Protocol::{Grpc, HttpProtobuf};
    use Signal::{Logs, Metrics, Traces};

    use super::*;

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317");

    fn settings(variables: &[(&'static str, &'static str)]) -> Settings<impl Fn(&str) -> Option<String>> {
        Settings(move |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn nothing_is_exported_unless_an_endpoint_or_the_exporter_is_named() {
        let cases: [(&[_], _); 6] = [
            (&[], [None; 3]),
            (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")], [None; 3]),
            (&[ENDPOINT], [Some(Grpc); 3]),
            (&[("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://c:4317")], [None, None, Some(Grpc)]),
            (&[("OTEL_TRACES_EXPORTER", "otlp")], [Some(Grpc), None, None]),
            (&[("OTEL_METRICS_EXPORTER", "prometheus, otlp")], [None, Some(Grpc), None]),
        ];
        for (variables, exported) in cases {
            let settings = settings(variables);
            assert_eq!([Traces, Metrics, Logs].map(|signal| settings.export(signal)), exported, "{variables:?}");
        }
    }

    #[test]
    fn standard_variables_turn_signals_off() {
        let cases: [(_, _); 5] = [
            (("OTEL_TRACES_EXPORTER", "none"), [None, Some(Grpc), Some(Grpc)]),
            (("OTEL_METRICS_EXPORTER", "Prometheus"), [Some(Grpc), None, Some(Grpc)]),
            (("OTEL_SDK_DISABLED", "True"), [None; 3]),
            (("OTEL_SDK_DISABLED", "yes"), [Some(Grpc); 3]),
            (("OTEL_LOGS_EXPORTER", "console"), [Some(Grpc); 3]),
        ];
        for (variable, exported) in cases {
            let variables = [ENDPOINT, variable];
            let settings = settings(&variables);
            assert_eq!([Traces, Metrics, Logs].map(|signal| settings.export(signal)), exported, "{variable:?}");
        }
    }

    #[test]
    fn the_protocol_of_a_signal_goes_before_the_common_one_if_we_speak_it() {
        let cases: [(&[_], _); 5] = [
            (&[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")], HttpProtobuf),
            (&[("OTEL_EXPORTER_OTLP_PROTOCOL", "HTTP/Protobuf")], HttpProtobuf),
            (&[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")], Grpc),
            (&[("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")], Grpc),
            (
                &[("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "thrift"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")],
                HttpProtobuf,
            ),
        ];
        for (variables, protocol) in cases {
            let variables: Vec<_> = variables.iter().copied().chain([ENDPOINT]).collect();
            assert_eq!(settings(&variables).export(Traces), Some(protocol), "{variables:?}");
        }
    }

    #[test]
    fn a_collector_on_this_machine_is_known_as_one() {
        let cases = [
            ("http://localhost:4318", true),
            ("http://127.0.0.2:4318/v1/traces", true),
            ("http://[::1]:4318", true),
            ("http://collector:4318", false),
            ("https://10.0.0.1", false),
        ];
        for (endpoint, local) in cases {
            let variables = [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint), ENDPOINT];
            assert_eq!(settings(&variables).is_local(Traces), local, "{endpoint}");
        }
        assert!(settings(&[]).is_local(Traces), "the default is localhost");
    }

    #[test]
    fn a_timeout_is_in_milliseconds_and_one_that_is_none_is_passed_over() {
        let cases: [(&[_], _); 3] = [
            (&[], 10_000),
            (&[("OTEL_EXPORTER_OTLP_TIMEOUT", "250")], 250),
            (&[("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1s"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "250")], 250),
        ];
        for (variables, millis) in cases {
            assert_eq!(settings(variables).timeout(Traces), Duration::from_millis(millis), "{variables:?}");
        }
    }
}
