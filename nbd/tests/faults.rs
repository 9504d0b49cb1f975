//! Clients that misbehave, exports that are slow or fail, limits and shutdown: over a raw socket.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

mod rig;

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use nbd::proto::{Errno, command, command_flag};
use nbd::{BlockExtent, Export, Server, Settings, Zeroing};
use rand::{Rng, RngCore, SeedableRng};
use rig::{Rig, enter, hello, is_closed, reply, request, write};
use uuid::Uuid;

const SIZE: u64 = 8 << 20;

/// A disk in memory whose flush waits to be let through, and whose first megabyte fails.
struct Gate {
    bytes: Mutex<Vec<u8>>,
    pass: Mutex<mpsc::Receiver<()>>,
    flushes: AtomicUsize,
}

impl Gate {
    fn new() -> (Arc<Self>, mpsc::SyncSender<()>) {
        let (open, pass) = mpsc::sync_channel(16);
        let bytes = Mutex::new(vec![0; SIZE as usize]);
        (Arc::new(Self { bytes, pass: Mutex::new(pass), flushes: AtomicUsize::new(0) }), open)
    }
}

impl Export for Gate {
    fn name(&self) -> &str {
        "gate"
    }
    fn uuid(&self) -> Uuid {
        Uuid::from_u128(1)
    }
    fn size_bytes(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap();
        into.copy_from_slice(&self.bytes.lock().unwrap()[from..from + into.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, bytes: &[u8], _fua: bool) -> io::Result<()> {
        if offset < 1 << 20 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let from = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[from..from + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, how: Zeroing) -> io::Result<()> {
        if how.only_if_fast { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
    }
    fn discard(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.pass.lock().unwrap().recv().map_err(io::Error::other)?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn block_status(&self, _: u64, length_bytes: u64, _: usize) -> io::Result<Vec<BlockExtent>> {
        Ok(vec![BlockExtent { length_bytes, hole: false }])
    }
}

#[test]
fn a_flush_holds_up_nothing_and_fua_waits_for_its_sync() {
    let (gate, open) = Gate::new();
    let rig = Rig::with_export(gate.clone(), Settings::default());
    let mut client = enter(rig.connect());
    let mut queue = request(command::FLUSH, 0, 1, 0, 0);
    let mut fua = write(2, 2 << 20, &[9; 512]);
    fua[5] = u8::try_from(command_flag::FUA).unwrap();
    queue.extend(fua);
    queue.extend(write(3, 3 << 20, &[8; 4096]));
    queue.extend(request(command::READ, 0, 4, 2 << 20, 512));
    client.write_all(&queue).unwrap();
    assert_eq!(reply(&mut client), (3, 0), "a plain write overtakes both");
    assert_eq!(reply(&mut client), (4, 0));
    let mut read = [0; 512];
    client.read_exact(&mut read).unwrap();
    assert_eq!(read, [9; 512], "written, though not durable");
    assert_eq!(gate.flushes.load(Ordering::SeqCst), 0);
    open.send(()).unwrap();
    open.send(()).unwrap();
    let mut late = [reply(&mut client), reply(&mut client)];
    late.sort_unstable();
    assert_eq!(late, [(1, 0), (2, 0)]);
    assert_eq!(gate.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn errors_of_the_export_reach_the_client() {
    let (gate, _open) = Gate::new();
    let rig = Rig::with_export(gate, Settings::default());
    let mut client = enter(rig.connect());
    // The first piece of the long one fails; the rest is skipped, and the stream stays in step.
    client.write_all(&write(1, 0, &[1; 512])).unwrap();
    client.write_all(&write(2, 512, &vec![1; 3 << 20])).unwrap();
    client.write_all(&request(command::WRITE_ZEROES, command_flag::FAST_ZERO, 3, 0, 512)).unwrap();
    assert_eq!(reply(&mut client), (1, Errno::NoSpc.code()));
    assert_eq!(reply(&mut client), (2, Errno::NoSpc.code()));
    assert_eq!(reply(&mut client), (3, Errno::NotSup.code()));
}

#[test]
fn a_deep_queue_of_everything_is_answered_in_full() {
    let rig = Rig::with_image(SIZE);
    let mut client = enter(rig.connect());
    let mut sender = client.try_clone().unwrap();
    const REQUESTS: u64 = 5000;
    let sending = std::thread::spawn(move || {
        let mut queue = Vec::new();
        for cookie in 0..REQUESTS {
            queue.extend(match cookie % 5 {
                0 => request(command::FLUSH, 0, cookie, 0, 0),
                1 => request(command::TRIM, 0, cookie, cookie * 512, 512),
                2 => request(99, 0, cookie, 0, 0),
                _ => write(cookie, cookie * 1024 % SIZE, &[7; 512]),
            });
        }
        sender.write_all(&queue).unwrap();
    });
    let mut answered = vec![false; REQUESTS as usize];
    for _ in 0..REQUESTS {
        let (cookie, error) = reply(&mut client);
        assert_eq!(error, if cookie % 5 == 2 { Errno::Inval.code() } else { 0 });
        assert!(!std::mem::replace(&mut answered[usize::try_from(cookie).unwrap()], true));
    }
    sending.join().unwrap();
}

#[test]
fn a_client_that_reads_no_replies_is_held_back_not_served_from_memory() {
    let rig = Rig::with_image(64 << 20);
    let mut client = enter(rig.connect());
    client.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    // 64 reads of a megabyte: eight times the reply window.
    let queue: Vec<u8> =
        (0..64).flat_map(|cookie| request(command::READ, 0, cookie, cookie << 20, 1 << 20)).collect();
    client.write_all(&queue).unwrap();
    let mut payload = vec![1; 1 << 20];
    for _ in 0..64 {
        assert_eq!(reply(&mut client).1, 0);
        client.read_exact(&mut payload).unwrap();
        assert!(payload.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_silent_client_is_dropped() {
    let (gate, _open) = Gate::new();
    let settings = Settings { handshake_timeout: Duration::from_millis(50), ..Settings::default() };
    let rig = Rig::with_export(gate, settings);
    let mut client = rig.connect();
    assert!(is_closed(&mut client));
    // Once the export is chosen a client may be silent for as long as it likes.
    let mut patient = enter(rig.connect());
    let mut other = rig.connect();
    assert!(is_closed(&mut other));
    patient.write_all(&write(5, 2 << 20, &[1; 512])).unwrap();
    assert_eq!(reply(&mut patient), (5, 0));
}

#[test]
fn connections_are_limited_and_places_come_back() {
    let (gate, _open) = Gate::new();
    let settings = Settings { max_connections: 3, max_connections_per_export: 2, ..Settings::default() };
    let rig = Rig::with_export(gate, settings);
    let mut first = enter(rig.connect());
    let _second = enter(rig.connect());
    let mut third = enter(rig.connect());
    assert!(is_closed(&mut third), "one too many on the export");
    first.write_all(&request(command::DISC, 0, 0, 0, 0)).unwrap();
    assert!(is_closed(&mut first));
    // The place is free a moment after the socket is closed.
    let served = (0..1000).any(|_| {
        let mut again = rig.connect();
        let sent = again.write_all(&[hello(), write(6, 2 << 20, &[1; 512])].concat());
        sent.and_then(|()| again.read_exact(&mut [0; 18 + 10 + 16])).is_ok()
    });
    assert!(served);
}

#[test]
fn hostile_bytes_end_only_their_connection() {
    let rig = Rig::with_image(SIZE);
    let mut good = enter(rig.connect());
    let mut random = rand::rngs::StdRng::seed_from_u64(0xaf7e);
    for round in 0..200 {
        let mut noise = vec![0; random.random_range(1..400)];
        random.fill_bytes(&mut noise);
        let mut stream = match round % 5 {
            0 => Vec::new(),                                                 // instead of flags
            1 => 3u32.to_be_bytes().to_vec(),                                // instead of an option
            2 => [&hello()[..16], &[0, 1, 0, 0]].concat(),                   // a huge option
            3 => hello(),                                                    // instead of a request
            _ => [hello(), write(1, 0, &[1; 512])[..100].to_vec()].concat(), // and gone in a payload
        };
        if round % 5 != 4 {
            stream.extend(noise);
        }
        let mut bad = rig.connect();
        // The server may have hung up before all is sent.
        let _ = bad.write_all(&stream);
        let _ = bad.shutdown(std::net::Shutdown::Write);
        assert!(is_closed(&mut bad));
    }
    good.write_all(&write(7, 0, &[1; 512])).unwrap();
    assert_eq!(reply(&mut good), (7, 0));
}

/// The server's share of a rig, to be shut down while the directory stays.
async fn shut_down(rig: Rig, deadline: Duration) -> usize {
    let Rig { dir, server } = rig;
    let left = Server::shutdown(server, deadline).await;
    assert!(!dir.path().join("s").exists(), "the socket's file is gone");
    left
}

#[tokio::test]
async fn shutdown_answers_what_is_in_flight_and_refuses_the_rest() {
    let (gate, open) = Gate::new();
    let rig = Rig::with_export(gate, Settings::default());
    let mut client = enter(rig.connect());
    client.write_all(&request(command::FLUSH, 0, 1, 0, 0)).unwrap();
    client.write_all(&write(2, 2 << 20, &[1; 512])).unwrap();
    assert_eq!(reply(&mut client), (2, 0), "the flush is in flight now");
    let talking = std::thread::spawn(move || {
        let refused = (3..).find(|cookie| {
            client.write_all(&write(*cookie, 2 << 20, &[2; 512])).unwrap();
            let (answered, error) = reply(&mut client);
            assert_eq!(answered, *cookie);
            error == Errno::Shutdown.code()
        });
        open.send(()).unwrap();
        assert_eq!(reply(&mut client), (1, 0));
        assert!(is_closed(&mut client));
        refused.unwrap()
    });
    assert_eq!(shut_down(rig, Duration::from_secs(20)).await, 0);
    talking.join().unwrap();
}

#[tokio::test]
async fn shutdown_has_a_deadline() {
    let (gate, _open) = Gate::new();
    let rig = Rig::with_export(gate, Settings::default());
    let mut client = enter(rig.connect());
    client.write_all(&request(command::FLUSH, 0, 1, 0, 0)).unwrap();
    client.write_all(&write(2, 2 << 20, &[1; 512])).unwrap();
    assert_eq!(reply(&mut client), (2, 0));
    assert_eq!(shut_down(rig, Duration::from_millis(20)).await, 1);
    assert!(is_closed(&mut client), "closed without an answer");
}
