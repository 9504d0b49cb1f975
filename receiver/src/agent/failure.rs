//! The one way in which a final error leaves a thread: what ends a daemon is reported here, once.
//!
//! A failed sync is final (DESIGN section 9): whoever sees one reports it and stops. The agent's handle
//! resolves, the process exits non-zero, and recovery happens on restart. A thread that panics is reported
//! the same way: a group without its ingest thread would otherwise look healthy and never acknowledge again.

use machine::JoinHandle;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokio::sync::watch;

use crate::error::{Error, ErrorKind, Result};

/// Shared by all threads and tasks of a receiver.
#[derive(Clone, Debug)]
pub struct Failure(watch::Sender<Option<Arc<Error>>>);

impl Failure {
    /// Nothing failed yet.
    pub fn none() -> Failure {
        Failure(watch::Sender::new(None))
    }

    /// Reports the error that ends this receiver; the first one stays.
    pub fn report(&self, error: Error) {
        tracing::error!(error = %error, cause = error.source.as_ref().map(tracing::field::display), "final");
        self.0.send_if_modified(|first| {
            let report = first.is_none();
            if report {
                *first = Some(Arc::new(error));
            }
            report
        });
    }

    /// The final error, if there is one.
    pub fn get(&self) -> Option<Arc<Error>> {
        self.0.borrow().clone()
    }

    /// Resolves with the final error, when there is one.
    pub async fn wait(&self) -> Arc<Error> {
        let mut errors = self.0.subscribe();
        // The sender lives in `self`, so the wait cannot end without a value.
        let found = errors.wait_for(Option::is_some).await.map(|error| error.clone());
        match found {
            Ok(Some(error)) => error,
            _ => unreachable!("the sender outlives the wait"),
        }
    }
}

/// Runs `body` on an OS thread of that name; an error or panic in it is final.
pub fn spawn(
    name: String,
    failure: &Failure,
    body: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<JoinHandle<()>> {
    let failure = failure.clone();
    let told = name.clone();
    let run = move || match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => failure.report(error.during(told)),
        Err(_) => {
            let what = format!("thread {told} panicked: its message is in the log");
            failure.report(Error::new(ErrorKind::Io, what));
        }
    };
    let what = format!("start thread {name}");
    machine::spawn(name, run).map_err(|source| Error::io(what, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_final_error_stays_and_wakes_whoever_waits() {
        let failure = Failure::none();
        assert!(failure.get().is_none());
        let body = || Err(Error::new(ErrorKind::Sync, "sync 1.seg"));
        spawn("ingest-a".into(), &failure, body).unwrap().join().unwrap();
        spawn("ingest-b".into(), &failure, || panic!("broken invariant")).unwrap().join().unwrap();
        let error = failure.wait().await;
        assert_eq!(error.kind, ErrorKind::Sync);
        assert!(error.to_string().contains("ingest-a"), "{error}");
    }

    #[tokio::test]
    async fn a_panic_is_a_final_error() {
        let failure = Failure::none();
        spawn("apply-a".into(), &failure, || panic!("broken invariant")).unwrap().join().unwrap();
        assert!(failure.wait().await.to_string().contains("apply-a"));
    }
}
