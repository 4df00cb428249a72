#!/usr/bin/env bash
# Runs the bash blocks of a page, docs/tutorial.md and README.md unless others are named, in one shell, against the
# system that is running. Compares what a block prints with the text or json block below it. Blocks that begin with
# ./ start or test the system and are left out. EVENT_SERVICE_PORT and BOOKING_SERVICE_PORT are as for ./start.sh.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# extract PAGE: writes $work/script, and $work/NUMBER.expected for each block with an output.
extract() {
    awk -v work="$work" '
        /^```/ {
            if (kind != "") {
                kind = ""
            } else {
                kind = substr($0, 4)
                is_first = 1
                if (kind == "bash") { number += 1; is_fresh = 1 }
                else if (kind !~ /^(text|json)$/ || !is_fresh || is_skipped) kind = "other"
                else is_fresh = 0
            }
            next
        }
        kind == "bash" {
            if (is_first) {
                is_skipped = /^\.\//
                is_first = 0
                if (!is_skipped) printf "exec >%s/%d.printed\n", work, number >(work "/script")
            }
            if (!is_skipped) print >(work "/script")
        }
        kind ~ /^(text|json)$/ { print >(work "/" number ".expected") }
    ' "$1"
}

# Money is 100.00 or 100, as jq has it, and a hold has a second more or less.
normalise() {
    sed -E 's/([0-9])\.00([,}])/\1\2/g; s/("time_remaining_seconds":)[0-9]+/\1SOME/' "$1"
}

check() {
    local page=$1 expected printed faults=0 count=0
    rm -f "$work"/*
    extract "$page"
    (cd "$work" && bash ./script)
    for expected in "$work"/*.expected; do
        printed=${expected%.expected}.printed
        count=$((count + 1))
        diff <(normalise "$expected") <(normalise "$printed") || {
            faults=$((faults + 1))
            printf '%s: block %s prints something else (above: < expected, > printed)\n' \
                "$page" "$(basename "$expected" .expected)" >&2
        }
    done
    ((count > 0)) || { printf '%s has no output to compare\n' "$page" >&2; return 1; }
    printf '%s: %d outputs compared, %d differ\n' "${page#"$top"/}" "$count" "$faults"
    ((faults == 0))
}

pages=("$@")
((${#pages[@]})) || pages=("$top/README.md" "$top/docs/tutorial.md")
for page in "${pages[@]}"; do
    check "$page"
done
