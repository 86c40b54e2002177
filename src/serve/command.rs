//! `sccache-action serve`: the standalone cache service, for self-hosted runners, act, Gitea and
//! Forgejo.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use tracing::{info, warn};
use url::Url;

use crate::cache_protocol::auth::{Access, Tokens};
use crate::cache_protocol::forgejo::ForgejoRunner;
use crate::cache_protocol::runtime_token::{AllowedRepositories, AllowedRepository, scope_of};
use crate::cache_protocol::store::Scope;
use crate::cache_protocol::{self, Authenticator};
use crate::http::BearerToken;
use crate::http::{self, Timeouts};
use crate::packs::local_file::read_limited;
use crate::serve::blob_store::{Bucket, Location};
use crate::serve::catalog::{Database, PostgresUrl};
use crate::serve::entry_store::{StorageConfig, StoreLimits};
use crate::serve::server::{self, ClientTimeouts, ServerConfig, ServiceError};
use crate::serve::token_check::{GITHUB_ISSUER, HmacSecret, Issuer, Keys, RuntimeTokens};
use crate::stop_signal::stop_signal;

/// The largest file of tokens or of a secret, in bytes: ten thousand tokens fit.
const FILE_LIMIT: u64 = 1 << 20;

/// The scope of tokens that name none.
const DEFAULT_SCOPE: &str = "refs/heads/main";

/// How the service is set up. Each option may be given as the variable that its help names.
#[derive(Clone, Debug, Args)]
pub struct ServeOptions {
    /// The address to listen at. Other machines can reach any address but 127.0.0.1
    #[arg(long, env = "SCCACHE_ACTION_LISTEN", default_value = "127.0.0.1:8089")]
    pub listen: SocketAddr,

    /// The folder for the entries, and for the list of entries unless --database is set
    #[arg(
        long,
        env = "SCCACHE_ACTION_FOLDER",
        default_value = ".sccache-action-cache"
    )]
    pub folder: PathBuf,

    /// The database of entries: postgres://USER:PASSWORD@HOST/DATABASE, which several services can
    /// share. The default is SQLite in the folder
    #[arg(long, env = "SCCACHE_ACTION_DATABASE", hide_env_values = true, value_parser = database)]
    pub database: Option<PostgresUrl>,

    /// The storage for the bytes: s3://BUCKET/PREFIX. The default is the folder. Credentials come
    /// from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from the other sources of AWS's tools
    #[arg(long, env = "SCCACHE_ACTION_BLOBS", value_parser = bucket)]
    pub blobs: Option<Bucket>,

    /// The URL of the S3 service, if it is not Amazon's
    #[arg(long, env = "SCCACHE_ACTION_S3_ENDPOINT", requires = "blobs")]
    pub s3_endpoint: Option<String>,

    /// The region of the bucket. The default is AWS_REGION, then AWS_DEFAULT_REGION
    #[arg(long, env = "SCCACHE_ACTION_S3_REGION", requires = "blobs")]
    pub s3_region: Option<String>,

    /// A file of tokens and their scopes; see docs/serve.md
    #[arg(long, env = "SCCACHE_ACTION_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Accept the tokens of GitHub's jobs. The service checks their signature with the keys that
    /// the issuer publishes. The default issuer is github.com
    #[arg(
        long,
        env = "SCCACHE_ACTION_GITHUB_TOKENS",
        value_name = "ISSUER",
        num_args = 0..=1,
        default_missing_value = GITHUB_ISSUER,
        value_parser = issuer
    )]
    pub github_tokens: Option<String>,

    /// Accept tokens signed with the secret in this file (HS256), as Gitea's are
    #[arg(long, env = "SCCACHE_ACTION_TOKEN_SECRET_FILE", value_name = "FILE")]
    pub token_secret_file: Option<PathBuf>,

    /// Accept the jobs of a Forgejo runner; the file has the cache.secret of its configuration
    #[arg(long, env = "SCCACHE_ACTION_FORGEJO_SECRET_FILE", value_name = "FILE")]
    pub forgejo_secret_file: Option<PathBuf>,

    /// Accept only jobs of these repositories: OWNER, OWNER/NAME, or id:NUMBER by a repository's
    /// number. Repeatable. Applies to tokens that runners give to jobs, not to those of
    /// --token-file
    #[arg(
        long,
        env = "SCCACHE_ACTION_ALLOW",
        value_name = "OWNER[/NAME]",
        value_delimiter = ','
    )]
    pub allow: Vec<AllowedRepository>,

    /// Accept unverified tokens. Only for single-user machines
    #[arg(long, env = "SCCACHE_ACTION_UNCHECKED_TOKENS")]
    pub unchecked_tokens: bool,

    /// The URL by which clients reach the service, if it differs from the requested host: behind a
    /// proxy that speaks TLS
    #[arg(long, env = "SCCACHE_ACTION_PUBLIC_URL", value_parser = public_url)]
    pub public_url: Option<String>,

    /// The limit of all entries together. The least recently used entries of the largest repository
    /// go first. Uncommitted uploads may take the same amount again
    #[arg(long, env = "SCCACHE_ACTION_MAX_SIZE", default_value = "10GiB", value_parser = limit)]
    pub max_size: ByteSize,

    /// The limit of one repository's entries. The default is that of all entries
    #[arg(long, env = "SCCACHE_ACTION_MAX_REPOSITORY_SIZE", value_parser = limit)]
    pub max_repository_size: Option<ByteSize>,

    /// The limit of one entry
    #[arg(long, env = "SCCACHE_ACTION_MAX_ENTRY_SIZE", default_value = "10GiB", value_parser = limit)]
    pub max_entry_size: ByteSize,

    /// The time after which an entry that nobody reads is deleted; 0 keeps it for ever
    #[arg(
        long,
        env = "SCCACHE_ACTION_MAX_UNUSED",
        default_value = "7d",
        value_parser = humantime::parse_duration
    )]
    pub max_unused: Duration,

    /// The limit of connections of an address, in IPv6 of a network of 64 bits; 0 means no limit
    #[arg(
        long,
        env = "SCCACHE_ACTION_MAX_CONNECTIONS_PER_ADDRESS",
        value_name = "N",
        default_value_t = 2048
    )]
    pub max_connections_per_address: usize,

    /// The format of the log, on standard error
    #[arg(long, env = "SCCACHE_ACTION_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// The level of the log: error, warn, info, or debug, which logs each request
    #[arg(long, env = "SCCACHE_ACTION_LOG_LEVEL", default_value = "info")]
    pub log_level: LevelFilter,
}

/// A form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for a person.
    Text,
    /// A line of JSON.
    Json,
}

fn database(text: &str) -> Result<PostgresUrl, String> {
    let url = Url::parse(text).ok();
    match url.as_ref().map(Url::scheme) {
        Some("postgres" | "postgresql") => Ok(PostgresUrl(text.to_owned())),
        _ => Err("it must have the form postgres://USER:PASSWORD@HOST/DATABASE".to_owned()),
    }
}

fn limit(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(size) if size.as_u64() > 0 => Ok(size),
        _ => Err("it must be a size above 0, such as 500MiB or 10GiB".to_owned()),
    }
}

fn issuer(text: &str) -> Result<String, String> {
    match http::parse_url(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err(format!(
            "it must be the URL of an issuer, such as {GITHUB_ISSUER}"
        )),
    }
}

fn bucket(text: &str) -> Result<Bucket, String> {
    let (name, prefix) = text
        .strip_prefix("s3://")
        .map(|rest| rest.split_once('/').unwrap_or((rest, "")))
        .filter(|(name, _)| !name.is_empty())
        .ok_or("it must have the form s3://BUCKET or s3://BUCKET/PREFIX")?;
    Ok(Bucket {
        name: name.to_owned(),
        prefix: prefix.trim_matches('/').to_owned(),
        ..Bucket::default()
    })
}

fn public_url(text: &str) -> Result<String, String> {
    match http::parse_url(text) {
        Some(url) if url.query().is_none() => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err("it must begin with https:// or http:// and have no query".to_owned()),
    }
}

/// The reason why the service could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A file that an option names cannot be read.
    #[error("--{option}: {}: {error}", path.display())]
    File {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// The file of tokens is invalid.
    #[error("--token-file: {0}")]
    Tokens(String),
    /// A secret is empty.
    #[error("--{0}: the file is empty")]
    EmptySecret(&'static str),
    /// Repositories are listed, and no option accepts the tokens of their jobs.
    #[error(
        "--allow: it has no effect without --github-tokens, --token-secret-file, \
         --forgejo-secret-file or --unchecked-tokens"
    )]
    NoTokensOfJobs,
    /// There is a bucket, and nobody names its region.
    #[error("--s3-region: the bucket needs a region; pass it or set AWS_REGION")]
    NoRegion,
    /// The HTTP client could not be made.
    #[error("cannot create an HTTP client: {0}")]
    Client(#[from] reqwest::Error),
    /// The service did not start.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// It ended with an error, or could not shut down.
    #[error("the cache service ended: {0}")]
    Ended(#[from] io::Error),
}

/// A line of the file of tokens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListedToken {
    token: String,
    /// The token does not see entries of another repository.
    #[serde(default)]
    repository: String,
    /// The scope that it reads and writes; without it the token is read-only if `read` is given.
    write: Option<String>,
    #[serde(default)]
    read: Vec<String>,
}

/// The tokens that `text` lists, in YAML.
fn listed_tokens(text: &str) -> Result<Tokens, String> {
    let listed: Vec<ListedToken> = serde_yaml::from_str(text).map_err(|error| error.to_string())?;
    if listed.is_empty() {
        return Err("it contains no token".to_owned());
    }
    listed
        .into_iter()
        .try_fold(Tokens::default(), |tokens, listed| {
            if listed.token.trim().is_empty() {
                return Err("a token is empty".to_owned());
            }
            let scope = |name: &str| match listed.repository.as_str() {
                "" => Scope::from(name),
                repository => scope_of(repository, name),
            };
            let default = listed.read.is_empty().then_some(DEFAULT_SCOPE);
            let write = listed.write.as_deref().or(default).map(scope);
            let others = listed.read.iter().map(|name| scope(name));
            let read = write.iter().cloned().chain(others).collect();
            Ok(tokens.with(&BearerToken::new(listed.token), Access { write, read }))
        })
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, ServeError> {
    read_limited(path, FILE_LIMIT).map_err(|error| ServeError::File {
        option,
        path: path.to_owned(),
        error: match error.kind() {
            io::ErrorKind::FileTooLarge => io::Error::other("the file is larger than 1 MiB"),
            _ => error,
        },
    })
}

/// A secret from a file, without the line end that editors add.
fn secret(option: &'static str, path: &Path) -> Result<Vec<u8>, ServeError> {
    let text = read(option, path)?;
    let end = text.trim_ascii_end().len();
    match end {
        0 => Err(ServeError::EmptySecret(option)),
        end => Ok(text[..end].to_vec()),
    }
}

impl ServeOptions {
    /// The storage; `default_region` is that of a bucket if no option names one.
    ///
    /// # Errors
    /// [`ServeError::NoRegion`] if a bucket has none.
    fn storage(&self, default_region: Option<String>) -> Result<StorageConfig, ServeError> {
        let limits = StoreLimits {
            // Databases have no larger numbers.
            entry: self.max_entry_size.as_u64().min(i64::MAX as u64),
            total: Some(self.max_size.as_u64()),
            repository: self.max_repository_size.map(|size| size.as_u64()),
            unused: (!self.max_unused.is_zero()).then_some(self.max_unused),
        };
        let alone = StorageConfig::in_folder(&self.folder, limits);
        let blobs = match self.blobs.clone() {
            None => alone.blobs,
            Some(bucket) => {
                let region = self.s3_region.clone().or(default_region);
                Location::Bucket(Bucket {
                    endpoint: self.s3_endpoint.clone(),
                    region: Some(region.ok_or(ServeError::NoRegion)?),
                    ..bucket
                })
            }
        };
        let shared = self.database.clone().map(Database::Postgres);
        Ok(StorageConfig {
            // Services that share a database share the folder too, if that is where blobs are.
            lock: alone.lock.filter(|_| shared.is_none()),
            database: shared.unwrap_or(alone.database),
            blobs,
            reserve: alone.reserve.filter(|_| self.database.is_none()),
            limits,
        })
    }

    /// The accepted credentials. If no option names any, the service creates a token, which is then
    /// the only one.
    fn authenticator(&self) -> Result<(Authenticator, Option<BearerToken>), ServeError> {
        let mut authenticator = Authenticator::default();
        let allowed = AllowedRepositories(self.allow.clone());
        if let Some(path) = &self.token_file {
            let text = read("token-file", path)?;
            let text = String::from_utf8_lossy(&text);
            authenticator.tokens = listed_tokens(&text).map_err(ServeError::Tokens)?.into();
        }
        if let Some(path) = &self.token_secret_file {
            let secret = HmacSecret(secret("token-secret-file", path)?);
            authenticator.runtime.push(Box::new(RuntimeTokens::new(
                Keys::Secret(secret),
                allowed.clone(),
            )));
        }
        if let Some(issuer) = &self.github_tokens {
            let issuer = Issuer::new(issuer, http::build(Timeouts::default())?);
            authenticator.runtime.push(Box::new(RuntimeTokens::new(
                Keys::Issuer(issuer),
                allowed.clone(),
            )));
        }
        if self.unchecked_tokens {
            authenticator.runtime.push(Box::new(RuntimeTokens::new(
                Keys::Unchecked,
                allowed.clone(),
            )));
        }
        if let Some(path) = &self.forgejo_secret_file {
            authenticator.forgejo = Some(ForgejoRunner::new(
                secret("forgejo-secret-file", path)?,
                allowed,
            ));
        }
        let accepts_jobs = authenticator.forgejo.is_some() || !authenticator.runtime.is_empty();
        if !accepts_jobs && !self.allow.is_empty() {
            return Err(ServeError::NoTokensOfJobs);
        }
        if accepts_jobs || self.token_file.is_some() {
            return Ok((authenticator, None));
        }
        let (token, tokens) =
            cache_protocol::single_token(DEFAULT_SCOPE).map_err(ServiceError::from)?;
        Ok((Authenticator::from(tokens), Some(token)))
    }
}

fn start_log(options: &ServeOptions) {
    let log = tracing_subscriber::fmt()
        .with_max_level(options.log_level)
        .with_target(false)
        .with_writer(io::stderr);
    // An existing logger stays.
    let _ = match options.log_format {
        LogFormat::Text => log
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}

/// Each connection takes a descriptor, and the usual limit is a thousand although the system allows
/// many more.
#[cfg(unix)]
fn take_all_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = maximum;
    // If the system refuses, the current limit stays.
    let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
}

/// Runs the service until the process is told to end. It prints the variables that a client needs
/// on standard output, one a line, once it listens.
///
/// # Errors
/// Fails if the service does not start, or ends with an error.
pub async fn run(options: ServeOptions) -> Result<(), ServeError> {
    start_log(&options);
    // The folder is private: it has the entries of all repositories and the key of signed URLs.
    #[cfg(unix)]
    {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        take_all_descriptors();
    }
    let (authenticator, token) = options.authenticator()?;
    if options.unchecked_tokens && !options.listen.ip().is_loopback() {
        warn!("tokens are not checked, and other machines can reach this service");
    }
    if let (Some(issuer), []) = (&options.github_tokens, options.allow.as_slice()) {
        warn!(
            issuer,
            "jobs of every repository are accepted; restrict them with --allow"
        );
    }
    let default_region = ["AWS_REGION", "AWS_DEFAULT_REGION"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|region| !region.is_empty()));
    // Signals are caught from here on, so that none is missed while the store is opened.
    let stop = stop_signal()?;
    let config = ServerConfig {
        storage: options.storage(default_region)?,
        address: options.listen,
        authenticator,
        public_url: options.public_url,
        patience: ClientTimeouts::default(),
        connections: match options.max_connections_per_address {
            0 => None,
            most => Some(most),
        },
    };
    let mut stop = std::pin::pin!(stop);
    let mut running = tokio::select! {
        started = server::start(config) => started?,
        () = &mut stop => return Ok(()),
    };
    println!("ACTIONS_RESULTS_URL={}", running.url());
    println!("ACTIONS_CACHE_URL={}", running.url());
    if let Some(token) = token {
        println!("ACTIONS_RUNTIME_TOKEN={}", token.reveal());
    }
    info!("listening at {}", running.address());
    tokio::select! {
        ended = running.ended() => ended?,
        () = &mut stop => {
            info!("shutting down after the requests in flight");
            running.shutdown().await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: ServeOptions,
    }

    fn options(arguments: &[&str]) -> ServeOptions {
        let arguments = std::iter::once(&"serve").chain(arguments);
        Line::try_parse_from(arguments).unwrap().options
    }

    #[test]
    fn without_options_it_is_a_folder_on_loopback_with_githubs_limits() {
        let options = options(&[]);
        assert!(options.listen.ip().is_loopback());
        let limits = StoreLimits {
            entry: 10 << 30,
            total: Some(10 << 30),
            repository: None,
            unused: Some(Duration::from_secs(7 * 24 * 60 * 60)),
        };
        let folder = Path::new(".sccache-action-cache");
        let storage = options.storage(None).unwrap();
        assert_eq!(storage.limits, limits);
        assert_eq!(
            storage.database,
            StorageConfig::in_folder(folder, limits).database
        );
        assert!(storage.lock.is_some());
        let (_, token) = options.authenticator().unwrap();
        assert!(token.is_some());
    }

    #[test]
    fn a_shared_storage_is_not_locked() {
        let url = "postgres://u:hunter2@127.0.0.1/cache";
        let options = options(&[
            "--database",
            url,
            "--blobs",
            "s3://bucket/some/prefix/",
            "--s3-endpoint",
            "http://127.0.0.1:9000",
            "--max-unused",
            "0s",
        ]);
        let storage = options.storage(Some("eu".to_owned())).unwrap();
        assert_eq!(storage.lock, None);
        assert_eq!(storage.limits.unused, None);
        let bucket = Bucket {
            name: "bucket".to_owned(),
            prefix: "some/prefix".to_owned(),
            endpoint: Some("http://127.0.0.1:9000".to_owned()),
            region: Some("eu".to_owned()),
            ..Bucket::default()
        };
        assert_eq!(storage.blobs, Location::Bucket(bucket));
        assert!(!format!("{options:?} {storage:?}").contains("hunter2"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_option_s_name() {
        for (arguments, named) in [
            (["--database", "mysql://host/db"], "postgres://"),
            (["--blobs", "gs://bucket"], "s3://BUCKET"),
            (["--blobs", "s3:///prefix"], "s3://BUCKET"),
            (["--max-size", "lots"], "--max-size"),
            (["--allow", "a/b/c"], "OWNER/NAME"),
            (["--max-unused", "week"], "--max-unused"),
            (["--max-size", "0"], "--max-size"),
            (["--max-size=-1", "--unchecked-tokens"], "--max-size"),
            (["--max-entry-size", "0"], "--max-entry-size"),
            (["--github-tokens", "foo"], "--github-tokens"),
            (["--github-tokens", ""], "--github-tokens"),
            (["--database", "foo"], "--database"),
            (["--public-url", "cache.example"], "--public-url"),
            (["--log-format", "xml"], "--log-format"),
            (["--s3-region", "eu"], "--blobs"),
        ] {
            let line = [&["serve"][..], &arguments].concat();
            let error = Line::try_parse_from(line).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_bucket_needs_a_region_from_the_option_or_the_environment() {
        let eu = || Some("eu".to_owned());
        for (arguments, default, expected) in [
            (&[][..], None, None),
            (&[], eu(), Some("eu")),
            (&["--s3-region", "us"], eu(), Some("us")),
        ] {
            let line = [&["--blobs", "s3://bucket"], arguments].concat();
            let storage = options(&line).storage(default);
            let region = storage.ok().map(|storage| match storage.blobs {
                Location::Bucket(bucket) => bucket.region,
                Location::Folder(folder) => panic!("{}", folder.display()),
            });
            assert_eq!(region.flatten().as_deref(), expected);
        }
    }

    #[test]
    fn a_list_of_repositories_without_tokens_of_their_jobs_is_refused() {
        let listed = options(&["--allow", "a"]);
        let error = listed.authenticator().unwrap_err().to_string();
        assert!(
            error.contains("--allow") && error.contains("--github-tokens"),
            "{error}"
        );
        let accepted = options(&["--allow", "a", "--unchecked-tokens"]);
        assert!(accepted.authenticator().is_ok());
    }

    #[test]
    fn a_file_of_tokens_says_what_each_opens() {
        let tokens = listed_tokens(
            "- token: one\n\
             - token: two\n  repository: o/r\n  write: refs/pull/1/merge\n  read: [refs/heads/main]\n\
             - token: three\n  read: [refs/heads/main]\n",
        )
        .unwrap();
        let access = |token: &str| {
            let header = format!("Bearer {token}");
            tokens.access(Some(header.as_bytes())).unwrap()
        };
        assert_eq!(*access("one"), Access::to(DEFAULT_SCOPE.into()));
        let two = access("two");
        assert_eq!(two.write, Some("o/r:refs/pull/1/merge".into()));
        assert_eq!(
            two.read,
            ["o/r:refs/pull/1/merge".into(), "o/r:refs/heads/main".into()]
        );
        let three = access("three");
        assert_eq!((three.write.clone(), three.read.len()), (None, 1));
        for wrong in [
            "",
            "[]",
            "- token: ''",
            "- tokn: x",
            "- token: x\n  scope: y",
        ] {
            assert!(listed_tokens(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_secret_is_read_without_the_line_s_end_and_must_not_be_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        std::fs::write(&path, "secret\n").unwrap();
        assert_eq!(secret("x", &path).unwrap(), b"secret");
        std::fs::write(&path, " \n").unwrap();
        assert!(secret("x", &path).is_err());
        std::fs::File::create(&path)
            .unwrap()
            .set_len(FILE_LIMIT + 1)
            .unwrap();
        let large = secret("x", &path).unwrap_err();
        assert!(large.to_string().contains("larger than 1 MiB"), "{large}");
        let missing = secret("x", &folder.path().join("missing")).unwrap_err();
        assert!(missing.to_string().contains("--x"), "{missing}");
    }
}
