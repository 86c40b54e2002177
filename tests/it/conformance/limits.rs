//! How long and how many.

use serde_json::json;

use super::target::Target;

pub async fn a_key_has_up_to_512_characters_and_no_comma(target: &Target) {
    let cache = target.cache();
    let mut keys = vec![
        ("k".repeat(512), true),
        ("é".repeat(512), true),
        ("k".repeat(513), false),
        (String::new(), false),
        ("a,b".to_owned(), false),
    ];
    for (key, accepted) in keys.clone() {
        let [two, one] = if accepted { [200, 409] } else { [400, 400] };
        cache.create(&key).await.expect(two);
        cache.create_v1(&key, None).await.expect(one);
    }
    // In a look-up of version 1 a comma stands between keys.
    let (comma, _) = keys.pop().unwrap();
    cache.look_up(&[&comma]).await.expect(400);
    cache.look_up_v1(&[&comma]).await.expect(204);
    for (key, accepted) in keys {
        let [two, one] = if accepted { [200, 204] } else { [400, 400] };
        cache.look_up(&["k", &key]).await.expect(two);
        cache.look_up_v1(&["k", &key]).await.expect(one);
    }
}

pub async fn a_look_up_names_up_to_ten_keys(target: &Target) {
    let cache = target.cache();
    for (count, two, one) in [(10, 200, 204), (11, 400, 400)] {
        let keys = vec!["k"; count];
        cache.look_up(&keys).await.expect(two);
        cache.look_up_v1(&keys).await.expect(one);
    }
}

const LIMIT: u64 = 10 << 30;

pub async fn an_entry_has_up_to_10_gib(target: &Target) {
    let cache = target.cache();
    cache.create_v1("one", Some(LIMIT)).await.expect(201);
    cache.create_v1("large", Some(LIMIT + 1)).await.expect(400);
    let upload = cache.reserve_v1("large").await;
    let range = format!("bytes {LIMIT}-{LIMIT}/*");
    cache.patch(upload, &range, "x").await.expect(400);
    // Ten thousand times the same block.
    let url = cache.reserve("two").await;
    let block = url.clone() + "&comp=block&blockid=YQ%3D%3D";
    target.put(&block, vec![0; 1 << 20]).await.expect(201);
    let names = "<Latest>YQ==</Latest>".repeat(10_241);
    let list = format!("<BlockList>{names}</BlockList>");
    let refused = target.put_list(&url, list).await;
    assert_eq!(refused.error(), (413, "RequestBodyTooLarge".to_owned()));
}

pub async fn versions_and_sizes_must_make_sense(target: &Target) {
    let cache = target.cache();
    cache.reserve("k").await;
    let bad = (400, "invalid_argument".to_owned());
    for (method, body) in [
        ("CreateCacheEntry", json!({ "key": "k", "version": "" })),
        (
            "FinalizeCacheEntryUpload",
            json!({ "key": "k", "version": "", "size_bytes": 0 }),
        ),
        (
            "FinalizeCacheEntryUpload",
            json!({ "key": "k", "size_bytes": "-1" }),
        ),
    ] {
        assert_eq!(cache.call(method, body).await.error(), bad);
    }
}
