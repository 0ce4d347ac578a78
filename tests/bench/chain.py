"""What the host's way costs a request by itself: the same threads, sockets and wakes with nothing in them, beside host and nginx.

No host of this shape can be quicker.
"""

import os
from collections import namedtuple
from statistics import median

from host import release, request
from loads import LOADS, answers
from peers import CORES, Peers
from processes import fail, start, stop, wait_for
from report import Section, number, table
from sockets import free_port

Way = namedtuple("Way", "port process")

POINTS = {"hello": (1, 16, 64, 256), "echo": (16, 64, 256), "mib": (1, 16, 256)}
NAMES = {"host": "plugrack", "empty": "its threads, empty", "peer": "nginx → server"}


def compare(bench, available):
    """All three in turns, there and back again."""
    host = bench.host("chain")
    peer = Peers(bench.room("chain-peers"), bench.policy, available).server()
    empty = {connections: _start(bench, connections) for connections in (1, 2)}

    def server(load, key):
        # As many connections as the host has to its plugin.
        return {"host": host, "peer": peer}.get(key) or empty[1 if load.key == "hello" and CORES < 4 else 2]

    points = [(load, c) for load in LOADS for c in POINTS.get(load.key, ())]
    rounds = []
    for turn in range(1 if bench.quick else 3):
        rates = {}
        for load, c in points:
            for key in list(NAMES) if turn % 2 else list(NAMES)[::-1]:
                rates[load, c, key] = _rate(bench, key, server(load, key), load, c)
        rounds.append(rates)
    host.stop()
    stop(*peer.processes, *(way.process for way in empty.values()))

    def cell(load, c, key):
        rates = number(median(each[load, c, key] for each in rounds))
        return rates if key == "peer" else "%s (%.2f×)" % (
            rates, median(each[load, c, key] / each[load, c, "peer"] for each in rounds))

    text = ("Requests a second, and in parentheses how many times those of nginx before the server. The host's threads are also "
            "measured empty: the same sockets, channels and wakes, messages as long as its own, and nothing done in between.\n\n")
    text += table(["load, connections"] + list(NAMES.values()),
                  [["%s, %d" % (load.title, c)] + [cell(load, c, key) for key in NAMES] for load, c in points])
    return Section("The way through the host", text, [])


def _rate(bench, key, server, load, connections):
    figures = bench.load(server, "chain, %s, %s, %d connections" % (key, load.key, connections), "/bench" + load.path, connections,
                         method=load.method, size=len(load.body or b""))
    return answers(load, figures) / figures["duration_us"] * 1e6


def _start(bench, connections):
    port, path = free_port(), os.path.join(bench.room("chain"), "%d.log" % connections)

    def is_right(load):
        return request(port, load.method, "/bench" + load.path, load.body) == (200, load.answer)

    with open(path, "w+b") as log:
        process = start([release("bench-chain"), str(port), str(connections)], log, bench.policy)
        if not wait_for("bench-chain", process, log, lambda: is_right(LOADS[0])):
            fail("bench-chain does not answer.")
    for load in LOADS:
        if not is_right(load):
            fail("bench-chain answers %s %s wrongly." % (load.method, load.path))
    return Way(port, process)
