//! `reserve`: each arrival reserves free seats that no other arrival requests.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use clap::Args;
use hyper::body::Bytes;

use crate::arrivals::{Client, Operation};
use crate::bench::{Bench, LoadArguments};
use crate::http::{Body, Connection, Outcome};
use crate::measure::{Recorder, Step};
use crate::measured::{Measured, Promise};
use crate::sale::{self, SaleArguments, Session};

/// A reservation of free seats. A `409` therefore counts as failed.
pub const RESERVE: Step = Step { name: "reserve", good: &[201], refused: &[] };
/// How many reservations a closed loop is expected to need.
const CLOSED_MAX: usize = 20_000;
/// How many reserved seats are requested once more, to check that they are refused.
const ASKED_AGAIN_MAX: usize = 200;

/// The options of `reserve`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    #[command(flatten)]
    load: LoadArguments,
    #[command(flatten)]
    sale: SaleArguments,
    /// Seats per reservation
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=10))]
    seats_per_reservation: u8,
}

/// Makes one reservation after the other.
pub struct Reserve {
    bodies: Vec<Bytes>,
    next: Cell<usize>,
    given: RefCell<Vec<usize>>,
}

impl Reserve {
    /// Prepares reservations of all seats of these sessions, with this many seats each.
    #[must_use]
    pub fn all_of(sessions: &[Session], seats_per_reservation: usize) -> Self {
        let each = |session: &Session| -> Vec<Bytes> {
            session.seats.chunks_exact(seats_per_reservation).map(|seats| session.reservation(seats)).collect()
        };
        Self { bodies: sessions.iter().flat_map(each).collect(), next: Cell::new(0), given: RefCell::default() }
    }

    /// Requests seats again that have been reserved. Each of these requests must be refused.
    pub async fn promise(&self, bench: &Bench<'_>) -> Promise {
        let given = self.given.borrow().clone();
        // Takes samples over all of the run.
        let every = given.len().div_ceil(ASKED_AGAIN_MAX).max(1);
        let mut connection = Connection::to(&bench.system.bookings[0]);
        let (mut asked, mut twice, mut other) = (0, 0, 0);
        for index in given.iter().step_by(every) {
            let again = sale::reserve(self.bodies[*index].clone(), Client::new_user());
            asked += 1;
            match connection.send(again, Body::Count).await.outcome {
                Outcome::Status(409) => {}
                Outcome::Status(201) => twice += 1,
                _ => other += 1,
            }
        }
        let found = format!(
            "{} reservations; the seats of {asked} were requested again: {twice} reserved twice, {other} other answers",
            given.len()
        );
        Promise::new("no seat is reserved twice", twice == 0 && other == 0, found)
    }
}

impl Operation for Reserve {
    async fn run(&self, client: &mut Client, due: Instant, recorder: &Recorder) -> bool {
        let index = self.next.get();
        let Some(body) = self.bodies.get(index) else { return false };
        self.next.set(index + 1);
        let answer = client.booking.send(sale::reserve(body.clone(), Client::new_user()), Body::Count).await;
        recorder.count(RESERVE, answer.outcome, due);
        if answer.is(201) {
            self.given.borrow_mut().push(index);
        }
        true
    }
}

pub(super) async fn run(arguments: &Arguments, bench: &Bench<'_>) -> anyhow::Result<Measured> {
    let per_reservation = usize::from(arguments.seats_per_reservation);
    let seats = arguments.load.operations_max(CLOSED_MAX) * per_reservation;
    let sessions = arguments.sale.open(bench.system, seats).await?;
    let reserve = Rc::new(Reserve::all_of(&sessions, per_reservation));
    let phase = bench.measure("reserve", &arguments.load, RESERVE, &reserve).await?;
    Ok(Measured { phases: vec![phase], promises: vec![reserve.promise(bench).await], ..Measured::default() })
}
