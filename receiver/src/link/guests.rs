//! Connections that have not got their group's place yet, and how many there may be.
//!
//! A guest costs us a handshake's memory or a small window, and can be made by anybody who reaches the port.
//! So there are few, of one address and in all, and the oldest makes room for the newest: silence holds no
//! place, and who means it needs its place for some round trips only. From the handshake on the guest is
//! known, and counts against its identity alone: what strangers do does not touch it.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};

use machine::{Mutex, MutexGuard};
use tokio::sync::Notify;

/// Unknown guests at once: a handshake in flight takes about 100 KiB.
const MAX_UNKNOWN: usize = 64;
/// Of one address, or one IPv6 network of a customer (/64).
const MAX_OF_ADDRESS: usize = 16;
/// Known guests of one identity for each of its groups: one that is half dead, and the one after it.
pub const PER_GROUP: usize = 2;

/// All guests.
#[derive(Default)]
pub struct Guests(Mutex<Book>);

#[derive(Default)]
struct Book {
    /// In order of arrival.
    guests: VecDeque<Guest>,
    next: u64,
}

struct Guest {
    number: u64,
    address: IpAddr,
    identity: Option<[u8; 32]>,
    out: Arc<Notify>,
}

/// A guest's place; free when dropped.
pub struct Stay {
    guests: Arc<Guests>,
    number: u64,
    out: Arc<Notify>,
}

fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let mut octets = v6.octets();
            octets[8..].fill(0);
            IpAddr::from(octets)
        }
        v4 => v4,
    }
}

impl Guests {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an address should have to answer before it gets a place: forged ones cannot.
    pub fn is_crowded(&self) -> bool {
        self.book().guests.iter().filter(|guest| guest.identity.is_none()).count() * 2 >= MAX_UNKNOWN
    }

    /// A new guest; an older one may have to go.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Stay {
        let mut book = self.book();
        let address = network(address);
        let unknown = |guest: &Guest| guest.identity.is_none();
        book.send_away(MAX_OF_ADDRESS, |guest| unknown(guest) && guest.address == address);
        book.send_away(MAX_UNKNOWN, unknown);
        let (number, out) = (book.next, Arc::new(Notify::new()));
        book.next += 1;
        book.guests.push_back(Guest { number, address, identity: None, out: out.clone() });
        Stay { guests: self.clone(), number, out }
    }
}

impl Book {
    /// Makes room for one more of `most`.
    fn send_away(&mut self, most: usize, counts: impl Fn(&Guest) -> bool) {
        while self.guests.iter().filter(|guest| counts(guest)).count() >= most.max(1) {
            let Some(oldest) = self.guests.iter().position(&counts) else { return };
            if let Some(guest) = self.guests.remove(oldest) {
                guest.out.notify_one();
            }
        }
    }
}

impl Stay {
    /// The guest has proved who it is; `groups` are its own. False where it had to go before that.
    pub fn is_known_as(&self, identity: [u8; 32], groups: usize) -> bool {
        let mut book = self.guests.book();
        let Some(at) = book.guests.iter().position(|guest| guest.number == self.number) else { return false };
        let Some(mut guest) = book.guests.remove(at) else { return false };
        book.send_away(PER_GROUP * groups, |guest| guest.identity == Some(identity));
        guest.identity = Some(identity);
        book.guests.push_back(guest);
        true
    }

    /// Resolves when the guest has to go.
    pub async fn sent_away(&self) {
        self.out.notified().await;
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.guests.book().guests.retain(|guest| guest.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn address(last: u16) -> IpAddr {
        let [high, low] = last.to_be_bytes();
        Ipv4Addr::new(10, 0, high, low).into()
    }

    fn is_in(stay: &Stay) -> bool {
        stay.guests.book().guests.iter().any(|guest| guest.number == stay.number)
    }

    #[test]
    fn silence_of_one_address_holds_no_place_of_others() {
        let guests = Arc::new(Guests::default());
        let honest = guests.enter(address(1));
        let silent: Vec<_> = (0..200).map(|_| guests.enter(address(2))).collect();
        assert!(is_in(&honest));
        assert_eq!(silent.iter().filter(|stay| is_in(stay)).count(), MAX_OF_ADDRESS, "the newest");
        assert!(is_in(&silent[199]) && !is_in(&silent[0]));
        assert!(!guests.is_crowded());
    }

    #[test]
    fn many_addresses_make_room_by_age_and_the_known_stay() {
        let guests = Arc::new(Guests::default());
        let known = guests.enter(address(1));
        assert!(known.is_known_as([1; 32], 1));
        let flood: Vec<_> = (0..1000).map(|at| guests.enter(address(at))).collect();
        assert_eq!(flood.iter().filter(|stay| is_in(stay)).count(), MAX_UNKNOWN);
        assert!(is_in(&known) && guests.is_crowded());
        let late = guests.enter(address(5000));
        assert!(is_in(&late) && !is_in(&flood[1000 - MAX_UNKNOWN]), "the oldest goes");
        assert!(!flood[0].is_known_as([2; 32], 1), "what had to go does not come back");
        drop(flood);
        assert!(!guests.is_crowded());
    }

    #[test]
    fn an_identity_has_two_guests_for_each_of_its_groups() {
        let guests = Arc::new(Guests::default());
        let enter = |identity: u8, groups| {
            let stay = guests.enter(address(u16::from(identity)));
            assert!(stay.is_known_as([identity; 32], groups));
            stay
        };
        let other = enter(9, 1);
        let stays: Vec<_> = (0..24).map(|_| enter(1, 1)).collect();
        assert_eq!(stays.iter().filter(|stay| is_in(stay)).count(), PER_GROUP);
        assert!(is_in(&stays[23]) && is_in(&stays[22]) && is_in(&other));
        let stays: Vec<_> = (0..24).map(|_| enter(2, 5)).collect();
        assert_eq!(stays.iter().filter(|stay| is_in(stay)).count(), 5 * PER_GROUP);
    }

    #[test]
    fn a_customers_network_is_one_address() {
        let guests = Arc::new(Guests::default());
        let stays: Vec<_> = (0..100_u16)
            .map(|at| guests.enter(std::net::Ipv6Addr::new(0x2001, 0xdb8, 1, 2, at, at, 0, 1).into()))
            .collect();
        assert_eq!(stays.iter().filter(|stay| is_in(stay)).count(), MAX_OF_ADDRESS);
    }
}
