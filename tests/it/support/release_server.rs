//! GitHub's API and sccache's release assets in small, on 127.0.0.1, with faults to order.

use std::collections::HashMap;
use std::future::IntoFuture;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use url::Url;

/// An answer of the server.
#[derive(Clone)]
pub enum Answer {
    /// This content.
    Content(Bytes),
    /// This status, with a `Retry-After` of this many seconds.
    Status(StatusCode, Option<u64>),
    /// The first bytes of this content, whose whole length is promised; then the end.
    CutOff(Bytes, usize),
    /// Headers that promise this many bytes, and never a byte.
    Promise(u64),
    /// A redirect.
    Redirect(String),
    /// Headers that promise this many bytes, and a byte from time to time.
    Trickle(u64, Duration),
    /// Nothing, for ever.
    Silence,
}

/// A request that was made.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Its path.
    pub path: String,
    /// Its `Authorization` header.
    pub authorization: Option<String>,
}

#[derive(Default)]
struct Inner {
    /// The answers of each path, in order; the last one stays.
    answers: HashMap<String, Vec<Answer>>,
    asked: Vec<Asked>,
}

/// A server that is asked like GitHub.
pub struct ReleaseServer {
    inner: Arc<Mutex<Inner>>,
    /// Its root, without a slash at the end.
    pub url: String,
}

impl ReleaseServer {
    /// A server without any release.
    pub async fn start() -> Self {
        let inner = Arc::new(Mutex::new(Inner::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(inner.clone());
        tokio::spawn(axum::serve(listener, router).into_future());
        Self {
            inner,
            url: format!("http://{address}"),
        }
    }

    /// The base URL of its assets.
    pub fn releases_url(&self) -> Url {
        format!("{}/download", self.url).parse().unwrap()
    }

    /// The answers of `path`, in order; the last one stays.
    pub fn answer(&self, path: &str, answers: impl Into<Vec<Answer>>) {
        let mut inner = self.inner.lock().unwrap();
        inner.answers.insert(path.to_owned(), answers.into());
    }

    /// Releases `archive` as `version`, with its digest beside it.
    pub fn release(&self, version: &str, archive: &Bytes) {
        let path = asset_path(version);
        let digest = hex::encode(Sha256::digest(archive));
        self.answer(&format!("{path}.sha256"), [Answer::Content(digest.into())]);
        self.answer(&path, [Answer::Content(archive.clone())]);
    }

    /// Has the API list these versions, the first as the latest.
    pub fn list(&self, versions: &[&str]) {
        let releases: Vec<Value> = versions.iter().map(|version| release(version)).collect();
        let path = "/repos/mozilla/sccache/releases";
        let latest = Answer::Content(releases[0].to_string().into());
        self.answer(&format!("{path}/latest"), [latest]);
        let all = Answer::Content(Value::from(releases).to_string().into());
        self.answer(path, [all]);
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.inner.lock().unwrap().asked.clone()
    }
}

async fn answer(State(inner): State<Arc<Mutex<Inner>>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let answer = {
        let mut inner = inner.lock().unwrap();
        let authorization = authorization(request.headers());
        let asked = Asked {
            path: path.clone(),
            authorization,
        };
        inner.asked.push(asked);
        let answers = inner.answers.get_mut(&path);
        answers.map(|answers| match answers.len() {
            1 => answers[0].clone(),
            _ => answers.remove(0),
        })
    };
    match answer {
        None => (StatusCode::NOT_FOUND, "<html>Not Found</html>").into_response(),
        Some(Answer::Content(content)) => content.into_response(),
        Some(Answer::Status(status, None)) => status.into_response(),
        Some(Answer::Status(status, Some(wait))) => {
            (status, [("retry-after", wait.to_string())]).into_response()
        }
        Some(Answer::CutOff(content, length)) => {
            let promised = [("content-length", content.len().to_string())];
            let pieces = futures_util::stream::iter([
                Ok(content.slice(..length)),
                Err(std::io::Error::other("cut off to order")),
            ]);
            (promised, Body::from_stream(pieces)).into_response()
        }
        Some(Answer::Promise(length)) => {
            let promised = [("content-length", length.to_string())];
            let nothing = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
            (promised, Body::from_stream(nothing)).into_response()
        }
        Some(Answer::Trickle(length, every)) => {
            let promised = [("content-length", length.to_string())];
            let bytes = futures_util::stream::unfold((), move |()| async move {
                tokio::time::sleep(every).await;
                Some((Ok::<_, std::io::Error>(Bytes::from_static(b"x")), ()))
            });
            (promised, Body::from_stream(bytes)).into_response()
        }
        Some(Answer::Redirect(to)) => (StatusCode::FOUND, [("location", to)]).into_response(),
        Some(Answer::Silence) => std::future::pending().await,
    }
}

fn authorization(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("authorization")?;
    Some(value.to_str().unwrap().to_owned())
}

/// The name of the release asset for this machine, without `.tar.gz`.
pub fn asset(version: &str) -> String {
    let target = match std::env::consts::ARCH {
        "x86_64" => "x86_64-unknown-linux-musl",
        "aarch64" => "aarch64-unknown-linux-musl",
        other => panic!("no release for {other}"),
    };
    format!("sccache-v{version}-{target}")
}

/// The path of that asset on the server.
pub fn asset_path(version: &str) -> String {
    format!("/download/v{version}/{}.tar.gz", asset(version))
}

/// A release as the API describes it.
fn release(version: &str) -> Value {
    let url = "https://api.github.example/x";
    json!({
        "url": url, "html_url": url, "assets_url": url, "upload_url": url, "tarball_url": url,
        "zipball_url": url, "id": 1, "node_id": "x", "tag_name": format!("v{version}"),
        "target_commitish": "main", "name": version, "body": "", "draft": false,
        "prerelease": version.contains('-'), "created_at": "2026-01-01T00:00:00Z",
        "published_at": "2026-01-01T00:00:00Z", "assets": []
    })
}

/// A release archive of `version` with this content for sccache's binary.
pub fn archive_of(version: &str, binary: &[u8]) -> Bytes {
    archive(&[
        (&format!("{}/LICENSE", asset(version)), b"text", None),
        (&format!("{}/sccache", asset(version)), binary, None),
    ])
}

/// A release archive with the file at `path` for sccache's binary.
pub fn archive_with(version: &str, path: &Path) -> Bytes {
    archive_of(version, &std::fs::read(path).unwrap())
}

/// An archive of members with their paths as they are; members with a target are links.
pub fn archive(members: &[(&str, &[u8], Option<&str>)]) -> Bytes {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (path, content, link) in members {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        if let Some(target) = link {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_link_name(target).unwrap();
        }
        // `set_path` refuses the paths that this test needs.
        let name = &mut header.as_gnu_mut().unwrap().name;
        name.as_mut_slice().write_all(path.as_bytes()).unwrap();
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap().into()
}
