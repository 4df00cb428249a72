//! Where all calls of `reserve` come together: those that come at the same time are one statement and one commit, each judged for itself.
//!
//! In the minute of an on-sale the commit is what costs most, and it costs the same for sixty holds as for one.

use std::collections::HashSet;
use std::mem;
use std::time::Duration;

use service_kit::coalesce::{Coalescer, Lanes, together_or_alone};
use service_kit::database::DeskPool;
use service_kit::error::Result;
use service_kit::lifecycle::Lifecycle;
use shared_contracts::ids::SessionSeatId;

use crate::session_seats::{self, ChangeOutcome, Wish};

const LANES: Lanes = Lanes::usual(Duration::from_secs(5));

/// The desk; one a process.
#[derive(Debug)]
pub struct HoldBatcher {
    wishes: Coalescer<Wish, ChangeOutcome>,
}

impl HoldBatcher {
    /// Opens it. It closes when nobody can ask any more.
    #[must_use]
    pub fn start(db: DeskPool, lifecycle: &Lifecycle) -> Self {
        let work = move |wishes| reserve_all(db.clone(), wishes);
        Self { wishes: Coalescer::start(lifecycle, LANES, work) }
    }

    /// Holds all seats of the wish, or none.
    ///
    /// # Errors
    /// The database failed: the seats may be held.
    pub async fn reserve(&self, wish: Wish) -> Result<ChangeOutcome> {
        self.wishes.call(wish).await
    }
}

async fn reserve_all(db: DeskPool, wishes: Vec<Wish>) -> Vec<Result<ChangeOutcome>> {
    let mut outcomes: Vec<Option<Result<ChangeOutcome>>> = wishes.iter().map(|_| None).collect();
    let mut left: Vec<(usize, Wish)> = wishes.into_iter().enumerate().collect();
    while !left.is_empty() {
        let batch = without_rivals(&mut left);
        let (places, wishes): (Vec<usize>, Vec<Wish>) = batch.into_iter().unzip();
        for (place, outcome) in places.into_iter().zip(reserve_batch(&db, wishes).await) {
            outcomes[place] = Some(outcome);
        }
    }
    outcomes.into_iter().flatten().collect()
}

/// Takes out, in their order, wishes that want no seat which an earlier one wants; of rivals, the later ones see what became of it.
fn without_rivals(left: &mut Vec<(usize, Wish)>) -> Vec<(usize, Wish)> {
    let mut wanted: HashSet<SessionSeatId> = HashSet::new();
    let (mut batch, mut rivals) = (Vec::new(), Vec::new());
    for (place, wish) in mem::take(left) {
        let is_rival = wish.seats.iter().any(|seat| wanted.contains(seat));
        wanted.extend(&wish.seats);
        if is_rival { rivals.push((place, wish)) } else { batch.push((place, wish)) }
    }
    *left = rivals;
    batch
}

async fn reserve_batch(db: &DeskPool, wishes: Vec<Wish>) -> Vec<Result<ChangeOutcome>> {
    together_or_alone(wishes, |wishes| async move {
        let mut connection = db.take().await?;
        let outcomes = session_seats::reserve(&mut connection, &wishes).await?;
        db.keep(connection);
        Ok(Some(outcomes.into_iter().map(Ok).collect()))
    })
    .await
}
