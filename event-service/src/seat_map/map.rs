//! A session's seats with their states: as a bare array, and as a map with a version and an ETag.
//!
//! Each replica caches maps as compressed JSON, in chunks of some seats. Every request asks the database which seats
//! have changed since the cached map, and only their chunks are built again. The query compares transactions, as in
//! `seat_map/stream.rs`, so it misses no change. So a map is as fresh as one read from the tables, on every replica.
//! Requests that arrive at the same time share one query.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt, stream};
use moka::policy::EvictionPolicy;
use serde::Serialize;
use service_kit::http::error::{Error, Result};
use service_kit::http::etag;
use service_kit::http::extract::ApiPath;
use service_kit::postgres::batch::{BatchConfig, Batcher, no_answer};
use service_kit::postgres::database::BatchPool;
use service_kit::problems;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::{HallId, SeatId, SessionId, SessionSeatId};
use shared_contracts::label::Label;
use shared_contracts::money::Money;
use shared_contracts::problem::Code;
use shared_contracts::seat::SeatStatus;
use sqlx::{FromRow, PgConnection, Row};
use tokio::sync::Mutex;
use utoipa::ToSchema;

use super::chunks::{self, Chunk};
use crate::catalogue::seats::SeatType;
use crate::error::session_not_found;
use crate::seen_snapshot::SeenSnapshot;

/// Seats per chunk. A change of one seat rebuilds and compresses one chunk; much smaller chunks compress badly.
const CHUNK_SEATS: usize = 64;
/// Seats of all cached maps, at 300 to 600 bytes each. The least recently used map goes first.
const CACHED_SEATS_MAX: u64 = 100_000;
/// Sessions that one batch worker loads at a time: readers of many large halls must leave connections to buyers.
const CONCURRENT_SESSIONS: usize = 2;
/// The cache drops a map that no request has used for this time.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// A map is read as a whole again after this time, so that it also shows what an operator changed by hand.
const REREAD_AFTER: Duration = Duration::from_secs(60);

/// A seat as one session sells it.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct SessionSeat {
    session_seat_id: SessionSeatId,
    seat_id: SeatId,
    row_number: Label,
    seat_number: Label,
    section: Option<String>,
    seat_type: SeatType,
    /// The price before the price tier's multiplier.
    price: Money,
    status: SeatStatus,
    /// When the reservation that holds the seat expires, unless it is paid; null if the seat is not reserved.
    reserved_until: Option<DateTime<Utc>>,
}

/// All seats of a session.
#[derive(Debug, Serialize, ToSchema)]
pub struct SeatMap {
    session_id: SessionId,
    hall_id: HallId,
    /// Grows with each change of a seat in this session.
    version: i64,
    seats: Vec<SessionSeat>,
}

problems!(Refusals: &[Code::SessionNotFound, Code::ValidationFailed]);

/// List a session's seats
#[utoipa::path(get, path = "/api/v1/sessions/{session_id}/seats", tag = "5 Sessions", params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "All seats of the session", body = Vec<SessionSeat>), Refusals))]
pub(crate) async fn list_session_seats(
    State(maps): State<Arc<SeatMaps>>,
    ApiPath(session_id): ApiPath<SessionId>,
    headers: HeaderMap,
) -> Result<Response> {
    let Answer { body, coding, .. } = maps.get(session_id, Form::Array, &headers).await?;
    Ok((coding.headers(), body).into_response())
}

/// Get a session's seat map
///
/// Send the `ETag` of an earlier answer as `If-None-Match`; the answer is `304` if nothing has changed since. The
/// service compresses the map with gzip, zstd or br, as `Accept-Encoding` prefers; gzip is the fastest, because the
/// service keeps maps in that form. To follow changes as they happen, open `…/seat-map/stream` first and load the map
/// after its `snapshot` event.
#[utoipa::path(get, path = "/api/v1/sessions/{session_id}/seat-map", tag = "5 Sessions",
    params(("session_id" = SessionId, Path), ("If-None-Match" = Option<String>, Header, description = "The ETag of an earlier answer")),
    responses((status = 200, description = "The map", body = SeatMap, headers(("ETag" = String))), (status = 304, description = "Unchanged", headers(("ETag" = String))), Refusals))]
pub(crate) async fn get_seat_map(
    State(maps): State<Arc<SeatMaps>>,
    ApiPath(session_id): ApiPath<SessionId>,
    headers: HeaderMap,
) -> Result<Response> {
    let Answer { body, tag, coding } = maps.get(session_id, Form::Map, &headers).await?;
    let fresh = [(header::CACHE_CONTROL, "no-cache")];
    if let Some(known) = etag::known(&headers, &tag) {
        return Ok((StatusCode::NOT_MODIFIED, fresh, [(header::ETAG, known)]).into_response());
    }
    Ok((fresh, coding.headers(), [(header::ETAG, tag)], body).into_response())
}

/// The JSON form of a session's seats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Form {
    /// A bare array.
    Array,
    /// A [`SeatMap`].
    Map,
}

/// The content coding of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Coding {
    /// Not compressed here. The HTTP layers may still compress it, for a client that prefers another coding to gzip.
    Plain,
    Gzip,
}

impl Coding {
    fn of(request: &HeaderMap) -> Self {
        if etag::prefers_gzip(request) { Self::Gzip } else { Self::Plain }
    }

    fn headers(self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let mut insert = |name: HeaderName, value| headers.insert(name, header::HeaderValue::from_static(value));
        insert(header::CONTENT_TYPE, "application/json");
        if self == Self::Gzip {
            insert(header::CONTENT_ENCODING, "gzip");
            insert(header::VARY, "accept-encoding");
        }
        headers
    }
}

/// An answer's bytes, and an ETag of their content. The version would not do as a tag, because changes can become
/// visible in another order than that of their numbers.
#[derive(Debug, Clone)]
struct Answer {
    body: Bytes,
    coding: Coding,
    tag: String,
}

/// The seats of session `$1`.
macro_rules! seats_of {
    () => {
        "select session_seat_id, seat_id, row_number, seat_number, section, seat_type, price, status, reserved_until, change_seq
         from session_seats join seats using (seat_id) where session_id = $1"
    };
}

/// One request for the seats of a session.
#[derive(Debug, Clone, Copy)]
struct MapRequest {
    session_id: SessionId,
    form: Form,
    coding: Coding,
}

/// The answers for one session.
type Answers = HashMap<(Form, Coding), Answer>;

/// Batches requests for seat maps. Requests that arrive while a map is being built share the next build. So each sees
/// every change that was committed before it asked, and cost does not grow with the number of readers.
#[derive(Debug)]
pub(crate) struct SeatMaps {
    requests: Batcher<MapRequest, Answer>,
}

/// One build serves the whole batch, so a batch may be large.
const BATCH_CONFIG: BatchConfig = BatchConfig { batch_max: 1024, ..BatchConfig::with_timeout(Duration::from_secs(15)) };

impl SeatMaps {
    /// Starts the batch workers. They end when the last `SeatMaps` is dropped.
    pub(crate) fn start(db: BatchPool, lifecycle: &Lifecycle) -> Self {
        let cache = MapCache::builder()
            .max_capacity(CACHED_SEATS_MAX)
            .eviction_policy(EvictionPolicy::lru())
            .weigher(|_, (seats, _)| *seats)
            .time_to_idle(IDLE_TIMEOUT)
            .build();
        let answer = move |requests| answer_all(db.clone(), cache.clone(), requests);
        Self { requests: Batcher::start(lifecycle, BATCH_CONFIG, answer) }
    }

    async fn get(&self, session_id: SessionId, form: Form, request: &HeaderMap) -> Result<Answer> {
        self.requests.call(MapRequest { session_id, form, coding: Coding::of(request) }).await
    }
}

/// Maps by session, each with its number of seats.
type MapCache = moka::sync::Cache<SessionId, (u32, Arc<Mutex<CachedMap>>)>;

async fn answer_all(db: BatchPool, cache: MapCache, requests: Vec<MapRequest>) -> Vec<Result<Answer>> {
    let mut by_session: HashMap<SessionId, HashSet<(Form, Coding)>> = HashMap::new();
    for MapRequest { session_id, form, coding } in &requests {
        by_session.entry(*session_id).or_default().insert((*form, *coding));
    }
    let answers = stream::iter(by_session).map(|(session_id, forms)| {
        let (db, cache) = (db.clone(), cache.clone());
        async move { (session_id, answer_session(&db, &cache, session_id, forms.into_iter()).await) }
    });
    let mut answers: HashMap<SessionId, Result<Answers>> =
        answers.buffer_unordered(CONCURRENT_SESSIONS).collect().await;
    let share = |MapRequest { session_id, form, coding }: &MapRequest| match answers.get_mut(session_id) {
        Some(Ok(answers)) => answers.get(&(*form, *coding)).cloned().ok_or_else(no_answer),
        Some(Err(error)) => Err(error.for_another()),
        None => Err(no_answer()),
    };
    requests.iter().map(share).collect()
}

/// The answers for one session, all as of one moment.
async fn answer_session(
    db: &BatchPool,
    cache: &MapCache,
    session_id: SessionId,
    forms: impl Iterator<Item = (Form, Coding)>,
) -> Result<Answers> {
    if let Some((_, map)) = cache.get(&session_id) {
        let mut map = map.lock().await;
        if map.refresh(db).await? {
            return map.answers(forms).await;
        }
    }
    let mut connection = db.acquire().await?;
    let at = ReadPoint::read(&mut connection, session_id).await?;
    let mut map = CachedMap::read(&mut connection, at).await?;
    db.release(connection);
    let answers = map.answers(forms).await;
    let seats = u32::try_from(map.seats.len()).unwrap_or(u32::MAX);
    cache.insert(session_id, (seats, Arc::new(Mutex::new(map))));
    answers
}

/// A session, and the snapshot in which it was read. Its seats are read with it or after it; the next refresh reads a
/// change in between again.
#[derive(Debug, FromRow)]
struct ReadPoint {
    session_id: SessionId,
    /// Grows with each edit of the session, which may have replaced its seats.
    session_version: i64,
    hall_id: HallId,
    seen: SeenSnapshot,
}

impl ReadPoint {
    async fn read(connection: &mut PgConnection, session_id: SessionId) -> Result<Self> {
        let found = sqlx::query_as!(
            Self,
            r#"select session_id, version as session_version, hall_id, pg_current_snapshot()::text as "seen!: _"
               from sessions where session_id = $1"#,
            session_id as _,
        )
        .fetch_optional(connection)
        .await?;
        found.ok_or_else(|| session_not_found(session_id))
    }

    /// The present read point, and the seats that have changed since this one. No seats if the session was edited: then
    /// all may have changed. One statement reads both, so that they belong to one snapshot.
    async fn changes_since(&self, connection: &mut PgConnection) -> Result<(Self, Vec<SeatRow>)> {
        // Of the conditions on the changes, the first uses the index, and the second is exact.
        let mut rows = sqlx::query(concat!(
            "select c.session_id, c.version as session_version, c.hall_id, pg_current_snapshot()::text as seen, changed.*
             from sessions c left join lateral (",
            seats_of!(),
            " and change_xid >= pg_snapshot_xmin($2::pg_snapshot) and not pg_visible_in_snapshot(change_xid, $2::pg_snapshot) and c.version = $3)
             changed on true where c.session_id = $1"
        ))
        .bind(self.session_id)
        .bind(&self.seen)
        .bind(self.session_version)
        .fetch(connection);
        let (mut now, mut changed) = (None, Vec::new());
        while let Some(row) = rows.try_next().await? {
            if now.is_none() {
                now = Some(Self::from_row(&row)?);
            }
            if row.try_get::<Option<SessionSeatId>, _>("session_seat_id")?.is_some() {
                changed.push(SeatRow::from_row(&row)?);
            }
        }
        Ok((now.ok_or_else(|| session_not_found(self.session_id))?, changed))
    }
}

#[derive(FromRow)]
struct SeatRow {
    #[sqlx(flatten)]
    seat: SessionSeat,
    change_seq: i64,
}

/// A session's seats as of the last refresh, ready to be sent.
#[derive(Debug)]
struct CachedMap {
    at: ReadPoint,
    read_at: Instant,
    /// The highest change number of its seats.
    version: i64,
    /// In the order of the map.
    seats: Vec<SeatId>,
    chunks: Vec<SeatChunk>,
    /// The answers built since the last change.
    answers: Answers,
}

/// A chunk, and the end of the text of each of its seats.
#[derive(Debug)]
struct SeatChunk {
    ends: Vec<usize>,
    chunk: Chunk,
}

impl CachedMap {
    async fn read(connection: &mut PgConnection, at: ReadPoint) -> Result<Self> {
        let mut map = Self {
            read_at: Instant::now(),
            version: 0,
            seats: Vec::new(),
            chunks: Vec::new(),
            answers: HashMap::new(),
            at,
        };
        let mut rows =
            sqlx::query_as(concat!(seats_of!(), " order by seat_id")).bind(map.at.session_id).fetch(connection);
        let mut texts: Vec<Vec<u8>> = Vec::with_capacity(CHUNK_SEATS);
        while let Some(SeatRow { seat, change_seq }) = rows.try_next().await? {
            map.seats.push(seat.seat_id);
            map.version = map.version.max(change_seq);
            texts.push(to_json(&seat)?);
            if texts.len() == CHUNK_SEATS {
                map.push(&texts);
                texts.clear();
                // The first read takes long for a large hall.
                tokio::task::yield_now().await;
            }
        }
        if !texts.is_empty() {
            map.push(&texts);
        }
        Ok(map)
    }

    fn push(&mut self, texts: &[Vec<u8>]) {
        let chunk = SeatChunk::of(self.chunks.is_empty(), texts.iter().map(Vec::as_slice));
        self.chunks.push(chunk);
    }

    /// Brings the map up to date; `false` if it must be read as a whole.
    async fn refresh(&mut self, db: &BatchPool) -> Result<bool> {
        if self.read_at.elapsed() > REREAD_AFTER {
            return Ok(false);
        }
        let mut connection = db.acquire().await?;
        let (now, changed) = self.at.changes_since(&mut connection).await?;
        db.release(connection);
        if self.at.session_version != now.session_version || !self.at.seen.is_before(&now.seen) {
            return Ok(false);
        }
        let mut of_chunks: BTreeMap<usize, HashMap<usize, Vec<u8>>> = BTreeMap::new();
        for SeatRow { seat, change_seq } in &changed {
            let Ok(index) = self.seats.binary_search(&seat.seat_id) else { return Ok(false) };
            self.version = self.version.max(*change_seq);
            of_chunks.entry(index / CHUNK_SEATS).or_default().insert(index % CHUNK_SEATS, to_json(seat)?);
        }
        if !changed.is_empty() {
            self.answers.clear();
        }
        for (index, texts) in of_chunks {
            let chunk = &mut self.chunks[index];
            *chunk = chunk.with(index == 0, &texts);
            tokio::task::yield_now().await;
        }
        // Last, so that the next refresh makes up for one that was cancelled half-way.
        self.at = now;
        Ok(true)
    }

    async fn answers(&mut self, forms: impl Iterator<Item = (Form, Coding)>) -> Result<Answers> {
        let mut answers = HashMap::new();
        for (form, coding) in forms {
            answers.insert((form, coding), self.answer(form, coding).await?);
        }
        Ok(answers)
    }

    async fn answer(&mut self, form: Form, coding: Coding) -> Result<Answer> {
        if let Some(answer) = self.answers.get(&(form, coding)) {
            return Ok(answer.clone());
        }
        let (head, tail) = match form {
            Form::Array => (b"[".to_vec(), b"]".to_vec()),
            Form::Map => {
                let ReadPoint { session_id, hall_id, .. } = self.at;
                let mut head = to_json(&SeatMap { session_id, hall_id, version: self.version, seats: Vec::new() })?;
                let tail = head.split_off(head.len() - b"]}".len());
                (head, tail)
            }
        };
        let (head, tail) = (Chunk::new(head), Chunk::new(tail));
        let mut all = vec![&head];
        all.extend(self.chunks.iter().map(|seats| &seats.chunk));
        all.push(&tail);
        let body = match coding {
            Coding::Plain => chunks::plain(&all),
            Coding::Gzip => {
                for chunk in &all {
                    if chunk.prepare() {
                        tokio::task::yield_now().await;
                    }
                }
                chunks::gzip(&all)
            }
        };
        let answer = Answer { body, coding, tag: chunks::tag(&all) };
        self.answers.insert((form, coding), answer.clone());
        Ok(answer)
    }
}

impl SeatChunk {
    /// The texts, each after a comma except the first one of the map.
    fn of<'a>(first: bool, texts: impl Iterator<Item = &'a [u8]>) -> Self {
        let (mut all, mut ends) = (Vec::new(), Vec::with_capacity(CHUNK_SEATS));
        for text in texts {
            if !first || !ends.is_empty() {
                all.push(b',');
            }
            all.extend_from_slice(text);
            ends.push(all.len());
        }
        all.shrink_to_fit();
        Self { ends, chunk: Chunk::new(all) }
    }

    /// This chunk with new texts for some of its seats.
    fn with(&self, first: bool, changed: &HashMap<usize, Vec<u8>>) -> Self {
        let old = |seat: usize| {
            let (begin, end) = (seat.checked_sub(1).map_or(0, |before| self.ends[before]), self.ends[seat]);
            let text = &self.chunk.text()[begin..end];
            text.strip_prefix(b",").unwrap_or(text)
        };
        let text = |seat: usize| changed.get(&seat).map_or_else(|| old(seat), Vec::as_slice);
        Self::of(first, (0..self.ends.len()).map(text))
    }
}

fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::Internal(error.into()))
}
