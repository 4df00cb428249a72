# shellcheck shell=bash
# Requests to the two services, for the demo data and the integration test.

# The last answer: its status (000 when there was none), body and headers. The body is also
# in a file, because a variable can't hold an image.
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

# The same, called by a user: as_user USER METHOD URL [JSON [CURL OPTION...]]
as_user() {
    local user=$1 method=$2 url=$3 json=${4:-}
    shift $(($# < 4 ? $# : 4))
    request "$method" "$url" "$json" --header "X-User-ID: $user" "$@"
}

# field EXPRESSION: a value out of the last answer, empty when it is not there.
field() { jq -r "$1 // empty" <<<"$BODY" 2>/dev/null || true; }

# header NAME: of the last answer.
header() {
    awk -v name="$1" 'tolower($1) == tolower(name) ":" { sub(/^[^:]*: */, ""); sub(/\r$/, ""); print; exit }' \
        "$HEADER_FILE"
}

new_uuid() { cat /proc/sys/kernel/random/uuid 2>/dev/null || uuidgen | tr '[:upper:]' '[:lower:]'; }

# in_hours N: that many full hours from now. By jq, because date differs between systems.
in_hours() { jq -rn --argjson hours "$1" '(now / 3600 | floor) * 3600 + $hours * 3600 | todate'; }
