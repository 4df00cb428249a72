//! Acknowledges messages after their effect is committed, several with one frame where possible.

use std::collections::BTreeSet;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;

/// The acknowledgements of one channel. Messages that are done at the same time share a frame, because RabbitMQ writes
/// a log entry for each acknowledgement.
pub(crate) struct Acks {
    channel: Channel,
    tags: Mutex<Tags>,
    /// Held while frames are sent: a later frame that covers more tags must not overtake an earlier one.
    sending: tokio::sync::Mutex<()>,
}

impl Acks {
    pub(crate) fn of(channel: &Channel) -> Self {
        Self { channel: channel.clone(), tags: Mutex::default(), sending: tokio::sync::Mutex::default() }
    }

    /// Records a message that has arrived, so that no multiple acknowledgement covers it before it is done.
    pub(crate) fn came(&self, delivery: &Delivery) {
        self.tags().open.insert(delivery.delivery_tag);
    }

    /// Acknowledges a message. Only the first message since the last frame sends: it yields once, so that the tasks
    /// that are ready now can add theirs. The others return at once.
    pub(crate) async fn done(&self, delivery: &Delivery) -> anyhow::Result<()> {
        if !self.tags().done(delivery.delivery_tag) {
            return Ok(());
        }
        tokio::task::yield_now().await;
        let _turn = self.sending.lock().await;
        let (through, others) = self.tags().settled();
        if let Some(tag) = through {
            self.channel.basic_ack(tag, BasicAckOptions { multiple: true }).await?;
        }
        for tag in others {
            self.channel.basic_ack(tag, BasicAckOptions::default()).await?;
        }
        Ok(())
    }

    fn tags(&self) -> MutexGuard<'_, Tags> {
        self.tags.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The delivery tags of a channel's unacknowledged messages, and which of these messages are done.
#[derive(Debug, Default)]
struct Tags {
    open: BTreeSet<u64>,
    done: BTreeSet<u64>,
}

impl Tags {
    /// Marks a message as done. Returns whether it is the first one since the last acknowledgement.
    fn done(&mut self, tag: u64) -> bool {
        self.done.insert(tag);
        self.done.len() == 1
    }

    /// Takes out the messages that are done: the highest tag up to which all are done, and the single tags beyond it.
    fn settled(&mut self) -> (Option<u64>, Vec<u64>) {
        let done = mem::take(&mut self.done);
        let through = self.open.iter().copied().take_while(|tag| done.contains(tag)).last();
        self.open.retain(|tag| !done.contains(tag));
        (through, done.into_iter().filter(|tag| Some(*tag) > through).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_is_acknowledged_once_and_nothing_else() {
        let mut tags = Tags::default();
        tags.open.extend(1..=9);
        assert!(tags.done(2) && !tags.done(1) && !tags.done(5) && !tags.done(4));
        assert_eq!(tags.settled(), (Some(2), vec![4, 5]));
        // Message 3 is still open, so message 6 is acknowledged alone.
        assert!(tags.done(6));
        assert_eq!(tags.settled(), (None, vec![6]));
        assert!(tags.done(3) && !tags.done(7));
        assert_eq!(tags.settled(), (Some(7), vec![]));
        assert!(tags.done(9) && !tags.done(8));
        assert_eq!((tags.settled(), tags.open.len()), ((Some(9), vec![]), 0));
        assert_eq!(tags.settled(), (None, vec![]));
    }
}
