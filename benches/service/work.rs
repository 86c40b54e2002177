//! The work of clients: sccache's requests for our service, plain PUT and GET for nginx.

use std::net::SocketAddr;
use std::ops::Range;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use prost::Message;

use super::content::Content;
use super::http::{Body, Connection, Failure};

/// How many bytes a block has, and a range that is downloaded beside others.
pub const PIECE: u64 = 32 << 20;

/// The version of all entries: clients send a SHA-256 in hex.
const VERSION: &str = "b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c";

#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "2")]
    key: String,
    #[prost(string, tag = "3")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Finalize {
    #[prost(string, tag = "2")]
    key: String,
    #[prost(int64, tag = "3")]
    size_bytes: i64,
    #[prost(string, tag = "4")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Find {
    #[prost(string, tag = "2")]
    key: String,
    #[prost(string, tag = "4")]
    version: String,
}

/// The answer to each of them, as far as it matters here.
#[derive(Clone, PartialEq, Message)]
struct Granted {
    #[prost(bool, tag = "1")]
    ok: bool,
}

/// The answer that contains a URL.
#[derive(Clone, PartialEq, Message)]
struct Address {
    #[prost(bool, tag = "1")]
    ok: bool,
    #[prost(string, tag = "2")]
    url: String,
}

/// A server as its clients know it.
#[derive(Clone, Debug)]
pub struct Site {
    /// Its address.
    pub address: SocketAddr,
    /// The token of our service; nginx has none.
    pub token: Option<String>,
}

impl Site {
    async fn call<A: Message + Default>(
        &self,
        connection: &mut Connection,
        method: &str,
        message: &impl Message,
    ) -> Result<A, Failure> {
        let path = format!("/twirp/github.actions.results.api.v1.CacheService/{method}");
        let token = self.token.as_deref().unwrap_or_default();
        let headers =
            format!("Authorization: Bearer {token}\r\nContent-Type: application/protobuf\r\n");
        let body = message.encode_to_vec();
        let answer = connection
            .request("POST", &path, &headers, Body::Bytes(&body))
            .await?;
        let bytes = connection.bytes(answer.length).await?;
        A::decode(bytes.as_slice()).map_err(|_| Failure::Protocol("another message"))
    }

    /// The path and query of a URL that must be on this server.
    fn path(&self, found: &Address) -> Result<String, Failure> {
        let origin = format!("http://{}", self.address);
        let path = found.url.strip_prefix(&origin).filter(|_| found.ok);
        path.map(str::to_owned)
            .ok_or(Failure::Protocol("no URL of this server"))
    }

    /// The URL to which the entry called `key` is uploaded.
    pub async fn create(&self, connection: &mut Connection, key: &str) -> Result<String, Failure> {
        if self.token.is_none() {
            return Ok(format!("/{key}"));
        }
        let request = Named {
            key: key.to_owned(),
            version: VERSION.to_owned(),
        };
        self.path(&self.call(connection, "CreateCacheEntry", &request).await?)
    }

    /// The URL from which the entry called `key` is downloaded.
    pub async fn find(&self, connection: &mut Connection, key: &str) -> Result<String, Failure> {
        if self.token.is_none() {
            return Ok(format!("/{key}"));
        }
        let request = Find {
            key: key.to_owned(),
            version: VERSION.to_owned(),
        };
        self.path(
            &self
                .call(connection, "GetCacheEntryDownloadURL", &request)
                .await?,
        )
    }

    async fn finalize(
        &self,
        connection: &mut Connection,
        key: &str,
        content: Content,
    ) -> Result<(), Failure> {
        let request = Finalize {
            key: key.to_owned(),
            size_bytes: content.size as i64,
            version: VERSION.to_owned(),
        };
        let answer: Granted = self
            .call(connection, "FinalizeCacheEntryUpload", &request)
            .await?;
        answer
            .ok
            .then_some(())
            .ok_or(Failure::Protocol("no success"))
    }

    /// Writes an entry and gives the number of requests.
    async fn write(
        &self,
        connection: &mut Connection,
        key: &str,
        content: Content,
    ) -> Result<u64, Failure> {
        let path = self.create(connection, key).await?;
        let body = Body::Content(content, 0..content.size);
        put(connection, &path, body).await?;
        if self.token.is_none() {
            return Ok(1);
        }
        self.finalize(connection, key, content).await?;
        Ok(3)
    }

    /// The URL for block `i` of an upload; nginx has a file for each.
    fn block_path(&self, upload: &str, i: usize) -> String {
        match self.token {
            Some(_) => format!("{upload}&comp=block&blockid={}", block_name(i)),
            None => format!("{upload}.{i}"),
        }
    }

    /// Makes an entry of the blocks of an upload.
    async fn join(
        &self,
        connection: &mut Connection,
        key: &str,
        content: Content,
        path: &str,
    ) -> Result<u64, Failure> {
        let names = (0..pieces(content)).map(block_name);
        let names: String = names
            .map(|name| format!("<Latest>{name}</Latest>"))
            .collect();
        let list = format!("<?xml version=\"1.0\"?><BlockList>{names}</BlockList>");
        let path = format!("{path}&comp=blocklist");
        put(connection, &path, Body::Bytes(list.as_bytes())).await?;
        self.finalize(connection, key, content).await?;
        Ok(2)
    }
}

/// The name of block `i`: of twelve characters, whose base64 has nothing that a URL would escape.
fn block_name(i: usize) -> String {
    BASE64_STANDARD.encode(format!("block-{i:06}"))
}

async fn put(connection: &mut Connection, path: &str, body: Body<'_>) -> Result<(), Failure> {
    let headers = "x-ms-blob-type: BlockBlob\r\n";
    let answer = connection.request("PUT", path, headers, body).await?;
    connection.bytes(answer.length).await.map(drop)
}

async fn get(
    connection: &mut Connection,
    path: &str,
    content: Content,
    range: Range<u64>,
) -> Result<(), Failure> {
    let is_part = range != (0..content.size);
    let header = if is_part {
        format!("Range: bytes={}-{}\r\n", range.start, range.end - 1)
    } else {
        String::new()
    };
    let answer = connection
        .request("GET", path, &header, Body::Bytes(&[]))
        .await?;
    if is_part != (answer.status == 206) {
        return Err(Failure::Protocol("another part than was asked for"));
    }
    connection.content(&answer, content, range).await
}

/// How many pieces `content` has.
pub fn pieces(content: Content) -> usize {
    content.size.div_ceil(PIECE) as usize
}

fn piece(content: Content, i: usize) -> Range<u64> {
    let start = i as u64 * PIECE;
    start..content.size.min(start + PIECE)
}

/// The repeated work.
#[derive(Clone, Debug)]
pub enum Task {
    /// Writes an entry in one piece.
    Write,
    /// Looks an entry up and reads it.
    Read,
    /// Reads entry `i` from the path of this number.
    Get(Vec<String>),
    /// Writes block `i` of the first entry's upload at this path.
    PutBlock(String),
    /// Makes an entry of those blocks.
    Join(String),
    /// Reads the range `i` of the first entry at this path.
    GetRange(String),
}

/// A task, and the entries that it is done with.
#[derive(Clone, Debug)]
pub struct Work {
    /// The server.
    pub site: Site,
    /// The work.
    pub task: Task,
    /// The prefix of all keys.
    pub prefix: String,
    /// The entries.
    pub contents: Vec<Content>,
}

impl Work {
    /// The key of entry `i`.
    pub fn key(&self, i: usize) -> String {
        format!(
            "{}/{}",
            self.prefix,
            blake3::hash(&i.to_le_bytes()).to_hex()
        )
    }

    /// How many bytes the server writes when each entry has its turn.
    pub fn written(&self) -> u64 {
        match self.task {
            Task::Write | Task::PutBlock(_) | Task::Join(_) => {
                self.contents.iter().map(|content| content.size).sum()
            }
            Task::Read | Task::Get(_) | Task::GetRange(_) => 0,
        }
    }

    /// Does it for the `i`th time, and gives the number of requests and of bytes of content.
    pub async fn run(&self, connection: &mut Connection, i: usize) -> Result<(u64, u64), Failure> {
        let i = match self.task {
            Task::PutBlock(_) | Task::GetRange(_) => i,
            _ => i % self.contents.len(),
        };
        let site = &self.site;
        let first = self.contents[0];
        let content = *self.contents.get(i).unwrap_or(&first);
        let all = 0..content.size;
        match &self.task {
            Task::Write => {
                let requests = site.write(connection, &self.key(i), content).await?;
                Ok((requests, content.size))
            }
            Task::Read => {
                let path = site.find(connection, &self.key(i)).await?;
                get(connection, &path, content, all).await?;
                Ok((1 + u64::from(site.token.is_some()), content.size))
            }
            Task::Get(paths) => {
                get(connection, &paths[i], content, all).await?;
                Ok((1, content.size))
            }
            Task::PutBlock(path) => {
                let range = piece(first, i);
                let size = range.end - range.start;
                let path = site.block_path(path, i);
                put(connection, &path, Body::Content(first, range)).await?;
                Ok((1, size))
            }
            Task::Join(path) => {
                let requests = site.join(connection, &self.key(0), first, path).await?;
                Ok((requests, 0))
            }
            Task::GetRange(path) => {
                let range = piece(first, i);
                let size = range.end - range.start;
                get(connection, path, first, range).await?;
                Ok((1, size))
            }
        }
    }
}
