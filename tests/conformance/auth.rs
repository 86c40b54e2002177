//! Tokens and signed URLs.

use reqwest::Method;
use serde_json::json;

use super::target::{Target, V2, Who, send};

pub async fn nobody_gets_in_without_a_token(target: &Target) {
    let token = target.token(Who::Default);
    let headers = [
        None,
        Some(String::new()),
        Some("Bearer wrong".to_owned()),
        Some("Bearer ".to_owned()),
        Some(format!("Bearer {}", &token[1..])),
        Some(format!("Basic {token}")),
        Some(token.to_owned()),
    ];
    let body = json!({ "key": "k", "version": "v", "size": 1 }).to_string();
    for (method, path, code) in [
        (Method::POST, "CreateCacheEntry", "unauthenticated"),
        (Method::POST, "FinalizeCacheEntryUpload", "unauthenticated"),
        (Method::POST, "GetCacheEntryDownloadURL", "unauthenticated"),
        (Method::GET, "cache?keys=k&version=v", ""),
        (Method::POST, "caches", ""),
        (Method::PATCH, "caches/1", ""),
        (Method::POST, "caches/1", ""),
    ] {
        let front = if code.is_empty() {
            super::target::V1
        } else {
            V2
        };
        for header in &headers {
            let request = target.request(method.clone(), &format!("{front}/{path}"));
            let mut request = request.header("content-type", "application/json");
            if let Some(header) = header {
                request = request.header("authorization", header);
            }
            let refused = send(request.body(body.clone())).await;
            assert_eq!(refused.error(), (401, code.to_owned()), "{path} {header:?}");
        }
    }
}

pub async fn a_signed_url_opens_its_own_content_in_its_own_way_only(target: &Target) {
    let cache = target.cache();
    cache.save("a", "one").await;
    cache.save("b", "two").await;
    let (a, b) = (cache.locate("a").await, cache.locate("b").await);
    let upload = cache.reserve("c").await;
    let (path, query) = a.split_once('?').unwrap();
    let (_, other) = b.split_once('?').unwrap();
    for url in [
        path.to_owned(),
        format!("{path}?{other}"),
        format!("{path}?{}", query.replacen("se=", "se=9", 1)),
        format!("{path}?se=1&sig=00"),
        upload.replace("/uploads/", "/entries/"),
    ] {
        let refused = target.get(&url).await;
        assert_eq!(
            refused.error(),
            (403, "AuthenticationFailed".to_owned()),
            "{url}"
        );
    }
    target.put(&a, "x").await.expect(405);
    let refused = target.put(&a.replace("/entries/", "/uploads/"), "x").await;
    assert_eq!(refused.error(), (403, "AuthenticationFailed".to_owned()));
    target.get(&upload).await.expect(405);
    assert_eq!(target.get(&a).await.expect(200).text(), "one");
}

pub async fn urls_are_under_the_host_that_was_asked(target: &Target) {
    let cache = target.cache();
    let request = target.request(Method::POST, &format!("{V2}/CreateCacheEntry"));
    let request = request.bearer_auth(target.token(Who::Default));
    let request = request.header("content-type", "application/json");
    let body = json!({ "key": "k", "version": cache.version }).to_string();
    let answer = send(request.header("host", "cache.example:81").body(body)).await;
    let url = answer.expect(200).json()["signed_upload_url"].take();
    let url: reqwest::Url = url.as_str().unwrap().parse().unwrap();
    assert_eq!(url.authority(), "cache.example:81");
}
