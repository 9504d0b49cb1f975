//! Golden bytes, and every flip of them; merges against the plain way of laying batch under batch.

use std::collections::BTreeMap;

use journal::sim_disk::SimDisk;

use super::build::{Parts, build};
use super::*;

const GROUP: GroupId = GroupId([7; 16]);

fn entry(batch: u64, volume: u32, offset: u64, length: u64, zeros: bool) -> Entry {
    let flags = if zeros { EXTENT_ZEROS } else { 0 };
    let at = u32::try_from(offset).unwrap();
    Entry {
        batch,
        extent: ExtentEntry { volume: VolumeId(volume), frame: 3, offset, length, payload_at: at, flags },
    }
}

fn disk() -> (SimDisk, Arc<dyn Disk>) {
    let sim = SimDisk::new();
    sim.create_dir(Path::new("/m")).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    (sim, disk)
}

/// An index of these streams, the oldest first, as it would be made of their segments.
fn made(disk: &Arc<dyn Disk>, node: Node, streams: Vec<Vec<Entry>>) -> MergedIndex {
    build(disk, Path::new("/m"), GROUP, node, 5, &Parts::Entries(streams)).unwrap();
    MergedIndex::open(&**disk, Path::new("/m"), node, GROUP, 5).unwrap()
}

fn all(index: &MergedIndex) -> Vec<Entry> {
    let (mut entries, mut page) = (Vec::new(), Vec::new());
    for number in 0..index.pages() {
        index.page(number, &mut page).unwrap();
        entries.append(&mut page);
    }
    entries
}

/// Added to, never edited: these bytes are on disks.
#[test]
fn golden_bytes() {
    let (sim, disk) = disk();
    let node = Node { level: 1, first: 17 };
    let index = made(&disk, node, vec![vec![entry(17, 1, 4096, 512, false), entry(17, 1, 8192, 1024, true)]]);
    let found = sim.contents(Path::new("/m/1-00000000000000000017.idx")).unwrap();
    let mut expected = vec![0; 2 * PAGE_BYTES];
    expected[..8].copy_from_slice(b"AFTRMRG1");
    // version, level, digest; batches 17 to 32, 2 entries
    for (at, value) in [(8, 1), (10, 1), (12, 5), (32, 17), (40, 32), (48, 2)] {
        expected[at] = value;
    }
    expected[16..32].fill(7);
    let nonce = index.head.nonce.to_le_bytes();
    expected[56..64].copy_from_slice(&nonce);
    // page 0: 2 entries; then volume, frame, offset, length, batch, payload, flags
    let page = PAGE_BYTES;
    expected[page + 4] = 2;
    expected[page + 8..page + 16].copy_from_slice(&nonce);
    for (at, value) in [(0, 1), (4, 3), (9, 16), (17, 2), (24, 17), (33, 16)] {
        expected[page + 16 + at] = value;
    }
    for (at, value) in [(0, 1), (4, 3), (9, 32), (17, 4), (24, 17), (33, 32), (36, 1)] {
        expected[page + 56 + at] = value;
    }
    for at in [0, page] {
        let crc = crc32fast::hash(&expected[at..at + 4092]).to_le_bytes();
        expected[at + 4092..at + 4096].copy_from_slice(&crc);
    }
    assert_eq!(found, expected);
    // Every flip and cut shows, and so does another's file.
    let path = Path::new("/m/1-00000000000000000017.idx");
    for at in 0..found.len() {
        sim.corrupt(path, at as u64, |byte| byte ^ 4);
        let read = MergedIndex::open(&*disk, Path::new("/m"), node, GROUP, 5)
            .and_then(|index| index.page(0, &mut Vec::new()));
        assert_eq!(read.unwrap_err().kind, ErrorKind::Corrupt, "flip at {at}");
        sim.corrupt(path, at as u64, |byte| byte ^ 4);
    }
    for (group, digest) in [(GroupId([8; 16]), 5), (GROUP, 6)] {
        let other = MergedIndex::open(&*disk, Path::new("/m"), node, group, digest);
        assert_eq!(other.err().unwrap().kind, ErrorKind::Corrupt);
    }
    sim.put(path, found[..PAGE_BYTES + 100].to_vec());
    assert_eq!(index_page(&*disk, node).unwrap_err().kind, ErrorKind::Corrupt);
}

fn index_page(disk: &dyn Disk, node: Node) -> Result<()> {
    MergedIndex::open(disk, Path::new("/m"), node, GROUP, 5)?.page(0, &mut Vec::new())
}

#[test]
fn an_extent_of_no_length_is_refused_and_does_not_hang() {
    let (_, disk) = disk();
    let node = Node { level: 1, first: 1 };
    let parts = Parts::Entries(vec![vec![entry(1, 0, 512, 0, false)]]);
    let error = build(&disk, Path::new("/m"), GROUP, node, 5, &parts).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
    assert_eq!(disk.list(Path::new("/m")).unwrap(), Vec::<String>::new());
}

#[test]
fn names_mean_nodes() {
    let node = Node { level: 2, first: 257 };
    assert_eq!((Node::of_name(&node.file_name()), node.last()), (Some(node), 512));
    for name in [
        "2-00000000000000000258.idx",
        "0-00000000000000000001.idx",
        "1-1.idx",
        "x",
        "6-00000000000000000001.idx",
        "1-18446744073709551601.idx",
    ] {
        assert_eq!(Node::of_name(name), None, "{name}");
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Sorted, disjoint, each payload in its own place.
fn stream(random: &mut Random, batch: u64, extents: u64) -> Vec<Entry> {
    let mut found = BTreeMap::new();
    for _ in 0..extents {
        let (volume, offset) = (u32::try_from(random.below(2)).unwrap(), random.below(4000) * 512);
        let length = 512 * (1 + random.below(30));
        let free =
            |known: &Entry| known.end() <= (volume, offset) || known.key() >= (volume, offset + length);
        if found.values().all(free) {
            found.insert((volume, offset), entry(batch, volume, offset, length, random.below(5) == 0));
        }
    }
    found.into_values().collect()
}

/// The plain way: batch under batch.
fn plain(streams: &[Vec<Entry>], volume: VolumeId, range: &Range<u64>) -> Vec<(Range<u64>, UndoPiece)> {
    let mut map = ExtentMap::new();
    for entry in streams.iter().flatten().filter(|entry| entry.extent.volume == volume) {
        lay_under(&mut map, entry.extent.offset..entry.end().1, range, entry.piece());
    }
    told(&map)
}

/// Pieces with neighbours of one source joined, so that two ways of cutting them compare equal.
fn told(map: &ExtentMap<UndoPiece>) -> Vec<(Range<u64>, UndoPiece)> {
    let mut joined: Vec<(Range<u64>, UndoPiece)> = Vec::new();
    for (range, piece) in map.iter() {
        if let Some((before, known)) = joined.last_mut() {
            let mut next = *known;
            next.advance(before.end - before.start);
            if before.end == range.start && next == *piece {
                before.end = range.end;
                continue;
            }
        }
        joined.push((range, *piece));
    }
    joined
}

#[test]
fn a_merge_says_what_its_parts_say_one_after_the_other() {
    for seed in 1..=30 {
        let mut random = Random(seed);
        let (_, disk) = disk();
        let streams: Vec<Vec<Entry>> = (1..=16).map(|batch| stream(&mut random, batch, 60)).collect();
        let index = made(&disk, Node { level: 1, first: 1 }, streams.clone());
        let entries = all(&index);
        assert!(entries.windows(2).all(|pair| pair[0].end() <= pair[1].key()), "sorted and disjoint");
        // Two levels: the same again, from merged parts.
        let halves: Vec<Arc<MergedIndex>> = streams
            .chunks(8)
            .zip([17, 33])
            .map(|(half, first)| Arc::new(made(&disk, Node { level: 1, first }, half.to_vec())))
            .collect();
        let node = Node { level: 2, first: 1 };
        build(&disk, Path::new("/m"), GROUP, node, 5, &Parts::Merged(&halves)).unwrap();
        let upper = MergedIndex::open(&*disk, Path::new("/m"), node, GROUP, 5).unwrap();
        for _ in 0..60 {
            let volume = VolumeId(u32::try_from(random.below(3)).unwrap());
            let start = random.below(2 << 20);
            let most = 1 << random.below(22);
            let range = start..start + 1 + random.below(most);
            let expected = plain(&streams, volume, &range);
            for index in [&index, &upper] {
                let mut map = ExtentMap::new();
                assert!(index.lay_under(&mut map, volume, &range, usize::MAX).unwrap());
                assert_eq!(told(&map), expected, "seed {seed}, {volume} {range:?}");
            }
        }
        let mut map = ExtentMap::new();
        assert!(
            !index.lay_under(&mut map, VolumeId(0), &(0..u64::MAX), 10).unwrap(),
            "it stops when it is too much"
        );
    }
}
