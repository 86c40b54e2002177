//! An HTTP client that costs as little as possible, since it runs on the cores of what it measures:
//! HTTP/1.1 on one connection that stays open, lengths always given, nothing copied.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::str::FromStr;

use bytes::Buf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::content::Content;

/// The longest answer that is kept in memory, in bytes.
const ANSWER_LIMIT: u64 = 64 * 1024;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// There is no connection.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The connection broke.
    #[error("the connection: {0}")]
    Io(#[from] io::Error),
    /// The server refused.
    #[error("answered {0}: {1}")]
    Status(u16, String),
    /// This client does not understand the answer.
    #[error("the answer has {0}")]
    Protocol(&'static str),
    /// The bytes are not those that were written.
    #[error("wrong content from byte {0} on")]
    WrongContent(u64),
    /// It took too long.
    #[error("no answer in time")]
    Late,
}

/// The content of a request.
pub enum Body<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// This part of an entry's content.
    Content(Content, Range<u64>),
}

/// The beginning of an answer.
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// How many bytes follow.
    pub length: u64,
}

/// A connection.
pub struct Connection {
    stream: TcpStream,
    host: String,
    buffer: Box<[u8]>,
    /// The bytes of the buffer that were received and are not yet used.
    unread: Range<usize>,
}

impl Connection {
    /// A connection that receives up to `buffer` bytes at once.
    pub async fn open(address: SocketAddr, buffer: usize) -> Result<Self, Failure> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            host: address.to_string(),
            buffer: vec![0; buffer].into_boxed_slice(),
            unread: 0..0,
        })
    }

    /// Sends a request and receives the beginning of its answer, which must be a success.
    /// `headers` are lines that end in CRLF.
    pub async fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &str,
        body: Body<'_>,
    ) -> Result<Answer, Failure> {
        let length = match &body {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::Content(_, range) => range.end - range.start,
        };
        let host = &self.host;
        let length = match method {
            "GET" => String::new(),
            _ => format!("Content-Length: {length}\r\n"),
        };
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{length}{headers}\r\n");
        match body {
            Body::Bytes(bytes) => {
                let mut all = Buf::chain(head.as_bytes(), bytes);
                self.stream.write_all_buf(&mut all).await?;
            }
            Body::Content(content, range) => {
                let mut head = head.as_bytes();
                let mut offset = range.start;
                while offset < range.end {
                    let part = content.part(offset, range.end);
                    let mut all = Buf::chain(head, part.stamp()).chain(part.rest);
                    self.stream.write_all_buf(&mut all).await?;
                    head = &[];
                    offset += part.len() as u64;
                }
            }
        }
        let answer = self.head().await?;
        if !matches!(answer.status, 200..=299) {
            let text = self.bytes(answer.length).await?;
            let text = String::from_utf8_lossy(&text).into_owned();
            return Err(Failure::Status(answer.status, text));
        }
        Ok(answer)
    }

    async fn head(&mut self) -> Result<Answer, Failure> {
        loop {
            let received = &self.buffer[self.unread.clone()];
            if let Some(length) = received.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = std::str::from_utf8(&received[..length])
                    .map_err(|_| Failure::Protocol("a head that is no text"))?;
                let answer = parse(head)?;
                self.unread.start += length + 4;
                return Ok(answer);
            }
            // The next request is sent after the last answer was received, so there is room in
            // front.
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            self.receive().await?;
        }
    }

    /// Receives the available bytes, behind those that are not yet used.
    async fn receive(&mut self) -> Result<(), Failure> {
        let room = &mut self.buffer[self.unread.end..];
        if room.is_empty() {
            return Err(Failure::Protocol("a head that is too long"));
        }
        match self.stream.read(room).await? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            received => {
                self.unread.end += received;
                Ok(())
            }
        }
    }

    /// The next bytes of an answer, at most `limit`.
    async fn piece(&mut self, limit: u64) -> Result<&[u8], Failure> {
        if self.unread.is_empty() {
            self.unread = 0..0;
            self.receive().await?;
        }
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let piece = self.unread.start..self.unread.end.min(self.unread.start.saturating_add(limit));
        self.unread.start = piece.end;
        Ok(&self.buffer[piece])
    }

    /// Receives `length` bytes into memory.
    pub async fn bytes(&mut self, length: u64) -> Result<Vec<u8>, Failure> {
        if length > ANSWER_LIMIT {
            return Err(Failure::Protocol("too many bytes"));
        }
        let mut bytes = Vec::new();
        while let left @ 1.. = length - bytes.len() as u64 {
            bytes.extend_from_slice(self.piece(left).await?);
        }
        Ok(bytes)
    }

    /// Receives `range` of `content`, and compares the bytes.
    pub async fn content(
        &mut self,
        answer: &Answer,
        content: Content,
        range: Range<u64>,
    ) -> Result<(), Failure> {
        if answer.length != range.end - range.start {
            return Err(Failure::Protocol("another length than was asked for"));
        }
        let mut offset = range.start;
        while offset < range.end {
            let piece = self.piece(range.end - offset).await?;
            if !content.has_at(offset, piece) {
                return Err(Failure::WrongContent(offset));
            }
            offset += piece.len() as u64;
        }
        Ok(())
    }
}

fn parse(head: &str) -> Result<Answer, Failure> {
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 "))
        .and_then(|line| u16::from_str(line.get(..3)?).ok())
        .ok_or(Failure::Protocol("no status"))?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok());
    match (status, length) {
        (204, _) => Ok(Answer { status, length: 0 }),
        (_, Some(length)) => Ok(Answer { status, length }),
        (_, None) => Err(Failure::Protocol("no Content-Length")),
    }
}
