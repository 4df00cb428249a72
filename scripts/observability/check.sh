#!/usr/bin/env bash
# Checks the dashboard and the alert rules with a Prometheus that scrapes the running system. See --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/http.sh
source scripts/http.sh

usage() {
    cat <<'HELP'
Usage: scripts/observability/check.sh PROMETHEUS_URL EVENT_SERVICE_URL BOOKING_SERVICE_URL

Checks the configuration with promtool, makes some traffic, and runs every query of the dashboard
and of the alert rules: each must be valid and give numbers. The system must run with
AUDIT_INTERVAL_MINUTES set, and Prometheus must scrape it about every second
(OBSERVE_INTERVAL_SECONDS=1 ./start.sh --native --observe).
HELP
}

if (($# != 3)) || [[ $1 == --help ]]; then
    usage
    exit 2
fi
readonly PROMETHEUS=$1 EVENT_API=$2/api/v1 BOOKING_API=$3/api/v1
readonly CONFIG=deploy/observability
readonly TIMEOUT_SECONDS=45

# Alert rules that return nothing while the system is healthy, even without their threshold.
readonly RIGHTLY_EMPTY='^absent\('

step 'Metrics, alerts and dashboard'
promtool check config "$CONFIG/prometheus.yml" >/dev/null || die "$CONFIG/prometheus.yml has a fault: promtool check config $CONFIG/prometheus.yml"
promtool check rules "$CONFIG/alerts.yml" >/dev/null || die "$CONFIG/alerts.yml has a fault: promtool check rules $CONFIG/alerts.yml"
for target in "$2" "$3"; do
    # Checks the names and the help texts.
    curl --silent --fail --noproxy '*' "$target/metrics" | promtool check metrics || die "promtool found faults in $target/metrics"
done

ask() { curl --silent --noproxy '*' --max-time 10 "$PROMETHEUS/api/v1/$1" "${@:2}"; }

all_up() { [[ $(ask query --data-urlencode 'query=sum(up)' | jq -r '.data.result[0].value[1]') == 3 ]]; }
wait_until "$TIMEOUT_SECONDS" all_up || die "Prometheus can't scrape both services and the worker: $PROMETHEUS/targets"

# Without its threshold, the expression of an alert must always be a number.
rules=$(ask rules)
mapfile -t queries < <({
    jq -r '.panels[].targets[]?.expr' "$CONFIG/grafana/dashboards/sale.json"
    jq -r '.data.groups[].rules[].query | sub(" *(==|>=|<=|>|<) *[0-9.]+$"; "")' <<<"$rules"
} | sort -u)
((${#queries[@]} > 40)) || die "only ${#queries[@]} queries were found"
unexplained=$(jq -r '.data.groups[].rules[] | select([.annotations.summary, .annotations.description, .annotations.action] | any(. == null or . == "")) | .name' <<<"$rules")
[[ -z $unexplained ]] || die "alerts without a summary, a description or an action: $unexplained"

# The events that the queries count must happen while Prometheus scrapes.
make_traffic() {
    local user session seat body reservation
    user=$(new_uuid)
    request GET "$EVENT_API/sessions?limit=500"
    session=$(field 'first(.items[] | select(.available_seats_count > 0 and .status == "scheduled")).session_id')
    request GET "$BOOKING_API/price-tiers?limit=500"
    body=$(field 'first(.items[] | select(.session_id == null)).id')
    request GET "$EVENT_API/sessions/$session/seats"
    seat=$(jq -c --arg tier "$body" 'first(.[] | select(.status == "available")) | {session_seat_id, price_tier_id: $tier, row_number, seat_number}' <<<"$BODY")
    body="{\"session_id\": \"$session\", \"seats\": [$seat]}"
    as_user "$user" POST "$BOOKING_API/reservations" "$body"
    [[ $STATUS == 201 ]] || die "a booking answered $STATUS: $BODY"
    reservation=$(field .id)
    as_user "$(new_uuid)" POST "$BOOKING_API/reservations" "$body"
    [[ $STATUS == 409 ]] || die "a second booking of the same seat answered $STATUS: $BODY"
    as_user "$user" POST "$BOOKING_API/reservations/$reservation/confirm"
    [[ $STATUS == 200 ]] || die "a payment answered $STATUS: $BODY"
}

# Prints the queries that are invalid or have no number yet.
unanswered() {
    local query answer
    for query in "${queries[@]}"; do
        [[ ! $query =~ $RIGHTLY_EMPTY ]] || { ask query --data-urlencode "query=$query" | jq -e '.status == "success"' >/dev/null && continue; }
        answer=$(ask query --data-urlencode "query=$query")
        if ! jq -e '.status == "success"' <<<"$answer" >/dev/null; then
            printf 'invalid: %s: %s\n' "$query" "$(jq -r .error <<<"$answer")"
        elif ! jq -e '[.data.result[].value[1] | select(. != "NaN")] | length > 0' <<<"$answer" >/dev/null; then
            printf 'no number: %s\n' "$query"
        fi
    done
}

deadline=$((SECONDS + TIMEOUT_SECONDS))
while true; do
    make_traffic
    missing=$(unanswered)
    [[ -n $missing ]] || break
    ((SECONDS < deadline)) || die "$(printf '%s\n' "$missing")"
    sleep 0.5
done
done_with "${#queries[@]} queries of the dashboard and the alerts have numbers ($SECONDS s)"
