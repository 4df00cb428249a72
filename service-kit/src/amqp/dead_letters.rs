//! Dead letters: messages that were set aside, each with its reason. They can be looked at, sent again, or dropped.
//!
//! A queue can only be read by taking messages from it: a look takes them, and gives them back by not acknowledging.

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

/// The most of a body that a look shows.
const BODY_CHARS_SHOWN: usize = 4000;
/// A message that was set aside.
#[derive(Debug, Clone, Serialize)]
pub struct DeadLetter {
    /// Its id; a message that has none can only be dealt with by [`Which::All`].
    pub message_id: Option<Uuid>,
    /// What it was about.
    pub routing_key: String,
    /// Why it was set aside.
    pub reason: String,
    /// The message's body as text.
    pub body: String,
}

/// Which of them.
#[derive(Debug, Clone)]
pub enum Which {
    /// All that are there when it begins.
    All,
    /// Those with these ids.
    These(Vec<Uuid>),
}

/// What to do with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Keep,
    SendAgain,
    Drop,
}

/// The dead letters of `queue`, oldest first, `limit` at most. They stay.
///
/// # Errors
/// The broker does not answer, or there is no such queue.
pub async fn list(broker: &Broker, queue: &str, limit: usize) -> anyhow::Result<Vec<DeadLetter>> {
    walk(broker, queue, &Which::All, Fate::Keep, limit).await
}

/// Sends them to `queue` again; each leaves the dead letters when the broker has it there. Harmless for a consumer that
/// knows repeats.
///
/// # Errors
/// The broker does not answer or did not take one; those before it are sent, that one and the rest stay.
pub async fn requeue(broker: &Broker, queue: &str, which: &Which) -> anyhow::Result<Vec<DeadLetter>> {
    walk(broker, queue, which, Fate::SendAgain, usize::MAX).await
}

/// Throws them away.
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
    // What comes meanwhile, such as a message that fails again, is for another time.
    let present = broker.messages_in(&dead_letters).await? as usize;
    let connection = broker.connect("dead letters").await?;
    let walked = walk_on(&connection, queue, &dead_letters, which, fate, present.min(limit)).await;
    // What was not acknowledged goes back into the queue with the connection.
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
    // First the channel: with the connection alone, one acknowledgement in some hundreds was forgotten (measured,
    // RabbitMQ's quorum queues), and what had been sent again was among the dead letters still.
    channel.close(200, "done".into()).await.context("the broker may not have heard of all that was done")?;
    Ok(met)
}

/// To the one queue that set it aside, not through the exchange: other subscribers have handled it.
async fn send_again(channel: &Channel, queue: &str, letter: &DeadLetter, delivery: &Delivery) -> anyhow::Result<()> {
    // Without the reason; whose trace it belongs to stays.
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
            // Those that the broker set aside itself have no reason of ours.
            reason: header(REASON).or_else(|| header("x-first-death-reason")).unwrap_or_default(),
            body: String::from_utf8_lossy(&delivery.data).chars().take(BODY_CHARS_SHOWN).collect(),
        }
    }
}
