//! Dead letters: messages that could not be handled, each with its reason. Operators list, requeue or drop them.
//!
//! A queue can be read only by taking messages from it. So [`list`] takes them and does not acknowledge, and RabbitMQ
//! puts them back.

use anyhow::{Context, bail};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Confirmation, Connection};
use serde::Serialize;
use uuid::Uuid;

use super::connection::{
    Broker, CLOSE_TIMEOUT, ORIGINAL_ROUTING_KEY, PUBLISH_TIMEOUT, REASON, TRACEPARENT, dead_letters_of, text_header,
};

/// How many characters of a body a [`DeadLetter`] keeps.
const BODY_CHARS_SHOWN: usize = 4000;
/// A message of a dead letter queue.
#[derive(Debug, Clone, Serialize)]
pub struct DeadLetter {
    /// The message's id. It is null if the message has none; only [`Which::All`] selects such a message.
    pub message_id: Option<Uuid>,
    /// The routing key that the message was first published with; empty if unknown.
    pub routing_key: String,
    /// Why the message was dead-lettered: the handler's error, or RabbitMQ's reason; empty if unknown.
    pub reason: String,
    /// The message's body as text, cut off after 4000 characters.
    pub body: String,
}

/// The dead letters that a command applies to.
#[derive(Debug, Clone)]
pub enum Which {
    /// All dead letters that are there when the command begins.
    All,
    /// The dead letters with these ids.
    These(Vec<Uuid>),
}

/// The action on each selected dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Keep,
    SendAgain,
    Drop,
}

/// Lists the dead letters of `queue`, oldest first, at most `limit`. They stay in their queue.
///
/// # Errors
/// The broker does not answer, or there is no such queue.
pub async fn list(broker: &Broker, queue: &str, limit: usize) -> anyhow::Result<Vec<DeadLetter>> {
    walk(broker, queue, &Which::All, Fate::Keep, limit).await
}

/// Sends dead letters to `queue` again. Each leaves the dead letter queue after RabbitMQ has confirmed it in `queue`. A
/// crash in between repeats a message, which is harmless for a consumer that recognizes repeats.
///
/// # Errors
/// RabbitMQ does not answer, or it refuses a message. Those before it are sent; it and the rest stay.
pub async fn requeue(broker: &Broker, queue: &str, which: &Which) -> anyhow::Result<Vec<DeadLetter>> {
    walk(broker, queue, which, Fate::SendAgain, usize::MAX).await
}

/// Deletes dead letters for good.
///
/// # Errors
/// As [`list`].
pub async fn drop(broker: &Broker, queue: &str, which: &Which) -> anyhow::Result<Vec<DeadLetter>> {
    walk(broker, queue, which, Fate::Drop, usize::MAX).await
}

async fn walk(
    broker: &Broker,
    queue: &str,
    which: &Which,
    fate: Fate,
    limit: usize,
) -> anyhow::Result<Vec<DeadLetter>> {
    let dead_letters = dead_letters_of(queue);
    // Later arrivals stay, such as a requeued message that fails again.
    let present = broker.messages_in(&dead_letters).await? as usize;
    let connection = broker.connect("dead letters").await?;
    let walked = walk_on(&connection, queue, &dead_letters, which, fate, present.min(limit)).await;
    // Closing the connection puts the unacknowledged messages back into the queue.
    std::mem::drop(tokio::time::timeout(CLOSE_TIMEOUT, connection.close(200, "done".into())).await);
    walked
}

async fn walk_on(
    connection: &Connection,
    queue: &str,
    dead_letters: &str,
    which: &Which,
    fate: Fate,
    present: usize,
) -> anyhow::Result<Vec<DeadLetter>> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let mut met = Vec::new();
    for _ in 0..present {
        let Some(message) = channel.basic_get(dead_letters.into(), BasicGetOptions::default()).await? else {
            break;
        };
        let letter = DeadLetter::of(&message.delivery);
        let meant = match which {
            Which::All => true,
            Which::These(ids) => letter.message_id.is_some_and(|id| ids.contains(&id)),
        };
        if !meant {
            continue;
        }
        if fate == Fate::SendAgain {
            send_again(&channel, queue, &letter, &message.delivery).await?;
        }
        if fate != Fate::Keep {
            message.delivery.ack(BasicAckOptions::default()).await?;
        }
        met.push(letter);
    }
    // Close the channel before the connection. With the connection alone, RabbitMQ's quorum queues forgot one
    // acknowledgement in some hundreds (measured). A requeued message was then still among the dead letters.
    channel.close(200, "done".into()).await.context("the broker may not have received all acknowledgements")?;
    Ok(met)
}

/// Publishes to the one queue that dead-lettered the message, not to the exchange: other subscribers have handled it.
async fn send_again(channel: &Channel, queue: &str, letter: &DeadLetter, delivery: &Delivery) -> anyhow::Result<()> {
    // The copy keeps the trace context and loses the reason.
    let mut headers = FieldTable::default();
    let trace = delivery.properties.headers().as_ref().and_then(|headers| headers.inner().get(TRACEPARENT).cloned());
    if let Some(trace) = trace {
        headers.insert(TRACEPARENT.into(), trace);
    }
    headers
        .insert(ORIGINAL_ROUTING_KEY.into(), lapin::types::AMQPValue::LongString(letter.routing_key.as_str().into()));
    let properties = delivery.properties.clone().with_headers(headers);
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let confirm = channel.basic_publish("".into(), queue.into(), options, &delivery.data, properties);
    let confirmed = tokio::time::timeout(PUBLISH_TIMEOUT, async { confirm.await?.await })
        .await
        .context("the broker gave no confirm in time; the message may have been sent")??;
    match confirmed {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("queue {queue} did not take message {:?}: {other:?}", letter.message_id),
    }
}

impl DeadLetter {
    fn of(delivery: &Delivery) -> Self {
        let properties = &delivery.properties;
        let header = |name| text_header(properties, name);
        Self {
            message_id: properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok()),
            routing_key: header(ORIGINAL_ROUTING_KEY)
                .or_else(|| properties.kind().as_ref().map(ToString::to_string))
                .unwrap_or_default(),
            // Messages that RabbitMQ itself dead-lettered have no reason of ours.
            reason: header(REASON).or_else(|| header("x-first-death-reason")).unwrap_or_default(),
            body: String::from_utf8_lossy(&delivery.data).chars().take(BODY_CHARS_SHOWN).collect(),
        }
    }
}
