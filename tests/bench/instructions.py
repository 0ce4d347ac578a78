#!/usr/bin/env python3
"""Counts the instructions of the functions that each request goes through. `make instructions`; ACCEPT=1 takes the counts as they are.

callgrind counts the same on every run, whatever else the machine does, so a function that has become slower shows where a
clock would show noise. The allocator makes a difference of a few in a thousand; another compiler, C library or kind of processor
makes more, and where that is over the tolerance its counts are to be accepted. It needs valgrind.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

from processes import ROOT, fail, say

KNOWN = os.path.join(ROOT, "tests", "bench", "instructions.json")
TOLERANCE = 0.10  # of the known count, either way: what has become faster is to be kept as fast
CALLS = 100  # of each function, as in src/hot_paths.rs
SECONDS = 120

# By the test that calls it.
FUNCTIONS = {
    "encoding_a_request": "encode_request",
    "decoding_a_frame": "decode_frame",
    "reading_the_head_of_a_request": "read_request",
    "finding_the_route_among_300": "find_route",
    "getting_a_key": "get_key",
}


def build():
    """The tests of the library as they are released."""
    cargo = os.environ.get("CARGO", "cargo")
    built = subprocess.run([cargo, "test", "--locked", "--release", "--lib", "--package", "plugrack", "--no-run",
                            "--message-format", "json"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    messages = [json.loads(line) for line in built.stdout.decode().splitlines() if line.startswith("{")]
    programs = [message["executable"] for message in messages if message.get("executable")]
    if built.returncode != 0 or len(programs) != 1:
        fail("the library's tests could not be built.")
    return programs[0]


def count(program, test, function):
    """Instructions of one call."""
    with tempfile.TemporaryDirectory() as directory:
        counted = subprocess.run(
            ["valgrind", "--tool=callgrind", "--callgrind-out-file=" + os.path.join(directory, "out"), "--collect-atstart=no",
             "--toggle-collect=*hot_paths::" + function + "*", program, "--exact", "hot_paths::" + test, "--test-threads", "1"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS, check=False)
    output = counted.stdout.decode(errors="replace")
    collected = re.search(r"Collected\s*:\s*(\d+)", output)
    if counted.returncode != 0 or not collected or "1 passed" not in output or not int(collected.group(1)):
        fail("%s could not be counted: %s" % (test, output[-500:]))
    return int(collected.group(1)) / CALLS


def main():
    program = build()
    counts = {test: round(count(program, test, function)) for test, function in FUNCTIONS.items()}
    if os.environ.get("ACCEPT") == "1":
        with open(KNOWN, "w") as file:
            json.dump(counts, file, indent=2)
            file.write("\n")
    with open(KNOWN) as file:
        known = json.load(file)
    wrong = []
    for test, now in counts.items():
        was = known.get(test)
        differs = was is None or abs(now - was) > TOLERANCE * was
        print("%-32s %7d instructions%s" % (test.replace("_", " "), now, "" if was is None else ", known %d" % was))
        if differs:
            wrong.append(test)
    if wrong:
        say("instructions: over %.0f %% from what is known: %s. Where that is meant, ACCEPT=1 make instructions."
            % (100 * TOLERANCE, ", ".join(wrong)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
