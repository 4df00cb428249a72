# shellcheck shell=bash
# Requests to the two services, for the demo data and the integration test.

# The last answer: its status (000 without an answer), body and headers. The body is also in a file, because a variable
# can't hold an image.
# shellcheck disable=SC2034  # read by the scripts that source this one
STATUS=''
BODY=''
RESPONSE_DIR=$(mktemp -d)
BODY_FILE=$RESPONSE_DIR/body
HEADER_FILE=$RESPONSE_DIR/headers
trap 'rm -rf "$RESPONSE_DIR"' EXIT

# request METHOD URL [JSON [CURL OPTION...]]
request() {
    local method=$1 url=$2 json=${3:-}
    shift $(($# < 3 ? $# : 3))
    local options=(--silent --show-error --noproxy '*' --max-time 30 --request "$method"
        --output "$BODY_FILE" --dump-header "$HEADER_FILE" --write-out '%{http_code}')
    if [[ -n $json ]]; then
        options+=(--header 'Content-Type: application/json' --data-binary "$json")
    fi
    : >"$BODY_FILE"
    : >"$HEADER_FILE"
    # shellcheck disable=SC2034
    STATUS=$(curl "${options[@]}" "$@" "$url") || STATUS=000
    BODY=$(tr -d '\0' <"$BODY_FILE")
}

# How the services identify callers. With AUTH_MODE=header they trust the X-User-ID header. Otherwise
# TICKETING_TOKEN_COMMAND is a command that prints an access token and takes --user UUID and --role ROLE, such as
# `booking-service token`. Without such a command TICKETING_TOKEN is the organizer's token.
CALLER=''
CALLER_IS=''

# name_caller USER ROLE: leaves the header that identifies the caller in CALLER.
name_caller() {
    [[ $CALLER_IS != "$1 $2" ]] || return 0
    if [[ $2 == organizer && -n ${TICKETING_TOKEN:-} ]]; then
        CALLER="Authorization: Bearer $TICKETING_TOKEN"
    elif [[ -n ${TICKETING_TOKEN_COMMAND:-} ]]; then
        CALLER="Authorization: Bearer $(bash -c "$TICKETING_TOKEN_COMMAND \"\$@\"" token --user "$1" --role "$2")" ||
            die "TICKETING_TOKEN_COMMAND made no token: $TICKETING_TOKEN_COMMAND"
    else
        CALLER="X-User-ID: $1"
    fi
    CALLER_IS="$1 $2"
}

# make_tokens_by PROGRAM: uses this program to make tokens if the services have JWT_SECRET and the user set no token.
make_tokens_by() {
    if [[ ${AUTH_MODE:-} == jwt && -n ${JWT_SECRET:-}${JWT_SECRET_FILE:-} && -z ${TICKETING_TOKEN:-}${TICKETING_TOKEN_COMMAND:-} ]]; then
        TICKETING_TOKEN_COMMAND="$1 token"
    fi
}

# A request of a user: as_user USER METHOD URL [JSON [CURL OPTION...]]
as_user() {
    local user=$1 method=$2 url=$3 json=${4:-}
    shift $(($# < 4 ? $# : 4))
    name_caller "$user" customer
    request "$method" "$url" "$json" --header "$CALLER" "$@"
}

# A request of an organizer: as_organizer METHOD URL [JSON [CURL OPTION...]]
as_organizer() {
    local method=$1 url=$2 json=${3:-}
    shift $(($# < 3 ? $# : 3))
    name_caller 00000000-0000-7000-8000-00000000000a organizer
    request "$method" "$url" "$json" --header "$CALLER" "$@"
}

# field EXPRESSION: prints a value of the last answer, or nothing if it is missing.
field() { jq -r "$1 // empty" <<<"$BODY" 2>/dev/null || true; }

# header NAME: prints a header of the last answer.
header() {
    awk -v name="$1" 'tolower($1) == tolower(name) ":" { sub(/^[^:]*: */, ""); sub(/\r$/, ""); print; exit }' \
        "$HEADER_FILE"
}

new_uuid() { cat /proc/sys/kernel/random/uuid 2>/dev/null || uuidgen | tr '[:upper:]' '[:lower:]'; }

# in_hours N: prints the time N full hours from now. It uses jq, because date differs between systems.
in_hours() { jq -rn --argjson hours "$1" '(now / 3600 | floor) * 3600 + $hours * 3600 | todate'; }
