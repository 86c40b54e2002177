//! Reads text from standard input and prints what the two libraries say of it, as JSON.

use std::io::{self, Read};

fn main() -> io::Result<()> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    let counts = text::word_counts(&text);
    println!(
        "{}",
        text::report(&counts, &native::digests(text.as_bytes()))
    );
    Ok(())
}
