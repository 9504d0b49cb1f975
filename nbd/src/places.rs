//! The places of a server's connections: who has one, and who gives way.
//!
//! A connection that says nothing holds no place. In the handshake it counts among [`Limits::handshakes`] and
//! not among those that are served; when those are full the oldest handshake of the peer that has the most
//! gives way. Served connections are limited for each export; when those are full, one that has never asked
//! for anything gives way likewise, after a moment. One that has asked is never sent away: a mounted disk may
//! be silent for days.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::error::{Error, Kind};

/// A client that has just chosen its export is given this long to ask.
const GRACE: Duration = Duration::from_secs(1);

/// How many there may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Connections in the handshake.
    pub handshakes: usize,
    /// Connections in all.
    pub served: usize,
    /// Connections on one export.
    pub served_per_export: usize,
}

/// All places of a server.
#[derive(Debug)]
pub(crate) struct Places {
    held: Mutex<Vec<Place>>,
    limits: Limits,
}

#[derive(Debug)]
struct Place {
    number: u64,
    /// Who it is: an address without its port, or a process.
    peer: String,
    since: Instant,
    /// The export, once it is chosen.
    export: Option<usize>,
    asked: bool,
    leave: Arc<Notify>,
}

/// A connection's place, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    places: Arc<Places>,
    number: u64,
    leave: Arc<Notify>,
}

impl Places {
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { held: Mutex::default(), limits })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Place>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place in the handshake for a connection with a number of its own.
    pub fn enter(self: &Arc<Self>, number: u64, peer: &str, now: Instant) -> Ticket {
        let peer = peer.rsplit_once(':').map_or(peer, |(address, _port)| address).to_owned();
        let leave = Arc::new(Notify::new());
        let mut held = self.lock();
        let handshakes = held.iter().filter(|place| place.export.is_none()).count();
        if handshakes >= self.limits.handshakes.max(1) {
            send_away(&mut held, |place| place.export.is_none());
        }
        held.push(Place { number, peer, since: now, export: None, asked: false, leave: Arc::clone(&leave) });
        Ticket { places: Arc::clone(self), number, leave }
    }
}

/// Takes the oldest place of the peer that has the most of those that may go; its connection is told.
fn send_away(held: &mut Vec<Place>, may_go: impl Fn(&Place) -> bool) -> bool {
    let of_peer = |peer: &str| held.iter().filter(|place| may_go(place) && place.peer == peer).count();
    let candidates = held.iter().enumerate().filter(|(_, place)| may_go(place));
    // The earliest of equals: places stand in the order in which they were taken.
    let chosen = candidates.max_by_key(|(index, place)| (of_peer(&place.peer), std::cmp::Reverse(*index)));
    let Some((index, _)) = chosen else { return false };
    held.remove(index).leave.notify_one();
    true
}

impl Ticket {
    /// The handshake is over: a place on an export.
    ///
    /// # Errors
    /// All are taken by clients that have asked for something, or have only just come.
    pub fn sit(&self, export: usize, now: Instant) -> Result<(), Error> {
        let Limits { served, served_per_export, .. } = self.places.limits;
        let mut held = self.places.lock();
        let all = held.iter().filter(|place| place.export.is_some()).count();
        let here = held.iter().filter(|place| place.export == Some(export)).count();
        let silent = |place: &Place| !place.asked && now.saturating_duration_since(place.since) >= GRACE;
        if here >= served_per_export
            && !send_away(&mut held, |place| place.export == Some(export) && silent(place))
        {
            return Err(full(served_per_export, "on this export"));
        }
        if here < served_per_export
            && all >= served
            && !send_away(&mut held, |place| place.export.is_some() && silent(place))
        {
            return Err(full(served, "in all"));
        }
        // One that gave way meanwhile is told by its `leave`.
        if let Some(place) = held.iter_mut().find(|place| place.number == self.number) {
            (place.export, place.since) = (Some(export), now);
        }
        Ok(())
    }

    /// The client has asked for something: it keeps its place.
    pub fn asked(&self) {
        if let Some(place) = self.places.lock().iter_mut().find(|place| place.number == self.number) {
            place.asked = true;
        }
    }

    /// Resolves when this place was given to somebody else.
    pub async fn sent_away(&self) {
        self.leave.notified().await;
    }
}

fn full(limit: usize, of: &str) -> Error {
    Error::new(Kind::TooManyConnections, format!("{limit} {of}, and all have asked for something"))
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.places.lock().retain(|place| place.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { handshakes: 3, served: 3, served_per_export: 2 };

    fn numbers(places: &Places) -> Vec<u64> {
        places.lock().iter().map(|place| place.number).collect()
    }

    #[test]
    fn the_oldest_handshake_of_the_peer_with_the_most_gives_way() {
        let (places, now) = (Places::new(LIMITS), Instant::now());
        let held: Vec<_> = [(1, "10.0.0.1:5"), (2, "10.0.0.2:5"), (3, "10.0.0.2:6"), (4, "10.0.0.3:7")]
            .map(|(number, peer)| places.enter(number, peer, now))
            .into();
        assert_eq!(numbers(&places), [1, 3, 4]);
        drop(held);
        assert!(numbers(&places).is_empty());
    }

    #[test]
    fn a_served_client_that_never_asked_gives_way_and_one_that_asked_stays() {
        let (places, now) = (Places::new(LIMITS), Instant::now());
        let later = now + GRACE;
        let tickets: Vec<_> = (1..=3).map(|number| places.enter(number, "uid 0 pid 1", now)).collect();
        tickets[0].sit(0, now).unwrap();
        tickets[1].sit(0, now).unwrap();
        assert_eq!(tickets[2].sit(0, now).unwrap_err().kind, Kind::TooManyConnections, "they have just come");
        tickets[0].asked();
        tickets[2].sit(0, later).unwrap();
        assert_eq!(numbers(&places), [1, 3]);
        tickets[2].asked();
        let fourth = places.enter(4, "uid 0 pid 2", later);
        assert!(fourth.sit(0, later + GRACE).is_err(), "both have asked");
        fourth.sit(1, later + GRACE).unwrap();
        let fifth = places.enter(5, "uid 0 pid 2", later);
        fifth.sit(1, later + 2 * GRACE).unwrap();
        assert_eq!(numbers(&places), [1, 3, 5], "the limit in all");
    }
}
