//! The real clients: libnbd's tools, QEMU's, fio, and libnbd from Python for what the tools do not do.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

mod rig;

use std::sync::Arc;

use nbd::{Access, FileExport, Listen, Server, Settings};
use rand::RngCore;
use rig::Rig;

const SIZE: u64 = 64 << 20;

/// Random data in runs, with holes between them.
fn patchwork() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    for run in bytes.chunks_mut(3 << 20).step_by(2) {
        let filled = run.len().min(1 << 20);
        rand::rng().fill_bytes(&mut run[..filled]);
    }
    bytes
}

#[test]
fn nbdinfo_describes_the_export() {
    let rig = Rig::with_image(SIZE);
    rig.run("qemu-io", &["-f", "raw", "-c", "write 1M 64k", &rig.uri("disk")]);
    assert_eq!(rig.run("nbdinfo", &["--size", &rig.uri("")]).trim(), SIZE.to_string());
    let map = rig.run("nbdinfo", &["--map", "--json", &rig.uri("disk")]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let runs: Vec<_> = map.as_array().unwrap().iter().collect();
    let run = |index: usize, key: &str| runs[index][key].as_u64().unwrap();
    assert_eq!(runs.len(), 3, "{map}");
    assert_eq!((run(0, "offset"), run(0, "length"), run(0, "type")), (0, 1 << 20, 3));
    assert_eq!((run(1, "offset"), run(1, "length"), run(1, "type")), (1 << 20, 64 << 10, 0));
    assert_eq!((run(2, "length"), run(2, "type")), (SIZE - (1 << 20) - (64 << 10), 3));

    let list = rig.run("nbdinfo", &["--list", "--json", &rig.uri("")]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let export = &list["exports"][0];
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    for can in ["can_multi_conn", "can_fua", "can_flush", "can_trim", "can_zero", "can_fast_zero", "can_df"] {
        assert_eq!(export[can], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
    let nothing = rig.try_run("nbdinfo", &[&rig.uri("nothing")]).unwrap_err();
    assert!(nothing.contains("No such file or directory for export: nothing"), "{nothing}");
}

#[test]
fn nbdcopy_copies_both_ways() {
    let rig = Rig::with_image(SIZE);
    let bytes = patchwork();
    std::fs::write(rig.path("in"), &bytes).unwrap();
    rig.run("nbdcopy", &["--flush", "in", &rig.uri("disk")]);
    assert!(rig.image() == bytes);
    rig.run("nbdcopy", &["--connections=4", "--requests=32", &rig.uri("disk"), "out"]);
    assert!(std::fs::read(rig.path("out")).unwrap() == bytes);
    // A request size that is larger than a piece.
    rig.run("nbdcopy", &["--request-size=33554432", "--allocated", "out", &rig.uri("disk")]);
    assert!(rig.image() == bytes);
}

#[test]
fn qemu_io_writes_discards_zeroes_and_verifies() {
    let rig = Rig::with_image(SIZE);
    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 512k 4k",
        "write -z 64k 64k",
        "write -z -u 128k 64k",
        "discard 256k 128k",
        "aio_write -P 0x33 2M 30M",
        "aio_flush",
        "flush",
        "read -P 0x11 0 64k",
        "read -P 0 64k 128k",
        "read -P 0 256k 128k",
        "read -P 0x22 512k 4k",
        "read -P 0x33 2M 30M",
        "read -P 0 32M 32M",
    ];
    let uri = rig.uri("disk");
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&uri);
    let out = rig.run("qemu-io", &arguments);
    assert!(!out.contains("failed") && !out.contains("Pattern"), "{out}");
    let image = rig.image();
    assert!(image[..64 << 10].iter().all(|byte| *byte == 0x11));
    assert!(image[64 << 10..192 << 10].iter().all(|byte| *byte == 0));
}

#[test]
fn qemu_img_converts_and_compares() {
    let rig = Rig::with_image(SIZE);
    let bytes = patchwork();
    std::fs::write(rig.path("in"), &bytes).unwrap();
    let uri = rig.uri("disk");
    let info = rig.run("qemu-img", &["info", "--output=json", &uri]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], SIZE);
    rig.run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "in", &uri]);
    rig.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", "in", &uri]);
    rig.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, "out.qcow2"]);
    rig.run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "in", "out.qcow2"]);
    rig.run("qemu-io", &["-f", "raw", "-c", "write -P 1 5M 512", &uri]);
    let differs = rig.try_run("qemu-img", &["compare", "-f", "raw", "-F", "raw", "in", &uri]).unwrap_err();
    assert!(differs.contains("mismatch"), "{differs}");
}

#[test]
fn fio_verifies_what_it_wrote() {
    let rig = Rig::with_image(SIZE);
    let uri = format!("--uri={}", rig.uri("disk"));
    for (rw, block) in [("randwrite", "--bs=4k"), ("randwrite", "--bsrange=512-256k"), ("randrw", "--bs=16k")]
    {
        let rw = format!("--rw={rw}");
        let common = ["--name=verify", "--ioengine=nbd", "--iodepth=16", "--size=24M", "--verify=crc32c"];
        let rest = ["--verify_fatal=1", "--fsync=200", "--output-format=json", block, &rw, &uri];
        let out = rig.run("fio", &[&common[..], &rest].concat());
        let report: serde_json::Value = serde_json::from_str(&out[out.find('{').unwrap()..]).unwrap();
        assert_eq!(report["jobs"][0]["error"], 0);
        assert!(report["jobs"][0]["read"]["total_ios"].as_u64().unwrap() > 0, "nothing was verified");
    }
}

#[test]
fn libnbd_without_structured_replies() {
    let rig = Rig::with_image(SIZE);
    let connect = format!("h.connect_uri({:?})", rig.uri("disk"));
    let script = "
assert not h.get_structured_replies_negotiated()
h.pwrite(b'a' * 4096, 8192)
h.pwrite(b'b' * (5 << 20), 1 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192) == b'a' * 4096
assert h.pread(8 << 20, 0)[1 << 20:6 << 20] == b'b' * (5 << 20)
h.trim(4096, 8192, nbd.CMD_FLAG_FUA)
h.zero(4096, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
h.flush()
assert h.pread(4096, 1 << 20) == bytes(4096)
h.shutdown()
";
    let before = ["-c", "h.set_request_structured_replies(False)", "-c", "h.set_uri_allow_local_file(True)"];
    rig.run("nbdsh", &[&before[..], &["-c", &connect, "-c", script]].concat());
}

#[test]
fn libnbd_block_status_and_wrong_requests() {
    let rig = Rig::with_image(SIZE);
    let connect = format!("h.connect_uri({:?})", rig.uri("disk"));
    let script = "
assert h.get_structured_replies_negotiated() and h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.pwrite(b'a' * 65536, 65536)
def status(length, offset, flags=0):
    got = []
    h.block_status(length, offset, lambda c, o, entries, e: got.extend(entries), flags)
    return got
assert status(1 << 20, 0) == [65536, 3, 65536, 0, (1 << 20) - 131072, 3], status(1 << 20, 0)
assert status(1 << 20, 0, nbd.CMD_FLAG_REQ_ONE) == [65536, 3]
assert status(512, 65536) == [512, 0]

chunks = []
def chunk(data, offset, kind, error):
    chunks.append((offset, len(data), kind))
buffer = h.pread_structured(1 << 20, 0, chunk)
assert buffer == bytes(65536) + b'a' * 65536 + bytes((1 << 20) - 131072)
assert chunks == [(0, 65536, nbd.READ_HOLE), (65536, 65536, nbd.READ_DATA), (131072, (1 << 20) - 131072, nbd.READ_HOLE)], chunks
chunks.clear()
h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert chunks == [(0, 1 << 20, nbd.READ_DATA)]

h.set_strict_mode(0)
def refused(errno, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == errno, (error.errno, errno, arguments)
    else:
        raise AssertionError((errno, arguments))
size = h.get_size()
refused('EINVAL', h.pread, 512, 1)
refused('EINVAL', h.pread, 511, 0)
refused('EINVAL', h.pread, 512, size)
refused('EINVAL', h.pwrite, b'x' * 512, 7)
refused('ENOSPC', h.pwrite, b'x' * 512, size)
refused('ENOSPC', h.pwrite, b'x' * (3 << 20), size - (1 << 20))
refused('ENOSPC', h.zero, 512, size)
refused('ENOSPC', h.trim, 512, size)
refused('EINVAL', h.pwrite, b'x' * 512, 0, nbd.CMD_FLAG_REQ_ONE)
refused('EINVAL', h.cache, 512, 0)
h.zero(4096, 65536, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 65536) == bytes(4096), 'the connection still works'
h.shutdown()
";
    let before = ["-c", "h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)"];
    let local = ["-c", "h.set_uri_allow_local_file(True)"];
    rig.run("nbdsh", &[&before[..], &local, &["-c", &connect, "-c", script]].concat());
}

#[test]
fn a_read_only_export_beside_a_writable_one_over_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str, access| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![name.as_bytes()[0]; 1 << 20]).unwrap();
        Arc::new(FileExport::open(name, &path, access).unwrap()) as Arc<dyn nbd::Export>
    };
    let exports = vec![open("live", Access::ReadWrite), open("past", Access::ReadOnly)];
    let tcp = Listen::Tcp(([127, 0, 0, 1], 0).into());
    let unix = Listen::Unix { path: dir.path().join("s"), mode: 0o600 };
    let server = Server::start(&[unix, tcp], exports, Settings::default()).unwrap();
    let address = server.tcp_addresses()[0];
    let rig = Rig { dir, server };
    let past = format!("nbd://{address}/past");
    let past_out = rig.run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x70 0 1M", &past]);
    assert!(!past_out.contains("Pattern"), "{past_out}");
    rig.run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 1M", &format!("nbd://{address}/live")]);
    assert!(rig.try_run("qemu-io", &["-f", "raw", "-c", "write 0 512", &past]).is_err());
    let script = "
h.set_strict_mode(0)
try:
    h.pwrite(bytes(512), 0)
    raise AssertionError('written')
except nbd.Error as error:
    assert error.errno == 'EPERM', error.errno
";
    rig.run("nbdsh", &["-u", &past, "-c", script]);
    assert!(std::fs::read(rig.path("live")).unwrap() == vec![7; 1 << 20]);
    assert!(std::fs::read(rig.path("past")).unwrap() == vec![b'p'; 1 << 20]);
}
