//! The audit: checks both databases against the eight promises, on a live system and at the end of every test.
//!
//! On a live system, some change is always in progress. So the audit makes two passes, with a pause between them. A
//! finding of only one pass was such a change; a finding of both is a violation. The audit reads the Event Service's
//! seats in pages over the internal API, so a million seats are no problem.

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

/// The most findings that the audit keeps of one check. It bounds the report when much is broken.
const FINDINGS_PER_CHECK: i64 = 1000;
/// The most findings per promise that the report lists; it counts all that the audit keeps.
const SHOWN: usize = 5;

/// The promises in a few words. A promise's number is its index plus one.
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

/// The times that the audit allows before it counts a difference as a violation.
#[derive(Debug, Clone, Copy)]
pub struct AuditWindow {
    /// The pause between the two passes; a shorter-lived difference is no violation. With zero there is only one pass.
    pub settle: Duration,
    /// How late background work may be: an expiry, a refund, or the publishing of an event.
    pub late: Duration,
}

/// A row or seat in a state that a promise rules out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// The promise's number, from 1 to 8.
    pub promise: usize,
    /// What is wrong, as a clause such as "the seat is sold without a ticket".
    pub fault: &'static str,
    /// The id of the seat, reservation, ticket, payment, refund or event; nil for dead letters.
    pub subject: Uuid,
    /// The reservation that the subject belongs to; null if the check does not read it.
    pub reservation_id: Option<ReservationId>,
}

/// The result for one promise.
#[derive(Debug, Serialize)]
pub struct PromiseVerdict {
    /// The promise's number, from 1 to 8.
    pub promise: usize,
    /// The promise in a few words, from [`PROMISES`].
    pub says: &'static str,
    /// Rows and seats that were checked; for promise 7, messages in the dead letter queue.
    pub checked: i64,
    /// How many rows break the promise; 0 when it is kept.
    pub violations: usize,
    /// Findings of the first pass that the second did not repeat: changes in progress.
    pub in_passing: usize,
    /// The first violations, at most five.
    pub first: Vec<Finding>,
}

/// The result of an audit: one verdict per promise.
#[derive(Debug, Serialize)]
pub struct Report {
    /// In the order of the promises.
    pub verdicts: Vec<PromiseVerdict>,
}

/// Active reservations read per page.
const RESERVATIONS_PER_PAGE: i64 = 500;

/// Checks that need only the Booking Service's database: the promise's number, the fault, and a statement. The
/// statement returns (subject, reservation) for each finding.
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
        "the reservation does not have one item per seat",
        "select id, id from reservations r where user_id <> '00000000-0000-0000-0000-000000000000'
         and seats_count <> (select count(*) from reservation_items where reservation_id = r.id)",
    ),
    (
        3,
        "the paid reservation does not have one ticket per seat",
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
        "the reservation is confirmed although all its tickets are refunded",
        "select id, id from reservations r where status = 'confirmed'
         and not exists (select from tickets where reservation_id = r.id and status <> 'refunded')",
    ),
    (
        5,
        "the captured amount is not the price",
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
        "the charge's outcome is unknown and no payment is in progress",
        "select p.id, r.id from payments p join reservations r on r.id = p.reservation_id
         where p.status = 'pending' and r.status <> 'confirming'",
    ),
    (
        5,
        "the provider has another outcome for this charge",
        "select p.id, p.reservation_id from payments p left join mock_provider_charges c on c.idempotency_key = p.id
         where p.status not in ('pending', 'processing') and (p.status = 'captured') <> coalesce(c.state = 'captured', false)
           and not exists (select from refunds where id = p.id and amount = p.amount)",
    ),
    (
        5,
        "the provider captured a charge that has no payment",
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
        "the refund is settled but the provider has not made it",
        "select r.id, null::uuid from refunds r where status = 'settled'
         and not exists (select from mock_provider_refunds where idempotency_key = r.id and amount = r.amount)",
    ),
    (
        6,
        "the reservation does not have one event per change",
        "select id, id from reservations r where sequence <> (select count(*) from outbox where reservation_id = r.id)",
    ),
    (
        8,
        "the stored answer names a reservation that does not exist",
        "select (answer::jsonb ->> 'id')::uuid, null::uuid from idempotency_keys
         where operation = 'create_reservation' and status = 201
           and not exists (select from reservations where id = (answer::jsonb ->> 'id')::uuid)",
    ),
];

/// The same for late work. `$1` is the number of seconds that it may be late.
const LATE_CHECKS: &[(usize, &str, &str)] = &[
    (
        4,
        "the reservation is overdue and has not ended",
        "select id, id from reservations where status = 'active' and expiry_time < now() - make_interval(secs => $1)",
    ),
    (
        5,
        "the payment takes too long",
        "select id, id from reservations where status = 'confirming' and confirming_until < now() - make_interval(secs => $1)",
    ),
    (
        5,
        "the reservation has ended but its charge is still processing",
        "select p.id, r.id from payments p join reservations r on r.id = p.reservation_id
         where p.status = 'processing' and r.status <> 'active' and r.updated_at < now() - make_interval(secs => $1)",
    ),
    (
        5,
        "the provider's notice has not been handled",
        "select payment_id, null::uuid from payment_notices where handled_at is null and received_at < now() - make_interval(secs => $1)",
    ),
    (
        5,
        "the refund has been pending for too long",
        "select id, null::uuid from refunds where status = 'pending' and created_at < now() - make_interval(secs => $1)",
    ),
    (
        6,
        "the event has not been published",
        // The relay publishes events of expired reservations at a limited rate, so those of a whole hall take longer.
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

/// The number of rows that the checks read, by kind.
struct Totals {
    reservations: i64,
    tickets: i64,
    /// Payments and refunds.
    money: i64,
    events: i64,
    /// Rows of `idempotency_keys`, with or without an answer.
    answers: i64,
}

/// One pass over both databases and the dead letter queue.
#[derive(Default)]
struct Pass {
    checked: [i64; PROMISES.len()],
    findings: BTreeSet<Finding>,
}

/// Makes two passes, `window.settle` apart; the second only if the first has findings.
///
/// # Errors
/// A database, the Event Service or the broker does not answer. Then there is no result.
pub async fn audit(app: &App, broker: &Broker, queue: &str, window: AuditWindow) -> anyhow::Result<Report> {
    let first = pass(app, broker, queue, window).await?;
    if first.findings.is_empty() || window.settle.is_zero() {
        return Ok(Report::of(first, &BTreeSet::new()));
    }
    tokio::time::sleep(window.settle).await;
    let mut second = pass(app, broker, queue, window).await?;
    let passed = first.findings.difference(&second.findings).cloned().collect();
    second.findings.retain(|finding| first.findings.contains(finding));
    Ok(Report::of(second, &passed))
}

async fn pass(app: &App, broker: &Broker, queue: &str, window: AuditWindow) -> anyhow::Result<Pass> {
    let mut pass = Pass::default();
    let mut connection = app.db.acquire().await?;
    // Some of the statements read whole tables. The connection is detached, so that no request gets it with this long
    // time limit.
    sqlx::query!("set statement_timeout = '10min'").execute(&mut *connection).await?;
    let mut connection = connection.detach();
    pass.one_database(&mut connection, window.late).await?;
    pass.owned_seats(app, &mut connection).await.context("the Event Service's seats can't be compared")?;
    pass.tickets(app, &mut connection).await.context("tickets can't be compared with the Event Service's seats")?;
    pass.active(app, &mut connection).await.context("reservations can't be compared with the Event Service's seats")?;
    let set_aside = broker.messages_in(&dead_letters_of(queue)).await.context("dead letters can't be counted")?;
    pass.checked[6] = set_aside.into();
    if set_aside > 0 {
        pass.found(7, "messages are in the dead letter queue", Uuid::nil(), None);
    }
    Ok(pass)
}

impl Pass {
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
        let Totals { reservations, tickets, money, events, answers } = sqlx::query_as!(
            Totals,
            r#"select (select count(*) from reservations) as "reservations!", (select count(*) from tickets) as "tickets!",
                      (select count(*) from payments) + (select count(*) from refunds) as "money!",
                      (select count(*) from outbox) as "events!", (select count(*) from idempotency_keys) as "answers!""#,
        )
        .fetch_one(connection)
        .await?;
        self.checked = [reservations, reservations, tickets, 0, money, events, 0, answers];
        Ok(())
    }

    /// From the seats to the reservations: a held or sold seat needs a live reservation or a valid ticket.
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
            let ticketed: HashSet<Hold> = sqlx::query_as!(
                Hold,
                "select session_seat_id, reservation_id from tickets where session_seat_id = any($1) and status <> 'refunded'",
                seats as _,
            )
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

    /// From the tickets to the seats: each ticket's seat must be sold to the ticket's reservation.
    async fn tickets(&mut self, app: &App, connection: &mut PgConnection) -> anyhow::Result<()> {
        let mut after = Uuid::nil();
        loop {
            let page = sqlx::query_as!(
                Hold,
                "select session_seat_id, reservation_id from tickets where status <> 'refunded' and session_seat_id > $1
                 order by session_seat_id limit $2",
                after,
                SEATS_PER_CALL_MAX as i64,
            )
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
                    Some(_) => self.found(3, "the ticket's seat has another owner", seat.as_uuid(), Some(owner)),
                    None => self.found(3, "the ticket's seat has no owner", seat.as_uuid(), Some(owner)),
                }
            }
        }
    }

    /// From active reservations to the seats: each reservation must have all of its seats.
    async fn active(&mut self, app: &App, connection: &mut PgConnection) -> anyhow::Result<()> {
        let mut after = Uuid::nil();
        loop {
            // `status || ''` makes the planner page along the primary key. With the index of active reservations, it
            // would sort all of them for each page.
            let page = sqlx::query_as!(
                Hold,
                "select r.id as reservation_id, i.session_seat_id from (
                     select id from reservations where id > $1 and status || '' in ('active', 'confirming') and expiry_time > now()
                     order by id limit $2
                 ) r join reservation_items i on i.reservation_id = r.id order by r.id",
                after,
                RESERVATIONS_PER_PAGE,
            )
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

/// Those of `owners` with events that wait in the outbox. The Event Service updates their seats once it has the events.
/// An event that waits for too long is a finding of its own.
async fn waiting_events(
    connection: &mut PgConnection,
    owners: &[ReservationId],
) -> anyhow::Result<HashSet<ReservationId>> {
    let waiting = sqlx::query_scalar!(
        "select reservation_id from outbox where published_at is null and reservation_id = any($1)",
        owners as _,
    )
    .fetch_all(connection)
    .await?;
    Ok(waiting.into_iter().collect())
}

impl Report {
    fn of(pass: Pass, passed: &BTreeSet<Finding>) -> Self {
        let verdict = |promise: usize| {
            let own: Vec<&Finding> = pass.findings.iter().filter(|finding| finding.promise == promise).collect();
            PromiseVerdict {
                promise,
                says: PROMISES[promise - 1],
                checked: pass.checked[promise - 1],
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
