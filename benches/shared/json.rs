//! Rows of a benchmark as JSON, for `docs/pictures/charts` to draw.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// Writes what the benchmark `bench` measured with these settings to `file`: a line for each row.
///
/// # Panics
/// Fails if that cannot be done.
pub fn write(file: &Path, bench: &str, settings: &Value, rows: &[Value]) {
    let lines: Vec<String> = rows.iter().map(|row| format!("    {row}")).collect();
    let text = format!(
        "{{\n  \"bench\": {},\n  \"settings\": {settings},\n  \"rows\": [\n{}\n  ]\n}}\n",
        Value::from(bench),
        lines.join(",\n")
    );
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(file, text).unwrap();
}

/// A number with as many digits behind the point as a figure needs.
pub fn rounded(number: f64) -> Value {
    Value::from((number * 1000.0).round() / 1000.0)
}
