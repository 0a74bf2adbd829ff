//! OpenTelemetry's semantic conventions for generative AI: names, attributes and buckets, shared by router and worker.
//!
//! # Source
//! <https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/>, with the bucket boundaries it advises.

use opentelemetry::{
    KeyValue,
    metrics::{Histogram, Meter},
};

/// Attribute: what was asked for, [`CHAT`] or [`TEXT_COMPLETION`].
pub const OPERATION_NAME: &str = "gen_ai.operation.name";
/// Attribute: who answers, always [`PROVIDER`].
pub const PROVIDER_NAME: &str = "gen_ai.provider.name";
/// Attribute: the model, `NAMESPACE/NAME`.
pub const REQUEST_MODEL: &str = "gen_ai.request.model";
/// Attribute of [`TOKEN_USAGE`]: [`INPUT`] or [`OUTPUT`].
pub const TOKEN_TYPE: &str = "gen_ai.token.type";
/// Attribute: why a request failed; absent if it did not.
pub const ERROR_TYPE: &str = "error.type";

/// Value of [`OPERATION_NAME`].
pub const CHAT: &str = "chat";
/// Value of [`OPERATION_NAME`].
pub const TEXT_COMPLETION: &str = "text_completion";
/// Value of [`PROVIDER_NAME`].
pub const PROVIDER: &str = "modelfleet";
/// Value of [`TOKEN_TYPE`].
pub const INPUT: &str = "input";
/// Value of [`TOKEN_TYPE`].
pub const OUTPUT: &str = "output";

/// Histogram, seconds: from a request's arrival to its last byte.
pub const REQUEST_DURATION: &str = "gen_ai.server.request.duration";
/// Histogram, seconds: from a request's arrival to its first token.
pub const TIME_TO_FIRST_TOKEN: &str = "gen_ai.server.time_to_first_token";
/// Histogram, seconds: between tokens, the first one excepted.
pub const TIME_PER_OUTPUT_TOKEN: &str = "gen_ai.server.time_per_output_token";
/// Histogram, tokens: how many a request took and gave.
pub const TOKEN_USAGE: &str = "gen_ai.client.token.usage";

const DURATIONS: [f64; 14] = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const FIRST_TOKENS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const OUTPUT_TOKENS: [f64; 13] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const USAGES: [f64; 14] = [
    1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0, 16777216.0,
    67108864.0,
];

/// The four instruments.
#[derive(Clone, Debug)]
pub struct Instruments {
    duration: Histogram<f64>,
    first_token: Histogram<f64>,
    output_token: Histogram<f64>,
    usage: Histogram<u64>,
}

/// What one request came to. Times are in seconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome<'a> {
    /// [`CHAT`] or [`TEXT_COMPLETION`].
    pub operation: &'static str,
    /// `NAMESPACE/NAME`, never what the client wrote: labels are bounded.
    pub model: &'a str,
    /// From arrival to end.
    pub duration: f64,
    /// From arrival to the first token, if there was one.
    pub first_token: Option<f64>,
    /// Tokens taken and given, if known.
    pub usage: Option<(u64, u64)>,
    /// Why it failed; `None` if it did not.
    pub error: Option<&'a str>,
}

impl Instruments {
    /// Makes the instruments of `meter`.
    pub fn new(meter: &Meter) -> Self {
        let seconds = |name, boundaries: &[f64], description| {
            meter
                .f64_histogram(name)
                .with_unit("s")
                .with_boundaries(boundaries.to_vec())
                .with_description(description)
                .build()
        };
        Self {
            duration: seconds(REQUEST_DURATION, &DURATIONS, "From a request's arrival to its last byte"),
            first_token: seconds(TIME_TO_FIRST_TOKEN, &FIRST_TOKENS, "From a request's arrival to its first token"),
            output_token: seconds(TIME_PER_OUTPUT_TOKEN, &OUTPUT_TOKENS, "Between tokens, the first one excepted"),
            usage: meter
                .u64_histogram(TOKEN_USAGE)
                .with_unit("{token}")
                .with_boundaries(USAGES.to_vec())
                .with_description("Tokens that a request took and gave")
                .build(),
        }
    }

    /// Records one request, once it has ended.
    pub fn record(&self, outcome: &Outcome<'_>) {
        let mut labels = Vec::with_capacity(4);
        labels.extend([
            KeyValue::new(OPERATION_NAME, outcome.operation),
            KeyValue::new(PROVIDER_NAME, PROVIDER),
            KeyValue::new(REQUEST_MODEL, outcome.model.to_owned()),
        ]);
        if let Some(first) = outcome.first_token {
            self.first_token.record(first, &labels);
        }
        if let (Some(first), Some((_, output @ 2..))) = (outcome.first_token, outcome.usage) {
            self.output_token.record((outcome.duration - first) / (output - 1) as f64, &labels);
        }
        if let Some((input, output)) = outcome.usage {
            for (kind, tokens) in [(INPUT, input), (OUTPUT, output)] {
                labels.push(KeyValue::new(TOKEN_TYPE, kind));
                self.usage.record(tokens, &labels);
                labels.pop();
            }
        }
        labels.extend(outcome.error.map(|error| KeyValue::new(ERROR_TYPE, error.to_owned())));
        self.duration.record(outcome.duration, &labels);
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::metrics::MeterProvider as _;
    use opentelemetry_sdk::metrics::SdkMeterProvider;
    use prometheus::{Registry, TextEncoder};

    use super::*;

    #[test]
    fn a_request_is_counted_under_the_names_of_the_conventions() {
        let registry = Registry::new();
        let reader = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().unwrap();
        let provider = SdkMeterProvider::builder().with_reader(reader).build();
        let instruments = Instruments::new(&provider.meter("test"));
        let outcome = Outcome {
            operation: CHAT,
            model: "ns/m",
            duration: 1.5,
            first_token: Some(0.5),
            usage: Some((7, 11)),
            error: None,
        };
        instruments.record(&outcome);
        instruments.record(&Outcome { first_token: None, usage: None, error: Some("queue_full"), ..outcome });

        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let value = |name: &str, label: &str| {
            let line = text.lines().find(|line| line.starts_with(name) && line.contains(label));
            line.unwrap_or_else(|| panic!("no {name} {label} in\n{text}")).rsplit(' ').next().unwrap().to_owned()
        };
        assert_eq!(value("gen_ai_server_request_duration_seconds_sum", "error_type=\"queue_full\""), "1.5");
        assert_eq!(value("gen_ai_server_time_to_first_token_seconds_sum", "gen_ai_request_model=\"ns/m\""), "0.5");
        assert_eq!(value("gen_ai_server_time_per_output_token_seconds_sum", "chat"), "0.1");
        assert_eq!(value("gen_ai_client_token_usage_sum", "gen_ai_token_type=\"output\""), "11");
    }
}
