//! Digests computed in C.

macro_rules! digests {
    ($($name:ident),* $(,)?) => {
        mod c {
            unsafe extern "C" {
                $(pub fn $name(bytes: *const u8, length: usize) -> u64;)*
            }
        }

        /// The digests of `bytes` by their names.
        pub fn digests(bytes: &[u8]) -> Vec<(&'static str, u64)> {
            // SAFETY: each function reads `length` bytes from `bytes` and nothing else.
            vec![$((stringify!($name), unsafe { c::$name(bytes.as_ptr(), bytes.len()) })),*]
        }
    };
}

digests!(
    adler32, crc32, djb2, fletcher, fnv1a, jenkins, pearson, sdbm
);

#[cfg(test)]
mod tests {
    #[test]
    fn digests_of_a_known_text_are_known() {
        let digests = super::digests(b"123456789");
        assert!(digests.contains(&("crc32", 0xcbf4_3926)));
        assert!(digests.contains(&("adler32", 0x091e_01de)));
        assert!(digests.contains(&("fletcher", 0x1ede)));
    }
}
