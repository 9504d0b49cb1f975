//! A task that panics says so: the future's panic as a value, in words.
//!
//! tokio keeps a panic in the task's handle, and a handle that is only awaited at the end of the run keeps it
//! from everybody until then. Long-lived tasks run inside of [`caught`], and the caller makes a state of what
//! comes out.

use std::any::Any;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;

use crate::text::tidy;

/// Runs a future to its end.
///
/// # Errors
/// It panicked: what it said. The future is gone then, and what it held has been dropped.
pub async fn caught<T>(future: impl Future<Output = T>) -> Result<T, String> {
    let mut future = pin!(future);
    let polled = poll_fn(|context| {
        // Unwind safe: after a panic the future is never polled again.
        match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => std::task::Poll::Ready(Err(said(&*panic))),
        }
    });
    polled.await
}

/// The words of a panic.
pub fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
    tidy(text).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn a_panic_is_a_value_with_its_words() {
        let mut context = Context::from_waker(Waker::noop());
        let mut poll =
            |future: std::pin::Pin<&mut dyn Future<Output = Result<u32, String>>>| future.poll(&mut context);
        assert_eq!(poll(pin!(caught(async { 7 }))), Poll::Ready(Ok(7)));
        let broken = caught(async { panic!("invariant {} is broken\n", 3) });
        assert_eq!(poll(pin!(broken)), Poll::Ready(Err("invariant 3 is broken\\u{a}".to_owned())));
    }
}
