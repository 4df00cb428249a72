//! Random sequences of changes. A model makes them, a test plays them against the real thing, and the library shortens
//! one that fails as far as possible.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use proptest_state_machine::ReferenceStateMachine;

use super::scale;

/// The time limit for shortening a failing sequence, because each try is a whole case.
const SHRINK_TIME_MAX_MILLIS: u32 = 60_000;

/// Plays many values of `strategy`, and panics with the smallest that makes `play` panic.
///
/// Every run plays the same values, so a failure can be repeated. `PROPTEST_RNG_SEED=2` plays others, and
/// `PROPTEST_CASES=1000` plays that many of them.
pub fn for_all<S: Strategy>(strategy: &S, usual_cases: usize, play: impl Fn(S::Value)) {
    let environment = Config::default();
    let mut runner = TestRunner::new(Config {
        cases: scale("PROPTEST_CASES", usual_cases) as u32,
        rng_seed: match environment.rng_seed {
            RngSeed::Random => RngSeed::Fixed(1),
            fixed @ RngSeed::Fixed(_) => fixed,
        },
        max_shrink_time: SHRINK_TIME_MAX_MILLIS,
        // The seed is enough to repeat a failure.
        failure_persistence: None,
        ..environment
    });
    let played = runner.run(strategy, |value| {
        play(value);
        Ok(())
    });
    if let Err(error) = played {
        panic!("{error}\n{runner}");
    }
}

/// Plays many sequences of the changes that `Model` makes, as [`for_all`] does.
pub fn for_all_sequences<Model: ReferenceStateMachine>(
    steps: Range<usize>,
    usual_cases: usize,
    play: impl Fn(Sequence<Model>),
) {
    for_all(&Model::sequential_strategy(steps), usual_cases, |(model, changes, seen)| {
        play(Sequence { model, changes: changes.into_iter(), seen });
    });
}

/// One sequence: each change, with the state of the model after it.
pub struct Sequence<Model: ReferenceStateMachine> {
    model: Model::State,
    changes: std::vec::IntoIter<Model::Transition>,
    /// Counts the changes that were played before a failure. The library cuts off the later ones first.
    seen: Option<Arc<AtomicUsize>>,
}

impl<Model: ReferenceStateMachine> Iterator for Sequence<Model> {
    type Item = (Model::Transition, Model::State);

    fn next(&mut self) -> Option<Self::Item> {
        let change = self.changes.next()?;
        if let Some(seen) = &self.seen {
            seen.fetch_add(1, Ordering::SeqCst);
        }
        self.model = Model::apply(self.model.clone(), &change);
        Some((change, self.model.clone()))
    }
}
