//! The form of answers and of errors.

use reqwest::Method;
use serde_json::json;

use super::target::{Answer, Target, V2, Who, send};

/// A call of any kind with the default branch's token.
async fn call(target: &Target, path: &str, kind: &str, body: impl Into<reqwest::Body>) -> Answer {
    let request = target
        .request(Method::POST, path)
        .header("content-type", kind);
    let request = request.bearer_auth(target.token(Who::Default));
    send(request.body(body)).await
}

const JSON: &str = "application/json";
const PROTOBUF: &str = "application/protobuf";

pub async fn twirp_has_its_codes(target: &Target) {
    let get = format!("{V2}/GetCacheEntryDownloadURL");
    let other = format!("{V2}/DeleteCacheEntry");
    let long = format!(r#"{{"key":"k","version":"{}"}}"#, "v".repeat(300_000));
    for (path, kind, body, status, code) in [
        (get.as_str(), JSON, "{\"key\":", 400, "malformed"),
        (&get, JSON, "[1]", 400, "malformed"),
        (&get, JSON, &long, 400, "malformed"),
        (&get, PROTOBUF, "\x12\x7f", 400, "malformed"),
        (&get, JSON, "{}", 400, "invalid_argument"),
        (&get, "text/plain", "{}", 404, "bad_route"),
        (&other, JSON, "{}", 404, "bad_route"),
        ("twirp/other.Service/Get", JSON, "{}", 404, "bad_route"),
    ] {
        // An error is JSON whatever the request was.
        let refused = call(target, path, kind, body.to_owned()).await;
        assert_eq!(refused.error(), (status, code.to_owned()), "{path}");
        assert_eq!(refused.header("content-type"), JSON);
        assert!(
            refused.json()["msg"]
                .as_str()
                .is_some_and(|text| !text.is_empty())
        );
    }
}

pub async fn version_1_has_a_message(target: &Target) {
    let cache = target.cache();
    cache.reserve_v1("k").await;
    let post = |body: &'static str| {
        let request = cache.v1(Method::POST, "caches");
        send(request.header("content-type", JSON).body(body))
    };
    for (refused, status) in [
        (cache.look_up_v1(&[""]).await, 400),
        (cache.create_v1("a,b", None).await, 400),
        (cache.with_token("wrong").create_v1("k", None).await, 401),
        (cache.commit((1 << 53) - 1, 0).await, 404),
        (
            cache
                .post_v1("caches/99999999999999999999", json!({}))
                .await,
            404,
        ),
        (cache.post_v1("caches/x", json!({})).await, 404),
        (cache.create_v1("k", None).await, 409),
        (cache.create_v1("l", Some(u64::MAX)).await, 400),
        (post("{").await, 400),
    ] {
        let refused = refused.expect(status);
        assert_eq!(refused.header("content-type"), JSON);
        assert!(
            refused.json()["message"]
                .as_str()
                .is_some_and(|text| !text.is_empty())
        );
    }
}

pub async fn content_has_azures_codes(target: &Target) {
    let cache = target.cache();
    cache.save("k", "content").await;
    let entry = cache.locate("k").await;
    let upload = cache.reserve("l").await;
    let gone = cache.reserve("m").await;
    cache.finalize("m", 0).await.expect(200);
    let (path, _) = entry.split_once('?').unwrap();
    for (refused, status, code) in [
        (
            target.put_list(&upload, "nonsense").await,
            400,
            "InvalidInput",
        ),
        (target.get(path).await, 403, "AuthenticationFailed"),
        (target.put(&gone, "").await, 404, "BlobNotFound"),
        (target.put(&entry, "").await, 405, "UnsupportedHttpVerb"),
    ] {
        assert_eq!(refused.error(), (status, code.to_owned()));
        assert_eq!(refused.header("content-type"), "application/xml");
        assert!(
            refused.text().contains("<Error><Code>"),
            "{}",
            refused.text()
        );
    }
}

/// The fields of a protobuf message that are text; all shorter than 128 bytes.
fn protobuf(fields: &[(u8, &str)]) -> Vec<u8> {
    let field = |(number, text): &(u8, &str)| {
        let length = u8::try_from(text.len()).unwrap();
        [&[number << 3 | 2, length], text.as_bytes()].concat()
    };
    fields.iter().flat_map(field).collect()
}

pub async fn an_answer_is_in_the_form_of_its_request(target: &Target) {
    let cache = target.cache();
    let get = format!("{V2}/GetCacheEntryDownloadURL");
    // Metadata, then key and version.
    let body = [
        &b"\x0a\x02\x08\x01"[..],
        &protobuf(&[(2, "k"), (4, &cache.version)]),
    ]
    .concat();
    // A message with nothing set has no bytes.
    let miss = call(target, &get, PROTOBUF, body.clone()).await.expect(200);
    assert_eq!(
        (miss.header("content-type"), miss.body.len()),
        (PROTOBUF, 0)
    );

    // Names as in the messages or in JSON's style, numbers as text or not, fields from the future.
    for (key, size) in [("size_bytes", json!("0")), ("sizeBytes", json!(0))] {
        let name = json!({ "key": key, "metadata": { "repositoryId": "1" }, "new": [] });
        cache
            .call("CreateCacheEntry", name.clone())
            .await
            .expect(200);
        let mut name = name;
        name[key] = size;
        let done = cache
            .call("FinalizeCacheEntryUpload", name)
            .await
            .expect(200);
        assert_eq!(done.header("content-type"), JSON);
        // 64 bits are text in protobuf's JSON.
        let number = done.json()["entry_id"].as_str().unwrap().parse::<u64>();
        assert!(done.json()["ok"] == true && number.unwrap() > 0);
    }
    let keys = json!({ "key": "x", "restoreKeys": ["size"] });
    let found = cache
        .call("GetCacheEntryDownloadURL", keys)
        .await
        .expect(200);
    assert_eq!(found.json()["matched_key"], "sizeBytes");

    cache.save("k", "content").await;
    let hit = call(target, &get, PROTOBUF, body).await.expect(200);
    assert!(hit.body.starts_with(b"\x08\x01\x12"), "{:?}", hit.body);
    assert!(hit.body.ends_with(&protobuf(&[(3, "k")])), "{:?}", hit.body);
}
