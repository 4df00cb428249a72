//! The outbox relay: publishes waiting events until the process stops.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::outbox::{BATCH_MAX, Relayed, Wanted, relay_batch};
use crate::state::Shared;

/// One batch with all its waits: a database that vanished without a word must not stop the relay for ever.
const RELAY_TIME_MAX: Duration = Duration::from_secs(30);
/// How often the relay looks without being nudged: events of other processes, and of a time without a broker.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// From one batch to the next, so that a broker and a consumer who are busy have fewer and larger ones: the first 10 ms
/// were a fourteenth of a journey's work, and the others as much (measured). What comes after a quiet time leaves at once.
const GATHER_TIME: Duration = Duration::from_millis(25);
/// How long it leaves a broker alone that just failed.
const PAUSE_AFTER_FAULT: Duration = Duration::from_secs(1);

/// Relays until `stopping`: urgent events at once when nudged, and both kinds every [`POLL_INTERVAL`].
///
/// # Errors
/// None; faults are logged and tried again.
pub(crate) async fn relay(app: &Shared, stopping: CancellationToken) -> anyhow::Result<()> {
    let mut faulty = false;
    // When each kind is looked for next.
    let mut urgent_at = Instant::now();
    let mut expired_at = urgent_at;
    while !stopping.is_cancelled() {
        let mut fault = false;
        for (wanted, at) in [(Wanted::Urgent, &mut urgent_at), (Wanted::Expired, &mut expired_at)] {
            if Instant::now() < *at {
                continue;
            }
            let relayed = tokio::time::timeout(RELAY_TIME_MAX, relay_batch(&app.desk_db, &app.publisher, wanted)).await;
            let relayed = relayed.map_err(anyhow::Error::from).flatten();
            relayed.iter().for_each(|relayed| app.metrics.relayed(*relayed));
            let pause = match relayed {
                // What some of the batch could not do, others behind them can.
                Ok(Relayed { published, left }) if left == 0 || published > 0 => {
                    let is_full = (published + left) as i64 == BATCH_MAX;
                    if is_full && wanted == Wanted::Urgent { Duration::ZERO } else { POLL_INTERVAL }
                }
                Ok(_) => PAUSE_AFTER_FAULT,
                Err(error) => {
                    if !faulty && !fault {
                        tracing::warn!(
                            error = format!("{error:#}"),
                            "Events can't be published; they wait in the outbox"
                        );
                    }
                    fault = true;
                    PAUSE_AFTER_FAULT
                }
            };
            *at = Instant::now() + pause;
        }
        faulty = fault;
        // Wait briefly so that events committed meanwhile join this batch. A full batch leaves at once.
        if urgent_at > Instant::now() {
            tokio::time::sleep(GATHER_TIME).await;
        }
        tokio::select! {
            () = stopping.cancelled() => {}
            () = app.outbox_wakeup.notified(), if !faulty => urgent_at = Instant::now(),
            () = tokio::time::sleep_until(urgent_at.min(expired_at)) => {}
        }
    }
    Ok(())
}
