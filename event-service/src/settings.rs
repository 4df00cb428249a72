//! This service's settings.

use std::net::SocketAddr;

use service_kit::amqp::Broker;
use service_kit::process::common::Common;
use service_kit::process::settings::{Secret, SettingsError, SettingsReader};
use service_kit::process::settings_reference::{self, SHARED, Section, setting};
use shared_contracts::booking_event;

/// All settings of the process, read once at start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The settings that all services share, such as `PORT` and the log format.
    pub common: Common,
    /// `INTERNAL_HOST`, `INTERNAL_PORT`: the only address of the internal API. Without a port, it shares the public
    /// address.
    pub internal_listen: Option<SocketAddr>,
    /// `DATABASE_URL`: PostgreSQL 15 or later.
    pub database_url: Secret,
    /// `DATABASE_CONNECTIONS_MAX`: connections of one replica. All replicas together must stay under the server's limit.
    pub database_connections_max: u32,
    /// `SEAT_STREAM_WATCHERS_MAX`: open seat map streams of one replica. Each is an open file; the default fits under
    /// the usual limit of 1,024.
    pub seat_stream_watchers_max: u32,
    /// `RABBITMQ_URL`, `RABBITMQ_EXCHANGE`: the broker, and the exchange to which the Booking Service publishes.
    pub broker: Broker,
    /// `RABBITMQ_QUEUE`: the queue of booking events, which all replicas share.
    pub queue: String,
}

impl Settings {
    /// Reads all settings from the environment.
    ///
    /// # Errors
    /// Lists every setting that is wrong.
    pub fn from_env() -> Result<Self, SettingsError> {
        let mut reader = SettingsReader::from_env();
        let settings = Self::gather(&mut reader);
        reader.finish(settings)
    }

    /// The reference of all settings: as Markdown, or as lines of an `.env` file.
    #[must_use]
    pub fn reference(as_env_file: bool) -> String {
        let mut reader = settings_reference::reader();
        Self::gather(&mut reader);
        let write = if as_env_file { settings_reference::env_file } else { settings_reference::markdown };
        write(&[SHARED, OWN], reader.asked())
    }

    fn gather(reader: &mut SettingsReader) -> Self {
        let common = Common::read(reader, 8000);
        let trust = common.trust.clone();
        let settings = Self {
            internal_listen: internal_listen(reader, common.listen),
            database_url: trust.database_url(
                reader.address("DATABASE_URL", "postgres://postgres:postgres@localhost:5433/event_service"),
            ),
            database_connections_max: reader.within("DATABASE_CONNECTIONS_MAX", 20, 1, 1000),
            seat_stream_watchers_max: reader.within("SEAT_STREAM_WATCHERS_MAX", 500, 0, 100_000),
            broker: Broker {
                url: reader.address("RABBITMQ_URL", "amqp://guest:guest@localhost:5672/%2f"),
                exchange: reader.or("RABBITMQ_EXCHANGE", booking_event::EXCHANGE.to_owned()),
                trust,
            },
            queue: reader.or("RABBITMQ_QUEUE", booking_event::QUEUE.to_owned()),
            common,
        };
        let links = [("DATABASE_URL", settings.database_url.reveal()), ("RABBITMQ_URL", settings.broker.url.reveal())];
        settings.common.require_tls(reader, &links);
        settings
    }
}

fn internal_listen(reader: &mut SettingsReader, public: SocketAddr) -> Option<SocketAddr> {
    let host = reader.or("INTERNAL_HOST", public.ip());
    // 0 means not set.
    let port = Some(reader.or("INTERNAL_PORT", 0)).filter(|port| *port != 0)?;
    if port == public.port() {
        reader.fault(format!("INTERNAL_PORT={port} is also PORT; give the internal API another port, or none"));
    }
    Some(SocketAddr::new(host, port))
}

/// The settings that the Booking Service does not read, or reads with other values.
const OWN: Section<'static> = Section {
    title: "Event Service",
    settings: &[
        setting("PORT", "Port to listen on").not_in_env_file(),
        setting("DATABASE_URL", "The service's own PostgreSQL, version 15 or later").not_in_env_file(),
        setting("DATABASE_CONNECTIONS_MAX", "Database connections of one process. The batchers have up to 15 more")
            .not_in_env_file(),
        setting(
            "INTERNAL_PORT",
            "The internal API listens on this port only, and is `404` on the other. `EVENT_SERVICE_URL` must name it; \
             `./start.sh` and the compose files do so",
        )
        .default_is("none"),
        setting("INTERNAL_HOST", "Address for the internal API").default_is("`HOST`").not_in_env_file(),
        setting("SEAT_STREAM_WATCHERS_MAX", "Seat map streams of one process at a time. Each is an open file"),
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_that_is_read_is_in_the_reference() {
        let mut reader = settings_reference::reader();
        Settings::gather(&mut reader);
        let differences = service_kit::testing::settings::differences(&[SHARED, OWN], reader.asked());
        assert!(differences.is_empty(), "{differences:#?}");
    }
}
