//! GitHub's own APIs, as a client.
