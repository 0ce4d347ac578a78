"""Whether sending requests ahead to a plugin costs those that wait behind a slow one.

The plugin takes 20 ms for every tenth request. GET requests are sent ahead of answers while the plugin is quick, POST
requests never: so the same load by POST, without a body, is the run without pipelining.
"""

import os
from statistics import median

from growth import rate
from processes import ROOT
from report import Section, Target, number, table

CONNECTIONS = (16, 64)
MAX_RATIO = 1.5
SCRIPT = os.path.join(ROOT, "tests/bench/each.lua")


def compare(bench):
    """The others are the nine tenths for which the plugin does not take its time; each request is timed by its client."""
    host, rounds = bench.host("pipelining"), []
    for _ in range(2 if bench.quick else 5):
        rounds.append({(c, method): bench.load(host, "every tenth slow, %s, %d connections" % (method, c), "/bench/tenth", c,
                                               1 if bench.quick else 2, method, SCRIPT)
                       for c in CONNECTIONS for method in ("GET", "POST")})
    host.stop()

    ratios = {c: median(each[c, "GET"]["others_p50_us"] / each[c, "POST"]["others_p50_us"] for each in rounds) for c in CONNECTIONS}
    rows = []
    for c in CONNECTIONS:
        for method in ("GET", "POST"):
            figures = [each[c, method] for each in rounds]
            p50, p99 = (median(each[field] for each in figures) / 1000 for field in ("others_p50_us", "others_p99_us"))
            name, ratio = ("GET", "%.2f" % ratios[c]) if method == "GET" else ("POST, never sent ahead", "")
            rows.append(["%d, %s" % (c, name), number(median(map(rate, figures))), "%.2f" % p50, "%.2f" % p99, ratio])
    text = ("Every tenth request takes the plugin 20 ms; latency of the other nine tenths, each request timed by its client. "
            "GET is sent ahead while the plugin is quick, POST never. The ratio is that of the p50, median of those within a "
            "round.\n\n")
    text += table(["connections", "req/s", "p50 of the others ms", "p99 of the others ms", "ratio"], rows)
    return Section("Pipelining and slow requests", text, [Target(
        "every tenth request slow: p50 of the others ≤ %.1f × that without pipelining" % MAX_RATIO,
        ", ".join("%.2f at %d" % (ratio, c) for c, ratio in ratios.items()), all(r <= MAX_RATIO for r in ratios.values()))])
