//! A server that speaks S3, on a folder.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sccache_action::serve::blob_store::{Bucket, Credentials, Location};
use tempfile::TempDir;

/// Its credentials, which it checks.
pub const ACCESS_KEY: &str = "test-access-key";
/// See [`ACCESS_KEY`].
pub const SECRET_KEY: &str = "test-secret-key";

/// A running server with one bucket.
pub struct S3 {
    child: Child,
    /// Its URL.
    pub url: String,
    folder: TempDir,
}

impl S3 {
    /// Starts one.
    pub fn start(program: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("bucket")).unwrap();
        let port = sccache_action::sccache::server::free_port().unwrap();
        let child = Command::new(program)
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY])
            .arg(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "s3s-fs did not start"
            );
            // It prints nothing when it is ready.
            std::thread::sleep(Duration::from_millis(10));
        }
        Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            folder,
        }
    }

    /// Its bucket.
    pub fn location(&self, prefix: &str) -> Location {
        Location::Bucket(Bucket {
            name: "bucket".to_owned(),
            prefix: prefix.to_owned(),
            endpoint: Some(self.url.clone()),
            region: Some("us-east-1".to_owned()),
            credentials: Some(Credentials {
                access_key: ACCESS_KEY.to_owned(),
                secret_key: SECRET_KEY.to_owned(),
            }),
        })
    }

    /// The folder in which it keeps the bucket's objects as files.
    pub fn folder(&self) -> std::path::PathBuf {
        self.folder.path().join("bucket")
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
