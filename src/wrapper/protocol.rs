//! The messages of sccache's protocol that a compile needs, as values and bytes.
//!
//! Each message is its length, four bytes with the largest first, and then the value in the first version
//! of bincode: integers of fixed size with the smallest byte first, a `u32` for the variant of an enum, a
//! `u64` for a length (`src/protocol.rs` and `src/util.rs` of sccache). The server is a process of this
//! job, but the wrapper checks its answers like anything that comes through a socket.

use std::ffi::{OsStr, OsString};

use semver::Version;

/// The largest answer that the wrapper reads, in bytes. A compiler's output is a few MB at most.
pub const ANSWER_LIMIT: u32 = 64 * 1024 * 1024;

/// `Request::CompileRequest`, the same in all versions.
const COMPILE: u32 = 4;

/// `Request::GetStats`, the same in all versions.
const GET_STATS: u32 = 1;

/// A dialect: the differences between versions of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// Which variant of an answer is `CompileFinished`.
    finished: u32,
}

/// Major, minor and patch of a version.
pub type VersionNumbers = (u64, u64, u64);

/// The versions whose server the wrapper speaks to directly: first version, last version, dialect. The
/// `src/protocol.rs` of several of each row was read, and `tests/it/wrapper.rs` compiles through the
/// oldest, the newest and some between.
const DIALECTS: [(VersionNumbers, VersionNumbers, Dialect); 2] = [
    ((0, 4, 0), (0, 7, 6), Dialect { finished: 4 }),
    // `Response::ZeroStats` was added before it.
    ((0, 7, 7), (0, 19, 0), Dialect { finished: 5 }),
];

impl Dialect {
    /// The dialect of this sccache's server, or `None` if it is unknown and sccache's own client has to
    /// ask.
    pub fn of(version: &Version) -> Option<Self> {
        if !version.pre.is_empty() {
            return None;
        }
        let version = (version.major, version.minor, version.patch);
        let row = DIALECTS
            .iter()
            .find(|(from, to, _)| (*from..=*to).contains(&version));
        row.map(|(_, _, dialect)| *dialect)
    }
}

/// A request to compile.
#[derive(Debug)]
pub struct CompileRequest<'a> {
    /// The full path of the compiler.
    pub compiler: &'a OsStr,
    /// Its working folder.
    pub folder: &'a OsStr,
    /// Its arguments.
    pub arguments: &'a [OsString],
    /// Its environment.
    pub environment: &'a [(OsString, OsString)],
}

impl CompileRequest<'_> {
    /// The message with its length in front; `None` if it is longer than the length field allows.
    pub fn message(&self) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(16 * 1024);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&COMPILE.to_le_bytes());
        put(&mut bytes, self.compiler);
        put(&mut bytes, self.folder);
        put_length(&mut bytes, self.arguments.len());
        for argument in self.arguments {
            put(&mut bytes, argument);
        }
        put_length(&mut bytes, self.environment.len());
        for (name, value) in self.environment {
            put(&mut bytes, name);
            put(&mut bytes, value);
        }
        let length = u32::try_from(bytes.len() - 4).ok()?;
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        Some(bytes)
    }
}

/// The request for statistics: any server that works answers it.
pub fn statistics_message() -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&4_u32.to_be_bytes());
    bytes[4..].copy_from_slice(&GET_STATS.to_le_bytes());
    bytes
}

fn put_length(bytes: &mut Vec<u8>, length: usize) {
    bytes.extend_from_slice(&(length as u64).to_le_bytes());
}

/// serde has an `OsString` as an enum: bytes on Unix, 16-bit units on Windows.
#[cfg(not(windows))]
fn put(bytes: &mut Vec<u8>, text: &OsStr) {
    let text = text.as_encoded_bytes();
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    put_length(bytes, text.len());
    bytes.extend_from_slice(text);
}

#[cfg(windows)]
fn put(bytes: &mut Vec<u8>, text: &OsStr) {
    use std::os::windows::ffi::OsStrExt;
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    put_length(bytes, text.encode_wide().count());
    for unit in text.encode_wide() {
        bytes.extend_from_slice(&unit.to_le_bytes());
    }
}

/// An answer to [`CompileRequest`].
#[derive(Debug, PartialEq, Eq)]
pub enum CompileAnswer<'a> {
    /// It has been started; a [`CompileAnswer::Finished`] follows.
    Started,
    /// The server does not do this one: it cannot be cached.
    Unhandled,
    /// The server does not know the compiler.
    Unsupported(String),
    /// The compiler has ended, or its output was in the cache.
    Finished(Finished<'a>),
}

/// How a compile ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Finished<'a> {
    /// The exit status; `None` if there is none.
    pub status: Option<i32>,
    /// The compiler's standard output.
    pub stdout: &'a [u8],
    /// The compiler's standard error.
    pub stderr: &'a [u8],
    /// Whether the compiler's arguments ask for colours.
    pub colour: Colour,
}

/// Whether the output should have colours (`ColorMode` of sccache).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// The arguments say no.
    Off,
    /// The arguments say yes.
    On,
    /// The arguments leave it to the terminal.
    Auto,
}

/// Parses an answer, without its length. `None` if it is not one to [`CompileRequest`].
pub fn answer(dialect: Dialect, bytes: &[u8]) -> Option<CompileAnswer<'_>> {
    let mut reader = MessageReader(bytes);
    let answer = match reader.u32()? {
        0 => match reader.u32()? {
            0 => CompileAnswer::Started,
            1 => CompileAnswer::Unhandled,
            2 => CompileAnswer::Unsupported(reader.os_string()?),
            _ => return None,
        },
        variant if variant == dialect.finished => {
            let status = reader.optional_i32()?;
            let _signal = reader.optional_i32()?;
            CompileAnswer::Finished(Finished {
                status,
                stdout: reader.bytes()?,
                stderr: reader.bytes()?,
                colour: match reader.u32()? {
                    0 => Colour::Off,
                    1 => Colour::On,
                    2 => Colour::Auto,
                    _ => return None,
                },
            })
        }
        _ => return None,
    };
    reader.0.is_empty().then_some(answer)
}

/// The bytes that are left to read.
struct MessageReader<'a>(&'a [u8]);

impl<'a> MessageReader<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = u64::from_le_bytes(self.array()?);
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn optional_i32(&mut self) -> Option<Option<i32>> {
        match self.array::<1>()? {
            [0] => Some(None),
            [1] => Some(Some(i32::from_le_bytes(self.array()?))),
            _ => None,
        }
    }

    fn os_string(&mut self) -> Option<String> {
        match self.u32()? {
            0 => Some(String::from_utf8_lossy(self.bytes()?).into_owned()),
            1 => {
                let length = usize::try_from(u64::from_le_bytes(self.array()?)).ok()?;
                let (taken, rest) = self.0.split_at_checked(length.checked_mul(2)?)?;
                self.0 = rest;
                let units: Vec<u16> = taken
                    .chunks_exact(2)
                    .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
                    .collect();
                Some(String::from_utf16_lossy(&units))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NEW: Dialect = Dialect { finished: 5 };

    fn finished(variant: u32, status: Option<i32>, stderr: &[u8]) -> Vec<u8> {
        let mut bytes = variant.to_le_bytes().to_vec();
        match status {
            Some(status) => {
                bytes.push(1);
                bytes.extend_from_slice(&status.to_le_bytes());
            }
            None => bytes.push(0),
        }
        bytes.push(0);
        put_length(&mut bytes, 0);
        put_length(&mut bytes, stderr.len());
        bytes.extend_from_slice(stderr);
        bytes.extend_from_slice(&2_u32.to_le_bytes());
        bytes
    }

    #[test]
    fn only_the_versions_that_were_read_are_spoken_to_directly() {
        let dialect = |version: &str| Dialect::of(&Version::parse(version).unwrap());
        for version in ["0.3.3", "0.4.0-pre.6", "0.19.1", "0.20.0", "1.0.0"] {
            assert_eq!(dialect(version), None, "{version}");
        }
        for version in ["0.4.0", "0.5.3", "0.7.6"] {
            assert_eq!(dialect(version), Some(Dialect { finished: 4 }), "{version}");
        }
        for version in ["0.7.7", "0.8.2", "0.10.0", "0.16.0", "0.19.0"] {
            assert_eq!(dialect(version), Some(NEW), "{version}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_request_has_the_bytes_that_sccaches_own_client_sends() {
        let compile = CompileRequest {
            compiler: OsStr::new("/b/cc"),
            folder: OsStr::new("/w"),
            arguments: &[OsString::from("-c")],
            environment: &[(OsString::from("A"), OsString::from("é"))],
        };
        let message = compile.message().unwrap();
        let expected: &[&[u8]] = &[
            &[0, 0, 0, 95],
            &[4, 0, 0, 0],
            &[0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0],
            b"/b/cc",
            &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            b"/w",
            &[1, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            b"-c",
            &[1, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            b"A",
            &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            "é".as_bytes(),
        ];
        let mut expected = expected.concat();
        let length = u32::try_from(expected.len() - 4).unwrap();
        expected[..4].copy_from_slice(&length.to_be_bytes());
        assert_eq!(message, expected);
    }

    #[test]
    fn each_answer_is_read_as_the_version_has_it() {
        assert_eq!(answer(NEW, &[0; 8]), Some(CompileAnswer::Started));
        assert_eq!(
            answer(NEW, &[0, 0, 0, 0, 1, 0, 0, 0]),
            Some(CompileAnswer::Unhandled)
        );
        let mut unsupported = vec![0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
        put_length(&mut unsupported, 2);
        unsupported.extend_from_slice(b"no");
        assert_eq!(
            answer(NEW, &unsupported),
            Some(CompileAnswer::Unsupported("no".to_owned()))
        );
        let mut wide = vec![0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0];
        put_length(&mut wide, 1);
        wide.extend_from_slice(&[0xe9, 0]);
        assert_eq!(
            answer(NEW, &wide),
            Some(CompileAnswer::Unsupported("é".to_owned()))
        );
        let bytes = finished(5, Some(-2), b"said");
        let expected = Finished {
            status: Some(-2),
            stdout: b"",
            stderr: b"said",
            colour: Colour::Auto,
        };
        assert_eq!(answer(NEW, &bytes), Some(CompileAnswer::Finished(expected)));
        assert_eq!(answer(Dialect { finished: 4 }, &bytes), None);
    }

    #[test]
    fn a_length_beyond_the_message_is_refused() {
        let mut bytes = finished(5, None, b"said");
        assert!(answer(NEW, &bytes).is_some());
        bytes[14..22].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(answer(NEW, &bytes), None);
        let mut wide = vec![0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0];
        wide.extend_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(answer(NEW, &wide), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = answer(NEW, &bytes);
            let cut = finished(5, Some(0), &bytes);
            prop_assert!(answer(NEW, &cut).is_some());
            prop_assert_eq!(answer(NEW, &cut[..cut.len() - 1]), None);
        }
    }
}
