//! Random sequences of everything that customers, time, the payment provider and the worker may do to a few
//! reservations of the same few seats. Each sequence runs in the system and in a model of it. After each act, the
//! answer, the rows, the money and the seats must match the model, and every row's change must be a known transition.
//! After each sequence, the audit must be clean.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::{Select, select, subsequence};
use proptest::strategy::Union;
use proptest_state_machine::ReferenceStateMachine;
use service_kit::testing::scale;
use service_kit::testing::sequences::for_all_sequences;
use shared_contracts::seat::SeatStatus;
use shared_contracts::transitions::{PaymentState, ReservationState};
use tokio::runtime::Runtime;

use crate::support::System;
use case::Case;

mod case;

const CASES: usize = 24;
const SEATS: usize = 3;
/// Rare events that must occur in a default run.
const RARE: [&str; 5] = [
    "a ticket was refunded twice",
    "an overdue hold was taken over",
    "a late payment bought the seats",
    "a late payment was refunded",
    "a payment came after the time and before the expiry",
];
/// How many reservations a sequence may make. Late payments may add more.
const RESERVATIONS_MAX: usize = 8;

/// One act of a sequence. It names a reservation by its index, in the order in which they were made.
#[derive(Debug, Clone)]
enum Act {
    Reserve(Vec<usize>),
    Confirm(usize, Means),
    Cancel(usize),
    /// The customer refunds the ticket of the reservation's nth seat.
    Refund(usize, usize),
    /// The reservation's time passes.
    RunOut(usize),
    /// The worker ends all reservations that are due.
    Expire,
    /// The worker compares overdue holds with their reservations.
    Reconcile,
    /// The lease of the reservation's payment runs out, and the worker asks the provider.
    EndLease(usize),
    /// The provider decides on the reservation's last charge, if that is undecided, and sends this many notices.
    Decide {
        order: usize,
        captured: bool,
        notices: usize,
    },
    /// The worker asks about all charges that the provider is processing.
    FollowUp,
    /// The reservation's events are published again.
    Replay(usize),
}

/// What the customer pays with. It decides how the mock provider behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Means {
    Pays,
    Declined,
    ChargedWithoutAnswer,
    LostOnTheWay,
    Asynchronous,
}

/// The state of a charge at the provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtProvider {
    NotReceived,
    Processing,
    Captured,
    Declined,
}

#[derive(Debug, Clone, Copy)]
struct Charge {
    /// Counts all charges in the order in which they were made.
    number: usize,
    state: PaymentState,
    at_provider: AtProvider,
}

#[derive(Debug, Clone)]
struct Order {
    seats: Vec<usize>,
    state: ReservationState,
    time_is_over: bool,
    charges: Vec<Charge>,
    /// The seats whose tickets were refunded.
    refunded: BTreeSet<usize>,
}

/// All reservations. The owner of a seat follows from them.
#[derive(Debug, Clone, Default)]
struct Model {
    orders: Vec<Order>,
    charges: usize,
    /// The expected answer to the last act.
    answer: Option<&'static str>,
    /// The events of [`RARE`] that have occurred.
    happened: BTreeSet<&'static str>,
}

impl Order {
    fn new(seats: Vec<usize>) -> Self {
        let (charges, refunded) = (Vec::new(), BTreeSet::new());
        Self { seats, state: ReservationState::Active, time_is_over: false, charges, refunded }
    }

    fn has(&self, seat: usize) -> bool {
        let may_have = self.is_open() || self.state == ReservationState::Confirmed;
        may_have && self.seats.contains(&seat) && !self.refunded.contains(&seat)
    }

    /// The nth seat of the reservation.
    fn seat(&self, nth: usize) -> usize {
        self.seats[nth % self.seats.len()]
    }

    fn is_open(&self) -> bool {
        [ReservationState::Active, ReservationState::Confirming].contains(&self.state)
    }

    fn is_due(&self) -> bool {
        self.state == ReservationState::Active && self.time_is_over
    }

    fn is_processing(&self) -> bool {
        self.charges.iter().any(|charge| charge.state == PaymentState::Processing)
    }

    /// The error code of a payment or a cancellation that is refused in this state.
    fn refusal(&self) -> &'static str {
        match self.state {
            ReservationState::Active | ReservationState::Expired => "reservation_expired",
            ReservationState::Confirming => "confirmation_in_progress",
            ReservationState::Confirmed => "reservation_confirmed",
            ReservationState::Cancelled => "reservation_cancelled",
            ReservationState::Refunded => "reservation_refunded",
        }
    }

    fn tickets(&self) -> Vec<usize> {
        let is_paid = [ReservationState::Confirmed, ReservationState::Refunded].contains(&self.state);
        if is_paid { self.seats.clone() } else { Vec::new() }
    }

    /// What the provider has captured and refunded, in seats.
    fn money(&self) -> (usize, usize) {
        let of = |is_meant: fn(&Charge) -> bool| self.seats.len() * self.charges.iter().filter(|c| is_meant(c)).count();
        let voided = of(|charge| charge.state == PaymentState::Voided);
        (of(|charge| charge.at_provider == AtProvider::Captured), voided + self.refunded.len())
    }
}

impl Model {
    fn owner(&self, seat: usize) -> Option<usize> {
        self.orders.iter().position(|order| order.has(seat))
    }

    /// Each seat's status and owner, once all messages have been applied.
    fn seats(&self) -> Vec<(SeatStatus, Option<usize>)> {
        let status = |owner: usize| match self.orders[owner].state {
            ReservationState::Confirmed => SeatStatus::Sold,
            _ => SeatStatus::Reserved,
        };
        (0..SEATS)
            .map(|seat| self.owner(seat))
            .map(|owner| (owner.map_or(SeatStatus::Available, status), owner))
            .collect()
    }

    fn owners(&self, seats: &[usize]) -> BTreeSet<usize> {
        seats.iter().filter_map(|seat| self.owner(*seat)).collect()
    }

    fn expire(&mut self, is_meant: impl Fn(usize) -> bool) {
        for (_, order) in self.orders.iter_mut().enumerate().filter(|(index, order)| is_meant(*index) && order.is_due())
        {
            order.state = ReservationState::Expired;
        }
    }

    fn reserve(&mut self, seats: &[usize]) -> &'static str {
        let owners = self.owners(seats);
        if !owners.iter().all(|owner| self.orders[*owner].is_due()) {
            return "seat_unavailable";
        }
        if !owners.is_empty() {
            self.happened.insert("an overdue hold was taken over");
        }
        self.expire(|index| owners.contains(&index));
        self.orders.push(Order::new(seats.to_vec()));
        "201"
    }

    fn confirm(&mut self, index: usize, means: Means) -> &'static str {
        let order = &mut self.orders[index];
        match order.state {
            ReservationState::Confirmed => return "200",
            ReservationState::Active if order.is_processing() => return "202",
            ReservationState::Active if !order.time_is_over => {}
            _ => return order.refusal(),
        }
        let (answer, order_state, state, at_provider) = match means {
            Means::Pays => ("200", ReservationState::Confirmed, PaymentState::Captured, AtProvider::Captured),
            Means::Declined => ("payment_declined", order.state, PaymentState::Declined, AtProvider::Declined),
            Means::ChargedWithoutAnswer => {
                ("payment_unavailable", ReservationState::Confirming, PaymentState::Pending, AtProvider::Captured)
            }
            Means::LostOnTheWay => {
                ("payment_unavailable", ReservationState::Confirming, PaymentState::Pending, AtProvider::NotReceived)
            }
            Means::Asynchronous => ("202", order.state, PaymentState::Processing, AtProvider::Processing),
        };
        self.charges += 1;
        order.state = order_state;
        order.charges.push(Charge { number: self.charges, state, at_provider });
        answer
    }

    fn cancel(&mut self, index: usize) -> &'static str {
        let order = &mut self.orders[index];
        if order.state != ReservationState::Active || order.time_is_over {
            return order.refusal();
        }
        order.state = ReservationState::Cancelled;
        "200"
    }

    fn refund(&mut self, index: usize, seat: usize) -> &'static str {
        let order = &mut self.orders[index];
        let seat = order.seat(seat);
        if !order.refunded.insert(seat) {
            self.happened.insert("a ticket was refunded twice");
        }
        if order.refunded.len() == order.seats.len() {
            order.state = ReservationState::Refunded;
        }
        "200"
    }

    fn end_lease(&mut self, index: usize) {
        let order = &mut self.orders[index];
        let charge = order.charges.last_mut().unwrap();
        if charge.at_provider == AtProvider::Captured {
            (order.state, charge.state) = (ReservationState::Confirmed, PaymentState::Captured);
        } else {
            (order.state, charge.state) = (ReservationState::Active, PaymentState::Declined);
            charge.at_provider = AtProvider::Declined;
        }
    }

    fn decide(&mut self, index: usize, captured: bool, notices: usize) {
        let charge = self.orders[index].charges.last_mut().unwrap();
        if charge.at_provider == AtProvider::Processing {
            charge.at_provider = if captured { AtProvider::Captured } else { AtProvider::Declined };
        }
        if notices > 0 {
            self.follow_up(index);
        }
    }

    /// What follows when the provider is asked about the reservation's last charge.
    fn follow_up(&mut self, index: usize) {
        let order = &mut self.orders[index];
        let is_open = order.is_open();
        let charge = order.charges.last_mut().unwrap();
        match (charge.state, charge.at_provider) {
            (PaymentState::Pending | PaymentState::Processing, AtProvider::Captured) if is_open => {
                charge.state = PaymentState::Captured;
                self.orders[index].state = ReservationState::Confirmed;
                if self.orders[index].time_is_over {
                    self.happened.insert("a payment came after the time and before the expiry");
                }
            }
            (PaymentState::Processing, AtProvider::Captured) => self.late_payment(index),
            (PaymentState::Processing, AtProvider::Declined) => charge.state = PaymentState::Declined,
            (PaymentState::Processing, _) if !is_open => {
                (charge.state, charge.at_provider) = (PaymentState::Declined, AtProvider::Declined);
            }
            _ => {}
        }
    }

    fn late_payment(&mut self, index: usize) {
        let seats = self.orders[index].seats.clone();
        let owners = self.owners(&seats);
        let is_expired = self.orders[index].state == ReservationState::Expired;
        // The payment takes a seat over from an overdue reservation, but not from one whose payment is in progress.
        let may_ask = is_expired && owners.iter().all(|o| self.orders[*o].is_open() && self.orders[*o].time_is_over);
        if may_ask {
            self.expire(|index| owners.contains(&index));
        }
        let mut charge = self.orders[index].charges.pop().unwrap();
        if may_ask && self.owners(&seats).is_empty() {
            charge.state = PaymentState::Captured;
            let state = ReservationState::Confirmed;
            self.orders.push(Order { state, charges: vec![charge], ..Order::new(seats) });
            self.happened.insert("a late payment bought the seats");
        } else {
            charge.state = PaymentState::Voided;
            self.orders[index].charges.push(charge);
            self.happened.insert("a late payment was refunded");
        }
    }

    fn follow_up_all(&mut self) {
        let processing = |charge: &Charge| charge.state == PaymentState::Processing;
        let due = self.orders.iter().enumerate().flat_map(|(index, order)| {
            order.charges.iter().filter(|charge| processing(charge)).map(move |charge| (charge.number, index))
        });
        let due: BTreeMap<usize, usize> = due.collect();
        due.into_values().for_each(|index| self.follow_up(index));
    }
}

impl ReferenceStateMachine for Model {
    type State = Self;
    type Transition = Act;

    fn init_state() -> BoxedStrategy<Self> {
        Just(Self::default()).boxed()
    }

    fn transitions(model: &Self) -> BoxedStrategy<Act> {
        let seats = || subsequence((0..SEATS).collect::<Vec<_>>(), 1..=2).prop_shuffle();
        let means = select(vec![
            Means::Pays,
            Means::Declined,
            Means::ChargedWithoutAnswer,
            Means::LostOnTheWay,
            Means::Asynchronous,
            Means::Asynchronous,
            Means::Asynchronous,
        ]);
        let mut acts = vec![
            (6, seats().prop_map(Act::Reserve).boxed()),
            (if model.orders.iter().any(Order::is_due) { 6 } else { 1 }, Just(Act::Expire).boxed()),
            (1, Just(Act::Reconcile).boxed()),
            (1, Just(Act::FollowUp).boxed()),
        ];
        // Mostly reservations for which the act can succeed, and sometimes others, which must be refused.
        let mut add = |weight: u32, act: BoxedStrategy<Act>| acts.push((weight, act));
        let orders = |is_meant: fn(&Order) -> bool| {
            let meant: Vec<usize> = (0..model.orders.len()).filter(|index| is_meant(&model.orders[*index])).collect();
            (!meant.is_empty()).then(|| select(meant))
        };
        if let Some(order) = orders(|_| true) {
            add(1, (order.clone(), means.clone()).prop_map(|(order, means)| Act::Confirm(order, means)).boxed());
            add(1, order.clone().prop_map(Act::Cancel).boxed());
            add(1, order.prop_map(Act::Replay).boxed());
        }
        if let Some(order) = orders(Order::is_open) {
            add(6, (order.clone(), means).prop_map(|(order, means)| Act::Confirm(order, means)).boxed());
            add(1, order.clone().prop_map(Act::Cancel).boxed());
            add(4, order.prop_map(Act::RunOut).boxed());
        }
        if let Some(order) = orders(|order| order.state == ReservationState::Confirming) {
            add(3, order.prop_map(Act::EndLease).boxed());
        }
        if let Some(order) = orders(|order| !order.tickets().is_empty()) {
            add(3, (order, 0..SEATS).prop_map(|(order, nth)| Act::Refund(order, nth)).boxed());
        }
        let decide = |order: Select<usize>| {
            (order, prop::bool::weighted(0.8), 0..=2_usize)
                .prop_map(|(order, captured, notices)| Act::Decide { order, captured, notices })
                .boxed()
        };
        if let Some(order) = orders(|order| !order.charges.is_empty()) {
            add(1, decide(order));
        }
        if let Some(order) = orders(Order::is_processing) {
            add(2, decide(order));
        }
        // Late payments, before or after the expiry, go wrong most easily, so they get a high weight.
        if let Some(order) = orders(|order| order.is_processing() && order.time_is_over) {
            add(6, decide(order));
        }
        Union::new_weighted(acts).boxed()
    }

    fn preconditions(model: &Self, act: &Act) -> bool {
        let order = |index: &usize| model.orders.get(*index);
        match act {
            Act::Reserve(_) => model.orders.len() < RESERVATIONS_MAX,
            Act::Expire | Act::Reconcile | Act::FollowUp => true,
            Act::Confirm(index, _) | Act::Cancel(index) | Act::Replay(index) => order(index).is_some(),
            Act::Refund(index, _) => order(index).is_some_and(|order| !order.tickets().is_empty()),
            Act::RunOut(index) => order(index).is_some_and(Order::is_open),
            Act::EndLease(index) => order(index).is_some_and(|order| order.state == ReservationState::Confirming),
            Act::Decide { order: index, .. } => order(index).is_some_and(|order| !order.charges.is_empty()),
        }
    }

    fn apply(mut model: Self, act: &Act) -> Self {
        model.answer = None;
        match act {
            Act::Reserve(seats) => model.answer = Some(model.reserve(seats)),
            Act::Confirm(order, means) => model.answer = Some(model.confirm(*order, *means)),
            Act::Cancel(order) => model.answer = Some(model.cancel(*order)),
            Act::Refund(order, seat) => model.answer = Some(model.refund(*order, *seat)),
            Act::RunOut(order) => model.orders[*order].time_is_over = true,
            Act::Expire | Act::Reconcile => model.expire(|_| true),
            Act::EndLease(order) => model.end_lease(*order),
            Act::Decide { order, captured, notices } => model.decide(*order, *captured, *notices),
            Act::FollowUp => model.follow_up_all(),
            Act::Replay(_) => {}
        }
        model
    }
}

#[test]
fn random_sequences_of_acts_have_the_same_results_as_the_model() {
    let runtime = Runtime::new().unwrap();
    let system = runtime.block_on(System::start());
    let happened = RefCell::new(BTreeMap::<&str, usize>::new());
    for_all_sequences::<Model>(20..40, CASES, |sequence| {
        runtime.block_on(async {
            let mut case = Case::new(&system).await;
            let mut model = Model::default();
            for (act, after) in sequence {
                model = after;
                case.play_and_compare(&act, &model).await;
            }
            // Ends every reservation that is still open.
            let open: Vec<usize> = (0..model.orders.len()).filter(|index| model.orders[*index].is_open()).collect();
            let ends = open.iter().map(|index| Act::RunOut(*index));
            let leases = open.iter().filter(|index| model.orders[**index].state == ReservationState::Confirming);
            let ends = ends.chain(leases.map(|index| Act::EndLease(*index))).chain([Act::Expire, Act::FollowUp]);
            for act in ends.collect::<Vec<_>>() {
                model = Model::apply(model, &act);
                case.play_and_compare(&act, &model).await;
            }
            case.assert_payments_match_tickets();
            system.settle().await;
            for thing in model.happened {
                *happened.borrow_mut().entry(thing).or_default() += 1;
            }
        });
    });
    let happened = happened.into_inner();
    println!("{happened:#?}");
    // With another seed, or fewer cases, one of the rare events may be missing.
    if scale("PROPTEST_CASES", CASES) >= CASES && scale("PROPTEST_RNG_SEED", 1) == 1 {
        assert_eq!(happened.len(), RARE.len(), "only {happened:?} of {RARE:?}: the test has not tested the rest");
    }
    runtime.block_on(system.finish());
}
