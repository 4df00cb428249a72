//! The outbox relay: publishes waiting events until the process stops.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::outbox::{BATCH_MAX, Relayed, Wanted, relay_batch};
use crate::state::Shared;

/// The time limit of one batch with all its waits. Without it, a connection that died silently would stop the relay.
const RELAY_TIME_MAX: Duration = Duration::from_secs(30);
/// How often the relay polls without a wake-up. Polling finds events of other processes, and events left by a broker
/// outage.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// The pause from one batch to the next. It gives a busy broker and consumer fewer and larger batches. The first 10 ms
/// saved a fourteenth of a journey's work, and the other 15 ms the same again (measured). An event after a quiet time
/// leaves at once, unless the relay has just polled.
const GATHER_TIME: Duration = Duration::from_millis(25);
/// The pause after a batch in which the broker or the database failed.
const PAUSE_AFTER_FAULT: Duration = Duration::from_secs(1);

/// Publishes events until `stopping` is cancelled: urgent ones on a wake-up, and both kinds every
/// [`POLL_INTERVAL`].
///
/// # Errors
/// None; the relay logs a fault and tries again.
pub(crate) async fn relay(app: &Shared, stopping: CancellationToken) -> anyhow::Result<()> {
    let mut faulty = false;
    // The time of the next poll for each kind.
    let mut urgent_at = Instant::now();
    let mut expired_at = urgent_at;
    while !stopping.is_cancelled() {
        let mut fault = false;
        for (wanted, at) in [(Wanted::Urgent, &mut urgent_at), (Wanted::Expired, &mut expired_at)] {
            if Instant::now() < *at {
                continue;
            }
            let relayed =
                tokio::time::timeout(RELAY_TIME_MAX, relay_batch(&app.batch_db, &app.publisher, wanted)).await;
            let relayed = relayed.map_err(anyhow::Error::from).flatten();
            relayed.iter().for_each(|relayed| app.metrics.relayed(*relayed));
            let pause = match relayed {
                // Some events of the batch failed, but those behind them may succeed, so the usual pause applies.
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
        // Wait briefly so that events committed meanwhile join the next batch. A full batch leaves at once.
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
