//! Crash points: named places between two effects, at which a test aborts the process as a power failure would.
//!
//! In a build for tests, `CRASH_AT=booking.reserved` aborts the process when it first reaches that place.
//! `CRASH_AT=booking.reserved:7` aborts it at the seventh time. Other builds have no crash points.

/// Does nothing: only builds for tests have crash points.
#[cfg(not(feature = "testing"))]
#[inline(always)]
pub fn crash_point(_name: &'static str) {}

/// Aborts the process if `CRASH_AT` names this place and this pass.
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
