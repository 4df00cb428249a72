# shellcheck shell=bash
# Long-running processes with pid files in RUN_DIR.
#
# A pid file holds pid, start time and boot id, so that a script never confuses our process with a later one of the same
# pid. The .spec file beside it has the settings of the process. A change of those means a restart.

process_identity() {
    local stat fields
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # The command name is in brackets and may itself contain blanks and brackets.
    read -ra fields <<<"${stat##*) }"
    # A zombie has ended; only its parent has not collected it yet.
    [[ ${fields[0]} != Z ]] || return 1
    printf '%s %s %s' "$1" "${fields[19]}" "$(cat /proc/sys/kernel/random/boot_id)"
}

# Prints the pid of one of our daemons if it is alive; fails otherwise.
daemon_pid() {
    local recorded pid
    recorded=$(cat "$RUN_DIR/$1.pid" 2>/dev/null) || return 1
    pid=${recorded%% *}
    [[ -n $pid && $(process_identity "$pid") == "$recorded" ]] || return 1
    printf '%s' "$pid"
}

daemon_alive() { daemon_pid "$1" >/dev/null; }
daemon_ended() { ! daemon_alive "$1"; }

# daemon_is_current NAME SPEC: true if the daemon is alive and was started with these settings.
daemon_is_current() {
    daemon_alive "$1" && [[ $(cat "$RUN_DIR/$1.spec" 2>/dev/null) == "$2" ]]
}

# The position in its log where the present run of a daemon begins.
declare -A LOG_START=()

# start_daemon NAME SPEC COMMAND...
start_daemon() {
    local name=$1 spec=$2 log=$LOG_DIR/$1.log
    shift 2
    if [[ -e $log && $(stat -c %s "$log") -gt 50000000 ]]; then
        mv -f "$log" "$log.old"
    fi
    touch "$log"
    LOG_START[$name]=$(stat -c %s "$log")
    (
        # Other files that the caller has open (a pipe, the lock) would stay open as long as the daemon lives, and the
        # reader of a pipe would never see its end.
        local fd
        for fd in /proc/"$BASHPID"/fd/*; do
            fd=${fd##*/}
            ((fd <= 2)) || exec {fd}>&-
        done
        # RabbitMQ and the services need more than the usual 1,024. Erlang makes a table of this size, and in containers
        # the limit can be a thousand million.
        ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
        cd /
        # In a new session neither Ctrl-C nor the end of the terminal reaches it.
        exec setsid "${RUN_AS[@]}" "$@"
    ) </dev/null >>"$log" 2>&1 &
    local pid=$!
    disown "$pid"
    process_identity "$pid" >"$RUN_DIR/$name.pid" || true
    printf '%s' "$spec" >"$RUN_DIR/$name.spec"
}

# await_daemon NAME SECONDS COMMAND...: waits until the command succeeds. If the daemon dies or the time runs out, it
# prints the end of the log and ends the script.
await_daemon() {
    local name=$1 seconds=$2
    shift 2
    local deadline=$((SECONDS + seconds)) reason=''
    until "$@" >/dev/null 2>&1; do
        if daemon_ended "$name"; then
            reason="$name ended while it started"
        elif ((SECONDS >= deadline)); then
            reason="$name was not ready within $seconds seconds"
        fi
        if [[ -n $reason ]]; then
            printf '\n--- last lines of %s\n' "$LOG_DIR/$name.log" >&2
            tail -c "+$((${LOG_START[$name]:-0} + 1))" "$LOG_DIR/$name.log" | tail -n 25 >&2 || true
            printf -- '---\n' >&2
            die "$reason"
        fi
        sleep 0.1
    done
}

signal_daemon() {
    local pid
    pid=$(daemon_pid "$1") || return 0
    kill "-$2" "$pid" 2>/dev/null ||
        daemon_ended "$1" || die "no permission to end $1 (pid $pid): run this as the user who started it, or as root"
}

# await_end NAME SECONDS: waits for a daemon that got a signal, and kills it when the time runs out.
await_end() {
    local name=$1 seconds=$2 pid
    if ! wait_until "$seconds" daemon_ended "$name"; then
        pid=$(daemon_pid "$name") || true
        warn "$name has not ended within $seconds seconds and is killed"
        # It leads a process group (setsid), so this kills its children too.
        [[ -z $pid ]] || kill -KILL -- "-$pid" 2>/dev/null || true
        wait_until 5 daemon_ended "$name" || die "$name (pid $pid) can't be ended"
    fi
    rm -f "$RUN_DIR/$name.pid" "$RUN_DIR/$name.spec"
}

stop_daemon() {
    local name=$1 signal=$2 seconds=$3
    signal_daemon "$name" "$signal"
    await_end "$name" "$seconds"
}

# port_is_ours PORT: true if one of our daemons, or a child of one, listens on this port.
port_is_ours() {
    local owner session file
    owner=$(port_owner "$1")
    [[ -n $owner ]] || return 1
    # Field 6 of stat, the fourth after the command name, is the session: the pid of the daemon that leads it.
    session=$(sed 's/.*) //' "/proc/$owner/stat" 2>/dev/null | cut -d ' ' -f 4) || return 1
    for file in "$RUN_DIR"/*.pid; do
        [[ -e $file ]] || continue
        file=${file##*/}
        [[ $(daemon_pid "${file%.pid}") != "$session" ]] || return 0
    done
    return 1
}
