"""The Python SDK and the Python examples, driven by a small host that is written here from docs/protocol.md alone.

    python3 -m unittest discover -s tests/sdk

The plugins are real processes, run by the Python that runs the tests. Every test has its own directory and its own
sockets, so test runs do not disturb each other.
"""

import base64
import bisect
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlencode

sys.dont_write_bytecode = True  # the SDK is imported from the source tree, which stays clean
ROOT = Path(__file__).resolve().parents[2]
SDK = ROOT / "sdk" / "python" / "plugrack.py"
EXAMPLES = ROOT / "plugins-examples"
FRAMES = json.loads((ROOT / "tests" / "protocol" / "frames.json").read_text("utf-8"))
MIB = 1_048_576
PATIENCE = 60  # seconds until something that does not happen fails a test

INSTANCE = "5f0c3f0e-3d3b-4c0a-9a43-3d5d1f1f7a10"

sys.path.insert(0, str(SDK.parent))
import plugrack  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402

PLUGIN = r'''
import hashlib, sys, threading, time
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=8)
meeting = threading.Barrier(3)

@plugin.init
def init(context):
    if context.license == "expired":
        raise plugrack.Refuse("the licence has expired", "license")
    if context.license == "broken":
        raise RuntimeError("no disk")
    print("started with", context.config)

def echo(request):
    return plugrack.Response(request.body(), headers=[("x-query", request.query), ("x-remote", request.remote)])

def look(request):
    return {"method": request.method, "path": request.path, "params": request.params, "mount": request.mount,
            "cookies": request.headers.get_all("Cookie"), "host": request.headers.get("HOST"),
            "none": request.headers.get("absent")}

def digest(request):
    whole = hashlib.sha256()
    for piece in request.chunks():
        whole.update(piece)
    return whole.hexdigest()

def read(request):
    pieces = []
    while True:
        piece = request.read(3)
        if not piece:
            return pieces and b"|".join(pieces)
        pieces.append(piece)

def events(request):
    yield "one"
    yield b"two"
    yield "thr\u00e9\u00e9"

def fails_at_once(request):
    raise RuntimeError("at once")
    yield

def fails_later(request):
    yield "begun"
    raise RuntimeError("later")

class endless:
    """Endless for a test, that is; and no generator, which Python closes by itself when it is dropped."""
    def __init__(self, request):
        self.pieces = iter([b"x" * 10000] * 5000)
    def __iter__(self):
        return self.pieces
    def close(self):
        open("closed", "w").close()

def until_stopped(request):
    yield b""
    for _ in range(1000):  # not for ever: a host that waits for the end must fail
        if plugin.stopping.wait(0.01):
            yield "over"
            return
        yield "tick"

def lazy_echo(request):
    yield b""
    yield from request.chunks()

def large(request):
    return bytes(range(256)) * 4096 * 3 + b"end"

def meet(request):
    meeting.wait(10)
    return "met"

def boom(request):
    raise ValueError("secret")

def visits(request):
    return str(plugin.store.incr("visits"))

ROUTES = {f.__name__: f for f in (echo, look, digest, read, events, fails_at_once, fails_later, endless, until_stopped,
                                  lazy_echo, large, meet, boom, visits)}
ROUTES.update(
    early=lambda request: (403, "no"),
    limited=lambda request: request.body(limit=10),
    json=lambda request: request.json(),
    form=lambda request: request.form(),
    cookies=lambda request: plugrack.Response("", 204, [("set-cookie", "a=b"), ("Set-Cookie", "c=d")]),
    html=lambda request: plugrack.Response("<p>", 201, {"x-number": 5}, content_type="text/html"),
    wrong=lambda request: None,
    long_header=lambda request: plugrack.Response("", headers={"x-long": "x" * 70000}),
)

@plugin.http
def handle(request):
    return ROUTES[request.path[1:]](request)

plugin.run()
'''

OWN_KV = r'''
import plugrack
plugin = plugrack.Plugin(id="own", name="Own", version="1.0.0", icon="o", route="/own")

@plugin.kv
def kv(op, key, value):
    if key == "locked":
        raise plugrack.Error("read_only", "this key cannot be written")
    if key == "broken":
        raise RuntimeError("secret")
    if key == "odd":
        raise plugrack.Error("Bad Code!", "")
    if key == "long":
        raise plugrack.Error("long", "é" * 5000)
    return {"get": "computed" if key == "there" else None, "set": 7, "delete": key == "there"}[op]

plugin.run()
'''


# ---- A host ----------------------------------------------------------------------------------------------------------

def frame(head, body=b""):
    text = json.dumps(head).encode()
    return struct.pack(">II", len(text), len(body)) + text + body


def raw(head, body=b""):
    return struct.pack(">II", len(head), len(body)) + head + body


def invalid_to(receiver, *places):
    """The vectors of frames that this receiver closes a connection for, those of any receiver first."""
    anyone = [vector for vector in FRAMES["invalid"] if vector["to"] == "any"]
    return [*anyone, *(vector for vector in FRAMES["invalid"]
                       if receiver != "any" and vector["to"] == receiver and vector["place"] in places)]


def with_id(data, number):
    """A frame with another id in the place of 7, where its head can be told."""
    head, body = struct.unpack(">II", data[:8])
    if len(data) != 8 + head + body:
        return data
    return raw(data[8:8 + head].replace(b'"id":7', b'"id":%d' % number, 1), data[8 + head:])


class Connection:
    """One connection to a plugin, or of a plugin to the store."""

    def __init__(self, sock):
        self.sock = sock
        self.input = sock.makefile("rb")

    def write(self, data):
        self.sock.sendall(data)

    def send(self, head, body=b""):
        self.write(frame(head, body))

    def receive(self):
        """The next frame; None at the end of the stream, wherever it comes."""
        try:
            lengths = self.input.read(8)
            if len(lengths) < 8:
                return None
            head, body = (self.input.read(size) for size in struct.unpack(">II", lengths))
        except ConnectionError:  # what the peer had not read when it closed makes the end a reset
            return None
        return json.loads(head.decode()), body

    def ask(self, head, body=b""):
        self.send(head, body)
        return self.receive()

    def http(self, path, body=b"", method="GET", headers=(), more=False, query=None, number=7):
        head = {"type": "http", "id": number, "method": method, "path": path, "mount": "/bench",
                "headers": [["host", "example.org"], *headers], "remote": "203.0.113.9", "more": more}
        if query is not None:
            head["query"] = query
        self.send(head, body)

    def response(self):
        """A whole response: its head, and its body, put together."""
        head, body = self.receive()
        whole, more = body, head.get("more")
        while more:
            part, body = self.receive()
            assert part["type"] == "data" and part["id"] == head["id"], part
            whole, more = whole + body, part["more"]
        return head, whole

    def get(self, path, body=b"", **options):
        self.http(path, body, **options)
        return self.response()

    def close(self):
        self.input.close()
        self.sock.close()


class Store:
    """The host's socket, with the namespace of one plugin."""

    PAGE = 3  # keys in a page of `list`, few so that there are several pages

    def __init__(self, path):
        self.path = str(path)
        self.values = {}  # key: (value, rev, ttl_ms)
        self.rev = 0
        self.lock = threading.Lock()
        self.requests = []
        self.connections = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(128)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection = Connection(self.listener.accept()[0])
            except OSError:
                return
            with self.lock:
                self.connections.append(connection)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        try:
            while True:
                found = connection.receive()
                if not found or found[0].get("key") == "cut":
                    return
                head, body = found
                with self.lock:
                    self.requests.append(head)
                    reply, value = self.perform(head, body)
                connection.send({"type": "result", "id": head["id"], **reply}, value)
        except OSError:
            pass
        finally:
            connection.close()

    def perform(self, head, body):
        op, key = head["op"], head.get("key")
        there = self.values.get(key)
        if key == "busy":
            return {"type": "error", "code": "busy", "message": "try again"}, b""
        if head.get("if_absent") and there or "if_rev" in head and (not there or there[1] != head["if_rev"]):
            return {"type": "error", "code": "conflict", "message": "it is not so"}, b""
        if op == "get":
            if not there:
                return {"found": False}, b""
            expires = {"expires_in_ms": there[2]} if there[2] else {}
            return {"found": True, "rev": there[1], **expires}, there[0]
        if op == "delete":
            return {"found": self.values.pop(key, None) is not None}, b""
        if op == "list":
            keys = sorted(name for name in self.values if name.startswith(head.get("prefix", "")))
            keys = keys[bisect.bisect_right(keys, head.get("after", "")):]
            page = []
            for name in keys[:self.PAGE]:
                value, rev, ttl = self.values[name]
                page.append({"key": name, "rev": rev, "size": len(value)})
                if head.get("values"):
                    page[-1]["value_base64"] = base64.b64encode(value).decode()
            more = {"next": keys[self.PAGE - 1]} if len(keys) > self.PAGE else {}
            return more, json.dumps(page).encode()
        if op == "txn":
            results = []
            for index, write in enumerate(json.loads(body.decode())):
                result, _ = self.perform(write, base64.b64decode(write.get("value_base64", "")))
                if "code" in result:
                    return {**result, "index": index}, b""
                results.append(result)
            return {}, json.dumps(results).encode()
        self.rev += 1
        if op == "incr":
            total = int(there[0] if there else 0) + head.get("delta", 1)
            self.values[key] = (b"%d" % total, self.rev, head.get("ttl_ms"))
            return {"value": total, "rev": self.rev}, b""
        self.values[key] = (body, self.rev, head.get("ttl_ms"))
        return {"rev": self.rev}, b""

    def hang_up(self):
        """Close the connections, as a host that restarts does."""
        with self.lock:
            for connection in self.connections:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            self.connections.clear()

    def close(self):
        self.listener.close()
        self.hang_up()


class Process:
    """A plugin that runs."""

    def __init__(self, executable, directory, store=None, python=sys.executable):
        self.directory = Path(tempfile.mkdtemp(dir=str(directory)))
        self.log_path = self.directory / "log"
        self.socket_path = str(self.directory / "s")
        self.connections = []
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [str(python), str(executable)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=str(self.directory), start_new_session=True,
                env={"PATH": os.environ.get("PATH", ""), "HOME": str(self.directory),
                     "PLUGRACK_SOCKET": self.socket_path, "PLUGRACK_HOST_SOCKET": store.path if store else "/nowhere",
                     "PLUGRACK_PROTOCOL": "1", "PLUGRACK_PLUGIN_ID": "bench"})

    def connect(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            try:
                sock.connect(self.socket_path)
            except OSError:
                sock.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError("the plugin does not listen: " + self.log()) from None
                time.sleep(0.005)
                continue
            self.connections.append(Connection(sock))
            return self.connections[-1]

    def init(self, **fields):
        """The first connection, and the reply to `init` on it."""
        connection = self.connect()
        return connection, connection.ask({
            "type": "init", "id": 1, "protocol": 1, "instance_id": INSTANCE,
            "plugin_id": "bench", "socket_path": self.socket_path, "host_socket": "", "log_path": str(self.log_path),
            "data_dir": str(self.directory), "license": None, "config": {},
            "host": {"name": "test", "version": "0"}, **fields})

    def log(self):
        return self.log_path.read_text("utf-8")

    def wait(self):
        return self.process.wait(PATIENCE)

    def kill(self):
        for connection in self.connections:
            connection.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


class TestCase(unittest.TestCase):
    python = sys.executable  # what runs the plugins

    def setUp(self):
        # Not $TMPDIR: the path of a Unix socket is at most about 100 bytes long.
        self.directory = Path(tempfile.mkdtemp(prefix="pr-"))
        self.addCleanup(shutil.rmtree, str(self.directory))

    def store(self):
        store = Store(self.directory / "host")
        self.addCleanup(store.close)
        return store

    def launch(self, plugin, store=None):
        """Start a plugin: an example by its path, or one by its text. It does not outlive the test."""
        executable = self.directory / "plugin"
        if isinstance(plugin, Path):
            shutil.copy(str(plugin), str(executable))
        else:
            executable.write_text(plugin, "utf-8")
        shutil.copy(str(SDK), str(self.directory))
        process = Process(executable, self.directory, store, self.python)
        self.addCleanup(process.kill)
        return process

    def start(self, plugin=PLUGIN, store=None, **fields):
        """A plugin that is ready, and its first connection."""
        process = self.launch(plugin, store)
        connection, reply = process.init(**fields)
        self.assertEqual(reply, ({"type": "ready", "id": 1}, b""))
        return process, connection

    def eventually(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), deadline, "it did not happen")
            time.sleep(0.005)

    def assert_alive(self, connection):
        self.assertEqual(connection.ask({"type": "ping", "id": 99}), ({"type": "pong", "id": 99}, b""))


# ---- Frames ----------------------------------------------------------------------------------------------------------

class FrameTest(TestCase):
    def wire(self, data):
        """The SDK's end of a connection on which these bytes came, and then the end."""
        ours, theirs = socket.socketpair()
        self.addCleanup(theirs.close)
        ours.sendall(data)
        ours.close()
        return plugrack._Wire(theirs)

    def test_valid(self):
        for vector in FRAMES["valid"]:
            with self.subTest(vector["name"]):
                data, body = bytes.fromhex(vector["hex"]), bytes.fromhex(vector["body_hex"])
                expected = vector.get("means", vector["head"]), body
                wire = self.wire(data + data)
                self.assertEqual(wire.read(), expected)
                self.assertEqual(wire.read(), expected)
                with self.assertRaises(plugrack.Disconnected):
                    wire.read()
                if "means" not in vector:
                    self.assertEqual(plugrack._encode_before(*expected) + body, data)

    def test_an_integer_is_one_however_it_is_written(self):
        head, _ = self.wire(raw(b'{"type":"result","id":7.0,"rev":2e2,"value":9223372036854775807}')).read()
        self.assertEqual({name: type(head[name]) for name in ("id", "rev", "value")}, {"id": int, "rev": int, "value": int})
        self.assertEqual((head["rev"], head["value"]), (200, 2**63 - 1))

    def test_cut(self):
        for vector in FRAMES["cut"]:
            with self.subTest(vector["name"]), self.assertRaises(plugrack.Disconnected):
                self.wire(bytes.fromhex(vector["hex"])).read()

    def test_invalid_closes_the_connection_and_the_plugin_lives(self):
        process, first = self.start()
        tried = 0
        for vector in invalid_to("plugin", "ready", "body"):
            with self.subTest(vector["name"]):
                connection = process.connect()
                if vector["place"] == "body":
                    connection.http("/digest", b"begin", more=True)
                connection.write(bytes.fromhex(vector["hex"]))
                self.assertIsNone(connection.receive())
                connection.close()
                tried += 1
        self.assertGreater(tried, 25)
        self.assert_alive(first)
        self.assertEqual(process.log().count("the host broke the protocol"), tried)

    def test_invalid_before_init(self):
        process = self.launch(PLUGIN)
        for vector in invalid_to("plugin", "start"):
            with self.subTest(vector["name"]):
                connection = process.connect()
                connection.write(bytes.fromhex(vector["hex"]))
                self.assertIsNone(connection.receive())
        self.assertEqual(process.init()[1][0]["type"], "ready")

    def test_the_plain_plugin_closes_the_connection_and_lives(self):
        process, connection = self.start(EXAMPLES / "counter" / "plugin")
        for vector in invalid_to("any"):
            with self.subTest(vector["name"]):
                connection.write(bytes.fromhex(vector["hex"]))
                self.assertIsNone(connection.receive())
                connection.close()
                connection = process.connect()
        self.assert_alive(connection)

    def test_conversations_of_the_host_with_a_plugin(self):
        process, _ = self.start()
        for conversation in (each for each in FRAMES["conversations"] if each["on"] == "plugin" and each["name"] != "start"):
            with self.subTest(conversation["name"]):
                connection = process.connect()
                for step in conversation["steps"]:
                    vector = next(each for each in FRAMES["valid"] if each["name"] == step["frame"])
                    if step["from"] == "host":
                        connection.write(bytes.fromhex(vector["hex"]))
                    elif vector["head"]["type"] == "response":
                        # What this plugin answers is its own; that it answers the request is what counts.
                        self.assertEqual(connection.response()[0]["id"], vector["head"]["id"])
                        break
                    elif vector["head"]["type"] == "result":  # there is no store
                        self.assertEqual(connection.receive()[0]["id"], vector["head"]["id"])

    def test_invalid_replies_of_the_host(self):
        calls = {None: lambda store: store.get("a"), "kv get": lambda store: store.get("a"), "kv set": lambda store: store.set("a", "b"),
                 "kv incr": lambda store: store.incr("a")}
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(str(self.directory / "host"))
        listener.listen()
        store = plugrack.Store(str(self.directory / "host"))
        replies = []

        def serve():
            while True:
                try:
                    connection = Connection(listener.accept()[0])
                except OSError:
                    return
                number = connection.receive()[0]["id"]
                connection.write(with_id(replies.pop(), number))
                replies.append(connection.receive())  # None once the SDK has closed it
                connection.close()
        threading.Thread(target=serve, daemon=True).start()
        for vector in invalid_to("caller", *calls):
            with self.subTest(vector["name"]):
                replies[:] = [bytes.fromhex(vector["hex"])]
                with self.assertRaises(plugrack.Error) as raised:
                    calls[vector["place"]](store)
                self.assertEqual(raised.exception.code, "disconnected")
                self.eventually(lambda: replies == [None])

    def test_out_of_place(self):
        process, first = self.start()
        fields = {"method": "GET", "path": "/look", "mount": "/bench", "headers": []}
        for head in ({"type": "init", "id": 2}, {"type": "data", "id": 2}, {"type": "pong", "id": 2},
                     {"type": "what", "id": 2}, {"type": "http", "id": 2}, {**fields, "type": "http", "id": -1},
                     {**fields, "type": "http", "id": 2, "headers": 5}):
            with self.subTest(head):
                connection = process.connect()
                self.assertIsNone(connection.ask(head))
        self.assert_alive(first)
        self.assertNotIn("Traceback", process.log())

    def test_nothing_before_init(self):
        process = self.launch(PLUGIN)
        self.assertIsNone(process.connect().ask({"type": "ping", "id": 1}))
        self.assertEqual(process.init()[1][0]["type"], "ready")


# ---- From start to exit ----------------------------------------------------------------------------------------------

class LifeTest(TestCase):
    def test_metadata_of_the_examples(self):
        for name in ("chat", "notes", "counter", "licensed-python"):
            with self.subTest(name):
                shutil.copy(str(EXAMPLES / name / "plugin"), str(self.directory))
                shutil.copy(str(SDK), str(self.directory))
                done = subprocess.run([str(self.directory / "plugin"), "--metadata"], stdout=subprocess.PIPE,
                                      env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": "/"})
                self.assertEqual(done.returncode, 0)
                metadata = json.loads(done.stdout.decode())
                self.assertEqual((metadata["id"], metadata["route"]), (name, "/" + name))
                self.assertRegex(metadata["version"], r"^\d+\.\d+\.\d+$")
                self.assertTrue(metadata["name"] and metadata["icon"])

    def test_metadata_leaves_out_what_is_not_given(self):
        fields = {"id": "a", "name": "A", "version": "1", "icon": "a", "route": "/a"}
        self.assertNotIn("speaks", plugrack.Plugin(**fields).metadata)
        self.assertEqual(plugrack.Plugin(**fields, speaks=["tunnel"], concurrency=4.0).metadata,
                         {**fields, "protocol": 1, "concurrency": 4, "speaks": ["tunnel"]})

    def test_a_plugin_may_have_host_names_in_place_of_a_route(self):
        places = {"host": ["a.example", "*.a.example"], "below_route": "rewrite", "trailing_slash": "redirect"}
        metadata = plugrack.Plugin(id="a", name="A", version="1", icon="a", **places).metadata
        self.assertEqual({name: metadata.get(name) for name in ["route", *places]}, {"route": None, **places})
        plain = plugrack.Plugin(id="a", name="A", version="1", icon="a", route="/a").metadata
        self.assertFalse(plain.keys() & places.keys())

    def test_by_hand(self):
        plugin = self.directory / "plugin"
        plugin.write_text(OWN_KV, "utf-8")
        shutil.copy(str(SDK), str(self.directory))
        done = subprocess.run([sys.executable, str(plugin)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={})
        self.assertEqual((done.returncode, done.stdout), (64, b""))
        self.assertRegex(done.stderr.decode(), r"^Own is a plugin.*PLUGRACK_SOCKET.*\n$")

    def test_init(self):
        process, _ = self.start(config={"title": "caffè"})
        # Through the log while the plugin runs: what is printed must not wait in a buffer.
        self.eventually(lambda: "started with {'title': 'caffè'}\n" in process.log())

    def test_refuse(self):
        process = self.launch(PLUGIN)
        connection, reply = process.init(license="expired")
        self.assertEqual(reply[0], {"type": "error", "id": 1, "code": "license", "message": "the licence has expired"})
        self.assertIsNone(connection.receive())
        self.assertEqual(process.wait(), 78)
        self.assertEqual(process.log(), "the licence has expired\n")

    def test_init_fails(self):
        process = self.launch(PLUGIN)
        _, reply = process.init(license="broken")
        self.assertEqual(reply[0], {"type": "error", "id": 1, "code": "internal", "message": "RuntimeError: no disk"})
        self.assertEqual(process.wait(), 1)
        self.assertIn("Traceback", process.log())

    def test_shutdown_with_several_connections(self):
        process, first = self.start()
        streaming, busy, idle = (process.connect() for _ in range(3))
        streaming.http("/until_stopped")
        self.assertTrue(streaming.receive()[0]["more"])
        self.assert_alive(idle)
        first.send({"type": "shutdown", "id": 50})
        self.assertIsNone(first.receive())
        received = [streaming.receive()]
        while received[-1][0]["more"]:
            received.append(streaming.receive())
        self.assertEqual(received[-2][1], b"over")
        for number in range(100):  # the plugin goes on until the last connection has ended
            self.assertEqual(busy.get("/echo", b"%d" % number)[1], b"%d" % number)
        busy.http("/echo", b"last")
        for connection in (streaming, busy, idle):
            connection.send({"type": "shutdown", "id": 51})
        self.assertEqual(busy.response()[1], b"last")
        for connection in (streaming, busy, idle):
            self.assertIsNone(connection.receive())
        self.assertEqual(process.wait(), 0)
        self.assertNotIn("Traceback", process.log())

    def test_shutdown_reaches_the_only_connection_in_mid_stream(self):
        process, connection = self.start()
        connection.write(frame({"type": "http", "id": 7, "method": "GET", "path": "/until_stopped", "mount": "/bench",
                                "headers": []}) + frame({"type": "shutdown", "id": 8}))
        self.assertTrue(connection.response()[1].endswith(b"over"))
        self.assertIsNone(connection.receive())
        self.assertEqual(process.wait(), 0)

    def test_shutdown_arrives_in_mid_stream(self):
        process, connection = self.start()
        connection.http("/until_stopped")
        connection.receive()
        connection.send({"type": "shutdown", "id": 8})
        while connection.receive():
            pass
        self.assertEqual(process.wait(), 0)

    def test_one_connection_left_does_not_end_the_plugin(self):
        process, first = self.start()
        first.close()
        second = process.connect()
        self.assert_alive(second)
        second.send({"type": "shutdown", "id": 8})
        self.assertEqual(process.wait(), 0)

    def test_terminate(self):
        process, connection = self.start()
        connection.http("/until_stopped")
        connection.receive()
        process.process.terminate()
        self.assertEqual(process.wait(), -signal.SIGTERM)


# ---- HTTP ------------------------------------------------------------------------------------------------------------

class HttpTest(TestCase):
    def setUp(self):
        super().setUp()
        self.process, self.connection = self.start()

    def test_request(self):
        head, body = self.connection.get("/look", query="a=1&a=2&b=%C3%A9+x&c=",
                                         headers=[["cookie", "a=b"], ["cookie", "c=d"]])
        self.assertEqual((head["status"], head["headers"]), (200, [["content-type", "application/json"]]))
        self.assertEqual(json.loads(body.decode()), {
            "method": "GET", "path": "/look", "params": {"a": "1", "b": "é x", "c": ""}, "mount": "/bench",
            "cookies": ["a=b", "c=d"], "host": "example.org", "none": None})

    def test_every_byte(self):
        data = bytes(range(256)) * 4096
        head, body = self.connection.get("/echo", data, method="POST", query="q%20")
        self.assertEqual(body, data)
        self.assertEqual(head["headers"], [["x-query", "q%20"], ["x-remote", "203.0.113.9"],
                                           ["content-type", "application/octet-stream"]])

    def test_forms_of_answers(self):
        head, body = self.connection.get("/cookies")
        self.assertEqual((head, body), ({"type": "response", "id": 7, "status": 204, "more": False, "headers":
                                         [["set-cookie", "a=b"], ["Set-Cookie", "c=d"]]}, b""))
        head, body = self.connection.get("/html")
        self.assertEqual((head["status"], head["headers"], body),
                         (201, [["x-number", "5"], ["content-type", "text/html"]], b"<p>"))
        head, body = self.connection.get("/early")
        self.assertEqual((head["status"], head["headers"], body),
                         (403, [["content-type", "text/plain; charset=utf-8"]], b"no"))

    def test_bodies(self):
        self.assertEqual(self.connection.get("/json", b'[1,{"a":"\xc3\xa9"}]')[1], '[1,{"a":"é"}]'.encode())
        self.assertEqual(self.connection.get("/json", b"{nope")[0]["status"], 400)
        self.assertEqual(self.connection.get("/json", b"[" * 100_000)[0]["status"], 400)
        self.assertEqual(self.connection.get("/form", b"a=1&b=%26+&a=2")[1], b'{"a":"1","b":"& "}')
        self.assertEqual(self.connection.get("/read", b"12345678")[1], b"123|456|78")

    def test_pipelining(self):
        requests = b"".join(
            frame({"type": "http", "id": number, "method": "GET", "path": "/echo", "query": str(number),
                   "mount": "/bench", "headers": [], "remote": ""}, b"%d" % number)
            if number % 5 else frame({"type": "ping", "id": number}) for number in range(50))
        self.connection.write(requests)
        for number in range(50):
            head, body = self.connection.receive()
            self.assertEqual(head["id"], number)
            self.assertEqual((head["type"], body), ("response", b"%d" % number) if number % 5 else ("pong", b""))

    def test_an_answer_does_not_wait_for_a_slow_request_behind_it(self):
        others = [self.process.connect(), self.process.connect()]
        self.connection.write(b"".join(
            frame({"type": "http", "id": number, "method": "GET", "path": path, "mount": "/bench", "headers": [], "remote": ""})
            for number, path in ((1, "/echo"), (2, "/meet"), (3, "/echo"))))
        self.assertEqual(self.connection.receive()[0]["id"], 1)
        for other in others:
            other.http("/meet")
        self.assertEqual([self.connection.receive()[0]["id"] for _ in range(2)], [2, 3])
        self.assertEqual([other.response()[1] for other in others], [b"met"] * 2)

    def test_a_frame_in_single_bytes(self):
        for byte in frame({"type": "ping", "id": 5}):
            self.connection.write(bytes([byte]))
        self.assertEqual(self.connection.receive()[0], {"type": "pong", "id": 5})

    def test_stream_up(self):
        data = [bytes([number]) * size for number, size in enumerate((10, MIB, 0, 5, MIB))]
        self.connection.http("/digest", data[0], more=True)
        for piece in data[1:]:
            self.connection.send({"type": "data", "id": 7, "more": True}, piece)
        self.connection.send({"type": "data", "id": 7, "more": False})
        self.assertEqual(self.connection.response()[1].decode(), hashlib.sha256(b"".join(data)).hexdigest())

    def test_stream_down(self):
        self.connection.http("/events")
        received = [self.connection.receive() for _ in range(4)]
        self.assertEqual([(head["type"], head["more"], body) for head, body in received], [
            ("response", True, b"one"), ("data", True, b"two"), ("data", True, "thréé".encode()), ("data", False, b"")])

    def test_large_answer(self):
        head, body = self.connection.get("/large")
        self.assertEqual(body, bytes(range(256)) * 4096 * 3 + b"end")
        self.assertIn(["content-length", str(len(body))], head["headers"])

    def test_head_of_a_stream(self):
        self.connection.http("/endless", method="HEAD")
        self.assertEqual(self.connection.response()[1], b"")
        self.assert_alive(self.connection)

    def test_early_answer(self):
        self.connection.http("/early", b"begin", more=True)
        self.connection.send({"type": "data", "id": 7, "more": True}, b"x" * MIB)
        self.assertEqual(self.connection.receive()[0]["status"], 403)
        self.connection.send({"type": "data", "id": 7, "more": False, "aborted": True})
        self.assert_alive(self.connection)

    def test_early_answer_that_is_large(self):
        # The host sends its body before it reads on, more than the sockets hold: so does the plugin with its answer.
        self.connection.http("/large", b"begin", more=True)
        head, first = self.connection.receive()
        for _ in range(3):
            self.connection.send({"type": "data", "id": 7, "more": True}, b"x" * MIB)
        self.connection.send({"type": "data", "id": 7, "more": False, "aborted": True})
        size = len(first)
        while head["more"]:
            head, body = self.connection.receive()
            size += len(body)
        self.assertEqual(size, 3 * MIB + 3)
        self.assert_alive(self.connection)

    def test_a_body_read_too_late_cuts_the_answer(self):
        for end in ({"aborted": True}, {}):  # without "aborted" the host had sent all of it before the answer came
            with self.subTest(end):
                connection = self.process.connect()
                connection.http("/lazy_echo", b"begin", more=True)
                self.assertTrue(connection.receive()[0]["more"])
                connection.send({"type": "data", "id": 7, "more": False, **end}, b"end")
                head = {}
                while head.get("type") != "error":
                    head, _ = connection.receive()
                    self.assertTrue(head.get("more") or head["message"].startswith("RuntimeError: the request"), head)
                self.assert_alive(connection)
        self.assertEqual(self.process.log().count("RuntimeError: the request"), 2)

    def test_limit(self):
        self.assertEqual(self.connection.get("/limited", b"0123456789")[0]["status"], 200)
        self.connection.http("/limited", b"01234", more=True)
        self.connection.send({"type": "data", "id": 7, "more": True}, b"567890")
        self.assertEqual(self.connection.receive()[0]["status"], 413)
        self.connection.send({"type": "data", "id": 7, "more": False, "aborted": True})
        self.assert_alive(self.connection)

    def test_failures(self):
        for path in ("/boom", "/wrong", "/fails_at_once", "/no-such-key"):
            with self.subTest(path):
                head, body = self.connection.get(path)
                self.assertEqual((head["status"], body), (500, b"internal error\n"))
        self.assertIn("ValueError: secret", self.process.log())
        self.connection.http("/fails_later")
        self.assertEqual(self.connection.receive()[1], b"begun")
        error = {"type": "error", "id": 7, "code": "internal", "message": "RuntimeError: later"}
        self.assertEqual(self.connection.receive(), (error, b""))
        self.assertIn("RuntimeError: later", self.process.log())
        self.assert_alive(self.connection)
        with self.subTest("a head that no frame holds"):
            self.connection.http("/long_header")
            head, _ = self.connection.receive()
            self.assertEqual((head["type"], head["code"]), ("error", "too_large"))
            self.assert_alive(self.connection)

    def test_client_gone_while_streaming_down(self):
        self.connection.http("/endless")
        self.connection.receive()
        self.connection.close()
        self.eventually((self.process.directory / "closed").exists)
        self.assert_alive(self.process.connect())
        self.assertNotIn("Traceback", self.process.log())

    def test_client_gone_while_streaming_up(self):
        self.connection.http("/digest", b"begin", more=True)
        self.connection.close()
        self.assert_alive(self.process.connect())
        self.assertNotIn("Traceback", self.process.log())

    def test_concurrency(self):
        connections = [self.connection, self.process.connect(), self.process.connect()]
        for connection in connections:
            connection.http("/meet")
        self.assertEqual([connection.response()[1] for connection in connections], [b"met"] * 3)


# ---- Shortages -------------------------------------------------------------------------------------------------------

class ShortageTest(unittest.TestCase):
    """The plugin in this process, with faults put in the place of the system's."""

    def setUp(self):
        self.plugin = plugrack.Plugin(id="p", name="P", version="1", icon="p", route="/p")
        self.paused = 0
        self.replace(plugrack.time, "sleep", lambda seconds: setattr(self, "paused", self.paused + 1))

    def replace(self, owner, name, value):
        patch = unittest.mock.patch.object(owner, name, value)
        patch.start()
        self.addCleanup(patch.stop)

    def accept(self, *outcomes):
        """Accepts as often as there are outcomes; returns what was logged."""
        listener = unittest.mock.Mock()
        listener.accept.side_effect = outcomes
        with self.assertLogs("plugrack") as logs:
            plugrack._log.error("-")
            for _ in outcomes:
                self.plugin._accept_one(listener)
        return logs.output[1:]

    def pair(self):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        ours.settimeout(PATIENCE)
        return ours, theirs

    def assert_served(self, connection):
        with self.assertLogs("plugrack") as logs:
            connection.sendall(frame({"type": "ping", "id": 1}))
            self.assertEqual(connection.recv(1), b"")
        self.assertIn("ping is out of place", logs.output[0])

    def test_accept_goes_on_and_says_so_once(self):
        ours, theirs = self.pair()
        codes = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED]
        faults = [OSError(code, os.strerror(code)) for code in codes]
        logged = self.accept(*faults, MemoryError(), (theirs, ""))
        self.assertEqual((len(logged), self.paused), (1, 6), logged)
        self.assertIn("Too many open files", logged[0])
        self.assert_served(ours)
        self.plugin._shortage._next = 0
        self.assertIn("(5 times more since the last such line)", self.accept(OSError(errno.EMFILE, "again"))[0])

    def test_a_listener_that_is_none_ends_the_plugin(self):
        with socket.socket(socket.AF_UNIX) as listener, self.assertLogs("plugrack"):  # it does not listen
            self.plugin._accept(listener)
        self.assertTrue(self.plugin._ended.is_set())
        self.assertEqual(self.plugin._exit_code, 1)

    def test_a_thread_that_is_had_a_little_later_serves(self):
        ours, theirs = self.pair()
        start = threading.Thread.start
        failures = [RuntimeError("can't start new thread"), MemoryError()]

        def fail_at_first(thread):
            if failures:
                raise failures.pop()
            start(thread)

        self.replace(threading.Thread, "start", fail_at_first)
        self.assertEqual(len(self.accept((theirs, ""))), 1)
        self.assert_served(ours)
        self.assertEqual(failures, [])

    def test_without_any_thread_the_connection_is_closed(self):
        ours, theirs = self.pair()
        self.replace(threading.Thread, "start", unittest.mock.Mock(side_effect=RuntimeError("can't start new thread")))
        self.replace(plugrack, "_THREAD_TIME", 0.05)
        logged = self.accept((theirs, ""))
        self.assertEqual(len(logged), 1, logged)
        self.assertIn("can't start new thread", logged[0])
        self.assertEqual(ours.recv(1), b"")
        self.assertEqual(self.plugin._connections, {})

    def test_without_a_thread_no_reply_is_held_back(self):
        ours, theirs = self.pair()
        flusher = plugrack._Flusher()
        self.replace(threading.Thread, "start", unittest.mock.Mock(side_effect=RuntimeError("can't start new thread")))
        wire = plugrack._Wire(theirs)
        self.addCleanup(wire.close)
        for number in range(2):
            wire.send({"type": "pong", "id": number})
            flusher.watch(wire)
            self.assertTrue(ours.recv(1000).endswith(b'"id":%d}' % number))

    def test_a_flusher_that_fails_ends_the_plugin(self):
        exits = []
        self.replace(plugrack.os, "_exit", exits.append)
        flusher = plugrack._Flusher()
        wire = unittest.mock.Mock(watched=False)
        wire.flush.side_effect = MemoryError
        with self.assertLogs("plugrack") as logs:
            flusher._came.set()
            flusher._held.append(wire)
            flusher._run()
        self.assertEqual(exits, [1])
        self.assertIn("answers cannot be sent any more", logs.output[0])

    def test_default_concurrency(self):
        self.assertEqual(self.plugin.metadata["concurrency"], 16)
        one = plugrack.Plugin(id="p", name="P", version="1", icon="p", route="/p", concurrency=1)
        self.assertEqual(one.metadata["concurrency"], 1)
        self.replace(plugrack.resource, "getrlimit", lambda which: (8 * MIB, 8 * MIB))
        for memory, expected in [(-1, 16), (16 * MIB, 1), (64 * MIB, 2), (128 * MIB, 10), (512 * MIB, 16)]:
            self.assertEqual(plugrack._default_concurrency(memory), expected, memory)


# ---- KV --------------------------------------------------------------------------------------------------------------

class KvTest(TestCase):
    def test_default_handler(self):
        self.check_default_handler(PLUGIN)

    def test_counter_passes_on(self):
        self.check_default_handler(EXAMPLES / "counter" / "plugin")

    def check_default_handler(self, plugin):
        _, connection = self.start(plugin, self.store())

        def kv(op, body=b"", key="färbe"):
            head, value = connection.ask({"type": "kv", "id": 9, "op": op, "key": key}, body)
            self.assertEqual(head.pop("id"), 9)
            return head, value

        value = bytes(range(256))
        self.assertEqual(kv("get"), ({"type": "result", "found": False}, b""))
        self.assertEqual(kv("set", value), ({"type": "result", "rev": 1}, b""))
        self.assertEqual(kv("get"), ({"type": "result", "found": True, "rev": 1}, value))
        self.assertEqual(kv("delete"), ({"type": "result", "found": True}, b""))
        self.assertEqual(kv("delete"), ({"type": "result", "found": False}, b""))
        self.assertEqual(kv("set", b"x", "busy"), ({"type": "error", "code": "busy", "message": "try again"}, b""))

    def test_own_handler(self):
        process, connection = self.start(OWN_KV)

        def kv(op, key):
            return connection.ask({"type": "kv", "id": 9, "op": op, "key": key})

        self.assertEqual(kv("get", "there"), ({"type": "result", "id": 9, "found": True}, b"computed"))
        self.assertEqual(kv("get", "else"), ({"type": "result", "id": 9, "found": False}, b""))
        self.assertEqual(kv("set", "there"), ({"type": "result", "id": 9, "rev": 7}, b""))
        self.assertEqual(kv("delete", "else"), ({"type": "result", "id": 9, "found": False}, b""))
        self.assertEqual(kv("set", "locked")[0], {"type": "error", "id": 9, "code": "read_only",
                                                  "message": "this key cannot be written"})
        self.assertEqual(kv("get", "broken")[0]["code"], "internal")
        self.assertEqual(kv("get", "odd")[0], {"type": "error", "id": 9, "code": "internal", "message": "internal"})
        self.assertEqual(kv("get", "long")[0]["message"], "é" * 2048)
        self.assertIn("RuntimeError: secret", process.log())
        self.assertEqual(kv("list", "x")[0]["code"], "bad_request")
        self.assertEqual(connection.ask({"type": "kv", "id": 9, "op": "get"})[0]["code"], "bad_request")
        self.assertEqual(connection.get("/")[0]["status"], 404)

    def test_store_is_gone(self):
        _, connection = self.start()
        self.assertEqual(connection.ask({"type": "kv", "id": 9, "op": "get", "key": "k"})[0]["code"], "disconnected")


class StoreTest(TestCase):
    def setUp(self):
        super().setUp()
        self.host = self.store()
        self.client = plugrack.Store(self.host.path)
        self.addCleanup(lambda: [wire.close() for wire in self.client._idle])

    def test_operations(self):
        client = self.client
        self.assertIsNone(client.get("a"))
        self.assertIsNone(client.get_entry("a"))
        self.assertEqual(client.set("a", "é", ttl=1.5), 1)
        self.assertEqual(client.get_entry("a"), plugrack.Entry("a", "é".encode(), 1, 2, 1500))
        self.assertEqual(client.set("a", b""), 2)
        self.assertEqual(client.get("a"), b"")
        self.assertEqual(client.set("a", b"x" * MIB, if_rev=2), 3)
        self.assertEqual(client.get("a"), b"x" * MIB)
        self.assertEqual(client.incr("n"), 1)
        self.assertEqual(client.incr("n", -5, ttl=60), -4)
        self.assertEqual(self.host.requests[-1]["ttl_ms"], 60_000)
        self.assertTrue(client.delete("a", if_rev=3))
        self.assertFalse(client.delete("a"))
        self.assertEqual(len(self.host.connections), 1)

    def test_list(self):
        keys = [f"k/{number}" for number in range(7)]
        for key in keys:
            self.client.set(key, key.upper())
        self.client.set("other", "")
        self.assertEqual([(entry.key, entry.value) for entry in self.client.list("k/")], [(key, None) for key in keys])
        self.assertEqual([entry.value for entry in self.client.list("k/", after="k/4", values=True)], [b"K/5", b"K/6"])
        self.assertEqual(len(list(self.client.list())), 8)
        self.assertEqual(list(self.client.list("none")), [])

    def test_txn(self):
        self.assertEqual(self.client.txn([{"op": "set", "key": "a", "value": b"\xff", "ttl": 2},
                                          {"op": "incr", "key": "n", "delta": 2}, {"op": "delete", "key": "n"}]),
                         [{"rev": 1}, {"value": 2, "rev": 2}, {"found": True}])
        self.assertEqual(self.host.values, {"a": (b"\xff", 1, 2000)})
        with self.assertRaises(plugrack.Conflict) as caught:
            self.client.txn([{"op": "delete", "key": "b"},
                             {"op": "set", "key": "a", "value": "", "if_absent": True}])
        self.assertEqual(caught.exception.index, 1)

    def test_errors(self):
        self.client.set("a", b"1")
        with self.assertRaises(plugrack.Conflict) as caught:
            self.client.set("a", b"2", if_absent=True)
        self.assertEqual(caught.exception.code, "conflict")
        with self.assertRaises(plugrack.Conflict):
            self.client.delete("a", if_rev=5)
        for key, value, code in (("busy", b"", "busy"), ("a", b"x" * (MIB + 1), "too_large"),
                                 ("k" * 70_000, b"", "too_large")):
            with self.subTest(code), self.assertRaises(plugrack.Error) as caught:
                self.client.set(key, value)
            self.assertEqual(caught.exception.code, code)
        self.assertEqual(self.client.get("a"), b"1")

    def test_a_write_without_a_reply_is_not_repeated(self):
        with self.assertRaises(plugrack.Error) as caught:
            self.client.set("cut", b"")
        self.assertEqual(caught.exception.code, "disconnected")
        self.assertEqual(len(self.host.connections), 1)
        self.assertEqual(self.client.incr("n"), 1)

    def test_an_idle_connection_that_was_closed_is_replaced(self):
        self.assertEqual(self.client.incr("n"), 1)
        self.host.hang_up()
        self.assertEqual(self.client.incr("n"), 2)

    def test_eight_threads(self):
        failures = []

        def work(name):
            try:
                for number in range(50):
                    self.client.incr("n")
                    self.client.set(name, str(number))
                    self.assertEqual(self.client.get(name), str(number).encode())
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(f"thread {number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(failures, [])
        self.assertEqual(self.client.get("n"), b"400")
        self.assertLessEqual(len(self.host.connections), 8)

    def test_connections_are_bounded(self):
        threads = [threading.Thread(target=self.client.incr, args=("n",)) for _ in range(100)]
        with self.host.lock:  # nothing is answered, so every connection that may be opened is
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(self.client.get("n"), b"100")
        self.assertLessEqual(len(self.host.connections), 64)


# ---- The examples ----------------------------------------------------------------------------------------------------

class CounterTest(TestCase):
    def test_counts_across_restarts(self):
        store = self.store()
        for visit in (1, 2):
            process, connection = self.start(EXAMPLES / "counter" / "plugin", store)
            head, body = connection.get("/")
            self.assertEqual((head["status"], body), (200, b"You are visitor number %d.\n" % visit))
            connection.send({"type": "shutdown", "id": 2})
            self.assertIsNone(connection.receive())
            self.assertEqual(process.wait(), 0)

    def test_request_with_a_body(self):
        _, connection = self.start(EXAMPLES / "counter" / "plugin", self.store())
        connection.http("/", b"begin", method="POST", more=True)
        connection.send({"type": "data", "id": 7, "more": True}, b"x" * MIB)
        connection.send({"type": "data", "id": 7, "more": False})
        self.assertEqual(connection.response()[0]["status"], 200)
        self.assertEqual(connection.get("/else")[0]["status"], 404)

    def test_goes_on_with_the_next_connection(self):
        process, connection = self.start(EXAMPLES / "counter" / "plugin", self.store())
        connection.http("/", b"begin", more=True)
        connection.close()
        self.assertEqual(process.connect().get("/")[1], b"You are visitor number 1.\n")


class NotesTest(TestCase):
    HTML = [["accept", "text/html,*/*;q=0.8"]]

    def setUp(self):
        super().setUp()
        self.host = self.store()
        self.run_notes()

    def run_notes(self, **fields):
        self.process, self.connection = self.start(EXAMPLES / "notes" / "plugin", self.host, **fields)

    def post(self, path, headers=(), **fields):
        return self.connection.get(path, urlencode(fields).encode(), method="POST", headers=headers)

    def page(self):
        head, body = self.connection.get("/", headers=self.HTML)
        self.assertEqual(head["status"], 200)
        self.assertIn(["content-type", "text/html; charset=utf-8"], head["headers"])
        return body.decode()

    def notes(self):
        return json.loads(self.connection.get("/notes.json")[1].decode())

    def test_from_adding_to_deleting(self):
        self.assertIn("No notes yet", self.page())
        head, _ = self.post("/", text="<b>buy & milk</b>\r\nand é", headers=self.HTML)
        self.assertEqual(head["status"], 303)
        self.assertIn(["location", "/bench"], head["headers"])
        self.post("/", text="second")
        second, first = self.notes()
        self.assertEqual((first["text"], second["text"]), ("<b>buy & milk</b>\nand é", "second"))
        page = self.page()
        self.assertIn("&lt;b&gt;buy &amp; milk&lt;/b&gt;\nand é", page)
        self.assertNotIn("<b>", page)
        targets = set(re.findall(r'(?:href|action)="([^"]*)"', page))
        self.assertEqual(targets, {"/bench", "/bench/"} | {
            f"/bench/{verb}/{note['id']}" for verb in ("edit", "delete") for note in (first, second)})
        self.assertEqual(self.post("/edit/" + first["id"], text="bread", rev=first["rev"])[0]["status"], 303)
        self.assertEqual(self.notes()[1]["text"], "bread")
        self.assertEqual(self.post("/edit/" + first["id"], text="late", rev=first["rev"])[0]["status"], 409)
        self.assertEqual(self.post("/edit/" + first["id"], text="no rev")[0]["status"], 400)
        self.assertEqual(self.post("/delete/" + second["id"])[0]["status"], 303)
        self.assertEqual([note["text"] for note in self.notes()], ["bread"])

    def test_survive_a_restart(self):
        self.post("/", text="kept")
        self.connection.send({"type": "shutdown", "id": 2})
        self.assertEqual(self.process.wait(), 0)
        self.run_notes(config={"title": "Mine <3"})
        self.assertEqual(self.notes()[0]["text"], "kept")
        self.assertIn("<title>Mine &lt;3</title>", self.page())

    def test_at_a_terminal(self):
        head, body = self.connection.get("/", headers=[["accept", "*/*"], ["x-forwarded-proto", "https"]])
        self.assertEqual(head["headers"], [["content-type", "text/plain; charset=utf-8"]])
        self.assertEqual(body.decode(), "Notes: nothing yet\n\nAdd one:  curl -d text='…' https://example.org/bench\n")
        self.assertEqual(self.post("/", text="milk\nbread")[1], b"Added.\n")
        self.assertRegex(self.connection.get("/")[1].decode(),
                         r"^Notes: 1\n\n\d{4}-\d\d-\d\d \d\d:\d\d\n    milk\n    bread\n\nAdd one")

    def test_mistakes(self):
        for status, path, fields in ((400, "/", {"text": " \r\n "}), (400, "/", {}), (413, "/", {"text": "é" * 10_001}),
                                     (413, "/", {"text": "x" * 300_000}), (404, "/nowhere", {}), (404, "/delete/", {}),
                                     (409, "/edit/none", {"text": "x", "rev": 1})):
            with self.subTest(path=path, status=status):
                head, body = self.post(path, self.HTML, **fields)
                self.assertEqual(head["status"], status)
                self.assertIn(b'<a href="/bench">Back</a>', body)
        self.assertIn(b"10,001", self.post("/", text="é" * 10_001)[1])
        self.assertEqual(self.connection.get("/", method="DELETE")[0]["status"], 405)
        self.assertEqual(self.connection.get("/nowhere")[0]["status"], 404)
        self.assertEqual(self.notes(), [])

    def test_forms_of_other_sites(self):
        for origin in ("https://evil.example", "null", "http://example.org.evil.example"):
            self.assertEqual(self.post("/", [["origin", origin]], text="x")[0]["status"], 403)
        self.assertEqual(self.post("/", [["origin", "http://Example.org"]], text="x")[0]["status"], 303)
        self.assertEqual(len(self.notes()), 1)

    def test_notes_of_the_operator(self):
        key = 'note/odd "/ <name>'
        self.connection.ask({"type": "kv", "id": 3, "op": "set", "key": key}, b"by hand \xff")
        page = self.page()
        self.assertIn("by hand \ufffd", page)
        self.assertIn("odd &quot;/ &lt;name&gt;", page)
        target = re.search(r'action="/bench(/delete/[^"]*)"', page).group(1)
        self.assertEqual(self.post(target)[0]["status"], 303)
        self.assertEqual(self.notes(), [])


# ---- Licences --------------------------------------------------------------------------------------------------------

VENDOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
FOOTER = b'{"kid":"k-1"}'
CLAIMS = {"v": 1, "jti": "L-1", "iss": "Acme", "aud": "bench", "inst": [INSTANCE], "sub": "Customer",
          "iat": "2026-01-01T00:00:00Z", "feat": ["export"], "lim": {"users": 25}}

LICENSED = r'''
import plugrack
plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="b", route="/bench",
                         license_keys=KEYRING, release_date="2026-03-01")

@plugin.init
def init(context):
    print("granted", sorted(context.granted.features), context.granted.limits, context.granted.standing)

@plugin.http
def handle(request):
    return plugin.context.granted.customer

plugin.run()
'''


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def public_key(key=VENDOR):
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    return "k4.public." + base64url(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def sign(payload, footer=FOOTER, assertion=b"plugrack/plugin-licence/v1", key=VENDOR):
    """A token, made as PASETO says and without the SDK. The payload is claims to add to CLAIMS, or bytes."""
    if isinstance(payload, dict):
        payload = json.dumps({**CLAIMS, **payload}).encode()
    signed = struct.pack("<Q", 4)
    for piece in (b"v4.public.", payload, footer, assertion):
        signed += struct.pack("<Q", len(piece)) + piece
    return f"v4.public.{base64url(payload + key.sign(signed))}.{base64url(footer)}"


def moment(text):
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)


def vectors(name):
    return json.loads((ROOT / "tests" / "protocol" / name).read_text("utf-8"))


class LicenseTest(TestCase):
    keyring = {"k-1": public_key()}

    def verdict(self, token, keyring=None, plugin="bench", instance=INSTANCE, release_date=None,
                now="2026-06-01T00:00:00Z", not_before_time=None):
        """The standing of a token, or the code it is refused with, and its days left."""
        try:
            license = plugrack.verify_license(token, keyring or self.keyring, plugin, instance, release_date, moment(now),
                                              not_before_time)
        except plugrack.LicenseError as error:
            self.assertEqual(str(error), f"licence: {error.code}: {error.what}")
            self.assertEqual(len(str(error).splitlines()), 1, error)
            self.assertNotIn(token or "no token", str(error))
            return error.code, None
        return license.standing, license.days_left

    def test_the_framing_passes_the_official_vectors(self):
        signed = [vector for vector in vectors("paseto_v4_public.json")["tests"] if vector["name"].startswith("4-S-")]
        self.assertEqual(len(signed), 3)
        for vector in signed:
            with self.subTest(vector["name"]):
                key = bytes.fromhex(vector["public-key"])
                payload, signature, footer = plugrack._split_token(vector["token"])
                assertion = vector["implicit-assertion"].encode()
                self.assertTrue(plugrack._is_signed(payload, footer, assertion, signature, key))
                said = vector["payload"]
                self.assertEqual(json.loads(payload), json.loads(said) if isinstance(said, str) else said)
                self.assertEqual(footer, vector["footer"].encode())
                for changed in ((payload + b" ", footer, assertion), (payload, footer + b" ", assertion),
                                (payload, footer, assertion + b" "), (payload + footer, b"", assertion)):
                    if changed != (payload, footer, assertion):
                        self.assertFalse(plugrack._is_signed(*changed, signature, key))

    def test_every_shared_vector(self):
        shared = vectors("licenses.json")
        for case in shared["cases"]:
            with self.subTest(case["name"]):
                self.assertEqual(
                    self.verdict(case["token"], shared["keys"], case["plugin"], case["instance"], case["release_date"],
                                 case["now"], case["not_before_time"]), (case["expect"], case["days_left"]))
        self.assertEqual({case["expect"] for case in shared["cases"]}, {
            "valid", "warning", "grace", "missing", "malformed", "unknown_key", "bad_signature", "unsupported",
            "wrong_plugin", "wrong_instance", "update_not_covered", "clock_not_set", "not_yet_valid", "expired"})

    def test_json_that_parsers_may_read_differently_is_malformed(self):
        usual = json.dumps(CLAIMS)
        self.assertEqual(self.verdict(sign(usual.encode())), ("valid", None))
        self.assertEqual(self.verdict(sign(b" " + usual.encode() + b"\r\n\t")), ("valid", None))
        deep = lambda levels: "[" * levels + "]" * levels  # noqa: E731
        table = {
            "valid": [
                '"x":1.5,"y":-0,"z":1e300', '"x":null,"y":[true,{"a":{}}]', f'"x":{deep(126)}', '"lim2":{},"sub2":null',
                r'"x":"[[\\\"{","y":"\ud83d\ude00"', '"constructor":1,"__proto__":{"exp":"x"}',
            ],
            "malformed": [
                f'"x":{deep(127)}', f'"x":{deep(2500)}', '"x":' + "[" * 5000, '"x":1,"x":1', r'"x":1,"\u0078":1',
                '"x":[{"y":1,"y":2}]', '"aud":"bench"', '"x":NaN', '"x":-Infinity', '"x":1e999', f'"x":{"9" * 400}',
                f'"x":{"9" * 5000}', '"x":01', '"x":"\t"', r'"x":"\ud800"', r'"\udfff":1', '"x":1,', "\"x\":'1'",
                '"grace_days":1.0', '"grace_days":-0', '"grace_days":1e1', '"grace_days":true', f'"grace_days":{2**53}',
                '"exp":null', '"exp":"2026-02-30T00:00:00Z"', '"exp":"2027-01-01T24:00:00Z"',
                '"exp":"2027-01-01T00:00:60Z"', '"exp":"2027-01-01T00:00:00.0Z"', '"exp":"2027-01-01"',
                '"exp":"0000-01-01T00:00:00Z"', r'"exp":"2027-01-01T00:00:00Z\n"', r'"exp":"\u0662027-01-01T00:00:00Z"',
                '"upd":["2027-01-01"]', '"upd":"2027-1-1"', '"crit":"exp"', '"nbf":0',
            ],
            "unsupported": ['"crit":["__proto__"]', '"crit":["toString"]'],
        }
        for expected, additions in table.items():
            for more in additions:
                with self.subTest(more[:40]):
                    self.assertEqual(self.verdict(sign(f"{usual[:-1]},{more}}}".encode()))[0], expected)
        for payload in (b"", b"[]", b"null", b"\xef\xbb\xbf" + usual.encode(), usual.encode() + b"\xff", usual.encode() * 2,
                        usual.replace('"v": 1', '"v": 1.0').encode(), usual.replace('"v": 1', '"v": true').encode()):
            with self.subTest(payload[:40]):
                self.assertEqual(self.verdict(sign(payload))[0], "malformed")
        for footer in (b"", b"{}", b'{"kid":1}', b'{"kid":"k-1","x":[]}', b'{"kid":"k-1","kid":"k-1"}', b'{"kid":"k 1"}',
                       b'{"kid":"k-1\n"}', b'["k-1"]', b"[" * 250, b'{"kid":"k-1","x":"' + b"x" * 250 + b'"}'):
            with self.subTest(footer[:40]):
                self.assertEqual(self.verdict(sign({}, footer))[0], "malformed")

    def test_a_mutated_token_is_refused_and_never_breaks_anything(self):
        chance, token = random.Random(4), sign({"exp": "2027-01-01T00:00:00Z", "x": [1.5, {"y": None}]})
        pieces = [*"AZaz09-_=+/.{}[]:,\"\\ \n\0", "é", "\ud800", "v4.public.", "[" * 200, "1e999", "NaN", '"v":1,', token]

        def mutated(text):
            for _ in range(chance.choice((1, 1, 1, 2, 8))):
                at = chance.randrange(len(text) + 1)
                text = text[:at] + chance.choice(["", *pieces]) + text[at + chance.choice((0, 0, 1, 1, 1, 5, len(text))):]
            return text

        payload = plugrack._split_token(token)[0].decode()
        codes = set()
        for _ in range(3000):
            text = mutated(token)
            if text.strip(" \t\n\f\r") != token:
                self.assertNotIn(self.verdict(text)[0], ("valid", "warning", "grace"), text)
            # Behind the signature as well, which the vendor's mistakes pass.
            codes.add(self.verdict(sign(mutated(payload).encode("utf-8", "surrogatepass")))[0])
        self.assertLessEqual({"valid", "malformed"}, codes)

    def test_a_keyring_or_a_date_that_is_none_is_the_authors_error(self):
        key = public_key()
        for keyring in ({"k-1": key[:-1]}, {"k-1": key + "A"}, {"k-1": key + "="}, {"k-1": key.replace("public", "secret")},
                        {"k-1": None}, {"": key}, {"k 1": key}, {"k" * 65: key}, {"k-1": key, "k-2": "k4.public."}):
            with self.subTest(keyring), self.assertRaisesRegex(ValueError, "plugrack license keygen"):
                plugrack.Plugin(id="a", name="A", version="1", icon="a", route="/a", license_keys=keyring)
        for date in ("2026-02-30", "2026-3-1", "today", "2026-03-01T00:00:00Z"):
            with self.subTest(date), self.assertRaisesRegex(ValueError, "release date"):
                plugrack.Plugin(id="a", name="A", version="1", icon="a", route="/a", license_keys={}, release_date=date)
        with self.assertRaisesRegex(ValueError, "YYYY-MM-DDTHH:MM:SSZ"):
            plugrack.verify_license(None, {}, "a", INSTANCE, not_before_time="2026-03-01")

    def test_a_key_without_a_keyring_of_its_own_is_not_asked(self):
        self.assertEqual(self.verdict(sign({}), {"k-2": public_key()}), ("unknown_key", None))
        self.assertEqual(plugrack.verify_license(sign({}), self.keyring, "bench", INSTANCE).features, {"export"})

    def launch_licensed(self):
        return self.launch(LICENSED.replace("KEYRING", repr(self.keyring)))

    def test_a_plugin_with_a_licence_runs_and_knows_what_is_granted(self):
        process = self.launch_licensed()
        connection, reply = process.init(license=sign({}) + "\n", not_before_time="2026-06-01T00:00:00Z")
        self.assertEqual(reply[0], {"type": "ready", "id": 1})
        self.assertEqual(connection.get("/")[1], b"Customer")
        self.assertEqual(process.log(), "granted ['export'] {'users': 25} valid\n")

    def test_a_plugin_without_one_says_why_in_one_line_and_exits(self):
        for code, exit_code, fields in (
            ("missing", 78, {}),
            ("missing", 78, {"license": " \n"}),
            ("wrong_instance", 78, {"license": sign({"inst": ["another"]})}),
            ("update_not_covered", 78, {"license": sign({"upd": "2026-02-28"})}),
            ("expired", 78, {"license": sign({"exp": "9000-01-01T00:00:00Z"}), "not_before_time": "9000-01-01T00:00:00Z"}),
            ("clock_not_set", 75, {"license": sign({"iat": "9000-01-01T00:00:00Z"})}),
        ):
            with self.subTest(code):
                process = self.launch_licensed()
                connection, (reply, _) = process.init(**fields)
                self.assertEqual((reply["type"], reply["code"]), ("error", code))
                self.assertRegex(reply["message"], f"^licence: {code}: .+$")
                self.assertIsNone(connection.receive())
                self.assertEqual(process.wait(), exit_code)
                self.assertEqual(process.log(), reply["message"] + "\n")

    def test_where_cryptography_is_missing_the_plugin_says_so(self):
        (self.directory / "cryptography.py").write_text("raise ImportError('not here')", "utf-8")
        process = self.launch_licensed()
        _, (reply, _) = process.init(license=sign({}))
        self.assertEqual(reply["code"], "unsupported")
        self.assertIn("apt install python3-cryptography", reply["message"])
        self.assertEqual(process.wait(), 78)
        self.assertEqual(process.log(), reply["message"] + "\n")

    def test_the_page_s_plugin_works_when_copied(self):
        page = (ROOT / "docs" / "licensing.md").read_text("utf-8")
        plugin = page.split("```python\n")[1].split("```")[0].replace("k4.public.…", public_key())
        token = sign({"aud": "report", "feat": []}, b'{"kid":"acme-2026a"}')
        _, connection = self.start(plugin, license=token)
        self.assertEqual(connection.get("/")[1], b"Licensed to Customer, for 25 users.\n")
        self.assertEqual(connection.get("/export")[0]["status"], 403)


class LicensedPythonTest(TestCase):
    KEY = json.loads((EXAMPLES / "licensed-python" / "demo.key").read_text("utf-8"))

    def token(self, **claims):
        private = base64.urlsafe_b64decode(self.KEY["secret"].replace("k4.secret.", "") + "==")[:32]
        return sign({"aud": "licensed-python", **claims}, json.dumps({"kid": self.KEY["kid"]}).encode(),
                    key=Ed25519PrivateKey.from_private_bytes(private))

    def members(self, **claims):
        """The example with such a licence, and what asks it."""
        _, connection = self.start(EXAMPLES / "licensed-python" / "plugin", self.store(), license=self.token(**claims))

        def ask(path, **options):
            head, body = connection.get(path, **options)
            return head["status"], body.decode()
        return ask

    def test_the_limit_and_the_feature_are_those_of_the_licence(self):
        ask = self.members(exp="9000-01-01T00:00:00Z", lim={"members": 2})
        for name, status in (("Ada", 201), ("", 400), ("é" * 101, 400), ("Grace", 201), ("Edsger", 403), ("Ada", 201)):
            self.assertEqual(ask("/", body=urlencode({"name": name}).encode(), method="POST")[0], status, name)
        self.assertEqual(ask("/"), (200, "Licensed to Customer until 9000-01-01T00:00:00Z: 2 of 2 members.\n  Ada\n  Grace\n"))
        self.assertEqual(ask("/export"), (200, '["Ada","Grace"]'))
        self.assertEqual(ask("/other")[0], 404)

    def test_without_the_feature_it_does_not_export(self):
        ask = self.members(feat=[], lim={})
        self.assertEqual(ask("/")[1], "Licensed to Customer without an end: 0 of 3 members.\n")
        self.assertEqual(ask("/export"), (403, "The licence does not include the feature export.\n"))

    def test_without_a_licence_it_does_not_run(self):
        process = self.launch(EXAMPLES / "licensed-python" / "plugin")
        self.assertEqual(process.init()[1][0]["code"], "missing")
        self.assertEqual(process.wait(), 78)
        self.assertIn("plugrack license set licensed-python TOKEN", process.log())


if __name__ == "__main__":
    unittest.main()
