//! `mixed`: of ten arrivals, nine read and one reserves, in the session that all of them watch.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use clap::Args;
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use uuid::Uuid;

use crate::arrivals::{Client, Operation};
use crate::bench::{Bench, LoadArguments};
use crate::http::{Body, Call};
use crate::measure::{Recorder, Step};
use crate::measured::{Measured, Promise};
use crate::sale::{self, SaleArguments};
use crate::scenarios::seat_map::Encoding;

/// Any of the arrivals: what rates and costs are divided by.
const REQUEST: Step = Step { name: "request", good: &[200, 201, 304], refused: &[] };
const SEAT_MAP: Step = Step { name: "seat map", good: &[200, 304], refused: &[] };
const SESSION: Step = Step { name: "session", good: &[200], refused: &[] };
const TICKETS: Step = Step { name: "tickets", good: &[200], refused: &[] };
const RESERVE: Step = Step { name: "reserve", good: &[201], refused: &[] };
/// Reservations that a closed loop is expected to need.
const CLOSED_MAX: usize = 6_000;

/// How.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    #[command(flatten)]
    load: LoadArguments,
    #[command(flatten)]
    sale: SaleArguments,
    /// How the seat map is to be compressed
    #[arg(long, value_enum, default_value_t = Encoding::Gzip)]
    encoding: Encoding,
}

/// What an arrival does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    SeatMap,
    Session,
    Tickets,
    Reserve,
}

/// Of ten in a row: six look at the map, two at the session, one at their tickets, and one reserves.
const TEN: [Does; 10] = [
    Does::SeatMap,
    Does::Session,
    Does::SeatMap,
    Does::SeatMap,
    Does::Tickets,
    Does::SeatMap,
    Does::Session,
    Does::SeatMap,
    Does::SeatMap,
    Does::Reserve,
];

struct Wanted {
    session: Uuid,
    reservation: Bytes,
}

struct Mixed {
    wanted: Vec<Wanted>,
    arrived: Cell<usize>,
    encoding: HeaderValue,
}

impl Operation for Mixed {
    async fn run(&self, client: &mut Client, due: Instant, recorder: &Recorder) -> bool {
        let arrival = self.arrived.get();
        let Some(wanted) = self.wanted.get(arrival / TEN.len()) else { return false };
        self.arrived.set(arrival + 1);
        let user = Client::new_user();
        let session = wanted.session;
        let (step, answer) = match TEN[arrival % TEN.len()] {
            Does::SeatMap => {
                let map = Call::get(format!("/api/v1/sessions/{session}/seat-map"));
                let map = map.with("accept-encoding", self.encoding.clone());
                (SEAT_MAP, client.event.send(map, Body::Count).await)
            }
            Does::Session => {
                (SESSION, client.event.send(Call::get(format!("/api/v1/sessions/{session}")), Body::Count).await)
            }
            Does::Tickets => {
                let tickets = sale::by(Call::get(format!("/api/v1/tickets/user/{user}")), user);
                (TICKETS, client.booking.send(tickets, Body::Count).await)
            }
            Does::Reserve => {
                (RESERVE, client.booking.send(sale::reserve(wanted.reservation.clone(), user), Body::Count).await)
            }
        };
        recorder.count(step, answer.outcome, due);
        recorder.count(REQUEST, answer.outcome, due);
        true
    }
}

pub(super) async fn run(arguments: &Arguments, bench: &Bench<'_>) -> anyhow::Result<Measured> {
    let reservations = arguments.load.operations_max(CLOSED_MAX * TEN.len()).div_ceil(TEN.len());
    let sessions = arguments.sale.open(bench.system, reservations).await?;
    let mut wanted = Vec::new();
    for session in &sessions {
        wanted.extend(
            session.seats.iter().map(|seat| Wanted {
                session: session.id,
                reservation: session.reservation(std::slice::from_ref(seat)),
            }),
        );
    }
    let mixed = Rc::new(Mixed { wanted, arrived: Cell::new(0), encoding: arguments.encoding.header() });
    let phase = bench.measure("mixed", &arguments.load, REQUEST, &mixed).await?;
    let reserve = phase.counted.steps.iter().find(|step| step.name == RESERVE.name);
    let refused = reserve.and_then(|step| step.by_outcome.get("409")).map_or(0, |latency| latency.count);
    let found = format!("{refused} free seats were refused");
    let promise = Promise::new("a free seat is not refused because others look on", refused == 0, found);
    Ok(Measured { phases: vec![phase], promises: vec![promise], ..Measured::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nine_of_ten_read() {
        assert_eq!(TEN.iter().filter(|does| **does != Does::Reserve).count(), 9);
    }
}
