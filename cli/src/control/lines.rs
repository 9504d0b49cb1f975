//! The answer to a restore while it runs: one JSON object a line.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::sync::mpsc;

use super::{Desk, Line, RestoreOrder, carried, stopped, stopping};

/// Runs the restore beside the connection; its lines arrive in order, the result last. It ends when the
/// connection does: who interrupts the command means the restore, too.
pub fn start(desk: Desk, order: RestoreOrder, lines: usize) -> mpsc::Receiver<Line> {
    let (sender, receiver) = mpsc::channel(lines);
    let RestoreOrder { group, at, to, .. } = &order;
    let line = format!("restore {group} --at {at} --to {}", to.display());
    tokio::spawn(async move {
        let (progress, mut reports) = mpsc::channel(1);
        let forward = async {
            while let Some(report) = reports.recv().await {
                // A reader that went away, or reads slowly, does not hold up the restore.
                let _ = sender.try_send(Line::Progress(report));
            }
        };
        let work = async { tokio::join!(carried(line, desk.backend.restore(order, progress)), forward).0 };
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = stopped(desk.stop.clone()) => Err(stopping()),
            () = sender.closed() => {
                tracing::info!("a restore ends, since the command that ordered it has gone");
                return;
            }
        };
        drop(desk);
        let last = match outcome {
            Ok(report) => Line::Result(report),
            Err(fault) => Line::Error(fault),
        };
        let _ = sender.send(last).await;
    });
    receiver
}

/// An HTTP body of lines.
pub struct Lines {
    first: Option<Line>,
    rest: mpsc::Receiver<Line>,
}

impl Lines {
    /// `first`, then what comes.
    pub fn new(first: Line, rest: mpsc::Receiver<Line>) -> Lines {
        Lines { first: Some(first), rest }
    }
}

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        let next = match this.first.take() {
            Some(line) => Poll::Ready(Some(line)),
            None => this.rest.poll_recv(cx),
        };
        next.map(|line| line.map(|line| Ok(Frame::data(encode(&line)))))
    }
}

fn encode(line: &Line) -> Bytes {
    let mut text = serde_json::to_vec(line).expect("invariant: lines hold only what JSON holds");
    text.push(b'\n');
    text.into()
}
