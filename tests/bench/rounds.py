"""The rounds: all contenders in turns at each point, again and again."""

import time

from loads import check, measure
from processes import say, stop
from report import Results


def plan(loads, options):
    """The points of a round: load, connections, seconds."""
    for load in loads:
        for connections in load.connections:
            # In a short run every number for the smallest answer, where the front's own cost shows, and two for the others.
            if not options.quick or load.key == "hello" or connections in (16, 256):
                # A thousand downloads at once take their time.
                yield load, connections, options.seconds * (2 if load.by_bytes and connections > 256 else 1)


def measure_loads(contenders, options, most_seconds, faults, remarks):
    """The results and how many rounds they are from. No round begins that would not be over after `most_seconds`."""
    results, begun = Results(contenders), time.monotonic()
    rounds, loads = 0, contenders[0].loads
    for rounds in range(1, options.rounds + 1):
        round_begun = time.monotonic()
        for load, connections, seconds in plan(loads, options):
            # There and back again: who is measured after whom must not favour anybody.
            for contender in contenders if rounds % 2 else contenders[::-1]:
                point, found, silent = measure(contender, load, connections, seconds)
                where = "%s, %s, %d connections, round %d: " % (contender.name, load.key, connections, rounds)
                faults += [where + fault for fault in found]
                if silent:
                    # A peer that lets some wait has figures that are only better for it, so they may stand.
                    (faults if contender.is_ours else remarks).append(
                        "%s%d of the connections received nothing for %.1f s, which wrk does not count" % (where, silent, 0.6 * seconds))
                if point:
                    results.add(rounds, load.key, connections, contender.key, point)
                    say("%s%.0f req/s, p50 %s ms, p99 %s ms, %.1f µs, %.1f MiB"
                        % (where, point.rate, point.p50, point.p99, point.cpu, point.front))
        now = time.monotonic()
        if now + (now - round_begun) > begun + most_seconds:
            break
    for contender in contenders:
        for load in loads:
            check(contender, load)
    return results, rounds


def stop_contenders(contenders):
    """Ends the processes of all, each once."""
    stop(*{process.pid: process for contender in contenders for process in contender.processes}.values())
