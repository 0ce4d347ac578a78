"""What the host's way costs a request by itself: the same threads, sockets and wakes with nothing in them, beside host and nginx.

No host of this shape can be quicker than the whole way. The short one leaves out the HTTP library's thread and the dispatcher, to
show what another shape would give.
"""

import os
from statistics import median

from growth import rate
from host import release, request
from loads import start_wrk, wrk_figures
from peers import Peers
from processes import fail, start, stop, wait_for
from report import Section, number, table
from sockets import free_port

CONNECTIONS = (1, 16, 64, 256)
NAMES = {"host": "plugrack", "whole": "its threads, empty", "short": "without library and dispatcher", "peer": "nginx → server"}


def compare(bench, available):
    """All four in turns, there and back again."""
    host = bench.host("chain")
    peer = Peers(bench.room("chain-peers"), bench.policy, available).server()
    ways = {way: _start(bench, way) for way in ("whole", "short")}
    paths = {"host": (host.port, "/bench/hello"), "peer": (peer.port, "/bench/hello"),
             **{way: (port, "/bench/hello") for way, (port, _) in ways.items()}}
    rounds = []
    for turn in range(1 if bench.quick else 4):
        rates = {}
        for c in CONNECTIONS:
            for key in list(paths) if turn % 2 else list(paths)[::-1]:
                figures, faults = wrk_figures(start_wrk(*paths[key], c, 1), 1)
                bench.faults += ["chain, %s, %d connections: %s" % (key, c, fault) for fault in faults]
                rates[c, key] = rate(figures)
        rounds.append(rates)
    host.stop()
    stop(*peer.processes, *(process for _, process in ways.values()))

    def cell(c, key):
        rates = number(median(each[c, key] for each in rounds))
        return rates if key == "peer" else "%s (%.2f×)" % (rates, median(each[c, key] / each[c, "peer"] for each in rounds))

    text = ("GET of 13 bytes, requests a second, and in parentheses how many times those of nginx before the server. "
            "The host's threads are also measured empty: the same sockets, channels and wakes, messages as long as its own, and "
            "nothing done in between.\n\n")
    text += table(["connections"] + [NAMES[key] for key in NAMES], [[str(c)] + [cell(c, key) for key in NAMES] for c in CONNECTIONS])
    return Section("The way through the host", text, [])


def _start(bench, way):
    port, path = free_port(), os.path.join(bench.room("chain"), way + ".log")
    with open(path, "w+b") as log:
        process = start([release("bench-chain"), way, str(port)], log, bench.policy)
        if not wait_for("bench-chain", process, log, lambda: request(port, "GET", "/bench/hello") == (200, b"Hello, world!")):
            fail("bench-chain does not answer.")
    return port, process
