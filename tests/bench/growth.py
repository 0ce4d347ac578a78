"""How cost grows with the number of plugins that are idle; and what the parts beside the loads have in common."""

import os
import time
from statistics import median

from host import Host, rust_plugin
from loads import start_wrk, wrk_figures
from processes import cpu_seconds, exact_cpu_seconds, fail, memory_mib, threads
from report import Section, Target, number, table

PLUGINS = (1, 10, 100, 300)
IDLE_SECONDS = 16  # a plugin that is idle is asked every 15 s whether it is there
SETTLE_SECONDS = 1
MAX_KIB = 100  # of the host's memory, for a plugin that is idle
MAX_CPU_PERCENT = 0.5  # of a core, above that of one plugin: less is not told from noise


class Bench:
    """What a part needs: a directory, the scheduling policy, whether to be quick, and where to put faults."""

    def __init__(self, directory, policy, quick, faults):
        self.directory, self.policy, self.quick, self.faults = directory, policy, quick, faults

    def room(self, name):
        path = os.path.join(self.directory, name)
        os.makedirs(path, exist_ok=True)
        return path

    def host(self, name, plugins=1):
        """A host with so many plugins that are ready; the first is `bench`."""
        names = ["bench"] + ["idle-%03d" % number for number in range(1, plugins)]
        return Host(self.room(name), [rust_plugin(each) for each in names], self.policy).wait().wait_plugins(plugins)

    def load(self, host, where, path="/bench/hello", connections=16, seconds=1, method="GET", script=None, size=0):
        """wrk's figures for one run; what went wrong is a fault."""
        figures, faults = wrk_figures(start_wrk(host.port, path, connections, seconds, method, size, script), seconds)
        if not figures["requests"]:
            fail("%s: no answer at all; %s." % (where, ", ".join(faults) or "no errors"))
        self.faults += ["%s: %s" % (where, fault) for fault in faults]
        return figures


def rate(figures):
    return figures["requests"] / figures["duration_us"] * 1e6


def plugins(bench):
    """Memory, processor time and threads of the host by the number of idle plugins, and what one of them serves meanwhile."""
    # All at once: they are idle, so one look at the clock serves all. Their requests then come in turns.
    hosts = {many: bench.host("plugins-%d" % many, many) for many in PLUGINS}
    time.sleep(SETTLE_SECONDS)
    seconds = 4 if bench.quick else IDLE_SECONDS
    pids = {many: host.pids() for many, host in hosts.items()}
    clock = cpu_seconds if exact_cpu_seconds([os.getpid()]) is None else exact_cpu_seconds
    before = {many: clock(pids[many]) for many in PLUGINS}
    time.sleep(seconds)
    cpu = {many: 100 * (clock(pids[many]) - before[many]) / seconds for many in PLUGINS}
    memory = {many: memory_mib(pids[many]) for many in PLUGINS}
    running = {many: threads(pids[many]) for many in PLUGINS}
    rates = [{many: rate(bench.load(host, "%d plugins" % many)) for many, host in hosts.items()}
             for _ in range(1 if bench.quick else 3)]
    for host in hosts.values():
        host.stop()

    rows = [[str(many), "%.1f" % memory[many], "%.3f %%" % cpu[many], str(running[many]),
             number(median(each[many] for each in rates)), "%.2f" % median(each[many] / each[1] for each in rates)]
            for many in PLUGINS]
    text = ("The host's own figures, its watchdog included, the plugins' not; processor time of a core over %d s without requests; "
            "then requests to one among them at 16 connections, and the ratio to the host that has only that.\n\n" % seconds)
    text += table(["plugins", "memory MiB", "CPU", "threads", "req/s", "ratio"], rows)
    first, last = PLUGINS[0], PLUGINS[-1]
    each = (memory[last] - memory[first]) * 1024 / (last - first)
    more = cpu[last] - cpu[first]
    return Section("Idle plugins", text, [
        Target("%d idle plugins: ≤ %d KiB of the host's memory each" % (last, MAX_KIB), "%.0f KiB" % each, each <= MAX_KIB),
        Target("%d idle plugins: no measurable CPU (≤ %.1f %% of a core more than one plugin)" % (last, MAX_CPU_PERCENT),
               "%.2f %%" % more, more <= MAX_CPU_PERCENT)])
