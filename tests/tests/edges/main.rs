//! Stories of the edges: what users and others do to disks, replicas, rings, directories and clocks. Each is
//! short, and two may run side by side: none judges a latency.

mod clocks;
mod daemons;
mod devices;
mod disks;
mod full_disks;
mod journals;
mod peers;
mod replicas;
mod restores;
mod rings;
