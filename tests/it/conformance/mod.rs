//! The behaviours of the cache service that `docs/cache-service.md` numbers, each as a check of a
//! [`Target`] over HTTP, by raw requests and by real clients.

mod auth;
mod download;
mod errors;
mod limits;
mod look_up;
mod reservation;
mod sccache;
mod scopes;
pub mod target;
mod toolkit;
mod upload_v1;
mod upload_v2;

use std::env;
use std::io::{self, Write};
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use futures_util::future::LocalBoxFuture;
use futures_util::{FutureExt, StreamExt, stream};

pub use self::target::{Target, Who};

/// Numbers of the behaviours to check, if not all: `B5 B7`.
const ONLY: &str = "SCCACHE_ACTION_CONFORMANCE_ONLY";

/// How many are checked at once: real clients spend their time waiting for each other.
const AT_ONCE: usize = 4;

/// A behaviour, and how it is checked.
pub struct Behaviour {
    pub number: &'static str,
    /// The check's module and name, as the documentation has it.
    pub test: &'static str,
    /// The tokens that it needs besides the default branch's.
    needs: &'static [Who],
    check: fn(&Target) -> LocalBoxFuture<'_, ()>,
}

macro_rules! behaviours {
    ($($number:ident $module:ident::$name:ident $(needs $($who:ident)+)?;)*) => {
        /// All behaviours, in the order of their numbers.
        pub const BEHAVIOURS: &[Behaviour] = &[$(Behaviour {
            number: stringify!($number),
            test: concat!(stringify!($module), "::", stringify!($name)),
            needs: &[$($(Who::$who),+)?],
            check: |target| Box::pin($module::$name(target)),
        }),*];
    };
}

behaviours! {
    B1 look_up::a_miss_of_version_2_is_an_answer_that_is_not_ok;
    B2 look_up::a_miss_of_version_1_has_no_content;
    B3 look_up::a_hit_names_the_key_and_where_the_content_is;
    B4 look_up::an_exact_key_beats_a_newer_one_that_begins_with_it;
    B5 look_up::of_those_that_begin_with_a_key_the_one_committed_last_is_found;
    B6 look_up::keys_are_tried_in_their_order;
    B7 look_up::another_version_is_another_cache;
    B8 look_up::keys_are_compared_byte_by_byte;
    B9 look_up::both_protocols_have_the_same_entries;

    B10 reservation::an_upload_url_has_two_path_segments_and_a_query;
    B11 reservation::version_1_gives_a_number;
    B12 reservation::of_many_at_once_one_is_granted;
    B13 reservation::an_entry_never_changes;
    B14 reservation::nothing_is_found_before_its_commit;
    B15 reservation::a_commit_with_the_wrong_size_is_refused_and_may_be_repeated;
    B16 reservation::only_what_is_reserved_is_committed_and_only_once;
    B17 reservation::an_entry_may_be_empty;
    B18 reservation::an_upload_that_breaks_off_may_begin_again;

    B19 upload_v2::put_blob_is_the_whole_content_and_may_be_repeated;
    B20 upload_v2::blocks_are_joined_in_the_order_of_the_list;
    B21 upload_v2::a_block_may_be_sent_again_named_twice_or_left_out;
    B22 upload_v2::a_list_with_an_unknown_block_is_refused_and_may_be_repeated;
    B23 upload_v2::blocks_have_names_of_any_text;
    B24 upload_v2::an_upload_url_takes_nothing_else;

    B25 upload_v1::pieces_come_in_any_order_and_at_once;
    B26 upload_v1::a_piece_may_be_sent_again;
    B27 upload_v1::a_piece_must_be_as_long_as_its_range;
    B28 upload_v1::an_unknown_upload_takes_no_piece;

    B29 download::a_download_has_its_length_and_needs_no_token;
    B30 download::any_range_can_be_read;
    B31 download::a_range_beyond_the_end_is_told_the_size;
    B32 download::head_tells_the_size;
    B33 download::what_is_no_single_range_and_what_is_conditional_is_served_whole;
    B34 download::an_entry_has_one_etag;

    B35 scopes::a_pull_request_reads_its_base_and_the_default_branch needs Base PullRequest;
    B36 scopes::nobody_reads_a_pull_request needs Base PullRequest;
    B37 scopes::refs_have_entries_of_the_same_name_and_find_their_own_first needs PullRequest;
    B38 scopes::a_reader_is_told_that_it_cannot_write needs ReadOnly;
    B39 scopes::an_upload_belongs_to_its_ref needs PullRequest;

    B40 auth::nobody_gets_in_without_a_token;
    B41 auth::a_signed_url_opens_its_own_content_in_its_own_way_only;
    B42 auth::urls_are_under_the_host_that_was_asked;

    B43 limits::a_key_has_up_to_512_characters_and_no_comma;
    B44 limits::a_look_up_names_up_to_ten_keys;
    B45 limits::an_entry_has_up_to_10_gib;
    B46 limits::versions_and_sizes_must_make_sense;

    B47 errors::twirp_has_its_codes;
    B48 errors::version_1_has_a_message;
    B49 errors::content_has_azures_codes;
    B50 errors::an_answer_is_in_the_form_of_its_request;

    B51 toolkit::speaks_version_2;
    B52 toolkit::speaks_version_1;
    B53 toolkit::uploads_in_blocks_and_pieces;
    B54 toolkit::downloads_as_from_azure;
    B55 toolkit::goes_on_where_it_may_not_write needs ReadOnly;

    B56 sccache::speaks_version_2;
    B57 sccache::speaks_version_1;
    B58 sccache::speaks_version_1_where_the_server_is_not_githubs;
    B59 sccache::only_reads_where_it_may_not_write needs ReadOnly;
}

/// Checks all behaviours, and fails with a list of those that `target` does not have. Behaviours
/// that are skipped without a token are named on standard error, even if the test runner captures
/// output.
pub async fn run_all(target: &Target) {
    run(target, |_| true).await;
}

/// The same of those behaviours that need no real client: what a client gets is in the others.
pub async fn run_raw(target: &Target) {
    let is_raw = |behaviour: &Behaviour| {
        !behaviour.test.starts_with("toolkit::") && !behaviour.test.starts_with("sccache::")
    };
    run(target, is_raw).await;
}

async fn run(target: &Target, chosen: impl Fn(&Behaviour) -> bool) {
    let only = env::var(ONLY).ok();
    let wanted = |behaviour: &&Behaviour| {
        let only = only.as_deref();
        let is_wanted =
            only.is_none_or(|only| only.split_whitespace().any(|one| one == behaviour.number));
        is_wanted && chosen(behaviour)
    };
    let wanted: Vec<&Behaviour> = BEHAVIOURS.iter().filter(wanted).collect();
    assert!(!wanted.is_empty(), "{ONLY} names no behaviour");
    let failed: Vec<String> = stream::iter(wanted)
        .map(|behaviour| check(behaviour, target))
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    let count = failed.len();
    assert!(
        count == 0,
        "{count} behaviours differ:\n{}",
        failed.join("\n")
    );
}

/// Why `target` fails the check, if it does.
async fn check(behaviour: &Behaviour, target: &Target) -> Option<String> {
    let Behaviour { number, test, .. } = behaviour;
    // The test runner would capture a macro's output.
    let mut output = io::stderr();
    let mut say = |what: String| writeln!(output, "{number} {test}: {what}").unwrap();
    if let Some(who) = behaviour.needs.iter().find(|who| !target.has(**who)) {
        say(format!("skipped, {} is not set", who.variable()));
        return None;
    }
    let begin = Instant::now();
    let checked = AssertUnwindSafe((behaviour.check)(target)).catch_unwind();
    let Err(panic) = checked.await else {
        say(format!("{} ms", begin.elapsed().as_millis()));
        return None;
    };
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    Some(format!("{number} {test}: {}", text.unwrap_or("panicked")))
}
