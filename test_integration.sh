#!/usr/bin/env bash
# Checks the running system from outside. See ./test_integration.sh --help.
#
# The variables of jq look to shellcheck like variables of the shell:
# shellcheck disable=SC2016
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/http.sh
source scripts/http.sh

usage() {
    cat <<'HELP'
Usage: ./test_integration.sh

Checks the running system by its public interfaces, one line a check, and ends with a count.
It makes data of its own (one event, one hall, one session, two price tiers) and leaves it.
Needs curl and jq. Waits for the expiry of a reservation only where a hold lasts 30 seconds
or less (RESERVATION_TIMEOUT_MINUTES of the services).

Where the system is:
  EVENT_SERVICE_URL=http://localhost:8000
  BOOKING_SERVICE_URL=http://localhost:8001
  BOOKING_WORKER_URL=http://localhost:8002          empty: can't be reached from here
  RABBITMQ_MANAGEMENT_URL=http://localhost:15672    RABBITMQ_MANAGEMENT_LOGIN=guest:guest
  EVENT_SERVICE_INTERNAL_URL=                       where it is, if the internal API has a listener
                                                    of its own (INTERNAL_PORT)
The port variables of ./start.sh are honoured too. With https:// and certificates of an authority
of your own, CURL_CA_BUNDLE names the file of that authority.

Where the services want to know who calls (AUTH_MODE=jwt):
  TICKETING_TOKEN_COMMAND='booking-service token'   prints an access token, with --user UUID and
                                                    --role ROLE behind it. Not needed beside a
                                                    native system with JWT_SECRET
  INTERNAL_API_KEY=                                 the services' own key
HELP
}

if (($# > 0)); then
    usage
    [[ $1 == --help || $1 == -h ]] || exit 2
    exit 0
fi
for tool in curl jq; do
    command -v "$tool" >/dev/null 2>&1 || die "$tool is needed: install it, for instance by apt-get install $tool"
done

readonly EVENT_URL=${EVENT_SERVICE_URL:-http://localhost:${EVENT_SERVICE_PORT:-8000}}
readonly BOOKING_URL=${BOOKING_SERVICE_URL:-http://localhost:${BOOKING_SERVICE_PORT:-8001}}
readonly WORKER_URL=${BOOKING_WORKER_URL-http://localhost:${BOOKING_WORKER_PORT:-8002}}
readonly MANAGEMENT_URL=${RABBITMQ_MANAGEMENT_URL:-http://localhost:${RABBITMQ_MANAGEMENT_PORT:-15672}}
readonly MANAGEMENT_LOGIN=${RABBITMQ_MANAGEMENT_LOGIN:-guest:guest}
readonly INTERNAL_URL=${EVENT_SERVICE_INTERNAL_URL:-${INTERNAL_PORT:+http://localhost:$INTERNAL_PORT}}
readonly EVENT_API=$EVENT_URL/api/v1
readonly BOOKING_API=$BOOKING_URL/api/v1

readonly BUYERS=50
# The limit that the system promises for every change that travels by message.
readonly MESSAGE_SECONDS=5

# --- checks -----------------------------------------------------------------------------

PASSED=0
FAILED=0

pass() {
    PASSED=$((PASSED + 1))
    printf '%sPASS%s  %s\n' "$GREEN" "$PLAIN" "$*"
}

fail() {
    FAILED=$((FAILED + 1))
    printf '%sFAIL%s  %s\n' "$RED" "$PLAIN" "$*"
}

skip() { printf '%sSKIP%s  %s\n' "$YELLOW" "$PLAIN" "$*"; }

# check WHAT COMMAND...: passes if the command succeeds. A failure prints the last answer.
check() {
    local what=$1
    shift
    if "$@"; then
        pass "$what"
    else
        fail "$what"
        printf '      the last answer was %s: %.500s\n' "$STATUS" "$BODY"
    fi
}

# status_is PATTERN: true if the status of the last answer matches.
status_is() { [[ $STATUS =~ ^($1)$ ]]; }

# check_status WHAT STATUS [EXPRESSION]: checks the last answer. A result of null or false of the expression (jq) is a
# failure.
check_status() { check "$1" answer_is "$2" "${3:-.}"; }

answer_is() { [[ $STATUS == "$1" ]] && json "$2"; }

json() { jq -e "$@" <<<"$BODY" >/dev/null 2>&1; }

# check_within WHAT SECONDS COMMAND...: passes if the command succeeds within that time.
check_within() {
    local what=$1 seconds=$2
    shift 2
    check "$what (within $seconds s)" wait_until "$seconds" "$@"
}

# check_problem WHAT STATUS-PATTERN [CODE]: checks that the last answer is a problem document.
check_problem() { check "$1" is_problem "$2" "${3:-}"; }

is_problem() {
    status_is "$1" && [[ $(header Content-Type) == application/problem+json* ]] &&
        json --argjson status "$STATUS" --arg code "$2" '
            .status == $status and (.type | type == "string") and (.title | length > 0)
            and (.code | length > 0) and ($code == "" or .code == $code)'
}

finish() {
    printf '\n%s passed, %s failed\n' "$PASSED" "$FAILED"
    ((FAILED == 0))
}

# created WHAT ID_FIELD: checks for 201 and leaves the id in CREATED. Without the id the script ends, because all later
# checks need it.
created() {
    check_status "$1" 201
    CREATED=$(field "$2")
    if [[ -z $CREATED ]]; then
        printf 'The rest needs this, so the test ends here.\n'
        finish
        exit 1
    fi
}

# --- helpers for the booking flow -------------------------------------------------------

SESSION=''
SEATS='[]'
STANDARD=''
PREMIUM=''

# seat_body NUMBER TIER [FILTER]: prints the body of a reservation for the seat at that position of the list. The filter
# (jq) may change it.
seat_body() {
    jq -c --arg session "$SESSION" --argjson number "$1" --arg tier "$2" '
        {session_id: $session, seats: [.[$number]
            | {session_seat_id, price_tier_id: $tier, row_number, seat_number}]} | '"${3:-.}" <<<"$SEATS"
}

reserve() { as_user "$1" POST "$BOOKING_API/reservations" "$2"; }

seat_status_is() {
    local id
    id=$(jq -r --argjson number "$1" '.[$number].session_seat_id' <<<"$SEATS")
    request GET "$EVENT_API/sessions/$SESSION/seats"
    json --arg id "$id" --arg status "$2" 'any(.[]; .session_seat_id == $id and .status == $status)'
}

is_png() { [[ $(head -c 8 "$BODY_FILE" | od -An -tx1 | tr -d ' \n') == 89504e470d0a1a0a ]]; }

# --- the parts --------------------------------------------------------------------------

check_health() {
    local name url
    for name in 'Event Service' 'Booking Service'; do
        url=$EVENT_URL
        [[ $name == 'Event Service' ]] || url=$BOOKING_URL
        request GET "$url/health"
        check_status "$name is healthy, and so is all it needs" 200 \
            '.status == "healthy" and (.service | length > 0) and (.checks | length > 0)'
        request GET "$url/health/live"
        check "$name: /health/live answers 200" status_is 200
        request GET "$url/health/ready"
        check "$name: /health/ready answers 200" status_is 200
        request GET "$url/docs" '' --location
        check "$name: Swagger UI is there" status_is 200
        request GET "$url/openapi.json"
        check_status "$name: OpenAPI 3.1 document is there" 200 \
            '(.openapi | startswith("3.1")) and (.paths | length > 0)'
    done
    local internal=${INTERNAL_URL:-$EVENT_URL}/api/internal/health key=(--header "X-Internal-Api-Key: ${INTERNAL_API_KEY:-}")
    request GET "$internal" '' "${key[@]}"
    check 'Event Service: internal health check answers GET' status_is 200
    request POST "$internal" '' "${key[@]}"
    check 'Event Service: internal health check answers POST' status_is 200
    if [[ -n ${INTERNAL_API_KEY:-} ]]; then
        request GET "$internal"
        check_problem 'Event Service: without the key it does not: 401' 401 unauthenticated
    fi
    if [[ -n $INTERNAL_URL ]]; then
        request GET "$EVENT_URL/api/internal/health" '' "${key[@]}"
        check_problem 'Event Service: there is no internal API beside the public one: 404' 404 not_found
    fi
    if [[ -n $WORKER_URL ]]; then
        request GET "$WORKER_URL/health/ready"
        check 'booking worker is ready' status_is 200
    else
        skip 'booking worker: BOOKING_WORKER_URL is empty'
    fi
    if ((FAILED > 0)); then
        printf 'The rest needs a healthy system, so the test ends here.\n'
        finish
        exit 1
    fi
}

make_catalogue() {
    local organizer event location hall session
    as_organizer POST "$EVENT_API/organizers" '{
        "name": "Integration Test", "description": "made by test_integration.sh",
        "contact_email": "test@example.com", "contact_phone": "+1 555 0101"}'
    created 'organizer is created' .organizer_id
    organizer=$CREATED
    check 'a created resource has a Location' test -n "$(header Location)"
    request GET "$EVENT_API/organizers/$organizer"
    check_status 'organizer can be read' 200 '.name == "Integration Test"'

    as_organizer POST "$EVENT_API/events" "$(jq -n --arg id "$organizer" '{
        organizer_id: $id, title: "Integration Night", description: "a test", event_type: "concert"}')"
    created 'event is created' .event_id
    event=$CREATED
    as_organizer POST "$EVENT_API/locations" '{
        "name": "Integration Arena", "address": "2 Example Street", "city": "Berlin",
        "country": "Germany", "timezone": "Europe/Berlin"}'
    created 'location is created' .location_id
    location=$CREATED
    as_organizer POST "$EVENT_API/locations/$location/halls" '{"name": "Integration Hall", "capacity": 100}'
    created 'hall is created' .hall_id
    hall=$CREATED

    as_organizer POST "$EVENT_API/halls/$hall/seats" '{"row_number": "A", "seat_number": 1, "seat_type": "vip"}'
    check_status 'single seat is created, its labels are strings' 201 '.row_number == "A" and .seat_number == "1"'
    as_organizer POST "$EVENT_API/halls/$hall/seats/bulk" '{"rows": 3, "seats_per_row": 10}'
    check_status 'grid of 30 seats is created' 201 '.created == 30'

    session=$(jq -n --arg event "$event" --arg hall "$hall" --arg from "$(in_hours 240)" --arg until "$(in_hours 243)" '{
        event_id: $event, hall_id: $hall, start_time: $from, end_time: $until, base_price: 100.00, currency: "USD"}')
    as_organizer POST "$EVENT_API/sessions" "$session"
    created 'session is created' .session_id
    SESSION=$CREATED
    as_organizer POST "$EVENT_API/sessions" "$session"
    check_problem 'a second session in the hall at the same time is refused: 409' 409
    request GET "$EVENT_API/sessions/$SESSION"
    check_status 'session can be read' 200 '.base_price == 100 and .currency == "USD"'
    request GET "$EVENT_API/sessions?hall_id=$hall"
    check_status 'session is in the list of its hall' 200 \
        "(.items | length == 1) and .items[0].session_id == \"$SESSION\" and has(\"next_cursor\")"

    request GET "$EVENT_API/sessions/$SESSION/seats"
    check_status 'session has 31 available seats' 200 \
        'length == 31 and all(.[]; .status == "available" and (.price | type == "number"))'
    SEATS=$BODY
    request GET "$EVENT_API/sessions/$SESSION/seat-map"
    check_status 'seat map shows the same seats' 200 \
        "(.seats | length == 31) and .session_id == \"$SESSION\" and has(\"version\")"

    local run
    run=$(new_uuid)
    as_organizer POST "$BOOKING_API/admin/price-tiers" "{
        \"name\": \"Standard ${run%%-*}\", \"base_multiplier\": 1.0, \"description\": \"a test\"}"
    created 'price tier Standard (1.0) is created' '(.id // .price_tier_id)'
    STANDARD=$CREATED
    as_organizer POST "$BOOKING_API/admin/price-tiers" "{
        \"name\": \"Premium ${run%%-*}\", \"base_multiplier\": 1.5, \"description\": \"a test\"}"
    created 'price tier Premium (1.5) is created' '(.id // .price_tier_id)'
    PREMIUM=$CREATED
}

book_and_confirm() {
    local user reservation tickets ticket
    user=$(new_uuid)
    # One seat of each tier.
    local body
    body=$(seat_body 0 "$STANDARD" ".seats += $(seat_body 1 "$PREMIUM" .seats)")

    reserve "$user" "$body"
    created 'reservation of two seats is made' .id
    reservation=$CREATED
    check 'reservation is active, with both seats and 100 + 150 to pay' json \
        '.status == "active" and .total_amount == 250 and .seats_count == 2 and (.items | length == 2)
         and .time_remaining_seconds > 0'
    HOLD_SECONDS=$(field '.time_remaining_seconds | ceil')
    check 'seat 1 is reserved' seat_status_is 0 reserved
    check 'seat 2 is reserved' seat_status_is 1 reserved
    reserve "$(new_uuid)" "$body"
    check_problem 'another buyer can not have them: 409' 409 seat_unavailable
    as_user "$user" GET "$BOOKING_API/reservations/$reservation"
    check_status 'reservation can be read' 200 ".id == \"$reservation\" and .status == \"active\""
    as_user "$(new_uuid)" GET "$BOOKING_API/reservations/$reservation"
    check_problem "it does not exist for anybody else: 404" 404
    as_user "$user" GET "$BOOKING_API/reservations"
    check_status "it is in the buyer's list" 200 ".items | length == 1 and .[0].id == \"$reservation\""

    as_user "$user" POST "$BOOKING_API/reservations/$reservation/confirm"
    check_status 'payment confirms it and makes two tickets' 200 \
        '.status == "confirmed" and (.tickets | length == 2)'
    tickets=$(field '[.tickets[].id] | sort | join(" ")')
    check_within 'seat 1 becomes sold, by message' "$MESSAGE_SECONDS" seat_status_is 0 sold
    check_within 'seat 2 becomes sold, by message' "$MESSAGE_SECONDS" seat_status_is 1 sold
    as_user "$user" POST "$BOOKING_API/reservations/$reservation/confirm"
    check_status 'confirming again gives the same tickets' 200 \
        "([.tickets[].id] | sort | join(\" \")) == \"$tickets\""
    as_user "$user" DELETE "$BOOKING_API/reservations/$reservation"
    check_problem 'a confirmed reservation can not be cancelled: 409' 409

    as_user "$user" GET "$BOOKING_API/tickets/user/$user"
    check_status 'the buyer has two active tickets' 200 \
        "([.[].id] | sort | join(\" \")) == \"$tickets\" and all(.[]; .status == \"active\")"
    ticket=$(jq -r --argjson seats "$SEATS" \
        'first(.[] | select(.session_seat_id == $seats[0].session_seat_id)) | .id // empty' <<<"$BODY" || true)
    as_user "$user" GET "$BOOKING_API/tickets/$ticket"
    check_status 'ticket can be read, with its seat, price and QR code' 200 \
        '.price == 100 and (.qr_code | startswith("data:image/png;base64,")) and .is_used == false'
    as_user "$user" GET "$BOOKING_API/tickets/$ticket/qr"
    check 'the QR code is a PNG image' is_png

    as_user "$user" POST "$BOOKING_API/tickets/$ticket/refund"
    check_status 'ticket of seat 1 is refunded' 200 '.status == "refunded"'
    check_within 'seat 1 is available again, by message' "$MESSAGE_SECONDS" seat_status_is 0 available
    check 'seat 2 stays sold' seat_status_is 1 sold
}

race_for_one_seat() {
    local body buyer callers=() dir=$RESPONSE_DIR/race
    body=$(seat_body 2 "$STANDARD")
    mkdir "$dir"
    for ((buyer = 1; buyer <= BUYERS; buyer++)); do
        # Made before the race, because making a token takes longer than the race.
        name_caller "$(new_uuid)" customer
        callers+=("$CALLER")
    done
    for ((buyer = 1; buyer <= BUYERS; buyer++)); do
        curl --silent --noproxy '*' --max-time 60 --request POST "$BOOKING_API/reservations" \
            --header 'Content-Type: application/json' --header "${callers[buyer - 1]}" \
            --data-binary "$body" --output "$dir/$buyer.body" --write-out '%{http_code}\n' >"$dir/$buyer.status" &
    done
    wait
    local winners losers
    winners=$(cat "$dir"/*.status | grep -c '^201$' || true)
    losers=$(cat "$dir"/*.body | jq -s 'map(select(.status == 409 and .code == "seat_unavailable")) | length' || true)
    STATUS=$(sort "$dir"/*.status | uniq -c | tr -s ' \n' ' ')
    BODY=''
    check "$BUYERS buyers for one seat: one wins" test "$winners" = 1
    check "the other $((BUYERS - 1)) get 409 seat_unavailable" test "$losers" = $((BUYERS - 1))
}

cancel_reservation() {
    local user reservation
    user=$(new_uuid)
    reserve "$user" "$(seat_body 3 "$STANDARD")"
    created 'reservation to cancel is made' .id
    reservation=$CREATED
    check 'its seat is reserved' seat_status_is 3 reserved
    as_user "$user" DELETE "$BOOKING_API/reservations/$reservation"
    check 'it is cancelled' status_is '200|204'
    check 'its seat is available at once' seat_status_is 3 available
    as_user "$user" POST "$BOOKING_API/reservations/$reservation/confirm"
    check_problem 'paying for it now is refused: 409' 409 reservation_cancelled
    reserve "$(new_uuid)" "$(seat_body 3 "$STANDARD")"
    check_status 'the next buyer gets the seat' 201
}

let_one_expire() {
    if ((HOLD_SECONDS > 30)); then
        skip "expiry: a hold lasts $HOLD_SECONDS s here (start with RESERVATION_TIMEOUT_MINUTES=0.1 to see it)"
        return
    fi
    local user reservation
    user=$(new_uuid)
    reserve "$user" "$(seat_body 4 "$STANDARD")"
    created 'reservation to expire is made' .id
    reservation=$CREATED
    check 'its seat is reserved' seat_status_is 4 reserved
    check_within 'it expires, and its seat is available again' $((HOLD_SECONDS + 5)) seat_status_is 4 available
    as_user "$user" POST "$BOOKING_API/reservations/$reservation/confirm"
    check_problem 'paying for it now is refused: 410' 410 reservation_expired
    check_within 'it shows as expired' "$MESSAGE_SECONDS" reservation_status_is "$user" "$reservation" expired
}

reservation_status_is() {
    as_user "$1" GET "$BOOKING_API/reservations/$2"
    json --arg status "$3" '.status == $status'
}

send_wrong_input() {
    local user
    user=$(new_uuid)
    request GET "$EVENT_URL/no/such/path"
    check_problem 'Event Service: unknown path: 404' 404
    request GET "$BOOKING_URL/no/such/path"
    check_problem 'Booking Service: unknown path: 404' 404
    request DELETE "$EVENT_API/sessions"
    check_problem 'wrong method: 405' 405
    request GET "$EVENT_API/sessions/not-a-uuid"
    check_problem 'Event Service: bad UUID in the path' '400|404|422'
    as_user "$user" GET "$BOOKING_API/reservations/not-a-uuid"
    check_problem 'Booking Service: bad UUID in the path' '400|404|422'
    request GET "$EVENT_API/sessions/$(new_uuid)" '' --header 'X-Request-Id: integration-test-1'
    check_problem 'unknown session: 404' 404 session_not_found
    check 'X-Request-Id comes back' test "$(header X-Request-Id)" = integration-test-1

    as_organizer POST "$EVENT_API/organizers" '{"name": '
    check_problem 'Event Service: malformed JSON: 400' 400
    reserve "$user" '{"session_id": '
    check_problem 'Booking Service: malformed JSON: 400' 400
    as_user "$user" POST "$BOOKING_API/reservations" '' --data-binary 'seats=1'
    check_problem 'wrong content type' '400|415|422'
    reserve "$user" '{"session_id": "x", "seats": "all"}'
    check_problem 'members of the wrong type: 422' 422 validation_failed
    reserve "$user" "$(seat_body 5 "$STANDARD" '.seats = []')"
    check_problem 'no seat: 422' 422
    reserve "$user" "$(seat_body 5 "$STANDARD" '.seats += .seats')"
    check_problem 'the same seat twice: 422' 422
    reserve "$user" "$(seat_body 5 "$STANDARD" '.seats[0].row_number = "no such row"')"
    check_problem 'a row that contradicts the seat: 422' 422
    reserve "$user" "$(seat_body 5 "$(new_uuid)")"
    check_problem 'unknown price tier: 404' 404
    reserve "$user" "$(seat_body 5 "$STANDARD" ".seats[0].session_seat_id = \"$(new_uuid)\"")"
    check_problem 'unknown seat: 404' 404
    request POST "$BOOKING_API/reservations" "$(seat_body 5 "$STANDARD")"
    check_problem 'no user: 401' 401 unauthenticated
    if [[ -n ${TICKETING_TOKEN_COMMAND:-} ]]; then
        request GET "$BOOKING_API/reservations" '' --header "X-User-ID: $user"
        check_problem 'a user id without a token: 401' 401 unauthenticated
        as_user "$user" POST "$EVENT_API/organizers" '{"name": "Not an organizer"}'
        check_problem 'a customer is no organizer: 403' 403 forbidden
    fi
    check 'after all that the seat is available' seat_status_is 5 available
}

# --- editing, following, cancelling -----------------------------------------------------

edit_resources() {
    local organizer tag
    as_organizer POST "$EVENT_API/organizers" '{"name": "To be edited", "description": "old"}'
    created 'organizer to edit is created' .organizer_id
    organizer=$EVENT_API/organizers/$CREATED
    tag=$(header ETag)
    check 'it has an ETag' test -n "$tag"
    as_organizer PATCH "$organizer" '{"description": "new"}' --header "If-Match: $tag"
    check_status 'an edit changes what it names, and nothing else' 200 '.description == "new" and .name == "To be edited"'
    as_organizer PATCH "$organizer" '{"description": "late"}' --header "If-Match: $tag"
    check_problem 'an edit of a version that is gone is refused: 412' 412 precondition_failed
    as_organizer PATCH "$organizer" '{"name": "", "contact_email": "nobody"}'
    check_problem 'a faulty edit is refused: 422' 422 validation_failed
    as_organizer DELETE "$organizer"
    check 'it is deleted: 204' status_is 204
    request GET "$organizer"
    check_problem 'and gone: 404' 404 organizer_not_found

    as_organizer DELETE "$EVENT_API/sessions/$SESSION"
    check_problem 'a session with sold seats is not deleted: 409' 409 resource_in_use
    request GET "$EVENT_API/events?limit=500&q=INTEGRATION%20nig"
    check_status 'events are found by parts of words' 200 '.items | length > 0 and all(.[]; .title == "Integration Night")'
    request GET "$EVENT_API/events?limit=0&event_type=party"
    check_problem 'wrong parameters are refused: 422' 422 validation_failed
    check 'all of them are named' json '[.errors[].parameter] | sort == ["event_type", "limit"]'
    as_organizer DELETE "$BOOKING_API/admin/price-tiers/$STANDARD"
    check_problem 'a price tier that was used is not deleted: 409' 409 resource_in_use

    request GET "$EVENT_API/sessions/$SESSION/seat-map"
    tag=$(header ETag)
    request GET "$EVENT_API/sessions/$SESSION/seat-map" '' --header "If-None-Match: $tag"
    check 'a seat map that has not changed is not sent again: 304' status_is 304
    request GET "$EVENT_API/sessions/$SESSION/seat-map" '' --header 'Accept-Encoding: gzip'
    check 'a seat map is compressed on request' test "$(header Content-Encoding)" = gzip
    BODY=''
}

stream_has() { grep -q "$1" "$STREAM_FILE"; }

follow_seat_map() {
    local user seat follower
    user=$(new_uuid)
    STREAM_FILE=$RESPONSE_DIR/stream
    : >"$STREAM_FILE"
    curl --silent --no-buffer --noproxy '*' --max-time 60 --output "$STREAM_FILE" \
        "$EVENT_API/sessions/$SESSION/seat-map/stream" &
    follower=$!
    check_within 'the stream begins with a snapshot' 10 stream_has '^event: snapshot'
    seat=$(jq -r '.[6].session_seat_id' <<<"$SEATS")
    reserve "$user" "$(seat_body 6 "$STANDARD")"
    created 'a seat is reserved meanwhile' .id
    check_within 'the stream tells of it' 10 stream_has "\"session_seat_id\":\"$seat\",\"status\":\"reserved\""
    as_user "$user" DELETE "$BOOKING_API/reservations/$CREATED"
    check_within 'and that it is free again' 10 stream_has "\"session_seat_id\":\"$seat\",\"status\":\"available\""
    kill "$follower" 2>/dev/null || true
    wait "$follower" 2>/dev/null || true
}

# A hold of some seconds may end before the worker handles it.
reservation_has_ended() { reservation_status_is "$1" "$2" cancelled || reservation_status_is "$1" "$2" expired; }

cancel_session() {
    local buyer paid other active
    buyer=$(new_uuid)
    other=$(new_uuid)
    reserve "$buyer" "$(seat_body 7 "$STANDARD")"
    created 'a reservation to be paid is made' .id
    paid=$CREATED
    as_user "$buyer" POST "$BOOKING_API/reservations/$paid/confirm"
    check_status 'it is paid' 200
    reserve "$other" "$(seat_body 8 "$STANDARD")"
    created 'another is made and not paid' .id
    active=$CREATED
    as_organizer POST "$EVENT_API/sessions/$SESSION/cancel"
    check_status 'the session is cancelled and off sale' 200 '.status == "cancelled" and .available_seats_count == 0'
    reserve "$other" "$(seat_body 9 "$STANDARD")"
    check_problem 'nothing is sold any more: 409' 409 session_cancelled
    check_within 'what was paid is refunded' 30 reservation_status_is "$buyer" "$paid" refunded
    check_within 'what was not paid has ended' 30 reservation_has_ended "$other" "$active"
    check_within 'no seat is left with anyone' 30 no_seat_is_owned
}

no_seat_is_owned() {
    request GET "$EVENT_API/sessions/$SESSION/seats"
    json 'all(.[]; .status == "blocked")'
}

# --- RabbitMQ ---------------------------------------------------------------------------

broker() { request GET "$MANAGEMENT_URL/api/$1" '' --user "$MANAGEMENT_LOGIN"; }

queue_matches() {
    broker "queues/%2F/$QUEUE"
    json "$1"
}

check_broker() {
    local key
    EXCHANGE=${RABBITMQ_EXCHANGE:-ticketing_events}
    QUEUE=${RABBITMQ_QUEUE:-event_service_queue}
    broker "exchanges/%2F/$EXCHANGE"
    check_status "exchange $EXCHANGE is a durable topic exchange" 200 '.type == "topic" and .durable'
    broker "queues/%2F/$QUEUE"
    check_status "queue $QUEUE is durable" 200 .durable
    broker "exchanges/%2F/$EXCHANGE/bindings/source"
    for key in reservation.confirmed reservation.expired reservation.cancelled ticket.refunded; do
        # A binding may be a pattern: * is one word, # is any number of words.
        check "$key reaches the queue" json --arg queue "$QUEUE" --arg key "$key" '
            any(.[]; .destination == $queue and (.routing_key
                | gsub("\\."; "\\.") | gsub("\\*"; "[^.]+") | gsub("#"; ".*")
                | . as $pattern | $key | test("^" + $pattern + "$")))'
    done
    # The management interface updates its numbers every five seconds.
    check_within 'the queue has a consumer' 15 queue_matches '.consumers >= 1'
    check_within 'no message is left in the queue' 15 queue_matches '.messages == 0'
}

# --- all of it --------------------------------------------------------------------------

HOLD_SECONDS=0
CREATED=''
make_tokens_by "$(printf %q "${TICKETING_STATE_DIR:-.local}/data/bin/booking-service")"
if [[ ${AUTH_MODE:-} == jwt && -z ${TICKETING_TOKEN_COMMAND:-} ]]; then
    die 'AUTH_MODE=jwt needs TICKETING_TOKEN_COMMAND; see --help'
fi

printf 'Event Service %s, Booking Service %s, RabbitMQ %s\n' "$EVENT_URL" "$BOOKING_URL" "$MANAGEMENT_URL"
step 'Health'
check_health
step 'Catalogue and price tiers'
make_catalogue
step 'Reservation, payment, tickets, refund'
book_and_confirm
step "Race of $BUYERS buyers for one seat"
race_for_one_seat
step 'Cancellation'
cancel_reservation
step 'Expiry'
let_one_expire
step 'Wrong input'
send_wrong_input
step 'Editing'
edit_resources
step 'Following the seat map'
follow_seat_map
step 'Cancelling the session'
cancel_session
step 'RabbitMQ'
check_broker
finish
