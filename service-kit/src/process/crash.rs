//! Named places at which a test has the process die, as if the power had gone: the moments between two effects.
//!
//! In a build for tests `CRASH_AT=booking.reserved` aborts the process when it first comes by that place,
//! `CRASH_AT=booking.reserved:7` at the seventh time. In any other build there is nothing here.

/// Dies here if a test wants it so.
#[cfg(not(feature = "testing"))]
#[inline(always)]
pub fn crash_point(_name: &'static str) {}

/// Dies here if a test wants it so.
#[cfg(feature = "testing")]
pub fn crash_point(name: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static WANTED: LazyLock<Option<(String, AtomicU32)>> = LazyLock::new(|| {
        #[expect(clippy::disallowed_methods, reason = "tests only, and not a setting")]
        let text = std::env::var("CRASH_AT").ok()?;
        let (place, time) = text.split_once(':').unwrap_or((&text, "1"));
        Some((place.to_owned(), AtomicU32::new(time.parse().unwrap_or(1))))
    });
    let Some((place, passes_left)) = &*WANTED else { return };
    if place == name && passes_left.fetch_sub(1, Ordering::Relaxed) == 1 {
        eprintln!("crash point {name} reached");
        std::process::abort();
    }
}
