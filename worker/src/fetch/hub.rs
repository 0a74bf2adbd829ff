//! A Hugging Face hub: lists the files of a revision and reads ranges of them.
//!
//! Redirects are followed by hand: a bounded number, to http and https only, never to addresses of this machine or its
//! link, and without the token once the hub's own address is left.

use std::{net::IpAddr, ops::Range, sync::Arc, time::Duration};

use engine::DescribedFile;
use reqwest::{
    Certificate, Client, Response, StatusCode, Url,
    header::{AUTHORIZATION, HeaderValue, LOCATION, RANGE},
    redirect,
};
use serde::Deserialize;
use tracing::{debug, warn};

use super::{
    Error,
    address::{Class, Forbidden, Guard, may_visit, own_class},
    check_listing, is_needed,
};

/// Redirects of one request: hubs use two.
const REDIRECTS: usize = 5;
/// Attempts of one request, with pauses that double from half a second.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Largest answer of the API.
const LISTING_BYTES: usize = 32 << 20;
const CONNECT_WAIT: Duration = Duration::from_secs(10);
const READ_WAIT: Duration = Duration::from_secs(60);

/// How a hub is reached.
#[derive(Clone, Default)]
pub struct Options {
    /// `https://huggingface.co` if empty.
    pub endpoint: String,
    /// Sent to the endpoint only.
    pub token: Option<String>,
    /// More certificate authorities, PEM.
    pub certificates: Vec<u8>,
    /// Times the pauses between attempts, so that tests need not wait.
    pub pause: Option<Duration>,
}

/// A client of one hub.
#[derive(Clone)]
pub struct Hub {
    client: Client,
    endpoint: Url,
    authorization: Option<HeaderValue>,
    pause: Duration,
}

/// The needed files of one revision.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The commit that the revision named.
    pub commit: String,
    /// Sorted by name, each with a digest.
    pub files: Vec<DescribedFile>,
}

#[derive(Deserialize)]
struct Repository {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    oid: Option<String>,
    size: Option<u64>,
}

/// Whether an attempt may be followed by another.
enum Attempt {
    Again(Error),
    Final(Error),
}

impl Hub {
    /// A client of the hub that `options` name. Nothing is sent yet.
    ///
    /// # Errors
    /// If the endpoint is no URL, the certificates are none, or no header can have the token.
    pub fn new(options: &Options) -> Result<Self, Error> {
        let text = if options.endpoint.is_empty() { "https://huggingface.co" } else { &options.endpoint };
        let unusable = |reason: String| Error::HubUnreachable { endpoint: text.to_owned(), reason };
        let endpoint = Url::parse(text).map_err(|error| unusable(error.to_string()))?;
        if !matches!(endpoint.scheme(), "http" | "https") || endpoint.host_str().is_none() {
            return Err(unusable("it is not an http or https URL".into()));
        }
        // a second call finds the provider installed
        let _ = rustls::crypto::ring::default_provider().install_default();
        let resolver = Guard { trusted: endpoint.host_str().unwrap_or_default().to_owned(), own: own_class(&endpoint) };
        let bundled = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().filter_map(|der| Certificate::from_der(der).ok());
        let more = Certificate::from_pem_bundle(&options.certificates).map_err(|error| unusable(error.to_string()))?;
        let mut client = Client::builder();
        if own_class(&endpoint) == Class::Loopback {
            client = client.no_proxy(); // a proxy is elsewhere, and means itself by this address
        }
        let client = client
            .user_agent(concat!("modelfleet/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_WAIT)
            .read_timeout(READ_WAIT)
            .dns_resolver(Arc::new(resolver))
            .tls_certs_merge(bundled.chain(more))
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        let bearer = |token: &String| {
            let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
                .map_err(|_| unusable("the token has a character that no header can have".into()))?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        };
        let authorization = options.token.as_ref().map(bearer).transpose()?;
        Ok(Self { client, endpoint, authorization, pause: options.pause.unwrap_or(FIRST_PAUSE) })
    }

    /// Lists the needed files of a revision; an empty one means `main`.
    ///
    /// # Errors
    /// [`Error`], after a bounded number of attempts where another one could help.
    pub async fn list(&self, repository: &str, revision: &str) -> Result<Listing, Error> {
        let revision = if revision.is_empty() { "main" } else { revision };
        let mut url = self.url(&["api", "models"], repository);
        self.extend(&mut url, &["revision", revision]);
        url.set_query(Some("blobs=true"));
        let body = self.bytes(&Ask { url, range: None, repository, revision }, LISTING_BYTES).await?;
        let listed: Repository =
            serde_json::from_slice(&body).map_err(|error| self.unreachable(format!("its listing: {error}")))?;
        let mut files = listed
            .siblings
            .into_iter()
            .filter(|file| is_needed(&file.rfilename))
            .map(Sibling::described)
            .collect::<Result<Vec<_>, _>>()?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        check_listing(repository, &files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>())?;
        let is_commit = listed.sha.len() >= 7 && listed.sha.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !is_commit {
            return Err(self.unreachable("its listing names no commit".into()));
        }
        Ok(Listing { commit: listed.sha, files })
    }

    /// Reads a range of a file, whole or not at all.
    ///
    /// # Errors
    /// [`Error`], after a bounded number of attempts where another one could help.
    pub async fn read(&self, repository: &str, commit: &str, path: &str, range: Range<u64>) -> Result<Vec<u8>, Error> {
        let want = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let url = self.file(repository, commit, path);
        let bytes = self.bytes(&Ask { url, range: Some(range), repository, revision: commit }, want).await?;
        if bytes.len() != want {
            return Err(self.unreachable(format!("{path}: {} of {want} bytes came", bytes.len())));
        }
        Ok(bytes)
    }

    /// Opens a file from `offset` on; one attempt.
    pub(super) async fn open(
        &self,
        repository: &str,
        commit: &str,
        path: &str,
        offset: u64,
    ) -> Result<Response, Error> {
        let range = (offset > 0).then_some(offset..u64::MAX);
        let ask = Ask { url: self.file(repository, commit, path), range, repository, revision: commit };
        self.get(&ask).await.map_err(|attempt| match attempt {
            Attempt::Again(error) | Attempt::Final(error) => error,
        })
    }

    /// The pause before an attempt, counted from 1; `None` after the last.
    pub(super) fn pause(&self, attempt: u32) -> Option<Duration> {
        (attempt < ATTEMPTS).then(|| self.pause * 2_u32.pow(attempt.saturating_sub(1)))
    }

    pub(super) fn unreachable(&self, reason: String) -> Error {
        Error::HubUnreachable { endpoint: self.endpoint.to_string(), reason }
    }

    /// GET with attempts; the body up to `limit` bytes.
    async fn bytes(&self, ask: &Ask<'_>, limit: usize) -> Result<Vec<u8>, Error> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let error = match self.bytes_once(ask, limit).await {
                Ok(bytes) => return Ok(bytes),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Again(error)) => error,
            };
            let Some(pause) = self.pause(attempt) else {
                return Err(error);
            };
            warn!(attempt, error = crate::serve::chain(&error), "the hub did not answer; trying again");
            tokio::time::sleep(pause).await;
        }
    }

    async fn bytes_once(&self, ask: &Ask<'_>, limit: usize) -> Result<Vec<u8>, Attempt> {
        let mut response = self.get(ask).await?;
        if ask.range.as_ref().is_some_and(|range| range.start > 0) && response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(Attempt::Final(self.unreachable("it does not answer byte ranges".into())));
        }
        let mut bytes = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|error| self.again(&error))? {
            if bytes.len() + piece.len() > limit {
                if ask.range.is_some() {
                    // a hub that ignores ranges sends the whole file; its beginning is what was asked for
                    bytes.extend_from_slice(&piece[..limit - bytes.len()]);
                    return Ok(bytes);
                }
                return Err(Attempt::Final(self.unreachable(format!("its answer has more than {limit} bytes"))));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// One GET, redirects followed.
    async fn get(&self, ask: &Ask<'_>) -> Result<Response, Attempt> {
        let mut url = ask.url.clone();
        for _ in 0..=REDIRECTS {
            self.check(&url).map_err(Attempt::Final)?;
            let mut request = self.client.get(url.clone());
            if let Some(authorization) = self.authorization.as_ref().filter(|_| url.origin() == self.endpoint.origin())
            {
                request = request.header(AUTHORIZATION, authorization);
            }
            match &ask.range {
                Some(Range { start, end: u64::MAX }) => request = request.header(RANGE, format!("bytes={start}-")),
                Some(Range { start, end }) => request = request.header(RANGE, format!("bytes={start}-{}", end - 1)),
                None => {}
            }
            let response = request.send().await.map_err(|error| self.again(&error))?;
            if !response.status().is_redirection() {
                return self.judge(response, ask);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            url = next.ok_or_else(|| Attempt::Final(self.unreachable("it redirects to nowhere".into())))?;
            debug!(host = url.host_str(), "redirected");
        }
        Err(Attempt::Final(self.unreachable(format!("it redirects more than {REDIRECTS} times"))))
    }

    /// Refuses addresses that no hub has a reason to send us to.
    fn check(&self, url: &Url) -> Result<(), Error> {
        let plain = url.scheme() == "http" && self.endpoint.scheme() == "http";
        if url.scheme() != "https" && !plain {
            return Err(self.unreachable(format!("it redirects to {}, which is not followed", url.scheme())));
        }
        let host = url.host_str().unwrap_or_default();
        let literal = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
        if literal.is_some_and(|address| !may_visit(address, own_class(&self.endpoint))) {
            return Err(self.unreachable("it redirects to an address inside, which is not followed".into()));
        }
        Ok(())
    }

    fn judge(&self, response: Response, ask: &Ask<'_>) -> Result<Response, Attempt> {
        let status = response.status();
        let word = response.headers().get("x-error-code").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let missing = || Error::SourceNotFound(format!("{} at {}", ask.repository, self.endpoint));
        match status.as_u16() {
            200 | 206 => Ok(response),
            404 if word == "RevisionNotFound" => Err(Attempt::Final(Error::RevisionNotFound {
                repository: ask.repository.to_owned(),
                revision: ask.revision.to_owned(),
            })),
            404 | 410 => Err(Attempt::Final(missing())),
            401 if word == "RepoNotFound" && self.authorization.is_some() => Err(Attempt::Final(missing())),
            code @ (401 | 403) => Err(Attempt::Final(Error::GatedModel {
                what: ask.repository.to_owned(),
                status: code,
                hint: match self.authorization {
                    None => {
                        "it is gated, private or missing; give a token in spec.model.credentialsRef, or as HF_TOKEN in local mode"
                    }
                    Some(_) => {
                        "the token has no access; ask for it on the model's page, or give another one in spec.model.credentialsRef, or as HF_TOKEN in local mode"
                    }
                },
            })),
            408 | 425 | 429 | 500..=599 => Err(Attempt::Again(self.unreachable(format!("status {status}")))),
            _ => Err(Attempt::Final(self.unreachable(format!("status {status}")))),
        }
    }

    fn again(&self, error: &reqwest::Error) -> Attempt {
        // the URL may carry a signature, so only the cause is kept
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        if let Some(Forbidden) = cause.downcast_ref() {
            return Attempt::Final(self.unreachable("it redirects to an address inside, which is not followed".into()));
        }
        Attempt::Again(self.unreachable(cause.to_string()))
    }

    fn file(&self, repository: &str, commit: &str, path: &str) -> Url {
        let mut url = self.url(&[], repository);
        self.extend(&mut url, &["resolve", commit, path]);
        url
    }

    fn url(&self, before: &[&str], repository: &str) -> Url {
        let mut url = self.endpoint.clone();
        self.extend(&mut url, before);
        self.extend(&mut url, &repository.split('/').collect::<Vec<_>>());
        url
    }

    fn extend(&self, url: &mut Url, segments: &[&str]) {
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
    }
}

/// What is asked for; the repository and its revision are for errors.
struct Ask<'a> {
    url: Url,
    range: Option<Range<u64>>,
    repository: &'a str,
    revision: &'a str,
}

impl Sibling {
    fn described(self) -> Result<DescribedFile, Error> {
        let missing = |what: &str, path: &str| Error::ChecksumMismatch {
            path: path.to_owned(),
            reason: format!("the hub gives no {what} for it"),
        };
        let lfs = self.lfs.unwrap_or(Lfs { sha256: None, oid: None, size: None });
        let sha256 = lfs.sha256.or(lfs.oid).map(|sum| sum.trim_start_matches("sha256:").to_owned());
        let size = lfs.size.or(self.size).ok_or_else(|| missing("size", &self.rfilename))?;
        let git_oid = self.blob_id.filter(|_| sha256.is_none());
        if sha256.is_none() && git_oid.is_none() {
            return Err(missing("digest", &self.rfilename));
        }
        Ok(DescribedFile { path: self.rfilename, size, sha256, git_oid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_that_is_none_is_refused() {
        for endpoint in ["ftp://hub", "file:///etc", "no url", "http://"] {
            let options = Options { endpoint: endpoint.into(), ..Options::default() };
            assert!(matches!(Hub::new(&options), Err(Error::HubUnreachable { .. })), "{endpoint}");
        }
    }
}
