//! The header `Content-Range` of a piece of content (RFC 9110, 14.4).

use std::fmt;
use std::ops::Range;

/// A `Content-Range` header's bytes of content, the last one included, and the total size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentRange {
    /// The first byte.
    pub first: u64,
    /// The last byte.
    pub last: u64,
    /// The size of the whole; `None` for `*`.
    pub total: Option<u64>,
}

impl ContentRange {
    /// The `length` bytes from `first` on, of content of unknown size.
    pub fn piece(first: u64, length: u64) -> Self {
        Self {
            first,
            last: (first + length).saturating_sub(1),
            total: None,
        }
    }

    /// Reads `bytes FIRST-LAST/TOTAL` or `bytes FIRST-LAST/*`. `None` for anything else, and if the
    /// range is empty or outside of the total.
    pub fn parse(value: &str) -> Option<Self> {
        let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let total = match total.trim() {
            "*" => None,
            total => Some(number(total)?),
        };
        let (first, last) = (number(first)?, number(last)?);
        let fits = first <= last && last < total.unwrap_or(u64::MAX);
        fits.then_some(Self { first, last, total })
    }

    /// How many bytes it has.
    pub fn length(self) -> u64 {
        self.last - self.first + 1
    }

    /// Whether this is exactly the existing part of `asked`.
    pub fn is_all_of(self, asked: &Range<u64>) -> bool {
        let end = self.total.map_or(asked.end, |total| asked.end.min(total));
        self.first == asked.start && self.last == end - 1
    }
}

impl fmt::Display for ContentRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "bytes {}-{}/", self.first, self.last)?;
        match self.total {
            Some(total) => write!(formatter, "{total}"),
            None => formatter.write_str("*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_content_range_is_read_strictly() {
        let range = ContentRange::parse("bytes 2-4/10").unwrap();
        assert_eq!((range.first, range.last, range.total), (2, 4, Some(10)));
        assert_eq!(range.length(), 3);
        let range = ContentRange::parse("bytes 0-4/*").unwrap();
        assert_eq!((range.length(), range.total), (5, None));
        assert_eq!(ContentRange::piece(0, 5), range);
        for wrong in [
            "",
            "bytes",
            "bytes 4-0/*",
            "bytes -4/*",
            "bytes 0-/*",
            "bytes 0-4",
            "bytes 0-4/4",
            "bytes 0-4/",
            "bytes 0-18446744073709551615/*",
            "items 0-4/*",
        ] {
            assert_eq!(ContentRange::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_part_must_be_what_was_asked_for() {
        let is_all_of =
            |text: &str, asked: Range<u64>| ContentRange::parse(text).unwrap().is_all_of(&asked);
        assert!(is_all_of("bytes 2-4/10", 2..5));
        assert!(is_all_of("bytes 2-9/10", 2..20));
        assert!(is_all_of("bytes 2-9/10", 2..u64::MAX));
        for asked in [1..5, 2..4, 2..6, 2..u64::MAX] {
            assert!(!is_all_of("bytes 2-4/10", asked.clone()), "{asked:?}");
        }
    }

    proptest! {
        #[test]
        fn no_content_range_leaves_its_content(value in "bytes [0-9]{1,20}-[0-9]{1,20}/[0-9]{1,20}") {
            if let Some(range) = ContentRange::parse(&value) {
                prop_assert!(range.first <= range.last);
                prop_assert!(Some(range.last) < range.total);
                prop_assert_eq!(ContentRange::parse(&range.to_string()), Some(range));
            }
        }
    }
}
