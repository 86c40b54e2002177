//! Requests to the cache service, as a relay and `serve` take them, from anyone who has a token or
//! a signed URL.

#![no_main]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use axum::http::header::{AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use futures_util::{Stream, StreamExt};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use sccache_action::cache_protocol::auth::{Access, Purpose, Tokens, UrlSigner};
use sccache_action::cache_protocol::ids::{EntryId, UploadId};
use sccache_action::cache_protocol::store::{
    Chunk, Content, Entry, EntryName, Query, Store, StoreError,
};
use sccache_action::cache_protocol::{AppState, router};
use sccache_action::clock::Timestamp;
use sccache_action::http::BearerToken;
use tokio::runtime::Runtime;
use tower::ServiceExt;

const CONTENT: &[u8] = b"what the entry has";
const LIMIT: u64 = 1 << 20;
const MINUTE: Duration = Duration::from_secs(60);

/// The number of the entry that is there from the beginning, and of the upload.
const ENTRY: EntryId = EntryId(1);
const UPLOAD: UploadId = UploadId(2);

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.build().expect("a runtime")
});

#[derive(Arbitrary, Debug)]
enum Asked<'a> {
    Twirp(&'a str, &'a str, &'a [u8]),
    Find(&'a str),
    Reserve(&'a [u8]),
    Chunk(u64, &'a str, &'a [u8]),
    Commit(u64, &'a [u8]),
    Upload(&'a str, bool, &'a [u8]),
    Download(bool, &'a str),
    Any(&'a str, &'a str, &'a [u8]),
}

struct Upload {
    name: EntryName,
    content: Vec<u8>,
    blocks: BTreeMap<String, Vec<u8>>,
}

impl Upload {
    fn of(name: EntryName) -> Self {
        Self {
            name,
            content: Vec::new(),
            blocks: BTreeMap::new(),
        }
    }
}

#[derive(Default)]
struct Uploads {
    open: HashMap<UploadId, Upload>,
    entries: Vec<(Entry, Vec<u8>)>,
}

/// Storage as plain as can be. It returns any error that a store may return, and never fails
/// itself.
#[derive(Default)]
struct Memory(Mutex<Uploads>);

impl Memory {
    fn with<T>(&self, act: impl FnOnce(&mut Uploads) -> T) -> T {
        act(&mut self.0.lock().expect("nobody panicked"))
    }
}

async fn received(pieces: impl Stream<Item = Chunk> + Send) -> Result<Vec<u8>, StoreError> {
    let mut pieces = std::pin::pin!(pieces);
    let mut content = Vec::new();
    while let Some(piece) = pieces.next().await {
        content.extend_from_slice(&piece?);
    }
    Ok(content)
}

impl Store for Memory {
    async fn reserve(&self, name: EntryName) -> Result<UploadId, StoreError> {
        self.with(|uploads| {
            let taken = uploads.open.values().any(|open| open.name == name);
            if taken || uploads.entries.iter().any(|(entry, _)| entry.name == name) {
                return Err(StoreError::AlreadyExists);
            }
            let known = uploads.open.len() + uploads.entries.len();
            let number = UploadId(UPLOAD.0 + 1 + known as u64);
            uploads.open.insert(number, Upload::of(name));
            Ok(number)
        })
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        (size <= LIMIT)
            .then_some(())
            .ok_or(StoreError::TooLarge { limit: LIMIT })
    }

    async fn upload_of(&self, name: &EntryName) -> Result<UploadId, StoreError> {
        self.with(|uploads| {
            let mut open = uploads.open.iter();
            let found = open.find(|(_, open)| open.name == *name);
            found
                .map(|(number, _)| *number)
                .ok_or(StoreError::NoSuchUpload)
        })
    }

    async fn name_of(&self, upload: UploadId) -> Result<EntryName, StoreError> {
        self.with(|uploads| {
            let found = uploads.open.get(&upload);
            found
                .map(|open| open.name.clone())
                .ok_or(StoreError::NoSuchUpload)
        })
    }

    async fn write(
        &self,
        upload: UploadId,
        offset: u64,
        truncate: bool,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        let received = received(pieces).await?;
        let end = offset.saturating_add(received.len() as u64);
        self.check_size(end)?;
        self.with(|uploads| {
            let Upload { content, .. } = uploads
                .open
                .get_mut(&upload)
                .ok_or(StoreError::NoSuchUpload)?;
            if truncate {
                content.clear();
            }
            let (offset, end) = (offset as usize, end as usize);
            content.resize(content.len().max(end), 0);
            content[offset..end].copy_from_slice(&received);
            Ok(())
        })
    }

    async fn write_block(
        &self,
        upload: UploadId,
        block: &str,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        let received = received(pieces).await?;
        self.with(|uploads| {
            let Upload { blocks, .. } = uploads
                .open
                .get_mut(&upload)
                .ok_or(StoreError::NoSuchUpload)?;
            blocks.insert(block.to_owned(), received);
            Ok(())
        })
    }

    async fn join_blocks(&self, upload: UploadId, names: Vec<String>) -> Result<(), StoreError> {
        self.with(|uploads| {
            let found = uploads
                .open
                .get_mut(&upload)
                .ok_or(StoreError::NoSuchUpload)?;
            let Upload {
                content, blocks, ..
            } = found;
            let parts = names.iter().map(|name| blocks.get(name));
            let parts: Option<Vec<&Vec<u8>>> = parts.collect();
            *content = parts
                .ok_or(StoreError::NoSuchBlock)?
                .into_iter()
                .flatten()
                .copied()
                .collect();
            Ok(())
        })
    }

    async fn commit(&self, upload: UploadId, size: u64) -> Result<Entry, StoreError> {
        self.with(|uploads| {
            let Upload { name, content, .. } =
                uploads.open.get(&upload).ok_or(StoreError::NoSuchUpload)?;
            let actual = content.len() as u64;
            if actual != size {
                return Err(StoreError::SizeMismatch {
                    actual,
                    claimed: size,
                });
            }
            let entry = Entry {
                id: EntryId(upload.0),
                name: name.clone(),
                size,
                created: Timestamp::UNIX_EPOCH,
            };
            uploads.entries.push((entry.clone(), content.clone()));
            uploads.open.remove(&upload);
            Ok(entry)
        })
    }

    async fn find(&self, query: &Query<'_>) -> Option<Entry> {
        self.with(|uploads| {
            let mut entries = uploads.entries.iter().map(|(entry, _)| entry);
            let found = entries.find(|Entry { name, .. }| {
                let known = query.scopes.contains(&name.scope) && name.version == query.version;
                known && query.keys.iter().any(|key| name.key.starts_with(key))
            });
            found.cloned()
        })
    }

    async fn open(&self, entry: EntryId) -> Option<Content> {
        self.with(|uploads| {
            let found = uploads.entries.iter().find(|(known, _)| known.id == entry);
            found.map(|(_, content)| Content::Bytes(content.clone().into()))
        })
    }

    async fn mark_missing(&self, _entry: EntryId) {}
}

fn named(key: &str) -> EntryName {
    EntryName {
        scope: "main".into(),
        version: "v".to_owned(),
        key: key.to_owned(),
    }
}

/// A service with one entry and one upload, and the signer of its URLs.
fn service() -> (Router, UrlSigner) {
    let store = Memory::default();
    store.with(|uploads| {
        let size = CONTENT.len() as u64;
        let entry = Entry {
            id: ENTRY,
            name: named("entry"),
            size,
            created: Timestamp::UNIX_EPOCH,
        };
        uploads.entries.push((entry, CONTENT.to_vec()));
        uploads.open.insert(UPLOAD, Upload::of(named("upload")));
    });
    let signer = UrlSigner::with_key([7; 32]);
    let token = BearerToken::new("token");
    let tokens = Tokens::default().with(&token, Access::to("main".into()));
    let address = ([127, 0, 0, 1], 7).into();
    (
        router(Arc::new(AppState::new(
            store,
            tokens,
            address,
            signer.clone(),
        ))),
        signer,
    )
}

fn request(asked: &Asked<'_>, signer: &UrlSigner) -> Result<Request<Body>, axum::http::Error> {
    const V1: &str = "/_apis/artifactcache";
    let signed = |purpose| signer.query(purpose, Timestamp::now() + MINUTE, None);
    let begin = |method: &str, uri: String| {
        Request::builder()
            .method(method)
            .uri(uri)
            .header(AUTHORIZATION, "Bearer token")
    };
    let body = |bytes: &[u8]| Body::from(bytes.to_vec());
    match *asked {
        Asked::Twirp(method, kind, bytes) => {
            let uri = format!("/twirp/github.actions.results.api.v1.CacheService/{method}");
            begin("POST", uri)
                .header(CONTENT_TYPE, kind)
                .body(body(bytes))
        }
        Asked::Find(query) => begin("GET", format!("{V1}/cache?{query}")).body(Body::empty()),
        Asked::Reserve(bytes) => begin("POST", format!("{V1}/caches")).body(body(bytes)),
        Asked::Chunk(id, range, bytes) => {
            let request = begin("PATCH", format!("{V1}/caches/{id}"));
            request.header(CONTENT_RANGE, range).body(body(bytes))
        }
        Asked::Commit(id, bytes) => begin("POST", format!("{V1}/caches/{id}")).body(body(bytes)),
        Asked::Upload(query, blob, bytes) => {
            let query = format!("{}&{query}", signed(Purpose::Upload(UPLOAD)));
            let request = begin("PUT", format!("/uploads/{UPLOAD}?{query}"));
            let kind = if blob { "x-ms-blob-type" } else { "x-other" };
            request.header(kind, "BlockBlob").body(body(bytes))
        }
        Asked::Download(head, range) => {
            let query = signed(Purpose::Download(ENTRY));
            let request = begin(
                if head { "HEAD" } else { "GET" },
                format!("/entries/{ENTRY}?{query}"),
            );
            request.header(RANGE, range).body(Body::empty())
        }
        Asked::Any(method, uri, bytes) => begin(method, uri.to_owned()).body(body(bytes)),
    }
}

async fn run(asked: Vec<Asked<'_>>) -> io::Result<()> {
    let (router, signer) = service();
    for asked in asked.iter().take(16) {
        let Ok(request) = request(asked, &signer) else {
            continue;
        };
        let Ok(response) = router.clone().oneshot(request).await;
        let status = response.status();
        // The store behind it does not fail, so every error is the request's.
        assert!(
            !status.is_server_error() || status == 501,
            "{status} {asked:?}"
        );
        let bytes = to_bytes(response.into_body(), LIMIT as usize)
            .await
            .map_err(io::Error::other)?;
        if matches!(asked, Asked::Download(false, _)) && status.is_success() {
            let found = CONTENT.windows(bytes.len()).any(|part| part == bytes);
            assert!(found, "{bytes:?}");
        }
    }
    Ok(())
}

fuzz_target!(|asked: Vec<Asked<'_>>| {
    RUNTIME.block_on(run(asked)).expect("answers can be read");
});
