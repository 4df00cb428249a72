#!/usr/bin/env bash
# Tests the interface from outside, with code that tools generate from the OpenAPI documents: clients that run the whole
# flow, and thousands of requests whose answers must match the documents.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/interface/run.sh EVENT_SERVICE_URL BOOKING_SERVICE_URL [OPTION...]

  --examples N     generated requests for each operation (default 10)
  --token-command COMMAND
                   prints an access token and takes --user UUID and --role ROLE, for services with
                   AUTH_MODE=jwt. TICKETING_TOKEN_COMMAND sets it, too. If the services have an
                   INTERNAL_API_KEY, it must be in the environment
  --seed N         the same seed makes the same requests (default 1)
  --work-dir DIR   the folder that keeps the Python environment between runs (default: a folder
                   that is deleted at the end)

Both services must run. The tests fill their databases with useless data, so use test systems.
HELP
}

main() {
    local examples=10 seed=1 work_dir='' urls=()
    while (($# > 0)); do
        case $1 in
            --examples) examples=$2 && shift ;;
            --token-command) TICKETING_TOKEN_COMMAND=$2 && shift ;;
            --seed) seed=$2 && shift ;;
            --work-dir) work_dir=$2 && shift ;;
            --help | -h) usage && exit ;;
            *) urls+=("$1") ;;
        esac
        shift
    done
    ((${#urls[@]} == 2)) || { usage >&2 && exit 2; }

    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    cd "$here/../.."
    if [[ -z $work_dir ]]; then
        work_dir=$(mktemp -d)
        # shellcheck disable=SC2064  # the variable is local, and gone when the trap runs
        trap "rm -rf ${work_dir@Q}" EXIT
    fi
    mkdir -p "$work_dir"
    work_dir=$(cd "$work_dir" && pwd)
    local bin=$work_dir/venv/bin
    # An environment is complete if it has a copy of the current requirements.
    if ! cmp -s "$here/requirements.txt" "$work_dir/installed.txt"; then
        rm -rf "$work_dir/venv"
        python3 -m venv "$work_dir/venv"
        "$bin/pip" install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
        cp "$here/requirements.txt" "$work_dir/installed.txt"
    fi
    # The generator formats its code with ruff, which it finds in the path.
    export PATH=$bin:$PATH NO_PROXY='*'

    local name
    for name in event booking; do
        local url=${urls[0]}
        [[ $name == event ]] || url=${urls[1]}
        rm -rf "$work_dir/clients/${name}_client"
        mkdir -p "$work_dir/clients"
        # A warning means that a part of the document has no client.
        "$bin/openapi-python-client" generate --url "$url/openapi.json" --meta none --overwrite \
            --fail-on-warning --config "$here/openapi-python-client.yaml" --output-path "$work_dir/clients/${name}_client"
    done

    local user_id headers
    user_id=$("$bin/python" -c 'import uuid; print(uuid.uuid4())')
    headers=("X-User-ID: $user_id")
    if [[ -n ${TICKETING_TOKEN_COMMAND:-} ]]; then
        headers=("Authorization: Bearer $(bash -c "$TICKETING_TOKEN_COMMAND \"\$@\"" token --user "$user_id" \
            --role customer --role organizer --role admin --minutes 1440)")
    fi
    export REAL_IDS=$work_dir/real-ids.json
    PYTHONPATH=$work_dir/clients "$bin/python" "$here/flow.py" "${urls[0]}" "${urls[1]}" "$REAL_IDS" "$user_id" "${headers[0]}"
    [[ -z ${INTERNAL_API_KEY:-} ]] || headers+=("X-Internal-Api-Key: $INTERNAL_API_KEY")
    local header options=()
    for header in "${headers[@]}"; do options+=(--header "$header"); done

    # It leaves a folder in its working folder.
    cd "$work_dir"
    export SCHEMATHESIS_HOOKS=$here/hooks.py
    for name in event booking; do
        local url=${urls[0]}
        [[ $name == event ]] || url=${urls[1]}
        # Some operations have two names. With both, one would delete what the other creates, so one is enough.
        "$bin/st" --config-file "$here/schemathesis.toml" run "$url/openapi.json" --no-color \
            --exclude-operation-id-regex '_by_other_name$' --max-examples "$examples" --seed "$seed" --workers 1 --continue-on-failure \
            "${options[@]}"
    done
}

main "$@"
