//! Whatever a server may answer to the client of the cache service, by both protocols.

#![no_main]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use sccache_action::cache_client::{CacheClient, Endpoint, Protocol, Reservation};
use sccache_action::http::BearerToken;
use sccache_action::http::Timeouts;
use tokio::runtime::Runtime;

const TOKEN: &str = "the-token-that-nobody-sees";

#[derive(Arbitrary, Clone, Debug)]
struct Answer {
    status: u16,
    headers: Vec<u8>,
    body: Vec<u8>,
    /// Whether the body leads the client back here, so that it goes on to the content.
    leads_on: bool,
}

/// The next answers, in order.
static ANSWERS: Mutex<Vec<Answer>> = Mutex::new(Vec::new());

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().expect("a runtime")
});

/// The address of a server in its own thread.
static SERVER: LazyLock<String> = LazyLock::new(|| {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let own = url.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = serve(stream, &own);
        }
    });
    url
});

fn serve(mut stream: TcpStream, own: &str) -> std::io::Result<()> {
    let mut length = 0;
    let mut reader = BufReader::new(&mut stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    reader.take(length).read_to_end(&mut Vec::new())?;
    let mut answers = ANSWERS.lock().expect("nobody panicked");
    let answer = if answers.is_empty() {
        None
    } else {
        Some(answers.remove(0))
    };
    drop(answers);
    let Some(answer) = answer else {
        return Ok(());
    };
    let mut body = answer.body;
    if answer.leads_on {
        body = format!(
            r#"{{"ok":true,"signed_download_url":"{own}d?sig=s","signed_upload_url":"{own}u?sig=s",
                "matched_key":"key","cacheKey":"key","archiveLocation":"{own}d?sig=s","cacheId":7}}"#
        )
        .into_bytes();
    }
    let status = 200 + answer.status % 400;
    write!(stream, "HTTP/1.1 {status} X\r\nconnection: close\r\n")?;
    if answer.leads_on {
        write!(stream, "content-length: {}\r\n", body.len())?;
    }
    stream.write_all(&answer.headers)?;
    stream.write_all(b"\r\n\r\n")?;
    stream.write_all(&body)
}

fn tells_no_secret(error: &impl std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.contains(TOKEN) && !text.contains("sig="), "{text}");
}

/// The clients of both protocols: one takes milliseconds to make.
static CLIENTS: LazyLock<[CacheClient; 2]> = LazyLock::new(|| {
    [Protocol::V1, Protocol::V2].map(|protocol| {
        let endpoint = Endpoint {
            protocol,
            url: SERVER.parse().expect("a URL"),
            token: BearerToken::new(TOKEN),
        };
        let timeouts = Timeouts {
            connect: Duration::from_millis(100),
            read: Duration::from_millis(100),
            slow: Duration::from_millis(100),
        };
        CacheClient::new(endpoint, "v", timeouts).expect("a client")
    })
});

async fn ask(client: &CacheClient) {
    match client.find("key", &["k"]).await {
        Ok(Some(found)) => match client.download(&found, 2..9).await {
            Ok(mut download) => {
                let mut length = 0;
                while let Some(piece) = download.stream.next().await {
                    length += piece.map_or(0, |piece| piece.len() as u64);
                }
                assert!(
                    length <= download.total.max(7),
                    "{length} {}",
                    download.total
                );
            }
            Err(error) => tells_no_secret(&error),
        },
        Ok(None) => {}
        Err(error) => tells_no_secret(&error),
    }
    match client.reserve("key", Some(3)).await {
        Ok(Reservation::Granted(upload)) => {
            let body = futures_util::stream::iter([Ok("abc".into())]);
            if let Err(error) = client.upload(&upload, 3, body).await {
                tells_no_secret(&error);
            }
            if let Err(error) = client.commit(upload, 3).await {
                tells_no_secret(&error);
            }
        }
        Ok(Reservation::AlreadyExists) => {}
        Err(error) => tells_no_secret(&error),
    }
}

fuzz_target!(|given: (bool, Vec<Answer>)| {
    let (second, answers) = given;
    *ANSWERS.lock().expect("nobody panicked") = answers;
    RUNTIME.block_on(ask(&CLIENTS[usize::from(second)]));
});
