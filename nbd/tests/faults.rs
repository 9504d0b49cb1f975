//! Clients that misbehave, exports that are slow or fail, limits and shutdown: over a raw socket.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

mod rig;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use nbd::proto::{Errno, command, command_flag};
use nbd::{BlockExtent, Export, Server, Settings, Zeroing};
use rand::{Rng, RngCore, SeedableRng};
use rig::{Rig, enter, hello, is_closed, reply, request, write};
use uuid::Uuid;

const SIZE: u64 = 8 << 20;

/// A write here waits to be let through.
const HELD_WRITE: u64 = SIZE - 512;

/// A disk in memory whose flush waits to be let through, and whose first megabyte fails.
struct Gate {
    bytes: Mutex<Vec<u8>>,
    pass: Mutex<mpsc::Receiver<()>>,
    flushes: AtomicUsize,
    discards: AtomicUsize,
    /// A flush or a write waits now.
    holds: AtomicBool,
}

impl Gate {
    fn new() -> (Arc<Self>, mpsc::SyncSender<()>) {
        let (open, pass) = mpsc::sync_channel(16);
        let bytes = Mutex::new(vec![0; SIZE as usize]);
        let gate = Self {
            bytes,
            pass: Mutex::new(pass),
            flushes: AtomicUsize::new(0),
            discards: AtomicUsize::new(0),
            holds: AtomicBool::new(false),
        };
        (Arc::new(gate), open)
    }

    fn until_it_holds(&self) {
        while !self.holds.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
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
        if offset == HELD_WRITE {
            self.holds.store(true, Ordering::SeqCst);
            self.pass.lock().unwrap().recv().map_err(io::Error::other)?;
        }
        let from = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[from..from + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, how: Zeroing) -> io::Result<()> {
        if how.only_if_fast { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
    }
    fn discard(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.discards.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.holds.store(true, Ordering::SeqCst);
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
    // A place is taken before the first request is answered, but after the handshake.
    let seated = || {
        let mut client = enter(rig.connect());
        client.write_all(&write(5, 2 << 20, &[1; 512])).unwrap();
        assert_eq!(reply(&mut client), (5, 0));
        client
    };
    let (mut first, _second) = (seated(), seated());
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

/// Replies until the server closes the stream: `(cookie, error)`.
fn replies_until_closed(client: &mut UnixStream) -> Vec<(u64, u32)> {
    let mut replies = Vec::new();
    let mut bytes = [0; 16];
    while client.read_exact(&mut bytes).is_ok() {
        replies.push((
            u64::from_be_bytes(bytes[8..].try_into().unwrap()),
            u32::from_be_bytes(bytes[4..8].try_into().unwrap()),
        ));
    }
    replies
}

#[tokio::test]
async fn requests_unread_at_the_drain_get_no_answer_and_the_connection_just_closes() {
    let (gate, open) = Gate::new();
    let rig = Rig::with_export(gate.clone(), Settings::default());
    let mut client = enter(rig.connect());
    client.write_all(&request(command::FLUSH, 0, 1, 0, 0)).unwrap();
    client.write_all(&write(2, 2 << 20, &[1; 512])).unwrap();
    assert_eq!(reply(&mut client), (2, 0), "the flush is in flight now");
    let path = rig.path("s");
    let talking = std::thread::spawn(move || {
        while UnixStream::connect(&path).is_ok() {
            std::thread::yield_now();
        }
        // Nobody listens any more, so the drain has begun: whole requests, and half a WRITE.
        client.write_all(&write(3, 2 << 20, &[2; 512])).unwrap();
        client.write_all(&request(command::READ, 0, 4, 0, 512)).unwrap();
        client.write_all(&request(command::TRIM, 0, 5, 0, 512)).unwrap();
        client.write_all(&write(6, 2 << 20, &[3; 512])[..200]).unwrap();
        open.send(()).unwrap();
        replies_until_closed(&mut client)
    });
    assert_eq!(shut_down(rig, Duration::from_secs(20)).await, 0);
    assert_eq!(talking.join().unwrap(), [(1, 0)], "what was in flight, and no error for the rest");
    assert_eq!(gate.bytes.lock().unwrap()[2 << 20], 1, "what was not taken is not done");
    assert_eq!(gate.discards.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_drain_under_load_answers_without_errors_and_everything_answered_is_done() {
    const BLOCKS: u64 = (SIZE - (2 << 20)) / 512 - 1;
    let place = |cookie: u64| (2 << 20) + cookie % BLOCKS * 512;
    let (gate, _open) = Gate::new();
    let rig = Rig::with_export(gate.clone(), Settings::default());
    let mut client = enter(rig.connect());
    let mut sender = client.try_clone().unwrap();
    let (loaded, is_loaded) = tokio::sync::oneshot::channel();
    let sending = std::thread::spawn(move || {
        let send =
            |cookie: u64| sender.write_all(&write(cookie, place(cookie), &cookie.to_le_bytes().repeat(64)));
        (0..).map(send).take_while(Result::is_ok).count() as u64
    });
    let reading = std::thread::spawn(move || {
        let mut replies: Vec<_> = (0..1000).map(|_| reply(&mut client)).collect();
        loaded.send(()).unwrap();
        replies.extend(replies_until_closed(&mut client));
        replies
    });
    is_loaded.await.unwrap();
    assert_eq!(shut_down(rig, Duration::from_secs(20)).await, 0);
    let (sent, replies) = (sending.join().unwrap(), reading.join().unwrap());
    let answered = replies.len() as u64;
    assert!(answered <= sent);
    let expected: Vec<_> = (0..answered).map(|cookie| (cookie, 0)).collect();
    assert!(replies == expected, "every reply is a success, in order, and the rest got none");
    let bytes = gate.bytes.lock().unwrap();
    for cookie in answered.saturating_sub(BLOCKS)..answered {
        let from = usize::try_from(place(cookie)).unwrap();
        // Newer, if one that was done lost its answer.
        let found = u64::from_le_bytes(bytes[from..from + 8].try_into().unwrap());
        assert!(found >= cookie && found % BLOCKS == cookie % BLOCKS, "{found} where {cookie} was written");
    }
}

#[test]
fn requests_of_a_client_that_gave_up_are_not_begun() {
    let (gate, open) = Gate::new();
    let rig = Rig::with_export(gate.clone(), Settings { pool_threads: 1, ..Settings::default() });
    let mut first = enter(rig.connect());
    first.write_all(&request(command::FLUSH, 0, 1, 0, 0)).unwrap();
    first.write_all(&request(command::TRIM, 0, 2, 2 << 20, 512)).unwrap();
    first.write_all(&write(3, 2 << 20, &[1; 512])).unwrap();
    assert_eq!(reply(&mut first), (3, 0), "the TRIM is queued behind the flush");
    gate.until_it_holds();
    drop(first);
    let mut second = enter(rig.connect());
    second.write_all(&request(command::TRIM, 0, 1, 2 << 20, 512)).unwrap();
    open.send(()).unwrap();
    assert_eq!(reply(&mut second), (1, 0));
    assert_eq!(gate.discards.load(Ordering::SeqCst), 1, "the first client's was dropped");
}

#[test]
fn what_stood_behind_a_blocked_write_is_dropped_when_the_client_gave_up() {
    let (gate, open) = Gate::new();
    let rig = Rig::with_export(gate.clone(), Settings::default());
    let mut first = enter(rig.connect());
    first.write_all(&write(1, HELD_WRITE, &[1; 512])).unwrap();
    gate.until_it_holds();
    first.write_all(&write(2, 2 << 20, &[1; 512])).unwrap();
    drop(first);
    // The client sends it again, and goes on from there for longer than the server's interval of looking.
    let mut second = enter(rig.connect());
    let started = Instant::now();
    for cookie in 2.. {
        second.write_all(&write(cookie, 2 << 20, &[2; 512])).unwrap();
        assert_eq!(reply(&mut second), (cookie, 0));
        if started.elapsed() > Duration::from_millis(150) {
            break;
        }
    }
    open.send(()).unwrap();
    while rig.server.connections() > 1 {
        std::thread::yield_now();
    }
    assert_eq!(gate.bytes.lock().unwrap()[2 << 20], 2, "no old write over an answered newer one");
}

#[tokio::test]
async fn shutdown_waits_for_jobs_whose_connection_has_ended() {
    for opened in [false, true] {
        let (gate, open) = Gate::new();
        let rig = Rig::with_export(gate.clone(), Settings::default());
        let mut client = enter(rig.connect());
        client.write_all(&request(command::FLUSH, 0, 1, 0, 0)).unwrap();
        gate.until_it_holds();
        client.write_all(&[0; 28]).unwrap(); // no request at all
        assert!(is_closed(&mut client));
        while rig.server.connections() > 0 {
            std::thread::yield_now();
        }
        let deadline = if opened {
            open.send(()).unwrap();
            Duration::from_secs(20)
        } else {
            Duration::from_millis(20)
        };
        assert_eq!(shut_down(rig, deadline).await, usize::from(!opened), "the flush that nobody waits for");
    }
}

#[tokio::test]
async fn shutdown_has_a_deadline() {
    let (gate, _open) = Gate::new();
    let rig = Rig::with_export(gate, Settings::default());
    let mut client = enter(rig.connect());
    client.write_all(&request(command::FLUSH, 0, 1, 0, 0)).unwrap();
    client.write_all(&write(2, 2 << 20, &[1; 512])).unwrap();
    assert_eq!(reply(&mut client), (2, 0));
    assert_eq!(shut_down(rig, Duration::from_millis(20)).await, 2, "the connection and the flush");
    assert!(is_closed(&mut client), "closed without an answer");
}

#[test]
fn what_stands_before_a_disconnect_is_answered_although_the_client_closed_its_half() {
    let rig = Rig::with_image(SIZE);
    let mut client = enter(rig.connect());
    let mut queue = Vec::new();
    for cookie in 0..16_u64 {
        queue.extend(match cookie % 4 {
            0 => write(cookie, cookie * 4096, &[7; 4096]),
            1 => request(command::TRIM, 0, cookie, cookie * 4096, 4096),
            2 => request(command::WRITE_ZEROES, 0, cookie, cookie * 4096, 4096),
            _ => request(command::FLUSH, 0, cookie, 0, 0),
        });
    }
    queue.extend(request(command::DISC, 0, 99, 0, 0));
    client.write_all(&queue).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut replies = replies_until_closed(&mut client);
    replies.sort_unstable();
    let all: Vec<_> = (0..16_u64).map(|cookie| (cookie, 0)).collect();
    assert_eq!(replies, all);
}

#[test]
fn a_write_that_came_by_half_leaves_nothing_behind_whatever_its_size() {
    let rig = Rig::with_image(SIZE);
    for (length, sent) in [(65_536, 40_000), (1 << 20, 700_000), (4 << 20, (2 << 20) + 1000)] {
        let mut client = enter(rig.connect());
        client.write_all(&write(1, 0, &vec![b'H'; length])[..sent]).unwrap();
    }
    while rig.server.connections() > 0 {
        std::thread::yield_now();
    }
    assert!(!rig.image().contains(&b'H'));
    let mut client = enter(rig.connect());
    let whole = vec![7; 4 << 20];
    client.write_all(&write(2, 512, &whole)).unwrap();
    assert_eq!(reply(&mut client), (2, 0));
    assert!(rig.image()[512..][..whole.len()] == whole);
}

#[test]
fn clients_that_say_nothing_hold_no_place() {
    let (gate, _open) = Gate::new();
    let settings = Settings { max_handshakes: 4, max_connections_per_export: 2, ..Settings::default() };
    let rig = Rig::with_export(gate, settings);
    let _silent: Vec<_> = (0..40).map(|_| rig.connect()).collect();
    let _never_ask = [enter(rig.connect()), enter(rig.connect())];
    let until = Instant::now() + Duration::from_secs(10);
    let served = std::iter::repeat_with(|| {
        let mut client = rig.connect();
        let sent = client.write_all(&[hello(), write(6, 2 << 20, &[1; 512])].concat());
        sent.and_then(|()| client.read_exact(&mut [0; 18 + 10 + 16])).is_ok()
    });
    assert!(served.take_while(|_| Instant::now() < until).any(|is_served| is_served));
}
