//! The ioctls of `/dev/kfilter`, typed, and what their errors ask of the operator.
//!
//! Each function is one call; who may call it when is said in `ioctl`. Pointers in arguments live as long as
//! the call.

use super::error::{Error, ErrorKind};
use super::ioctl as abi;
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, Updater, ioctl};
use std::fs::File;
use std::path::{Path, PathBuf};

/// An open `/dev/kfilter`.
#[derive(Debug)]
pub struct Calls {
    file: File,
    path: PathBuf,
}

/// What `errno` means for most calls.
fn kind_of(errno: Errno) -> ErrorKind {
    match errno {
        Errno::NOTTY => ErrorKind::OtherAbi,
        Errno::PERM | Errno::ACCESS => ErrorKind::NotPermitted,
        Errno::BUSY => ErrorKind::Busy,
        Errno::NOENT => ErrorKind::Absent,
        Errno::NOSPC => ErrorKind::NoSpace,
        Errno::NOMEM => ErrorKind::NoMemory,
        Errno::STALE => ErrorKind::BitmapMode,
        Errno::NOTEMPTY => ErrorKind::Dirty,
        Errno::TIMEDOUT => ErrorKind::TimedOut,
        Errno::INVAL => ErrorKind::Invalid,
        _ => ErrorKind::Io,
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($number:ident, $argument:ident);)*) => {$(
        $(#[$doc])*
        pub fn $name(&self, argument: &mut abi::$argument) -> Result<(), Error> {
            self.call::<{ abi::$number as Opcode }, _>(argument)
        }
    )*};
}

impl Calls {
    /// Opens the device and agrees on the version.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::options().read(true).write(true).open(path).map_err(|source| {
            let kind = match Errno::from_io_error(&source) {
                Some(Errno::NOENT | Errno::NXIO | Errno::NODEV) => ErrorKind::NoModule,
                Some(Errno::PERM | Errno::ACCESS) => ErrorKind::NotPermitted,
                _ => ErrorKind::Io,
            };
            Error { kind, at: path.to_path_buf(), source: Some(source) }
        })?;
        let calls = Self { file, path: path.to_path_buf() };
        let mut version = abi::Version { abi: abi::ABI, ..abi::Version::default() };
        let answered = calls.version(&mut version);
        let other = || Error { kind: ErrorKind::OtherAbi, at: path.to_path_buf(), source: None };
        match answered {
            Err(error) if error.is(Errno::TOOBIG) => Err(other()),
            Err(error) => Err(error),
            Ok(()) if version.abi != abi::ABI || version.ring != super::abi::VERSION => Err(other()),
            Ok(()) => Ok(calls),
        }
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// An error of our own finding.
    pub fn error(&self, kind: ErrorKind) -> Error {
        Error { kind, at: self.path.clone(), source: None }
    }

    fn errno(&self, errno: Errno) -> Error {
        Error { kind: kind_of(errno), at: self.path.clone(), source: Some(errno.into()) }
    }

    fn call<const NUMBER: Opcode, T>(&self, argument: &mut T) -> Result<(), Error> {
        loop {
            // SAFETY: every number is made of the size of the structure that is passed with it (`calls!`
            // below names the two side by side, and `ioctl` defines them so), and the kernel keeps no pointer
            // to it.
            match unsafe { ioctl(&self.file, Updater::<NUMBER, T>::new(argument)) } {
                Err(Errno::INTR) => {}
                done => return done.map_err(|errno| self.errno(errno)),
            }
        }
    }

    calls! {
        /// What the module speaks.
        version(VERSION, Version);
        /// The groups of this machine.
        list(LIST, List);
        /// A new group; this file is its agent.
        create(CREATE, Create);
        /// Become the agent of a group.
        take(OPEN, Open);
        /// Capture a device.
        attach(ATTACH, Attach);
        /// Stop capturing a volume.
        detach(DETACH, Detach);
        /// Positions and counters.
        status(STATUS, Status);
        /// One volume.
        volume(VOLUME, VolumeStatus);
        /// The bell.
        eventfd(EVENTFD, EventFd);
        /// Ring the bell at the next publish.
        arm(ARM, Arm);
        /// Give room back.
        release(RELEASE, Release);
        /// Put an event into the order.
        event(EVENT, Event);
        /// Put empty sync slots into the order.
        slots(SLOTS, Slots);
        /// Begin a resync, or a fence.
        begin(BEGIN, Begin);
        /// Wait for what was submitted before the last begin.
        barrier(BARRIER, Barrier);
        /// Clear pending bits.
        clear(CLEAR, Range);
        /// Set bits.
        mark(MARK, Range);
        /// End a resync.
        end(END, End);
        /// Writes only set bits.
        bitmap(BITMAP, Bitmap);
    }

    /// Forget the group.
    pub fn destroy(&self) -> Result<(), Error> {
        // SAFETY: the call takes no argument.
        unsafe { ioctl(&self.file, NoArg::<{ abi::DESTROY as Opcode }>::new()) }
            .map_err(|errno| self.errno(errno))
    }
}

impl Error {
    /// Whether the system said this.
    pub fn is(&self, errno: Errno) -> bool {
        self.source.as_ref().is_some_and(|source| Errno::from_io_error(source) == Some(errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString as _;

    #[test]
    fn what_is_missing_is_said_with_its_cure() {
        let missing = Calls::open(Path::new("/dev/no-such-kfilter")).unwrap_err();
        assert_eq!(missing.kind, ErrorKind::NoModule);
        assert!(missing.to_string().contains("modprobe kfilter"), "{missing}");
        assert!(missing.to_string().contains("capture = \"nbd\""), "{missing}");
        // Some other character device: it does not know our calls.
        let other = Calls::open(Path::new("/dev/null")).unwrap_err();
        assert_eq!(other.kind, ErrorKind::OtherAbi, "{other}");
    }

    #[test]
    fn numbers_are_linuxs() {
        assert_eq!(abi::VERSION, 0xc018_af00, "_IOWR(0xAF, 0, 24 bytes)");
        assert_eq!(abi::DESTROY, 0x0000_af04);
        assert_eq!(abi::CREATE & 0xffff, 0xaf02);
    }
}
