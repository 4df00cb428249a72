//! What buyers do. Each scenario puts its own sale up, measures one or more phases, and checks its own promise.

use anyhow::Context;
use clap::Subcommand;

use crate::bench::Bench;
use crate::measured::Measured;

pub mod expiry;
pub mod growth;
pub mod hot;
pub mod journey;
pub mod mixed;
pub mod reserve;
pub mod seat_map;

/// What buyers do in a run, with the scenario's options.
#[derive(Debug, Clone, Subcommand)]
pub enum Scenario {
    /// Reserve distinct seats
    Reserve(reserve::Arguments),
    /// Load the seat map, reserve, pay, and read the ticket
    Journey(seat_map::BuyerArguments),
    /// Let thousands of buyers want the same ten seats
    Hot(hot::Arguments),
    /// Load a large seat map anew, then ask for changes
    SeatMap(seat_map::Arguments),
    /// Send nine reads for each reservation
    Mixed(seat_map::BuyerArguments),
    /// Let a hundred thousand holds end at once while reservations go on; best with --rate
    Expiry(expiry::Arguments),
    /// Reserve in larger and larger sessions and tables
    Growth(growth::Arguments),
}

impl Scenario {
    /// The scenario's name on the command line.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Reserve(_) => "reserve",
            Self::Journey(_) => "journey",
            Self::Hot(_) => "hot",
            Self::SeatMap(_) => "seat-map",
            Self::Mixed(_) => "mixed",
            Self::Expiry(_) => "expiry",
            Self::Growth(_) => "growth",
        }
    }

    /// Runs the scenario on a system.
    ///
    /// # Errors
    /// If the system does not answer, or refuses the set-up.
    pub async fn run(&self, bench: &Bench<'_>) -> anyhow::Result<Measured> {
        let measured = match self {
            Self::Reserve(arguments) => reserve::run(arguments, bench).await,
            Self::Journey(arguments) => journey::run(arguments, bench).await,
            Self::Hot(arguments) => hot::run(arguments, bench).await,
            Self::SeatMap(arguments) => seat_map::run(arguments, bench).await,
            Self::Mixed(arguments) => mixed::run(arguments, bench).await,
            Self::Expiry(arguments) => expiry::run(arguments, bench).await,
            Self::Growth(arguments) => growth::run(arguments, bench).await,
        };
        measured.with_context(|| format!("the scenario {} could not be run", self.name()))
    }
}
