//! Reading an entry's content.

use reqwest::Method;

use super::target::{Answer, Target, noise, send};

/// The URL of an entry with this content.
async fn stored(target: &Target, content: &[u8]) -> String {
    let cache = target.cache();
    cache.save("k", content).await;
    cache.locate("k").await
}

async fn get_with(target: &Target, url: &str, header: &str, value: &str) -> Answer {
    send(target.content(Method::GET, url).header(header, value)).await
}

pub async fn a_download_has_its_length_and_needs_no_token(target: &Target) {
    let content = noise(1 << 20);
    let url = stored(target, &content).await;
    let whole = target.get(&url).await.expect(200);
    assert_eq!(whole.header("content-length"), "1048576");
    assert!(whole.body == content);
}

pub async fn any_range_can_be_read(target: &Target) {
    let content = noise(1 << 20);
    let url = stored(target, &content).await;
    let end = content.len() - 1;
    for (range, first, last) in [
        ("0-0", 0, 0),
        ("5-1000", 5, 1000),
        ("0-", 0, end),
        ("1048575-", end, end),
        ("-7", end - 6, end),
        ("-2000000", 0, end),
        ("300000-2000000", 300_000, end),
    ] {
        // Azure's clients name the range in a header of their own.
        for header in ["range", "x-ms-range"] {
            let part = get_with(target, &url, header, &format!("bytes={range}")).await;
            let part = part.expect(206);
            let shown = format!("bytes {first}-{last}/{}", content.len());
            assert_eq!(part.header("content-range"), shown);
            let length = (last - first + 1).to_string();
            assert_eq!(part.header("content-length"), length);
            assert!(part.body == content[first..=last], "{range}");
        }
    }
}

pub async fn a_range_beyond_the_end_is_told_the_size(target: &Target) {
    for (content, range) in [("content", "7-"), ("content", "-0"), ("", "0-0")] {
        let url = stored(target, content.as_bytes()).await;
        let refused = get_with(target, &url, "range", &format!("bytes={range}")).await;
        let shown = format!("bytes */{}", content.len());
        assert_eq!(refused.expect(416).header("content-range"), shown);
    }
}

pub async fn head_tells_the_size(target: &Target) {
    let url = stored(target, b"content").await;
    let head = send(target.content(Method::HEAD, &url)).await.expect(200);
    assert_eq!(head.header("content-length"), "7");
    assert_eq!(head.header("accept-ranges"), "bytes");
    assert_eq!(head.header("x-ms-blob-type"), "BlockBlob");
    assert!(head.body.is_empty());
}

pub async fn what_is_no_single_range_and_what_is_conditional_is_served_whole(target: &Target) {
    let url = stored(target, b"content").await;
    let etag = target.get(&url).await.expect(200).header("etag").to_owned();
    for (header, value) in [
        ("range", "bytes=0-1,5-6"),
        ("range", "bytes=5-2"),
        ("range", "bytes=a-b"),
        ("range", "items=0-1"),
        ("if-match", etag.as_str()),
        ("if-none-match", etag.as_str()),
        ("if-modified-since", "Fri, 01 Jan 2100 00:00:00 GMT"),
    ] {
        let whole = get_with(target, &url, header, value).await.expect(200);
        assert_eq!(whole.text(), "content", "{header} {value}");
    }
}

pub async fn an_entry_has_one_etag(target: &Target) {
    let url = stored(target, b"content").await;
    let whole = target.get(&url).await;
    let part = get_with(target, &url, "range", "bytes=0-0").await;
    let head = send(target.content(Method::HEAD, &url)).await;
    assert!(whole.header("etag").len() > 2);
    for other in [part, head] {
        assert_eq!(other.header("etag"), whole.header("etag"));
    }
}
