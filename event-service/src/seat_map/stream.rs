//! `GET …/seat-map/stream`: a session's changes as Server-Sent Events.
//!
//! ```text
//! watcher ◀── snapshot            load the seat map now; no map older than this event has what comes after it
//!         ◀── change, change, …   one per seat, with its new status
//! ```
//!
//! Each tick, one statement reads the changes of all watched sessions of this process. Each batch is serialized once
//! for all watchers of its session. An event id is a cursor: the database snapshot that has been seen, and the
//! session's version. The statement selects rows by the transaction that wrote them and not by their number, because
//! numbers become visible out of order. So no replica misses a change, and a change may come twice. Of two changes of a
//! seat, the one with the higher version is the later. An edit of the session may have replaced its seats or their
//! prices, so it sends a new `snapshot`. The stream of a deleted session ends.
//!
//! Everything is bounded. [`SeatStreams::new`] limits the watchers. [`BATCHES_KEPT`] limits what waits for a slow
//! reader: the service cuts off one that falls further behind, and it resumes by `Last-Event-ID`. [`CHANGES_MAX`]
//! limits the changes of one read: more of them become a new `snapshot`.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use futures::{Stream, stream};
use service_kit::http::error::{Error, Result};
use service_kit::http::extract::ApiPath;
use service_kit::problems;
use shared_contracts::ids::SessionId;
use shared_contracts::problem::{Code, Problem};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use crate::error::session_not_found;
use crate::seen_snapshot::SeenSnapshot;
use crate::session_seats::{self, SeatChange};

/// The time between two reads, and so the most that a map is behind. A buyer needs longer to click.
const TICK: Duration = Duration::from_millis(200);
/// Proxies cut connections that are silent for 60 s, some after 30 s.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Batches kept for a slow reader: 13 seconds of ticks.
const BATCHES_KEPT: usize = 64;
/// Changes of one read. A watcher that missed more loads the map again, which is shorter then.
const CHANGES_MAX: i64 = 10_000;
/// The time for one read. A server that has vanished stays silent for 15 minutes, and must not stop all streams for so
/// long.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// What a rejected watcher should wait.
const RETRY_AFTER_SECONDS: u32 = 10;

/// The watched sessions of this process, and their watchers.
#[derive(Debug)]
pub struct SeatStreams {
    db: PgPool,
    feeds: Mutex<HashMap<SessionId, Feed>>,
    permits: Arc<Semaphore>,
    first_watcher: Notify,
    stopping: CancellationToken,
}

/// One watched session.
#[derive(Debug)]
struct Feed {
    /// Serialized events, as every watcher receives them.
    batches: broadcast::Sender<Bytes>,
    /// The feed has sent everything up to here.
    cursor: StreamCursor,
    /// The highest change number that has been read.
    version: i64,
}

/// A position in the stream, sent as an event's id: `<snapshot>@<session version>`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct StreamCursor {
    /// All changes visible in this snapshot have been sent.
    seen: SeenSnapshot,
    /// The session's version: the watcher knows of no later edit.
    session_version: i64,
}

impl StreamCursor {
    fn parse(text: &str) -> Option<Self> {
        let (seen, session_version) = text.split_once('@')?;
        Some(Self { seen: SeenSnapshot::parse(seen)?, session_version: session_version.parse().ok()? })
    }
}

impl fmt::Display for StreamCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.seen, self.session_version)
    }
}

/// One open stream. Dropping it releases its permit.
struct Watcher {
    first: Option<Bytes>,
    batches: broadcast::Receiver<Bytes>,
    stopping: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

problems!(Refusals: &[Code::SessionNotFound, Code::TooManyWatchers, Code::ValidationFailed]);

/// One event of the stream. The members are the lines of a Server-Sent Event.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it only describes the stream in the OpenAPI document")]
struct StreamEvent {
    /// `snapshot` or `change`; absent in a heartbeat.
    event: Option<String>,
    /// JSON: `{session_id, version}` of a `snapshot`, or `{session_seat_id, status, version}` of a `change`.
    #[schema(
        example = r#"{"session_seat_id":"019ac1c0-0000-7000-8000-000000000007","status":"reserved","version":42}"#
    )]
    data: String,
    /// Send this as `Last-Event-ID` to resume after this event.
    id: Option<String>,
    /// Milliseconds to wait before reconnecting.
    retry: Option<i64>,
}

/// Follow a session's seat map
///
/// Server-Sent Events. First comes a `snapshot` (`{session_id, version}`): load the seat map after it. Then a `change`
/// (`{session_seat_id, status, version}`) comes for each seat that changes; of two for one seat, the one with the
/// higher version counts.
///
/// To resume after a lost connection, send the last event's id as `Last-Event-ID`; browsers do so by themselves. The
/// stream continues without a gap, or with a new `snapshot` if too much has happened. An edit of the session also sends
/// a new `snapshot`. The stream of a deleted session ends. A comment line every 15 s keeps proxies from closing the
/// connection.
#[utoipa::path(get, path = "/api/v1/sessions/{session_id}/seat-map/stream", tag = "5 Sessions",
    params(("session_id" = SessionId, Path), ("Last-Event-ID" = Option<String>, Header, description = "The id of the last event received")),
    responses((status = 200, description = "The stream", body = StreamEvent, content_type = "text/event-stream"), Refusals))]
pub(crate) async fn stream_seat_map(
    State(streams): State<Arc<SeatStreams>>,
    ApiPath(session_id): ApiPath<SessionId>,
    headers: HeaderMap,
) -> Result<Response> {
    let last_id = headers.get("last-event-id").and_then(|id| StreamCursor::parse(id.to_str().ok()?));
    let events = streams.watch(session_id, last_id).await?;
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        // Otherwise nginx and proxies like it buffer the events.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(events)).into_response())
}

impl SeatStreams {
    /// Allows `watchers_max` open streams, which end when `stopping` is cancelled.
    #[must_use]
    pub fn new(db: PgPool, watchers_max: u32, stopping: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            db,
            feeds: Mutex::default(),
            permits: Arc::new(Semaphore::new(watchers_max as usize)),
            first_watcher: Notify::new(),
            stopping,
        })
    }

    async fn watch(
        &self,
        session_id: SessionId,
        last: Option<StreamCursor>,
    ) -> Result<impl Stream<Item = std::result::Result<Bytes, Infallible>> + use<>> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| {
            let detail = "Too many seat map streams are open. Poll the seat map, or retry later.";
            Error::from(Problem::new(Code::TooManyWatchers, detail).retry_after(RETRY_AFTER_SECONDS))
        })?;
        let mut connection = self.db.acquire().await?;
        let session_version = session_version_of(&mut connection, session_id).await?;
        // This watcher subscribes before its first read, and the feed's snapshot is older than that read: no change can
        // fall between the two.
        let subscribed = self.feeds().get(&session_id).map(|feed| feed.batches.subscribe());
        let batches = match subscribed {
            Some(batches) => batches,
            None => {
                let (seen, _) = session_seats::changes_since(&mut connection, &[], None, 0).await?;
                let version = session_seats::version(&mut connection, session_id).await?;
                self.subscribe(session_id, StreamCursor { seen, session_version }, version)
            }
        };
        let seen = last.as_ref().map(|last| &last.seen);
        let (seen, changes) = session_seats::changes_since(&mut connection, &[session_id], seen, CHANGES_MAX).await?;
        // Read after the changes, so that it covers an edit which they show.
        let cursor = StreamCursor { seen, session_version: session_version_of(&mut connection, session_id).await? };
        let resumed = last
            .is_some_and(|last| last.session_version == cursor.session_version && last.seen.is_before(&cursor.seen))
            && (changes.len() as i64) < CHANGES_MAX;
        let first = if resumed { to_events(&changes, &cursor) } else { self.snapshot(session_id, &cursor) };
        let watcher = Watcher { first: Some(first), batches, stopping: self.stopping.clone(), _permit: permit };
        Ok(stream::unfold(watcher, |mut watcher| async move { Some((Ok(watcher.next().await?), watcher)) }))
    }

    fn subscribe(&self, session_id: SessionId, cursor: StreamCursor, version: i64) -> broadcast::Receiver<Bytes> {
        let mut feeds = self.feeds();
        let feed = feeds.entry(session_id).or_insert_with(|| Feed {
            batches: broadcast::Sender::new(BATCHES_KEPT),
            cursor,
            version,
        });
        self.first_watcher.notify_one();
        feed.batches.subscribe()
    }

    fn snapshot(&self, session_id: SessionId, cursor: &StreamCursor) -> Bytes {
        let version = self.feeds().get(&session_id).map_or(0, |feed| feed.version);
        format!(
            "retry: 1000\nevent: snapshot\ndata: {{\"session_id\":\"{session_id}\",\"version\":{version}}}\nid: {cursor}\n\n"
        )
        .into()
    }

    fn feeds(&self) -> MutexGuard<'_, HashMap<SessionId, Feed>> {
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Feeds all watchers until the process stops. A failed read leaves the cursors unchanged, so the next read makes
    /// up for it.
    ///
    /// # Errors
    /// None. The result fits the signature of a task of the process.
    pub async fn run(self: Arc<Self>) -> anyhow::Result<()> {
        let mut failing = false;
        loop {
            let wake = async {
                if self.feeds().is_empty() {
                    self.first_watcher.notified().await;
                }
                tokio::time::sleep(TICK).await;
            };
            if self.stopping.run_until_cancelled(wake).await.is_none() {
                return Ok(());
            }
            let tick =
                async { tokio::time::timeout(READ_TIMEOUT, self.tick()).await.unwrap_or_else(|_| Err(timed_out())) };
            let Some(outcome) = self.stopping.run_until_cancelled(tick).await else {
                return Ok(());
            };
            match outcome {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true;
                    tracing::warn!(
                        error = format!("{:#}", anyhow::Error::from(error)),
                        "Seat streams wait for the database"
                    );
                }
                Err(_) => {}
            }
        }
    }

    /// Reads and sends one batch. Sessions with the same cursor share a read; one that has just got its first watcher
    /// is read alone.
    async fn tick(&self) -> Result<()> {
        let mut by_snapshot: HashMap<SeenSnapshot, Vec<SessionId>> = HashMap::new();
        {
            let mut feeds = self.feeds();
            feeds.retain(|_, feed| feed.batches.receiver_count() > 0);
            for (session_id, feed) in feeds.iter() {
                by_snapshot.entry(feed.cursor.seen.clone()).or_default().push(*session_id);
            }
        }
        for (from, sessions) in by_snapshot {
            let mut connection = self.db.acquire().await?;
            let (seen, changes) =
                session_seats::changes_since(&mut connection, &sessions, Some(&from), CHANGES_MAX).await?;
            let session_versions = versions(&mut connection, &sessions).await?;
            drop(connection);
            self.send(&sessions, &seen, &changes, &session_versions);
        }
        Ok(())
    }

    fn send(
        &self,
        sessions: &[SessionId],
        seen: &SeenSnapshot,
        changes: &[SeatChange],
        session_versions: &HashMap<SessionId, i64>,
    ) {
        let too_many = changes.len() as i64 == CHANGES_MAX;
        for session_id in sessions {
            let own: Vec<SeatChange> =
                changes.iter().filter(|change| change.session_id == *session_id).copied().collect();
            let mut feeds = self.feeds();
            let Some(session_version) = session_versions.get(session_id) else {
                // The session was deleted; removing its feed ends the streams.
                feeds.remove(session_id);
                continue;
            };
            let Some(feed) = feeds.get_mut(session_id) else { continue };
            feed.version = own.iter().map(|change| change.version).max().unwrap_or(0).max(feed.version);
            let cursor = StreamCursor { seen: seen.clone(), session_version: *session_version };
            let is_edited = std::mem::replace(&mut feed.cursor, cursor.clone()).session_version != *session_version;
            let batches = feed.batches.clone();
            drop(feeds);
            // An error means that no watcher is left; the next tick removes the feed.
            if too_many || is_edited {
                let _ = batches.send(self.snapshot(*session_id, &cursor));
            } else if !own.is_empty() {
                let _ = batches.send(to_events(&own, &cursor));
            }
        }
    }
}

impl Watcher {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        tokio::select! {
            () = self.stopping.cancelled() => None,
            // An error means that this watcher lags too far behind. Its stream ends, and the client resumes by its last
            // event id.
            batch = self.batches.recv() => batch.ok(),
            () = tokio::time::sleep(HEARTBEAT) => Some(Bytes::from_static(b": heartbeat\n\n")),
        }
    }
}

async fn session_version_of(connection: &mut PgConnection, session_id: SessionId) -> Result<i64> {
    let versions = versions(connection, &[session_id]).await?;
    versions.get(&session_id).copied().ok_or_else(|| session_not_found(session_id))
}

/// The versions of those of these sessions that exist.
async fn versions(connection: &mut PgConnection, sessions: &[SessionId]) -> Result<HashMap<SessionId, i64>> {
    let found = sqlx::query!("select session_id, version from sessions where session_id = any($1)", sessions as _)
        .fetch_all(connection)
        .await?;
    Ok(found.into_iter().map(|session| (session.session_id, session.version)).collect())
}

/// The error for a database that does not answer.
fn timed_out() -> Error {
    sqlx::Error::PoolTimedOut.into()
}

/// Serializes changes as events. Only the last one has an id, because a reader that is cut off earlier has not seen all
/// of them.
fn to_events(changes: &[SeatChange], cursor: &StreamCursor) -> Bytes {
    use std::fmt::Write;
    let mut text = String::with_capacity(changes.len() * 128 + 32);
    for (index, SeatChange { session_seat_id, status, version, .. }) in changes.iter().enumerate() {
        let status = status.as_str();
        let _ = write!(
            text,
            "event: change\ndata: {{\"session_seat_id\":\"{session_seat_id}\",\"status\":\"{status}\",\"version\":{version}}}\n"
        );
        if index + 1 == changes.len() {
            let _ = writeln!(text, "id: {cursor}");
        }
        text.push('\n');
    }
    if changes.is_empty() {
        text.push_str(": nothing has changed\n\n");
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use service_kit::postgres::database::lazy_pool;
    use service_kit::process::settings::Secret;
    use service_kit::testing::database;
    use service_kit::testing::wires::{Fault, FaultProxy};
    use sqlx::postgres::PgConnectOptions;

    use super::*;
    use crate::state::MIGRATIONS;

    fn watcher(streams: &SeatStreams, session_id: SessionId) -> Watcher {
        let permit = Arc::clone(&streams.permits).try_acquire_owned().unwrap();
        let batches = streams.subscribe(session_id, StreamCursor::parse("1:1:@1").unwrap(), 0);
        Watcher { first: None, batches, stopping: streams.stopping.clone(), _permit: permit }
    }

    #[tokio::test]
    async fn a_slow_reader_is_cut_off_and_the_others_go_on() {
        let db = PgPool::connect_lazy_with(PgConnectOptions::new());
        let streams = SeatStreams::new(db, 2, CancellationToken::new());
        let session_id = SessionId::new();
        let (mut slow, mut quick) = (watcher(&streams, session_id), watcher(&streams, session_id));
        let batches = streams.feeds()[&session_id].batches.clone();
        for n in 0..=BATCHES_KEPT {
            batches.send(n.to_string().into()).unwrap();
            assert_eq!(quick.next().await.unwrap(), n.to_string());
        }
        assert_eq!(slow.next().await, None);
        drop(slow);
        assert_eq!(streams.permits.available_permits(), 1, "its permit is free");
    }

    /// The server receives a read and never answers it. The session does not exist, so that the next read ends its
    /// stream.
    #[tokio::test]
    async fn a_read_that_is_never_answered_does_not_stop_the_stream() {
        let url = database("event", &MIGRATIONS).await;
        let (wire, url) = FaultProxy::to_statements(url.reveal(), "changes on true", Fault::Silence, 1).await;
        let db = lazy_pool(&Secret::from(url.as_str()), "test", 4).unwrap();
        let streams = SeatStreams::new(db, 1, CancellationToken::new());
        let mut watcher = watcher(&streams, SessionId::new());
        tokio::select! {
            ended = watcher.next() => assert_eq!((ended, wire.hits()), (None, 1), "the watcher received an event"),
            ended = Arc::clone(&streams).run() => panic!("{ended:?}"),
        }
    }

    #[test]
    fn only_the_last_change_of_a_batch_has_an_id() {
        let change = |version| SeatChange {
            session_id: SessionId::new(),
            session_seat_id: shared_contracts::ids::SessionSeatId::new(),
            status: shared_contracts::seat::SeatStatus::Sold,
            version,
        };
        let text =
            String::from_utf8(to_events(&[change(1), change(2)], &StreamCursor::parse("70:77:72@1").unwrap()).to_vec())
                .unwrap();
        let events: Vec<&str> = text.trim_end().split("\n\n").collect();
        assert_eq!(events.len(), 2);
        assert!(!events[0].contains("id: ") && events[1].ends_with("\nid: 70:77:72@1"), "{text}");
    }
}
