"""Connects the launchers of a job's machines, so that all end when one does, and each says why.

    launcher_link.py NODE MACHINES WORKERS ADDRESS PORT TIMEOUT

msrun_launcher.sh starts it. Machine 0 listens on ADDRESS:PORT; each other machine holds one
connection to it. Connections, and the launcher through stdin, carry lines: `done` (the workers of a
machine have finished), `end STATUS REASON`, and `alive` every few seconds. A machine that is silent
has ended, and so has a launcher whose stdin closes without a word (its workers end with it). So a
lost worker is noticed at once; the other workers would wait for it in a collective, on NPUs for
half an hour.

Exit status: 0 when the workers of all machines have finished, otherwise that of what ended first.
"""
from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple, TextIO

BEAT = 2  # seconds between two lines
SILENCE = 20  # seconds without a line after which a machine counts as lost
NODE, MACHINES, WORKERS, PORT, TIMEOUT = map(int, (*sys.argv[1:4], *sys.argv[5:7]))
ADDRESS = sys.argv[4]
OTHERS = set(range(1, MACHINES)) if NODE == 0 else {0}
PLAN = f"{WORKERS} workers on {MACHINES} machines"
KILLED = f"the launcher of machine {NODE} was killed"


class Event(NamedTuple):
    """Something that happened.

    Attributes:
        who: number of the machine; None for this process.
        what: a new connection, a line, or None when no more lines come.
    """
    who: int | None
    what: socket.socket | str | None


class Outcome(NamedTuple):
    """How the job ends.

    Attributes:
        status: exit status.
        reason: empty if all is well.
        told_by: the machine that reported it, or None.
    """
    status: int
    reason: str
    told_by: int | None


def say(connection: socket.socket, line: str) -> None:
    """Send a line. If that fails, the connection's reader notices too."""
    with contextlib.suppress(OSError):
        connection.sendall(line.encode() + b"\n")


def lines_of(connection: socket.socket) -> TextIO:
    """Lines that arrive over a connection; reading fails after SILENCE seconds without any."""
    connection.settimeout(SILENCE)
    return connection.makefile(encoding="utf-8", errors="replace", newline="\n")


def read(lines: Iterable[str], who: int, events: queue.Queue[Event]) -> None:
    """Put an event for each line except `alive`, and one when no more come.

    Args:
        lines: what a machine says.
        who: number of the machine.
        events: queue of Event.
    """
    try:
        for line in lines:
            if line != "alive\n":
                events.put(Event(who, line.rstrip("\n")))
    except OSError:
        pass
    events.put(Event(who, None))


def join(events: queue.Queue[Event]) -> None:
    """On every machine but 0: connect to machine 0 as soon as it listens, and read its lines."""
    while True:
        try:
            connection = socket.create_connection((ADDRESS, PORT), timeout=SILENCE)
            break
        except OSError:
            time.sleep(0.5)
    say(connection, f"machine {NODE} {PLAN}")
    events.put(Event(0, connection))
    read(lines_of(connection), 0, events)


def listen(events: queue.Queue[Event]) -> None:
    """On machine 0: accept the connections of the others."""
    try:
        server = socket.create_server((ADDRESS, PORT))
    except OSError as error:
        events.put(Event(None, f"end 2 machine 0 cannot listen on {ADDRESS}:{PORT} "
                               f"({error.strerror}); MASTER_ADDR must be an address of machine 0, "
                               "and PORT + 1 free"))
        return
    while True:
        threading.Thread(target=greet, args=(server.accept()[0], events), daemon=True).start()


def greet(connection: socket.socket, events: queue.Queue[Event]) -> None:
    """On machine 0: find out which machine has connected, and read its lines; refuse strangers."""
    lines = lines_of(connection)
    try:
        word, number, plan = lines.readline().rstrip("\n").split(" ", 2)
        if word != "machine" or int(number) not in OTHERS:
            raise ValueError(number)
    except (OSError, ValueError):
        connection.close()
        return
    events.put(Event(int(number), connection))
    if plan != PLAN:
        events.put(Event(None, f"end 2 machine 0 was started for {PLAN}, "
                               f"machine {number} for {plan}"))
    read(lines, int(number), events)


def outcome(events: queue.Queue[Event], connections: dict[int, socket.socket]) -> Outcome:
    """Wait until all machines are done or one has ended.

    Args:
        events: queue of Event.
        connections: machine -> connection, filled here.
    """
    deadline, done = time.monotonic() + TIMEOUT, set()
    while True:
        try:
            who, what = events.get(timeout=BEAT)
        except queue.Empty:
            who = what = None
        if isinstance(what, socket.socket):
            assert who is not None
            connections[who] = what
        elif what == "done":
            done.add(who)
        elif what:
            _, status, reason = what.split(" ", 2)
            return Outcome(int(status), reason, who)
        elif who == NODE:
            return Outcome(137, KILLED, None)
        elif who is not None:
            return Outcome(1, f"machine {who} gives no sign of life: it, its launcher or the "
                              "network is down", None)
        if len(done) == MACHINES or (NODE and 0 in done):
            return Outcome(0, "", None)
        missing = sorted(OTHERS - set(connections))
        if missing and time.monotonic() > deadline:
            return Outcome(1, never_connected(missing), None)
        for connection in connections.values():
            say(connection, "done" if NODE in done and NODE else "alive")


def never_connected(missing: list[int]) -> str:
    """The error message about machines that did not connect in time."""
    who = f"machine {', '.join(map(str, missing))}" if NODE == 0 else f"this machine, {NODE},"
    return (f"{who} did not connect to {ADDRESS}:{PORT} of machine 0 within {TIMEOUT} s: start the "
            "launcher on each machine with the same MASTER_ADDR and PORT, and open ports "
            f"{PORT - 1} and {PORT} of machine 0")


def main() -> None:
    """Wait for the end of the job, and pass it on to the other machines."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the launcher decides
        signal.signal(number, signal.SIG_IGN)
    events: queue.Queue[Event] = queue.Queue()
    connections: dict[int, socket.socket] = {}
    launcher = os.fdopen(0, encoding="utf-8", errors="replace", newline="\n")
    threading.Thread(target=read, args=(launcher, NODE, events), daemon=True).start()
    threading.Thread(target=listen if NODE == 0 else join, args=(events,), daemon=True).start()
    status, reason, told_by = outcome(events, connections)
    for machine, connection in connections.items():
        if machine != told_by:
            say(connection, f"end {status} {reason}" if status else "done")
    if told_by != NODE and status:
        shown = "".join(char if char.isprintable() else "?" for char in reason)
        print(f"machine {NODE} stops: {shown}", file=sys.stderr, flush=True)
    os._exit(status)  # threads are still reading


if __name__ == "__main__":
    main()
