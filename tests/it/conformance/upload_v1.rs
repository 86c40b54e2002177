//! Uploads of version 1: pieces with a `Content-Range`.

use futures_util::future::join_all;

use super::target::Target;

pub async fn pieces_come_in_any_order_and_at_once(target: &Target) {
    let cache = target.cache();
    let upload = cache.reserve_v1("k").await;
    // The total is `*` or a number.
    let pieces = [("6-10/*", "three"), ("0-2/11", "one"), ("3-5/*", "two")];
    let sent = pieces.map(|(range, content)| {
        let (cache, range) = (&cache, format!("bytes {range}"));
        async move { cache.patch(upload, &range, content).await }
    });
    for answer in join_all(sent).await {
        answer.expect(204);
    }
    cache.commit(upload, 11).await.expect(204);
    assert_eq!(cache.load("k").await, "onetwothree");
    // A piece that is missing is not made up for with zeros.
    let upload = cache.reserve_v1("gap").await;
    cache.patch(upload, "bytes 3-5/*", "two").await.expect(204);
    cache.commit(upload, 6).await.expect(400);
}

pub async fn a_piece_may_be_sent_again(target: &Target) {
    let cache = target.cache();
    let upload = cache.reserve_v1("k").await;
    for (range, content) in [
        ("3-5", "two"),
        ("0-2", "???"),
        ("3-5", "two"),
        ("0-2", "one"),
    ] {
        let range = format!("bytes {range}/*");
        cache.patch(upload, &range, content).await.expect(204);
    }
    cache.commit(upload, 6).await.expect(204);
    assert_eq!(cache.load("k").await, "onetwo");
}

pub async fn a_piece_must_be_as_long_as_its_range(target: &Target) {
    let cache = target.cache();
    let upload = cache.reserve_v1("k").await;
    for range in [
        "bytes 0-1/*",
        "bytes 0-9/*",
        "bytes 2-0/*",
        "bytes 0-2",
        "bytes -2/*",
        "items 0-2/*",
        "nonsense",
        "",
    ] {
        cache.patch(upload, range, "one").await.expect(400);
    }
    // Nothing of the refused content is there.
    cache.commit(upload, 3).await.expect(400);
    cache.patch(upload, "bytes 0-2/*", "one").await.expect(204);
    cache.commit(upload, 3).await.expect(204);
    assert_eq!(cache.load("k").await, "one");
}

pub async fn an_unknown_upload_takes_no_piece(target: &Target) {
    let cache = target.cache();
    let unknown = (1 << 53) - 1;
    cache.patch(unknown, "bytes 0-2/*", "one").await.expect(404);
    cache.commit(unknown, 0).await.expect(404);
}
