//! `journey`: each buyer loads the seat map, reserves, pays and reads the ticket. The whole journey is timed from the
//! moment when the buyer was due, and each step from its beginning.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use hyper::body::Bytes;
use hyper::header::HeaderValue;
use serde::Deserialize;
use uuid::Uuid;

use crate::arrivals::{Client, Operation};
use crate::bench::Bench;
use crate::http::{Body, Call, Outcome};
use crate::measure::{Recorder, Step};
use crate::measured::{Measured, Promise};
use crate::sale;
use crate::scenarios::reserve::RESERVE;
use crate::scenarios::seat_map::BuyerArguments;

const JOURNEY: Step = Step { name: "journey", good: &[200], refused: &[] };
const SEAT_MAP: Step = Step { name: "seat map", good: &[200], refused: &[] };
const CONFIRM: Step = Step { name: "confirm", good: &[200], refused: &[] };
const TICKET: Step = Step { name: "ticket", good: &[200], refused: &[] };
/// How many journeys a closed loop is expected to need.
const CLOSED_MAX: usize = 10_000;

struct Wanted {
    seat: Uuid,
    seat_map: Rc<str>,
    reservation: Bytes,
}

struct Journey {
    wanted: Vec<Wanted>,
    next: Cell<usize>,
    encoding: HeaderValue,
    right: Cell<u64>,
    /// Buyers that have paid and do not have exactly one ticket, for their seat.
    wrong: RefCell<Vec<Uuid>>,
}

#[derive(Deserialize)]
struct Made {
    id: Uuid,
}

#[derive(Deserialize)]
struct Ticket {
    session_seat_id: Uuid,
}

impl Operation for Journey {
    async fn run(&self, client: &mut Client, due: Instant, recorder: &Recorder) -> bool {
        let index = self.next.get();
        let Some(wanted) = self.wanted.get(index) else { return false };
        self.next.set(index + 1);
        let outcome = self.run_steps(client, wanted, recorder).await.unwrap_or_else(|failed| failed);
        recorder.count(JOURNEY, outcome, due);
        true
    }
}

impl Journey {
    /// Runs the steps. Returns the outcome of the last step, or of the first one that failed.
    async fn run_steps(&self, client: &mut Client, wanted: &Wanted, recorder: &Recorder) -> Result<Outcome, Outcome> {
        let user = Client::new_user();
        let done = |step: Step, outcome: Outcome, begun: Instant| {
            recorder.count(step, outcome, begun);
            let good = matches!(outcome, Outcome::Status(status) if step.good.contains(&status));
            if good { Ok(()) } else { Err(outcome) }
        };

        let begun = Instant::now();
        let map = Call::get(&*wanted.seat_map).with("accept-encoding", self.encoding.clone());
        done(SEAT_MAP, client.event.send(map, Body::Count).await.outcome, begun)?;

        let begun = Instant::now();
        let answer = client.booking.send(sale::reserve(wanted.reservation.clone(), user), Body::Keep).await;
        done(RESERVE, answer.outcome, begun)?;
        let made: Made = serde_json::from_slice(&answer.body).map_err(|_| Outcome::NoAnswer)?;

        let begun = Instant::now();
        let confirm = Call::post(format!("/api/v1/reservations/{}/confirm", made.id), Bytes::new());
        done(CONFIRM, client.booking.send(sale::by(confirm, user), Body::Count).await.outcome, begun)?;

        let begun = Instant::now();
        let tickets = sale::by(Call::get(format!("/api/v1/tickets/user/{user}")), user);
        let answer = client.booking.send(tickets, Body::Keep).await;
        done(TICKET, answer.outcome, begun)?;
        match serde_json::from_slice::<Vec<Ticket>>(&answer.body).as_deref() {
            Ok([ticket]) if ticket.session_seat_id == wanted.seat => self.right.set(self.right.get() + 1),
            _ => self.wrong.borrow_mut().push(user),
        }
        Ok(answer.outcome)
    }
}

pub(super) async fn run(arguments: &BuyerArguments, bench: &Bench<'_>) -> anyhow::Result<Measured> {
    let sessions = arguments.sale.open(bench.system, arguments.load.operations_max(CLOSED_MAX)).await?;
    let mut wanted = Vec::new();
    for session in &sessions {
        let seat_map: Rc<str> = session.seat_map().into();
        wanted.extend(session.single_seats().map(|(seat, reservation)| Wanted {
            seat: seat.session_seat_id,
            seat_map: Rc::clone(&seat_map),
            reservation,
        }));
    }
    let journey = Rc::new(Journey {
        wanted,
        next: Cell::new(0),
        encoding: arguments.encoding.header(),
        right: Cell::new(0),
        wrong: RefCell::default(),
    });
    let phase = bench.measure("journey", &arguments.load, JOURNEY, &journey).await?;
    let wrong = journey.wrong.borrow();
    let found = format!("{} buyers have it, {} do not {:?}", journey.right.get(), wrong.len(), first(&wrong));
    let promise = Promise::new("every buyer that paid has exactly the ticket for the seat", wrong.is_empty(), found);
    Ok(Measured { phases: vec![phase], promises: vec![promise], ..Measured::default() })
}

fn first(users: &[Uuid]) -> &[Uuid] {
    &users[..users.len().min(5)]
}
