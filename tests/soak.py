#!/usr/bin/env python3
"""A host under mixed honest load and attack for SOAK_SECONDS (1800): its memory, files and threads must stay flat.

Runs the release build with the example hello and the fake plugin of the tests. Honest clients check every answer; attackers come from
other addresses of the loopback's network. Prints what was counted, and a table of the samples. The exit code is 1 when an honest
answer was wrong or late, when the last third of the time took more than the first one after a warm-up, or when the host did not end
in order.
"""

import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
WARM_UP = 0.1  # of the time, before the first third begins
SAMPLES = 300  # in all, at most one a second
ROWS = 20  # of the table
PATIENCE = 15  # seconds an honest client waits for a byte of its answer
PAUSE = 0.005  # of an honest client between two requests: the machine has others to serve
# What may be more at the end than at the beginning: a share, and so many beyond.
ALLOWED = {"memory": (1.10, 4 << 10), "files": (1.25, 24), "threads": (1.25, 12)}
MIB = 1 << 20

ended = threading.Event()
counts = collections.Counter()
wrong = []
lock = threading.Lock()


def count(what):
    with lock:
        counts[what] += 1


def blame(sentence):
    with lock:
        if len(wrong) < 20:
            wrong.append(sentence)
        counts["wrong"] += 1


# --- clients -----------------------------------------------------------------------------------------------

def connect(address, origin="127.0.0.1"):
    return socket.create_connection(address, PATIENCE, (origin, 0))


def answer(stream):
    """Status and body of the next answer on a stream of bytes."""
    line = stream.readline()
    if not line.startswith(b"HTTP/1.1 "):
        raise ValueError(f"not an answer: {line[:60]!r}")
    headers = {}
    while (header := stream.readline()) not in (b"\r\n", b""):
        name, _, value = header.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(stream.readline(), 16):
            body += stream.read(size)
            stream.readline()
        stream.readline()
    else:
        body = stream.read(int(headers["content-length"]))
    return int(line[9:12]), body


def request(path, body=None, close=False):
    framing = f"content-length: {len(body)}\r\n" if body is not None else ""
    method = "GET" if body is None else "POST"
    return f"{method} {path} HTTP/1.1\r\nhost: soak\r\n{framing}{'connection: close' if close else 'x-a: b'}\r\n\r\n".encode() + (body or b"")


def honest(address, kind):
    """Asks again and again, and checks each answer."""
    sock = None
    while not ended.is_set():
        try:
            if sock is None:
                sock = connect(address)
                stream = sock.makefile("rb")
            if kind == "upload":
                data = random.randbytes(random.randrange(1, 300_000))
                wanted = f"{len(data)} {hashlib.sha256(data).hexdigest()}".encode()
                sock.sendall(request("/p/upload", data))
            elif kind == "download":
                size = random.randrange(8, 2 * MIB)
                wanted = b"".join(blocks(size))
                sock.sendall(request(f"/p/download?bytes={size}"))
            else:
                wanted = b"Hello, world!"
                sock.sendall(request("/hello", close=kind == "close"))
            status, body = answer(stream)
            if status != 200 or body != wanted:
                blame(f"{kind}: status {status}, {len(body)} bytes: {body[:80]!r}")
            count(kind)
            if kind == "close" or status != 200:
                sock = None
        except (OSError, ValueError, KeyError) as error:
            if not ended.is_set():
                blame(f"{kind}: {error!r}")
            sock = None
        time.sleep(PAUSE)


def blocks(left):
    """What the fake plugin's /download sends."""
    block = bytes(range(256)) * 1024
    while left:
        part = (struct.pack(">Q", left) + block[8:])[:left]
        left -= len(part)
        yield part


# --- attackers ---------------------------------------------------------------------------------------------

def drip(sock, data, pause):
    for byte in data:
        sock.sendall(bytes([byte]))
        if ended.wait(pause):
            return


def slow_head(sock):
    drip(sock, b"GET /hello HTTP/1.1\r\nhost: a\r\n" + b"x-a: b\r\n" * 20, 0.2)


def slow_body(sock):
    sock.sendall(b"POST /p/upload HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")
    drip(sock, b"x" * 100, 0.3)


def unsent_body(sock):
    sock.sendall(b"POST /hello HTTP/1.1\r\nhost: a\r\ncontent-length: 10000000\r\n\r\n")
    ended.wait(2)


def never_reads(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(b"GET /p/download?bytes=20000000 HTTP/1.1\r\nhost: a\r\n\r\n")
    ended.wait(3)


def reset(sock):
    sock.sendall(b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def pipeline(sock):
    sock.sendall(b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n" * 2000)
    sock.recv(65536)


def huge_head(sock):
    sock.sendall(b"GET /hello HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 500_000)
    sock.recv(65536)


def idle(_):
    ended.wait(5)


def garbage(sock):
    sock.sendall(random.choice([
        b"GET / HTTP/2.0\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\0" * 100, random.randbytes(1000),
        b"POST /hello HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n",
        b"POST /hello HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n5\r\n", b"GET /hello HTTP/1.1\r\nhost: a\r\nTE: q=NaN" + b",a" * 30 + b"\r\n\r\n",
        b"POST /hello HTTP/1.1\r\nhost: a\r\ncontent-length: 68719476736\r\n\r\n", b"POST /p/upload HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ]))
    sock.recv(65536)


ATTACKS = [slow_head, slow_body, unsent_body, never_reads, reset, pipeline, huge_head, idle, garbage, garbage, reset]


def attacker(address, number):
    while not ended.is_set():
        attack = random.choice(ATTACKS)
        with contextlib.suppress(OSError), connect(address, f"127.0.0.{2 + number % 6}") as sock:
            count("attack " + attack.__name__)
            attack(sock)
        ended.wait(0.02)


# --- the host ----------------------------------------------------------------------------------------------

def install(data):
    os.makedirs(f"{data}/plugins/p")
    shutil.copy(f"{ROOT}/target/release/hello", f"{data}/plugins/hello")
    metadata = {"id": "p", "name": "p", "version": "1.0.0", "icon": "🧪", "route": "/p", "concurrency": 8}
    with open(f"{data}/plugins/p/fake.json", "w", encoding="utf-8") as file:
        json.dump({"metadata": metadata}, file)
    with open(f"{ROOT}/tests/fixtures/fake_plugin.py", encoding="utf-8") as file:
        program = file.read().replace("/usr/bin/env python3", sys.executable, 1)
    with open(f"{data}/plugins/p/plugin", "w", encoding="utf-8") as file:
        file.write(program)
    os.chmod(f"{data}/plugins/p/plugin", 0o755)


def listening(data, host):
    """Where the host listens, once both plugins answer."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and host.poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(f"{data}/run/listen", encoding="utf-8") as file:
                name, port = file.read().strip().rsplit(":", 1)
            statuses = []
            for path in ("/hello", "/p/x"):
                with connect((name, int(port))) as sock:
                    sock.sendall(request(path, close=True))
                    statuses.append(answer(sock.makefile("rb"))[0])
            if statuses == [200, 200]:
                return name, int(port)
        time.sleep(0.1)
    sys.exit("soak: the host did not start")


def sample(pid):
    """Memory in KiB, files, threads."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        memory = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
    return {"memory": memory, "files": len(os.listdir(f"/proc/{pid}/fd")), "threads": len(os.listdir(f"/proc/{pid}/task"))}


def report(samples):
    print(f"{'second':>8} {'memory MiB':>11} {'files':>6} {'threads':>8}")
    for at, values in samples[::max(1, len(samples) // ROWS)]:
        print(f"{at:8.0f} {values['memory'] / 1024:11.1f} {values['files']:6} {values['threads']:8}")
    warm = [values for at, values in samples if at >= SECONDS * WARM_UP]
    third = max(1, len(warm) // 3)
    flat = True
    for what, (share, beyond) in ALLOWED.items():
        first, last = (statistics.median(values[what] for values in part) for part in (warm[:third], warm[-third:]))
        grown = last > first * share + beyond
        flat &= not grown
        print(f"{what}: median {first:g} in the first third, {last:g} in the last{': NOT FLAT' if grown else ''}")
    return flat


def main():
    data = tempfile.mkdtemp(prefix="soak", dir="/tmp")
    install(data)
    command = [f"{ROOT}/target/release/plugrack", "serve", "--listen", "127.0.0.1:0", "--data", data]
    with open(f"{data}/host.log", "w", encoding="utf-8") as log:
        host = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        address = listening(data, host)
        kinds = ["keep", "keep", "close", "close", "upload", "download"]
        threads = [threading.Thread(target=honest, args=(address, kind)) for kind in kinds]
        threads += [threading.Thread(target=attacker, args=(address, number)) for number in range(40)]
        for thread in threads:
            thread.start()
        begun, samples = time.monotonic(), []
        while (at := time.monotonic() - begun) < SECONDS and host.poll() is None:
            samples.append((at, sample(host.pid)))
            time.sleep(max(1, SECONDS / SAMPLES))
        ended.set()
        for thread in threads:
            thread.join()
        if host.poll() is None:
            host.send_signal(signal.SIGTERM)
        code = host.wait(30)
    finally:
        ended.set()
        if host.poll() is None:
            host.kill()
            host.wait()
    with open(f"{data}/host.log", encoding="utf-8", errors="replace") as log:
        lines = log.read()
    print("; ".join(f"{what}: {number}" for what, number in sorted(counts.items())))
    flat = report(samples)
    for sentence in wrong:
        print("wrong:", sentence)
    faults = [line for line in lines.splitlines() if " ERROR " in line or "panicked" in line]
    print("\n".join(faults[:20]) or f"the log has {len(lines.splitlines())} lines and no error")
    print(f"the host ended with code {code}")
    shutil.rmtree(data)
    return 0 if flat and not wrong and not faults and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
