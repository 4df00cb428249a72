#!/usr/bin/env bash
# Tests the pages for people: goes through USER_FLOW.md in a real browser, and checks contrast and markup of both pages.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/pages/run.sh EVENT_SERVICE_URL BOOKING_SERVICE_URL [OPTION...]

  --out FOLDER       where the screenshots go, and the list of all violations
                     (default: ticketing-pages in the folder for temporary files)
  --css FILE         tries this stylesheet in place of the pages' own page.css. It needs no new build
  --chromium FILE    the browser (default: the command chromium)
  --work-dir DIR     the folder that keeps the Node.js packages between runs (default: a folder
                     that is deleted at the end)

Installs Chromium and Node.js if they are missing. Both services must run with AUTH_MODE=header, the
default. The flow leaves data in their databases, so use test systems.
HELP
}

need_browser() {
    [[ -n $1 ]] || need chromium chromium 'Chromium'
    need node nodejs 'Node.js 18 or newer'
    need npm npm 'npm'
}

main() {
    local chromium='' out='' work_dir='' options=() urls=()
    while (($# > 0)); do
        case $1 in
            --out) out=$2 && shift ;;
            --css) options+=(--css "$(realpath "$2")") && shift ;;
            --chromium) chromium=$2 && shift ;;
            --work-dir) work_dir=$2 && shift ;;
            --help | -h) usage && exit ;;
            *) urls+=("$1") ;;
        esac
        shift
    done
    ((${#urls[@]} == 2)) || { usage >&2 && exit 2; }
    [[ -z $out ]] || options+=(--out "$(realpath -m "$out")")

    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    # shellcheck source=scripts/common.sh
    source "$here/../common.sh"
    # shellcheck source=scripts/packages.sh
    source "$here/../packages.sh"
    need_browser "$chromium"
    install_missing

    if [[ -z $work_dir ]]; then
        work_dir=$(mktemp -d)
        # shellcheck disable=SC2064  # the variable is local, and gone when the trap runs
        trap "rm -rf ${work_dir@Q}" EXIT
    fi
    mkdir -p "$work_dir"
    # The packages are complete if there is a copy of the current list.
    if ! cmp -s "$here/package-lock.json" "$work_dir/installed.json"; then
        cp "$here/package.json" "$here/package-lock.json" "$work_dir"
        (cd "$work_dir" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error)
        cp "$here/package-lock.json" "$work_dir/installed.json"
    fi
    # Node.js looks for packages beside the script.
    cp "$here"/*.mjs "$work_dir"
    # The services are on this machine or near it, and a proxy may not reach them.
    NO_PROXY='*' node "$work_dir/flow.mjs" "${urls[@]}" --chromium "${chromium:-$(command -v chromium)}" "${options[@]}"
}

main "$@"
