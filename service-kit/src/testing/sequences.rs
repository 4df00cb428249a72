//! Random sequences of changes: made by a model, played against the real thing, and made as short as they get when one
//! fails.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use proptest_state_machine::ReferenceStateMachine;

use super::scale;

/// A failing sequence is made shorter for no longer than this: each try is a whole case.
const SHRINK_TIME_MAX_MILLIS: u32 = 60_000;

/// Plays many values of `strategy`, and panics with the smallest that makes `play` panic.
///
/// Every run plays the same ones, so that one that fails fails again. `PROPTEST_RNG_SEED=2` plays others, and
/// `PROPTEST_CASES=1000` more than the usual number.
pub fn for_all<S: Strategy>(strategy: &S, usual_cases: usize, play: impl Fn(S::Value)) {
    let environment = Config::default();
    let mut runner = TestRunner::new(Config {
        cases: scale("PROPTEST_CASES", usual_cases) as u32,
        rng_seed: match environment.rng_seed {
            RngSeed::Random => RngSeed::Fixed(1),
            fixed @ RngSeed::Fixed(_) => fixed,
        },
        max_shrink_time: SHRINK_TIME_MAX_MILLIS,
        // The seed says it all.
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

/// One sequence: each change, and the model as it is after it.
pub struct Sequence<Model: ReferenceStateMachine> {
    model: Model::State,
    changes: std::vec::IntoIter<Model::Transition>,
    /// Tells how far it came when it failed: what lies behind that is cut off first.
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
