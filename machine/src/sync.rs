//! Mutex and condition variable with std's interface.

use std::ops::{Deref, DerefMut};
use std::sync::{self, LockResult, PoisonError, TryLockError, TryLockResult};
use std::time::Duration;

use crate::world;

/// std's mutex. Contended in a world, it lets others run instead of blocking.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized>(sync::Mutex<T>);

/// The lock of a [`Mutex`].
#[derive(Debug)]
pub struct MutexGuard<'a, T: ?Sized> {
    of: &'a Mutex<T>,
    guard: sync::MutexGuard<'a, T>,
}

impl<T> Mutex<T> {
    /// Unlocked.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(sync::Mutex::new(value))
    }

    /// The value.
    ///
    /// # Errors
    /// A thread panicked while it held the lock.
    pub fn into_inner(self) -> LockResult<T> {
        self.0.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Locks.
    ///
    /// # Errors
    /// A thread panicked while it held the lock.
    #[inline]
    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        loop {
            match self.0.try_lock() {
                Ok(guard) => return Ok(MutexGuard { of: self, guard }),
                Err(TryLockError::Poisoned(poisoned)) => return Err(self.poisoned(poisoned)),
                Err(TryLockError::WouldBlock) => match world::current() {
                    Some(world) => world.turn(),
                    None => return self.wait(),
                },
            }
        }
    }

    /// Locks, if that takes no wait.
    ///
    /// # Errors
    /// It is locked, or a thread panicked while it held the lock.
    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Ok(MutexGuard { of: self, guard }),
            Err(TryLockError::Poisoned(poisoned)) => Err(self.poisoned(poisoned).into()),
            Err(TryLockError::WouldBlock) => Err(TryLockError::WouldBlock),
        }
    }

    #[cold]
    fn wait(&self) -> LockResult<MutexGuard<'_, T>> {
        match self.0.lock() {
            Ok(guard) => Ok(MutexGuard { of: self, guard }),
            Err(poisoned) => Err(self.poisoned(poisoned)),
        }
    }

    fn poisoned<'a>(
        &'a self,
        poisoned: PoisonError<sync::MutexGuard<'a, T>>,
    ) -> PoisonError<MutexGuard<'a, T>> {
        PoisonError::new(MutexGuard { of: self, guard: poisoned.into_inner() })
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// std's condition variable; a wait may come back early, as there.
#[derive(Debug, Default)]
pub struct Condvar(sync::Condvar);

impl Condvar {
    /// Nobody waits.
    pub const fn new() -> Condvar {
        Condvar(sync::Condvar::new())
    }

    fn place(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Waits for a notification.
    ///
    /// # Errors
    /// A thread panicked while it held the lock.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        let of = guard.of;
        if let Some(world) = world::current() {
            drop(guard);
            world.wait(self.place(), None);
            return of.lock();
        }
        match self.0.wait(guard.guard) {
            Ok(guard) => Ok(MutexGuard { of, guard }),
            Err(poisoned) => Err(of.poisoned(poisoned)),
        }
    }

    /// Waits for a notification, at most this long. Whether there was one is not told: look at what you wait
    /// for.
    ///
    /// # Errors
    /// A thread panicked while it held the lock.
    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        at_most: Duration,
    ) -> LockResult<MutexGuard<'a, T>> {
        let of = guard.of;
        if let Some(world) = world::current() {
            drop(guard);
            world.wait(self.place(), Some(at_most));
            return of.lock();
        }
        match self.0.wait_timeout(guard.guard, at_most) {
            Ok((guard, _)) => Ok(MutexGuard { of, guard }),
            Err(poisoned) => Err(of.poisoned(PoisonError::new(poisoned.into_inner().0))),
        }
    }

    /// Wakes one who waits; in a world, all of them.
    #[inline]
    pub fn notify_one(&self) {
        self.0.notify_one();
        self.wake();
    }

    /// Wakes all who wait.
    #[inline]
    pub fn notify_all(&self) {
        self.0.notify_all();
        self.wake();
    }

    #[inline]
    fn wake(&self) {
        if let Some(world) = world::current() {
            world.wake(self.place());
        }
    }
}
