//! Publishes batches. Each message has an outcome of its own, and one connection serves until it fails.

use std::collections::HashSet;

use anyhow::{Context, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use tokio::sync::Mutex;
use uuid::Uuid;

use super::connection::{Broker, CONNECT_TIMEOUT, PERSISTENT, PUBLISH_TIMEOUT, TRACEPARENT};
use crate::observe::traces;

/// A message to publish.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Stays the same when the message is published again, so that consumers recognize a repeat.
    pub message_id: Uuid,
    /// The routing key; also the AMQP `type`.
    pub routing_key: String,
    /// The message's body, as JSON bytes.
    pub body: Vec<u8>,
    /// When the change was made: seconds since 1970.
    pub timestamp: u64,
    /// W3C trace context of the request that made the change.
    pub traceparent: Option<String>,
}

/// The outcome of publishing a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// RabbitMQ has stored the message in a queue, on disk.
    Confirmed,
    /// No queue is bound for it. The broker confirms such a message too, and drops it.
    Unroutable,
    /// The broker refused it.
    Refused,
}

/// Publishes over one connection, and replaces it after any fault.
pub struct Publisher {
    broker: Broker,
    name: &'static str,
    link: Mutex<Option<Link>>,
}

struct Link {
    connection: Connection,
    channel: Channel,
    /// A batch on this channel failed or timed out. Its late confirms could carry the returned messages of a later
    /// batch, so the next batch needs a new connection.
    is_tainted: bool,
}

impl Publisher {
    /// Creates a publisher; it does not connect yet. `name` shows in RabbitMQ's management page and as `app_id`.
    #[must_use]
    pub fn new(broker: Broker, name: &'static str) -> Self {
        Self { broker, name, link: Mutex::new(None) }
    }

    /// Connects unless there is a usable connection.
    ///
    /// # Errors
    /// RabbitMQ can't be reached, or it takes no messages because it is short of memory or disk.
    pub async fn connect_if_needed(&self) -> anyhow::Result<()> {
        let mut link = self.link.lock().await;
        let is_up = |link: &&Link| link.connection.status().connected() && link.channel.status().connected();
        match link.as_ref().filter(is_up) {
            Some(link) if link.connection.status().blocked() => {
                bail!("the broker takes no messages: it is short of memory or disk")
            }
            Some(link) if !link.is_tainted => {}
            _ => {
                *link = None;
                *link = Some(self.connect().await?);
            }
        }
        Ok(())
    }

    /// Publishes all of `batch` and waits for all confirms.
    ///
    /// # Errors
    /// There is no connection, or RabbitMQ stopped answering: any of the messages may or may not have been published.
    pub async fn publish(&self, batch: &[Outgoing]) -> anyhow::Result<Vec<Published>> {
        let mut link = self.link.lock().await;
        // Taken out, so that a fault or a cancelled call leaves no half-used channel behind.
        let Link { connection, channel, .. } = link.take().context("there is no connection to the broker")?;
        let outcomes = tokio::time::timeout(PUBLISH_TIMEOUT, self.publish_on(&channel, batch)).await;
        // Keep a blocked connection. A broker that is short of memory or disk does not read the close. A dropped
        // connection would stay open beside the next one, on both sides, until the alarm ends.
        let is_tainted = !matches!(outcomes, Ok(Ok(_)));
        if !is_tainted || connection.status().blocked() {
            *link = Some(Link { connection, channel, is_tainted });
        }
        outcomes.context("the broker gave no confirm in time")?
    }

    async fn connect(&self) -> anyhow::Result<Link> {
        let connection = self.broker.connect(self.name).await?;
        let set_up = async {
            let channel = connection.create_channel().await?;
            self.broker.declare_exchange(&channel).await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            anyhow::Ok(channel)
        };
        let channel =
            tokio::time::timeout(CONNECT_TIMEOUT, set_up).await.context("the broker opened no channel in time")??;
        Ok(Link { connection, channel, is_tainted: false })
    }

    async fn publish_on(&self, channel: &Channel, batch: &[Outgoing]) -> anyhow::Result<Vec<Published>> {
        let mut confirms = Vec::with_capacity(batch.len());
        for message in batch {
            let mut traceparent = message.traceparent.clone();
            let span = traces::PublishSpan::begin(&self.broker.exchange, &message.routing_key, &mut traceparent);
            // `mandatory`: an unroutable message comes back instead of vanishing.
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let exchange = self.broker.exchange.as_str().into();
            let routing_key = message.routing_key.as_str().into();
            let properties = self.properties(message, traceparent);
            let confirm = channel.basic_publish(exchange, routing_key, options, &message.body, properties).await?;
            confirms.push((confirm, span));
        }
        let (mut taken, mut returned) = (Vec::with_capacity(batch.len()), HashSet::new());
        let mut spans = Vec::with_capacity(batch.len());
        for (confirm, span) in confirms {
            let (is_taken, came_back) = match confirm.await? {
                Confirmation::Ack(came_back) => (true, came_back),
                Confirmation::Nack(came_back) => (false, came_back),
                Confirmation::NotRequested => bail!("the channel is not in confirm mode"),
            };
            taken.push(is_taken);
            returned.extend(came_back.and_then(|came_back| {
                came_back.delivery.properties.message_id().as_ref().map(|id| id.as_str().to_owned())
            }));
            spans.push(span);
        }
        let outcomes = judged(batch, &taken, &returned);
        for (span, outcome) in spans.into_iter().zip(&outcomes) {
            span.finish(*outcome == Published::Confirmed);
        }
        Ok(outcomes)
    }

    fn properties(&self, message: &Outgoing, traceparent: Option<String>) -> BasicProperties {
        let mut headers = FieldTable::default();
        if let Some(traceparent) = traceparent {
            headers.insert(TRACEPARENT.into(), AMQPValue::LongString(traceparent.into()));
        }
        BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_message_id(message.message_id.to_string().into())
            .with_content_type("application/json".into())
            .with_type(message.routing_key.as_str().into())
            .with_timestamp(message.timestamp)
            .with_app_id(self.name.into())
            .with_headers(headers)
    }
}

/// The outcome of each message of a batch. The ids say which messages came back, because the library hands a returned
/// message out with any confirm of the same frame.
fn judged(batch: &[Outgoing], taken: &[bool], returned: &HashSet<String>) -> Vec<Published> {
    let judge = |(message, is_taken): (&Outgoing, &bool)| match is_taken {
        false => Published::Refused,
        true if returned.contains(&message.message_id.to_string()) => Published::Unroutable,
        true => Published::Confirmed,
    };
    batch.iter().zip(taken).map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Outgoing {
        Outgoing {
            message_id: Uuid::now_v7(),
            routing_key: "nobody.listens".into(),
            body: Vec::new(),
            timestamp: 0,
            traceparent: None,
        }
    }

    /// One frame confirms the first two messages. The library hands the returned second message out with the first
    /// confirm.
    #[test]
    fn what_came_back_is_told_by_its_id_and_not_by_the_confirm_that_it_came_with() {
        let batch = [message(), message(), message()];
        let returned = HashSet::from([batch[1].message_id.to_string()]);
        let expected = [Published::Confirmed, Published::Unroutable, Published::Refused];
        assert_eq!(judged(&batch, &[true, true, false], &returned), expected);
    }
}
