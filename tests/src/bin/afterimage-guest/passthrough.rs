//! A SCSI command that no hook of the block layer sees.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

const SG_IO: libc::c_ulong = 0x2285;
const SG_DXFER_TO_DEV: i32 = -2;
const BYTES: usize = 4096;

/// `struct sg_io_hdr`.
#[repr(C)]
struct Header {
    interface_id: i32,
    dxfer_direction: i32,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *mut u8,
    cmdp: *mut u8,
    sbp: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: i32,
    usr_ptr: *mut u8,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: i32,
    duration: u32,
    info: u32,
}

/// Writes 4 KiB of chance at a sector of 512 bytes.
pub fn write(disk: &Path, sector: u32) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(disk).context("open the disk")?;
    let mut bytes: [u8; BYTES] = std::array::from_fn(|_| rand::random());
    let mut sense = [0u8; 64];
    // WRITE(10) of eight sectors.
    let mut command = [0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0];
    command[2..6].copy_from_slice(&sector.to_be_bytes());
    let mut header = Header {
        interface_id: i32::from(b'S'),
        dxfer_direction: SG_DXFER_TO_DEV,
        cmd_len: 10,
        mx_sb_len: 64,
        iovec_count: 0,
        dxfer_len: 4096,
        dxferp: bytes.as_mut_ptr(),
        cmdp: command.as_mut_ptr(),
        sbp: sense.as_mut_ptr(),
        timeout: 20_000,
        flags: 0,
        pack_id: 0,
        usr_ptr: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sb_len_wr: 0,
        host_status: 0,
        driver_status: 0,
        resid: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the header is the kernel's, and what it points to lives through the call and is as long as it
    // says.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), SG_IO, &raw mut header) };
    ensure!(done == 0, "SG_IO: {}", std::io::Error::last_os_error());
    ensure!(header.status == 0 && header.host_status == 0, "the disk refused it: {}", header.status);
    Ok(())
}
