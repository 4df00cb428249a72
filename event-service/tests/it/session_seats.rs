//! The statements that change seats, on a real database and without HTTP.

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use event_service::session_seats::{self, ChangeOutcome, HoldRequest, Releasable};
use event_service::state::MIGRATIONS;
use futures::future::join_all;
use service_kit::postgres::database::lazy_pool;
use service_kit::testing::database;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::seat::SeatStatus;
use shared_contracts::seat_api::Hold;
use sqlx::PgPool;
use tokio::sync::Barrier;
use uuid::Uuid;

pub(crate) struct Seats {
    pub(crate) db: PgPool,
    pub(crate) session: SessionId,
    pub(crate) ids: Vec<SessionSeatId>,
}

/// A database with a session of `count` seats.
async fn seats(count: i32) -> Seats {
    seats_in(database_pool().await, count).await
}

pub(crate) async fn database_pool() -> PgPool {
    lazy_pool(&database("event", &MIGRATIONS).await, "test", 20).unwrap()
}

/// Inserts a session of `count` seats directly into the tables.
pub(crate) async fn seats_in(db: PgPool, count: i32) -> Seats {
    let session: Uuid = sqlx::query_scalar(
        "with o as (insert into organizers (organizer_id, name) values (gen_random_uuid(), 'o') returning organizer_id),
              e as (insert into events (event_id, organizer_id, title, event_type) select gen_random_uuid(), organizer_id, 't', 'other' from o returning event_id),
              l as (insert into locations (location_id, name, address, city, country, timezone) values (gen_random_uuid(), 'l', 'a', 'c', 'c', 'UTC') returning location_id),
              h as (insert into halls (hall_id, location_id, name, capacity) select gen_random_uuid(), location_id, 'h', 1000 from l returning hall_id),
              s as (insert into seats (seat_id, hall_id, row_number, seat_number, seat_type)
                    select gen_random_uuid(), hall_id, '1', n::text, 'regular' from h, generate_series(1, $1) n returning seat_id),
              x as (insert into sessions (session_id, event_id, hall_id, start_time, end_time, base_price, currency)
                    select gen_random_uuid(), event_id, hall_id, now() + interval '1 day', now() + interval '2 days', 10, 'USD' from e, h returning session_id),
              y as (insert into session_seats (session_seat_id, session_id, seat_id, price) select gen_random_uuid(), session_id, seat_id, 10 from x, s)
         select session_id from x",
    )
    .bind(count)
    .fetch_one(&db)
    .await
    .unwrap();
    let ids =
        sqlx::query_scalar("select session_seat_id from session_seats where session_id = $1 order by session_seat_id")
            .bind(session)
            .fetch_all(&db)
            .await
            .unwrap();
    Seats { db, session: session.into(), ids }
}

pub(crate) fn hold_request(
    session: SessionId,
    owner: ReservationId,
    seats: &[SessionSeatId],
    until: DateTime<Utc>,
) -> HoldRequest {
    HoldRequest { session_id: session, reservation_id: owner, seats: seats.to_vec(), reserved_until: until }
}

impl Seats {
    async fn reserve(&self, owner: ReservationId, seats: &[SessionSeatId]) -> ChangeOutcome {
        self.reserve_until(owner, seats, soon()).await
    }

    pub(crate) async fn reserve_until(
        &self,
        owner: ReservationId,
        seats: &[SessionSeatId],
        until: DateTime<Utc>,
    ) -> ChangeOutcome {
        self.reserve_each(&[hold_request(self.session, owner, seats, until)]).await.remove(0)
    }

    async fn reserve_each(&self, requests: &[HoldRequest]) -> Vec<ChangeOutcome> {
        session_seats::reserve(&mut self.db.acquire().await.unwrap(), requests).await.unwrap()
    }

    pub(crate) async fn release(&self, owner: ReservationId, seats: &[SessionSeatId]) -> Vec<SessionSeatId> {
        self.free(owner, seats, Releasable::Held).await
    }

    pub(crate) async fn confirm(&self, owner: ReservationId, seats: &[SessionSeatId]) -> ChangeOutcome {
        session_seats::confirm(&mut self.db.acquire().await.unwrap(), owner, seats).await.unwrap()
    }

    pub(crate) async fn refund(&self, owner: ReservationId, seats: &[SessionSeatId]) -> Vec<SessionSeatId> {
        self.free(owner, seats, Releasable::HeldOrSold).await
    }

    async fn free(&self, owner: ReservationId, seats: &[SessionSeatId], releasable: Releasable) -> Vec<SessionSeatId> {
        let holds: Vec<_> = seats.iter().map(|seat| Hold { reservation_id: owner, session_seat_id: *seat }).collect();
        session_seats::free(&mut self.db.acquire().await.unwrap(), &holds, releasable).await.unwrap()
    }

    async fn state(&self) -> Vec<(SessionSeatId, SeatStatus, Option<ReservationId>)> {
        sqlx::query_as("select session_seat_id, status, reservation_id from session_seats order by session_seat_id")
            .fetch_all(&self.db)
            .await
            .unwrap()
    }

    async fn changes(&self) -> i64 {
        sqlx::query_scalar("select max(change_seq) from session_seats").fetch_one(&self.db).await.unwrap()
    }
}

#[expect(clippy::disallowed_methods, reason = "the service that requests a hold sets its end")]
pub(crate) fn soon() -> DateTime<Utc> {
    Utc::now() + TimeDelta::minutes(10)
}

fn taken(outcome: &ChangeOutcome) -> Vec<SessionSeatId> {
    match outcome {
        ChangeOutcome::Refused(conflicts) => conflicts.iter().map(|conflict| conflict.session_seat_id).collect(),
        ChangeOutcome::Done => panic!("the seats were not refused"),
    }
}

#[tokio::test]
async fn a_reservation_gets_all_its_seats_or_none() {
    let seats = seats(3).await;
    let (first, second) = (ReservationId::new(), ReservationId::new());
    assert_eq!(seats.reserve(first, &seats.ids[1..2]).await, ChangeOutcome::Done);
    assert_eq!(taken(&seats.reserve(second, &seats.ids).await), [seats.ids[1]]);
    assert!(seats.state().await.iter().all(|(_, _, owner)| *owner != Some(second)));
}

#[tokio::test]
async fn a_repeated_change_changes_nothing() {
    let seats = seats(2).await;
    let owner = ReservationId::new();
    seats.reserve(owner, &seats.ids).await;
    let held = seats.changes().await;
    assert_eq!(seats.reserve(owner, &seats.ids).await, ChangeOutcome::Done);
    assert_eq!(seats.changes().await, held, "a repeated reserve changed a seat");
    assert_eq!(seats.confirm(owner, &seats.ids).await, ChangeOutcome::Done);
    let sold = seats.changes().await;
    assert_eq!(seats.confirm(owner, &seats.ids).await, ChangeOutcome::Done);
    assert_eq!(seats.reserve(owner, &seats.ids).await, ChangeOutcome::Done);
    assert_eq!(seats.changes().await, sold, "a repeat changed a sold seat");
    assert_eq!(seats.refund(owner, &seats.ids).await.len(), 2);
    assert!(seats.refund(owner, &seats.ids).await.is_empty());
}

#[tokio::test]
async fn a_seat_released_twice_stays_with_its_new_owner() {
    let seats = seats(1).await;
    let (old, new) = (ReservationId::new(), ReservationId::new());
    seats.reserve(old, &seats.ids).await;
    assert_eq!(seats.release(old, &seats.ids).await, seats.ids);
    seats.reserve(new, &seats.ids).await;
    assert!(seats.release(old, &seats.ids).await.is_empty());
    assert_eq!(seats.state().await[0].2, Some(new));
    seats.confirm(new, &seats.ids).await;
    assert!(seats.release(new, &seats.ids).await.is_empty(), "a sold seat was released");
    assert!(seats.refund(old, &seats.ids).await.is_empty(), "a refund freed another's seat");
    assert_eq!(seats.state().await[0].1, SeatStatus::Sold);
}

#[tokio::test]
async fn a_reservation_confirms_only_seats_that_it_holds_and_only_all_of_them() {
    let seats = seats(2).await;
    let (owner, other) = (ReservationId::new(), ReservationId::new());
    seats.reserve(owner, &seats.ids[..1]).await;
    assert_eq!(taken(&seats.confirm(owner, &seats.ids).await), [seats.ids[1]]);
    assert_eq!(taken(&seats.confirm(other, &seats.ids[..1]).await), [seats.ids[0]]);
    assert_eq!(seats.state().await[0].1, SeatStatus::Reserved);
}

#[tokio::test]
async fn seats_of_another_session_or_of_none_are_unknown() {
    let seats = seats(1).await;
    let stranger = SessionSeatId::new();
    let outcome = seats.reserve(ReservationId::new(), &[seats.ids[0], stranger]).await;
    let ChangeOutcome::Refused(conflicts) = outcome else { panic!("an unknown seat was reserved") };
    assert_eq!((conflicts.len(), conflicts[0].session_seat_id, conflicts[0].status), (1, stranger, None));
    let elsewhere =
        seats.reserve_each(&[hold_request(SessionId::new(), ReservationId::new(), &seats.ids, soon())]).await;
    assert_eq!(taken(&elsewhere[0]), seats.ids);
    assert_eq!(seats.state().await[0].1, SeatStatus::Available);
}

/// Requests that arrive together share one statement, and each is decided on its own.
#[tokio::test]
async fn each_request_of_a_batch_is_held_whole_or_not_at_all() {
    let seats = seats(8).await;
    let (owner, buyers) = (ReservationId::new(), [(); 4].map(|()| ReservationId::new()));
    seats.reserve(owner, &seats.ids[2..3]).await;
    let wants = |buyer: usize, ids: &[SessionSeatId]| hold_request(seats.session, buyers[buyer], ids, soon());
    let outcomes = seats
        .reserve_each(&[
            wants(0, &seats.ids[0..2]),
            // Another reservation has its second seat, so it does not get the first either.
            hold_request(seats.session, buyers[1], &[seats.ids[3], seats.ids[2]], soon()),
            wants(2, &[seats.ids[4], SessionSeatId::new()]),
            // The seats exist, but in another session.
            hold_request(SessionId::new(), buyers[3], &seats.ids[5..6], soon()),
            // It holds the first seat already and requests one more.
            hold_request(seats.session, owner, &[seats.ids[2], seats.ids[6]], soon()),
        ])
        .await;
    assert_eq!((&outcomes[0], &outcomes[4]), (&ChangeOutcome::Done, &ChangeOutcome::Done));
    assert_eq!((taken(&outcomes[1]), taken(&outcomes[3])), (vec![seats.ids[2]], vec![seats.ids[5]]));
    assert!(matches!(outcomes[2], ChangeOutcome::Refused(_)));
    let owners: Vec<_> = seats.state().await.into_iter().map(|(_, _, owner)| owner).collect();
    let first = Some(buyers[0]);
    assert_eq!(owners, [first, first, Some(owner), None, None, None, Some(owner), None]);
}

/// Of two reservations that confirm the same seat, only its holder gets it, in whatever order they arrive.
#[tokio::test]
async fn each_order_of_a_batch_is_sold_whole_or_not_at_all() {
    let seats = seats(4).await;
    let (owner, rival, other) = (ReservationId::new(), ReservationId::new(), ReservationId::new());
    seats.reserve(owner, &seats.ids[0..2]).await;
    seats.reserve(other, &seats.ids[2..3]).await;
    let orders = [(rival, &seats.ids[0..1]), (owner, &seats.ids[0..2]), (other, &seats.ids[2..4])];
    let outcomes = session_seats::confirm_each(&mut seats.db.acquire().await.unwrap(), &orders).await.unwrap();
    assert_eq!(taken(&outcomes[0]), vec![seats.ids[0]], "the rival was told that it has the seat");
    assert_eq!(outcomes[1], ChangeOutcome::Done);
    assert_eq!(taken(&outcomes[2]), vec![seats.ids[3]], "it holds only one of the two");
    let states: Vec<_> = seats.state().await.into_iter().map(|(_, status, owner)| (status, owner)).collect();
    let sold = (SeatStatus::Sold, Some(owner));
    assert_eq!(states, [sold, sold, (SeatStatus::Reserved, Some(other)), (SeatStatus::Available, None)]);
}

#[tokio::test]
async fn an_overdue_hold_stays_and_is_named_to_the_next_buyer() {
    let seats = seats(2).await;
    let (late, buyer) = (ReservationId::new(), ReservationId::new());
    seats.reserve_until(late, &seats.ids[..1], soon() - TimeDelta::hours(1)).await;
    let ChangeOutcome::Refused(conflicts) = seats.reserve(buyer, &seats.ids).await else {
        panic!("a clock freed a seat")
    };
    assert_eq!(conflicts[0].overdue_reservation_id, Some(late));
    let overdue = session_seats::holds_before(&mut seats.db.acquire().await.unwrap(), None, None, 10).await.unwrap();
    assert_eq!(overdue.iter().map(|hold| hold.reservation_id).collect::<Vec<_>>(), [late]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_buyers_want_one_seat_and_one_gets_it() {
    let seats = Arc::new(seats(1).await);
    let start = Arc::new(Barrier::new(300));
    let buyers = (0..300).map(|_| {
        let (seats, start) = (Arc::clone(&seats), Arc::clone(&start));
        async move {
            start.wait().await;
            seats.reserve(ReservationId::new(), &seats.ids).await == ChangeOutcome::Done
        }
    });
    assert_eq!(join_all(buyers).await.into_iter().filter(|won| *won).count(), 1);
}

/// Twelve buyers reserve and release overlapping sets in opposite orders, 40 times each. None deadlocks or gets a part
/// of a set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::disallowed_methods, reason = "each buyer is its own task, so that the buyers run at the same time")]
async fn overlapping_sets_in_opposite_orders_never_deadlock_or_split() {
    let seats = Arc::new(seats(6).await);
    let buyers: Vec<_> = (0..12_usize)
        .map(|buyer| {
            let seats = Arc::clone(&seats);
            tokio::spawn(async move {
                let mut won = 0;
                for round in 0..40 {
                    let mut wanted: Vec<_> = (0..4).map(|n| seats.ids[(buyer + round + n) % 6]).collect();
                    if buyer % 2 == 1 {
                        wanted.reverse();
                    }
                    let owner = ReservationId::new();
                    let done = seats.reserve(owner, &wanted).await == ChangeOutcome::Done;
                    let held = seats.state().await.into_iter().filter(|(_, _, who)| *who == Some(owner)).count();
                    assert_eq!(held, if done { 4 } else { 0 }, "a part of a set is held");
                    won += usize::from(done);
                    seats.release(owner, &wanted).await;
                }
                won
            })
        })
        .collect();
    let won: usize = join_all(buyers).await.into_iter().map(Result::unwrap).sum();
    assert!(won > 0 && won < 12 * 40, "{won} wins: there was no contention, so the test proves nothing");
    assert!(seats.state().await.iter().all(|(_, status, _)| *status == SeatStatus::Available));
}
