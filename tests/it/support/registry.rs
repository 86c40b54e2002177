//! A registry of crates in small, on 127.0.0.1: a sparse index, and archives.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// A running registry. It ends when it is dropped.
pub struct Registry {
    inner: Arc<Mutex<Inner>>,
    port: u16,
    _runtime: Runtime,
}

#[derive(Default)]
struct Inner {
    /// The index's lines for each name, one for each version.
    index: HashMap<String, Vec<String>>,
    /// The archives by `NAME-VERSION`.
    archives: HashMap<String, Bytes>,
    asked: Vec<String>,
}

impl Registry {
    /// A registry without any crate.
    pub fn start() -> Self {
        let inner = Arc::new(Mutex::new(Inner::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("registry")
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = listener.unwrap();
        let port = listener.local_addr().unwrap().port();
        let router = Router::new()
            .fallback(answer)
            .with_state((inner.clone(), port));
        runtime.spawn(axum::serve(listener, router).into_future());
        Self {
            inner,
            port,
            _runtime: runtime,
        }
    }

    /// The text of a workspace's `.cargo/config.toml` that makes all crates come from here.
    pub fn config(&self) -> String {
        let port = self.port;
        format!(
            "[source.crates-io]\nreplace-with = \"local\"\n\
             [source.local]\nregistry = \"sparse+http://127.0.0.1:{port}/index/\"\n"
        )
    }

    /// Publishes a crate that is made of these files, with its manifest among them. It depends on
    /// the crates of these names, in version 1.
    pub fn publish(&self, name: &str, version: &str, needs: &[&str], files: &[(&str, &str)]) {
        let encoder = GzEncoder::new(Vec::new(), Compression::fast());
        let mut builder = tar::Builder::new(encoder);
        for (path, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(text.len() as u64);
            // The file times in cargo's archives.
            header.set_mtime(1_153_704_088);
            let path = format!("{name}-{version}/{path}");
            builder
                .append_data(&mut header, path, text.as_bytes())
                .unwrap();
        }
        let archive: Bytes = builder.into_inner().unwrap().finish().unwrap().into();
        let needs: Vec<_> = needs
            .iter()
            .map(|need| {
                json!({
                    "name": need, "req": "^1", "features": [], "optional": false,
                    "default_features": true, "target": null, "kind": "normal"
                })
            })
            .collect();
        let manifest = files.iter().find(|(path, _)| *path == "Cargo.toml");
        let manifest = manifest.map(|(_, text)| toml::from_str::<serde_json::Value>(text).unwrap());
        let features = manifest.and_then(|manifest| manifest.get("features").cloned());
        let line = json!({
            "name": name, "vers": version, "deps": needs, "yanked": false,
            "features": features.unwrap_or_else(|| json!({})),
            "cksum": hex::encode(Sha256::digest(&archive)),
        });
        self.add(name, version, line.to_string(), archive);
    }

    /// Publishes an archive with a line of the index for it.
    pub fn add(&self, name: &str, version: &str, line: String, archive: Bytes) {
        let mut inner = self.inner.lock().unwrap();
        inner
            .index
            .entry(name.to_lowercase())
            .or_default()
            .push(line);
        inner.archives.insert(format!("{name}-{version}"), archive);
    }

    /// The requests since the last call, without configuration: the names of index files, and
    /// `NAME-VERSION` of archives.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.inner.lock().unwrap().asked)
    }
}

async fn answer(
    State((inner, port)): State<(Arc<Mutex<Inner>>, u16)>,
    request: Request,
) -> Response {
    let path = request.uri().path();
    if path == "/index/config.json" {
        let archives = format!("http://127.0.0.1:{port}/archives/{{crate}}-{{version}}");
        return json!({ "dl": archives }).to_string().into_response();
    }
    let mut inner = inner.lock().unwrap();
    let name = path.rsplit('/').next().unwrap_or_default().to_owned();
    let found = if path.starts_with("/index/") {
        inner.index.get(&name).map(|lines| lines.join("\n").into())
    } else {
        inner.archives.get(&name).cloned()
    };
    inner.asked.push(name);
    match found {
        Some(content) => content.into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
