//! The state machines of a seat, a reservation and a payment: one table of transitions each.
//!
//! ```text
//! seat          available ──reserve(r)──▶ reserved(r) ──confirm(r)──▶ sold(r)
//!                   ▲                         │                         │
//!                   ├───────release(r)────────┤                         │
//!                   └───────refund(r)─────────┴─────────────────────────┘
//!               available ──▶ blocked             the session is cancelled
//!
//! reservation   active ──start payment──▶ confirming ──pay──▶ confirmed ──refund the last ticket──▶ refunded
//!               active ◀──keep waiting─── confirming
//!               active ───pay, by a later notification──────▶ confirmed
//!               active ──▶ expired                it is not paid in time
//!               active | confirming ──▶ expired   it is paid and its seats are lost
//!               active ──▶ cancelled              by the customer in time, or with its session
//!
//! payment       pending ──▶ processing                            the provider will report later
//!               pending | processing ──▶ captured                 the tickets are issued
//!               pending | processing ──▶ declined                 nothing is or will be taken
//!               pending | processing | declined ──▶ voided        no ticket can be issued, so the money is returned
//! ```
//!
//! The tables here decide nothing: each change is one conditional SQL statement on the row, and the statement decides.
//! The statements must agree with these tables. The services use the tables to choose an answer when a statement
//! changed no row, and the tests of both services compare random sequences of changes with them.

use serde::{Deserialize, Serialize};
use sqlx::FromRow;

use crate::ids::ReservationId;
use crate::seat::SeatStatus;

/// The result of a step in a given state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition<State> {
    /// The step changes the state to this one.
    Changed(State),
    /// The step has already had its effect, so a repeat succeeds and changes nothing.
    Unchanged,
    /// The state does not allow the step and stays as it is.
    Refused,
}

impl<State> Transition<State> {
    /// The state after the step, given the state before.
    pub fn from(self, before: State) -> State {
        match self {
            Self::Changed(after) => after,
            Self::Unchanged | Self::Refused => before,
        }
    }
}

/// The state of a session seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromRow)]
pub struct Seat {
    /// Whether the seat is available, reserved, sold or blocked.
    pub status: SeatStatus,
    /// The reservation that holds or owns the seat; `None` unless the seat is `reserved` or `sold`.
    pub reservation_id: Option<ReservationId>,
}

/// What a reservation may do with a seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SeatStep {
    /// Hold an available seat.
    Reserve,
    /// Buy a seat that it holds.
    Confirm,
    /// Free a seat that it holds.
    Release,
    /// Free a seat that it owns, or still holds because the message about the confirmation has not arrived.
    Refund,
}

impl Seat {
    /// A seat that no reservation holds or owns.
    pub const AVAILABLE: Self = Self { status: SeatStatus::Available, reservation_id: None };

    /// What happens to the seat when reservation `by` takes `step`. An overdue hold changes nothing: no clock frees a
    /// seat.
    #[must_use]
    pub fn after(self, step: SeatStep, by: ReservationId) -> Transition<Self> {
        use SeatStatus::{Available, Blocked, Reserved, Sold};
        use SeatStep::{Confirm, Refund, Release, Reserve};
        let is_own = self.reservation_id == Some(by);
        match (self.status, step) {
            (Available, Reserve) => Transition::Changed(Self { status: Reserved, reservation_id: Some(by) }),
            (Reserved | Sold, Reserve) if is_own => Transition::Unchanged,
            (Reserved, Confirm) if is_own => Transition::Changed(Self { status: Sold, ..self }),
            (Sold, Confirm) if is_own => Transition::Unchanged,
            (Reserved, Release) | (Reserved | Sold, Refund) if is_own => Transition::Changed(Self::AVAILABLE),
            // The reservation no longer has the seat, whoever has it now.
            (Available | Blocked, Release | Refund) => Transition::Unchanged,
            (Reserved | Sold, Release | Refund) if !is_own => Transition::Unchanged,
            (Reserved | Sold | Blocked, Reserve) | (_, Confirm) | (Reserved | Sold, Release | Refund) => {
                Transition::Refused
            }
        }
    }

    /// The seat after the cancellation of its session: an available seat is blocked, others stay as they are.
    #[must_use]
    pub fn in_cancelled_session(self) -> Self {
        match self.status {
            SeatStatus::Available => Self { status: SeatStatus::Blocked, ..self },
            SeatStatus::Reserved | SeatStatus::Sold | SeatStatus::Blocked => self,
        }
    }
}

/// The state of a reservation as the database stores it. Clients see `confirming` as `active`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum ReservationState {
    /// The seats are held, and the customer may pay until the reservation expires.
    Active,
    /// A charge is with the payment provider. Until it answers, nothing else may end the reservation.
    Confirming,
    /// The reservation is paid, and its tickets are issued.
    Confirmed,
    /// The reservation was not paid in time, or its seats were lost before the payment arrived.
    Expired,
    /// The customer or the session's organizer cancelled it.
    Cancelled,
    /// All tickets of the reservation were refunded.
    Refunded,
}

/// What may be done with a reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReservationStep {
    /// Ask the payment provider to charge the customer.
    StartPayment,
    /// Release the lease, because the provider declined or will answer later.
    KeepWaiting,
    /// Issue the tickets, because the provider has the money. This is allowed even after the reservation's time.
    Pay,
    /// End a reservation that was not paid in time.
    Expire,
    /// End a reservation whose seats are lost, although the provider has the money.
    LoseSeats,
    /// Cancel for the customer, which is allowed only before the reservation expires.
    Cancel,
    /// Cancel together with the session, before or after the reservation's time.
    CancelWithSession,
    /// Refund the last ticket of the reservation.
    RefundLast,
}

impl ReservationStep {
    /// Every step, for tests that try all of them.
    pub const ALL: [Self; 8] = [
        Self::StartPayment,
        Self::KeepWaiting,
        Self::Pay,
        Self::Expire,
        Self::LoseSeats,
        Self::Cancel,
        Self::CancelWithSession,
        Self::RefundLast,
    ];
}

impl ReservationState {
    /// Every state, for tests that try all of them.
    pub const ALL: [Self; 6] =
        [Self::Active, Self::Confirming, Self::Confirmed, Self::Expired, Self::Cancelled, Self::Refunded];

    /// What `step` does to the reservation. `in_time` is read from the clock of the Booking Service's database.
    #[must_use]
    pub const fn after(self, step: ReservationStep, in_time: bool) -> Transition<Self> {
        use ReservationStep::{
            Cancel, CancelWithSession, Expire, KeepWaiting, LoseSeats, Pay, RefundLast, StartPayment,
        };
        match (self, step) {
            (Self::Active, StartPayment) if in_time => Transition::Changed(Self::Confirming),
            (Self::Confirming, KeepWaiting) => Transition::Changed(Self::Active),
            (Self::Active | Self::Confirming, Pay) => Transition::Changed(Self::Confirmed),
            (Self::Active, Expire) if !in_time => Transition::Changed(Self::Expired),
            (Self::Active | Self::Confirming, LoseSeats) => Transition::Changed(Self::Expired),
            (Self::Active, Cancel) if in_time => Transition::Changed(Self::Cancelled),
            (Self::Active, CancelWithSession) => Transition::Changed(Self::Cancelled),
            (Self::Confirmed, RefundLast) => Transition::Changed(Self::Refunded),
            (Self::Confirmed, StartPayment | Pay)
            | (Self::Expired, Expire | LoseSeats)
            | (Self::Cancelled, CancelWithSession)
            | (Self::Refunded, RefundLast) => Transition::Unchanged,
            _ => Transition::Refused,
        }
    }

    /// Whether the reservation may still become `confirmed`; its seats stay held until then.
    #[must_use]
    pub const fn is_under_way(self) -> bool {
        matches!(self, Self::Active | Self::Confirming)
    }
}

/// The state of one attempt to charge, as the database stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum PaymentState {
    /// The service has called or is about to call the provider and does not know the answer. Its reservation is
    /// `confirming`.
    Pending,
    /// The provider accepted the charge and will report the outcome. The reservation is `active`, or has ended since.
    Processing,
    /// The provider took the money, and the reservation is `confirmed`.
    Captured,
    /// The provider took no money and will take none.
    Declined,
    /// The provider took the money, but no ticket could be issued. The money is returned.
    Voided,
}

/// What the provider may report about a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PaymentStep {
    /// The provider accepted the charge and will report the outcome.
    TakeOn,
    /// The provider has the money, and the tickets are issued.
    Capture,
    /// The provider has no money and will take none.
    Decline,
    /// The provider has the money, but no ticket can be issued for it.
    Void,
}

impl PaymentStep {
    /// Every step, for tests that try all of them.
    pub const ALL: [Self; 4] = [Self::TakeOn, Self::Capture, Self::Decline, Self::Void];
}

impl PaymentState {
    /// What `step` does to the payment.
    #[must_use]
    pub const fn after(self, step: PaymentStep) -> Transition<Self> {
        use PaymentStep::{Capture, Decline, TakeOn, Void};
        match (self, step) {
            (Self::Pending, TakeOn) => Transition::Changed(Self::Processing),
            (Self::Pending | Self::Processing, Capture) => Transition::Changed(Self::Captured),
            (Self::Pending | Self::Processing, Decline) => Transition::Changed(Self::Declined),
            // A provider may decline and take the money anyway. The later report counts, so the money is returned.
            (Self::Pending | Self::Processing | Self::Declined, Void) => Transition::Changed(Self::Voided),
            (Self::Processing, TakeOn)
            | (Self::Captured, Capture)
            | (Self::Declined, Decline)
            | (Self::Voided, Void) => Transition::Unchanged,
            _ => Transition::Refused,
        }
    }

    /// Whether this is, or may become, the payment of the reservation. A reservation has at most one such payment.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(self, Self::Pending | Self::Processing | Self::Captured)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngSeed};
    use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};

    use super::*;

    #[test]
    fn no_step_changes_a_seat_of_another_reservation() {
        let (owner, other) = (ReservationId::new(), ReservationId::new());
        for status in [SeatStatus::Reserved, SeatStatus::Sold] {
            let seat = Seat { status, reservation_id: Some(owner) };
            for step in [SeatStep::Reserve, SeatStep::Confirm, SeatStep::Release, SeatStep::Refund] {
                assert_eq!(seat.after(step, other).from(seat), seat, "{status:?} {step:?}");
            }
        }
    }

    #[test]
    fn only_a_refund_frees_a_sold_seat() {
        let owner = ReservationId::new();
        let sold = Seat { status: SeatStatus::Sold, reservation_id: Some(owner) };
        for step in [SeatStep::Reserve, SeatStep::Confirm, SeatStep::Release] {
            assert_eq!(sold.after(step, owner).from(sold), sold, "{step:?}");
        }
        assert_eq!(sold.after(SeatStep::Refund, owner), Transition::Changed(Seat::AVAILABLE));
    }

    #[test]
    fn an_ended_reservation_stays_so_and_only_refunds_end_a_paid_one() {
        for state in ReservationState::ALL.into_iter().filter(|state| !state.is_under_way()) {
            for (step, in_time) in ReservationStep::ALL.into_iter().flat_map(|step| [(step, true), (step, false)]) {
                let may_go = (state, step) == (ReservationState::Confirmed, ReservationStep::RefundLast);
                assert_eq!(state.after(step, in_time).from(state) != state, may_go, "{state:?} {step:?} {in_time}");
            }
        }
    }

    #[test]
    fn a_settled_charge_changes_only_when_money_follows_a_decline() {
        for state in [PaymentState::Captured, PaymentState::Declined, PaymentState::Voided] {
            for step in PaymentStep::ALL {
                let may_go = (state, step) == (PaymentState::Declined, PaymentStep::Void);
                assert_eq!(state.after(step).from(state) != state, may_go, "{state:?} {step:?}");
            }
        }
    }

    /// A reservation and its charges, described without the tables.
    #[derive(Debug, Clone, Default)]
    struct Story {
        time_is_over: bool,
        provider_is_asked: bool,
        provider_works_on_it: bool,
        is_paid: bool,
        all_tickets_are_back: bool,
        ended: Option<ReservationState>,
        charges_given_back: usize,
    }

    #[derive(Debug, Clone, Copy)]
    enum Act {
        TimeGoesBy,
        AskForMoney,
        ProviderAnswers(PaymentStep),
        ProviderTellsLater(PaymentStep),
        Step(ReservationStep),
    }

    impl Story {
        fn is_open(&self) -> bool {
            !self.is_paid && self.ended.is_none()
        }

        fn state(&self) -> ReservationState {
            match self.ended {
                Some(end) => end,
                None if self.all_tickets_are_back => ReservationState::Refunded,
                None if self.is_paid => ReservationState::Confirmed,
                None if self.provider_is_asked => ReservationState::Confirming,
                None => ReservationState::Active,
            }
        }

        /// The provider reports that it has the money.
        fn money_is_there(&mut self, buys_seats: bool) {
            if self.is_open() && buys_seats {
                self.is_paid = true;
            } else {
                self.charges_given_back += 1;
                self.ended = self.ended.or(Some(ReservationState::Expired));
            }
        }
    }

    impl ReferenceStateMachine for Story {
        type State = Self;
        type Transition = Act;

        fn init_state() -> BoxedStrategy<Self> {
            Just(Self::default()).boxed()
        }

        fn transitions(_: &Self) -> BoxedStrategy<Act> {
            use PaymentStep::{Capture, Decline, TakeOn, Void};
            use ReservationStep::{Cancel, CancelWithSession, Expire, RefundLast};
            prop_oneof![
                1 => Just(Act::TimeGoesBy),
                6 => Just(Act::AskForMoney),
                6 => prop::sample::select(vec![Capture, Decline, TakeOn, TakeOn, Void]).prop_map(Act::ProviderAnswers),
                4 => prop::sample::select(vec![Capture, Decline, Void]).prop_map(Act::ProviderTellsLater),
                3 => prop::sample::select(vec![Expire, Cancel, CancelWithSession, RefundLast]).prop_map(Act::Step),
            ]
            .boxed()
        }

        fn apply(mut story: Self, act: &Act) -> Self {
            let may_end = story.is_open() && !story.provider_is_asked;
            match *act {
                Act::TimeGoesBy => story.time_is_over = true,
                Act::AskForMoney if may_end && !story.time_is_over && !story.provider_works_on_it => {
                    story.provider_is_asked = true;
                }
                Act::ProviderAnswers(said) if story.provider_is_asked => {
                    story.provider_is_asked = false;
                    match said {
                        PaymentStep::TakeOn => story.provider_works_on_it = true,
                        PaymentStep::Decline => {}
                        PaymentStep::Capture | PaymentStep::Void => story.money_is_there(said == PaymentStep::Capture),
                    }
                }
                Act::ProviderTellsLater(said) if story.provider_works_on_it => {
                    story.provider_works_on_it = false;
                    if said != PaymentStep::Decline {
                        story.money_is_there(said == PaymentStep::Capture);
                    }
                }
                Act::Step(ReservationStep::Expire) if may_end && story.time_is_over => {
                    story.ended = Some(ReservationState::Expired);
                }
                Act::Step(ReservationStep::Cancel) if may_end && !story.time_is_over => {
                    story.ended = Some(ReservationState::Cancelled);
                }
                Act::Step(ReservationStep::CancelWithSession) if may_end => {
                    story.ended = Some(ReservationState::Cancelled);
                }
                Act::Step(ReservationStep::RefundLast) if story.is_paid => story.all_tickets_are_back = true,
                _ => {}
            }
            story
        }
    }

    /// The same reservation and charges, kept by the tables.
    struct Tables {
        reservation: ReservationState,
        payments: Vec<PaymentState>,
        in_time: bool,
    }

    impl Tables {
        /// Takes `step`. Returns whether it changed the reservation.
        fn step(&mut self, step: ReservationStep) -> bool {
            let after = self.reservation.after(step, self.in_time);
            self.reservation = after.from(self.reservation);
            matches!(after, Transition::Changed(_))
        }

        fn pay(&mut self, step: PaymentStep) {
            let payment = self.payments.last_mut().unwrap();
            let after = payment.after(step);
            assert!(matches!(after, Transition::Changed(_)), "{payment:?} {step:?}");
            *payment = after.from(*payment);
        }

        /// Applies the provider's report: the outcome of a charge, or that the outcome follows later.
        fn hear(&mut self, said: PaymentStep) {
            let step = match said {
                PaymentStep::TakeOn | PaymentStep::Decline => ReservationStep::KeepWaiting,
                PaymentStep::Capture => ReservationStep::Pay,
                PaymentStep::Void => ReservationStep::LoseSeats,
            };
            let is_taken = self.step(step);
            // Money for a reservation that has ended is returned.
            self.pay(if said == PaymentStep::Capture && !is_taken { PaymentStep::Void } else { said });
        }
    }

    impl StateMachineTest for Tables {
        type SystemUnderTest = Self;
        type Reference = Story;

        fn init_test(_: &Story) -> Self {
            Self { reservation: ReservationState::Active, payments: Vec::new(), in_time: true }
        }

        fn apply(mut tables: Self, _: &Story, act: Act) -> Self {
            let last = tables.payments.last().copied();
            match act {
                Act::TimeGoesBy => tables.in_time = false,
                Act::AskForMoney => {
                    if !last.is_some_and(PaymentState::is_live) && tables.step(ReservationStep::StartPayment) {
                        tables.payments.push(PaymentState::Pending);
                    }
                }
                Act::ProviderAnswers(said) if last == Some(PaymentState::Pending) => tables.hear(said),
                Act::ProviderTellsLater(said) if last == Some(PaymentState::Processing) => tables.hear(said),
                Act::ProviderAnswers(_) | Act::ProviderTellsLater(_) => {}
                Act::Step(step) => drop(tables.step(step)),
            }
            tables
        }

        fn check_invariants(tables: &Self, story: &Story) {
            assert_eq!(tables.reservation, story.state());
            let count = |state| tables.payments.iter().filter(|payment| **payment == state).count();
            assert_eq!(count(PaymentState::Captured), usize::from(story.is_paid), "charged once or not at all");
            assert_eq!(count(PaymentState::Voided), story.charges_given_back);
            assert_eq!(count(PaymentState::Pending), usize::from(story.provider_is_asked));
            assert_eq!(count(PaymentState::Processing), usize::from(story.provider_works_on_it));
            assert!(tables.payments.iter().filter(|payment| payment.is_live()).count() <= 1);
        }
    }

    /// Generates the same sequences in every run, unless `PROPTEST_RNG_SEED` is set.
    fn config() -> Config {
        let environment = Config { failure_persistence: None, ..Config::default() };
        match environment.rng_seed {
            RngSeed::Random => Config { rng_seed: RngSeed::Fixed(1), ..environment },
            RngSeed::Fixed(_) => environment,
        }
    }

    prop_state_machine! {
        #![proptest_config(config())]

        #[test]
        fn the_tables_of_reservation_and_payment_agree_with_the_story(sequential 1..60 => Tables);
    }
}
