//! `mixed`: of ten arrivals in a row, nine read and one reserves, all in the same session.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use hyper::body::Bytes;
use hyper::header::HeaderValue;
use uuid::Uuid;

use crate::arrivals::{Client, Operation};
use crate::bench::Bench;
use crate::http::{Body, Call};
use crate::measure::{Recorder, Step};
use crate::measured::{Measured, Promise};
use crate::sale;
use crate::scenarios::reserve::RESERVE;
use crate::scenarios::seat_map::BuyerArguments;

/// Any of the arrivals. Rates and costs are per request.
const REQUEST: Step = Step { name: "request", good: &[200, 201, 304], refused: &[] };
const SEAT_MAP: Step = Step { name: "seat map", good: &[200, 304], refused: &[] };
const SESSION: Step = Step { name: "session", good: &[200], refused: &[] };
const TICKETS: Step = Step { name: "tickets", good: &[200], refused: &[] };
/// How many reservations a closed loop is expected to need.
const CLOSED_MAX: usize = 6_000;

/// The request that an arrival sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    SeatMap,
    Session,
    Tickets,
    Reserve,
}

/// Of ten arrivals in a row, six load the map, two the session, one its tickets, and one reserves.
const TEN: [Kind; 10] = [
    Kind::SeatMap,
    Kind::Session,
    Kind::SeatMap,
    Kind::SeatMap,
    Kind::Tickets,
    Kind::SeatMap,
    Kind::Session,
    Kind::SeatMap,
    Kind::SeatMap,
    Kind::Reserve,
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
            Kind::SeatMap => {
                let map = Call::get(format!("/api/v1/sessions/{session}/seat-map"));
                let map = map.with("accept-encoding", self.encoding.clone());
                (SEAT_MAP, client.event.send(map, Body::Count).await)
            }
            Kind::Session => {
                (SESSION, client.event.send(Call::get(format!("/api/v1/sessions/{session}")), Body::Count).await)
            }
            Kind::Tickets => {
                let tickets = sale::by(Call::get(format!("/api/v1/tickets/user/{user}")), user);
                (TICKETS, client.booking.send(tickets, Body::Count).await)
            }
            Kind::Reserve => {
                (RESERVE, client.booking.send(sale::reserve(wanted.reservation.clone(), user), Body::Count).await)
            }
        };
        recorder.count(step, answer.outcome, due);
        recorder.count(REQUEST, answer.outcome, due);
        true
    }
}

pub(super) async fn run(arguments: &BuyerArguments, bench: &Bench<'_>) -> anyhow::Result<Measured> {
    let reservations = arguments.load.operations_max(CLOSED_MAX * TEN.len()).div_ceil(TEN.len());
    let sessions = arguments.sale.open(bench.system, reservations).await?;
    let mut wanted = Vec::new();
    for session in &sessions {
        wanted.extend(session.single_seats().map(|(_, reservation)| Wanted { session: session.id, reservation }));
    }
    let mixed = Rc::new(Mixed { wanted, arrived: Cell::new(0), encoding: arguments.encoding.header() });
    let phase = bench.measure("mixed", &arguments.load, REQUEST, &mixed).await?;
    let reserve = phase.counted.steps.iter().find(|step| step.name == RESERVE.name);
    let refused = reserve.and_then(|step| step.by_outcome.get("409")).map_or(0, |latency| latency.count);
    let found = format!("{refused} free seats were refused");
    let promise = Promise::new("a free seat is not refused because others read the map", refused == 0, found);
    Ok(Measured { phases: vec![phase], promises: vec![promise], ..Measured::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nine_of_ten_read() {
        assert_eq!(TEN.iter().filter(|kind| **kind != Kind::Reserve).count(), 9);
    }
}
