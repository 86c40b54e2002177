//! Which entry is found.

use serde_json::json;

use super::target::Target;

pub async fn a_miss_of_version_2_is_an_answer_that_is_not_ok(target: &Target) {
    let miss = target.cache().look_up(&["k", "r"]).await.expect(200).json();
    assert_eq!(miss["ok"], false);
    for name in ["signed_download_url", "matched_key"] {
        assert!(miss[name].is_null() || miss[name] == "", "{miss}");
    }
}

pub async fn a_miss_of_version_1_has_no_content(target: &Target) {
    let miss = target.cache().look_up_v1(&["k", "r"]).await.expect(204);
    assert!(miss.body.is_empty());
}

pub async fn a_hit_names_the_key_and_where_the_content_is(target: &Target) {
    let cache = target.cache();
    cache.save("linux-1", "content").await;
    let two = cache
        .look_up(&["linux-2", "linux-"])
        .await
        .expect(200)
        .json();
    let one = cache
        .look_up_v1(&["linux-2", "linux-"])
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&two["ok"], &two["matched_key"]),
        (&json!(true), &json!("linux-1"))
    );
    assert_eq!(one["cacheKey"], "linux-1");
    for url in [&two["signed_download_url"], &one["archiveLocation"]] {
        assert_eq!(
            target.get(url.as_str().unwrap()).await.expect(200).text(),
            "content"
        );
    }
}

pub async fn an_exact_key_beats_a_newer_one_that_begins_with_it(target: &Target) {
    let cache = target.cache();
    cache.save("a", "exact").await;
    cache.save("a-1", "newer").await;
    for keys in [&["a"][..], &["x", "a"]] {
        assert_eq!(cache.matched(keys).await.as_deref(), Some("a"));
    }
}

pub async fn of_those_that_begin_with_a_key_the_one_committed_last_is_found(target: &Target) {
    let cache = target.cache();
    // Reserved in this order, and committed in another that is not the alphabet's either.
    for key in ["a-2", "a-1", "a-3", "b"] {
        cache.reserve(key).await;
    }
    for key in ["a-3", "a-2", "a-1", "b"] {
        cache.finalize(key, 0).await.expect(200);
        let newest = cache.matched(&["a-"]).await;
        assert_eq!(
            newest.as_deref(),
            Some(if key == "b" { "a-1" } else { key })
        );
    }
}

pub async fn keys_are_tried_in_their_order(target: &Target) {
    let cache = target.cache();
    for key in ["a-1", "b", "b-1"] {
        cache.save(key, "").await;
    }
    for (keys, found) in [
        // A key that begins with an earlier key wins over an exact match of a later one.
        (&["a", "b"][..], "a-1"),
        (&["b", "a"], "b"),
        (&["x", "b-", "a"], "b-1"),
        (&["x", "y", "a"], "a-1"),
    ] {
        assert_eq!(
            cache.matched(keys).await.as_deref(),
            Some(found),
            "{keys:?}"
        );
    }
}

pub async fn another_version_is_another_cache(target: &Target) {
    let (one, other) = (target.cache(), target.cache());
    one.save("k", "one").await;
    assert_eq!(other.matched(&["k"]).await, None);
    other.save("k", "other").await;
    assert_eq!(one.load("k").await, "one");
    assert_eq!(other.load("k").await, "other");
}

pub async fn keys_are_compared_byte_by_byte(target: &Target) {
    let cache = target.cache();
    let keys = [
        "Case",
        "a_b",
        "a%b",
        "q?",
        "[a]*",
        "it's",
        "back\\slash",
        "../../etc/passwd",
        "ключ-é🦀",
        "with space",
        "plus+and&",
        "e\u{301}",
    ];
    for key in keys {
        cache.save(key, key).await;
    }
    for key in keys {
        assert_eq!(cache.load(key).await, key);
    }
    // Patterns of SQL and of shells are no patterns here, nor is one letter as good as another.
    for key in [
        "case",
        "a__",
        "a%%",
        "_",
        "%",
        "*",
        "[",
        "it''",
        "back/",
        "é",
        "ключ-e",
    ] {
        let found = cache.matched(&[key]).await;
        assert_eq!(found.as_deref(), (key == "[").then_some("[a]*"), "{key}");
    }
    for (prefix, key) in [("ключ", "ключ-é🦀"), ("a_", "a_b"), ("e", "e\u{301}")] {
        assert_eq!(cache.matched(&[prefix]).await.as_deref(), Some(key));
    }
}

pub async fn both_protocols_have_the_same_entries(target: &Target) {
    let cache = target.cache();
    let upload = cache.reserve_v1("one").await;
    cache.patch(upload, "bytes 0-2/*", "one").await.expect(204);
    cache.commit(upload, 3).await.expect(204);
    cache.save("two", "two").await;
    for key in ["one", "two"] {
        // `load` asks both.
        assert_eq!(cache.load(key).await, key);
    }
}
