"""Tunnels: messages through one, and what many that are open cost, through the host and through nginx to the same server."""

import socket
import time
from statistics import median

from loads import LATE_SECONDS
from processes import fail, memory_mib, threads
from report import Target, number, table

AHEAD = (1, 64)  # messages under way at most
LEAST_RATE = 10_000  # messages a second, with most of them under way
MANY = 1000
MESSAGE = b"%031d\n"
REQUEST = b"GET /bench/tunnel HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"


class Tunnel:
    """A client's end. Messages are numbered, so that none can be lost, doubled or out of order without being noticed."""

    def __init__(self, contender):
        self._name, self._sent, self._under_way = contender.name, 0, bytearray()
        self._socket = socket.create_connection(("127.0.0.1", contender.port), LATE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(REQUEST)
        head = b""
        while not head.endswith(b"\r\n\r\n"):  # the server sends nothing unasked
            head += self._received()
        if not head.startswith(b"HTTP/1.1 101 "):
            fail("%s opened no tunnel: %r." % (self._name, head[:80]))

    def send(self):
        message = MESSAGE % self._sent
        self._socket.sendall(message)
        self._under_way += message
        self._sent += 1

    def receive(self):
        data = self._received()
        if not self._under_way.startswith(data):
            fail("%s passed on %r instead of %r." % (self._name, data[:80], bytes(self._under_way[:80])))
        del self._under_way[:len(data)]

    def receive_all(self):
        while self._under_way:
            self.receive()

    def rate(self, ahead, seconds):
        """Messages echoed a second, at most `ahead` of them under way."""
        before, most, begun = self._sent, (ahead - 1) * len(MESSAGE % 0), time.monotonic()
        while time.monotonic() < begun + seconds:
            while len(self._under_way) <= most:
                self.send()
            self.receive()
        self.receive_all()
        return (self._sent - before) / (time.monotonic() - begun)

    def close(self):
        self._socket.close()

    def _received(self):
        try:
            data = self._socket.recv(1 << 16)
        except OSError as error:
            fail("%s passed nothing on through a tunnel: %s." % (self._name, error))
        if not data:
            fail("%s ended a tunnel." % self._name)
        return data


def compare(bench, contenders):
    """Text of the report, and the target. A message that is lost, late or another ends the run."""
    rates = {(contender.key, ahead): [] for contender in contenders for ahead in AHEAD}
    for turn in range(1 if bench.quick else 3):
        for contender in contenders[::1 if turn % 2 else -1]:
            tunnel = Tunnel(contender)
            for ahead in AHEAD:
                rates[contender.key, ahead].append(tunnel.rate(ahead, 1))
            tunnel.close()
    rates = {point: median(each) for point, each in rates.items()}
    rows = [[contender.name, *(number(rates[contender.key, ahead]) for ahead in AHEAD), *_many(contender)]
            for contender in contenders]
    text = ("Messages of %d bytes a second, echoed through one tunnel: the next when one has come back, and up to %d under way. "
            "Then what %d tunnels through which a message has gone add to the front, the application not counted.\n\n"
            % (len(MESSAGE % 0), AHEAD[-1], MANY))
    text += table(["", "one at a time", "%d under way" % AHEAD[-1], "memory of %d in MiB" % MANY, "their threads"], rows)
    rate = rates[contenders[0].key, AHEAD[-1]]
    return text, Target("one tunnel: ≥ %d messages a second" % LEAST_RATE, number(rate), rate >= LEAST_RATE)


def _many(contender):
    """What many open tunnels add to the memory and the threads of the front."""
    front = contender.front()
    before = memory_mib(front), threads(front)
    tunnels = [Tunnel(contender) for _ in range(MANY)]
    for tunnel in tunnels:
        tunnel.send()
    for tunnel in tunnels:
        tunnel.receive_all()
    after = memory_mib(front), threads(front)
    for tunnel in tunnels:
        tunnel.close()
    return "%.1f" % (after[0] - before[0]), str(after[1] - before[1])
