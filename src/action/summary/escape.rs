//! Escapes foreign text, so that Markdown shows it and does nothing else.

/// Foreign text as Markdown that shows it and does nothing else.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        let (before, after) = text.split_at(at);
        match c {
            // GitHub turns text that looks like an address into a link.
            ':' if after.starts_with("://") => escaped.push_str("&#58;"),
            '.' if ends_with_www(before) => escaped.push_str("&#46;"),
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\n' | '\r' => escaped.push(' '),
            // Mentions and references would notify people and link elsewhere.
            '@' => escaped.push_str("&#64;"),
            '#' => escaped.push_str("&#35;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '$' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

fn ends_with_www(text: &str) -> bool {
    let start = text.len().checked_sub(3);
    let end = start.and_then(|start| text.get(start..));
    end.is_some_and(|end| end.eq_ignore_ascii_case("www"))
}

/// Foreign text as code inside a table. An HTML element, since a pipe cannot be written in a code
/// span of a table.
pub(super) fn code(text: &str) -> String {
    format!("<code>{}</code>", escape(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::summary::fixtures::report;
    use crate::action::summary::{Report, markdown};

    #[test]
    fn foreign_text_becomes_neither_a_link_nor_a_mention() {
        let why =
            "see https://evil.example/?a=b, FTP://x, WWW.evil.example, @user, #1, [a](b) and <a>";
        let shown = markdown(&Report {
            uncached: 1,
            uncached_reason: Some(why),
            cache_location: why,
            ..report(Err(why), "")
        });
        for link in ["://", "www.", "WWW.", "@user", "#1", "[a]", "<a>"] {
            assert!(!shown.contains(link), "{link}: {shown}");
        }
        assert!(shown.contains("https&#58;//evil.example/?a=b"), "{shown}");
        // Text that is no address stays as it is.
        assert_eq!(
            escape("a: b/c, ww.x, 7.5 s, C:/x"),
            "a: b/c, ww.x, 7.5 s, C:/x"
        );
    }
}
