"""The moments of a host and of a plugin: from the start to the first answer, and a restart while requests come."""

import os
import shutil
import time
from statistics import median

from host import Host, request, rust_plugin
from loads import start_wrk, wrk_figures
from processes import READY_SECONDS, fail
from report import Section, Target, table
from sockets import free_port

MAX_START_MS = 100
PAUSE = 0.0005  # between looks for the first answer
LOAD_SECONDS = 3
RESTARTS = 3


def start_up(bench):
    """From the start of the process to the first answer of a plugin in Rust, the first time and again."""
    first, again = [], []
    room = bench.room("start")
    for _ in range(5 if bench.quick else 15):
        shutil.rmtree(room)
        os.mkdir(room)
        first.append(_first_answer(bench, room))
        again.append(_first_answer(bench, room))
    rows = [[name, "%.0f" % median(times), "%.0f" % min(times), "%.0f" % max(times)]
            for name, times in (("new data directory", first), ("again", again))]
    worst = max(median(first), median(again))
    text = "From the start of the host to the first answer of a plugin in Rust, in ms, %d times each.\n\n" % len(first)
    return Section("Start", text + table(["", "median", "least", "most"], rows),
                   [Target("first answer within %d ms of the start" % MAX_START_MS, "%.0f ms" % worst, worst <= MAX_START_MS)])


def _first_answer(bench, room):
    port, begun = free_port(), time.monotonic()
    host = Host(room, [rust_plugin()], bench.policy, port=port)
    while request(port, "GET", "/bench/hello") != (200, b"Hello, world!"):
        if time.monotonic() > begun + READY_SECONDS or host.process.poll() is not None:
            fail("plugrack gave no answer within %d s of its start: %s" % (READY_SECONDS, host.last_line()))
        time.sleep(PAUSE)
    took = time.monotonic() - begun
    host.stop()
    return took * 1000


def restart(bench):
    """The plugin is restarted while requests come: each of them must be answered, and rightly."""
    host, rows, lost = bench.host("restart"), [], 0
    for method, path in (("GET", "/bench/hello"), ("POST", "/bench/echo")):
        wrk = start_wrk(host.port, path, 16, LOAD_SECONDS, method, 1024 if method == "POST" else 0)
        for _ in range(RESTARTS):
            time.sleep(LOAD_SECONDS / (RESTARTS + 1))
            host.api("POST", "/api/plugins/bench/restart")
        figures, faults = wrk_figures(wrk, LOAD_SECONDS)
        bench.faults += ["%s while the plugin is restarted: %s" % (method, fault) for fault in faults]
        lost += sum(figures["errors"].values())
        rows.append([method, str(figures["requests"]), str(sum(figures["errors"].values())), "%.0f" % (figures["max_us"] / 1000)])
    host.stop()
    text = "The plugin is restarted %d times in %d s of requests at 16 connections.\n\n" % (RESTARTS, LOAD_SECONDS)
    return Section("Restart under load", text + table(["requests", "answered", "lost", "longest wait ms"], rows),
                   [Target("a restart of the plugin under load loses no request", "%d lost" % lost, lost == 0)])
