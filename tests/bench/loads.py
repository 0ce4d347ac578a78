"""The loads: what is asked of each contender, checked byte for byte, and measured by wrk."""

import json
import os
import re
import subprocess
import time
from collections import namedtuple

from host import request
from processes import ROOT, cpu_seconds, fail, finish, memory_mib, start, tree, wait_for
from sockets import received

# `by_bytes`: requests are counted by the bytes of their answers, since many answers are under way when a point is over, and some
# contenders work at all of them at once. `headers` are those of the request, beside the host; `connections` how many there are.
Load = namedtuple("Load", "key title method path body answer by_bytes headers connections")
# Requests per second, milliseconds (None where no answer was whole), microseconds of processor time a request, MiB of the front
# alone and of all.
Point = namedtuple("Point", "rate p50 p99 cpu front memory")

CONNECTIONS = (1, 16, 64, 256, 1000)
_TEXT = b"0123456789abcdef" * 4096
_BROWSER = (  # what one sends with a link that was followed
    ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"),
    ("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
    ("Accept-Encoding", "gzip, deflate, br"),
    ("Accept-Language", "en-US,en;q=0.9,de;q=0.8"),
    ("Cookie", "session=0123456789abcdef0123456789abcdef"),
    ("Referer", "http://rack.example:8080/bench/"),
    ("Sec-Fetch-Dest", "document"),
    ("Sec-Fetch-Mode", "navigate"),
    ("Sec-Fetch-Site", "same-origin"),
    ("Cache-Control", "max-age=0"),
)
LOADS = (
    Load("hello", "GET of 13 bytes", "GET", "/hello", None, b"Hello, world!", False, (), CONNECTIONS),
    Load("browser", "The same with a browser's headers", "GET", "/hello", None, b"Hello, world!", False, _BROWSER, (1, 16, 256)),
    Load("echo", "POST of 64 KiB, echoed", "POST", "/echo", _TEXT, _TEXT, False, (), CONNECTIONS),
    Load("mib", "GET of 1 MiB", "GET", "/mib", None, b"m" * (1 << 20), True, (), CONNECTIONS),
)
LATE_SECONDS = 10  # an answer after this is late
QUIET_SECONDS = 3  # at most this long a contender is given to be done with what nobody waits for any more
MIN_ANSWERS = 20  # where a connection is due so many answers and gets none, it was forgotten


def check(contender, load, log=None):
    """Compares an answer byte for byte. With a log it waits for the route: a plugin may come up after its front."""
    answer = []

    def ok():
        answer[:] = request(contender.port, load.method, contender.prefix + load.path, load.body, dict(load.headers)) or ()
        return answer and answer[0] == 200

    if log is None:
        ok()
    else:
        wait_for(contender.name, contender.process, log, ok)
    if answer != [200, load.answer]:
        got = "%d, %d bytes, %r" % (answer[0], len(answer[1]), answer[1][:80]) if answer else "nothing"
        fail("%s answers %s %s with %s instead of 200, %d bytes, %r."
             % (contender.name, load.method, load.path, got, len(load.answer), load.answer[:80]))


def start_wrk(port, path, connections, seconds, method="GET", size=0, script=None, headers=()):
    """wrk with the script that every load has, or with one that wants a thread for each connection."""
    threads = connections if script else min(2, connections)
    return start(["wrk", "-t%d" % threads, "-c%d" % connections, "-d%ds" % seconds, "--timeout", "%ds" % LATE_SECONDS,
                  *(word for header in headers for word in ("-H", "%s: %s" % header)),
                  "-s", script or os.path.join(ROOT, "tests/bench/wrk.lua"),
                  "http://127.0.0.1:%d%s" % (port, path), "--", method, str(size)], subprocess.PIPE)


def wrk_figures(wrk, seconds):
    """wrk's own figures once it has ended, and its faults in words."""
    report = finish(wrk, seconds + LATE_SECONDS + 20)
    found = re.search(r"^FIGURES (.*)$", report, re.MULTILINE)
    figures = json.loads(found.group(1)) if found else {}
    if wrk.returncode != 0 or not figures:
        fail("wrk measured nothing; it says: %s" % " ".join(report.split()))
    return figures, ["%d %s errors" % (number, kind) for kind, number in figures["errors"].items() if number]


def answers(load, figures):
    """How many answers wrk has had."""
    return figures["bytes"] / len(load.answer) if load.by_bytes else figures["requests"]


def calm_down(pids):
    """Waits until these processes rest: what was under way when time was up must not be at the next contender's expense."""
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        before = cpu_seconds(pids)
        time.sleep(0.05)
        if cpu_seconds(pids) - before <= 0.01:
            return


def measure(contender, load, connections, seconds):
    """One run of wrk: its point, None where there was nothing to measure, the faults in words, and how many connections were silent."""
    roots = [process.pid for process in contender.processes]
    pids, front = tree(roots), contender.front()
    cpu = cpu_seconds(pids)
    wrk = start_wrk(contender.port, contender.prefix + load.path, connections, seconds, load.method,
                    len(load.body or b""), headers=load.headers)
    time.sleep(0.3 * seconds)
    before, looks = received(contender.port), [(memory_mib(front), memory_mib(pids))]
    time.sleep(0.6 * seconds)
    after = received(contender.port)
    looks.append((memory_mib(front), memory_mib(pids)))
    figures, faults = wrk_figures(wrk, seconds)
    cpu = cpu_seconds(tree(roots)) - cpu
    calm_down(pids)
    for process in contender.processes:
        if process.poll() is not None:
            fail("%s: %s exited with code %d while it was measured."
                 % (contender.name, process.args[0], process.returncode))

    whole, size = figures["requests"], figures["bytes"]
    if size < whole * len(load.answer):
        faults.append("%d answers in %d bytes are too short" % (whole, size))
    requests = answers(load, figures)
    if not requests:
        return None, faults if load.by_bytes else faults + ["no answer at all"], 0
    rate, silent = requests / figures["duration_us"] * 1e6, 0
    if before is not None and after is not None and rate * 0.6 * seconds >= MIN_ANSWERS * connections:
        silent = sum(after.get(client) == count for client, count in before.items())
    front_memory, memory = (max(column) for column in zip(*looks))
    p50, p99 = (figures[name] / 1e3 if whole else None for name in ("p50_us", "p99_us"))
    return Point(rate, p50, p99, cpu / requests * 1e6, front_memory, memory), faults, silent
