//! Batches the calls that hold seats: calls of the same moment share one statement and one commit. Each succeeds or
//! fails on its own.
//!
//! The commit is the largest cost when a sale opens, and it costs the same for sixty holds as for one.

use std::collections::HashSet;
use std::mem;
use std::time::Duration;

use service_kit::http::error::Result;
use service_kit::postgres::batch::{BatchConfig, Batcher, batch_or_each};
use service_kit::postgres::database::BatchPool;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::SessionSeatId;

use crate::session_seats::{self, ChangeOutcome, HoldRequest};

const BATCH_CONFIG: BatchConfig = BatchConfig::with_timeout(Duration::from_secs(5));

/// Batches hold requests; one per process.
#[derive(Debug)]
pub struct HoldBatcher {
    requests: Batcher<HoldRequest, ChangeOutcome>,
}

impl HoldBatcher {
    /// Starts the batch workers. They end when the last `HoldBatcher` is dropped.
    #[must_use]
    pub fn start(db: BatchPool, lifecycle: &Lifecycle) -> Self {
        let work = move |requests| reserve_all(db.clone(), requests);
        Self { requests: Batcher::start(lifecycle, BATCH_CONFIG, work) }
    }

    /// Holds all seats of the request, or none.
    ///
    /// # Errors
    /// The database failed. The seats may be held all the same.
    pub async fn reserve(&self, request: HoldRequest) -> Result<ChangeOutcome> {
        self.requests.call(request).await
    }
}

async fn reserve_all(db: BatchPool, requests: Vec<HoldRequest>) -> Vec<Result<ChangeOutcome>> {
    let mut outcomes: Vec<Option<Result<ChangeOutcome>>> = requests.iter().map(|_| None).collect();
    let mut waiting: Vec<(usize, HoldRequest)> = requests.into_iter().enumerate().collect();
    while !waiting.is_empty() {
        let batch = take_disjoint(&mut waiting);
        let (indexes, requests): (Vec<usize>, Vec<HoldRequest>) = batch.into_iter().unzip();
        for (index, outcome) in indexes.into_iter().zip(reserve_batch(&db, requests).await) {
            outcomes[index] = Some(outcome);
        }
    }
    outcomes.into_iter().flatten().collect()
}

/// Takes out, in order, the requests that share no seat with an earlier one. The others wait for the next batch, which
/// sees the result.
fn take_disjoint(waiting: &mut Vec<(usize, HoldRequest)>) -> Vec<(usize, HoldRequest)> {
    let mut wanted: HashSet<SessionSeatId> = HashSet::new();
    let (mut batch, mut later) = (Vec::new(), Vec::new());
    for (index, request) in mem::take(waiting) {
        let overlaps = request.seats.iter().any(|seat| wanted.contains(seat));
        wanted.extend(&request.seats);
        if overlaps { later.push((index, request)) } else { batch.push((index, request)) }
    }
    *waiting = later;
    batch
}

async fn reserve_batch(db: &BatchPool, requests: Vec<HoldRequest>) -> Vec<Result<ChangeOutcome>> {
    batch_or_each(requests, |requests| async move {
        let mut connection = db.acquire().await?;
        let outcomes = session_seats::reserve(&mut connection, &requests).await?;
        db.release(connection);
        Ok(Some(outcomes.into_iter().map(Ok).collect()))
    })
    .await
}
