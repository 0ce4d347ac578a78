#!/usr/bin/env python3
"""The benchmark: plugrack with the plugin `hello`, against nginx in front of a small server (peer/).

Both answer GET /hello with the same 13 bytes. wrk measures them in turns, point by point, so that drift of
the machine hits both alike; the ratio is the median of the ratios within each round. Prints a Markdown
report. The exit code is 1 if an answer was wrong, late or missing: then the numbers do not count.

Run it as `make bench`; QUICK=1 makes a short run. It needs the release build, cargo, nginx and wrk; as root on
Debian and its like it installs nginx and wrk where they are missing.
"""

import argparse
import ctypes
import http.client
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from statistics import median

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONNECTIONS = (1, 16, 64)
BODY = b"Hello, world!"
CORES = len(os.sched_getaffinity(0))
READY_SECONDS = 20

Contender = namedtuple("Contender", "name port process")
Point = namedtuple("Point", "rate p50 p99")  # requests per second, milliseconds
processes = []


def fail(sentence):
    sys.exit("bench: " + sentence)


def say(text):
    print(text, file=sys.stderr, flush=True)


# --- processes ---------------------------------------------------------------------------------------------

def start(command, log):
    """A child in a session of its own: Ctrl-C reaches only this script, which then ends the children in order."""
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                               start_new_session=True)
    processes.append(process)
    return process


def children(parent):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % pid) as stat:
                # The name, in parentheses, may itself hold spaces and parentheses.
                if int(stat.read().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(pid))
        except OSError:
            pass  # it has ended meanwhile
    return found


def stop_all():
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 10
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # What they left behind has become ours, for main() made this process a subreaper: a plugin is in a session
    # of its own and would outlive a host that crashed.
    while True:
        orphans = children(os.getpid())
        if not orphans:
            return
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def peak_rss(pid):
    """The peak resident memory of a process in MiB."""
    with open("/proc/%d/status" % pid) as status:
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read()).group(1)) / 1024


# --- tools -------------------------------------------------------------------------------------------------

def provide_tools():
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin"  # where nginx is, not on every user's PATH
    missing = [tool for tool in ("nginx", "wrk") if not shutil.which(tool)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        fail("%s not found; install with `apt-get install nginx-light wrk` or the like." % " and ".join(missing))
    say("bench: installing " + " and ".join(missing))
    # RUNLEVEL=1 keeps the package from starting the system's nginx.
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")

    def apt(*arguments):
        return subprocess.run(("apt-get", "-qq") + arguments, env=environment, stdin=subprocess.DEVNULL,
                              stdout=sys.stderr).returncode == 0

    install = ("install", "-y", "--no-install-recommends")
    light = ["nginx-light" if tool == "nginx" else tool for tool in missing]
    if not (apt("update") and (apt(*install, *light) or apt(*install, *missing))):
        fail("%s could not be installed; apt-get has said why above." % " and ".join(missing))


def output_of(*command):
    """Both streams: nginx writes its version to standard error, and wrk exits 1 after it."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True).stdout


# --- contenders --------------------------------------------------------------------------------------------

def get(port, path):
    """Status and body, or None while there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


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


def expect_hello(contender, log):
    """Waits for the route (a plugin or a peer may come up after its front), then compares byte by byte."""
    answer = []

    def ok():
        answer[:] = get(contender.port, "/hello") or ()
        return answer and answer[0] == 200

    wait_for(contender.name, contender.process, log, ok)
    if answer != [200, BODY]:
        got = "%d %r" % (answer[0], answer[1][:80]) if answer else "nothing"
        fail("%s answers GET /hello with %s instead of 200 %r." % (contender.name, got, BODY))


def start_plugrack(directory):
    data, plugins = os.path.join(directory, "data"), os.path.join(directory, "plugins")
    os.mkdir(plugins)
    shutil.copy(release("hello"), plugins)
    log = open(os.path.join(directory, "plugrack.log"), "w+b")
    process = start([release("plugrack"), "serve", "--data", data, "--plugins", plugins, "--listen", "127.0.0.1:0"],
                    log)

    def bound_port():
        try:
            with open(os.path.join(data, "run", "listen")) as listen:
                match = re.match(r"127\.0\.0\.1:(\d+)\s*$", listen.read())
        except OSError:
            return None
        return match and int(match.group(1))

    port = wait_for("plugrack", process, log, bound_port)
    if not port:
        fail("plugrack wrote no address into run/listen within %d s." % READY_SECONDS)
    if not wait_for("plugrack", process, log, lambda: (get(port, "/healthz") or (0,))[0] == 200):
        fail("plugrack did not answer GET /healthz with 200 within %d s." % READY_SECONDS)
    contender = Contender("plugrack", port, process)
    expect_hello(contender, log)
    return contender


def start_nginx(directory):
    build = subprocess.run(["cargo", "build", "--release", "--quiet", "--manifest-path", "tests/bench/peer/Cargo.toml",
                            "--target-dir", "target/bench-peer"], cwd=ROOT, stdout=sys.stderr)
    if build.returncode != 0:
        fail("the peer of nginx could not be built; cargo has said why above.")
    peer_socket = os.path.join(directory, "peer.sock")
    log = open(os.path.join(directory, "peer.log"), "w+b")
    peer = start([os.path.join(ROOT, "target/bench-peer/release/bench-peer"), peer_socket], log)
    if not wait_for("the peer of nginx", peer, log, lambda: os.path.exists(peer_socket)):
        fail("the peer of nginx did not start within %d s." % READY_SECONDS)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    prefix = os.path.join(directory, "nginx")
    os.mkdir(prefix)
    options = output_of("nginx", "-V")
    # Paths built into the package are the system's; a module that is not there does not know its directive.
    paths = "".join("    %s_temp_path %s/%s;\n" % (module, prefix, module)
                    for module in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
                    if "--without-http_%s_module" % module not in options)
    config = os.path.join(prefix, "nginx.conf")
    with open(config, "w") as file:
        file.write(NGINX % {
            # As root the workers would drop to a user who cannot reach the peer's socket in this directory.
            "user": "user root;" if os.geteuid() == 0 else "",
            "workers": CORES, "prefix": prefix, "paths": paths, "socket": peer_socket, "port": port})
    command = ["nginx", "-p", prefix, "-c", config]
    if "-e filename" in output_of("nginx", "-h"):  # since 1.19.5; before, it opens the system's error log as well
        command += ["-e", os.path.join(prefix, "error.log")]
    log = open(os.path.join(directory, "nginx.log"), "w+b")
    contender = Contender("nginx", port, start(command, log))
    expect_hello(contender, log)
    return contender


# Without a limit on requests a connection both contenders keep theirs for the whole run.
NGINX = """\
daemon off;
%(user)s
worker_processes %(workers)d;
pid %(prefix)s/nginx.pid;
error_log stderr error;
events { worker_connections 1024; }
http {
    access_log off;
%(paths)s
    keepalive_requests 1000000000;
    upstream peer {
        server unix:%(socket)s;
        keepalive 64;
        keepalive_requests 1000000000;
    }
    server {
        listen 127.0.0.1:%(port)d;
        location /hello {
            proxy_pass http://peer;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }
    }
}
"""


def release(name):
    path = os.path.join(ROOT, "target", "release", name)
    if not os.access(path, os.X_OK):
        fail("target/release/%s is missing; build the host and its example plugins in release mode first." % name)
    return path


# --- measuring ---------------------------------------------------------------------------------------------

def received(port):
    """Bytes received so far on each open connection to a port, by the client's own port; None if unknown.

    wrk counts a timeout only when a late answer does arrive. A connection that is never answered leaves no trace in
    its report, so the kernel is asked (sock_diag, as `ss -ti` does).
    """
    counts = {}
    # struct inet_diag_req_v2: IPv4, TCP, with tcp_info, established connections of any address
    request = struct.pack("=BBBxI48x", socket.AF_INET, socket.IPPROTO_TCP, 1 << (2 - 1), 1 << 1)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:
            diag.settimeout(1)
            diag.send(struct.pack("=IHHII", 16 + len(request), 20, 0x301, 1, 0) + request)
            while True:
                data, at = diag.recv(1 << 20), 0
                while at < len(data):
                    length, kind = struct.unpack_from("=IH", data, at)
                    if kind != 20:  # 3 is the end, anything else an error
                        return counts if kind == 3 else None
                    source, destination = struct.unpack_from(">HH", data, at + 20)
                    attribute = at + 16 + 72
                    while destination == port and attribute < at + length:
                        size, name = struct.unpack_from("=HH", data, attribute)
                        if name == 2:  # tcp_info, in it tcpi_bytes_received
                            counts[source] = struct.unpack_from("=Q", data, attribute + 4 + 128)[0]
                        attribute += size + 3 & ~3
                    at += length + 3 & ~3
    except (OSError, struct.error):
        return None


def still_runs(contender):
    if contender.process.poll() is not None:
        fail("%s exited with code %d while it was measured." % (contender.name, contender.process.returncode))


def measure(contender, connections, seconds):
    """One run of wrk: its point, and the faults in words."""
    port = contender.port
    threads = 1 if connections == 1 else 2
    wrk = start(["wrk", "-t%d" % threads, "-c%d" % connections, "-d%ds" % seconds, "--latency",
                 "http://127.0.0.1:%d/hello" % port], subprocess.PIPE)
    time.sleep(0.3 * seconds)
    before = received(port)
    time.sleep(0.6 * seconds)
    after = received(port)
    try:
        report = wrk.communicate(timeout=30)[0].decode()
    except subprocess.TimeoutExpired:
        fail("wrk did not end.")
    processes.remove(wrk)

    milliseconds = {"us": 0.001, "ms": 1, "s": 1000, "m": 60000, "h": 3600000}
    latency = {percent: float(value) * milliseconds[unit] for percent, value, unit in
               re.findall(r"^ +(50|99)% +([\d.]+)(us|ms|s|m|h) *$", report, re.MULTILINE)}
    rate = re.search(r"^Requests/sec: +([\d.]+)", report, re.MULTILINE)
    still_runs(contender)
    if wrk.returncode != 0 or not rate or len(latency) != 2 or float(rate.group(1)) == 0:
        fail("wrk measured nothing at %d connections; it says: %s" % (connections, " ".join(report.split())))

    faults = [line.strip() for line in report.splitlines() if re.match(r" *(Socket errors|Non-2xx)", line)]
    if before is not None and after is not None:
        silent = sum(after.get(client) == count for client, count in before.items())
        if silent:
            faults.append("%d of the connections received nothing for %.1f s (wrk does not count that)"
                          % (silent, 0.6 * seconds))
    return Point(float(rate.group(1)), latency["50"], latency["99"]), faults


def report(contenders, points, faults, options):
    lines = ["| connections | plugrack req/s | nginx req/s | ratio | plugrack p50 ms | plugrack p99 ms "
             "| nginx p50 ms | nginx p99 ms |", "|" + "---:|" * 8]
    for connections in CONNECTIONS:
        a, b = (points[name, connections] for name in ("plugrack", "nginx"))
        cells = ["%d" % connections, *("%.0f" % median(p.rate for p in side) for side in (a, b)),
                 "%.2f" % median(x.rate / y.rate for x, y in zip(a, b)),
                 *("%.3f" % median(getattr(p, field) for p in side) for side in (a, b) for field in ("p50", "p99"))]
        lines.append("| " + " | ".join(cells) + " |")

    with open("/proc/cpuinfo") as cpuinfo:
        model = re.search(r"^model name\s*: (.*)", cpuinfo.read(), re.MULTILINE)
    workers = [peak_rss(pid) for pid in children(contenders[1].process.pid)]
    lines += [
        "",
        "- Machine: %d cores, %s, Linux %s; wrk shares the cores with what it measures"
        % (CORES, model.group(1) if model else "CPU unknown", os.uname().release),
        "- Versions: %s; %s" % (output_of("nginx", "-v").strip(),
                                output_of("wrk", "-v").partition("Copyright")[0].strip()),
        "- Rounds: %d, plugrack and nginx in turns, %d s a point; medians over the rounds, "
        "ratio = median of plugrack/nginx within a round" % (options.rounds, options.seconds),
        "- Peak RSS: plugrack host %.1f MiB; nginx %.1f MiB in %d workers"
        % (peak_rss(contenders[0].process.pid), sum(workers), len(workers)),
    ]
    unanswered = "no connection left unanswered"
    if received(contenders[0].port) is None:
        unanswered = "connections left unanswered were not looked for (no sock_diag in this kernel)"
    lines += ["- **Fault**: " + fault for fault in faults] or ["- No socket errors, no non-2xx responses; " + unanswered]
    return "\n".join(lines) + "\n"


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main():
    quick = os.environ.get("QUICK") == "1"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=positive, default=2 if quick else 5, metavar="N")
    parser.add_argument("--seconds", type=positive, default=1 if quick else 4, metavar="S", help="for each point")
    parser.add_argument("--out", metavar="FILE", help="write the report to this file as well")
    options = parser.parse_args()

    release("plugrack"), release("hello")  # before anything is installed or built
    if not shutil.which("cargo"):
        fail("cargo not found; it is needed to build the server behind nginx.")
    provide_tools()
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, see stop_all

    directory = tempfile.mkdtemp(prefix="plugrack-bench-")
    try:
        contenders = (start_plugrack(directory), start_nginx(directory))
        points, faults = {}, []
        for number in range(1, options.rounds + 1):
            for connections in CONNECTIONS:
                for contender in contenders:
                    point, found = measure(contender, connections, options.seconds)
                    points.setdefault((contender.name, connections), []).append(point)
                    where = "%s, %d connections, round %d: " % (contender.name, connections, number)
                    faults += [where + fault for fault in found]
                    say("%s%.0f req/s, p50 %.3f ms, p99 %.3f ms" % ((where,) + point))
        for contender in contenders:
            if get(contender.port, "/hello") != (200, BODY):
                fail("%s does not answer as before any more after the run." % contender.name)
        text = report(contenders, points, faults, options)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        stop_all()
        shutil.rmtree(directory, ignore_errors=True)
    print(text, end="")
    if options.out:
        with open(options.out, "w") as file:
            file.write(text)
    return 1 if faults else 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # As an exception, so that main() cleans up.
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
