//! Constants and byte maps of the NBD protocol; all integers are big-endian.
//!
//! ```text
//! greeting       "NBDMAGIC" (8) | "IHAVEOPT" (8) | handshake flags (2)
//! client flags   flags (4)
//! option         "IHAVEOPT" (8) | option (4) | length (4) | data
//! option reply   0x0003e889045565a9 (8) | option (4) | reply type (4) | length (4) | data
//! request        0x25609513 (4) | flags (2) | type (2) | cookie (8) | offset (8) | length (4) | payload of a WRITE
//! simple reply   0x67446698 (4) | error (4) | cookie (8) | payload of a READ
//! chunk          0x668e33ef (4) | flags (2) | type (2) | cookie (8) | length (4) | payload
//!   offset data    offset (8) | bytes
//!   offset hole    offset (8) | hole length (4)
//!   block status   context id (4) | { length (4) | state flags (4) } …
//!   error          error (4) | message length (2) | message
//! ```

/// First eight bytes of the server's greeting.
pub const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Starts every option, and is the second half of the greeting.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Starts every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Starts every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts every structured reply chunk.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of an option before its data.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of a request before its payload.
pub const REQUEST_HEADER_BYTES: usize = 28;

/// Handshake flags, the same bits from server and client.
pub mod handshake_flag {
    /// Unknown options are answered instead of ending the connection.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The 124 zero bytes after the answer to EXPORT_NAME are left out.
    pub const NO_ZEROES: u16 = 2;
}

/// Options of the handshake.
pub mod option {
    /// Legacy selection of an export; ends the handshake without an error path.
    pub const EXPORT_NAME: u32 = 1;
    /// The client gives up.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Describe one export.
    pub const INFO: u32 = 6;
    /// Describe one export and enter the transmission phase.
    pub const GO: u32 = 7;
    /// Ask for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of an option reply.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a LIST.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option's data make no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No export of that name.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
}

/// Types of information in an INFO reply.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A line for humans.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod export_flag {
    /// The other bits are valid.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is supported.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is supported.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is supported.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is supported.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The "do not fragment" flag of READ is supported.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// The FAST_ZERO flag of WRITE_ZEROES is supported.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands of the transmission phase.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the payload follows the header.
    pub const WRITE: u16 = 1;
    /// Disconnect; not answered.
    pub const DISC: u16 = 2;
    /// Make durable what was answered before.
    pub const FLUSH: u16 = 3;
    /// The range is not needed any more.
    pub const TRIM: u16 = 4;
    /// Make the range read as zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe the range in the negotiated contexts.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod command_flag {
    /// Durable before it is answered; valid on every command.
    pub const FUA: u16 = 1;
    /// WRITE_ZEROES must leave the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ must be answered in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: refuse rather than write zeros one by one.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Structured reply chunks.
pub mod chunk {
    /// Flag: the last chunk for its request.
    pub const DONE: u16 = 1;
    /// No payload.
    pub const NONE: u16 = 0;
    /// Bytes of a READ.
    pub const OFFSET_DATA: u16 = 1;
    /// A range of a READ that is all zeros.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a BLOCK_STATUS.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error with a message.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// States of `base:allocation`.
pub mod state {
    /// Not allocated.
    pub const HOLE: u32 = 1;
    /// Reads as zeros.
    pub const ZERO: u32 = 2;
}

/// The only metadata context that is offered.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its id on the wire.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Offsets and lengths must be multiples of this; it is the unit of records in the ring, too.
pub const MIN_BLOCK_BYTES: u32 = 512;
/// What clients should prefer: a page.
pub const PREFERRED_BLOCK_BYTES: u32 = 4096;
/// Largest payload of one READ or WRITE; the protocol's customary limit, which QEMU uses too.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// Longest string the protocol allows.
pub const MAX_STRING_BYTES: usize = 4096;
/// Largest option that is read: a name and a generous number of queries.
pub const MAX_OPTION_BYTES: u32 = 16 << 10;

/// Error numbers of replies (the protocol fixes them; they equal Linux's).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: the export is read-only.
    Perm = 1,
    /// The backing failed.
    Io = 5,
    /// No memory.
    NoMem = 12,
    /// The request makes no sense: unknown command or flag, unaligned, outside the export.
    Inval = 22,
    /// No room, or a write beyond the end.
    NoSpc = 28,
    /// The reply would be too large.
    Overflow = 75,
    /// Cannot be done the way that was asked for.
    NotSup = 95,
    /// The server is being shut down.
    Shutdown = 108,
}

impl Errno {
    /// Number on the wire.
    pub fn code(self) -> u32 {
        self as u32
    }
}
