//! `hot`: thousands of buyers want the same few seats at once. Each seat has one winner, and the others must hear
//! quickly that it is taken.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Args;
use hyper::body::Bytes;

use crate::arrivals::{Client, Operation};
use crate::bench::{Bench, LoadArguments};
use crate::http::{Answer, Body, Outcome};
use crate::measure::{Recorder, Step};
use crate::measured::{Measured, Promise};
use crate::sale::{self, SaleArguments};

/// A buyer's request, repeated until the buyer knows who has the seat.
const ATTEMPT: Step = Step { name: "attempt", good: &[201, 409], refused: &[] };
/// An answer that only tells the buyer to try again.
const TURNED_AWAY: Step = Step { name: "turned away", good: &[429, 503], refused: &[] };
/// How often a buyer sends the request at most.
const TRIES_MAX: usize = 10;
/// How long a buyer waits if the answer has no `Retry-After`.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// When the run ends even if buyers are left. `--seconds` does not apply, because a rush that ends early proves
/// nothing.
const TIME_MAX_SECONDS: f64 = 600.0;

/// The options of `hot`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    #[command(flatten)]
    load: LoadArguments,
    #[command(flatten)]
    sale: SaleArguments,
    /// Buyers per round
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    buyers: u32,
    /// Seats that all buyers of a round want
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    wanted: u32,
    /// Rounds, each with other seats
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

struct Rush {
    buyers_per_round: usize,
    seats_per_round: usize,
    seats: Vec<Bytes>,
    next: Cell<usize>,
    winners: RefCell<Vec<u32>>,
}

impl Rush {
    /// The seat that a buyer wants. The buyers of the first round take turns at its seats, then those of the second,
    /// and so on.
    fn wish(&self, buyer: usize) -> Option<usize> {
        let seat = buyer / self.buyers_per_round * self.seats_per_round + buyer % self.seats_per_round;
        (seat < self.seats.len()).then_some(seat)
    }

    fn promise(&self, complete: bool) -> Promise {
        let winners = self.winners.borrow();
        let wrong = winners.iter().filter(|winners| **winners != 1).count();
        let (total, most) = (winners.iter().sum::<u32>(), winners.iter().max().copied().unwrap_or_default());
        let found = format!(
            "{total} winners for {} seats; at most {most} for one seat{}",
            winners.len(),
            if complete { "" } else { "; the time was over before all buyers had arrived" }
        );
        Promise::new("each wanted seat has exactly one winner", wrong == 0 && complete, found)
    }
}

impl Operation for Rush {
    async fn run(&self, client: &mut Client, due: Instant, recorder: &Recorder) -> bool {
        let Some(seat) = self.wish(self.next.get()) else { return false };
        self.next.set(self.next.get() + 1);
        let call = sale::reserve(self.seats[seat].clone(), Client::new_user());
        let mut begun = due;
        for _ in 1..TRIES_MAX {
            let answer = client.booking.send(call.clone(), Body::Count).await;
            if !matches!(answer.outcome, Outcome::Status(429 | 503)) {
                return self.finish(seat, &answer, due, recorder);
            }
            recorder.count(TURNED_AWAY, answer.outcome, begun);
            tokio::time::sleep(retry_after(&answer)).await;
            begun = Instant::now();
        }
        let answer = client.booking.send(call, Body::Count).await;
        self.finish(seat, &answer, due, recorder)
    }
}

impl Rush {
    fn finish(&self, seat: usize, answer: &Answer, due: Instant, recorder: &Recorder) -> bool {
        recorder.count(ATTEMPT, answer.outcome, due);
        if answer.is(201) {
            self.winners.borrow_mut()[seat] += 1;
        }
        true
    }
}

fn retry_after(answer: &Answer) -> Duration {
    let seconds = answer.headers.get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
    seconds.map_or(RETRY_AFTER, Duration::from_secs)
}

pub(super) async fn run(arguments: &Arguments, bench: &Bench<'_>) -> anyhow::Result<Measured> {
    let wanted = (arguments.wanted * arguments.rounds) as usize;
    let sessions = arguments.sale.open(bench.system, wanted).await?;
    let seats: Vec<Bytes> = sessions
        .iter()
        .flat_map(|session| session.single_seats().map(|(_, reservation)| reservation))
        .take(wanted)
        .collect();
    let rush = Rc::new(Rush {
        buyers_per_round: arguments.buyers as usize,
        seats_per_round: arguments.wanted as usize,
        winners: RefCell::new(vec![0; seats.len()]),
        seats,
        next: Cell::new(0),
    });
    // The run ends with the last buyer. A warm-up would be a part of the rush that is not counted.
    let load = LoadArguments { warm_up_seconds: 0.0, seconds: TIME_MAX_SECONDS, ..arguments.load.clone() };
    let phase = bench.measure("hot", &load, ATTEMPT, &rush).await?;
    let (winners, losers) = (phase.counted.ended(Outcome::Status(201)), phase.counted.ended(Outcome::Status(409)));
    let figures = vec![
        ("winners".to_owned(), winners.to_string()),
        ("losers".to_owned(), losers.to_string()),
        ("losers answered per second".to_owned(), format!("{:.0}", losers as f64 / phase.seconds)),
    ];
    let complete = rush.wish(rush.next.get()).is_none();
    Ok(Measured { promises: vec![rush.promise(complete)], phases: vec![phase], figures })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rush(winners: &[u32]) -> Rush {
        Rush {
            buyers_per_round: 4,
            seats_per_round: 2,
            seats: vec![Bytes::new(); 4],
            next: Cell::new(0),
            winners: RefCell::new(winners.to_vec()),
        }
    }

    #[test]
    fn each_round_has_its_own_seats_and_after_the_last_there_are_none() {
        let rush = rush(&[0; 4]);
        let wishes: Vec<_> = (0..9).map(|buyer| rush.wish(buyer)).collect();
        assert_eq!(wishes, [0, 1, 0, 1, 2, 3, 2, 3].map(Some).into_iter().chain([None]).collect::<Vec<_>>());
    }

    #[test]
    fn as_many_winners_as_seats_are_not_enough() {
        assert!(rush(&[1, 1, 1, 1]).promise(true).kept);
        for wrong in [[2, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 2]] {
            assert!(!rush(&wrong).promise(true).kept, "{wrong:?}");
        }
        assert!(!rush(&[1, 1, 1, 1]).promise(false).kept);
    }
}
