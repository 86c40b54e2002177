//! Getting an sccache binary: choosing its version, and fetching, checking and keeping it.
