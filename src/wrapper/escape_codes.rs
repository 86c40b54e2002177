//! Terminal escape codes in a compiler's output. sccache always has compilers print colours, so that one
//! object serves terminals and files. If the bare compiler would print none, the wrapper removes them
//! again.

const ESCAPE: u8 = 0x1b;
const BELL: u8 = 0x07;

/// `text` without escape codes; all other bytes stay.
pub fn without(text: &[u8]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.iter().position(|byte| *byte == ESCAPE) {
        kept.extend_from_slice(&rest[..at]);
        rest = after_code(&rest[at + 1..]);
    }
    kept.extend_from_slice(rest);
    kept
}

/// The text behind the code whose escape character came just before `text` (ECMA-48, 5.3 to 5.6).
fn after_code(text: &[u8]) -> &[u8] {
    let end = match text.first() {
        None => 0,
        // A control sequence ends with its first byte that is no parameter.
        Some(b'[') => position(&text[1..], |byte| !(0x20..0x40).contains(&byte))
            .map_or(text.len(), |at| at + 2),
        // An operating system command, as links are, ends with a bell or with another code.
        Some(b']') => match position(text, |byte| byte == BELL || byte == ESCAPE) {
            Some(at) if text[at] == BELL => at + 1,
            Some(at) => (at + 2).min(text.len()),
            None => text.len(),
        },
        Some(_) => {
            position(text, |byte| !(0x20..0x30).contains(&byte)).map_or(text.len(), |at| at + 1)
        }
    };
    &text[end..]
}

fn position(text: &[u8], ends: impl Fn(u8) -> bool) -> Option<usize> {
    text.iter().position(|byte| ends(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn colours_and_links_go_and_all_else_stays() {
        for (text, expected) in [
            (
                "\x1b[01m\x1b[Ka.c:1:\x1b[m\x1b[K x\ty\r\n",
                "a.c:1: x\ty\r\n",
            ),
            ("\x1b]8;;https://gcc.gnu.org/\x07-Wall\x1b]8;;\x07", "-Wall"),
            ("\x1b]8;;u\x1b\\link\x1b]8;;\x1b\\", "link"),
            ("\x1b(Bx", "x"),
            ("end\x1b", "end"),
            ("end\x1b[38;5", "end"),
        ] {
            let found = without(text.as_bytes());
            assert_eq!(String::from_utf8(found).unwrap(), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_has_no_escape_code_stays_as_it_is(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let plain: Vec<u8> = text.iter().copied().filter(|byte| *byte != ESCAPE).collect();
            prop_assert_eq!(without(&plain), plain);
            prop_assert!(!without(&text).contains(&ESCAPE));
        }
    }
}
