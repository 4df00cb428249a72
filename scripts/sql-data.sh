#!/usr/bin/env bash
# Writes what sqlx needs to check the SQL statements while compiling: event-service/.sqlx and booking-service/.sqlx. Run
# it after a change of a statement, a migration or a sqlx.toml. It needs the servers of ./test.sh --only-servers.
#   scripts/sql-data.sh           replaces the data
#   scripts/sql-data.sh --check   changes nothing, and fails if the data is not what it would write
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/native-servers.sh
source scripts/native-servers.sh

work=$(mktemp -d)
# A database of its own, with nothing but the migrations of one crate.
scratch=sql_data_$$

# run_psql DATABASE OPTION...
run_psql() {
    "$(postgres_bin_dir)/psql" --no-psqlrc --quiet --set ON_ERROR_STOP=1 --dbname "${TEST_POSTGRES_URL%/*}/$1" "${@:2}"
}

drop_scratch() { PGOPTIONS='-c client_min_messages=warning' run_psql postgres --command "drop database if exists $scratch with (force)"; }

clean_up() {
    local status=$?
    drop_scratch || true
    rm -rf "$work"
    exit "$status"
}

# describe_statements CRATE: puts the data of all its statements into $work/CRATE.
describe_statements() {
    local crate=$1 migration lib=$1/src/lib.rs
    run_psql postgres --command "create database $scratch"
    for migration in "$crate"/migrations/*.sql; do
        run_psql "$scratch" --single-transaction --file "$migration"
    done
    mkdir "$work/$crate"
    # Only a crate that is compiled has its statements described. Afterwards the file has its old time again, so that
    # nothing else is compiled once more.
    touch --reference "$lib" "$work/time"
    touch "$lib"
    SQLX_OFFLINE=false SQLX_OFFLINE_DIR=$work/$crate DATABASE_URL=${TEST_POSTGRES_URL%/*}/$scratch \
        cargo check --quiet --locked -p "$crate"
    touch --reference "$work/time" "$lib"
    drop_scratch
}

# fault WORD FILE: reports a file of data, with the beginning of its statement.
fault() { say "$1: $crate/.sqlx/${2##*/}: $(jq --raw-output '.query | gsub("\\s+"; " ") | .[:80]' "$2")"; }

# compare CRATE: prints each difference between the data in the tree and that in $work; fails if there is one.
compare() {
    local crate=$1 file same=true
    for file in "$work/$crate"/*.json; do
        if [[ ! -e $crate/.sqlx/${file##*/} ]]; then
            fault missing "$file"
        elif ! cmp --silent "$file" "$crate/.sqlx/${file##*/}"; then
            fault stale "$file"
        else
            continue
        fi
        same=false
    done
    for file in "$crate"/.sqlx/*; do
        [[ ! -e $work/$crate/${file##*/} ]] || continue
        fault unused "$file"
        same=false
    done
    $same
}

replace() {
    rm -rf "$1/.sqlx"
    mkdir "$1/.sqlx"
    cp "$work/$1"/*.json "$1/.sqlx"
}

case ${1:-} in
    '' | --check) ;;
    *)
        sed -n '2,5s/^# //p' "$0" >&2
        exit 2
        ;;
esac
if [[ -z ${TEST_POSTGRES_URL:-} ]]; then
    env=${TICKETING_TEST_STATE_DIR:-.local/test}/env.sh
    [[ -e $env ]] || die 'no PostgreSQL to ask: start the test servers with ./test.sh --only-servers'
    # shellcheck source=/dev/null
    source "$env"
fi
trap clean_up EXIT
shopt -s nullglob

current=true
for crate in event-service booking-service; do
    describe_statements "$crate"
    if compare "$crate"; then
        done_with "$crate/.sqlx is current"
    elif [[ ${1:-} == --check ]]; then
        # What was compiled here must not pass for compiled from the data in the tree.
        touch "$crate/src/lib.rs"
        current=false
    else
        replace "$crate"
        done_with "$crate/.sqlx is replaced"
    fi
done
$current || die 'the data of the SQL statements is not current: run scripts/sql-data.sh, and commit what it changes'
