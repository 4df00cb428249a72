# shellcheck shell=bash
# Creates demonstration data through the public API, like any client.

# create URL JSON ID_FIELD: posts JSON and leaves the new id in CREATED.
create() {
    as_organizer POST "$1" "$2"
    [[ $STATUS == 201 ]] || die "POST $1 answered $STATUS: $BODY"
    CREATED=$(field "$3")
    [[ -n $CREATED ]] || die "POST $1 gave no $3: $BODY"
}

# find_or_create URL NAME_FIELD JSON ID_FIELD: uses an object of the same name again, if there is one.
find_or_create() {
    local url=$1 name_field=$2 json=$3 id_field=$4 name
    name=$(jq -r ".$name_field" <<<"$json")
    request GET "$url?limit=500"
    CREATED=$(jq -r --arg name "$name" "first(.items[]? | select(.$name_field == \$name)) | $id_field // empty" \
        <<<"$BODY" 2>/dev/null || true)
    [[ -n $CREATED ]] || create "$url" "$json" "$id_field"
}

# create_demo EVENT_SERVICE_URL BOOKING_SERVICE_URL
create_demo() {
    local events=$1/api/v1 bookings=$2/api/v1
    local organizer event location hall sessions=() tiers=() tier start seat buyer CREATED=''
    step 'Adding demo data'

    find_or_create "$events/organizers" name '{
        "name": "Demo Concerts", "description": "Makes the demo events",
        "contact_email": "hello@example.com", "contact_phone": "+1 555 0100"}' .organizer_id
    organizer=$CREATED
    find_or_create "$events/events" title "$(jq -n --arg id "$organizer" '{
        organizer_id: $id, title: "Demo Night", description: "Two evenings of music",
        event_type: "concert"}')" .event_id
    event=$CREATED
    find_or_create "$events/locations" name '{
        "name": "Demo Arena", "address": "1 Example Street", "city": "Lisbon",
        "country": "Portugal", "timezone": "Europe/Lisbon"}' .location_id
    location=$CREATED

    # A new hall each time, because sessions in one hall must not overlap.
    create "$events/locations/$location/halls" "$(jq -n '{
        name: "Demo Hall \(now | todate)", capacity: 2000}')" .hall_id
    hall=$CREATED
    as_organizer POST "$events/halls/$hall/seats/bulk" '{"rows": 40, "seats_per_row": 50}'
    [[ $STATUS == 201 && $(field .created) == 2000 ]] || die "making the seats answered $STATUS: $BODY"

    for start in 168 192; do
        create "$events/sessions" "$(jq -n --arg event "$event" --arg hall "$hall" \
            --arg from "$(in_hours "$start")" --arg until "$(in_hours $((start + 3)))" '{
            event_id: $event, hall_id: $hall, start_time: $from, end_time: $until,
            base_price: 100.00, currency: "USD"}')" .session_id
        sessions+=("$CREATED")
    done

    for tier in Standard:1.0 Premium:1.5 VIP:2.5; do
        find_or_create "$bookings/admin/price-tiers" name "$(jq -n --arg name "${tier%:*}" \
            --argjson multiplier "${tier#*:}" '{
            name: $name, base_multiplier: $multiplier, description: "\($name) pricing"}')" '(.id // .price_tier_id)'
        tiers+=("$CREATED")
    done

    request GET "$events/sessions/${sessions[0]}/seats"
    seat=$(jq -c --arg tier "${tiers[0]}" 'first(.[] | select(.status == "available"))
        | {session_seat_id, price_tier_id: $tier, row_number, seat_number}' <<<"$BODY")
    [[ -n $seat ]] || die "session ${sessions[0]} has no available seat"

    say "hall with 2,000 seats  $hall"
    say "sessions               ${sessions[*]}"
    say "tiers                  Standard ${tiers[0]}"
    say "                       Premium  ${tiers[1]}"
    say "                       VIP      ${tiers[2]}"
    step 'Book a seat: paste these lines'
    buyer=$(new_uuid)
    name_caller "$buyer" customer
    cat <<TEXT
CALLER='$CALLER'
RESERVATION=\$(curl -sS -X POST $bookings/reservations \\
  -H 'Content-Type: application/json' -H "\$CALLER" \\
  -d '{"session_id":"${sessions[0]}","seats":[$seat]}'); jq . <<<"\$RESERVATION"
curl -sS -X POST $bookings/reservations/\$(jq -r .id <<<"\$RESERVATION")/confirm -H "\$CALLER" | jq .
TEXT
}
