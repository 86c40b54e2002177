//! Uploads of version 2: Azure's Put Blob, Put Block and Put Block List.

use futures_util::future::join_all;
use reqwest::Method;

use super::target::{Target, send};

pub async fn put_blob_is_the_whole_content_and_may_be_repeated(target: &Target) {
    let cache = target.cache();
    let url = cache.reserve("k").await;
    for content in ["a first and longer attempt", "short"] {
        let put = target.put(&url, content).await.expect(201);
        assert!(!put.header("etag").is_empty());
        httpdate::parse_http_date(put.header("last-modified")).unwrap();
    }
    cache.finalize("k", 5).await.expect(200);
    assert_eq!(cache.load("k").await, "short");
}

/// A list of blocks as opendal writes it.
fn list(names: &[&str]) -> String {
    let names = names.iter().map(|name| format!("<Latest>{name}</Latest>"));
    format!("<BlockList>{}</BlockList>", names.collect::<String>())
}

pub async fn blocks_are_joined_in_the_order_of_the_list(target: &Target) {
    let cache = target.cache();
    // The forms of opendal and of `@azure/storage-blob`, and others that Azure accepts.
    let sdk = r#"<?xml version="1.0" encoding="utf-8" standalone="yes"?>"#;
    for (key, xml) in [
        ("opendal", list(&["YQ==", "Yg==", "Yw=="])),
        ("sdk", format!("{sdk}{}", list(&["YQ==", "Yg==", "Yw=="]))),
        (
            "azure",
            "<BlockList>\n  <Latest>YQ==</Latest>\n  <Uncommitted>Yg==</Uncommitted>\n  \
             <Latest>Yw==</Latest>\n</BlockList>\n"
                .to_owned(),
        ),
    ] {
        let url = cache.reserve(key).await;
        let blocks = [("Yw==", "three"), ("YQ==", "one "), ("Yg==", "two ")];
        let puts = blocks.map(|(name, content)| target.put_block(&url, name, content));
        for put in join_all(puts).await {
            put.expect(201);
        }
        target.put_list(&url, xml).await.expect(201);
        cache.finalize(key, 13).await.expect(200);
        assert_eq!(cache.load(key).await, "one two three");
    }
}

pub async fn a_block_may_be_sent_again_named_twice_or_left_out(target: &Target) {
    let cache = target.cache();
    let url = cache.reserve("k").await;
    for (name, content) in [
        ("YQ==", "a failed attempt"),
        ("YQ==", "la "),
        ("Yg==", "unused"),
    ] {
        target.put_block(&url, name, content).await.expect(201);
    }
    target
        .put_list(&url, list(&["YQ==", "YQ=="]))
        .await
        .expect(201);
    cache.finalize("k", 6).await.expect(200);
    assert_eq!(cache.load("k").await, "la la ");
}

pub async fn a_list_with_an_unknown_block_is_refused_and_may_be_repeated(target: &Target) {
    let cache = target.cache();
    let url = cache.reserve("k").await;
    target.put_block(&url, "YQ==", "a").await.expect(201);
    let refused = target.put_list(&url, list(&["YQ==", "Yg=="])).await;
    assert_eq!(refused.error(), (400, "InvalidBlockList".to_owned()));
    for unreadable in ["", "<List/>", "<BlockList><Latest>YQ=="] {
        let refused = target.put_list(&url, unreadable).await;
        assert_eq!(refused.error(), (400, "InvalidInput".to_owned()));
    }
    target.put_list(&url, list(&["YQ=="])).await.expect(201);
    cache.finalize("k", 1).await.expect(200);
    assert_eq!(cache.load("k").await, "a");
}

pub async fn blocks_have_names_of_any_text(target: &Target) {
    let cache = target.cache();
    let url = cache.reserve("k").await;
    // Azure's longest: 64 bytes in base64.
    let long = "Zm9v".repeat(21) + "Zg==";
    let names = ["+/+/", "../../journal", "/etc/passwd", "a b&c=d", &long];
    for name in names {
        target.put_block(&url, name, "part ").await.expect(201);
    }
    let too_long = target.put_block(&url, &"x".repeat(97), "").await;
    assert_eq!(too_long.error(), (400, "InvalidInput".to_owned()));
    target.put_list(&url, list(&names)).await.expect(201);
    cache.finalize("k", 25).await.expect(200);
    assert_eq!(cache.load("k").await, "part ".repeat(5));
}

pub async fn an_upload_url_takes_nothing_else(target: &Target) {
    let url = target.cache().reserve("k").await;
    let nameless = "&comp=block&blockid=";
    let with_nul = "&comp=block&blockid=YQ%00%3D";
    for (query, status) in [
        ("", 400),
        ("&comp=block", 400),
        (nameless, 400),
        (with_nul, 400),
        ("&comp=metadata", 400),
    ] {
        let url = format!("{url}{query}");
        let put = send(target.content(Method::PUT, &url).body("x")).await;
        assert_eq!(put.error(), (status, "InvalidInput".to_owned()), "{query}");
    }
    for method in [Method::GET, Method::POST, Method::DELETE] {
        let refused = send(target.content(method, &url)).await;
        assert_eq!(refused.error(), (405, "UnsupportedHttpVerb".to_owned()));
    }
}
