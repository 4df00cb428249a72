//! The broker: how to connect to it, and the names and headers that all parts of this folder share.

use std::time::Duration;

use anyhow::Context;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::runtime::default_runtime;
use lapin::tcp::OwnedTLSConfig;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};

use crate::http::tls::Trust;
use crate::process::settings::Secret;

/// TCP, handshake and declarations together; the library has no time-out of its own there.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A batch and all its confirms. Past it, a message's fate is unknown, never "not sent".
pub(super) const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
/// Seconds between heartbeats: a dead peer is noticed after two. RabbitMQ advises 5 to 20.
pub(super) const HEARTBEAT_SECONDS: u32 = 10;
/// Farewells to a broker that may be frozen: nothing is lost without them.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// AMQP delivery mode: written to disk.
pub(super) const PERSISTENT: u8 = 2;

/// The header that says why a message was set aside.
pub(super) const REASON: &str = "x-reason";
/// The header that says what a message was about, once it goes by the names of queues.
pub(super) const ORIGINAL_ROUTING_KEY: &str = "x-original-routing-key";
/// The header with the W3C trace context.
pub(super) const TRACEPARENT: &str = "traceparent";

/// A header's text.
pub(super) fn text_header(properties: &BasicProperties, name: &str) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// Where the broker is, and the exchange that both sides meet at.
#[derive(Debug, Clone)]
pub struct Broker {
    /// `amqp://user:password@host:5672/%2f`
    pub url: Secret,
    /// A durable topic exchange; either side declares it.
    pub exchange: String,
    /// Whom to believe where the URL is `amqps://...`.
    pub trust: Trust,
}

impl Broker {
    pub(super) async fn connect(&self, name: &'static str) -> anyhow::Result<Connection> {
        let url = self.url.reveal();
        let separator = if url.contains('?') { '&' } else { '?' };
        let url = if url.contains("heartbeat=") {
            url.to_owned()
        } else {
            format!("{url}{separator}heartbeat={HEARTBEAT_SECONDS}")
        };
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let tls = OwnedTLSConfig { identity: None, cert_chain: self.trust.own_pem() };
        let connecting = Connection::connect_with_config(&url, properties, tls, default_runtime()?);
        tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .context("the broker of RABBITMQ_URL does not answer in time")?
            .context("can't connect to the broker of RABBITMQ_URL")
    }

    /// How many messages wait in a queue.
    ///
    /// # Errors
    /// The broker does not answer, or there is no such queue.
    pub async fn messages_in(&self, queue: &str) -> anyhow::Result<u32> {
        let connection = self.connect("queue length").await?;
        let channel = connection.create_channel().await?;
        let look = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let found = channel.queue_declare(queue.into(), look, FieldTable::default()).await;
        let found = found.with_context(|| format!("the broker has no queue {queue}"))?.message_count();
        drop(tokio::time::timeout(CLOSE_TIMEOUT, connection.close(200, "done".into())).await);
        Ok(found)
    }

    pub(super) async fn declare_exchange(&self, channel: &Channel) -> anyhow::Result<()> {
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel
            .exchange_declare(self.exchange.as_str().into(), ExchangeKind::Topic, durable, FieldTable::default())
            .await
            .with_context(|| format!("can't declare exchange {}", self.exchange))
    }
}

/// The queue of the messages that were set aside from `queue`, each with its reason.
#[must_use]
pub fn dead_letters_of(queue: &str) -> String {
    format!("{queue}.dead")
}
