//! A session's seats with their states: as a bare array, and as a map with a version and an ETag.
//!
//! Maps are kept in memory, written and compressed, in chunks of some seats. Whoever asks has the database asked what has changed since
//! the last look (by transactions, as in `seat_map/stream.rs`: nothing is missed), and only the chunks with a change are written anew. So a
//! map is as fresh as if it were read from the tables, on every replica; and those who ask at the same time share one look.

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
use service_kit::coalesce::{Coalescer, Lanes, no_answer};
use service_kit::database::DeskPool;
use service_kit::error::{Error, Result};
use service_kit::extract::ApiPath;
use service_kit::lifecycle::Lifecycle;
use service_kit::{etag, refusals};
use shared_contracts::ids::{HallId, SeatId, SessionId, SessionSeatId};
use shared_contracts::label::Label;
use shared_contracts::money::Money;
use shared_contracts::problem::Code;
use shared_contracts::seat_api::SeatStatus;
use sqlx::{FromRow, PgConnection, Row};
use tokio::sync::Mutex;
use utoipa::ToSchema;

use super::chunks::{self, Chunk};
use crate::catalogue::seats::SeatType;
use crate::error::session_not_found;
use crate::session_seats::SeenSnapshot;

/// Seats of a chunk: what a change of one seat has written and compressed anew. Much smaller chunks compress badly.
const CHUNK_SEATS: usize = 64;
/// Seats of all maps that are kept, at some 300 to 600 bytes each; those not asked for the longest go first.
const SEATS_KEPT_MAX: u64 = 100_000;
/// Sessions that a lane works on at a time: readers of many large halls must leave connections to those who buy.
const SESSIONS_AT_ONCE: usize = 2;
/// A map that nobody asked for so long goes.
const KEPT_IDLE_MAX: Duration = Duration::from_secs(600);
/// A map is read as a whole again after this time, so that what was changed by hand, past this service's statements, shows too.
const FOLLOWED_MAX: Duration = Duration::from_secs(60);

/// A seat in a session.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct SessionSeat {
    session_seat_id: SessionSeatId,
    seat_id: SeatId,
    row_number: Label,
    seat_number: Label,
    section: Option<String>,
    seat_type: SeatType,
    /// Before the price tier's multiplier.
    price: Money,
    status: SeatStatus,
    /// While it is reserved: when that reservation ends unless it is paid.
    reserved_until: Option<DateTime<Utc>>,
}

/// All seats of a session.
#[derive(Debug, Serialize, ToSchema)]
pub struct SeatMap {
    session_id: SessionId,
    hall_id: HallId,
    /// Rises with each change of a seat.
    version: i64,
    seats: Vec<SessionSeat>,
}

refusals!(Refusals: &[Code::SessionNotFound, Code::ValidationFailed]);

/// A session's seats
#[utoipa::path(get, path = "/api/v1/sessions/{session_id}/seats", tag = "5 Sessions", params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "All its seats", body = Vec<SessionSeat>), Refusals))]
pub(crate) async fn list_session_seats(
    State(maps): State<Arc<SeatMaps>>,
    ApiPath(session_id): ApiPath<SessionId>,
    headers: HeaderMap,
) -> Result<Response> {
    let Made { body, coding, .. } = maps.make(session_id, Form::Array, &headers).await?;
    Ok((coding.headers(), body).into_response())
}

/// A session's seat map
///
/// Send the `ETag` of an earlier answer as `If-None-Match`; `304` says that nothing has changed since. Compressed with gzip, zstd or br,
/// as the client's `Accept-Encoding` prefers; gzip is there already, the others take a moment. To be told of changes as they happen,
/// open `…/seat-map/stream` and then load this.
#[utoipa::path(get, path = "/api/v1/sessions/{session_id}/seat-map", tag = "5 Sessions",
    params(("session_id" = SessionId, Path), ("If-None-Match" = Option<String>, Header, description = "The ETag of an earlier answer")),
    responses((status = 200, description = "The map", body = SeatMap, headers(("ETag" = String))), (status = 304, description = "Unchanged", headers(("ETag" = String))), Refusals))]
pub(crate) async fn get_seat_map(
    State(maps): State<Arc<SeatMaps>>,
    ApiPath(session_id): ApiPath<SessionId>,
    headers: HeaderMap,
) -> Result<Response> {
    let Made { body, tag, coding } = maps.make(session_id, Form::Map, &headers).await?;
    let fresh = [(header::CACHE_CONTROL, "no-cache")];
    if let Some(known) = etag::known(&headers, &tag) {
        return Ok((StatusCode::NOT_MODIFIED, fresh, [(header::ETAG, known)]).into_response());
    }
    Ok((fresh, coding.headers(), [(header::ETAG, tag)], body).into_response())
}

/// How the seats of a session are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Form {
    /// As a bare array.
    Array,
    /// As a [`SeatMap`].
    Map,
}

/// In which bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Coding {
    /// As they are; what wraps all requests may still compress them, for a client that prefers another coding to gzip.
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

/// An answer's bytes and the tag of their content. Of the content, not of the version: changes can become visible in another order than
/// they were numbered.
#[derive(Debug, Clone)]
struct Made {
    body: Bytes,
    coding: Coding,
    tag: String,
}

/// The rows of a session.
macro_rules! seats_of {
    () => {
        "select session_seat_id, seat_id, row_number, seat_number, section, seat_type, price, status, reserved_until, change_seq
         from session_seats join seats using (seat_id) where session_id = $1"
    };
}

/// What someone wants to see.
type Wanted = (SessionId, Form, Coding);

/// The answers of one session.
type Answers = HashMap<(Form, Coding), Made>;

/// Where all who want to see seats come together: those who come while a map is being made wait for the next one, which is made once
/// for all of them. So each sees every change that was committed before it asked, and a crowd costs no more than a few.
#[derive(Debug)]
pub(crate) struct SeatMaps {
    wanted: Coalescer<Wanted, Made>,
}

/// A map is made once for all who are in line, so there may be many of them.
const BATCH_CONFIG: Lanes = Lanes { batch_max: 1024, ..Lanes::usual(Duration::from_secs(15)) };

impl SeatMaps {
    /// Starts it; it ends when nobody can ask any more.
    pub(crate) fn start(db: DeskPool, lifecycle: &Lifecycle) -> Self {
        let kept = Kept::builder()
            .max_capacity(SEATS_KEPT_MAX)
            .eviction_policy(EvictionPolicy::lru())
            .weigher(|_, (seats, _)| *seats)
            .time_to_idle(KEPT_IDLE_MAX)
            .build();
        let make = move |wanted| make_all(db.clone(), kept.clone(), wanted);
        Self { wanted: Coalescer::start(lifecycle, BATCH_CONFIG, make) }
    }

    async fn make(&self, session_id: SessionId, form: Form, request: &HeaderMap) -> Result<Made> {
        self.wanted.call((session_id, form, Coding::of(request))).await
    }
}

/// Maps, by session, and how many seats each has.
type Kept = moka::sync::Cache<SessionId, (u32, Arc<Mutex<Known>>)>;

async fn make_all(db: DeskPool, kept: Kept, wanted: Vec<Wanted>) -> Vec<Result<Made>> {
    let mut of_session: HashMap<SessionId, HashSet<(Form, Coding)>> = HashMap::new();
    for (session_id, form, coding) in &wanted {
        of_session.entry(*session_id).or_default().insert((*form, *coding));
    }
    let made = stream::iter(of_session).map(|(session_id, wanted)| {
        let (db, kept) = (db.clone(), kept.clone());
        async move { (session_id, make(&db, &kept, session_id, wanted.into_iter()).await) }
    });
    let mut made: HashMap<SessionId, Result<Answers>> = made.buffer_unordered(SESSIONS_AT_ONCE).collect().await;
    let share = |(session_id, form, coding): &Wanted| match made.get_mut(session_id) {
        Some(Ok(made)) => made.get(&(*form, *coding)).cloned().ok_or_else(no_answer),
        Some(Err(error)) => Err(error.for_another()),
        None => Err(no_answer()),
    };
    wanted.iter().map(share).collect()
}

/// The answers of one session, all of the same moment.
async fn make(
    db: &DeskPool,
    kept: &Kept,
    session_id: SessionId,
    wanted: impl Iterator<Item = (Form, Coding)>,
) -> Result<Answers> {
    if let Some((_, known)) = kept.get(&session_id) {
        let mut known = known.lock().await;
        if known.follow(db).await? {
            return known.answers(wanted).await;
        }
    }
    let mut connection = db.take().await?;
    let now = Now::look(&mut connection, session_id).await?;
    let mut known = Known::read(&mut connection, now).await?;
    db.keep(connection);
    let made = known.answers(wanted).await;
    let seats = u32::try_from(known.seats.len()).unwrap_or(u32::MAX);
    kept.insert(session_id, (seats, Arc::new(Mutex::new(known))));
    made
}

/// A session, and what the look that found it could see. Seats are read after it or with it: a change in between is read again the next time.
#[derive(Debug, FromRow)]
struct Now {
    session_id: SessionId,
    /// Rises with each edit of the session: its seats may be others then.
    session_version: i64,
    hall_id: HallId,
    seen: SeenSnapshot,
}

impl Now {
    async fn look(connection: &mut PgConnection, session_id: SessionId) -> Result<Self> {
        let sql = "select session_id, version as session_version, hall_id, pg_current_snapshot()::text as seen from sessions where session_id = $1";
        let found = sqlx::query_as(sql).bind(session_id).fetch_optional(connection).await?;
        found.ok_or_else(|| session_not_found(session_id))
    }

    /// A new look, and the seats that have changed since this one, unless the session was edited: then all may have. One statement: both are
    /// of one snapshot.
    async fn changes_since(&self, connection: &mut PgConnection) -> Result<(Self, Vec<SeatRow>)> {
        // Of the conditions for the changes, the first is for the index, the second exact.
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

/// A session's seats as they were at the last look, ready to be sent.
#[derive(Debug)]
struct Known {
    at: Now,
    read_at: Instant,
    /// The highest number of a change.
    version: i64,
    /// In the order in which they are shown.
    seats: Vec<SeatId>,
    chunks: Vec<SeatChunk>,
    /// What has been made of it since it changed.
    answers: Answers,
}

/// A chunk, and where the text of each of its seats ends.
#[derive(Debug)]
struct SeatChunk {
    ends: Vec<usize>,
    chunk: Chunk,
}

impl Known {
    async fn read(connection: &mut PgConnection, at: Now) -> Result<Self> {
        let mut known = Self {
            read_at: Instant::now(),
            version: 0,
            seats: Vec::new(),
            chunks: Vec::new(),
            answers: HashMap::new(),
            at,
        };
        let mut rows =
            sqlx::query_as(concat!(seats_of!(), " order by seat_id")).bind(known.at.session_id).fetch(connection);
        let mut texts: Vec<Vec<u8>> = Vec::with_capacity(CHUNK_SEATS);
        while let Some(SeatRow { seat, change_seq }) = rows.try_next().await? {
            known.seats.push(seat.seat_id);
            known.version = known.version.max(change_seq);
            texts.push(written(&seat)?);
            if texts.len() == CHUNK_SEATS {
                known.push(&texts);
                texts.clear();
                // The first time takes long for a large hall.
                tokio::task::yield_now().await;
            }
        }
        if !texts.is_empty() {
            known.push(&texts);
        }
        Ok(known)
    }

    fn push(&mut self, texts: &[Vec<u8>]) {
        let chunk = SeatChunk::of(self.chunks.is_empty(), texts.iter().map(Vec::as_slice));
        self.chunks.push(chunk);
    }

    /// Brings it up to date; false when it must be read as a whole.
    async fn follow(&mut self, db: &DeskPool) -> Result<bool> {
        if self.read_at.elapsed() > FOLLOWED_MAX {
            return Ok(false);
        }
        let mut connection = db.take().await?;
        let (now, changed) = self.at.changes_since(&mut connection).await?;
        db.keep(connection);
        if self.at.session_version != now.session_version || !self.at.seen.is_before(&now.seen) {
            return Ok(false);
        }
        let mut of_chunks: BTreeMap<usize, HashMap<usize, Vec<u8>>> = BTreeMap::new();
        for SeatRow { seat, change_seq } in &changed {
            let Ok(index) = self.seats.binary_search(&seat.seat_id) else { return Ok(false) };
            self.version = self.version.max(*change_seq);
            of_chunks.entry(index / CHUNK_SEATS).or_default().insert(index % CHUNK_SEATS, written(seat)?);
        }
        if !changed.is_empty() {
            self.answers.clear();
        }
        for (index, texts) in of_chunks {
            let chunk = &mut self.chunks[index];
            *chunk = chunk.with(index == 0, &texts);
            tokio::task::yield_now().await;
        }
        // Last, so that a look that is given up half-way is made up for by the next.
        self.at = now;
        Ok(true)
    }

    async fn answers(&mut self, wanted: impl Iterator<Item = (Form, Coding)>) -> Result<Answers> {
        let mut made = HashMap::new();
        for (form, coding) in wanted {
            made.insert((form, coding), self.answer(form, coding).await?);
        }
        Ok(made)
    }

    async fn answer(&mut self, form: Form, coding: Coding) -> Result<Made> {
        if let Some(made) = self.answers.get(&(form, coding)) {
            return Ok(made.clone());
        }
        let (head, tail) = match form {
            Form::Array => (b"[".to_vec(), b"]".to_vec()),
            Form::Map => {
                let Now { session_id, hall_id, .. } = self.at;
                let mut head = written(&SeatMap { session_id, hall_id, version: self.version, seats: Vec::new() })?;
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
        let made = Made { body, coding, tag: chunks::tag(&all) };
        self.answers.insert((form, coding), made.clone());
        Ok(made)
    }
}

impl SeatChunk {
    /// The texts with commas before them, but for the first of all.
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

    /// This chunk with other texts for some of its seats.
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

fn written(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::Internal(error.into()))
}
