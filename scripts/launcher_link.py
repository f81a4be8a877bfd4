"""Joins the launchers of a job's machines, so that all end when one does, and each says why.

    launcher_link.py NODE MACHINES WORKERS ADDRESS PORT TIMEOUT PID ...

msrun_launcher.sh starts it; the PIDs are those of its processes. Machine 0 listens on ADDRESS:PORT; each other
machine holds one connection to it. Lines go over it, and come from the launcher on stdin: `done` (the workers
of a machine have finished), `end STATUS REASON`, and `alive` every few seconds. A machine that is silent, and a
launcher that is gone without a word, have ended. So a lost worker is known at once; the other workers would
wait for it in a collective, on NPUs for half an hour.

Exit status: 0 when the workers of all machines have finished, otherwise that of what ended first.
"""
import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time

BEAT, SILENCE = 2, 20  # seconds from one word to the next; without a word until a machine counts as lost
NODE, MACHINES, WORKERS, PORT, TIMEOUT = map(int, (*sys.argv[1:4], *sys.argv[5:7]))
ADDRESS, PIDS = sys.argv[4], [int(pid) for pid in sys.argv[7:]]
OTHERS = set(range(1, MACHINES)) if NODE == 0 else {0}
TEXT = {"encoding": "utf-8", "errors": "replace", "newline": "\n"}
PLAN = f"{WORKERS} workers on {MACHINES} machines"
KILLED = f"the launcher of machine {NODE} was killed"


def say(connection, line):
    """Send a line. Where that fails, the connection's reader notices too."""
    with contextlib.suppress(OSError):
        connection.sendall(line.encode() + b"\n")


def lines_of(connection):
    """What comes over a connection, as text; an error after SILENCE seconds without any."""
    connection.settimeout(SILENCE)
    return connection.makefile(**TEXT)


def read(lines, who, events):
    """Put (who, line) on the queue for each line that says something, and (who, None) when no more come."""
    try:
        for line in lines:
            if line != "alive\n":
                events.put((who, line.rstrip("\n")))
    except OSError:
        pass
    events.put((who, None))


def join(events):
    """On machines other than 0: connect to machine 0 as soon as it listens, and read what it says."""
    while True:
        try:
            connection = socket.create_connection((ADDRESS, PORT), timeout=SILENCE)
            break
        except OSError:
            time.sleep(0.5)
    say(connection, f"machine {NODE} {PLAN}")
    events.put((0, connection))
    read(lines_of(connection), 0, events)


def listen(events):
    """On machine 0: let the others in."""
    try:
        server = socket.create_server((ADDRESS, PORT))
    except OSError as error:
        events.put((None, f"end 2 machine 0 cannot listen on {ADDRESS}:{PORT} ({error.strerror}); "
                          "MASTER_ADDR must be an address of machine 0, and PORT + 1 free"))
        return
    while True:
        threading.Thread(target=greet, args=(server.accept()[0], events), daemon=True).start()


def greet(connection, events):
    """On machine 0: learn which machine has come, and read what it says. Strangers are sent away."""
    lines = lines_of(connection)
    try:
        word, number, plan = lines.readline().rstrip("\n").split(" ", 2)
        if word != "machine" or int(number) not in OTHERS:
            raise ValueError(number)
    except (OSError, ValueError):
        connection.close()
        return
    events.put((int(number), connection))
    if plan != PLAN:
        events.put((None, f"end 2 machine 0 was started for {PLAN}, machine {number} for {plan}"))
    read(lines, int(number), events)


def outcome(events, connections):
    """Wait until all machines are done or one has ended: (exit status, reason, the machine that told it)."""
    deadline, done = time.monotonic() + TIMEOUT, set()
    while True:
        try:
            who, what = events.get(timeout=BEAT)
        except queue.Empty:
            who = what = None
        if isinstance(what, socket.socket):
            connections[who] = what
        elif what == "done":
            done.add(who)
        elif what:
            _, status, reason = what.split(" ", 2)
            return int(status), reason, who
        elif who == NODE:
            return 137, KILLED, None
        elif who is not None:
            return 1, f"machine {who} gives no sign of life: it, its launcher or the network is down", None
        if len(done) == MACHINES or (NODE and 0 in done):
            return 0, "", None
        missing = sorted(OTHERS - set(connections))
        if missing and time.monotonic() > deadline:
            who = f"machine {', '.join(map(str, missing))}" if NODE == 0 else f"this machine, {NODE},"
            return 1, (f"{who} did not come to {ADDRESS}:{PORT} of machine 0 within {TIMEOUT} s: start the "
                       "launcher on each machine with the same MASTER_ADDR and PORT, and open ports "
                       f"{PORT - 1} and {PORT} of machine 0"), None
        for connection in connections.values():
            say(connection, "done" if NODE in done and NODE else "alive")


def end_workers():
    """End the launcher's processes in its place: ask them, and after 5 seconds end those that have not."""
    for tenth in range(51):
        left = [pid for pid in PIDS if os.path.exists(f"/proc/{pid}")]
        for pid in left if tenth in (0, 50) else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if tenth else signal.SIGTERM)
        if not left:
            break
        time.sleep(0.1)


def main():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the launcher says when to end
        signal.signal(number, signal.SIG_IGN)
    events, connections = queue.Queue(), {}
    threading.Thread(target=read, args=(os.fdopen(0, **TEXT), NODE, events), daemon=True).start()
    threading.Thread(target=listen if NODE == 0 else join, args=(events,), daemon=True).start()
    status, reason, told_by = outcome(events, connections)
    for number, connection in connections.items():
        if number != told_by:
            say(connection, f"end {status} {reason}" if status else "done")
    if told_by != NODE and status:
        print(f"machine {NODE} stops: {reason}", file=sys.stderr, flush=True)
    if reason == KILLED:
        end_workers()
    os._exit(status)  # threads still read


main()
