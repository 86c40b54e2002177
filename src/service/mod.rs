//! The cache service: what GitHub's cache API looks like to its clients, over a store of entries.
