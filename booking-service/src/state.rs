//! The state that all requests and background tasks of a process share, and the parts that a handler can extract.

use std::sync::Arc;

use axum::extract::FromRef;
use service_kit::amqp::Publisher;
use service_kit::postgres::database::BatchPool;
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::settings::Secret;
use sqlx::PgPool;
use tokio::sync::Notify;

use crate::event_client::EventClient;
use crate::metrics::BookingMetrics;
use crate::payments::provider::PaymentProvider;
use crate::reservations::ended::EndedReservations;
use crate::reservations::insert::ReservationInserter;
use crate::reservations::payment::PaymentBatcher;
use crate::reservations::tickets::TicketLoader;
use crate::seat_locks::SeatLocks;
use crate::settings::{Rules, Settings};
use crate::tier_cache::PriceTierCache;

/// The parts of one process, which every request and background task uses.
pub struct Shared {
    /// The connections of requests to this service's database.
    pub db: PgPool,
    /// The connections of the batch workers to the same database.
    pub batch_db: BatchPool,
    /// The client of the Event Service.
    pub event_service: EventClient,
    /// The seat locks in Redis.
    pub locks: SeatLocks,
    /// The price tiers in use and the database's clock, cached for one second.
    pub tiers: Arc<PriceTierCache>,
    /// Finds the owners of seat locks whose reservations have ended.
    pub(crate) ended_reservations: EndedReservations,
    /// Inserts reservations in batches.
    pub(crate) inserts: ReservationInserter,
    /// Writes the steps of payments in batches.
    pub(crate) payment_batches: PaymentBatcher,
    /// Loads tickets in batches.
    pub(crate) tickets: Arc<TicketLoader>,
    /// The payment provider, for now the mock.
    pub provider: PaymentProvider,
    /// Publishes events to RabbitMQ.
    pub publisher: Arc<Publisher>,
    /// Wakes the outbox relay after a commit.
    pub outbox_wakeup: Notify,
    /// The hold time and the limits on seats and reservations, from the settings.
    pub rules: Rules,
    /// The secrets that sign the provider's notices: the current one, and the previous one during a change.
    pub webhook_secrets: Vec<Secret>,
    /// The counters, gauges and histograms of this process.
    pub metrics: BookingMetrics,
}

/// A handle on [`Shared`].
pub type App = Arc<Shared>;

/// The parts that handlers can extract. A handler that starts a workflow takes [`App`], because a workflow's steps need
/// most parts.
#[derive(Clone, FromRef)]
pub(crate) struct AppState {
    app: App,
    db: PgPool,
    publisher: Arc<Publisher>,
    tiers: Arc<PriceTierCache>,
    tickets: Arc<TicketLoader>,
}

impl AppState {
    /// Handles on the parts of `app`.
    pub(crate) fn new(app: &App) -> Self {
        Self {
            app: Arc::clone(app),
            db: app.db.clone(),
            publisher: Arc::clone(&app.publisher),
            tiers: Arc::clone(&app.tiers),
            tickets: Arc::clone(&app.tickets),
        }
    }
}

impl Shared {
    /// Creates all parts. The connections to the database, Redis and the broker open on first use.
    ///
    /// # Errors
    /// A setting is not a valid address.
    pub(crate) fn new(
        settings: &Settings,
        db: PgPool,
        name: &'static str,
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let batch_db = BatchPool::new(&settings.database_url, name)?;
        Ok(Self {
            tiers: Arc::default(),
            ended_reservations: EndedReservations::open(batch_db.clone(), lifecycle),
            inserts: ReservationInserter::open(batch_db.clone(), settings.rules, lifecycle),
            payment_batches: PaymentBatcher::open(batch_db.clone(), lifecycle),
            tickets: Arc::new(TicketLoader::open(batch_db.clone(), lifecycle)),
            event_service: EventClient::new(
                &settings.event_service_url,
                &settings.common.auth.internal_keys,
                &settings.common.trust,
                lifecycle,
            )?,
            locks: SeatLocks::new(&settings.redis_url, &settings.common.trust)?,
            provider: PaymentProvider::mock(
                db.clone(),
                batch_db.clone(),
                settings.mock_payment_success_rate,
                lifecycle,
            ),
            publisher: Arc::new(Publisher::new(settings.broker.clone(), name)),
            outbox_wakeup: Notify::new(),
            rules: settings.rules,
            webhook_secrets: settings.webhook_secrets.clone(),
            metrics: BookingMetrics::new(name)?,
            batch_db,
            db,
        })
    }
}
