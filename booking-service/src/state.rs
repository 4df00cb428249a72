//! What all requests and ticks of a process share, and the parts of it that a handler can take.

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
use crate::payments::PaymentProvider;
use crate::reservations::ended::EndedReservations;
use crate::reservations::insert::ReservationInserter;
use crate::reservations::payment::PaymentBatcher;
use crate::reservations::tickets::TicketLoader;
use crate::seat_locks::SeatLocks;
use crate::settings::{Rules, Settings};
use crate::tier_cache::PriceTierCache;

/// What all requests and ticks share.
pub struct Shared {
    /// The own database.
    pub db: PgPool,
    /// The same, for what comes by the thousand.
    pub desk_db: BatchPool,
    /// The way to the Event Service.
    pub event_service: EventClient,
    /// The gate in Redis.
    pub locks: SeatLocks,
    /// Price tiers in use, and the database's clock.
    pub tiers: Arc<PriceTierCache>,
    /// What became of those who have seat locks.
    pub(crate) ended_reservations: EndedReservations,
    /// Where reservations are written.
    pub(crate) inserts: ReservationInserter,
    /// Where they are paid.
    pub(crate) payment_batches: PaymentBatcher,
    /// Where tickets are asked for.
    pub(crate) tickets: Arc<TicketLoader>,
    /// The payment provider.
    pub payments: PaymentProvider,
    /// The way to the broker.
    pub publisher: Arc<Publisher>,
    /// Wakes the relay after a commit.
    pub outbox_wakeup: Notify,
    /// The rules of booking.
    pub rules: Rules,
    /// What the payment provider signs its notices with.
    pub webhook_secrets: Vec<Secret>,
    /// What is counted and measured.
    pub metrics: BookingMetrics,
}

/// A handle on [`Shared`].
pub type App = Arc<Shared>;

/// The parts that a handler may take. A handler that begins a workflow takes [`App`], as the steps of a workflow need most parts.
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
    /// Makes all parts; the database, Redis and the broker are connected to when they are first used.
    ///
    /// # Errors
    /// A setting is no address.
    pub(crate) fn new(
        settings: &Settings,
        db: PgPool,
        name: &'static str,
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let desk_db = BatchPool::new(&settings.database_url, name)?;
        Ok(Self {
            tiers: Arc::default(),
            ended_reservations: EndedReservations::open(desk_db.clone(), lifecycle),
            inserts: ReservationInserter::open(desk_db.clone(), settings.rules, lifecycle),
            payment_batches: PaymentBatcher::open(desk_db.clone(), lifecycle),
            tickets: Arc::new(TicketLoader::open(desk_db.clone(), lifecycle)),
            event_service: EventClient::new(
                &settings.event_service_url,
                &settings.common.auth.internal_keys,
                &settings.common.trust,
                lifecycle,
            )?,
            locks: SeatLocks::new(&settings.redis_url, &settings.common.trust)?,
            payments: PaymentProvider::mock(db.clone(), desk_db.clone(), settings.mock_payment_success_rate, lifecycle),
            publisher: Arc::new(Publisher::new(settings.broker.clone(), name)),
            outbox_wakeup: Notify::new(),
            rules: settings.rules,
            webhook_secrets: settings.webhook_secrets.clone(),
            metrics: BookingMetrics::new(name)?,
            desk_db,
            db,
        })
    }
}
