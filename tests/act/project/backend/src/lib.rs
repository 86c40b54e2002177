//! A library with one dependency.

/// The number in decimal.
pub fn text(number: u32) -> String {
    itoa::Buffer::new().format(number).to_owned()
}

#[test]
fn a_number_is_written_in_decimal() {
    assert_eq!(text(42), "42");
}
