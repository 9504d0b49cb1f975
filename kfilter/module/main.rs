// SPDX-License-Identifier: GPL-2.0
//! kfilter: copies every write of chosen block devices, in the order of their submission, into a ring that an
//! agent in user space reads.
//!
//! ```text
//!  submit_bio ─► tracepoint block_bio_queue ─► hook ──► ring of the group (or its dirty bitmaps)
//!                  block_getrq, merges     ─► late ─┘          ▲ mapped read-only
//!                  bi_end_io, wrapped      ─► done             │
//!                                                /dev/kfilter ─┴─► agent
//! ```
//!
//! | file | what happens there |
//! |---|---|
//! | `sys` | the kernel's functions that the `kernel` crate lacks |
//! | `host` | the ring's surroundings here: memory, lock, bell |
//! | `contexts` | a pool of places for what belongs to a followed bio |
//! | `bio` | what a bio says, without trusting it to stay |
//! | `hook` | data plane: probes and end_io; never sleeps, never allocates |
//! | `attached` | control plane: a device from attach to detach |
//! | `group` | control plane: volumes that share one ring |
//! | `device` | `/dev/kfilter`: ioctls and mmap |
//!
//! `abi`, `consumer`, `dirty`, `entry`, `handover`, `memory`, `recovery`, `reservation`, `ring` and `ioctl`
//! are the very files that the agent compiles (`kfilter/src`).

use kernel::prelude::*;

// The agent's half of them is unused here, and what is public there is not seen from outside here.
#[path = "../src/abi.rs"]
#[allow(dead_code, unreachable_pub)]
mod abi;
#[path = "../src/consumer.rs"]
#[allow(dead_code, unreachable_pub)]
mod consumer;
#[path = "../src/dirty.rs"]
#[allow(dead_code, unreachable_pub)]
mod dirty;
#[path = "../src/entry.rs"]
#[allow(dead_code, unreachable_pub)]
mod entry;
#[path = "../src/handover.rs"]
#[allow(dead_code, unreachable_pub)]
mod handover;
#[path = "../src/ioctl.rs"]
#[allow(dead_code, unreachable_pub)]
mod ioctl;
#[path = "../src/memory.rs"]
#[allow(dead_code, unreachable_pub)]
mod memory;
#[path = "../src/recovery.rs"]
#[allow(dead_code, unreachable_pub)]
mod recovery;
#[path = "../src/reservation.rs"]
#[allow(dead_code, unreachable_pub)]
mod reservation;
#[path = "../src/ring.rs"]
#[allow(dead_code, unreachable_pub)]
mod ring;

mod attached;
mod bio;
mod contexts;
mod device;
mod group;
mod hook;
mod host;
mod sys;

module! {
    type: Kfilter,
    name: "kfilter",
    authors: ["The Afterimage authors"],
    description: "Capture of block device writes for Afterimage",
    license: "GPL",
    params: {
        memory_limit_mib: u64 {
            default: 1024,
            description: "Most MiB that rings, bitmaps and contexts of all groups may take (1024)",
        },
        measure: u32 {
            default: 0,
            description: "Measure the time in the hook (0)",
        },
    },
}

/// The module. The node goes before what its files use.
#[pin_data]
struct Kfilter {
    #[pin]
    node: kernel::miscdevice::MiscDeviceRegistration<device::Agent>,
    shared: group::Shared,
}

impl kernel::InPlaceModule for Kfilter {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let limit_bytes = module_parameters::memory_limit_mib.value().saturating_mul(1 << 20);
        let measure = module_parameters::measure.value() != 0;
        let options = kernel::miscdevice::MiscDeviceOptions { name: c"kfilter" };
        try_pin_init!(Self {
            shared: group::Shared::new(limit_bytes, measure)?,
            node <- kernel::miscdevice::MiscDeviceRegistration::register(options),
        })
    }
}
