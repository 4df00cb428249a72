//! `seat-map`: a large seat map. First each request loads it anew, then each asks for changes by its ETag.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use anyhow::ensure;
use clap::{Args, ValueEnum};
use hyper::header::HeaderValue;

use crate::arrivals::{Client, Operation};
use crate::bench::{Bench, LoadArguments};
use crate::http::{Body, Call, Connection, Outcome};
use crate::measure::{Recorder, Step};
use crate::measured::{Measured, Promise};
use crate::sale::{self, SaleArguments};

const LOADED: Step = Step { name: "seat map", good: &[200], refused: &[] };
const UNCHANGED: Step = Step { name: "unchanged?", good: &[304], refused: &[] };

/// The options of `seat-map`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    #[command(flatten)]
    load: LoadArguments,
    /// Seats in the session
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    seats: u32,
    /// Compression of the seat map
    #[arg(long, value_enum, default_value_t = Encoding::Gzip)]
    encoding: Encoding,
}

/// The options of a scenario whose buyers also load the seat map.
#[derive(Debug, Clone, Args)]
pub struct BuyerArguments {
    #[command(flatten)]
    pub(super) load: LoadArguments,
    #[command(flatten)]
    pub(super) sale: SaleArguments,
    /// Compression of the seat map
    #[arg(long, value_enum, default_value_t = Encoding::Gzip)]
    pub(super) encoding: Encoding,
}

/// The compression that clients accept.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Encoding {
    Identity,
    Gzip,
    Br,
    Zstd,
}

impl Encoding {
    /// The value of the `Accept-Encoding` header.
    #[must_use]
    pub fn header(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
            Self::Br => "br",
            Self::Zstd => "zstd",
        })
    }
}

/// Sends the same request again and again.
struct Load {
    call: Call,
    step: Step,
    bytes: Cell<u64>,
    answers: Cell<u64>,
}

impl Operation for Load {
    async fn run(&self, client: &mut Client, due: Instant, recorder: &Recorder) -> bool {
        let answer = client.event.send(self.call.clone(), Body::Count).await;
        recorder.count(self.step, answer.outcome, due);
        self.bytes.set(self.bytes.get() + answer.bytes);
        self.answers.set(self.answers.get() + 1);
        true
    }
}

impl Load {
    fn of(call: &Call, step: Step) -> Rc<Self> {
        Rc::new(Self { call: call.clone(), step, bytes: Cell::new(0), answers: Cell::new(0) })
    }

    fn bytes_per_answer(&self) -> String {
        format!("{}", self.bytes.get() / self.answers.get().max(1))
    }
}

pub(super) async fn run(arguments: &Arguments, bench: &Bench<'_>) -> anyhow::Result<Measured> {
    let system = bench.system;
    let sessions = sale::open(&system.event, &system.bookings[0], 1, arguments.seats as usize).await?;
    let call = Call::get(sessions[0].seat_map()).with("accept-encoding", arguments.encoding.header());
    let mut measured = Measured::default();

    let cold = Load::of(&call, LOADED);
    measured.phases.push(bench.measure("seat map, loaded anew", &arguments.load, LOADED, &cold).await?);
    measured.figures.push(("bytes of a loaded map".to_owned(), cold.bytes_per_answer()));

    let known = Connection::to(&system.event).send(call.clone(), Body::Count).await;
    ensure!(known.is(200), "the seat map answered {}", known.outcome);
    let Some(tag) = known.headers.get("etag") else {
        measured.figures.push(("asked for changes".to_owned(), "not measured: the seat map has no ETag".to_owned()));
        return Ok(measured);
    };
    let warm = Load::of(&call.with("if-none-match", tag.clone()), UNCHANGED);
    let phase = bench.measure("seat map, asked for changes", &arguments.load, UNCHANGED, &warm).await?;
    measured.figures.push(("bytes of an unchanged map".to_owned(), warm.bytes_per_answer()));
    let wrong = phase.counted.ended(Outcome::Status(200));
    let found = format!("{} answers without the map, {wrong} with it", phase.counted.operations);
    measured.promises.push(Promise::new("a map that has not changed is not sent again", wrong == 0, found));
    measured.phases.push(phase);
    Ok(measured)
}
