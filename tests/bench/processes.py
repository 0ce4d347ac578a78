"""Processes: started so that they end with this script, however it ends, and looked at from outside through /proc."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
READY_SECONDS = 20
STOP_SECONDS = 10  # the host takes at most 6
TICKS = os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None)
_running = []


def fail(sentence):
    sys.exit("bench: " + sentence)


def say(text):
    print(text, file=sys.stderr, flush=True)


def adopt_orphans():
    """What loses its parent becomes ours: a plugin is in a session of its own and would outlive a host that crashed."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def start(command, log, policy=None):
    """A child in a session of its own: Ctrl-C reaches only this script, which then ends the children in order.

    Where this script is killed, the kernel ends them. `policy` is a scheduling policy of `os`; children inherit it.
    """
    def prepare():
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if policy is not None:
            os.sched_setscheduler(0, policy, os.sched_param(0))

    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                               start_new_session=True, preexec_fn=prepare)
    _running.append(process)
    return process


def stop(*processes):
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process in _running:
            _running.remove(process)


def stop_all():
    stop(*_running)
    while True:  # what they have left behind is ours now
        orphans = children(os.getpid())
        if not orphans:
            return
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def finish(process, seconds):
    """What a child that ends by itself has printed."""
    try:
        output = process.communicate(timeout=seconds)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        fail("%s did not end within %d s." % (process.args[0], seconds))
    _running.remove(process)
    return output


def wait_for(what, process, log, check):
    """Polls until check() returns something true, and returns it; None if that never happens."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        result = check()
        # Looked at after the check: if the process is gone, whatever answered was another.
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "nothing")
            fail("%s exited with code %d; its last line: %s" % (what, process.returncode, last))
        if result:
            return result
        time.sleep(0.02)
    return None


def output_of(*command):
    """Both streams: nginx writes its version to standard error, and wrk exits 1 after it."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True).stdout


# --- what /proc says -----------------------------------------------------------------------------------------------

def _stat(pid):
    """The fields of a process's stat behind its name, which may itself hold spaces and parentheses. None when it has ended."""
    try:
        with open("/proc/%d/stat" % pid) as stat:
            return stat.read().rpartition(")")[2].split()
    except OSError:
        return None


def _by_parent():
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        fields = _stat(pid)
        if fields:
            found.setdefault(int(fields[1]), []).append(pid)
    return found


def children(parent):
    return _by_parent().get(parent, [])


def tree(roots):
    """These processes and all that descend from them."""
    by_parent, found, left = _by_parent(), [], list(roots)
    while left:
        pid = left.pop()
        found.append(pid)
        left += by_parent.get(pid, [])
    return found


def command_line(pid):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def cpu_seconds(pids):
    """Processor time of these processes, and of their children that have ended, to a clock tick each."""
    return sum(sum(map(int, fields[11:15])) for fields in map(_stat, pids) if fields) / TICKS


def exact_cpu_seconds(pids):
    """Processor time to the nanosecond, of the threads that live; None where the kernel does not keep it."""
    total = 0
    for pid in pids:
        try:
            for thread in os.listdir("/proc/%d/task" % pid):
                with open("/proc/%d/task/%s/schedstat" % (pid, thread)) as file:
                    total += int(file.read().split()[0])
        except FileNotFoundError:
            if not os.path.exists("/proc/self/schedstat"):
                return None
    return total / 1e9


def memory_mib(pids):
    """Proportional set size: what these processes hold in memory, pages that several share counted once."""
    total = 0
    for pid in pids:
        try:
            with open("/proc/%d/smaps_rollup" % pid) as file:
                total += int(re.search(r"^Pss:\s+(\d+) kB", file.read(), re.MULTILINE).group(1))
        except (OSError, AttributeError):
            pass  # it has ended meanwhile
    return total / 1024


def threads(pids):
    return sum(int(fields[17]) for fields in map(_stat, pids) if fields)


def policy_of(pid):
    return os.sched_getscheduler(pid)
