//! Exporters over OTLP, by gRPC or HTTP, with TLS where the endpoint is `https`.
//!
//! Endpoint, headers, compression and retries are read from the environment by the exporters themselves.
//! A collector is trusted by the public roots, or by those in `OTEL_EXPORTER_OTLP_CERTIFICATE` alone.

use std::{fs, io, path::PathBuf, thread};

use opentelemetry_otlp::{
    ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithHttpConfig, WithTonicConfig,
};
use reqwest::{blocking::Client, redirect};
use rustls::RootCertStore;
use tonic::transport::ClientTlsConfig;
use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

use super::settings::{Protocol, Settings, Signal};

/// Why a signal cannot be exported.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("reading {}, the file of {variable}", path.display())]
    File { variable: &'static str, path: PathBuf, source: io::Error },
    #[error("making the HTTP client")]
    Client(#[source] reqwest::Error),
    #[error("making the exporter")]
    Exporter(#[source] ExporterBuildError),
}

/// The builders of the three exporters share names, but no trait.
macro_rules! exporter {
    ($name:ident, $exporter:ident, $signal:expr) => {
        /// The exporter of the signal, if it is exported.
        pub(super) fn $name(settings: &Settings) -> Result<Option<$exporter>, Error> {
            let Some(protocol) = settings.export($signal) else {
                return Ok(None);
            };
            let builder = $exporter::builder();
            let exporter = match protocol {
                Protocol::Grpc => grpc(builder.with_tonic(), settings, $signal)?.build(),
                Protocol::HttpProtobuf => http(builder.with_http(), settings, $signal)?.build(),
            };
            exporter.map(Some).map_err(Error::Exporter)
        }
    };
}

exporter!(spans, SpanExporter, Signal::Traces);
exporter!(metrics, MetricExporter, Signal::Metrics);
exporter!(logs, LogExporter, Signal::Logs);

fn grpc<B: WithTonicConfig>(builder: B, settings: &Settings, signal: Signal) -> Result<B, Error> {
    let mut tls = ClientTlsConfig::new();
    tls = match read(settings, signal, "CERTIFICATE")? {
        Some(pem) => tls.ca_certificate(tonic::transport::Certificate::from_pem(pem)),
        None => tls.trust_anchors(public_roots().roots),
    };
    if let Some(Identity { certificate, key }) = identity(settings, signal)? {
        tls = tls.identity(tonic::transport::Identity::from_pem(certificate, key));
    }
    Ok(builder.with_tls_config(tls))
}

fn http<B: WithHttpConfig>(builder: B, settings: &Settings, signal: Signal) -> Result<B, Error> {
    // a second call finds the provider installed
    let _ = rustls::crypto::ring::default_provider().install_default();
    let trusted = match read(settings, signal, "CERTIFICATE")? {
        Some(pem) => reqwest::Certificate::from_pem_bundle(&pem).map_err(Error::Client)?,
        None => TLS_SERVER_ROOT_CERTS.iter().filter_map(|der| reqwest::Certificate::from_der(der).ok()).collect(),
    };
    let mut client =
        Client::builder().timeout(settings.timeout(signal)).redirect(redirect::Policy::none()).tls_certs_only(trusted);
    if settings.is_local(signal) {
        client = client.no_proxy(); // a proxy is elsewhere, and means itself by this address
    }
    if let Some(Identity { certificate, key }) = identity(settings, signal)? {
        let pem = [certificate, key].concat();
        client = client.identity(reqwest::Identity::from_pem(&pem).map_err(Error::Client)?);
    }
    // a client that blocks has a runtime of its own, which cannot be made on a thread of ours
    let client = thread::spawn(|| client.build()).join().expect("making a client does not panic");
    Ok(builder.with_http_client(client.map_err(Error::Client)?))
}

fn public_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(TLS_SERVER_ROOT_CERTS.iter().cloned());
    roots
}

/// What we show a collector that asks who we are, PEM.
struct Identity {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

fn identity(settings: &Settings, signal: Signal) -> Result<Option<Identity>, Error> {
    let certificate = read(settings, signal, "CLIENT_CERTIFICATE")?;
    let key = read(settings, signal, "CLIENT_KEY")?;
    Ok(certificate.zip(key).map(|(certificate, key)| Identity { certificate, key }))
}

fn read(settings: &Settings, signal: Signal, variable: &'static str) -> Result<Option<Vec<u8>>, Error> {
    let Some(path) = settings.file(signal, variable) else {
        return Ok(None);
    };
    fs::read(&path).map(Some).map_err(|source| Error::File { variable, path, source })
}
