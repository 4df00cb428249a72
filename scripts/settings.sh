#!/usr/bin/env bash
# Writes the settings of both services into docs/reference/settings.md and .env.example, between their two marks.
# The services print them, so names, defaults and ranges are those of the code. Run it after a setting has changed;
# the test settings_reference:: fails until then.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# printed TITLE OPTION...: what both settings commands print; the common part, which both print, once.
printed() {
    local title=$1
    shift
    cargo run --quiet --locked -p event-service -- settings "$@"
    cargo run --quiet --locked -p booking-service -- settings "$@" | awk -v title="$title" 'index($0, title) { found = 1 } found'
}

# splice FILE TEXT: replaces the lines between the marks of FILE.
splice() {
    local file=$1 new
    new=$(TEXT=$2 awk '
        /to here/ { inside = 0 }
        !inside
        /scripts\/settings.sh writes from here/ { inside = 1; print ENVIRON["TEXT"] }' "$file")
    printf '%s\n' "$new" >"$file"
}

splice docs/reference/settings.md "
$(printed '## Booking Service')
"
splice .env.example "
$(printed '# --- Booking Service' --env-file)"
