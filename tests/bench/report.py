"""The report: tables, the targets with what was measured beside each, and the place in the documentation for both."""

import os
import re
import shutil
from collections import namedtuple
from statistics import median

import tools
from loads import LOADS
from processes import ROOT, fail, output_of

PAGE = os.path.join(ROOT, "docs", "performance.md")
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
FAULT, REMARK, SHORT = "- **Fault**: ", "- Of a peer: ", "- A short run: to see that everything works, not for its numbers\n"

# A claim, what was measured for it, and whether it holds; None where it could not be measured.
Target = namedtuple("Target", "claim measured holds")
# A part of the report: Markdown, and the targets it has figures for.
Section = namedtuple("Section", "title text targets")


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def number(value):
    """Three figures, and all of those before the point."""
    return "%.0f" % value if value >= 100 else "%.1f" % value if value >= 10 else "%.2f" % value


def verdict(holds):
    return "not measured" if holds is None else "pass" if holds else "**miss**"


class Results:
    """The points of all rounds."""

    def __init__(self, contenders):
        self.contenders = {contender.key: contender for contender in contenders}
        self._points = {}

    def add(self, round_number, load, connections, key, point):
        self._points.setdefault((load, connections, key), {})[round_number] = point

    def connections(self, load):
        return sorted({connections for each, connections, _ in self._points if each == load})

    def value(self, load, connections, key, field):
        """The median over the rounds; None where it was not measured."""
        values = [getattr(point, field) for point in self._points.get((load, connections, key), {}).values()]
        values = [value for value in values if value is not None]
        return median(values) if values else None

    def ratio(self, load, connections, key, peer, field="rate"):
        """The median of the ratios within a round: drift of the machine hits both sides of each alike."""
        ours, theirs = (self._points.get((load, connections, each), {}) for each in (key, peer))
        both = ours.keys() & theirs.keys()
        return median(getattr(ours[each], field) / getattr(theirs[each], field) for each in both) if both else None

    def ratios(self, load, key, peer, field="rate", connections=None):
        """The ratio at each number of connections, of those that were measured."""
        found = {c: self.ratio(load, c, key, peer, field) for c in connections or self.connections(load)}
        return {c: ratio for c, ratio in found.items() if ratio is not None}


def loads_section(results):
    """A table a load and figure: contenders side by side, with plugrack's ratio to each."""
    text = []
    contenders = list(results.contenders.values())
    for load in LOADS:
        text.append("### %s\n" % load.title)
        text.append(_rates(results, load, contenders))
        text.append("\nLatency in ms, p50 / p99:\n\n" + _cells(
            results, load, contenders, lambda c, key: _pair(results, load, c, key, "p50", "p99")))
        text.append("\nProcessor time a request in µs, the whole process tree; "
                    "memory in MiB, front alone / with what it serves from:\n\n" + _cells(results, load, contenders, lambda c, key: "%s; %s" % (
                        _one(results, load, c, key, "cpu"), _pair(results, load, c, key, "front", "memory"))))
        text.append("")
    return Section("Loads", "\n".join(text), _load_targets(results))


def comparison(results, ours, peer):
    """One table of two contenders: a row a point of each load."""
    def pair(load, connections, field):
        return "%s / %s" % tuple(_one(results, load, connections, key, field) for key in (ours, peer))

    rows = []
    for load in results.contenders[ours].loads:
        for c in results.connections(load.key):
            ratio = results.ratio(load.key, c, ours, peer)
            rows.append(["%s, %d" % (load.title, c), *(_one(results, load, c, key, "rate") for key in (ours, peer)),
                         "%.2f" % ratio if ratio else "–", *(pair(load, c, field) for field in ("p50", "p99", "cpu", "front"))])
    return table(["load, connections", *(results.contenders[key].name for key in (ours, peer)), "ratio",
                  "p50 ms", "p99 ms", "CPU µs", "front MiB"], rows)


def _rates(results, load, contenders):
    against = {peer: key for key, contender in results.contenders.items() for peer in contender.peers}

    def cell(connections, key):
        rate = _one(results, load, connections, key, "rate")
        ratio = key in against and results.ratio(load.key, connections, against[key], key)
        return "%s (%.2f×)" % (rate, ratio) if ratio else rate

    return "Requests a second, and in parentheses how many times that plugrack serves:\n\n" + _cells(
        results, load, contenders, cell)


def _cells(results, load, contenders, cell):
    return table(["connections"] + [contender.name for contender in contenders],
                 [[str(c)] + [cell(c, contender.key) for contender in contenders] for c in results.connections(load.key)])


def _one(results, load, connections, key, field):
    value = results.value(load.key, connections, key, field)
    return "–" if value is None else number(value)


def _pair(results, load, connections, key, first, second):
    return "%s / %s" % (_one(results, load, connections, key, first), _one(results, load, connections, key, second))


def ratio_target(results, claim, load, key, peer, least, connections=None, field="rate", most=False, limit=None):
    """That the ratio of two contenders is at least so much, or with `most` at most, at each of these numbers of connections."""
    ratios = results.ratios(load, key, peer, field, connections)
    holds = all(ratio <= least if most else ratio >= least for ratio in ratios.values()) if ratios else None
    measured = _by_connections(ratios)
    if limit:  # what the same host makes of it with another plugin
        measured += "; %s %s" % (limit[0], _by_connections(results.ratios(load, limit[1], peer, field, connections)))
    return Target(claim, measured, holds)


def _load_targets(results):
    targets = []

    def at_least(*claim, **options):
        targets.append(ratio_target(results, *claim, **options))

    for load in LOADS:
        if load.key == "browser":
            continue  # measured to be seen; what it is to be at least is said of the same without headers
        small = load.key != "mib"
        if small:
            at_least(load.title + ": ≥ 1.0 × nginx → server at 1 connection", load.key, "plugrack", "go", 1.0, [1])
            at_least(load.title + ": ≥ 1.3 × nginx → server at 16, 64, 256", load.key, "plugrack", "go", 1.3, [16, 64, 256])
            at_least(load.title + ": p99 ≤ 1.0 × that of nginx → server at 1, 16, 64, 256", load.key, "plugrack", "go", 1.0,
                     [1, 16, 64, 256], "p99", most=True)
        else:
            at_least(load.title + ": ≥ 1.0 × nginx → server", load.key, "plugrack", "go", 1.0)
        at_least(load.title + ": ≥ 2 × go-plugin", load.key, "plugrack", "goplugin", 2.0)
        at_least(load.title + ", Python SDK: ≥ 1.2 × nginx → uWSGI from 16 connections on", load.key,
                 "plugrack-python", "uwsgi", 1.2, [c for c in results.connections(load.key) if c >= 16],
                 limit=("with the plugin in Rust", "plugrack"))
    memory = {load.title: [results.value(load.key, 256, key, "front") for key in ("plugrack", "go")] for load in LOADS}
    memory = {title: pair for title, pair in memory.items() if None not in pair}
    targets.append(Target("memory of the host and its watchdog at 256 connections ≤ nginx's, in MiB",
                          "; ".join("%s: %.1f, nginx %.1f" % (title, *pair) for title, pair in memory.items()) or "–",
                          all(ours <= theirs for ours, theirs in memory.values()) if memory else None))
    return targets


def _by_connections(ratios):
    return ", ".join("%.2f at %d" % (ratio, c) for c, ratio in ratios.items()) or "–"


def machine(options, rounds, skipped, policy):
    with open("/proc/cpuinfo") as cpuinfo:
        model = re.search(r"^model name\s*: (.*)", cpuinfo.read(), re.MULTILINE)
    versions = [output_of("nginx", "-v").strip(), output_of("wrk", "-v").partition("Copyright")[0].strip()]
    for name, command in (("go", ("go", "version")), ("uwsgi", ("uwsgi", "--version")),
                          ("", (tools.PYTHON, "-m", "gunicorn", "--version")), ("", (tools.php_fpm() or "php-fpm", "--version"))):
        try:
            versions.append((name + " " + output_of(*command)).strip().split("\n")[0])
        except OSError:
            pass
    lines = [
        "Machine: %d cores, %s, Linux %s; wrk shares the cores with what it measures"
        % (len(os.sched_getaffinity(0)), model.group(1) if model else "CPU unknown", os.uname().release),
        "Versions: " + "; ".join(versions),
        "Scheduling of all contenders: " + policy,
    ]
    if rounds:
        lines += ["Rounds: %d, all contenders in turns at each point, %d s or more a point; medians over the rounds, "
                  "a ratio is the median of those within a round" % (rounds, options.seconds),
                  "Memory is the proportional set size, the larger of two looks during a point, median over the rounds"]
    return "\n".join("- " + line for line in lines + ["Left out: " + reason for reason in skipped]) + "\n"


def whole(sections, head, faults, remarks, plot):
    """The whole report as Markdown."""
    targets = [target for section in sections for target in section.targets]
    text = [head + "".join(REMARK + remark + "\n" for remark in remarks) + "".join(FAULT + fault + "\n" for fault in faults)
            + ("" if faults else "- No wrong, late or missing answer\n")]
    text.append("## Targets\n\n" + table(["target", "measured", ""],
                                         [[t.claim, t.measured, verdict(t.holds)] for t in targets]))
    if plot:
        text.append("![Requests a second and p99 by connections](%s)\n" % plot)
    text += ["## %s\n\n%s" % (section.title, section.text) for section in sections]
    return "\n".join(text)


def write_docs(directory):
    """Puts the report that is in a directory between the markers of docs/performance.md, and the plot beside the page."""
    try:
        with open(os.path.join(directory, "report.md")) as file:
            text = file.read()
    except FileNotFoundError:
        fail("there is no report yet; `make bench` makes one.")
    if FAULT in text or SHORT in text:
        fail("the last report is of a short run, or has faults: the documentation is left as it is.")
    with open(PAGE) as file:
        page = file.read()
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        fail("docs/performance.md has lost its markers %s and %s." % (BEGIN, END))
    with open(PAGE, "w") as file:
        file.write("%s%s\n\n%s\n%s%s" % (before, BEGIN, text.replace("(bench.svg)", "(performance.svg)"), END, after))
    shutil.copy(os.path.join(directory, "bench.svg"), os.path.join(ROOT, "docs", "performance.svg"))
