//! A consumer that reconnects after every fault, and acknowledges each message after its effect is committed.
//!
//! The client library's own recovery stays off. With it, a channel error leaves the consumer silent for ever, while the
//! connection seems healthy. Here any error, and the end of the stream, closes the connection, and the consumer opens a
//! new one.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use backon::{BackoffBuilder, ExponentialBuilder};
use futures::TryStreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{Channel, Confirmation, Connection};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use uuid::Uuid;

use super::acks::Acks;
use super::connection::{
    Broker, CLOSE_TIMEOUT, CONNECT_TIMEOUT, ORIGINAL_ROUTING_KEY, PERSISTENT, PUBLISH_TIMEOUT, REASON, TRACEPARENT,
    dead_letters_of, text_header,
};
use crate::observe::metrics::{GaugeVec, IntCounterVec, IntGauge, Metrics};
use crate::observe::traces;

/// Unacknowledged messages that RabbitMQ sends ahead: enough to keep the consumer busy, and few to redeliver after a
/// crash.
const PREFETCH: u16 = 128;
/// Messages that one consumer handles at a time. The handler can apply messages in progress as one batch.
const HANDLED_AT_ONCE: usize = 64;
/// Redeliveries before RabbitMQ itself dead-letters a message. Each lost connection counts one for every prefetched
/// message, so the limit is far above the restarts of a bad day. This consumer dead-letters failing messages earlier,
/// with a reason.
const DELIVERY_LIMIT: i64 = 100;
/// Tries of a message that fails by its own fault. After the last one the consumer dead-letters it.
const TRIES_MAX: usize = 6;
/// The limit for handling one message. After it, the handler's transaction rolls back and the consumer tries again.
const HANDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// How often this consumer counts the dead letters.
const DEAD_LETTERS_COUNTED_EVERY: Duration = Duration::from_secs(2);
/// A message that RabbitMQ has delivered.
#[derive(Debug)]
pub struct Incoming {
    /// The routing key that the message was first published with.
    pub routing_key: String,
    /// The bytes of the message, as published.
    pub body: Vec<u8>,
}

/// The handler's result for a message.
#[derive(Debug)]
pub enum Verdict {
    /// The message's effect is committed. The consumer acknowledges it.
    Done,
    /// Something that all messages need does not answer, such as the database. The consumer keeps this message and
    /// tries again without limit.
    Unavailable(anyhow::Error),
    /// This message failed. The consumer tries it a few more times, then dead-letters it.
    Failed(anyhow::Error),
    /// The message can never be handled. The consumer dead-letters it at once.
    Poison(anyhow::Error),
}

/// Counts of messages and dead letters, and whether the consumer is registered.
#[derive(Debug, Clone)]
pub struct ConsumerMetrics {
    /// Messages by result. The handler counts its own results; the consumer adds `retried` and `dead_lettered`.
    pub messages: IntCounterVec,
    up: IntGauge,
    dead_letters: GaugeVec,
}

impl ConsumerMetrics {
    /// Registers the metrics under names that begin with `prefix` and an underscore.
    ///
    /// # Errors
    /// A name is taken or invalid.
    pub fn register(metrics: &Metrics, prefix: &str) -> anyhow::Result<Self> {
        let name = |name: &str| format!("{prefix}_{name}");
        let messages = "Messages consumed, by result; `retried` counts each try that failed.";
        let up = "1 while the consumer is registered at RabbitMQ, else 0.";
        let aside = "Messages in the dead letter queue; absent while the broker is away.";
        Ok(Self {
            messages: metrics.counters(&name("messages_total"), messages, &["result"])?,
            up: metrics.gauge(&name("up"), up)?,
            dead_letters: metrics.gauges(&name("dead_letters"), aside, &[])?,
        })
    }
}

/// A durable quorum queue, its bindings, and whether its consumer is up.
#[derive(Debug, Clone)]
pub struct ConsumedQueue {
    /// The queue's name. Dead letters go to `<name>.dead`.
    pub name: String,
    /// The routing keys that bind the queue to the exchange.
    pub routing_keys: Vec<&'static str>,
    /// True while a consumer is registered. The consumer sets it, for health checks.
    pub up: Arc<AtomicBool>,
    /// The metrics that the consumer sets.
    pub metrics: ConsumerMetrics,
}

/// Consumes `queue` until `stopping` is cancelled. Each message is acknowledged after `handle` has committed its
/// effect.
///
/// # Errors
/// None: after a fault the consumer connects again. The result fits the signature of a task of the process.
pub async fn consume<F: Future<Output = Verdict>>(
    broker: Broker,
    queue: ConsumedQueue,
    stopping: CancellationToken,
    handle: impl Fn(Arc<Incoming>) -> F,
) -> anyhow::Result<()> {
    while !stopping.is_cancelled() {
        let delays = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(10))
            .with_jitter()
            .without_max_times();
        for delay in delays.build() {
            let outcome = consume_until_fault(&broker, &queue, &stopping, &handle).await;
            let was_up = queue.up.swap(false, Ordering::Relaxed);
            queue.metrics.up.set(0);
            queue.metrics.dead_letters.reset();
            let Err(error) = outcome else { return Ok(()) };
            tracing::warn!(
                error = format!("{error:#}"),
                retry_in_ms = delay.as_millis(),
                "RabbitMQ consumer lost; it will come back"
            );
            if stopping.run_until_cancelled(tokio::time::sleep(delay)).await.is_none() {
                return Ok(());
            }
            if was_up {
                break; // It had worked, so the next fault is a new one: begin with short delays again.
            }
        }
    }
    Ok(())
}

async fn consume_until_fault<F: Future<Output = Verdict>>(
    broker: &Broker,
    queue: &ConsumedQueue,
    stopping: &CancellationToken,
    handle: &impl Fn(Arc<Incoming>) -> F,
) -> anyhow::Result<()> {
    let connection = broker.connect("event-service").await?;
    let tag = format!("{}-{}", queue.name, Uuid::now_v7());
    let set_up = async {
        let channel = connection.create_channel().await?;
        declare_queue(broker, &channel, queue).await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let aside = connection.create_channel().await?;
        aside.confirm_select(ConfirmSelectOptions::default()).await?;
        let consumer = channel
            .basic_consume(
                queue.name.as_str().into(),
                tag.as_str().into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        anyhow::Ok((channel, aside, consumer))
    };
    let (channel, aside, consumer) =
        tokio::time::timeout(CONNECT_TIMEOUT, set_up).await.context("the broker declared nothing in time")??;
    queue.up.store(true, Ordering::Relaxed);
    queue.metrics.up.set(1);
    tracing::info!(queue = queue.name, consumer_tag = tag, "RabbitMQ consumer started");

    let acks = Acks::of(&channel);
    let deliveries = futures::StreamExt::take_until(consumer, stopping.cancelled());
    let deliveries = deliveries.inspect_ok(|delivery| acks.came(delivery));
    let handled = deliveries
        .map_err(anyhow::Error::from)
        .try_for_each_concurrent(HANDLED_AT_ONCE, |delivery| settle(delivery, queue, &acks, &aside, stopping, handle));
    tokio::select! {
        handled = handled => handled?,
        // This ends only with an error, when the queue or the connection is gone.
        counted = count_dead_letters(&connection, queue) => counted?,
    }
    if !stopping.is_cancelled() {
        bail!("the broker ended the consumer, as it does when the queue is deleted");
    }
    let farewell = async {
        channel.basic_cancel(tag.as_str().into(), BasicCancelOptions::default()).await?;
        connection.close(200, "stopping".into()).await
    };
    if !matches!(tokio::time::timeout(CLOSE_TIMEOUT, farewell).await, Ok(Ok(()))) {
        tracing::info!("The broker did not confirm the close");
    }
    Ok(())
}

async fn declare_queue(broker: &Broker, channel: &Channel, queue: &ConsumedQueue) -> anyhow::Result<()> {
    broker.declare_exchange(channel).await?;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let quorum = || HashMap::from([("x-queue-type", AMQPValue::LongString("quorum".into()))]);
    let dead_letters = dead_letters_of(&queue.name);
    let table = |arguments: HashMap<&str, AMQPValue>| -> FieldTable {
        arguments
            .into_iter()
            .map(|(name, value)| (ShortString::from(name), value))
            .collect::<std::collections::BTreeMap<_, _>>()
            .into()
    };
    channel.queue_declare(dead_letters.as_str().into(), durable, table(quorum())).await?;

    let mut arguments = quorum();
    arguments.insert("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT));
    // With this strategy RabbitMQ keeps a message here until the dead letter queue has confirmed it. The strategy
    // requires the overflow policy below.
    arguments.insert("x-dead-letter-strategy", AMQPValue::LongString("at-least-once".into()));
    arguments.insert("x-overflow", AMQPValue::LongString("reject-publish".into()));
    // The default exchange routes by queue name, so the dead letter queue needs no exchange of its own.
    arguments.insert("x-dead-letter-exchange", AMQPValue::LongString("".into()));
    arguments.insert("x-dead-letter-routing-key", AMQPValue::LongString(dead_letters.into()));
    channel
        .queue_declare(queue.name.as_str().into(), durable, table(arguments))
        .await
        .with_context(|| format!("can't declare queue {}", queue.name))?;
    for key in &queue.routing_keys {
        channel
            .queue_bind(
                queue.name.as_str().into(),
                broker.exchange.as_str().into(),
                (*key).into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await?;
    }
    Ok(())
}

/// Keeps the gauge of dead letters up to date, until there is a fault.
async fn count_dead_letters(connection: &Connection, queue: &ConsumedQueue) -> anyhow::Result<()> {
    let channel = connection.create_channel().await?;
    let (dead_letters, gauge) =
        (dead_letters_of(&queue.name), queue.metrics.dead_letters.with_label_values::<&str>(&[]));
    let look = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    loop {
        let found = channel.queue_declare(dead_letters.as_str().into(), look, FieldTable::default()).await?;
        gauge.set(found.message_count().into());
        tokio::time::sleep(DEAD_LETTERS_COUNTED_EVERY).await;
    }
}

/// Handles one message inside its log span and its sender's trace.
async fn settle<F: Future<Output = Verdict>>(
    delivery: Delivery,
    queue: &ConsumedQueue,
    acks: &Acks,
    aside: &Channel,
    stopping: &CancellationToken,
    handle: &impl Fn(Arc<Incoming>) -> F,
) -> anyhow::Result<()> {
    // A requeued dead letter arrives under the queue's name; a header has its first routing key.
    let routing_key = text_header(&delivery.properties, ORIGINAL_ROUTING_KEY);
    let routing_key = routing_key.unwrap_or_else(|| delivery.routing_key.to_string());
    let traceparent = text_header(&delivery.properties, TRACEPARENT);
    let trace_id = traceparent.as_deref().and_then(traces::trace_id);
    let span = tracing::error_span!("message", trace_id);
    let incoming = Arc::new(Incoming { routing_key: routing_key.clone(), body: delivery.data.clone() });
    let work = handle_to_its_end(delivery, incoming, queue, acks, aside, stopping, handle).instrument(span);
    traces::received(traceparent.as_deref(), &queue.name, &routing_key, work).await
}

/// Handles one message until it is acknowledged after its effect, or dead-lettered with its reason.
async fn handle_to_its_end<F: Future<Output = Verdict>>(
    delivery: Delivery,
    incoming: Arc<Incoming>,
    queue: &ConsumedQueue,
    acks: &Acks,
    aside: &Channel,
    stopping: &CancellationToken,
    handle: &impl Fn(Arc<Incoming>) -> F,
) -> anyhow::Result<()> {
    tracing::info!(routing_key = incoming.routing_key, redelivered = delivery.redelivered, "Received message");
    let mut delays = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(10))
        .with_jitter()
        .without_max_times()
        .build();
    let mut failures = 0;
    loop {
        let handled = tokio::time::timeout(HANDLE_TIMEOUT, handle(Arc::clone(&incoming))).await;
        let error = match handled.unwrap_or_else(|elapsed| Verdict::Unavailable(elapsed.into())) {
            Verdict::Done => return acks.done(&delivery).await,
            Verdict::Poison(error) => return set_aside(&delivery, &incoming, queue, acks, aside, &error).await,
            Verdict::Failed(error) => {
                failures += 1;
                if failures == TRIES_MAX {
                    return set_aside(&delivery, &incoming, queue, acks, aside, &error).await;
                }
                error
            }
            Verdict::Unavailable(error) => error,
        };
        queue.metrics.messages.with_label_values(&["retried"]).inc();
        let delay = delays.next().unwrap_or(Duration::from_secs(10));
        tracing::warn!(
            error = format!("{error:#}"),
            retry_in_ms = delay.as_millis(),
            routing_key = incoming.routing_key,
            "Message not handled yet"
        );
        if stopping.run_until_cancelled(tokio::time::sleep(delay)).await.is_none() {
            return Ok(()); // Not acknowledged: the broker gives it to another consumer, or to the next run.
        }
    }
}

/// Publishes a message to the dead letter queue. It acknowledges the original only after RabbitMQ has confirmed the
/// copy.
async fn set_aside(
    delivery: &Delivery,
    incoming: &Incoming,
    queue: &ConsumedQueue,
    acks: &Acks,
    aside: &Channel,
    error: &anyhow::Error,
) -> anyhow::Result<()> {
    let reason = format!("{error:#}");
    tracing::error!(error = reason, routing_key = incoming.routing_key, "Message set aside in the dead letter queue");
    let mut headers = delivery.properties.headers().clone().unwrap_or_default();
    headers.insert(REASON.into(), AMQPValue::LongString(LongString::from(reason)));
    headers.insert(ORIGINAL_ROUTING_KEY.into(), AMQPValue::LongString(incoming.routing_key.as_str().into()));
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let properties = delivery.properties.clone().with_headers(headers).with_delivery_mode(PERSISTENT);
    let confirm =
        aside.basic_publish("".into(), dead_letters_of(&queue.name).into(), options, &delivery.data, properties);
    let confirmed = tokio::time::timeout(PUBLISH_TIMEOUT, async { confirm.await?.await })
        .await
        .context("the broker gave no confirm in time")??;
    match confirmed {
        Confirmation::Ack(None) => {
            queue.metrics.messages.with_label_values(&["dead_lettered"]).inc();
            traces::note_error(error);
            acks.done(delivery).await
        }
        other => bail!("the dead letter queue did not take the message: {other:?}"),
    }
}
