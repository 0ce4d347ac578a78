#!/usr/bin/env python3
"""Runs a command with a temporary directory of its own, and fails when the command does, or when it leaves a file or a process behind.

A process belongs to the run when the directory is in its command line, its working directory, its environment or among its
open files. Those of other users cannot be looked into, and are passed over.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time

# How long what was told to end may take to be gone, in seconds: a host takes at most 6 to stop.
GRACE = 10
# How often to look, in seconds.
PAUSE = 0.1


def ancestors():
    """This process and those that started it: they may know the directory and stay."""
    found, pid = set(), os.getpid()
    while pid > 0:
        found.add(pid)
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
                pid = int(stat.read().rpartition(")")[2].split()[1])
        except FileNotFoundError:  # hidden from this user, and so are those that started it
            break
    return found


def traces(pid, directory):
    """Where a process has the directory, as words for a person."""
    here, needle = f"/proc/{pid}", os.fsencode(directory)

    def names(path):
        try:
            return needle in os.fsencode(os.readlink(f"{here}/{path}"))
        except OSError:
            return False

    def holds(path):
        try:
            with open(f"{here}/{path}", "rb") as file:
                return needle in file.read()
        except OSError:
            return False

    try:
        files = os.listdir(f"{here}/fd")
    except OSError:
        files = []
    yield from (what for what, path in [("command line", "cmdline"), ("environment", "environ")] if holds(path))
    yield from (what for what, path in [("working directory", "cwd"), ("program", "exe"), ("root", "root")] if names(path))
    if any(names(f"fd/{number}") for number in files):
        yield "open files"


def processes(directory, passed_over):
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        where = [] if pid in passed_over else list(traces(pid, directory))
        if where:
            found.append(f"process {pid} ({command_line(pid)}), which has it in its {', '.join(where)}")
    return found


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return "ended since"


def leftovers(directory):
    passed_over = ancestors()
    deadline = time.monotonic() + GRACE
    while True:
        found = [f"file {path}" for path in sorted(os.listdir(directory))] + processes(directory, passed_over)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(PAUSE)


def main():
    # Directly in /tmp, since the addresses of Unix sockets are short.
    directory = tempfile.mkdtemp(prefix="pt", dir="/tmp")
    os.chmod(directory, 0o755)  # some tests act as other users
    status = subprocess.run(sys.argv[1:], env={**os.environ, "TMPDIR": directory}, check=False).returncode
    found = leftovers(directory)
    if found:
        print(f"the tests left something behind in {directory}; end and remove it, and mend the test: {'; '.join(found)}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
