#!/usr/bin/env bash
# Run a Python command on several workers, one per NPU (or as CPU processes), and wait for them.
#
#   msrun_launcher.sh "script.py --option value ..." [WORKERS [PORT LOG_DIR JOIN TIMEOUT]]
#   msrun_launcher.sh "script.py ..." WORKERS LOCAL_WORKERS MASTER_ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT
#
# It sets the same environment as msrun (MindSpore's dynamic cluster), but it does not keep a core busy while it
# waits, and it returns the exit status of a worker that fails. With one worker, the command runs without a cluster.
# With several machines, run it on each; launcher_link.py connects the launchers, so that all end when one does.
# Workers end with their launcher, even if that is killed: launcher_worker.py.
set -u

usage() {
  cat <<EOF
usage: msrun_launcher.sh "COMMAND" [WORKERS [PORT LOG_DIR JOIN TIMEOUT]]
       msrun_launcher.sh "COMMAND" WORKERS LOCAL_WORKERS MASTER_ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT
  COMMAND        a Python script and its options, as one quoted argument; quotes and backslashes in it
                 work as in a shell, nothing is evaluated: \$x, \$(...), ; and * are plain text
  WORKERS        total number of processes, one per NPU (default: 8)
  LOCAL_WORKERS  number of processes on this machine
  MASTER_ADDR    IP address of the machine with NODE_RANK 0
  PORT           of the scheduler; 0 (default): any free port. Several machines also use PORT + 1
  NODE_RANK      number of this machine, from 0
  LOG_DIR        folder for worker_N.log (default: a new folder in output/msrun_log/)
  JOIN           True: wait for the workers (default); False: leave them running in the background
  TIMEOUT        seconds to wait until all workers have connected (default: 600)
example: bash ../../scripts/msrun_launcher.sh "run_dpo.py --config finetune_glm4_9b.yaml ..." 8
EOF
}
[[ ${1:-} != -h && ${1:-} != --help ]] || { usage; exit 0; }

# A control character in a value must not reach the terminal.
fail() { printf 'error: %s\n' "${1//[[:cntrl:]]/?}" >&2; exit 2; }

workers=8 local_workers= address=127.0.0.1 port= node=0 log_dir= join=True timeout=600
case $# in
  1) ;;
  2) workers=$2 ;;
  6) workers=$2 port=$3 log_dir=$4 join=$5 timeout=$6 ;;
  9) workers=$2 local_workers=$3 address=$4 port=$5 node=$6 log_dir=$7 join=$8 timeout=$9 ;;
  *) usage >&2; exit 2 ;;
esac
command=$1
local_workers=${local_workers:-$workers}
for entry in "WORKERS=$workers" "LOCAL_WORKERS=$local_workers" "NODE_RANK=$node" "TIMEOUT=$timeout" "PORT=${port:-1}"; do
  [[ ${entry#*=} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
    fail "${entry%%=*} is '${entry#*=}'; a whole number of at most 9 digits expected"
done
[[ $workers -ge 1 && $local_workers -ge 1 && $local_workers -le $workers ]] ||
  fail "WORKERS is $workers, LOCAL_WORKERS $local_workers; from 1 to WORKERS expected"
machines=$((workers / local_workers))
[[ $((machines * local_workers)) == "$workers" && $node -lt $machines ]] ||
  fail "WORKERS $workers with LOCAL_WORKERS $local_workers and NODE_RANK $node: each machine must run as \
many workers as the others, and NODE_RANK must be below the number of machines"
[[ $machines == 1 || (${port:-0} -ge 1 && $port -lt 65535) ]] ||
  fail "PORT is ${port:-0}; several machines need the same port, from 1 to 65534"
[[ ${port:-0} -le 65535 ]] || fail "PORT is $port; from 1 to 65535 expected, or 0 for any free port"
[[ $join == True || $join == False ]] || fail "JOIN is '$join'; True or False expected"
python=${PYTHON:-python} scripts=${BASH_SOURCE%/*}
[[ $scripts != "${BASH_SOURCE[0]}" ]] || scripts=.
command -v "$python" > /dev/null || fail "no $python on the PATH; activate the virtual environment first"
mapfile -d '' -t arguments < <("$python" -IS "$scripts/launcher_words.py" "$command")
[[ ${#arguments[@]} -gt 0 ]] || exit 2 # it has said why
unset 'arguments[-1]'                  # the word `end`
[[ ${#arguments[@]} -gt 0 ]] || { usage >&2; exit 2; }
[[ ${arguments[0]} != python && ${arguments[0]} != python3 ]] || arguments=("${arguments[@]:1}")
[[ -f ${arguments[0]:-} ]] || fail "${arguments[0]:-}: no such script here"
[[ $workers == 1 || $node != 0 ]] || port=$("$python" -IS -c '
import socket, sys
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    server.bind(("", int(sys.argv[1])))
except OSError as error:
    sys.exit(f"error: PORT {sys.argv[1]}: {error.strerror}; give another one, or 0 for any free port")
print(server.getsockname()[1])' "${port:-0}") || exit 2
log_dir=${log_dir:-output/msrun_log/$(date +%Y%m%d-%H%M%S)-$$}
mkdir -p "$log_dir" 2> /dev/null || fail "$log_dir: cannot be created; give another LOG_DIR"

pids=() scheduler= link=
tell() { # LINE: send it to the launchers of the other machines
  [[ -z $link ]] || (trap '' PIPE; echo "$1" >&"$to_link") 2> /dev/null
}
stop_all() { # [SECONDS]: SIGTERM to all workers, and SIGKILL to those alive after so many seconds (default: 5)
  local pid alive number
  [[ $! == "$link" ]] || pids+=("$!") # a signal may come between its start and its listing
  for ((waited = 0; waited < ${1:-5} * 10; waited++)); do
    # once more after a second: a process that bash has just forked can lose a signal
    [[ $waited == 0 || $waited == 10 ]] && number=TERM || number=0
    alive=
    for pid in "${pids[@]}"; do kill -"$number" "$pid" 2> /dev/null && alive=1; done
    [[ -n $alive ]] || break
    sleep 0.1
  done
  for pid in "${pids[@]}" $scheduler; do kill -KILL "$pid" 2> /dev/null; done
  wait "${pids[@]}" $scheduler 2> /dev/null
}
interrupt() { # STATUS
  tell "end $1 the launcher of machine $node was interrupted"
  stop_all
  exit "$1"
}
trap 'interrupt 130' INT
trap 'interrupt 131' QUIT
trap 'interrupt 141' PIPE
terminate() { # allow time: training saves its state first
  tell "end 143 the launcher of machine $node was terminated"
  stop_all "$timeout"
  show
  exit 143
}
trap terminate TERM HUP
# a worker's own process replaces launcher_worker.py; JOIN False lets the workers outlive the launcher
with_launcher=("$python" -IS "$scripts/launcher_worker.py" $$)
[[ $join == True ]] || with_launcher=()

[[ $machines == 1 ]] && launch=$HOSTNAME-$$-$(date +%s) || launch=$address:$port
export MINDRLHF_COMMAND="bash ${0@Q} ${*@Q}"
export MINDRLHF_LAUNCH=$launch # alike for all workers, which share their locks: mindrlhf/locks.py
export MS_WORKER_NUM=$workers RANK_SIZE=$workers GLOG_v=${GLOG_v:-3}
[[ -t 2 ]] && export MINDRLHF_TERMINAL=1 # interactive: draw progress bars
if [[ $workers -gt 1 ]]; then
  export MS_SCHED_HOST=$address MS_SCHED_PORT=$port MS_TOPO_TIMEOUT=$timeout MS_NODE_RANK=$node
  if [[ $node == 0 ]]; then
    MS_ROLE=MS_SCHED RANK_ID=0 "${with_launcher[@]}" "$python" "${arguments[@]}" > "$log_dir/scheduler.log" 2>&1 < /dev/null &
    scheduler=$!
  fi
  export MS_ROLE=MS_WORKER
fi
first=$((node * local_workers))
for ((i = 0; i < local_workers; i++)); do
  rank=$((first + i))
  : > "$log_dir/worker_$rank.log"
  MS_NODE_ID=$rank RANK_ID=$rank DEVICE_ID=$i "${with_launcher[@]}" "$python" "${arguments[@]}" \
    > "$log_dir/worker_$rank.log" 2>&1 < /dev/null &
  pids+=($!)
done
if [[ $join == False ]]; then
  echo "$local_workers worker(s) run in the background; logs: $log_dir/worker_*.log"
  exit 0
fi
if [[ $machines -gt 1 ]]; then
  coproc LINK {
    exec "$python" -S "$scripts/launcher_link.py" "$node" "$machines" "$workers" "$address" $((port + 1)) "$timeout"
  }
  link=$LINK_PID
  exec {to_link}>&"${LINK[1]}"
fi
heed_link() { # end if the link has ended: another machine has ended, or cannot be reached, and the link said so
  [[ -n $link ]] && ! kill -0 "$link" 2> /dev/null || return
  wait "$link"
  local status=$?
  [[ $status == 143 ]] && stop_all "$timeout" || stop_all
  show
  exit "$status"
}

ended_with() { # STATUS: with the signal that ended the process, if any
  local name
  [[ $1 -gt 128 ]] && name=$(kill -l "$1" 2> /dev/null) || name=
  case $name in
    '') echo "status $1" ;;
    KILL) echo "status $1 (SIGKILL, which the kernel sends when memory runs out)" ;;
    *) echo "status $1 (SIG$name)" ;;
  esac
}
shown=0
show() { # print the new part of the first worker's log
  local size
  size=$(wc -c < "$log_dir/worker_$first.log")
  if [[ $size -gt $shown ]]; then
    tail -c +$((shown + 1)) "$log_dir/worker_$first.log" | head -c $((size - shown))
    shown=$size
  fi
}

left=("${!pids[@]}")
while [[ ${#left[@]} -gt 0 ]]; do
  sleep 0.2
  show
  heed_link
  still=()
  for i in "${left[@]}"; do
    if kill -0 "${pids[i]}" 2> /dev/null; then
      still+=("$i")
      continue
    fi
    wait "${pids[i]}"
    status=$?
    [[ $status == 0 ]] && continue
    log=$log_dir/worker_$((first + i)).log
    if [[ -n $link ]]; then # did this worker fail, or was it stopped because another machine ended?
      sleep 1
      heed_link
      end=$(tail -n 1 "$log" | cut -c 1-300)
      tell "end $status worker $((first + i)) on machine $node ended with $(ended_with "$status"); its log ends: $end"
    fi
    stop_all
    show
    echo "worker $((first + i)) ended with $(ended_with "$status"); the others were stopped. Its log: $log" >&2
    if [[ $i -gt 0 ]]; then # the first worker's log is on the screen already
      echo "its last lines:" >&2
      tail -n 20 "$log" >&2
    fi
    exit "$status"
  done
  left=("${still[@]}")
done
show
if [[ -n $link ]]; then
  tell done
  wait "$link" # until the workers of all machines are done
  status=$?
  [[ $status == 0 ]] || { stop_all; exit "$status"; }
fi
if [[ -n $scheduler ]]; then # all workers have ended
  pids=("$scheduler")
  stop_all
fi
exit 0
