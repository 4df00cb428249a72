//! The audit: holds both databases against the eight promises, on a live system and at the end of every test.
//!
//! A live system is always between two states somewhere, so there are two looks with a pause: what only one of them
//! finds was in passing, what both find is a violation. The Event Service is asked in pages, by its internal API, so a
//! million seats are no matter.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use service_kit::amqp::{Broker, dead_letters_of};
use shared_contracts::ids::{ReservationId, SessionSeatId};
use shared_contracts::seat::SeatStatus;
use shared_contracts::seat_api::{Hold, OwnedSeat, SEATS_PER_CALL_MAX};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use crate::reservations::model::states;
use crate::state::App;

/// Findings of one check that a look keeps: enough to see what is wrong, few enough for a bad day.
const FINDINGS_PER_CHECK: i64 = 1000;
/// Findings of a promise that the report shows; it counts them all.
const SHOWN: usize = 5;

/// What the promises say, in a few words; their numbers are the indexes and one.
pub const PROMISES: [&str; 8] = [
    "no seat twice",
    "all or nothing",
    "paid means seated",
    "nothing leaks",
    "charged once or not at all",
    "no event lost",
    "no poison",
    "honest answers",
];

/// How patient the audit is.
#[derive(Debug, Clone, Copy)]
pub struct AuditWindow {
    /// The pause between the two looks: a difference that is younger is in passing. Zero: one look, and it counts.
    pub settle: Duration,
    /// How late something may be that is done by and by: an expiry, a refund, an event's way to the broker.
    pub late: Duration,
}

/// Something that a promise rules out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// The promise, from 1.
    pub promise: usize,
    /// What is wrong.
    pub fault: &'static str,
    /// The seat, reservation, ticket or payment it is about.
    pub subject: Uuid,
    /// Whose it is.
    pub reservation_id: Option<ReservationId>,
}

/// What was found of one promise.
#[derive(Debug, Serialize)]
pub struct PromiseVerdict {
    /// The promise's number, from 1 to 8.
    pub promise: usize,
    /// In a few words.
    pub says: &'static str,
    /// Rows and seats that were looked at.
    pub checked: i64,
    /// How many rows break the promise; 0 when it is kept.
    pub violations: usize,
    /// Differences that were gone at the second look.
    pub in_passing: usize,
    /// The first violations.
    pub first: Vec<Finding>,
}

/// What was found, a verdict a promise.
#[derive(Debug, Serialize)]
pub struct Report {
    /// In the order of the promises.
    pub verdicts: Vec<PromiseVerdict>,
}

/// Active reservations looked at in one go.
const RESERVATIONS_PER_PAGE: i64 = 500;

/// Statements that find what one database alone can tell, as (subject, reservation).
const CHECKS: &[(usize, &str, &str)] = &[
    (
        1,
        "two reservations have this seat",
        "select session_seat_id, null::uuid from (
             select session_seat_id, reservation_id from reservation_items i join reservations r on r.id = i.reservation_id
             where r.status in ('active', 'confirming')
             union select session_seat_id, reservation_id from tickets where status <> 'refunded'
         ) owned group by session_seat_id having count(distinct reservation_id) > 1",
    ),
    (
        2,
        "the reservation has not as many items as seats",
        "select id, id from reservations r where user_id <> '00000000-0000-0000-0000-000000000000'
         and seats_count <> (select count(*) from reservation_items where reservation_id = r.id)",
    ),
    (
        3,
        "the paid reservation has not as many tickets as seats",
        "select id, id from reservations r where status in ('confirmed', 'refunded')
         and seats_count <> (select count(*) from tickets where reservation_id = r.id)",
    ),
    (
        3,
        "the ticket admits although its reservation is not paid",
        "select t.id, t.reservation_id from tickets t join reservations r on r.id = t.reservation_id
         where t.status <> 'refunded' and r.status <> 'confirmed'",
    ),
    (
        3,
        "the reservation is confirmed although all its tickets were given back",
        "select id, id from reservations r where status = 'confirmed'
         and not exists (select from tickets where reservation_id = r.id and status <> 'refunded')",
    ),
    (
        5,
        "what was captured is not the price",
        "select id, id from reservations r where status in ('confirmed', 'refunded')
         and total_amount is distinct from (select sum(amount) from payments where reservation_id = r.id and status = 'captured')",
    ),
    (
        5,
        "money was captured for a reservation that is not paid",
        "select p.id, r.id from payments p join reservations r on r.id = p.reservation_id
         where p.status = 'captured' and r.status not in ('confirmed', 'refunded')",
    ),
    (
        5,
        "the charge's fate is not known and nobody asks",
        "select p.id, r.id from payments p join reservations r on r.id = p.reservation_id
         where p.status = 'pending' and r.status <> 'confirming'",
    ),
    (
        5,
        "the provider says otherwise of this charge",
        "select p.id, p.reservation_id from payments p left join mock_provider_charges c on c.idempotency_key = p.id
         where p.status not in ('pending', 'processing') and (p.status = 'captured') <> coalesce(c.state = 'captured', false)
           and not exists (select from refunds where id = p.id and amount = p.amount)",
    ),
    (
        5,
        "the provider took money that no payment tells of",
        "select c.idempotency_key, null::uuid from mock_provider_charges c
         where c.state = 'captured' and not exists (select from payments where id = c.idempotency_key)",
    ),
    (
        5,
        "ticket and refund do not agree",
        "select t.id, t.reservation_id from tickets t
         where (t.status = 'refunded') <> exists (select from refunds where id = t.id and amount = t.price)",
    ),
    (
        5,
        "the provider did not give back what is settled",
        "select r.id, null::uuid from refunds r where status = 'settled'
         and not exists (select from mock_provider_refunds where idempotency_key = r.id and amount = r.amount)",
    ),
    (
        6,
        "not every change has its event",
        "select id, id from reservations r where sequence <> (select count(*) from outbox where reservation_id = r.id)",
    ),
    (
        8,
        "the kept answer tells of a reservation that does not exist",
        "select (answer::jsonb ->> 'id')::uuid, null::uuid from idempotency_keys
         where operation = 'create_reservation' and status = 201
           and not exists (select from reservations where id = (answer::jsonb ->> 'id')::uuid)",
    ),
];

/// The same of what is late, with the seconds that it may be so.
const LATE_CHECKS: &[(usize, &str, &str)] = &[
    (
        4,
        "the reservation's time is over and it has not ended",
        "select id, id from reservations where status = 'active' and expiry_time < now() - make_interval(secs => $1)",
    ),
    (
        5,
        "the payment takes too long",
        "select id, id from reservations where status = 'confirming' and confirming_until < now() - make_interval(secs => $1)",
    ),
    (
        5,
        "the reservation has ended and the charge has not",
        "select p.id, r.id from payments p join reservations r on r.id = p.reservation_id
         where p.status = 'processing' and r.status <> 'active' and r.updated_at < now() - make_interval(secs => $1)",
    ),
    (
        5,
        "the provider's notice is not worked on",
        "select payment_id, null::uuid from payment_notices where handled_at is null and received_at < now() - make_interval(secs => $1)",
    ),
    (
        5,
        "the money is owed for too long",
        "select id, null::uuid from refunds where status = 'pending' and created_at < now() - make_interval(secs => $1)",
    ),
    (
        6,
        "the event has not left",
        // A hall of expired reservations goes by at a pace.
        "select id, reservation_id from outbox where published_at is null
           and created_at < now() - make_interval(secs => $1 * case event_type when 'reservation.expired' then 10 else 1 end)",
    ),
];

/// A row that a check has found.
#[derive(FromRow)]
struct FoundRow {
    subject: Uuid,
    reservation_id: Option<ReservationId>,
}

/// How many rows there are to check.
#[derive(FromRow)]
struct Totals {
    reservations: i64,
    tickets: i64,
    /// Payments and refunds.
    money: i64,
    events: i64,
    /// Kept answers of idempotency keys.
    answers: i64,
}

/// One look at everything.
#[derive(Default)]
struct Look {
    checked: [i64; PROMISES.len()],
    findings: BTreeSet<Finding>,
}

/// Looks twice, `window.settle` apart.
///
/// # Errors
/// A database, the Event Service or the broker does not answer: nothing can be said then.
pub async fn audit(app: &App, broker: &Broker, queue: &str, window: AuditWindow) -> anyhow::Result<Report> {
    let first = look(app, broker, queue, window).await?;
    if first.findings.is_empty() || window.settle.is_zero() {
        return Ok(Report::of(first, &BTreeSet::new()));
    }
    tokio::time::sleep(window.settle).await;
    let mut second = look(app, broker, queue, window).await?;
    let passed = first.findings.difference(&second.findings).cloned().collect();
    second.findings.retain(|finding| first.findings.contains(finding));
    Ok(Report::of(second, &passed))
}

async fn look(app: &App, broker: &Broker, queue: &str, window: AuditWindow) -> anyhow::Result<Look> {
    let mut look = Look::default();
    let mut connection = app.db.acquire().await?;
    // Some of the statements read whole tables. The connection is not given back with its long time limit.
    sqlx::query("set statement_timeout = '10min'").execute(&mut *connection).await?;
    let mut connection = connection.detach();
    look.one_database(&mut connection, window.late).await?;
    look.owned_seats(app, &mut connection).await.context("the Event Service's seats can't be compared")?;
    look.tickets(app, &mut connection).await.context("tickets can't be compared with the Event Service's seats")?;
    look.active(app, &mut connection).await.context("reservations can't be compared with the Event Service's seats")?;
    let set_aside = broker.messages_in(&dead_letters_of(queue)).await.context("dead letters can't be counted")?;
    look.checked[6] = set_aside.into();
    if set_aside > 0 {
        look.found(7, "messages are set aside in the dead letter queue", Uuid::nil(), None);
    }
    Ok(look)
}

impl Look {
    fn found(&mut self, promise: usize, fault: &'static str, subject: Uuid, owner: Option<ReservationId>) {
        self.findings.insert(Finding { promise, fault, subject, reservation_id: owner });
    }

    async fn one_database(&mut self, connection: &mut PgConnection, late: Duration) -> anyhow::Result<()> {
        for (promise, fault, sql) in CHECKS.iter().chain(LATE_CHECKS) {
            let sql = format!("select * from ({sql}) found (subject, reservation_id) limit {FINDINGS_PER_CHECK}");
            let mut query = sqlx::query_as::<_, FoundRow>(sqlx::AssertSqlSafe(sql.clone()));
            if sql.contains("$1") {
                query = query.bind(late.as_secs_f64());
            }
            for row in query.fetch_all(&mut *connection).await.context(*fault)? {
                self.found(*promise, fault, row.subject, row.reservation_id);
            }
        }
        let Totals { reservations, tickets, money, events, answers } = sqlx::query_as(
            "select (select count(*) from reservations) as reservations, (select count(*) from tickets) as tickets,
                    (select count(*) from payments) + (select count(*) from refunds) as money,
                    (select count(*) from outbox) as events, (select count(*) from idempotency_keys) as answers",
        )
        .fetch_one(connection)
        .await?;
        self.checked = [reservations, reservations, tickets, 0, money, events, 0, answers];
        Ok(())
    }

    /// From the seats to the reservations: whoever has a seat must have a right to it.
    async fn owned_seats(&mut self, app: &App, connection: &mut PgConnection) -> anyhow::Result<()> {
        let mut after = Uuid::nil();
        loop {
            let page = app.event_service.owned_seats(after, SEATS_PER_CALL_MAX as u16).await?;
            let Some(last) = page.items.last() else { return Ok(()) };
            after = last.session_seat_id.as_uuid();
            self.checked[3] += page.items.len() as i64;
            let owners: Vec<ReservationId> = page.items.iter().map(|seat| seat.reservation_id).collect();
            let seats: Vec<SessionSeatId> = page.items.iter().map(|seat| seat.session_seat_id).collect();
            let states = states(&mut *connection, &owners).await?;
            let ticketed: HashSet<Hold> = sqlx::query_as(
                "select session_seat_id, reservation_id from tickets where session_seat_id = any($1) and status <> 'refunded'",
            )
            .bind(&seats)
            .fetch_all(&mut *connection)
            .await?
            .into_iter()
            .collect();
            let waiting = waiting_events(connection, &owners).await?;
            for OwnedSeat { session_seat_id, status, reservation_id, .. } in page.items {
                let live = states.get(&reservation_id).is_some_and(|state| state.is_under_way());
                let fault = match status {
                    _ if ticketed.contains(&Hold { reservation_id, session_seat_id })
                        || waiting.contains(&reservation_id) =>
                    {
                        continue;
                    }
                    SeatStatus::Reserved if live => continue,
                    SeatStatus::Reserved if states.contains_key(&reservation_id) => {
                        "the seat is held for a reservation that has ended"
                    }
                    SeatStatus::Reserved => "the seat is held for a reservation that does not exist",
                    _ => "the seat is sold without a ticket",
                };
                self.found(4, fault, session_seat_id.as_uuid(), Some(reservation_id));
            }
        }
    }

    /// From the tickets to the seats: each ticket's seat is sold to its reservation.
    async fn tickets(&mut self, app: &App, connection: &mut PgConnection) -> anyhow::Result<()> {
        let mut after = Uuid::nil();
        loop {
            let page: Vec<Hold> = sqlx::query_as(
                "select session_seat_id, reservation_id from tickets where status <> 'refunded' and session_seat_id > $1
                 order by session_seat_id limit $2",
            )
            .bind(after)
            .bind(SEATS_PER_CALL_MAX as i64)
            .fetch_all(&mut *connection)
            .await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.session_seat_id.as_uuid();
            let seats: Vec<_> = page.iter().map(|hold| hold.session_seat_id).collect();
            let owners: Vec<_> = page.iter().map(|hold| hold.reservation_id).collect();
            let owned = owners_of(app, &seats).await?;
            let waiting = waiting_events(connection, &owners).await?;
            for Hold { reservation_id: owner, session_seat_id: seat } in page {
                match owned.get(&seat) {
                    Some(has) if has.reservation_id == owner && has.status == SeatStatus::Sold => {}
                    Some(has) if has.reservation_id == owner && waiting.contains(&owner) => {}
                    Some(has) if has.reservation_id == owner => {
                        self.found(3, "the ticket's seat is held and not sold", seat.as_uuid(), Some(owner));
                    }
                    Some(_) => self.found(3, "the ticket's seat is another's", seat.as_uuid(), Some(owner)),
                    None => self.found(3, "the ticket's seat is nobody's", seat.as_uuid(), Some(owner)),
                }
            }
        }
    }

    /// From active reservations to the seats: each has all of its own.
    async fn active(&mut self, app: &App, connection: &mut PgConnection) -> anyhow::Result<()> {
        let mut after = Uuid::nil();
        loop {
            // Along the key from page to page: by the index of active ones, each page would sort all of them.
            let page: Vec<Hold> = sqlx::query_as(
                "select r.id as reservation_id, i.session_seat_id from (
                     select id from reservations where id > $1 and status || '' in ('active', 'confirming') and expiry_time > now()
                     order by id limit $2
                 ) r join reservation_items i on i.reservation_id = r.id order by r.id",
            )
            .bind(after)
            .bind(RESERVATIONS_PER_PAGE)
            .fetch_all(&mut *connection)
            .await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.reservation_id.as_uuid();
            for part in page.chunks(SEATS_PER_CALL_MAX) {
                let owned = owners_of(app, &part.iter().map(|hold| hold.session_seat_id).collect::<Vec<_>>()).await?;
                for Hold { reservation_id: owner, session_seat_id: seat } in part {
                    if owned.get(seat).is_none_or(|has| has.reservation_id != *owner) {
                        self.found(2, "the reservation does not have its seat", seat.as_uuid(), Some(*owner));
                    }
                }
            }
        }
    }
}

async fn owners_of(app: &App, seats: &[SessionSeatId]) -> anyhow::Result<HashMap<SessionSeatId, OwnedSeat>> {
    let owned = app.event_service.look_up(seats).await?;
    Ok(owned.into_iter().map(|seat| (seat.session_seat_id, seat)).collect())
}

/// Those of `owners` whose events wait in the outbox: their seats are as they should be, once the broker has them.
/// An outbox that waits for too long is a finding of its own.
async fn waiting_events(
    connection: &mut PgConnection,
    owners: &[ReservationId],
) -> anyhow::Result<HashSet<ReservationId>> {
    let sql = "select reservation_id from outbox where published_at is null and reservation_id = any($1)";
    Ok(sqlx::query_scalar(sql).bind(owners).fetch_all(connection).await?.into_iter().collect())
}

impl Report {
    fn of(look: Look, passed: &BTreeSet<Finding>) -> Self {
        let verdict = |promise: usize| {
            let own: Vec<&Finding> = look.findings.iter().filter(|finding| finding.promise == promise).collect();
            PromiseVerdict {
                promise,
                says: PROMISES[promise - 1],
                checked: look.checked[promise - 1],
                violations: own.len(),
                in_passing: passed.iter().filter(|finding| finding.promise == promise).count(),
                first: own.into_iter().take(SHOWN).cloned().collect(),
            }
        };
        Self { verdicts: (1..=PROMISES.len()).map(verdict).collect() }
    }

    /// Each promise in a few words, with the count of its violations.
    pub(crate) fn violations(&self) -> impl Iterator<Item = (&'static str, usize)> {
        self.verdicts.iter().map(|verdict| (verdict.says, verdict.violations))
    }

    /// Whether every promise is kept.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.verdicts.iter().all(|verdict| verdict.violations == 0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for PromiseVerdict { promise, says, checked, violations, in_passing, first } in &self.verdicts {
            let word = if *violations == 0 { "ok" } else { "VIOLATED" };
            writeln!(
                f,
                "{promise}  {says:<28} {word:<9} checked {checked}, violations {violations}, in passing {in_passing}"
            )?;
            for Finding { fault, subject, reservation_id, .. } in first {
                let of = reservation_id.map(|id| format!(" of reservation {id}")).unwrap_or_default();
                writeln!(f, "   {fault}: {subject}{of}")?;
            }
        }
        Ok(())
    }
}
