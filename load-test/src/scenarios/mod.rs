//! What buyers do. Each scenario sets up its own sale, measures one or more phases, and says whether its own promise was kept.

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

/// The scenarios.
#[derive(Debug, Clone, Subcommand)]
pub enum Scenario {
    /// Reservations of distinct seats
    Reserve(reserve::Arguments),
    /// Seat map, reservation, payment, ticket
    Journey(journey::Arguments),
    /// Thousands of buyers want the same ten seats
    Hot(hot::Arguments),
    /// A large seat map, loaded anew and asked for changes
    SeatMap(seat_map::Arguments),
    /// Nine readers for each buyer
    Mixed(mixed::Arguments),
    /// A hundred thousand holds end at once while reservations go on; best with --rate
    Expiry(expiry::Arguments),
    /// The same booking in larger and larger sessions and tables
    Growth(growth::Arguments),
}

impl Scenario {
    /// Its name, as on the command line.
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

    /// Runs it.
    ///
    /// # Errors
    /// The system does not answer, or refuses the set-up.
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
