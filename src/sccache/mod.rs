//! Speaking to an installed sccache: its server and its statistics.
