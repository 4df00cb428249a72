//! What the handlers share: each takes the parts that it uses, by `State`.

use std::sync::Arc;

use axum::extract::FromRef;
use service_kit::postgres::database::BatchPool;
use service_kit::process::lifecycle::Lifecycle;
use sqlx::PgPool;
use sqlx::migrate::Migrator;

use crate::holds::availability::AvailabilityLoader;
use crate::holds::batch::HoldBatcher;
use crate::metrics::EventMetrics;
use crate::seat_map::map::SeatMaps;
use crate::seat_map::stream::SeatStreams;

/// The migrations of the database, compiled in.
pub static MIGRATIONS: Migrator = sqlx::migrate!();

/// The parts that handlers can extract.
#[derive(Clone, FromRef)]
pub(crate) struct AppState {
    pub(crate) db: PgPool,
    pub(crate) streams: Arc<SeatStreams>,
    pub(crate) hold_batcher: Arc<HoldBatcher>,
    pub(crate) availability: Arc<AvailabilityLoader>,
    pub(crate) maps: Arc<SeatMaps>,
    pub(crate) metrics: EventMetrics,
}

impl AppState {
    /// `batch_db` serves the batch workers, `db` all other queries.
    pub(crate) fn new(
        db: PgPool,
        batch_db: &BatchPool,
        streams: Arc<SeatStreams>,
        metrics: EventMetrics,
        lifecycle: &Lifecycle,
    ) -> Self {
        Self {
            db,
            streams,
            hold_batcher: Arc::new(HoldBatcher::start(batch_db.clone(), lifecycle)),
            availability: Arc::new(AvailabilityLoader::start(batch_db.clone(), lifecycle)),
            maps: Arc::new(SeatMaps::start(batch_db.clone(), lifecycle)),
            metrics,
        }
    }
}
