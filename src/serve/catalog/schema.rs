//! The tables, and how those of an older service become them.

use sqlx::{AnyPool, Executor};
use tracing::warn;

use crate::serve::catalog::Catalog;

/// The SQL dialect of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// The repository of a row: the part of its scope before the first colon.
    pub(super) fn repository(self) -> &'static str {
        match self {
            Self::Sqlite => "SUBSTR(scope, 1, MAX(INSTR(scope, ':') - 1, 0))",
            Self::Postgres => "SUBSTR(scope, 1, GREATEST(STRPOS(scope, ':') - 1, 0))",
        }
    }
}

/// The columns that number themselves; SQLite's `AUTOINCREMENT` never gives a number twice.
pub(super) fn schema(dialect: Dialect) -> Vec<String> {
    let (numbered, text, content) = match dialect {
        // An integer key is the place of the row itself; any other key would be an extra index.
        Dialect::Sqlite => (
            "INTEGER PRIMARY KEY AUTOINCREMENT",
            "TEXT NOT NULL",
            "blob INTEGER PRIMARY KEY, content BLOB NOT NULL",
        ),
        // Prefixes are compared by their bytes, in any locale of the database.
        Dialect::Postgres => (
            "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
            "TEXT COLLATE \"C\" NOT NULL",
            "blob BIGINT PRIMARY KEY, content BYTEA NOT NULL",
        ),
    };
    vec![
        "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)".into(),
        format!(
            "CREATE TABLE IF NOT EXISTS uploads (id {numbered}, scope {text}, version {text}, \
             key {text}, used BIGINT NOT NULL, blocks TEXT, UNIQUE (scope, version, key))"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS parts (id {numbered}, upload BIGINT NOT NULL, block TEXT, \
             start BIGINT NOT NULL, size BIGINT, used BIGINT NOT NULL, digests TEXT, \
             inside BIGINT)"
        ),
        "CREATE INDEX IF NOT EXISTS parts_of_upload ON parts (upload)".into(),
        format!(
            "CREATE TABLE IF NOT EXISTS entries (id {numbered}, scope {text}, version {text}, \
             key {text}, size BIGINT NOT NULL, created BIGINT NOT NULL, used BIGINT NOT NULL, \
             parts TEXT NOT NULL, stored BIGINT, UNIQUE (scope, version, key))"
        ),
        "CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used, id)".into(),
        "CREATE TABLE IF NOT EXISTS garbage (blob BIGINT PRIMARY KEY, since BIGINT NOT NULL)"
            .into(),
        format!(
            "CREATE TABLE IF NOT EXISTS contents \
             ({content}, segment BIGINT, start BIGINT, length BIGINT)"
        ),
    ]
}

/// The number of the schema above. A database of a later schema is refused.
const SCHEMA: &str = "4";

/// The statements that upgrade a database to the next version; missing tables exist by then.
const UPGRADES: [(&str, &[&str]); 3] = [
    (
        "1",
        &[
            "ALTER TABLE parts ADD COLUMN digests TEXT",
            "ALTER TABLE entries ADD COLUMN stored BIGINT",
        ],
    ),
    ("2", &["ALTER TABLE parts ADD COLUMN inside BIGINT"]),
    (
        "3",
        &[
            "ALTER TABLE contents ADD COLUMN segment BIGINT",
            "ALTER TABLE contents ADD COLUMN start BIGINT",
            "ALTER TABLE contents ADD COLUMN length BIGINT",
        ],
    ),
];

impl Catalog {
    /// Upgrades the tables of an older service.
    ///
    /// # Errors
    /// Fails if the database has a later schema.
    pub(super) async fn upgrade(&self) -> Result<(), sqlx::Error> {
        let mut version = self.setting("schema", SCHEMA).await?;
        for (older, statements) in UPGRADES {
            let begin = UPGRADES.iter().position(|(of, _)| *of == version);
            let own = UPGRADES.iter().position(|(of, _)| *of == older);
            if begin.is_some() && begin <= own {
                let statements: Vec<String> = statements.iter().map(|one| (*one).into()).collect();
                prepare(&self.write, &statements).await?;
            }
        }
        if UPGRADES.iter().any(|(of, _)| *of == version) {
            // The contents of a later one would make this slow.
            let has_no_contents = matches!(&*version, "1" | "2");
            self.drop_setting("schema").await?;
            version = self.setting("schema", SCHEMA).await?;
            if self.sqlite.is_some() && has_no_contents {
                // This allows giving free pages back to the disk, from then on.
                let vacuum = "PRAGMA auto_vacuum = INCREMENTAL; VACUUM";
                if let Err(error) = self.write.acquire().await?.execute(vacuum).await {
                    warn!(%error, "cannot shrink the database");
                }
            }
        }
        if version != SCHEMA {
            let message = format!("the database is of version {version}, this service of {SCHEMA}");
            return Err(sqlx::Error::Configuration(message.into()));
        }
        Ok(())
    }
}

pub(super) async fn prepare(pool: &AnyPool, schema: &[String]) -> Result<(), sqlx::Error> {
    for statement in schema {
        let statement = sqlx::AssertSqlSafe(statement.clone());
        match pool.execute(statement).await {
            // Another replica makes the same table in this moment: PostgreSQL finds it when it has
            // begun to make it, or when it enters its name or its type's.
            Err(sqlx::Error::Database(error))
                if error.is_unique_violation()
                    || matches!(error.code().as_deref(), Some("42P07" | "42710" | "42701"))
                    // SQLite has no specific code for an existing column.
                    || error.message().contains("duplicate column name") => {}
            Err(error) => return Err(error),
            Ok(_) => {}
        }
    }
    Ok(())
}
