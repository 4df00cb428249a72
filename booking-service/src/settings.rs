//! This service's settings; the worker reads the same.

use std::time::Duration;

use chrono::TimeDelta;
use service_kit::amqp::Broker;
use service_kit::process::common::Common;
use service_kit::process::settings::{Secret, SettingsError, SettingsReader};
use shared_contracts::booking_event;

/// All settings, read once at start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where to listen, how to log.
    pub common: Common,
    /// `DATABASE_URL`: PostgreSQL 15 or later.
    pub database_url: Secret,
    /// `DATABASE_CONNECTIONS_MAX`: of one process; all together must stay under the server's limit.
    pub database_connections_max: u32,
    /// `REDIS_URL`: the seat locks.
    pub redis_url: Secret,
    /// `EVENT_SERVICE_URL`: the internal seat API.
    pub event_service_url: String,
    /// `RABBITMQ_URL`, `RABBITMQ_EXCHANGE`.
    pub broker: Broker,
    /// `RABBITMQ_QUEUE`: the Event Service's, whose dead letters the audit counts.
    pub queue: String,
    /// The rules of booking.
    pub rules: Rules,
    /// `EXPIRY_WORKER_INTERVAL_SECONDS`: how often due reservations are looked for.
    pub expiry_interval: Duration,
    /// `RECONCILE_INTERVAL_SECONDS`: how often holds are compared with reservations, and payments with their provider.
    pub reconcile_interval: Duration,
    /// `EXPIRY_BATCH_SIZE`: reservations ended in one transaction.
    pub expiry_batch_size: u32,
    /// `AUDIT_INTERVAL_MINUTES`: how often the worker audits; never without one, as it reads whole tables.
    pub audit_interval: Option<Duration>,
    /// `MOCK_PAYMENT_SUCCESS_RATE`: share of charges that the mock provider captures.
    pub mock_payment_success_rate: f64,
    /// `PAYMENT_WEBHOOK_SECRET`, and while it is being changed `PAYMENT_WEBHOOK_SECRET_PREVIOUS`: what the provider signs its notices
    /// with. Without one no notice is believed.
    pub webhook_secrets: Vec<Secret>,
}

/// The rules of booking.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// `RESERVATION_TIMEOUT_MINUTES`: how long a seat is held for its payment.
    pub hold_time: Duration,
    /// `MAX_SEATS_PER_RESERVATION`.
    pub seats_max: usize,
    /// `MAX_OPEN_RESERVATIONS_PER_USER`: not paid yet, in all sessions; 0: as many as they like.
    pub open_reservations_max: u32,
    /// `MAX_SEATS_PER_USER_AND_SESSION`: held and bought; 0: as many as they like.
    pub seats_per_session_max: u32,
}

impl Rules {
    /// The hold time in the form that sqlx binds as an interval.
    #[must_use]
    pub fn hold_interval(&self) -> TimeDelta {
        TimeDelta::from_std(self.hold_time).unwrap_or(TimeDelta::MAX)
    }
}

impl Settings {
    /// Reads them; `port` is the process's usual one.
    ///
    /// # Errors
    /// Every fault found.
    pub fn read(mut reader: SettingsReader, port: u16) -> Result<Self, SettingsError> {
        let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
        if !reader.or("MOCK_PAYMENT_ENABLED", true) {
            reader.fault("MOCK_PAYMENT_ENABLED=false leaves no payment provider: this version has the mock one only");
        }
        let common = Common::read(&mut reader, port);
        let trust = common.trust.clone();
        let settings = Self {
            database_url: trust.database_url(
                reader.address("DATABASE_URL", "postgres://booking_user:booking_password@localhost:5434/booking_db"),
            ),
            database_connections_max: reader.within("DATABASE_CONNECTIONS_MAX", 20, 2, 1000),
            redis_url: reader.secret("REDIS_URL", "redis://localhost:6379"),
            event_service_url: reader.or("EVENT_SERVICE_URL", "http://localhost:8000".to_owned()),
            broker: Broker {
                url: reader.address("RABBITMQ_URL", "amqp://guest:guest@localhost:5672/%2f"),
                exchange: reader.or("RABBITMQ_EXCHANGE", booking_event::EXCHANGE.to_owned()),
                trust,
            },
            queue: reader.or("RABBITMQ_QUEUE", booking_event::QUEUE.to_owned()),
            rules: Rules {
                hold_time: reader.duration("RESERVATION_TIMEOUT_MINUTES", minute, 10.0, 0.02, 1440.0),
                seats_max: reader.within("MAX_SEATS_PER_RESERVATION", 10, 1, 100),
                open_reservations_max: reader.within("MAX_OPEN_RESERVATIONS_PER_USER", 10, 0, 1_000_000),
                seats_per_session_max: reader.within("MAX_SEATS_PER_USER_AND_SESSION", 20, 0, 1_000_000),
            },
            // So that an expired seat is back on sale within two seconds, whatever the phase.
            expiry_interval: reader.duration("EXPIRY_WORKER_INTERVAL_SECONDS", second, 1.0, 0.1, 3600.0),
            reconcile_interval: reader.duration("RECONCILE_INTERVAL_SECONDS", second, 5.0, 0.1, 3600.0),
            expiry_batch_size: reader.within("EXPIRY_BATCH_SIZE", 500, 1, 1000),
            audit_interval: Some(reader.duration("AUDIT_INTERVAL_MINUTES", minute, 0.0, 0.0, 10080.0))
                .filter(|interval| !interval.is_zero()),
            mock_payment_success_rate: reader.within("MOCK_PAYMENT_SUCCESS_RATE", 1.0, 0.0, 1.0),
            webhook_secrets: ["PAYMENT_WEBHOOK_SECRET", "PAYMENT_WEBHOOK_SECRET_PREVIOUS"]
                .into_iter()
                .filter_map(|name| reader.optional(name).map(|secret| Secret::from(secret.as_str())))
                .collect(),
            common,
        };
        let links = [
            ("DATABASE_URL", settings.database_url.reveal()),
            ("REDIS_URL", settings.redis_url.reveal()),
            ("RABBITMQ_URL", settings.broker.url.reveal()),
            ("EVENT_SERVICE_URL", settings.event_service_url.as_str()),
        ];
        settings.common.require_tls(&mut reader, &links);
        reader.finish(settings)
    }
}
