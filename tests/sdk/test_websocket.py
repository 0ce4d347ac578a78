"""WebSockets of the Python SDK, by raw frames from a small host. The plugins are real processes, as in test_plugrack.py."""

import base64
import hashlib
import json
import random
import socket
import threading
import time
import unittest
import unittest.mock
from urllib.parse import urlencode

import test_plugrack as base

plugrack = base.plugrack
COST = 64  # bytes of credit that a message takes beside its length
CREDIT = 65_536  # bytes that each side may send at the beginning

PLUGIN = r'''
import os, sys, threading, time
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=CONCURRENCY)
running = 0

def until(name):
    while not os.path.exists(name):
        time.sleep(0.005)

def alone(seconds=0.02):
    """Says so if another handler runs at the same time."""
    global running
    running += 1
    if running > 1:
        print("side by side")
    time.sleep(seconds)
    running -= 1

def attempt(call, *arguments):
    try:
        return call(*arguments)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"

@plugin.websocket_open
def opened(socket):
    print("open", socket.path)
    what = socket.path[1:]
    if what == "fields":
        socket.told = {name: getattr(socket, name) for name in
                       ("path", "query", "mount", "headers", "remote", "protocols", "protocol", "is_open", "params")}
    elif what == "pair":
        return 403, "members only\n"
    elif what == "response":
        return plugrack.Response("gone", 410, {"x-why": "moved"})
    elif what == "redirect":
        return plugrack.Response(status=303, headers={"location": "/elsewhere"})
    elif what == "error":
        raise plugrack.HTTPError(401, "who are you?")
    elif what == "stream":
        return 404, iter(["not", b" ", "here"])
    elif what == "endless":
        return 404, (b"x" * 65536 for _ in iter(int, 1))
    elif what == "success":
        return "welcome"
    elif what == "wrong":
        return True
    elif what == "fails":
        raise ValueError("in open")
    elif what == "exits":
        sys.exit(3)
    elif what == "slow":
        print("deciding")
        until("go")
    elif what == "slow_refusal":
        until("go")
        return 403, "no"
    elif what == "choose":
        print(attempt(setattr, socket, "protocol", "chat.v9"))
        socket.protocol = "chat.v1"
    elif what == "greets":
        socket.send("one")
        socket.send(b"two")
        print("in sockets:", socket in plugin.sockets)
        socket.protocol = socket.protocols and socket.protocols[-1] or None
    elif what == "greets_at_length":
        for number in range(4):
            socket.send(str(number) * 40_000)
        print(attempt(setattr, socket, "protocol", None))
        return (403, "too late") if socket.query == "refuse" else None
    elif what == "greets_and_closes":
        socket.send("bye")
        socket.close(4000, "was nice")
        socket.send("late")
    elif what == "alone":
        alone()

@plugin.websocket
def said(socket, message):
    what = socket.path[1:]
    if what == "echo" or what == "greets":
        socket.send(message)
    elif what == "fields":
        socket.send(plugrack._to_json(socket.told))
    elif what == "log":
        print("said", message)
    elif what == "gated":
        print("begun", message)
        until("go")
        print("over", message)
    elif what == "flood":
        count = 0
        try:
            for count in range(100_000):
                socket.send(b"x" * 1000)
        except plugrack.SocketClosed as error:
            print("flood ended:", error, error.socket is socket, socket.is_open)
            raise
    elif what == "blast":
        for number in range(int(message)):
            socket.send(bytes([number]) * 1_048_576)
        print("blasted")
    elif what == "twice":
        socket.send(message)
        try:
            socket.send(message)
        finally:
            print("sent twice")
    elif what == "sizes":
        socket.send("é" * 524_288)
        for message in ("é" * 524_289, b"x" * 1_048_577, bytearray(1_048_577), 5, None, "\ud800"):
            print(attempt(socket.send, message))
        socket.send(memoryview(b"view"))
    elif what == "closing":
        socket.close(4001, "enough")
        print(socket.is_open, socket in plugin.sockets, socket.close(), attempt(socket.send, "late"))
    elif what == "codes":
        for code in (999, 1004, 1005, 1006, 1015, 2999, 5000, True, "1000"):
            print(code, attempt(socket.close, code))
        print(attempt(socket.close, 1000, "é" * 62))
        socket.close(3000, "é" * 61)
    elif what == "raises":
        raise ValueError("in message " + message)
    elif what == "ends":
        sys.exit(3)
    elif what == "other":
        other = next(each for each in plugin.sockets if each is not socket)
        other.close()
        other.send("to another socket, which is closed")
    elif what == "alone":
        alone()
    elif what == "cast":
        print("sent to", plugin.broadcast(message))
    elif what == "cast_some":
        print("sent to", plugin.broadcast(message, to=[each for each in plugin.sockets if each.query == "b"] + [socket]))
    elif what == "own":
        socket.count = getattr(socket, "count", 0) + 1
        socket.send(str(socket.count))

@plugin.websocket_close
def closed(socket, code, reason):
    print("close", socket.path, code, repr(reason), socket.is_open)
    if socket.path == "/close_fails":
        raise ValueError("in close")

@plugin.http
def answer(request):
    if request.path == "/alone":
        alone()
    elif request.path == "/cast":
        return str(plugin.broadcast("from http"))
    elif request.path == "/sockets":
        return " ".join(each.path for each in plugin.sockets)
    elif request.path == "/threads":
        return str(threading.active_count())
    elif request.path == "/wait":
        print("waiting")
        request.cancelled.wait(50)
    return "hello"

plugin.run()
'''

QUIET = r'''
import plugrack
plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="q", route="/bench", concurrency=2)

HANDLERS
plugin.run()
'''


RANDOM = r'''
import random
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="r", route="/bench", concurrency=CONCURRENCY)

@plugin.websocket_open
def opened(socket):
    socket.count = 0
    if socket.query == "refuse":
        return 403, "no"
    if socket.query == "fail":
        raise ValueError("on purpose")
    if socket.query == "greet":
        socket.send("hello")

@plugin.websocket
def said(socket, message):
    assert int(message) == socket.count, f"{message} came after {socket.count} messages"
    socket.count += 1
    what = random.random()
    if what < 0.02:
        socket.close(4000)
    elif what < 0.04:
        raise ValueError("on purpose")
    elif what < 0.06:
        plugin.broadcast("all")
    else:
        socket.send(message)

@plugin.websocket_close
def closed(socket, code, reason):
    assert not socket.is_open
    print("closed", socket.path)

plugin.run()
'''


class Sockets(base.Connection):
    """The host's connection for WebSockets."""

    def open(self, path, number=7, **fields):
        self.send({"type": "ws_open", "id": number, "path": path, "mount": "/bench", **fields})

    def accepted(self, path, number=7, **fields):
        """A socket that the plugin has accepted. What other sockets have been given back before that is passed over."""
        self.open(path, number, **fields)
        found = self.receive()
        while found and found[0]["type"] == "ws_credit":
            found = self.receive()
        assert found and found[0] == {"type": "ws_accept", "id": number}, found

    def say(self, message, number=7):
        is_text = isinstance(message, str)
        self.send({"type": "ws_message", "id": number, "text": is_text}, message.encode() if is_text else message)

    def credit(self, size, number=7):
        self.send({"type": "ws_credit", "id": number, "bytes": size})

    def hang_up(self, number=7, **fields):
        self.send({"type": "ws_close", "id": number, **fields})

    def shutdown(self):
        self.send({"type": "shutdown", "id": 99})

    def messages(self, count, number=7):
        """So many messages of one socket; what else comes is credit."""
        found = []
        while len(found) < count:
            head, body = self.receive()
            assert head["type"] == "ws_credit" or (head["type"], head["id"]) == ("ws_message", number), head
            if head["type"] == "ws_message":
                found.append(body.decode() if head["text"] else body)
        return found

    def is_silent(self, seconds=0.2):
        """Whether nothing comes for a moment."""
        self.sock.settimeout(seconds)
        try:
            self.input.peek(1)
            return False
        except socket.timeout:
            self.input.close()  # one that has timed out cannot be read any more
            self.input = self.sock.makefile("rb")
            return True
        finally:
            self.sock.settimeout(base.PATIENCE)


class TestCase(base.TestCase):
    def begin(self, concurrency=2, plugin=PLUGIN, **fields):
        """A plugin that is ready, its first connection, and one for WebSockets."""
        process, connection = self.start(plugin.replace("CONCURRENCY", str(concurrency)), **fields)
        return process, connection, self.sockets(process)

    def sockets(self, process):
        connection = process.connect()
        connection.__class__ = Sockets
        return connection

    def until_logged(self, process, *lines):
        text = "\n".join(lines) + "\n"
        try:
            self.eventually(lambda: text in process.log())
        except AssertionError:
            self.fail(f"{text!r} is not in {process.log()!r}")

    def go(self, process):
        (process.directory / "go").touch()


# ---- Frames ----------------------------------------------------------------------------------------------------------

class FrameTest(TestCase):
    def test_invalid_frames_close_their_connection_alone(self):
        process, first, others = self.begin()
        others.accepted("/echo")
        tried = 0
        for vector in base.invalid_to("plugin_sockets", "start", "open"):
            with self.subTest(vector["name"]):
                connection = self.sockets(process)
                if vector["place"] != "start":
                    connection.accepted("/echo")
                connection.write(bytes.fromhex(vector["hex"]))
                self.assertIsNone(connection.receive())
                tried += 1
        self.assertGreater(tried, 10)
        self.assertEqual(process.log().count("the host broke the protocol"), tried)
        self.assertNotIn("Traceback", process.log())
        others.say("still here")
        self.assertEqual(others.messages(1), ["still here"])
        self.assert_alive(first)

    def test_messages_that_are_out_of_place(self):
        process, first, _ = self.begin()
        opening = {"type": "ws_open", "id": 7, "path": "/echo", "mount": "/bench"}
        for name, frames in {
            "a ping": [{"type": "ping", "id": 1}],
            "a request": [{"type": "http", "id": 1, "method": "GET", "path": "/", "mount": ""}],
            "what the plugin sends": [{"type": "ws_accept", "id": 7}],
            "an id in use": [opening],
            "a message for no socket": [{"type": "ws_message", "id": 8}],
            "credit for no socket": [{"type": "ws_credit", "id": 8, "bytes": 1}],
        }.items():
            with self.subTest(name):
                connection = self.sockets(process)
                connection.accepted("/echo")
                for frame in frames:
                    connection.send(frame)
                self.assertIsNone(connection.receive())
        connection = process.connect()
        self.assert_alive(connection)
        self.assertIsNone(connection.ask(opening), "a connection for requests carries no sockets")
        connection = self.sockets(process)
        connection.open("/slow")
        self.until_logged(process, "deciding")
        connection.say("too early")
        self.assertIsNone(connection.receive())
        connection = self.sockets(process)
        connection.accepted("/echo")
        connection.send({"type": "ws_message", "id": 7, "text": True}, b"\xff")
        self.assertIsNone(connection.receive())
        self.assert_alive(first)
        self.assertNotIn("Traceback", process.log())

    def test_no_socket_before_init_nor_without_a_handler(self):
        process = self.launch(PLUGIN.replace("CONCURRENCY", "2"))
        connection = self.sockets(process)
        connection.open("/echo")
        self.assertIsNone(connection.receive())
        self.assertEqual(process.init()[1][0]["type"], "ready")
        _, _, connection = self.begin(plugin=QUIET.replace("HANDLERS", ""))
        connection.open("/echo")
        self.assertIsNone(connection.receive())

    def test_the_conversation(self):
        vectors = {vector["name"]: vector for vector in base.FRAMES["valid"]}
        conversation = next(each for each in base.FRAMES["conversations"] if each["on"] == "plugin_sockets")
        _, _, connection = self.begin(plugin=PLUGIN.replace('"echo"', '"room"'))
        for step in conversation["steps"]:
            vector = vectors[step["frame"]]
            if step["from"] == "host":
                connection.write(bytes.fromhex(vector["hex"]))
            elif vector["head"]["type"] == "ws_message":  # the plugin's own words
                self.assertEqual(connection.receive()[0], vector["head"])
            else:
                self.assertEqual(connection.receive(), (vector["head"], bytes.fromhex(vector["body_hex"])))

    def test_valid_frames(self):
        process, _, connection = self.begin()
        vectors = [vector for vector in base.FRAMES["valid"] if vector["to"] == "plugin_sockets"]
        for vector in (vector for vector in vectors if vector["place"] == "start"):
            connection.write(bytes.fromhex(vector["hex"]))
            self.assertEqual(connection.receive()[0], {"type": "ws_accept", "id": vector["head"]["id"]}, vector["name"])
        for vector in (vector for vector in vectors if vector["place"] == "open"):
            with self.subTest(vector["name"]):
                connection = self.sockets(process)
                connection.accepted("/echo", 5)
                connection.write(bytes.fromhex(vector["hex"]))
                connection.open("/echo", 6)
                while connection.receive()[0]["type"] != "ws_accept":
                    pass

    def test_frames_in_single_bytes(self):
        _, _, connection = self.begin()
        for byte in base.frame({"type": "ws_open", "id": 7, "path": "/echo", "mount": ""}):
            connection.write(bytes([byte]))
        self.assertEqual(connection.receive()[0]["type"], "ws_accept")


# ---- Sockets ---------------------------------------------------------------------------------------------------------

class SocketTest(TestCase):
    def test_metadata(self):
        fields = {"id": "a", "name": "A", "version": "1", "icon": "a", "route": "/a"}
        mine = ["tunnel"]
        for register in ("websocket", "websocket_open", "websocket_close"):
            plugin = plugrack.Plugin(**fields, speaks=mine, origins=["https://app.example.org"])
            self.assertEqual(plugin.metadata["speaks"], ["tunnel"])
            self.assertEqual(plugin.metadata["origins"], ["https://app.example.org"])
            handler = lambda *_: None  # noqa: E731
            self.assertIs(getattr(plugin, register)(handler), handler)
            plugin.websocket(handler)
            self.assertEqual(plugin.metadata["speaks"], ["tunnel", "websocket"])
        self.assertEqual(mine, ["tunnel"])
        plugin = plugrack.Plugin(**fields)
        self.assertFalse(plugin.metadata.keys() & {"speaks", "origins"})
        plugin.websocket_open(handler)
        with self.assertRaises(ValueError):
            plugin.websocket(plugrack.asgi(handler))

    def test_what_a_socket_tells(self):
        _, _, connection = self.begin()
        connection.accepted("/fields", query="name=ada&x=%20", remote="203.0.113.9", headers=[
            ["host", "example.org"], ["sec-websocket-protocol", "chat.v2, chat.v1"], ["sec-websocket-protocol", "chat.v0"]])
        connection.say("")
        told = json.loads(connection.messages(1)[0])
        self.assertEqual(told, {
            "path": "/fields", "query": "name=ada&x=%20", "mount": "/bench", "remote": "203.0.113.9", "is_open": True,
            "protocols": ["chat.v2", "chat.v1", "chat.v0"], "protocol": None, "params": {"name": "ada", "x": " "}, "headers": [
                ["host", "example.org"], ["sec-websocket-protocol", "chat.v2, chat.v1"], ["sec-websocket-protocol", "chat.v0"]]})
        connection.accepted("/fields", 8)
        connection.say("", 8)
        told = json.loads(connection.messages(1, 8)[0])
        self.assertEqual((told["query"], told["headers"], told["remote"], told["protocols"]), (None, [], "", []))

    def test_messages_of_every_kind_and_size_both_ways(self):
        _, _, connection = self.begin()
        connection.accepted("/echo", credit=2**53 - 1)
        for message in ("", b"", "grüß ☕", bytes(range(256)), b"\0", "x" * base.MIB, b"\xff" * base.MIB):
            connection.say(message)
            self.assertEqual(connection.receive(), (
                {"type": "ws_message", "id": 7, "text": isinstance(message, str)},
                message.encode() if isinstance(message, str) else message))
            self.assertEqual(connection.receive()[0]["type"], "ws_credit")

    def test_a_message_that_no_frame_holds_is_the_author_s_error(self):
        process, _, connection = self.begin()
        connection.accepted("/sizes")
        connection.say("")
        self.assertEqual(connection.messages(1), ["é" * 524_288])
        connection.credit(base.MIB + COST)
        self.assertEqual(connection.messages(1), [b"view"])
        lines = process.log().splitlines()[1:]
        for line, size in zip(lines, (1_048_578, 1_048_577, 1_048_577)):
            self.assertEqual(line, f"ValueError: a message of {size} bytes; a WebSocket takes at most 1048576")
        self.assertEqual(lines[3:5], ["TypeError: a message is str or bytes, got int", "TypeError: a message is str or bytes, got NoneType"])
        self.assertIn("UnicodeEncodeError", lines[5])

    def test_the_messages_of_a_socket_are_handled_in_order(self):
        _, _, connection = self.begin(8)
        for number in range(4):
            connection.accepted("/own", number)
        for _ in range(100):
            for number in range(4):
                connection.say("", number)
        counts = {number: [] for number in range(4)}
        while any(len(each) < 100 for each in counts.values()):
            head, body = connection.receive()
            if head["type"] == "ws_message":
                counts[head["id"]].append(int(body))
        self.assertEqual(set(map(tuple, counts.values())), {tuple(range(1, 101))})

    def test_no_thread_for_each_socket(self):
        _, first, connection = self.begin(2)
        before = int(first.get("/threads")[1])
        for number in range(300):
            connection.accepted("/own", number)
        for number in range(300):
            connection.say("", number)
        for _ in range(600):
            connection.receive()
        self.assertLessEqual(int(first.get("/threads")[1]), before + 3)  # one that reads, two for handlers
        self.assertEqual(len(first.get("/sockets")[1].split()), 300)

    def test_without_a_handler_for_messages_they_are_dropped_and_credit_returns(self):
        _, _, connection = self.begin(plugin=QUIET.replace("HANDLERS", "plugin.websocket_open(lambda socket: None)"))
        connection.accepted("/x")
        connection.say("hello")
        self.assertEqual(connection.receive()[0], {"type": "ws_credit", "id": 7, "bytes": 5 + COST})

    def test_without_a_handler_for_new_ones_all_are_accepted(self):
        _, _, connection = self.begin(plugin=QUIET.replace(
            "HANDLERS", "plugin.websocket(lambda socket, message: socket.send(message))"))
        connection.accepted("/x")
        connection.say("hello")
        self.assertEqual(connection.messages(1), ["hello"])
        connection.hang_up(code=1000)
        connection.accepted("/x", 8)

    def test_the_connection_takes_the_place_of_no_request(self):
        process, connection, sockets = self.begin(1)
        sockets.accepted("/echo")
        for _ in range(2):
            connection.http("/wait")
            self.until_logged(process, "waiting")
            connection.close()
            connection = process.connect()
            self.assertEqual(connection.get("/hello")[1], b"hello")
        self.assertNotIn("no connection is accepted", process.log())
        sockets.say("hello")
        self.assertEqual(sockets.messages(1), ["hello"])

    def test_a_bounded_memory_has_room_for_the_threads_of_sockets(self):
        fields = {"id": "a", "name": "A", "version": "1", "icon": "a", "route": "/a"}
        memory = 128 * base.MIB
        with unittest.mock.patch.object(plugrack.resource, "getrlimit", lambda which: (
                (memory if which == plugrack.resource.RLIMIT_DATA else 8 * base.MIB), -1)):
            plugin = plugrack.Plugin(**fields)
            self.assertEqual(plugin.metadata["concurrency"], 10)
            plugin.websocket_open(lambda socket: None)
            plugin.websocket(lambda socket, message: None)
            self.assertEqual(plugin.metadata["concurrency"], 5)
            plugin = plugrack.Plugin(**fields, concurrency=10)
            plugin.websocket(lambda socket, message: None)
            self.assertEqual(plugin.metadata["concurrency"], 10)

    def test_a_connection_that_has_ended_counts_while_its_handlers_run(self):
        process, first, connection = self.begin(1)
        connection.accepted("/gated")
        connection.say("hello")
        self.until_logged(process, "begun hello")
        other = self.sockets(process)
        other.open("/echo")
        for each in (first, connection, other):
            each.close()
        another = process.connect()
        another.send({"type": "ping", "id": 1})
        self.eventually(lambda: "no connection is accepted until a handler ends: 2 handlers still run" in process.log())
        self.go(process)
        self.assertEqual(another.receive()[0], {"type": "pong", "id": 1})

    def test_a_connection_without_any_thread_for_handlers_is_closed(self):
        workers = plugrack._Workers(2)
        mailbox = unittest.mock.Mock()
        handled = threading.Semaphore(0)
        mailbox.handle_next = handled.release
        with unittest.mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            with self.assertRaises(RuntimeError):
                workers.start_one()
        workers.start_one()
        with unittest.mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            for _ in range(3):
                workers.put(mailbox)
        for _ in range(3):
            self.assertTrue(handled.acquire(timeout=base.PATIENCE), "the one thread gets to all of it")


# ---- Opening ---------------------------------------------------------------------------------------------------------

class OpenTest(TestCase):
    def test_a_socket_is_refused_with_an_answer(self):
        process, first, connection = self.begin()
        for number, (path, status, body, header) in enumerate((
                ("/pair", 403, b"members only\n", ["content-type", "text/plain; charset=utf-8"]), ("/response", 410, b"gone", ["x-why", "moved"]),
                ("/redirect", 303, b"", ["location", "/elsewhere"]), ("/error", 401, b"who are you?\n", ["content-type", "text/plain; charset=utf-8"]),
                ("/stream", 404, b"not here", None))):
            with self.subTest(path):
                connection.open(path, number)
                head, found = connection.receive()
                self.assertEqual((head["type"], head["id"], head["status"], found), ("response", number, status, body))
                self.assertFalse(head.get("more"))
                self.assertTrue(header is None or header in head["headers"], head)
        self.assertEqual(first.get("/sockets")[1], b"")
        self.assertNotIn("close", process.log())
        self.assertNotIn("Traceback", process.log())

    def test_what_is_no_refusal_is_answered_with_500(self):
        process, _, connection = self.begin()
        for number, (path, said) in enumerate((("/success", "a WebSocket is refused with a status of 300 to 599, got 200"),
                           ("/wrong", "a response's body cannot be bool"), ("/endless", "is refused with at most 65536 bytes"),
                           ("/fails", "ValueError: in open"), ("/exits", "SystemExit: 3"))):
            with self.subTest(path):
                connection.open(path, number)
                head, body = connection.receive()
                self.assertEqual((head["type"], head["id"], head["status"], body), ("response", number, 500, b"internal error\n"))
                self.assertIn(f"the open handler failed for the WebSocket at {path}\nTraceback", process.log())
                self.assertIn(said, process.log())

    def test_the_subprotocol(self):
        process, _, connection = self.begin()
        offered = [["sec-websocket-protocol", "chat.v2, chat.v1"]]
        connection.open("/choose", headers=offered)
        self.assertEqual(connection.receive()[0], {"type": "ws_accept", "id": 7, "protocol": "chat.v1"})
        self.assertIn("ValueError: the client offers no subprotocol 'chat.v9', only ['chat.v2', 'chat.v1']\n", process.log())
        connection.accepted("/echo", 8, headers=offered)

    def test_what_the_handler_sends_follows_the_acceptance(self):
        process, first, connection = self.begin()
        connection.open("/greets", headers=[["sec-websocket-protocol", "a, b"]])
        self.assertEqual(connection.receive()[0], {"type": "ws_accept", "id": 7, "protocol": "b"})
        self.assertEqual(connection.messages(2), ["one", b"two"])
        self.assertIn("in sockets: False", process.log())
        self.assertEqual(first.get("/sockets")[1], b"/greets")
        connection.accepted("/greets_and_closes", 8)
        self.assertEqual(connection.messages(1, 8), ["bye"])
        self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": 8, "code": 4000, "reason": "was nice"})
        connection.hang_up(8, code=4000)
        self.until_logged(process, "close /greets_and_closes 4000 '' False")
        self.assertNotIn("Traceback", process.log())

    def test_to_send_more_than_there_is_credit_for_is_to_accept(self):
        process, _, connection = self.begin()
        connection.accepted("/greets_at_length")
        self.assertEqual(connection.messages(2), ["0" * 40_000, "1" * 40_000])
        self.assertTrue(connection.is_silent())
        connection.credit(2 * (40_000 + COST))
        self.assertEqual(connection.messages(2), ["2" * 40_000, "3" * 40_000])
        self.until_logged(process, "RuntimeError: the socket has been accepted: its subprotocol is set before that")
        connection.accepted("/greets_at_length", 8, query="refuse", credit=0)
        connection.credit(base.MIB, 8)
        self.assertEqual(len(connection.messages(4, 8)), 4)
        self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": 8, "code": 1011})

    def test_a_client_that_goes_before_the_answer(self):
        process, first, connection = self.begin()
        connection.open("/slow", 1)
        connection.open("/slow_refusal", 2)
        connection.open("/log", 3)  # both workers are busy: its handler is not called at all
        for number in (1, 2, 3):
            connection.hang_up(number, code=1006)
        connection.open("/echo", 4)
        time.sleep(0.1)
        self.go(process)
        self.assertEqual(connection.receive()[0], {"type": "ws_accept", "id": 4})
        self.until_logged(process, "close /slow 1006 '' False")
        self.assertEqual(first.get("/sockets")[1], b"/echo")
        self.assertNotIn("/log", process.log())
        self.assertNotIn("close /slow_refusal", process.log())

    def test_the_close_of_a_client_and_a_refusal_may_cross(self):
        _, _, connection = self.begin()
        connection.open("/pair")
        self.assertEqual(connection.receive()[0]["status"], 403)
        connection.hang_up(code=1006)
        connection.accepted("/echo", 8)


# ---- Credit ----------------------------------------------------------------------------------------------------------

class CreditTest(TestCase):
    def test_credit_returns_when_the_handler_has(self):
        process, _, connection = self.begin()
        connection.accepted("/gated")
        connection.say("hello")
        connection.say(b"")
        self.until_logged(process, "begun hello")
        self.assertTrue(connection.is_silent())
        self.go(process)
        self.assertEqual(connection.receive()[0], {"type": "ws_credit", "id": 7, "bytes": 5 + COST})
        self.assertEqual(connection.receive()[0], {"type": "ws_credit", "id": 7, "bytes": COST})

    def test_a_handler_that_works_long_holds_up_its_own_socket_alone(self):
        process, _, connection = self.begin()
        connection.accepted("/gated")
        connection.say("hello")
        connection.accepted("/echo", 8)
        connection.say("quick", 8)
        self.assertEqual(connection.messages(1, 8), ["quick"])
        self.assertNotIn("over", process.log())

    def test_a_host_that_sends_without_credit_breaks_the_protocol(self):
        process, _, connection = self.begin()
        connection.accepted("/gated")
        connection.say(b"x" * (CREDIT - COST - 1))
        connection.say(b"x" * base.MIB)  # the last one may take more than there is
        connection.accepted("/echo", 8)
        connection.say(b"")
        self.assertIsNone(connection.receive())
        self.assertIn("ws_message with id 7 came without credit", process.log())

    def test_send_waits_for_credit_and_other_sockets_do_not(self):
        for concurrency in (2, 1):
            process, first, connection = self.begin(concurrency)
            connection.accepted("/twice", credit=0)
            connection.say("hello")
            connection.open("/echo", 8)
            if concurrency > 1:
                self.assertEqual(connection.receive()[0], {"type": "ws_accept", "id": 8})
                connection.say("quick", 8)
                self.assertEqual(connection.messages(1, 8), ["quick"])
                self.assertEqual(connection.receive()[0]["type"], "ws_credit")
            self.assertTrue(connection.is_silent())
            self.assertNotIn("sent twice", process.log())
            connection.credit(0)
            connection.credit(1)  # enough for the first: the last message may take more than there is
            self.assertEqual(connection.receive(), ({"type": "ws_message", "id": 7, "text": True}, b"hello"))
            self.assertTrue(connection.is_silent())
            connection.credit(5 + COST - 1)
            self.assertTrue(connection.is_silent())
            connection.credit(1)
            self.assertEqual(connection.receive()[1], b"hello")
            self.assertEqual(connection.receive()[0], {"type": "ws_credit", "id": 7, "bytes": 5 + COST})
            self.assert_alive(first)

    def test_a_flood_stays_within_its_credit(self):
        _, _, connection = self.begin()
        connection.accepted("/flood")
        connection.say("")
        sent = CREDIT // (1000 + COST) + 1
        self.assertEqual(connection.messages(sent), [b"x" * 1000] * sent)
        self.assertTrue(connection.is_silent())
        connection.credit(sent * (1000 + COST))
        self.assertEqual(len(connection.messages(sent)), sent)
        self.assertTrue(connection.is_silent())

    def test_a_host_that_does_not_read_holds_up_neither_handlers_nor_the_reader(self):
        process, first, connection = self.begin()
        connection.accepted("/blast", credit=2**50)
        connection.accepted("/log", 8)
        connection.say("30")
        connection.say("read", 8)
        self.until_logged(process, "blasted")
        self.until_logged(process, "said read")
        self.assertEqual(first.get("/cast")[1], b"2")
        found = []
        while len(found) < 32:
            head, body = connection.receive()
            if head["type"] == "ws_message":
                found.append(body)
        self.assertEqual([(len(each), each[:1]) for each in found[:30]], [(base.MIB, bytes([number])) for number in range(30)])
        self.assertEqual(found[30:], [b"from http"] * 2)


# ---- Broadcast -------------------------------------------------------------------------------------------------------

class BroadcastTest(TestCase):
    def heads(self, connection, count):
        return sorted(((head["id"], head["type"], head.get("code"), body) for head, body in
                       (connection.receive() for _ in range(count)) if head["type"] != "ws_credit"), key=str)

    def test_to_all_and_to_some(self):
        process, first, connection = self.begin()
        self.assertEqual(first.get("/cast")[1], b"0")
        connection.accepted("/cast", 1)
        connection.accepted("/cast_some", 2, query="a")
        connection.accepted("/log", 3, query="b")
        other = self.sockets(process)
        other.accepted("/log", 1)  # also those of another connection
        connection.say("all", 1)
        self.assertEqual(self.heads(connection, 4), [(1, "ws_message", None, b"all"), (2, "ws_message", None, b"all"),
                                                     (3, "ws_message", None, b"all")])
        self.assertEqual(other.messages(1, 1), ["all"])
        self.until_logged(process, "sent to 4")
        connection.say(b"some", 2)
        self.assertEqual(self.heads(connection, 3), [(2, "ws_message", None, b"some"), (3, "ws_message", None, b"some")])
        self.until_logged(process, "sent to 2")
        self.assertEqual(first.get("/cast")[1], b"4")

    def test_a_socket_without_credit_is_closed_with_1013(self):
        process, first, connection = self.begin()
        connection.accepted("/log", 1, credit=1)
        connection.accepted("/log", 2, credit=0)
        connection.accepted("/log", 3)
        self.assertEqual(first.get("/cast")[1], b"2")
        self.assertEqual(self.heads(connection, 3), [(1, "ws_message", None, b"from http"), (2, "ws_close", 1013, b""),
                                                     (3, "ws_message", None, b"from http")])
        self.assertEqual(first.get("/sockets")[1], b"/log /log")
        self.assertEqual(first.get("/cast")[1], b"1")
        connection.credit(1000, 2)  # it crosses the close, and changes nothing
        connection.hang_up(2, code=1013)
        self.until_logged(process, "close /log 1013 '' False")

    def test_it_wakes_no_waiting_send_but_ends_it(self):
        process, first, connection = self.begin()
        connection.accepted("/flood")
        connection.say("")
        sent = CREDIT // (1000 + COST) + 1
        connection.messages(sent)
        self.assertEqual(first.get("/cast")[1], b"0")
        self.assertEqual(connection.receive()[0]["code"], 1013)
        self.until_logged(process, "flood ended: the WebSocket is closed True False")
        self.assertNotIn("Traceback", process.log())


# ---- The end ---------------------------------------------------------------------------------------------------------

class CloseTest(TestCase):
    def test_the_close_of_a_client(self):
        process, first, connection = self.begin()
        for number, (fields, said) in enumerate((({"code": 1000, "reason": "bye ☕"}, "1000 'bye ☕'"), ({}, "None ''"),
                                                 ({"code": 1006}, "1006 ''"))):
            connection.accepted("/log", number)
            connection.say("last", number)
            connection.hang_up(number, **fields)
            self.until_logged(process, "said last", f"close /log {said} False")
            head = connection.receive()[0] if not connection.is_silent() else None
            self.assertIn(head, (None, {"type": "ws_credit", "id": number, "bytes": 4 + COST}))
        self.assertEqual(first.get("/sockets")[1], b"")

    def test_the_close_of_the_plugin(self):
        process, _, connection = self.begin()
        connection.accepted("/closing")
        for message in ("one", "two", "three"):
            connection.say(message)
        self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": 7, "code": 4001, "reason": "enough"})
        connection.say("after the close")
        self.until_logged(process, "False False None SocketClosed: the WebSocket is closed")
        self.assertTrue(connection.is_silent(), "it sends nothing more for it")
        self.assertNotIn("close /closing", process.log())
        connection.hang_up(code=4001, reason="enough")
        self.until_logged(process, "close /closing 4001 'enough' False")
        self.assertEqual(process.log().count("SocketClosed"), 1, "no message reached the handler after the close")
        connection.accepted("/echo", 8)

    def test_both_close_at_once(self):
        process, first, connection = self.begin()
        connection.accepted("/gated")
        connection.say("hello")
        self.until_logged(process, "begun hello")
        connection.hang_up(code=1001)
        self.go(process)
        self.until_logged(process, "over hello", "close /gated 1001 '' False")
        connection.accepted("/closing", 8)
        connection.write(base.frame({"type": "ws_message", "id": 8}, b"x") + base.frame({"type": "ws_close", "id": 8, "code": 1000}))
        self.until_logged(process, "close /closing 1000 '' False")
        self.assertEqual(process.log().count("close /closing"), 1)
        connection.accepted("/echo", 9)
        self.assertEqual(first.get("/sockets")[1], b"/echo")
        self.assertNotIn("Traceback", process.log())

    def test_codes_and_reasons_are_checked(self):
        process, _, connection = self.begin()
        connection.accepted("/codes")
        connection.say("")
        self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": 7, "code": 3000, "reason": "é" * 61})
        lines = process.log().splitlines()[1:]
        self.assertEqual(len(lines), 10)
        for line in lines[:9]:
            self.assertIn("ValueError: a WebSocket is closed with a code of 1000-1003, 1007-1014 or 3000-4999", line)
        self.assertEqual(lines[9], "ValueError: a reason of 124 bytes; a close frame holds 123")

    def test_an_exception_closes_the_socket_with_1011(self):
        process, first, connection = self.begin()
        connection.accepted("/echo", 1)
        for number, (path, said) in enumerate((("/raises", "ValueError: in message x"), ("/ends", "SystemExit: 3")), 2):
            connection.accepted(path, number)
            connection.say("x", number)
            self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": number, "code": 1011})
            self.assertIn(f"the message handler failed for the WebSocket at {path}\nTraceback", process.log())
            self.assertIn(said, process.log())
            connection.hang_up(number, code=1011)
            self.until_logged(process, f"close {path} 1011 '' False")
        connection.accepted("/close_fails", 8)
        connection.hang_up(8)
        self.eventually(lambda: "ValueError: in close" in process.log())
        connection.say("fine", 1)
        self.assertEqual(connection.messages(1, 1), ["fine"])
        self.assert_alive(first)

    def test_the_end_of_another_socket_is_an_exception_like_any(self):
        process, _, connection = self.begin()
        connection.accepted("/log", 1)
        connection.accepted("/other", 2)
        connection.say("x", 2)
        self.assertEqual([connection.receive()[0] for _ in range(2)], [{"type": "ws_close", "id": 1, "code": 1000},
                                                                       {"type": "ws_close", "id": 2, "code": 1011}])
        self.assertIn("SocketClosed: the WebSocket is closed", process.log())

    def test_a_send_that_waits_ends_with_the_socket(self):
        process, first, connection = self.begin()
        connection.accepted("/flood")
        connection.say("")
        connection.messages(CREDIT // (1000 + COST) + 1)
        connection.hang_up(code=1001)
        self.until_logged(process, "flood ended: the WebSocket is closed True False", "close /flood 1001 '' False")
        self.assertNotIn("Traceback", process.log())
        self.assert_alive(first)

    def test_the_end_of_the_connection_is_the_end_of_its_sockets(self):
        process, first, connection = self.begin(3)
        connection.accepted("/log", 1)
        connection.accepted("/gated", 2)
        connection.accepted("/flood", 3)
        connection.say("one", 2)
        connection.say("two", 2)
        connection.say("", 3)
        self.until_logged(process, "begun one")
        connection.close()
        self.until_logged(process, "close /log 1006 '' False")
        self.eventually(lambda: "flood ended" in process.log())
        self.assertEqual(first.get("/sockets")[1], b"")
        connection = self.sockets(process)  # as the host does that has lost it
        connection.accepted("/echo", 1)
        connection.say("again", 1)
        self.assertEqual(connection.messages(1, 1), ["again"])
        self.go(process)
        self.until_logged(process, "over one", "begun two", "over two", "close /gated 1006 '' False")
        self.assertNotIn("Traceback", process.log())

    def test_two_connections_may_use_the_same_ids(self):
        process, _, connection = self.begin()
        other = self.sockets(process)
        connection.accepted("/echo")
        other.accepted("/echo")
        other.say("other")
        connection.say("one")
        self.assertEqual((connection.messages(1), other.messages(1)), (["one"], ["other"]))
        other.close()
        connection.say("two")
        self.assertEqual(connection.messages(1), ["two"])


class ShutdownTest(TestCase):
    def stop(self, process, *connections):
        for connection in connections:
            connection.send({"type": "shutdown", "id": 99})
        for connection in connections:
            while connection.receive():
                pass
        self.assertEqual(process.wait(), 0)

    def test_after_the_close_of_each_socket(self):
        process, first, connection = self.begin()
        connection.accepted("/log")
        connection.say("last")
        connection.hang_up(code=1012)
        connection.shutdown()
        while connection.receive():
            pass
        self.assert_alive(first)  # the plugin goes on while a connection is left
        self.stop(process, first)
        self.assertIn("said last\nclose /log 1012 '' False\n", process.log())

    def test_handlers_under_way_are_waited_for(self):
        process, first, connection = self.begin()
        connection.accepted("/gated")
        connection.say("hello")
        self.until_logged(process, "begun hello")
        connection.hang_up(code=1012)
        connection.shutdown()
        first.send({"type": "shutdown", "id": 99})
        self.assertIsNone(first.receive())
        self.assertTrue(connection.is_silent())
        self.go(process)
        self.assertIsNone(connection.receive())
        self.assertEqual(process.wait(), 0)
        self.assertIn("over hello\nclose /gated 1012 '' False\n", process.log())

    def test_while_a_send_waits(self):
        for concurrency in (1, 2):
            process, first, connection = self.begin(concurrency)
            connection.accepted("/flood")
            connection.say("")
            connection.messages(CREDIT // (1000 + COST) + 1)
            self.stop(process, connection, first)
            self.assertRegex(process.log(), "flood ended: the WebSocket is closed True (True|False)\nclose /flood 1006 '' False\n")
            self.assertNotIn("Traceback", process.log())

    def test_a_send_that_waits_ends_when_the_plugin_stops_whichever_connection_says_so(self):
        process, first, connection = self.begin()
        connection.accepted("/flood")
        connection.say("")
        connection.messages(CREDIT // (1000 + COST) + 1)
        first.send({"type": "shutdown", "id": 99})
        self.assertIsNone(first.receive())
        self.until_logged(process, "flood ended: the WebSocket is closed True True")
        connection.hang_up(code=1012)
        self.stop(process, connection)


# ---- One at a time ---------------------------------------------------------------------------------------------------

class ConcurrencyTest(TestCase):
    def overlap(self, concurrency):
        process, first, connection = self.begin(concurrency)
        for number in range(4):
            connection.open("/alone", number)
        first.http("/alone")
        for _ in range(4):
            self.assertEqual(connection.receive()[0]["type"], "ws_accept")
        self.assertEqual(first.response()[1], b"hello")
        for _ in range(5):
            for number in range(4):
                connection.say("", number)
            self.assertEqual(first.get("/alone")[1], b"hello")
        for _ in range(20):
            self.assertEqual(connection.receive()[0]["type"], "ws_credit")
        return "side by side" in process.log()

    def test_with_1_no_two_handlers_run_at_the_same_time(self):
        self.assertFalse(self.overlap(1))

    def test_with_more_those_of_several_sockets_do(self):
        self.assertTrue(self.overlap(4))

    def test_with_1_a_flood_of_messages_does_not_keep_requests_waiting(self):
        _, first, connection = self.begin(1)
        connection.accepted("/echo", credit=2**53 - 1)
        stop = threading.Event()

        def flood():
            waiting = 0
            while not stop.is_set():
                while waiting < 200:
                    connection.say("x")
                    waiting += 1
                if connection.receive()[0]["type"] == "ws_credit":
                    waiting -= 1
        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for _ in range(50):
                self.assertEqual(first.get("/hello")[1], b"hello")
        finally:
            stop.set()
            thread.join()

    def test_turns_are_taken_in_order(self):
        turns, order = plugrack._Turns(), []
        threads = []

        def take(number):
            with turns:
                order.append(number)
        with turns:
            for number in range(5):
                threads.append(threading.Thread(target=take, args=(number,)))
                threads[-1].start()
                self.eventually(lambda: len(turns._waiting) == number + 1)
        for thread in threads:
            thread.join()
        self.assertEqual(order, [0, 1, 2, 3, 4])


class RandomTest(TestCase):
    def converse(self, connection, choose):
        """Open, use and close sockets at random, within the credit of each; returns the paths of those that were accepted."""
        lock, ended = threading.Lock(), threading.Event()
        known, accepted = {}, set()

        def read():
            for head, body in iter(connection.receive, None):
                with lock:
                    kind, number, each = head["type"], head["id"], known.get(head["id"])
                    if kind == "ws_accept":
                        accepted.add(f"/{number}")
                    elif kind == "response":
                        known.pop(number, None)
                    elif each and kind == "ws_credit":
                        each["credit"] += head["bytes"]
                    elif each and kind == "ws_message":
                        each["owed"] += len(body) + COST
            ended.set()
        reader = threading.Thread(target=read)
        reader.start()
        opened = 0
        for _ in range(5000):
            with lock:
                step, number = choose.random(), choose.choice(list(known) or [0])
                if step < 0.05 or not known:
                    opened += 1
                    known[opened] = {"credit": CREDIT, "owed": 0, "said": 0}
                    connection.open(f"/{opened}", opened, query=choose.choice(["", "", "", "refuse", "fail", "greet"]),
                                    credit=choose.choice([0, 1, CREDIT, 2**40]))
                    continue
                each = known[number]
                if step < 0.08:
                    del known[number]
                    connection.hang_up(number, code=1000)
                elif f"/{number}" in accepted and step < 0.6 and each["credit"] > 0:
                    message = str(each["said"])
                    each["said"] += 1
                    each["credit"] -= len(message) + COST
                    connection.say(message, number)
                elif f"/{number}" in accepted:
                    connection.credit(each["owed"] + choose.choice([0, COST, 1000]), number)
                    each["owed"] = 0
        with lock:
            for number in known:
                connection.hang_up(number, code=1001)
        connection.shutdown()
        self.assertTrue(ended.wait(base.PATIENCE))
        reader.join()
        return accepted

    def test_each_socket_has_its_messages_in_order_and_one_end(self):
        for seed, concurrency in enumerate((1, 3, 16)):
            process, first, connection = self.begin(concurrency, RANDOM)
            accepted = self.converse(connection, random.Random(seed))
            first.send({"type": "shutdown", "id": 99})
            self.assertEqual(process.wait(), 0)
            lines = process.log().splitlines()
            ends = [line.split()[1] for line in lines if line.startswith("closed ")]
            self.assertEqual(len(ends), len(set(ends)), "each has one end")
            self.assertLessEqual(accepted, set(ends))
            self.assertTrue(ends)
            self.assertLessEqual({line for line in lines if line.split(":")[0].endswith("Error")}, {"ValueError: on purpose"})
            self.assertNotIn("broke the protocol", process.log())


# ---- The example -----------------------------------------------------------------------------------------------------

class ChatTest(TestCase):
    def enter(self, store):
        process, first = self.start(base.EXAMPLES / "chat" / "plugin", store)
        return process, first, self.sockets(process)

    def join(self, connection, number, name):
        connection.accepted("/socket", number, query=urlencode({"name": name}))
        (history,) = connection.messages(1, number)
        return json.loads(history)["history"]

    def told(self, connection, count):
        """So many messages, whichever socket they are for: who is told what whom said."""
        found = []
        while len(found) < count:
            head, body = connection.receive()
            if head["type"] == "ws_message":
                message = json.loads(body)["message"]
                found.append((head["id"], message["name"], message["text"]))
        return sorted(found)

    def test_the_page(self):
        _, first, _ = self.enter(self.store())
        head, body = first.get("/")
        self.assertEqual((head["status"], dict(head["headers"])["content-type"]), (200, "text/html; charset=utf-8"))
        self.assertIn(b'<label for="name">', body)
        self.assertNotIn(b"<script", body)
        head, body = first.get("/", query=urlencode({"name": "<Ada>"}))
        self.assertIn("&lt;Ada&gt;:</label>".encode(), body)
        script = body.decode().split('<script type="module">')[1].split("</script>")[0]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        self.assertIn(f"script-src 'sha256-{digest}'", dict(head["headers"])["content-security-policy"])
        self.assertEqual([first.get(path)[0]["status"] for path in ("/socket", "/x")], [404, 404])
        self.assertEqual(first.get("/", method="POST")[0]["status"], 405)

    def test_what_one_says_all_are_told(self):
        process, _, connection = self.enter(self.store())
        self.assertEqual(self.join(connection, 1, " Ada "), [])
        connection.say("  grüß dich\n ", 1)
        self.assertEqual(self.told(connection, 1), [(1, "Ada", "grüß dich")])
        self.assertEqual([(each["name"], each["text"]) for each in self.join(connection, 2, "Bob")], [("Ada", "grüß dich")])
        connection.say(" ", 1)
        connection.say("<b>", 2)
        self.assertEqual(self.told(connection, 2), [(1, "Bob", "<b>"), (2, "Bob", "<b>")])
        connection.say(b"\0", 2)
        connection.say("x" * 1001, 1)
        closed = {}
        while len(closed) < 2:
            head = connection.receive()[0]
            if head["type"] == "ws_close":
                closed[head["id"]] = head["code"]
        self.assertEqual(closed, {1: 1009, 2: 1003})
        for number, query in ((3, ""), (4, "name=+"), (5, "name=" + "x" * 31)):
            connection.open("/socket", number, query=query)
            self.assertEqual(connection.receive()[0]["status"], 400)
        connection.open("/elsewhere", 6, query="name=x")
        self.assertEqual(connection.receive()[0]["status"], 404)
        self.assertNotIn("Traceback", process.log())

    def test_the_last_messages_are_kept(self):
        store = self.store()
        store.values["message/zzz"] = (b"the operator's", 1, None)
        process, _, connection = self.enter(store)
        self.join(connection, 1, "Ada")
        for number in range(60):
            connection.say(str(number), 1)
            self.assertEqual(self.told(connection, 1), [(1, "Ada", str(number))])
        self.assertEqual(len(store.values), 51)
        process.kill()
        process, _, connection = self.enter(store)
        self.assertIn("message/zzz is no message", process.log())
        self.assertEqual([each["text"] for each in self.join(connection, 1, "Bob")], [str(number) for number in range(10, 60)])

    def test_the_conversation_goes_on_while_the_store_is_full(self):
        store = self.store()
        process, _, connection = self.enter(store)
        self.join(connection, 1, "Ada")
        store.perform = lambda head, body: ({"type": "error", "code": "no_space", "message": "the disk is full"}, b"")
        connection.say("hello", 1)
        self.assertEqual(self.told(connection, 1), [(1, "Ada", "hello")])
        self.assertIn("a message is not kept: no_space: the disk is full", process.log())


if __name__ == "__main__":
    unittest.main()
