//! What the handlers share: each takes the parts that it uses, by `State`.

use std::sync::Arc;

use axum::extract::FromRef;
use service_kit::database::DeskPool;
use service_kit::lifecycle::Lifecycle;
use sqlx::PgPool;
use sqlx::migrate::Migrator;

use crate::holds::availability::Looks;
use crate::holds::batch::ReserveDesk;
use crate::metrics::EventMetrics;
use crate::seat_map::map::SeatMaps;
use crate::seat_map::stream::SeatStreams;

/// The schema, compiled in.
pub static MIGRATIONS: Migrator = sqlx::migrate!();

/// What handlers may ask for.
#[derive(Clone, FromRef)]
pub(crate) struct AppState {
    pub(crate) db: PgPool,
    pub(crate) streams: Arc<SeatStreams>,
    pub(crate) desk: Arc<ReserveDesk>,
    pub(crate) looks: Arc<Looks>,
    pub(crate) maps: Arc<SeatMaps>,
    pub(crate) metrics: EventMetrics,
}

impl AppState {
    /// `desk_db` is for what comes by the thousand, `db` for the rest.
    pub(crate) fn new(
        db: PgPool,
        desk_db: &DeskPool,
        streams: Arc<SeatStreams>,
        metrics: EventMetrics,
        lifecycle: &Lifecycle,
    ) -> Self {
        Self {
            db,
            streams,
            desk: Arc::new(ReserveDesk::open(desk_db.clone(), lifecycle)),
            looks: Arc::new(Looks::start(desk_db.clone(), lifecycle)),
            maps: Arc::new(SeatMaps::start(desk_db.clone(), lifecycle)),
            metrics,
        }
    }
}
