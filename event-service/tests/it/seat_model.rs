//! Random sequences of steps on the seats of one session, run against a model: first on the table of transitions, then
//! by the statements on a real database. All three must agree.

use std::collections::{HashMap, HashSet};

use event_service::booking_consumer::{Applied, apply};
use event_service::session_seats::{self, ChangeOutcome};
use proptest::prelude::*;
use proptest::sample::subsequence;
use proptest_state_machine::ReferenceStateMachine;
use service_kit::testing::sequences::{for_all, for_all_sequences};
use shared_contracts::booking_event::{BookingEvent, BookingEventType};
use shared_contracts::ids::{ReservationId, SessionSeatId};
use shared_contracts::seat::{SeatConflict, SeatStatus};
use shared_contracts::transitions::{Seat, SeatStep, Transition};
use tokio::runtime::Runtime;

use crate::booking_consumer::event;
use crate::session_seats::{Seats, database_pool, seats_in, soon};

const SEATS: usize = 4;
/// The index of a seat that does not exist.
const UNKNOWN: usize = SEATS;
const RESERVATIONS: usize = 4;

/// Something that happens to the session. Reservations and seats are given by index.
#[derive(Debug, Clone)]
enum Act {
    Want {
        step: SeatStep,
        by: usize,
        seats: Vec<usize>,
    },
    /// The holds of reservation `by` become overdue.
    RunOut {
        by: usize,
    },
    CancelSession,
}

/// The outcome of an act.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Done,
    /// The seats that stopped it. Each has its status if the seat exists, and the reservation of its overdue hold.
    Refused(Vec<(usize, Option<SeatStatus>, Option<usize>)>),
    Freed(Vec<usize>),
}

/// A seat in the terms of a box office.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct ModelSeat {
    holder: Option<usize>,
    buyer: Option<usize>,
    time_is_over: bool,
}

#[derive(Debug, Clone, Default)]
struct Model {
    seats: [ModelSeat; SEATS],
    session_is_cancelled: bool,
    /// The expected answer to the last act, where it has one.
    answer: Option<Answer>,
}

impl Model {
    fn status(&self, seat: usize) -> SeatStatus {
        match self.seats[seat] {
            ModelSeat { buyer: Some(_), .. } => SeatStatus::Sold,
            ModelSeat { holder: Some(_), .. } => SeatStatus::Reserved,
            _ if self.session_is_cancelled => SeatStatus::Blocked,
            _ => SeatStatus::Available,
        }
    }

    fn is_of(&self, seat: usize, by: usize) -> bool {
        self.seats[seat].holder == Some(by) || self.seats[seat].buyer == Some(by)
    }

    fn conflict(&self, seat: usize) -> (usize, Option<SeatStatus>, Option<usize>) {
        if seat == UNKNOWN {
            return (seat, None, None);
        }
        let overdue = self.seats[seat].holder.filter(|_| self.seats[seat].time_is_over);
        (seat, Some(self.status(seat)), overdue)
    }

    fn want(&mut self, step: SeatStep, by: usize, wanted: &[usize]) -> Answer {
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable();
        let stops = |seat: &usize| match step {
            _ if *seat == UNKNOWN => true,
            SeatStep::Reserve => !self.is_of(*seat, by) && self.status(*seat) != SeatStatus::Available,
            _ => !self.is_of(*seat, by),
        };
        let (stopping, others): (Vec<usize>, Vec<usize>) = wanted.into_iter().partition(stops);
        match step {
            SeatStep::Release | SeatStep::Refund => {
                let may_go = |seat: &usize| step == SeatStep::Refund || self.seats[*seat].buyer.is_none();
                let freed: Vec<usize> = others.into_iter().filter(may_go).collect();
                freed.iter().for_each(|seat| self.seats[*seat] = ModelSeat::default());
                Answer::Freed(freed)
            }
            SeatStep::Reserve | SeatStep::Confirm if !stopping.is_empty() => {
                let mut conflicts: Vec<_> = stopping.into_iter().map(|seat| self.conflict(seat)).collect();
                if step == SeatStep::Confirm {
                    conflicts.iter_mut().for_each(|(_, _, overdue)| *overdue = None);
                }
                Answer::Refused(conflicts)
            }
            SeatStep::Reserve => {
                for seat in others.into_iter().filter(|seat| !self.is_of(*seat, by)).collect::<Vec<_>>() {
                    self.seats[seat].holder = Some(by);
                }
                Answer::Done
            }
            SeatStep::Confirm => {
                others.iter().for_each(|seat| self.seats[*seat] = ModelSeat { buyer: Some(by), ..Default::default() });
                Answer::Done
            }
        }
    }

    /// Each seat's status and the reservation that holds or owns it.
    fn shown(&self) -> Vec<(SeatStatus, Option<usize>)> {
        (0..SEATS).map(|seat| (self.status(seat), self.seats[seat].buyer.or(self.seats[seat].holder))).collect()
    }
}

impl ReferenceStateMachine for Model {
    type State = Self;
    type Transition = Act;

    fn init_state() -> BoxedStrategy<Self> {
        Just(Self::default()).boxed()
    }

    fn transitions(_: &Self) -> BoxedStrategy<Act> {
        let step = prop_oneof![
            4 => Just(SeatStep::Reserve), 3 => Just(SeatStep::Confirm),
            2 => Just(SeatStep::Release), 2 => Just(SeatStep::Refund),
        ];
        // Twelve times of thirteen only seats that exist, in any order.
        let seats = prop_oneof![
            12 => subsequence((0..SEATS).collect::<Vec<_>>(), 1..=3),
            1 => subsequence((0..=UNKNOWN).collect::<Vec<_>>(), 1..=3),
        ];
        let want = (step, 0..RESERVATIONS, seats.prop_shuffle());
        prop_oneof![
            40 => want.prop_map(|(step, by, seats)| Act::Want { step, by, seats }),
            4 => (0..RESERVATIONS).prop_map(|by| Act::RunOut { by }),
            1 => Just(Act::CancelSession),
        ]
        .boxed()
    }

    fn apply(mut model: Self, act: &Act) -> Self {
        model.answer = match act {
            Act::Want { step, by, seats } => Some(model.want(*step, *by, seats)),
            Act::RunOut { by } => {
                let held = model.seats.iter_mut().filter(|seat| seat.holder == Some(*by));
                held.for_each(|seat| seat.time_is_over = true);
                None
            }
            Act::CancelSession => {
                model.session_is_cancelled = true;
                None
            }
        };
        model
    }
}

#[test]
fn the_table_of_transitions_agrees_with_the_model() {
    for_all_sequences::<Model>(1..60, 500, |sequence| {
        let owners: Vec<ReservationId> = (0..RESERVATIONS).map(|_| ReservationId::new()).collect();
        let mut seats = [Seat::AVAILABLE; SEATS];
        let mut session_is_cancelled = false;
        for (act, model) in sequence {
            match act {
                Act::Want { step, by, seats: wanted } => {
                    let answer = want_of_the_table(&mut seats, step, owners[by], &wanted);
                    assert_same_seats(answer, model.answer.clone().unwrap());
                }
                Act::RunOut { .. } => {}
                Act::CancelSession => session_is_cancelled = true,
            }
            if session_is_cancelled {
                seats = seats.map(Seat::in_cancelled_session);
            }
            let index_of = |owner: ReservationId| owners.iter().position(|known| *known == owner);
            let shown: Vec<_> =
                seats.iter().map(|seat| (seat.status, seat.reservation_id.and_then(index_of))).collect();
            assert_eq!(shown, model.shown());
        }
    });
}

/// Applies a step by the table: `Reserve` and `Confirm` to all seats or none, the others to each seat alone. Returns
/// the seats that changed, or the seats that refused.
fn want_of_the_table(
    seats: &mut [Seat; SEATS],
    step: SeatStep,
    by: ReservationId,
    wanted: &[usize],
) -> Result<Vec<usize>, Vec<usize>> {
    let known: Vec<usize> = wanted.iter().copied().filter(|seat| *seat != UNKNOWN).collect();
    let after: HashMap<usize, Transition<Seat>> =
        known.iter().map(|seat| (*seat, seats[*seat].after(step, by))).collect();
    if matches!(step, SeatStep::Reserve | SeatStep::Confirm) {
        let is_refused = |seat: &&usize| after.get(seat).is_none_or(|after| *after == Transition::Refused);
        let refused: Vec<usize> = wanted.iter().filter(is_refused).copied().collect();
        if !refused.is_empty() {
            return Err(refused);
        }
    }
    known.iter().for_each(|seat| seats[*seat] = after[seat].from(seats[*seat]));
    Ok(known.into_iter().filter(|seat| matches!(after[seat], Transition::Changed(_))).collect())
}

fn assert_same_seats(answer: Result<Vec<usize>, Vec<usize>>, expected: Answer) {
    let sorted = |mut seats: Vec<usize>| {
        seats.sort_unstable();
        seats
    };
    match (answer, expected) {
        (Err(refused), Answer::Refused(conflicts)) => {
            assert_eq!(sorted(refused), conflicts.iter().map(|(seat, ..)| *seat).collect::<Vec<_>>());
        }
        (Ok(freed), Answer::Freed(expected)) => assert_eq!(sorted(freed), expected),
        (Ok(_), Answer::Done) => {}
        (answer, expected) => panic!("answered {answer:?}, expected {expected:?}"),
    }
}

#[test]
fn the_statements_agree_with_the_model() {
    let runtime = Runtime::new().unwrap();
    let db = runtime.block_on(database_pool());
    for_all_sequences::<Model>(1..40, 128, |sequence| {
        runtime.block_on(async {
            let session = Session::new(seats_in(db.clone(), SEATS as i32).await);
            let mut before = session.rows().await;
            for (act, model) in sequence {
                assert_eq!(session.play(act).await, model.answer);
                let rows = session.rows().await;
                assert_eq!(rows.iter().map(Row::shown).collect::<Vec<_>>(), model.shown());
                for (seat, (old, new)) in before.iter().zip(&rows).enumerate() {
                    assert_eq!(new.overdue, model.seats[seat].time_is_over, "the hold of seat {seat} is overdue");
                    // The seat map stream sends each change, and nothing else.
                    let changed = old.shown() != new.shown();
                    assert_eq!(
                        old.number < new.number,
                        changed,
                        "the change number of seat {seat} must rise exactly when the seat changes"
                    );
                }
                before = rows;
            }
        });
    });
}

/// A session in the database, and the reservations that act on its seats.
struct Session {
    seats: Seats,
    ids: Vec<SessionSeatId>,
    owners: Vec<ReservationId>,
}

#[derive(Debug)]
struct Row {
    status: SeatStatus,
    owner: Option<usize>,
    overdue: bool,
    number: i64,
}

impl Row {
    fn shown(&self) -> (SeatStatus, Option<usize>) {
        (self.status, self.owner)
    }
}

impl Session {
    fn new(seats: Seats) -> Self {
        let ids = seats.ids.iter().copied().chain([SessionSeatId::new()]).collect();
        Self { seats, ids, owners: (0..RESERVATIONS).map(|_| ReservationId::new()).collect() }
    }

    async fn play(&self, act: Act) -> Option<Answer> {
        match act {
            Act::Want { step, by, seats } => {
                let (owner, wanted) = (self.owners[by], seats.iter().map(|seat| self.ids[*seat]).collect::<Vec<_>>());
                Some(match step {
                    SeatStep::Reserve => self.answer_of(self.seats.reserve_until(owner, &wanted, soon()).await),
                    SeatStep::Confirm => self.answer_of(self.seats.confirm(owner, &wanted).await),
                    SeatStep::Release => self.freed(self.seats.release(owner, &wanted).await),
                    SeatStep::Refund => self.freed(self.seats.refund(owner, &wanted).await),
                })
            }
            Act::RunOut { by } => {
                let past = "update session_seats set reserved_until = reserved_until - interval '1 day'
                            where reservation_id = $1 and status = 'reserved'";
                sqlx::query(past).bind(self.owners[by]).execute(&self.seats.db).await.unwrap();
                None
            }
            Act::CancelSession => {
                let cancelled = "update sessions set status = 'cancelled', cancelled_at = now() where session_id = $1";
                sqlx::query(cancelled).bind(self.seats.session).execute(&self.seats.db).await.unwrap();
                session_seats::block_free(&mut self.seats.db.acquire().await.unwrap(), self.seats.session)
                    .await
                    .unwrap();
                None
            }
        }
    }

    fn index_of(&self, id: SessionSeatId) -> usize {
        self.ids.iter().position(|known| *known == id).unwrap()
    }

    fn owner_of(&self, id: ReservationId) -> usize {
        self.owners.iter().position(|known| *known == id).unwrap()
    }

    fn freed(&self, ids: Vec<SessionSeatId>) -> Answer {
        let mut seats: Vec<usize> = ids.into_iter().map(|id| self.index_of(id)).collect();
        seats.sort_unstable();
        Answer::Freed(seats)
    }

    fn answer_of(&self, outcome: ChangeOutcome) -> Answer {
        let ChangeOutcome::Refused(conflicts) = outcome else { return Answer::Done };
        let told = |conflict: SeatConflict| {
            let overdue = conflict.overdue_reservation_id.map(|id| self.owner_of(id));
            (self.index_of(conflict.session_seat_id), conflict.status, overdue)
        };
        let mut conflicts: Vec<_> = conflicts.into_iter().map(told).collect();
        conflicts.sort_unstable_by_key(|(seat, ..)| *seat);
        Answer::Refused(conflicts)
    }

    async fn rows(&self) -> Vec<Row> {
        let rows: Vec<(SeatStatus, Option<ReservationId>, bool, i64)> = sqlx::query_as(
            "select status, reservation_id, coalesce(reserved_until < now(), false), change_seq from session_seats
             where session_id = $1 order by session_seat_id",
        )
        .bind(self.seats.session)
        .fetch_all(&self.seats.db)
        .await
        .unwrap();
        rows.into_iter()
            .map(|(status, owner, overdue, number)| Row {
                status,
                owner: owner.map(|owner| self.owner_of(owner)),
                overdue,
                number,
            })
            .collect()
    }
}

/// The events of one reservation in the order of their commits, each with its seats.
type History = Vec<(BookingEventType, Vec<usize>)>;

fn histories_of(seats: Vec<usize>) -> BoxedStrategy<History> {
    let ended = prop_oneof![Just(BookingEventType::Expired), Just(BookingEventType::Cancelled)];
    let (all, refunded) = (seats.clone(), subsequence(seats.clone(), 0..=seats.len()).prop_shuffle());
    prop_oneof![
        1 => ended.prop_map(move |ended| vec![(ended, seats.clone())]),
        3 => refunded.prop_map(move |refunded| {
            let refunds = refunded.into_iter().map(|seat| (BookingEventType::TicketRefunded, vec![seat]));
            [(BookingEventType::Confirmed, all.clone())].into_iter().chain(refunds).collect()
        }),
    ]
    .boxed()
}

#[test]
fn events_in_any_order_and_repeated_leave_the_same_seats() {
    let histories = (histories_of(vec![0, 1, 2]), histories_of(vec![3])).prop_map(|(first, second)| [first, second]);
    let delivered = histories.prop_flat_map(|histories| {
        let once =
            histories.iter().enumerate().flat_map(|(owner, history)| (0..history.len()).map(move |n| (owner, n)));
        let twice: Vec<(usize, usize)> = once.clone().chain(once).collect();
        (Just(histories), Just(twice).prop_shuffle())
    });
    let runtime = Runtime::new().unwrap();
    let db = runtime.block_on(database_pool());
    for_all(&delivered, 128, |(histories, deliveries)| {
        runtime.block_on(async {
            let session = Session::new(seats_in(db.clone(), SEATS as i32).await);
            for (owner, seats) in [(0, 0..3), (1, 3..4)] {
                session.play(Act::Want { step: SeatStep::Reserve, by: owner, seats: seats.collect() }).await;
            }
            let announced = |owner: usize| {
                let numbered = histories[owner].iter().zip(1..);
                numbered.map(move |((event_type, seats), sequence)| (owner, *event_type, seats, sequence))
            };
            let events: HashMap<(usize, usize), BookingEvent> = (0..histories.len())
                .flat_map(announced)
                .map(|(owner, event_type, seats, sequence)| {
                    let seats: Vec<String> = seats.iter().map(|seat| session.ids[*seat].to_string()).collect();
                    ((owner, sequence as usize - 1), event(event_type, session.owners[owner], &seats, sequence))
                })
                .collect();
            let mut heard = HashSet::new();
            for delivery in deliveries {
                let applied = apply(&session.seats.db, &events[&delivery]).await.unwrap();
                assert!(!matches!(applied, Applied::Conflict(_)), "{applied:?}");
                assert_eq!(applied == Applied::Repeat, !heard.insert(delivery), "{applied:?}");
            }
            let mut expected = [(SeatStatus::Available, None); SEATS];
            for (owner, event_type, seats, _) in (0..histories.len()).flat_map(announced) {
                let is_sold = event_type == BookingEventType::Confirmed;
                let status = if is_sold { (SeatStatus::Sold, Some(owner)) } else { (SeatStatus::Available, None) };
                seats.iter().for_each(|seat| expected[*seat] = status);
            }
            assert_eq!(session.rows().await.iter().map(Row::shown).collect::<Vec<_>>(), expected);
        });
    });
}
