//! The visibility of entries between refs, and the rights of tokens.

use reqwest::Method;
use serde_json::json;

use super::target::{Target, V2, Who, send};

pub async fn a_pull_request_reads_its_base_and_the_default_branch(target: &Target) {
    let main = target.cache();
    let (base, pull) = (main.by(Who::Base), main.by(Who::PullRequest));
    main.save("of-main", "main").await;
    base.save("of-base", "base").await;
    assert_eq!(base.load("of-main").await, "main");
    assert_eq!(pull.load("of-main").await, "main");
    assert_eq!(pull.load("of-base").await, "base");
}

pub async fn nobody_reads_a_pull_request(target: &Target) {
    let main = target.cache();
    let (base, pull) = (main.by(Who::Base), main.by(Who::PullRequest));
    base.save("k-of-base", "base").await;
    assert_eq!(main.matched(&["k"]).await, None);
    pull.save("k-of-pull", "pull").await;
    assert_eq!(main.matched(&["k"]).await, None);
    assert_eq!(base.matched(&["k"]).await.as_deref(), Some("k-of-base"));
    assert_eq!(pull.load("k-of-pull").await, "pull");
}

pub async fn refs_have_entries_of_the_same_name_and_find_their_own_first(target: &Target) {
    let main = target.cache();
    let pull = main.by(Who::PullRequest);
    pull.save("k", "pull").await;
    main.save("k", "main").await;
    pull.save("a-1", "pull").await;
    main.save("a-2", "main").await;
    assert_eq!(main.load("k").await, "main");
    assert_eq!(pull.load("k").await, "pull");
    // One's own comes first even if it is older and only begins with a later key.
    for keys in [&["a-"][..], &["a-2", "a-"]] {
        assert_eq!(pull.matched(keys).await.as_deref(), Some("a-1"));
        assert_eq!(main.matched(keys).await.as_deref(), Some("a-2"));
    }
}

pub async fn a_reader_is_told_that_it_cannot_write(target: &Target) {
    let main = target.cache();
    let reader = main.by(Who::ReadOnly);
    main.save("k", "content").await;
    assert_eq!(reader.load("k").await, "content");
    main.reserve("two").await;
    let upload = main.reserve_v1("one").await;
    // Clients know this refusal by how it begins.
    let denied = "cache write denied:";
    for refused in [reader.create("new").await, reader.finalize("two", 0).await] {
        let refused = refused.expect(200).json();
        assert_eq!(refused["ok"], false);
        assert!(refused["message"].as_str().unwrap().starts_with(denied));
    }
    // The same in protobuf: the key `new` and a version.
    let create = target.request(Method::POST, &format!("{V2}/CreateCacheEntry"));
    let create = create.header("content-type", "application/protobuf");
    let create = create.bearer_auth(target.token(Who::ReadOnly));
    let refused = send(create.body(&b"\x12\x03new\x1a\x01v"[..])).await;
    assert_eq!(refused.error(), (403, "permission_denied".to_owned()));
    for refused in [
        reader.create_v1("new", None).await,
        reader.patch(upload, "bytes 0-0/*", "x").await,
        reader.commit(upload, 0).await,
    ] {
        let message = &refused.expect(403).json()["message"];
        assert!(message.as_str().unwrap().starts_with(denied), "{message}");
    }
    assert_eq!(main.matched(&["new"]).await, None);
    main.commit(upload, 0).await.expect(204);
}

pub async fn an_upload_belongs_to_its_ref(target: &Target) {
    let main = target.cache();
    let pull = main.by(Who::PullRequest);
    let upload = main.reserve_v1("one").await;
    main.reserve("two").await;
    pull.patch(upload, "bytes 0-0/*", "x").await.expect(404);
    pull.commit(upload, 0).await.expect(404);
    let refused = pull.finalize("two", 0).await.expect(404);
    assert_eq!(refused.json()["code"], json!("not_found"));
    main.commit(upload, 0).await.expect(204);
    main.finalize("two", 0).await.expect(200);
}
