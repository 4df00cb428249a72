//! `GET …/seat-map/stream`: a session's changes as Server-Sent Events.
//!
//! ```text
//! watcher ──▶ snapshot            load the seat map now; whatever comes after this event is not in an older map
//!         ◀── change, change, …   one a seat, with its new status
//! ```
//!
//! One statement a tick reads the changes of all watched sessions of this process, and each batch is written once for all watchers
//! of its session. An event id is a cursor: a snapshot of the database, which tells exactly what has been seen, and the session's version. Rows are asked for by
//! the transaction that wrote them and not by their number, because numbers become visible out of order; so no change is missed, on
//! any replica, and one may come twice. Of two changes of a seat the one with the higher version is the later. An edit of the session may
//! have made its seats anew, or their prices: it is a new `snapshot`, and a deleted session's stream ends.
//!
//! Everything is bounded: watchers by [`SeatStreams::new`], what waits for a slow reader by [`BATCHES_KEPT`] (one that falls further
//! behind is cut off, and resumes by `Last-Event-ID`), the changes of one look by [`CHANGES_MAX`] (more of them are a new `snapshot`).

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
use service_kit::error::{Error, Result};
use service_kit::extract::ApiPath;
use service_kit::refusals;
use shared_contracts::ids::SessionId;
use shared_contracts::problem::{Code, Problem};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use crate::error::session_not_found;
use crate::session_seats::{self, SeatChange, SeenSnapshot};

/// Between two looks: what a watcher's map is behind at most, and short against what a buyer needs to click.
const TICK: Duration = Duration::from_millis(200);
/// Proxies cut connections that are silent for a minute, some for half of one.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Batches kept for a reader that is slower than they come: some 13 seconds of ticks.
const BATCHES_KEPT: usize = 64;
/// Changes of one look. A watcher who missed more loads the map again, which is then shorter.
const CHANGES_MAX: i64 = 10_000;
/// One look. What never answers must not end all looks: a server that has vanished says nothing for a quarter of an hour.
const LOOK_TIME_MAX: Duration = Duration::from_secs(5);
/// What a watcher turned away should wait.
const RETRY_AFTER_SECONDS: u32 = 10;

/// Who watches which session of this process.
#[derive(Debug)]
pub struct SeatStreams {
    db: PgPool,
    feeds: Mutex<HashMap<SessionId, Feed>>,
    places: Arc<Semaphore>,
    first_watcher: Notify,
    stopping: CancellationToken,
}

/// One watched session.
#[derive(Debug)]
struct Feed {
    /// Written events, as they go to every watcher.
    batches: broadcast::Sender<Bytes>,
    /// What has been sent.
    cursor: StreamCursor,
    /// The highest number of a change that has been seen.
    version: i64,
}

/// How far a watcher has come: an event's id.
#[derive(Debug, Clone, PartialEq, Eq)]
struct StreamCursor {
    /// What it shows has been sent.
    seen: SeenSnapshot,
    /// The session's version: no edit after it has been heard of.
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

/// A watcher's place; given back when the stream ends.
struct Watcher {
    first: Option<Bytes>,
    batches: broadcast::Receiver<Bytes>,
    stopping: CancellationToken,
    _place: OwnedSemaphorePermit,
}

refusals!(Refusals: &[Code::SessionNotFound, Code::TooManyWatchers, Code::ValidationFailed]);

/// One event of the stream, for the document: its lines as members.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its description is of interest")]
struct StreamEvent {
    /// `snapshot` or `change`.
    event: Option<String>,
    /// `{session_id, version}` or `{session_seat_id, status, version}`, as JSON.
    #[schema(
        example = r#"{"session_seat_id":"019ac1c0-0000-7000-8000-000000000007","status":"reserved","version":42}"#
    )]
    data: String,
    /// What to send as `Last-Event-ID`.
    id: Option<String>,
    /// Milliseconds to wait before coming back.
    retry: Option<i64>,
}

/// Follow a session's seat map
///
/// Server-Sent Events. First `snapshot` (`{session_id, version}`): load the seat map after it. Then a `change`
/// (`{session_seat_id, status, version}`) for each seat that changes; of two for one seat the one with the higher version counts.
/// When the connection breaks, send the last event's id as `Last-Event-ID` (browsers do so by themselves) and the stream goes on
/// without a gap, or with a new `snapshot` when too much has happened. An edit of the session is a new `snapshot`, too, and the stream of one
/// that is deleted ends. A comment every 15 s keeps proxies awake.
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
        // Proxies of nginx's kind collect answers otherwise.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(events)).into_response())
}

impl SeatStreams {
    /// Room for `watchers_max` watchers; `stopping` ends their streams.
    #[must_use]
    pub fn new(db: PgPool, watchers_max: u32, stopping: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            db,
            feeds: Mutex::default(),
            places: Arc::new(Semaphore::new(watchers_max as usize)),
            first_watcher: Notify::new(),
            stopping,
        })
    }

    async fn watch(
        &self,
        session_id: SessionId,
        last: Option<StreamCursor>,
    ) -> Result<impl Stream<Item = std::result::Result<Bytes, Infallible>> + use<>> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            let detail = "As many seat maps are being followed as this service can feed. Load the map from time to time instead.";
            Error::from(Problem::new(Code::TooManyWatchers, detail).retry_after(RETRY_AFTER_SECONDS))
        })?;
        let mut connection = self.db.acquire().await?;
        let session_version = session_version_of(&mut connection, session_id).await?;
        // The feed's horizon is older than this watcher's first look, and that look is younger than the subscription: nothing
        // can fall between the two.
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
        // After the changes, so that an edit which they show is noticed.
        let cursor = StreamCursor { seen, session_version: session_version_of(&mut connection, session_id).await? };
        let resumed = last
            .is_some_and(|last| last.session_version == cursor.session_version && last.seen.is_before(&cursor.seen))
            && (changes.len() as i64) < CHANGES_MAX;
        let first = if resumed { written(&changes, &cursor) } else { self.snapshot(session_id, &cursor) };
        let watcher = Watcher { first: Some(first), batches, stopping: self.stopping.clone(), _place: place };
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

    /// Feeds all watchers until the process stops. A look that fails is made up for by the next: the horizon stays where it was.
    ///
    /// # Errors
    /// None: it is made to be a task of the process.
    pub async fn follow(self: Arc<Self>) -> anyhow::Result<()> {
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
            let looked =
                async { tokio::time::timeout(LOOK_TIME_MAX, self.look()).await.unwrap_or_else(|_| Err(silent())) };
            let Some(looked) = self.stopping.run_until_cancelled(looked).await else {
                return Ok(());
            };
            match looked {
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

    /// One tick. Sessions that are followed for longer go together; one that has just come has a horizon of its own.
    async fn look(&self) -> Result<()> {
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
                // Its watchers' streams end with it.
                feeds.remove(session_id);
                continue;
            };
            let Some(feed) = feeds.get_mut(session_id) else { continue };
            feed.version = own.iter().map(|change| change.version).max().unwrap_or(0).max(feed.version);
            let cursor = StreamCursor { seen: seen.clone(), session_version: *session_version };
            let is_edited = std::mem::replace(&mut feed.cursor, cursor.clone()).session_version != *session_version;
            let batches = feed.batches.clone();
            drop(feeds);
            // Nobody listening any more is no fault: the feed goes with the next tick.
            if too_many || is_edited {
                let _ = batches.send(self.snapshot(*session_id, &cursor));
            } else if !own.is_empty() {
                let _ = batches.send(written(&own, &cursor));
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
            // One that lags behind is cut off, and comes back with the id of the last event that it has read.
            batch = self.batches.recv() => batch.ok(),
            () = tokio::time::sleep(HEARTBEAT) => Some(Bytes::from_static(b": heartbeat\n\n")),
        }
    }
}

async fn session_version_of(connection: &mut PgConnection, session_id: SessionId) -> Result<i64> {
    let versions = versions(connection, &[session_id]).await?;
    versions.get(&session_id).copied().ok_or_else(|| session_not_found(session_id))
}

/// The versions of those of these sessions that there are.
async fn versions(connection: &mut PgConnection, sessions: &[SessionId]) -> Result<HashMap<SessionId, i64>> {
    let sql = "select session_id, version from sessions where session_id = any($1)";
    let versions: Vec<(SessionId, i64)> = sqlx::query_as(sql).bind(sessions).fetch_all(connection).await?;
    Ok(versions.into_iter().collect())
}

/// A database that does not answer.
fn silent() -> Error {
    sqlx::Error::PoolTimedOut.into()
}

/// Changes as events. Only the last has an id: a reader cut off before it has not seen all that lies below.
fn written(changes: &[SeatChange], cursor: &StreamCursor) -> Bytes {
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
    use service_kit::database::lazy_pool;
    use service_kit::settings::Secret;
    use service_kit::testing::database;
    use service_kit::testing::wires::{FaultyWire, Strike};
    use sqlx::postgres::PgConnectOptions;

    use super::*;
    use crate::state::MIGRATIONS;

    fn watcher(streams: &SeatStreams, session_id: SessionId) -> Watcher {
        let place = Arc::clone(&streams.places).try_acquire_owned().unwrap();
        let batches = streams.subscribe(session_id, StreamCursor::parse("1:1:@1").unwrap(), 0);
        Watcher { first: None, batches, stopping: streams.stopping.clone(), _place: place }
    }

    /// What waits for a reader is bounded: one that stops reading is cut off, and the others hear everything.
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
        assert_eq!(streams.places.available_permits(), 1, "its place is free");
    }

    /// The server takes a look's question and never answers it. The session is none, so that the next look ends its stream.
    #[tokio::test]
    async fn a_look_that_is_never_answered_is_not_the_last() {
        let url = database("event", &MIGRATIONS).await;
        let (wire, url) = FaultyWire::to_statements(url.reveal(), "changes on true", Strike::Silence, 1).await;
        let db = lazy_pool(&Secret::from(url.as_str()), "test", 4).unwrap();
        let streams = SeatStreams::new(db, 1, CancellationToken::new());
        let mut watcher = watcher(&streams, SessionId::new());
        tokio::select! {
            ended = watcher.next() => assert_eq!((ended, wire.hits()), (None, 1), "heard of nothing but heartbeats"),
            followed = Arc::clone(&streams).follow() => panic!("{followed:?}"),
        }
    }

    #[test]
    fn only_the_last_change_of_a_batch_has_the_id_of_its_horizon() {
        let change = |version| SeatChange {
            session_id: SessionId::new(),
            session_seat_id: shared_contracts::ids::SessionSeatId::new(),
            status: shared_contracts::seat_api::SeatStatus::Sold,
            version,
        };
        let text =
            String::from_utf8(written(&[change(1), change(2)], &StreamCursor::parse("70:77:72@1").unwrap()).to_vec())
                .unwrap();
        let events: Vec<&str> = text.trim_end().split("\n\n").collect();
        assert_eq!(events.len(), 2);
        assert!(!events[0].contains("id: ") && events[1].ends_with("\nid: 70:77:72@1"), "{text}");
    }
}
