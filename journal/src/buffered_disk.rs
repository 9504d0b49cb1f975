//! A disk that does not wait: what the source journal is kept on while it is live (decision 0005).
//!
//! The source journal is a buffer; the source disk is the truth. A sync in the middle of the stream would
//! stop the consumer of the ring for as long as the disk is busy with the clients' own writes, and the ring
//! would overflow: load would become a gap, to protect bytes that nobody relies on. So syncs do nothing, the
//! kernel writes back when it likes, and [`BufferedDisk::settle`] pays the whole debt once, at a clean stop.
//! Nor is room reserved, or given back in the middle of the stream ([`Disk::waits`]).
//!
//! What this means for the writer's word "durable": it survives the process, not the machine. After a crash
//! of the machine the next start is unclean and synchronises everything, whatever the journal then looks
//! like.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::io::{Disk, File};

/// See the module.
pub struct BufferedDisk(Arc<dyn Disk>);

impl BufferedDisk {
    /// On top of a real one.
    pub fn new(below: Arc<dyn Disk>) -> BufferedDisk {
        BufferedDisk(below)
    }

    /// Makes every file of a directory durable, and their names.
    ///
    /// # Errors
    /// The disk's; final, as any failed sync.
    pub fn settle(below: &dyn Disk, dir: &Path) -> io::Result<()> {
        // What else lies there is not ours: where a file system is mounted at this place, its `lost+found`.
        let is_ours = |name: &String| [".seg", ".spare", ".control"].iter().any(|end| name.ends_with(end));
        for name in below.list(dir)?.into_iter().filter(is_ours) {
            below.open(&dir.join(name))?.sync()?;
        }
        below.sync_dir(dir)
    }
}

impl Disk for BufferedDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(BufferedFile(self.0.create(path)?)))
    }

    fn create_in_place(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(BufferedFile(self.0.create_in_place(path)?)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(BufferedFile(self.0.open(path)?)))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.0.open_read(path)
    }

    fn open_read_own(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.0.open_read_own(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn rename_dir(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename_dir(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.0.list(dir)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.create_dir(dir)
    }

    fn waits(&self) -> bool {
        false
    }

    fn is_machine(&self) -> bool {
        self.0.is_machine()
    }
}

struct BufferedFile(Arc<dyn File>);

impl File for BufferedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.0.set_size(bytes)
    }

    /// Nothing: it would keep the caller waiting until a busy disk has read its maps of free blocks
    /// (measured: 1.9 s). Room is found when bytes are written back; a full disk shows at a write.
    fn allocate(&self, _bytes: u64) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.0.punch_hole(range)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(offset)
    }

    fn start_writeback(&self, range: Range<u64>) -> io::Result<()> {
        self.0.start_writeback(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim_disk::SimDisk;

    #[test]
    fn nothing_is_durable_before_the_debt_is_paid_and_all_is_after() {
        let (dir, name) = (Path::new("/j"), Path::new("/j/0.seg"));
        for settled in [false, true] {
            let sim = SimDisk::new();
            let below: Arc<dyn Disk> = Arc::new(sim.clone());
            below.create_dir(dir).unwrap();
            let disk = BufferedDisk::new(below.clone());
            let file = disk.create(name).unwrap();
            file.write_at(&[7; 512], 0).unwrap();
            file.sync().unwrap();
            disk.sync_dir(dir).unwrap();
            if settled {
                BufferedDisk::settle(below.as_ref(), dir).unwrap();
            }
            let survived = (0..32).filter(|seed| {
                let after = sim.crash(*seed);
                let mut bytes = [0; 512];
                let read = after.open(name).and_then(|file| file.read_at(&mut bytes, 0));
                matches!(read, Ok(512)) && bytes == [7; 512]
            });
            let survived = survived.count();
            assert!(
                if settled { survived == 32 } else { survived < 32 },
                "settled {settled}: {survived} of 32"
            );
        }
    }
}
