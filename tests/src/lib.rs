//! End-to-end stories, the rig and the oracle.
