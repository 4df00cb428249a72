//! The order of the files: no arrow runs up, and no file stands in a circle. An arrow is a path of one file in the code of another.

mod graph;

use std::collections::BTreeMap;
use std::path::Path;

use graph::Graph;

/// The floors of each crate, from the top. A floor names files by their module paths, or whole folders. A file may name those of its own
/// floor and of the floors below.
const FLOORS: [(&str, &[&str]); 5] = [
    (
        "booking-service",
        &[
            "main",
            "app",
            "worker tickets::routes",
            "workflows",
            "replay audit price_tiers",
            "state",
            "metrics reservations",
            "outbox payments seat_locks event_client idempotency settings tier_cache tickets schema lib",
        ],
    ),
    (
        "event-service",
        &[
            "main",
            "app",
            "state internal_api booking_consumer",
            "seat_map",
            "catalogue holds",
            "session_seats sale",
            "error metrics seen_snapshot settings lib",
        ],
    ),
    (
        "service-kit",
        &[
            "testing",
            "http::server",
            "http::layers http::openapi http::extract http::query http::connections http::security_headers observe::telemetry",
            "process::common",
            "auth admit amqp",
            "http::rules http::json http::etag http::answer observe::metrics observe::traces postgres::batch",
            "http::error",
            "http::tls http::client_address postgres::database process::lifecycle production",
            "process http lib observe postgres",
        ],
    ),
    (
        "shared-contracts",
        &["seat_api transitions", "problem booking_event", "seat", "ids money currency label text page lib"],
    ),
    (
        "load-test",
        &[
            "main",
            "html",
            "compare report",
            "scenarios",
            "measured",
            "bench sale",
            "lib",
            "arrivals audit databases",
            "measure http system processes plot",
        ],
    ),
];

fn graph_of(crate_name: &str) -> Graph {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let graph = Graph::of_crate(&top.join(crate_name));
    assert!(graph.arrows.len() > 8, "{crate_name} has only {} files", graph.arrows.len());
    graph
}

/// The floor of a file, counted from the top: that of the longest name that fits.
fn floor_of(file: &str, floors: &[&str]) -> Option<usize> {
    let fits = |name: &str| file == name || file.starts_with(&format!("{name}::"));
    let all = floors.iter().enumerate().flat_map(|(floor, names)| names.split(' ').map(move |name| (floor, name)));
    all.filter(|(_, name)| fits(name)).max_by_key(|(_, name)| name.len()).map(|(floor, _)| floor)
}

fn upward_arrows(graph: &Graph, floors: &[&str]) -> Vec<String> {
    let mut upward = Vec::new();
    for (from, targets) in &graph.arrows {
        let Some(own) = floor_of(from, floors) else {
            upward.push(format!("{from} has no floor"));
            continue;
        };
        let above = targets.iter().filter(|to| floor_of(to, floors).is_some_and(|floor| floor < own));
        upward.extend(above.map(|to| format!("{from} names {to}, which is above it")));
    }
    upward
}

#[test]
fn no_file_of_any_crate_stands_in_a_circle() {
    for (crate_name, _) in FLOORS {
        let graph = graph_of(crate_name);
        let circles: Vec<String> = graph.circles().iter().map(|circle| circle.join(", ")).collect();
        assert!(circles.is_empty(), "{crate_name}: {} circles:\n{}", circles.len(), circles.join("\n"));
    }
}

#[test]
fn no_arrow_between_files_runs_up() {
    for (crate_name, floors) in FLOORS {
        let upward = upward_arrows(&graph_of(crate_name), floors);
        assert!(upward.is_empty(), "{crate_name}:\n{}", upward.join("\n"));
    }
}

/// Every way in which a file can name another, and what only looks so.
#[test]
fn arrows_are_read_from_the_code_alone() {
    let texts = BTreeMap::from(
        [
            ("lib", "pub mod a; pub mod b; pub mod c;"),
            ("a", "use crate::{b, c::{self, Thing}}; // crate::d::not_here\n/// [`crate::d`]\npub(crate) fn f() {}"),
            ("b", "fn f() -> &'static str { super::c::d::g(); \"crate::a::in_a_string\" }"),
            ("c", "pub mod d; use d::Inner; #[cfg(test)] mod tests { use crate::a; } pub(super) struct Thing;"),
            ("c::d", "macro_rules! m { () => { $crate::e::h() } } pub fn g(x: other::a::Y) { self::k() }"),
            ("e", "use this_crate::c::d::g;"),
        ]
        .map(|(module, text)| (module.to_owned(), text.to_owned())),
    );
    let graph = Graph::of_texts(&texts, "this_crate");
    let shown: Vec<String> = graph
        .arrows
        .iter()
        .map(|(from, to)| format!("{from}: {}", to.iter().cloned().collect::<Vec<_>>().join(" ")))
        .collect();
    assert_eq!(shown, ["a: b c", "b: c::d", "c: c::d", "c::d: e", "e: c::d", "lib: "]);
    assert_eq!(graph.circles(), [vec!["c::d", "e"]]);
    assert_eq!(upward_arrows(&graph, &["e lib", "a b c"]), ["c::d names e, which is above it"]);
    assert_eq!(upward_arrows(&graph, &["a lib", "b c"]), ["e has no floor"]);
}
