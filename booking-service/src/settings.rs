//! The settings of the Booking Service and its worker.

use std::time::Duration;

use chrono::TimeDelta;
use service_kit::amqp::Broker;
use service_kit::process::common::Common;
use service_kit::process::settings::{Secret, SettingsError, SettingsReader};
use service_kit::process::settings_reference::{self, SHARED, Section, setting};
use shared_contracts::booking_event;

/// All settings, read once at start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The settings that all services share, such as `PORT` and the log format.
    pub common: Common,
    /// `DATABASE_URL`: PostgreSQL 15 or later.
    pub database_url: Secret,
    /// `DATABASE_CONNECTIONS_MAX`: connections of one process. All processes together must stay under the server's limit.
    pub database_connections_max: u32,
    /// `REDIS_URL`: the Redis that keeps the seat locks.
    pub redis_url: Secret,
    /// `EVENT_SERVICE_URL`: the address of the internal seat API.
    pub event_service_url: String,
    /// `RABBITMQ_URL`, `RABBITMQ_EXCHANGE`: the broker, and the exchange that events are published to.
    pub broker: Broker,
    /// `RABBITMQ_QUEUE`: the Event Service's queue. The audit counts its dead letters.
    pub queue: String,
    /// The rules of booking.
    pub rules: Rules,
    /// `EXPIRY_WORKER_INTERVAL_SECONDS`: the time between two searches for due reservations.
    pub expiry_interval: Duration,
    /// `RECONCILE_INTERVAL_SECONDS`: the time between two comparisons of holds with reservations, and of payments with
    /// their provider.
    pub reconcile_interval: Duration,
    /// `EXPIRY_BATCH_SIZE`: how many reservations one transaction ends.
    pub expiry_batch_size: u32,
    /// `AUDIT_INTERVAL_MINUTES`: the time between two audits by the worker. `None` means never, because an audit reads
    /// whole tables.
    pub audit_interval: Option<Duration>,
    /// `MOCK_PAYMENT_SUCCESS_RATE`: the share of charges that the mock provider captures, 0 to 1.
    pub mock_payment_success_rate: f64,
    /// `PAYMENT_WEBHOOK_SECRET`, and `PAYMENT_WEBHOOK_SECRET_PREVIOUS` while it is being changed: the keys with which
    /// the provider signs its notices. Without one, every notice is refused.
    pub webhook_secrets: Vec<Secret>,
}

/// The rules of booking.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// `RESERVATION_TIMEOUT_MINUTES`: how long a seat is held for its payment.
    pub hold_time: Duration,
    /// `MAX_SEATS_PER_RESERVATION`: 1 to 100.
    pub seats_max: usize,
    /// `MAX_OPEN_RESERVATIONS_PER_USER`: unpaid reservations of one user, over all sessions. 0 means no limit.
    pub open_reservations_max: u32,
    /// `MAX_SEATS_PER_USER_AND_SESSION`: seats of one session that one user may have, held and bought. 0 means no limit.
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
    /// Reads all settings; `port` is the default of `PORT`.
    ///
    /// # Errors
    /// Every fault found.
    pub fn read(mut reader: SettingsReader, port: u16) -> Result<Self, SettingsError> {
        let settings = Self::gather(&mut reader, port);
        reader.finish(settings)
    }

    /// The reference of all settings: as Markdown, or as lines of an `.env` file.
    #[must_use]
    pub fn reference(as_env_file: bool) -> String {
        let mut reader = settings_reference::reader();
        Self::gather(&mut reader, 8001);
        let write = if as_env_file { settings_reference::env_file } else { settings_reference::markdown };
        write(&[SHARED, OWN], reader.asked())
    }

    fn gather(reader: &mut SettingsReader, port: u16) -> Self {
        let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
        if !reader.or("MOCK_PAYMENT_ENABLED", true) {
            reader.fault("MOCK_PAYMENT_ENABLED=false leaves no payment provider: this version has the mock one only");
        }
        let common = Common::read(reader, port);
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
            // An expired seat must be back on sale within two seconds, wherever in the interval it expires.
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
        settings.common.require_tls(reader, &links);
        settings
    }
}

/// The settings that the Event Service does not read, or reads with other values.
const OWN: Section<'static> = Section {
    title: "Booking Service and its worker",
    settings: &[
        setting("PORT", "Port to listen on").default_is("`8001`, worker `8002`").not_in_env_file(),
        setting("DATABASE_URL", "The service's own PostgreSQL, version 15 or later").not_in_env_file(),
        setting(
            "DATABASE_CONNECTIONS_MAX",
            "Database connections of one process. The batchers have up to 15 more. In `.env` it counts for the Event \
             Service too",
        ),
        setting("EVENT_SERVICE_URL", "Address of the Event Service").not_in_env_file(),
        setting(
            "RESERVATION_TIMEOUT_MINUTES",
            "How long a seat is held. Give the same value to the service and its worker",
        ),
        setting("MAX_SEATS_PER_RESERVATION", "Seats of one reservation"),
        setting(
            "MAX_OPEN_RESERVATIONS_PER_USER",
            "Unpaid reservations of one user, over all sessions. `0` means no limit",
        ),
        setting(
            "MAX_SEATS_PER_USER_AND_SESSION",
            "Seats of one session that one user may have, held and bought. `0` means no limit",
        ),
        setting("EXPIRY_WORKER_INTERVAL_SECONDS", "How often the worker ends overdue reservations"),
        setting("EXPIRY_BATCH_SIZE", "How many reservations it ends in one transaction"),
        setting("RECONCILE_INTERVAL_SECONDS", "How often the worker reconciles holds, payments and refunds"),
        setting(
            "AUDIT_INTERVAL_MINUTES",
            "How often the worker audits and shows violations in its metrics. `0` means never, because an audit reads \
             whole tables",
        ),
        setting("MOCK_PAYMENT_ENABLED", "`false` is refused: there is no other payment provider yet"),
        setting("MOCK_PAYMENT_SUCCESS_RATE", "Share of payments that the mock provider accepts"),
        setting(
            "PAYMENT_WEBHOOK_SECRET",
            "The key with which the payment provider signs its notices. Without it every notice is refused",
        ),
        setting("PAYMENT_WEBHOOK_SECRET_PREVIOUS", "A second key that is accepted too, while you change the key"),
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_that_is_read_is_in_the_reference() {
        let mut reader = settings_reference::reader();
        Settings::gather(&mut reader, 8001);
        let differences = service_kit::testing::settings::differences(&[SHARED, OWN], reader.asked());
        assert!(differences.is_empty(), "{differences:#?}");
    }
}
