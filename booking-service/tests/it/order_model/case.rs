//! One sequence of acts in the running system, each compared with the model.

use std::collections::HashMap;

use booking_service::workflows::end::expire_due;
use booking_service::workflows::reconcile::{self, Sweep};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use service_kit::testing::wait_until;
use shared_contracts::ids::{PaymentId, ReservationId, SessionSeatId, TicketId};
use shared_contracts::seat::SeatStatus;
use shared_contracts::transitions::{PaymentState, PaymentStep, ReservationState, ReservationStep, Transition};
use uuid::Uuid;

use super::{Act, Means, Model, SEATS};
use crate::payment_webhook::send;
use crate::support::{SOON, Sale, System, answer, text_of};

/// One sequence that runs in the system.
pub(super) struct Case<'a> {
    system: &'a System,
    sale: Sale,
    /// The reservations after the last act.
    rows: Vec<Row>,
}

/// A reservation as it is stored.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    id: ReservationId,
    user: Uuid,
    state: ReservationState,
    payments: Vec<(PaymentId, PaymentState)>,
    /// Each ticket and its seat, and whether the ticket is still valid.
    tickets: Vec<(TicketId, usize, bool)>,
    taken: f64,
    given_back: f64,
}

impl<'a> Case<'a> {
    pub(super) async fn new(system: &'a System) -> Self {
        Self { system, sale: system.sale(SEATS as u32).await, rows: Vec::new() }
    }

    pub(super) async fn play_and_compare(&mut self, act: &Act, model: &Model) {
        let answer = self.play(act, model).await;
        assert_eq!(answer.as_deref(), model.answer, "the answer to {act:?}");
        let rows = self.read().await;
        assert_eq!(rows.len(), model.orders.len(), "reservations after {act:?}");
        for (index, (row, order)) in rows.iter().zip(&model.orders).enumerate() {
            let payments: Vec<_> = row.payments.iter().map(|(_, state)| *state).collect();
            let expected: Vec<_> = order.charges.iter().map(|charge| charge.state).collect();
            assert_eq!((row.state, payments), (order.state, expected), "reservation {index} after {act:?}");
            let tickets: Vec<_> = row.tickets.iter().map(|(_, seat, admits)| (*seat, *admits)).collect();
            let mut expected: Vec<_> =
                order.tickets().into_iter().map(|seat| (seat, !order.refunded.contains(&seat))).collect();
            expected.sort_unstable();
            assert_eq!(tickets, expected, "tickets of reservation {index} after {act:?}");
            let (taken, given_back) = order.money();
            let expected = (100.0 * taken as f64, 100.0 * given_back as f64);
            assert_eq!((row.taken, row.given_back), expected, "money of reservation {index} after {act:?}");
            let before = self.rows.get(index).map_or(ReservationState::Active, |before| before.state);
            assert!(leads(before, row.state, !order.time_is_over), "{before:?} became {:?} by {act:?}", row.state);
        }
        self.assert_payment_transitions(&rows);
        self.rows = rows;
        let expected: Vec<(SeatStatus, Option<ReservationId>)> =
            model.seats().into_iter().map(|(status, owner)| (status, owner.map(|owner| self.rows[owner].id))).collect();
        wait_until(&format!("the seats are {expected:?} after {act:?}"), SOON, async || self.seats().await == expected)
            .await;
    }

    async fn play(&self, act: &Act, model: &Model) -> Option<String> {
        let system = self.system;
        match act {
            Act::Reserve(seats) => outcome_of(system.try_reserve(&self.sale, Uuid::now_v7(), seats).await).await,
            Act::Confirm(order, means) => {
                let token = match means {
                    Means::Pays => "pay_demo",
                    Means::Declined => "pay_decline",
                    Means::ChargedWithoutAnswer => "pay_timeout_charged",
                    Means::LostOnTheWay => "pay_timeout_lost",
                    Means::Asynchronous => "pay_async",
                };
                self.call(*order, Method::POST, "/confirm", Some(json!({ "payment_id": token }))).await
            }
            Act::Cancel(order) => self.call(*order, Method::DELETE, "", None).await,
            Act::Refund(order, seat) => {
                let (row, seat) = (&self.rows[*order], model.orders[*order].seat(*seat));
                let (ticket, ..) = row.tickets.iter().find(|(_, own, _)| *own == seat).unwrap();
                let path = format!("/api/v1/tickets/{ticket}/refund");
                outcome_of(system.call(Method::POST, &path, row.user, None).await).await
            }
            Act::RunOut(order) => {
                let id = self.rows[*order].id;
                let past = "update reservations set booking_time = booking_time - interval '1 hour', expiry_time = expiry_time - interval '1 hour' where id = $1";
                sqlx::query(past).bind(id).execute(&system.app.db).await.unwrap();
                let past = "update session_seats set reserved_until = reserved_until - interval '1 hour' where reservation_id = $1 and status = 'reserved'";
                sqlx::query(past).bind(id).execute(&system.event_db).await.unwrap();
                None
            }
            Act::Expire => {
                expire_due(&system.app, 100).await.unwrap();
                None
            }
            Act::Reconcile => {
                reconcile::reconcile_once(&system.app, &mut Sweep::default()).await.unwrap();
                None
            }
            Act::EndLease(order) => {
                let end = "update reservations set confirming_until = now() - interval '1 second' where id = $1";
                sqlx::query(end).bind(self.rows[*order].id).execute(&system.app.db).await.unwrap();
                assert_eq!(reconcile::settle_payments(&system.app).await.unwrap(), 1);
                None
            }
            Act::Decide { order, captured, notices } => {
                self.decide(&self.rows[*order], *captured, *notices).await;
                None
            }
            Act::FollowUp => {
                let due =
                    "update payments set updated_at = created_at - interval '1 minute' where status = 'processing'";
                sqlx::query(due).execute(&system.app.db).await.unwrap();
                reconcile::follow_up_payments(&system.app).await.unwrap();
                None
            }
            Act::Replay(order) => {
                let row = &self.rows[*order];
                let events = json!({ "reservation_id": row.id });
                let response = system.call(Method::POST, "/api/v1/admin/events/replay", row.user, Some(&events)).await;
                assert_eq!(response.status(), 200);
                None
            }
        }
    }

    async fn call(&self, order: usize, method: Method, path: &str, body: Option<Value>) -> Option<String> {
        let row = &self.rows[order];
        let path = format!("/api/v1/reservations/{}{path}", row.id);
        outcome_of(self.system.call(method, &path, row.user, body.as_ref()).await).await
    }
}

impl Case<'_> {
    /// Makes the provider decide on the last charge, and send this many notices.
    async fn decide(&self, row: &Row, captured: bool, notices: usize) {
        let Some((payment, _)) = row.payments.last() else { panic!("{row:?} has no payment") };
        if notices == 0 {
            let state = if captured { "captured" } else { "declined" };
            let decided =
                "update mock_provider_charges set state = $2 where idempotency_key = $1 and state = 'processing'";
            sqlx::query(decided).bind(payment).bind(state).execute(&self.system.app.db).await.unwrap();
        }
        let amount: f64 = sqlx::query_scalar("select amount::float8 from payments where id = $1")
            .bind(payment)
            .fetch_one(&self.system.app.db)
            .await
            .unwrap();
        let event_type = if captured { "payment.captured" } else { "payment.declined" };
        let notice = json!({ "event_id": Uuid::now_v7(), "event_type": event_type, "payment_id": payment,
            "amount": amount, "currency": "USD" });
        for nth in 0..notices {
            let taken = answer(send(self.system, &notice).await, 200).await;
            assert_eq!(taken, json!({ "handled": true, "duplicate": nth > 0 }));
        }
    }

    async fn read(&self) -> Vec<Row> {
        let (db, session) = (&self.system.app.db, self.sale.session.parse::<Uuid>().unwrap());
        let reservations: Vec<(ReservationId, Uuid, ReservationState, f64, f64)> = sqlx::query_as(
            "select id, user_id, status,
                 (select coalesce(sum(c.amount), 0)::float8 from payments p
                  join mock_provider_charges c on c.idempotency_key = p.id and c.state = 'captured' where p.reservation_id = r.id),
                 (select coalesce(sum(m.amount), 0)::float8 from payments p
                  join mock_provider_refunds m on m.charge_key = p.id where p.reservation_id = r.id)
             from reservations r where session_id = $1 order by id",
        )
        .bind(session)
        .fetch_all(db)
        .await
        .unwrap();
        let payments: Vec<(ReservationId, PaymentId, PaymentState)> = sqlx::query_as(
            "select p.reservation_id, p.id, p.status from payments p join reservations r on r.id = p.reservation_id
             where r.session_id = $1 order by p.id",
        )
        .bind(session)
        .fetch_all(db)
        .await
        .unwrap();
        let tickets: Vec<(ReservationId, TicketId, SessionSeatId, bool)> = sqlx::query_as(
            "select reservation_id, id, session_seat_id, status = 'active' from tickets where session_id = $1",
        )
        .bind(session)
        .fetch_all(db)
        .await
        .unwrap();
        let row = |(id, user, state, taken, given_back)| {
            let own = payments.iter().filter(|(owner, ..)| *owner == id);
            let payments = own.map(|(_, payment, state)| (*payment, *state)).collect();
            let own = tickets.iter().filter(|(owner, ..)| *owner == id);
            let mut tickets: Vec<_> =
                own.map(|(_, ticket, seat, admits)| (*ticket, self.index_of(*seat), *admits)).collect();
            tickets.sort_unstable_by_key(|(_, seat, _)| *seat);
            Row { id, user, state, payments, tickets, taken, given_back }
        };
        reservations.into_iter().map(row).collect()
    }

    fn index_of(&self, seat: SessionSeatId) -> usize {
        self.sale.seats.iter().position(|id| *id == seat.to_string()).unwrap()
    }

    async fn seats(&self) -> Vec<(SeatStatus, Option<ReservationId>)> {
        let mut seats: Vec<(SessionSeatId, SeatStatus, Option<ReservationId>)> =
            sqlx::query_as("select session_seat_id, status, reservation_id from session_seats where session_id = $1")
                .bind(self.sale.session.parse::<Uuid>().unwrap())
                .fetch_all(&self.system.event_db)
                .await
                .unwrap();
        seats.sort_unstable_by_key(|(id, ..)| self.index_of(*id));
        seats.into_iter().map(|(_, status, owner)| (status, owner)).collect()
    }

    /// A payment may move to another reservation, but its state may change only by a known transition.
    fn assert_payment_transitions(&self, rows: &[Row]) {
        let before: HashMap<PaymentId, PaymentState> = self.rows.iter().flat_map(|row| row.payments.clone()).collect();
        for (payment, after) in rows.iter().flat_map(|row| row.payments.clone()) {
            let before = before.get(&payment).copied().unwrap_or(PaymentState::Pending);
            let may = before == after
                || PaymentStep::ALL.into_iter().any(|step| before.after(step) == Transition::Changed(after));
            assert!(may, "a payment was {before:?} and became {after:?}");
        }
    }

    pub(super) fn assert_payments_match_tickets(&self) {
        for row in &self.rows {
            let seats = row.tickets.iter().filter(|(.., admits)| *admits).count();
            assert_eq!(row.taken - row.given_back, 100.0 * seats as f64, "{row:?}");
        }
    }
}

/// Whether a known transition leads from `before` to `after`: one step, or the two steps of a payment.
fn leads(before: ReservationState, after: ReservationState, in_time: bool) -> bool {
    let steps = || ReservationStep::ALL.into_iter();
    before == after
        || steps().any(|step| match before.after(step, in_time) {
            Transition::Changed(ReservationState::Confirming) if after != ReservationState::Confirming => {
                steps().any(|step| ReservationState::Confirming.after(step, in_time) == Transition::Changed(after))
            }
            transition => transition == Transition::Changed(after),
        })
}

/// The status of a success, or the code of a refusal.
async fn outcome_of(response: Response) -> Option<String> {
    let status = response.status();
    let body: Value = response.json().await.unwrap();
    Some(if status.is_success() { status.as_u16().to_string() } else { text_of(&body, "code") })
}
