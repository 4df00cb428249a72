//! Connects to RabbitMQ, and holds the names and headers that all files of this folder share.

use std::time::Duration;

use anyhow::Context;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::runtime::default_runtime;
use lapin::tcp::OwnedTLSConfig;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};

use crate::http::tls::Trust;
use crate::process::settings::Secret;

/// The limit for TCP, handshake and declarations together. The library has no timeout of its own for them.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The limit for a batch and all its confirms. After it, a message's outcome is unknown, never "not sent".
pub(super) const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
/// Seconds between heartbeats: two missed ones reveal a dead peer. RabbitMQ advises 5 to 20.
pub(super) const HEARTBEAT_SECONDS: u32 = 10;
/// The limit for closing a connection to a broker that may be frozen. Nothing is lost if the close fails.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// AMQP delivery mode: written to disk.
pub(super) const PERSISTENT: u8 = 2;

/// The header with the reason why a message was dead-lettered.
pub(super) const REASON: &str = "x-reason";
/// The header with a message's first routing key. Dead-lettered and requeued messages are routed by queue name instead.
pub(super) const ORIGINAL_ROUTING_KEY: &str = "x-original-routing-key";
/// The header with the W3C trace context.
pub(super) const TRACEPARENT: &str = "traceparent";

/// The value of a header; `None` if the header is absent or not text.
pub(super) fn text_header(properties: &BasicProperties, name: &str) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// The address of RabbitMQ, and the exchange that publishers and consumers share.
#[derive(Debug, Clone)]
pub struct Broker {
    /// `amqp://user:password@host:5672/%2f`
    pub url: Secret,
    /// A durable topic exchange; either side declares it.
    pub exchange: String,
    /// The certificate authorities to trust if the URL is `amqps://...`.
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

/// The name of the dead letter queue of `queue`. Each message there has its reason in a header.
#[must_use]
pub fn dead_letters_of(queue: &str) -> String {
    format!("{queue}.dead")
}
