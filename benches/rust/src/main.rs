//! A program as small as one can be that uses some of what it depends on.

use clap::Parser;
use serde::Serialize;

#[derive(Parser)]
struct Options {
    #[arg(default_value = "127.0.0.1")]
    host: String,
}

#[derive(Serialize)]
struct Answer {
    id: uuid::Uuid,
    host: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Options { host } = Options::parse();
    let id = uuid::Uuid::new_v4();
    println!("{}", serde_json::to_string(&Answer { id, host })?);
    Ok(())
}
