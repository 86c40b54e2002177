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
    let parts = |url: &str| {
        let (path, query) = url.split_once('?').unwrap();
        (path.to_owned(), query.to_owned())
    };
    let (path, query) = parts(&a);
    let (upload_path, upload_query) = parts(&upload);
    let denied = (403, "AuthenticationFailed".to_owned());
    let mut queries = vec![String::new(), parts(&b).1, upload_query.clone()];
    // Each value of the query changed in turn, its expiry among them.
    for (position, _) in query.match_indices(['&', '=']).chain([(query.len(), "")]) {
        let (before, after) = query.split_at(position);
        if !before.is_empty() && !after.starts_with('=') {
            queries.push(format!("{before}0{after}"));
        }
    }
    assert!(queries.len() > 4, "{query}");
    for query in queries {
        let url = format!("{path}?{query}");
        assert_eq!(target.get(&url).await.error(), denied, "{url}");
    }
    for query in ["", &query] {
        let url = format!("{upload_path}?{query}");
        assert_eq!(target.put(&url, "x").await.error(), denied, "{url}");
    }
    target.put(&a, "x").await.expect(405);
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
