//! Rules of this repository that the compiler cannot check.

use std::fs;
use std::path::{Path, PathBuf};

use shared_contracts::problem::Code;

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every source file of the crates, with its path from the top and its text.
fn all() -> Vec<(String, String)> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = Vec::new();
    for crate_name in ["shared-contracts", "service-kit", "event-service", "booking-service", "load-test"] {
        sources(&top.join(crate_name).join("src"), &mut found);
    }
    assert!(found.len() > 30, "only {} files were found", found.len());
    found
        .into_iter()
        .map(|path| (path.strip_prefix(top).unwrap().display().to_string(), fs::read_to_string(&path).unwrap()))
        .collect()
}

#[test]
fn each_table_has_one_writer() {
    let writers = [
        ("session_seats", "event-service/src/session_seats.rs"),
        ("inbox", "event-service/src/booking_consumer.rs"),
        ("reservations", "booking-service/src/reservations/"),
        ("outbox", "booking-service/src/outbox.rs"),
        ("tickets", "booking-service/src/reservations/"),
        ("payments", "booking-service/src/reservations/"),
        ("refunds", "booking-service/src/reservations/"),
        ("payment_notices", "booking-service/src/workflows/payment_webhook.rs"),
        ("mock_provider_charges", "booking-service/src/payments/provider.rs"),
        ("mock_provider_refunds", "booking-service/src/payments/provider.rs"),
    ];
    for (path, text) in all() {
        for (table, writer) in writers {
            for verb in ["insert into", "update", "delete from"] {
                let writes = text.contains(&format!("{verb} {table} ")) || text.contains(&format!("{verb} {table}\n"));
                // The load test writes rows as years of use would leave them, into a system that is only tested.
                let may = path.starts_with(writer) || path.starts_with("load-test/");
                assert!(!writes || may, "{path} writes {table}; only {writer} may");
            }
        }
    }
}

#[test]
fn the_authority_on_reservations_knows_rows_only() {
    let forbidden = ["axum", "redis", "lapin", "crate::app", "crate::state", "crate::workflows"];
    let own = all().into_iter().filter(|(path, _)| path.starts_with("booking-service/src/reservations/"));
    for (path, text) in own {
        for name in forbidden {
            let named = text.lines().find(|line| !line.trim_start().starts_with("//") && line.contains(name));
            assert_eq!(named, None, "{path} names {name}");
        }
    }
}

#[test]
fn the_event_service_does_not_depend_on_the_booking_service() {
    for (path, text) in all() {
        let forbidden = match path.split('/').next().unwrap() {
            "event-service" => ["booking_service", "BOOKING_SERVICE"].as_slice(),
            "service-kit" | "shared-contracts" => ["event_service::", "booking_service::"].as_slice(),
            _ => [].as_slice(),
        };
        for name in forbidden {
            assert!(!text.contains(name), "{path} names {name}");
        }
    }
}

#[test]
fn each_file_says_what_it_is_for_and_has_at_most_600_lines() {
    for (path, text) in all() {
        assert!(text.lines().count() <= 600, "{path} has more than 600 lines");
        assert!(text.starts_with("//!"), "{path} does not say what it is for");
    }
}

#[test]
fn every_code_of_the_problem_table_is_produced_by_a_test() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = Vec::new();
    for service in ["event-service", "booking-service"] {
        sources(&top.join(service).join("tests/it"), &mut found);
    }
    let tests: String = found.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    for code in Code::ALL {
        assert!(tests.contains(&format!("\"{code}\"")), "no test expects {code}");
    }
}

#[test]
fn every_code_is_in_the_error_reference() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let guide = fs::read_to_string(top.join("docs/reference/errors.md")).unwrap();
    for code in Code::ALL {
        assert!(guide.contains(&format!("`{code}`")), "docs/reference/errors.md does not list {code}");
    }
}
