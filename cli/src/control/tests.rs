//! Server and client against a backend of answers.

use super::*;
use crate::client::Client;
use crate::status::Group;

#[derive(Default)]
struct Fake {
    /// Told when a restore that goes on for ever is waited for no more.
    dropped: Arc<tokio::sync::Notify>,
}

/// Tells when it is dropped.
struct Told(Arc<tokio::sync::Notify>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Backend for Fake {
    fn status(&self) -> Status {
        Status { groups: vec![Group { name: "g".into(), state: "replicating".into(), ..Group::default() }] }
    }

    fn wait(&self, timeout: Duration) -> Answer<'_, u64> {
        Box::pin(async move {
            match timeout.as_millis() {
                0 => Err(Fault::new(Kind::TimedOut, "lsn 3 of 9")),
                1 => Err(Fault::not_possible("degraded")),
                _ => Ok(9),
            }
        })
    }

    fn points(&self, group: String) -> Answer<'_, Value> {
        Box::pin(async move { Ok(json!({ "group": group })) })
    }

    fn bookmark(&self, _group: String, name: String) -> Answer<'_, u64> {
        Box::pin(async move { Ok(name.len() as u64) })
    }

    fn attach(&self, device: PathBuf) -> Answer<'_, String> {
        Box::pin(async move { Err(Fault::not_possible(format!("{} is captured already", device.display()))) })
    }

    fn detach(&self, _device: PathBuf) -> Answer<'_, Value> {
        Box::pin(async move { Ok(json!({ "volume": "data", "lsn": 12, "consistent": true })) })
    }

    fn rewind(&self, group: String, at: String) -> Answer<'_, Value> {
        Box::pin(async move { Ok(json!({ "group": group, "at": at })) })
    }

    fn resume(&self, _group: String) -> Answer<'_, Value> {
        Box::pin(async { Err(Fault::not_possible("not rewound")) })
    }

    fn hold(&self, _group: String, name: String, release: bool) -> Answer<'_, Value> {
        Box::pin(async move { Ok(json!({ "name": name, "held": !release })) })
    }

    fn restore(&self, order: RestoreOrder, progress: mpsc::Sender<Progress>) -> Answer<'_, Value> {
        Box::pin(async move {
            if order.at == "lsn:0" {
                return Err(Fault::not_possible("before the window"));
            }
            for done_bytes in 0..3 {
                progress.send(Progress { done_bytes, total_bytes: 3 }).await.unwrap();
            }
            if order.at == "lsn:2" {
                let _told = Told(self.dropped.clone());
                std::future::pending::<()>().await;
            }
            if order.at == "lsn:1" {
                return Err(Fault::new(Kind::Corrupt, "a.seg at 512"));
            }
            Ok(json!({ "lsn": 7 }))
        })
    }
}

async fn served() -> (tempfile::TempDir, Server, Client) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let server = Server::start(&path, Arc::new(Fake::default())).await.unwrap();
    (dir, server, Client::at(path))
}

fn kind(error: anyhow::Error) -> Kind {
    Fault::of(&error).kind
}

#[tokio::test]
async fn answers_and_faults_cross_the_socket() {
    let (dir, server, client) = served().await;
    let mode = std::fs::metadata(dir.path().join("control.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(client.get("/v1/status").await.unwrap()["groups"][0]["state"], "replicating");
    assert_eq!(client.get("/v1/version").await.unwrap()["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(client.get("/v1/points/db").await.unwrap()["group"], "db");
    let wait = async |ms: u64| client.post("/v1/wait", &json!({ "timeout_ms": ms })).await;
    assert_eq!(wait(2).await.unwrap()["lsn"], 9);
    assert_eq!(kind(wait(1).await.unwrap_err()), Kind::NotPossible);
    assert_eq!(kind(wait(0).await.unwrap_err()), Kind::TimedOut);
    let marked = client.post("/v1/bookmark", &json!({ "group": "g", "name": "four" })).await.unwrap();
    assert_eq!(marked["lsn"], 4);
    let device = json!({ "device": "/dev/vdb" });
    let detached = client.post("/v1/detach", &device).await.unwrap();
    assert_eq!(detached, json!({ "volume": "data", "lsn": 12, "consistent": true }));
    assert_eq!(kind(client.post("/v1/attach", &device).await.unwrap_err()), Kind::NotPossible);
    let rewound = client.post("/v1/rewind", &json!({ "group": "g", "at": "lsn:4" })).await.unwrap();
    assert_eq!(rewound["at"], "lsn:4");
    assert_eq!(
        kind(client.post("/v1/resume", &json!({ "group": "g" })).await.unwrap_err()),
        Kind::NotPossible
    );
    let held = client.post("/v1/hold", &json!({ "group": "g", "name": "n" })).await.unwrap();
    assert_eq!(held["held"], true);
    for (path, body) in [
        ("/v1/rewind", json!({ "group": "g" })),
        ("/v1/hold", json!({ "group": "g", "name": "n", "realease": true })),
        ("/v1/bookmark", json!({ "group": "g" })),
        ("/v1/bookmark", json!({ "group": "g", "name": "n", "nmae": "typo" })),
        ("/v1/nothing", json!({})),
        ("/v1/status", json!({})),
        ("/v1/restore", json!({ "group": "g", "at": "latest", "to": "relative" })),
    ] {
        assert_eq!(kind(client.post(path, &body).await.unwrap_err()), Kind::Usage, "{path} {body}");
    }
    server.stop().await;
    assert!(!dir.path().join("control.sock").exists());
}

#[tokio::test]
async fn a_restore_streams_progress_and_ends_with_its_result_or_its_fault() {
    let (_dir, server, client) = served().await;
    let restore = async |at: &str| {
        let mut seen = Vec::new();
        let body = json!({ "group": "g", "at": at, "to": "/t" });
        let result = client.stream("/v1/restore", &body, |progress| seen.push(progress.done_bytes)).await;
        (result, seen)
    };
    let (report, seen) = restore("latest").await;
    assert_eq!((report.unwrap()["lsn"].as_u64(), seen), (Some(7), vec![0, 1, 2]));
    let (error, seen) = restore("lsn:0").await;
    assert_eq!((kind(error.unwrap_err()), seen), (Kind::NotPossible, vec![]));
    let (error, seen) = restore("lsn:1").await;
    assert_eq!((kind(error.unwrap_err()), seen.len()), (Kind::Corrupt, 3));
    server.stop().await;
}

#[tokio::test]
async fn a_restore_ends_with_the_connection_that_asked_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let fake = Fake::default();
    let dropped = fake.dropped.clone();
    let server = Server::start(&path, Arc::new(fake)).await.unwrap();
    let (begun, mut first) = tokio::sync::mpsc::channel(1);
    let asked = tokio::spawn(async move {
        let body = json!({ "group": "g", "at": "lsn:2", "to": "/t" });
        Client::at(path).stream("/v1/restore", &body, |_| _ = begun.try_send(())).await
    });
    first.recv().await.unwrap();
    asked.abort();
    dropped.notified().await;
    server.stop().await;
}

#[tokio::test]
async fn a_served_socket_is_never_taken_and_a_dead_one_is() {
    let (dir, server, client) = served().await;
    let path = dir.path().join("control.sock");
    let second = Server::start(&path, Arc::new(Fake::default())).await.err().unwrap();
    assert_eq!(kind(second), Kind::Busy);
    assert!(client.get("/v1/status").await.is_ok(), "the first still answers");
    server.stop().await;
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a dead daemon's socket");
    let server = Server::start(&path, Arc::new(Fake::default())).await.unwrap();
    assert!(client.get("/v1/status").await.is_ok());
    server.stop().await;
    let long = dir.path().join("x".repeat(120));
    assert_eq!(kind(Server::start(&long, Arc::new(Fake::default())).await.err().unwrap()), Kind::Usage);
}
