//! The numbers of uploads, entries and blobs. Each kind has its own type, so that no number of one
//! kind is taken for another's.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Defines types of numbers. In JSON, in a URL and in a database each is the bare number.
macro_rules! number_types {
    ($($(#[doc = $doc:literal])* $name:ident)*) => {$(
        $(#[doc = $doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl From<$name> for u64 {
            fn from($name(number): $name) -> Self {
                number
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(formatter)
            }
        }
    )*};
}

number_types! {
    /// The number of an upload.
    UploadId
    /// The number of an entry. Later ones are greater.
    EntryId
    /// The number of a blob. Later ones are greater.
    BlobId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_written_and_read_bare() {
        assert_eq!(serde_json::to_string(&EntryId(7)).unwrap(), "7");
        assert_eq!(serde_json::from_str::<UploadId>("7").unwrap(), UploadId(7));
        assert_eq!(format!("{:02}", BlobId(7)), "07");
    }
}
