//! RabbitMQ: publishing with confirms, consuming with acknowledgements after the effect, and dead letters.

mod acks;
mod connection;
mod consumer;
pub mod dead_letters;
mod publisher;

pub use connection::{Broker, dead_letters_of};
pub use consumer::{ConsumedQueue, ConsumerMetrics, Incoming, Verdict, consume};
pub use publisher::{Outgoing, Published, Publisher};
