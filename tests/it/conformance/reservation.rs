//! Reserving a key and committing the entry.

use futures_util::future::join_all;
use reqwest::Url;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::target::Target;

pub async fn an_upload_url_has_two_path_segments_and_a_query(target: &Target) {
    let url: Url = target.cache().reserve("k").await.parse().unwrap();
    let segments: Vec<&str> = url.path_segments().unwrap().collect();
    assert!(segments.len() >= 2 && !segments.contains(&""), "{url}");
    assert!(url.query().is_some_and(|query| !query.is_empty()), "{url}");
    assert!(url.host().is_some() && url.fragment().is_none(), "{url}");
}

pub async fn version_1_gives_a_number(target: &Target) {
    let reserved = target.cache().create_v1("k", Some(7)).await.expect(201);
    // A number that JavaScript holds, and that is not taken for "none".
    let number = reserved.json()["cacheId"].as_u64().unwrap();
    assert!((1..1 << 53).contains(&number));
}

pub async fn of_many_at_once_one_is_granted(target: &Target) {
    let cache = &target.cache();
    let calls = (0..50).map(|i| async move {
        match i % 2 {
            0 => cache.create("k").await,
            _ => cache.create_v1("k", None).await,
        }
    });
    let mut granted = 0;
    for answer in join_all(calls).await {
        match answer.error() {
            (200 | 201, _) => granted += 1,
            (409, code) => assert!(["already_exists", ""].contains(&&*code), "{code}"),
            _ => panic!("{answer:?}"),
        }
    }
    assert_eq!(granted, 1);
}

pub async fn an_entry_never_changes(target: &Target) {
    let cache = target.cache();
    let url = cache.reserve("two").await;
    target.put(&url, "one").await.expect(201);
    cache.finalize("two", 3).await.expect(200);
    let upload = cache.reserve_v1("one").await;
    cache.patch(upload, "bytes 0-2/*", "one").await.expect(204);
    cache.commit(upload, 3).await.expect(204);
    target.put(&url, "two").await.expect(404);
    target.put_block(&url, "b", "two").await.expect(404);
    cache.patch(upload, "bytes 0-2/*", "two").await.expect(404);
    for key in ["one", "two"] {
        let refused = cache.create(key).await;
        assert_eq!(refused.error(), (409, "already_exists".to_owned()));
        cache.create_v1(key, None).await.expect(409);
        assert_eq!(cache.load(key).await, "one");
    }
}

pub async fn nothing_is_found_before_its_commit(target: &Target) {
    let cache = target.cache();
    let url = cache.reserve("k").await;
    assert_eq!(cache.matched(&["k"]).await, None);
    target.put(&url, "content").await.expect(201);
    assert_eq!(cache.matched(&["k"]).await, None);
    cache.finalize("k", 7).await.expect(200);
    assert_eq!(cache.load("k").await, "content");
}

pub async fn a_commit_with_the_wrong_size_is_refused_and_may_be_repeated(target: &Target) {
    let cache = target.cache();
    let url = cache.reserve("two").await;
    target.put(&url, "content").await.expect(201);
    let upload = cache.reserve_v1("one").await;
    let sent = cache.patch(upload, "bytes 0-6/*", "content").await;
    sent.expect(204);
    for size in [0, 6, 8] {
        let refused = cache.finalize("two", size).await;
        assert_eq!(refused.error(), (400, "invalid_argument".to_owned()));
        cache.commit(upload, size).await.expect(400);
    }
    assert_eq!(cache.matched(&["one", "two"]).await, None);
    cache.finalize("two", 7).await.expect(200);
    cache.commit(upload, 7).await.expect(204);
    for key in ["one", "two"] {
        assert_eq!(cache.load(key).await, "content");
    }
}

pub async fn only_what_is_reserved_is_committed_and_only_once(target: &Target) {
    let cache = target.cache();
    let not_found = (404, "not_found".to_owned());
    assert_eq!(cache.finalize("k", 0).await.error(), not_found);
    cache.save("k", "content").await;
    assert_eq!(cache.finalize("k", 7).await.error(), not_found);
    let upload = cache.reserve_v1("one").await;
    cache.commit(upload, 0).await.expect(204);
    cache.commit(upload, 0).await.expect(404);
}

pub async fn an_entry_may_be_empty(target: &Target) {
    let cache = target.cache();
    cache.save("put", "").await;
    cache.reserve("never-put").await;
    cache.finalize("never-put", 0).await.expect(200);
    let upload = cache.reserve_v1("v1").await;
    cache.commit(upload, 0).await.expect(204);
    for key in ["put", "never-put", "v1"] {
        assert_eq!(cache.load(key).await, "");
    }
}

pub async fn an_upload_that_breaks_off_may_begin_again(target: &Target) {
    let cache = target.cache();
    let url = cache.reserve("k").await;
    let parsed: Url = url.parse().unwrap();
    let address = parsed.socket_addrs(|| None).unwrap();
    let mut stream = TcpStream::connect(&address[..]).await.unwrap();
    let head = format!(
        "PUT {}?{} HTTP/1.1\r\nhost: {}\r\nx-ms-blob-type: BlockBlob\r\ncontent-length: 1000\r\n\r\n",
        parsed.path(),
        parsed.query().unwrap(),
        parsed.authority()
    );
    stream
        .write_all(format!("{head}half").as_bytes())
        .await
        .unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    cache.finalize("k", 1000).await.expect(400);
    assert_eq!(cache.matched(&["k"]).await, None);
    target.put(&url, "whole").await.expect(201);
    cache.finalize("k", 5).await.expect(200);
    assert_eq!(cache.load("k").await, "whole");
}
