#!/usr/bin/env python3
"""The benchmark: plugrack beside what else one would put up, in one interleaved run. `make bench`; QUICK=1 for a short one.

It measures the loads of loads.py on the contenders of peers.py in turns, point by point, so that drift of the machine hits
all alike, then applications behind the host and behind nginx likewise, and then what grows with plugins, keys and writers, and
the moments of a start and a restart. The report goes to standard output and to target/bench/report.md, the plot to
target/bench/bench.svg; `make bench-docs` puts both into the documentation. The exit code is 1 if an answer was wrong, late or
missing: then the numbers do not count. A target that was missed is only said to be.

It needs the release build of the host and of tests/bench/plugin, nginx and wrk; a peer that is not installed is left out.
As root on Debian and its like it installs what is missing.
"""

import argparse
import glob
import os
import resource
import shutil
import signal
import sys
import tempfile
import time

import applications
import chain
import growth
import host
import lifecycle
import peers
import pipelining
import plot
import report
import store
import tools
from processes import ROOT, adopt_orphans, say, stop_all
from rounds import measure_loads, stop_contenders

OUT = os.path.join(ROOT, "target", "bench")
LOAD_SECONDS = 10 * 60  # of the loads; see rounds.py
POLICIES = {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH}
PARTS = ("loads", "apps", "chain", "plugins", "kv", "writers", "start", "restart", "pipelining")


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse():
    quick = os.environ.get("QUICK") == "1"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=positive, default=1 if quick else 5, metavar="N",
                        help="at most; fewer where they take longer than %d min" % (LOAD_SECONDS / 60))
    parser.add_argument("--seconds", type=positive, default=1, metavar="S",
                        help="for a point; twice that for 1000 downloads")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part, and others named likewise")
    parser.add_argument("--policy", choices=("as-host", *POLICIES), default="as-host",
                        help="how contenders are scheduled; as the host has scheduled itself, unless said otherwise")
    parser.add_argument("--directory", default="/var/tmp", metavar="DIR",
                        help="where the databases are; a real disk, for the durable writes (default: %(default)s)")
    parser.add_argument("--write-docs", action="store_true",
                        help="measure nothing: put the report and the plot of the last whole run into docs/")
    options = parser.parse_args()
    options.quick = quick
    options.part = options.part or list(PARTS)
    return options


def run(options, directory):
    """All parts that are wanted: the report, the plot, and the faults."""
    sections, faults, remarks, results, rounds, skipped = [], [], [], None, 0, []
    policy = POLICIES.get(options.policy)
    available = tools.provide()
    if "loads" in options.part:
        peering = peers.Peers(directory, policy, available)
        contenders = peering.start_all()
        policy, skipped = peering.policy, peering.skipped
        results, rounds = measure_loads(contenders, options, LOAD_SECONDS, faults, remarks)
        sections.append(report.loads_section(results))
        stop_contenders(contenders)
    bench = growth.Bench(directory, policy, options.quick, faults)
    for part, measured in (("apps", lambda bench: applications.compare(bench, available, options, remarks, skipped)),
                           ("chain", lambda bench: chain.compare(bench, available)), ("plugins", growth.plugins),
                           ("kv", store.sizes), ("writers", store.writers), ("start", lifecycle.start_up),
                           ("restart", lifecycle.restart), ("pipelining", pipelining.compare)):
        if part in options.part:
            say("bench: " + part)
            sections.append(measured(bench))
    names = {number: "SCHED_" + name.upper() for name, number in POLICIES.items()}
    head = report.machine(options, rounds, skipped, names.get(policy, "the system's default"))
    if options.quick:
        head += report.SHORT
    drawing = results and plot.draw(results)
    return report.whole(sections, head, faults, remarks, "bench.svg" if drawing else None), drawing, faults


def own_directory(parent):
    """A new directory below `parent`. What a run left there that was killed is removed."""
    prefix = "plugrack-bench-"
    for name in os.listdir(parent):
        pid = name[len(prefix):].partition("-")[0]
        if name.startswith(prefix) and pid.isdigit() and not os.path.exists("/proc/" + pid):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
    return tempfile.mkdtemp(prefix="%s%d-" % (prefix, os.getpid()), dir=parent)


def keep_logs(directory):
    """What host and peers had to say about a run that went wrong, put in place of that of the one before."""
    logs = os.path.join(OUT, "logs")
    shutil.rmtree(logs, ignore_errors=True)
    for path in glob.glob(os.path.join(directory, "**", "*.log"), recursive=True):
        kept = os.path.join(logs, os.path.relpath(path, directory))
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        shutil.copy(path, kept)
    say("bench: the logs are in target/bench/logs")


def main():
    options = parse()
    if options.write_docs:
        report.write_docs(OUT)
        return 0
    for name in ("plugrack", "bench-plugin", "bench-chain"):
        host.release(name)  # before anything is installed or built
    adopt_orphans()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = peers.FILES if most == resource.RLIM_INFINITY else min(peers.FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    os.makedirs(OUT, exist_ok=True)
    directory = own_directory(options.directory)
    begun, faults = time.monotonic(), None
    try:
        text, drawing, faults = run(options, directory)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        stop_all()
        if faults is None or faults:
            keep_logs(directory)
        shutil.rmtree(directory, ignore_errors=True)
    print(text, end="")
    name = "report.md" if options.part == list(PARTS) else "report-%s.md" % "-".join(options.part)
    for name, content in ((name, text), ("bench.svg", drawing)):
        if content:
            with open(os.path.join(OUT, name), "w") as file:
                file.write(content)
    say("bench: %d s, %d faults; the report is in target/bench" % (time.monotonic() - begun, len(faults)))
    return 1 if faults else 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # As an exception, so that main() cleans up.
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
