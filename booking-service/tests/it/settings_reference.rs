//! The reference of the settings: the documents have what the services print, and the compose files pass on what
//! `.env.example` lists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn page(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What both services print, the common sections once.
fn printed(as_env_file: bool, title: &str) -> String {
    let booking = booking_service::settings::Settings::reference(as_env_file);
    let own = booking.find(title).unwrap();
    event_service::settings::Settings::reference(as_env_file) + &booking[own..]
}

fn between_marks(page: &str) -> &str {
    let (_, rest) = page.split_once("scripts/settings.sh writes from here").unwrap();
    let (_, rest) = rest.split_once('\n').unwrap();
    let (inside, _) = rest.split_once("to here").unwrap();
    inside.rsplit_once('\n').unwrap().0
}

#[test]
fn the_documents_have_the_settings_that_the_services_print() {
    let remedy = "run scripts/settings.sh";
    let table = page("docs/reference/settings.md");
    assert_eq!(between_marks(&table).trim(), printed(false, "## Booking Service").trim(), "{remedy}");
    let env_file = page(".env.example");
    assert_eq!(between_marks(&env_file).trim(), printed(true, "# --- Booking Service").trim(), "{remedy}");
}

/// The names in `${NAME:-default}`, outside comments.
fn substituted(compose: &str) -> BTreeSet<&str> {
    let lines = compose.lines().filter(|line| !line.trim_start().starts_with('#'));
    let after = lines.flat_map(|line| line.split("${").skip(1));
    after.filter_map(|rest| rest.split_once(":-")).map(|(name, _)| name).collect()
}

#[test]
fn the_compose_files_pass_on_the_variables_of_the_example() {
    let files = ["docker-compose.yml", "deploy/services.yml"].map(page);
    let passed_on: BTreeSet<&str> = files.iter().flat_map(|file| substituted(file)).collect();
    let example = page(".env.example");
    let listed: BTreeSet<&str> = example
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    assert_eq!(passed_on, listed);
}
