"""WebSockets of ASGI applications as plugins: one that checks what it gets against the specification, and others of Starlette and FastAPI."""

import json
import unittest

import test_plugrack as base
from test_websocket import COST, CREDIT, TestCase
from test_wsgi import PACKAGES

APP = r'''
import asyncio, os
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=CONCURRENCY)
meeting = None

async def until(name):
    while not os.path.exists(name):
        await asyncio.sleep(0.005)

async def accept(receive, send, **fields):
    assert await receive() == {"type": "websocket.connect"}
    await send({"type": "websocket.accept", **fields})

async def text(send, text):
    await send({"type": "websocket.send", "text": text})

async def scope(scope, receive, send):
    await accept(receive, send)
    await text(send, ascii(scope))
    await text(send, ascii(await receive()))
    await text(send, ascii(await receive()))
    print([await receive() for _ in range(2)])

async def echo(scope, receive, send):
    await accept(receive, send)
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            print("gone", message["code"], message["reason"])
            return
        del message["type"]
        await send({"type": "websocket.send", **message})

async def chooses(scope, receive, send):
    await accept(receive, send, subprotocol=scope["subprotocols"][-1], headers=[(b"set-cookie", b"a=b"), (b"X-Latin", b"\xe9")])

async def invents(scope, receive, send):
    await accept(receive, send, subprotocol="chat.v9")

async def forbids(scope, receive, send):
    await receive()
    await send({"type": "websocket.close", "code": 4000})
    print(await receive())

async def denies(scope, receive, send):
    await receive()
    await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"www-authenticate", b"Basic")]})
    await send({"type": "websocket.http.response.body", "body": b"who ", "more_body": True})
    await send({"type": "websocket.http.response.body", "body": b"are you?"})
    print(await receive())

async def closes(scope, receive, send):
    await accept(receive, send)
    await text(send, "bye")
    await send({"type": "websocket.close", "code": 4001, "reason": "enough"})
    print(await receive())
    await text(send, "late")

async def closes_plainly(scope, receive, send):
    await accept(receive, send)
    await send({"type": "websocket.close"})

async def returns(scope, receive, send):
    await accept(receive, send)

async def slow_reader(scope, receive, send):
    await accept(receive, send)
    await until("go")
    while True:
        await receive()

async def timed_receive(scope, receive, send):
    await accept(receive, send)
    for _ in range(3):
        try:
            await asyncio.wait_for(receive(), 0.02)
        except asyncio.TimeoutError:
            print("timed out")
    await text(send, (await receive())["text"])

async def flood(scope, receive, send):
    await accept(receive, send)
    try:
        while True:
            await send({"type": "websocket.send", "bytes": b"x" * 1000})
    except OSError as error:
        print("flood ended:", type(error).__name__, (await receive())["code"])
        raise

async def large(scope, receive, send):
    await accept(receive, send)
    await text(send, "x" * 1_048_577)

async def lingers(scope, receive, send):
    await accept(receive, send)
    await receive()
    await until("go")
    print("lingered")

async def meet(scope, receive, send):
    global meeting
    await accept(receive, send)
    if meeting is None:
        meeting = asyncio.Event()
        await meeting.wait()
    meeting.set()
    await text(send, "met")
    await receive()

async def fails(scope, receive, send):
    raise ValueError("before the answer")

async def silent(scope, receive, send):
    await receive()

async def half_denies(scope, receive, send):
    await send({"type": "websocket.http.response.start", "status": 404, "headers": []})

async def fails_later(scope, receive, send):
    await accept(receive, send)
    raise ValueError("after the acceptance")

async def exits(scope, receive, send):
    await accept(receive, send)
    raise SystemExit(3)

async def twice(scope, receive, send):
    await accept(receive, send)
    await send({"type": "websocket.accept"})

async def unaccepted(scope, receive, send):
    await text(send, "too early")

async def bodiless(scope, receive, send):
    await send({"type": "websocket.http.response.body", "body": b""})

async def unknown(scope, receive, send):
    await send({"type": "websocket.other"})

async def success(scope, receive, send):
    await send({"type": "websocket.http.response.start", "status": 200, "headers": []})
    await send({"type": "websocket.http.response.body", "body": b""})

SOCKETS = {f.__name__: f for f in (
    scope, echo, chooses, invents, forbids, denies, closes, closes_plainly, returns, slow_reader, timed_receive, flood, large, lingers, meet,
    fails, silent, half_denies, fails_later, exits, twice, unaccepted, bodiless, unknown, success)}

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["started"] = "yes"
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("shutdown")
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(plugin.broadcast("from http")).encode()})
    else:
        await SOCKETS[scope["path"].split("/")[2]](scope, receive, send)

site = plugrack.asgi(app)
plugin.http(site)
plugin.websocket(site)
plugin.run()
'''


class ASGITest(TestCase):
    def begin(self, concurrency=2):
        return super().begin(concurrency, APP)

    def test_scope_and_messages(self):
        process, _, connection = self.begin()
        headers = [["host", "example.org"], ["x-forwarded-proto", "https"], ["sec-websocket-protocol", "chat.v2, chat.v1"],
                   ["x-latin", "\u00e9"]]
        connection.accepted("/scope/caf%C3%A9/a%2Fb", headers=headers, query="a=%20b", remote="203.0.113.9")
        connection.say("grüß")
        connection.say(b"\xff")
        scope, text, data = (eval(each, {}) for each in connection.messages(3))  # as ascii() writes them
        connection.hang_up()
        self.assertEqual(scope, {
            "type": "websocket", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "scheme": "wss",
            "path": "/bench/scope/caf\u00e9/a/b", "raw_path": b"/bench/scope/caf%C3%A9/a%2Fb", "query_string": b"a=%20b",
            "root_path": "/bench", "client": ("203.0.113.9", 0), "server": ("example.org", 443), "state": {"started": "yes"},
            "subprotocols": ["chat.v2", "chat.v1"], "extensions": {"websocket.http.response": {}},
            "headers": [(b"host", b"example.org"), (b"x-forwarded-proto", b"https"), (b"sec-websocket-protocol", b"chat.v2, chat.v1"),
                        (b"x-latin", b"\xe9")]})
        self.assertEqual(text, {"type": "websocket.receive", "text": "grüß", "bytes": None})
        self.assertEqual(data, {"type": "websocket.receive", "text": None, "bytes": b"\xff"})
        self.until_logged(process, "[{}, {}]".format(*2 * ["{'type': 'websocket.disconnect', 'code': 1005, 'reason': ''}"]))

    def test_messages_both_ways(self):
        process, first, connection = self.begin()
        connection.accepted("/echo")
        for message in ("", b"", "grüß ☕", bytes(range(256)), "x" * base.MIB):
            connection.say(message)
            self.assertEqual(connection.receive()[0], {"type": "ws_credit", "id": 7, "bytes": len(message.encode() if isinstance(message, str) else message) + COST})
            connection.credit(base.MIB + COST)
            self.assertEqual(connection.messages(1), [message])
        self.assertEqual(first.get("/x")[1], b"1", "also what the plugin sends")
        self.assertEqual(connection.messages(1), ["from http"])
        connection.hang_up(code=1000, reason="bye")
        self.until_logged(process, "gone 1000 bye")

    def test_the_answer(self):
        process, _, connection = self.begin()
        offered = [["sec-websocket-protocol", "chat.v2, chat.v1"]]
        connection.open("/chooses", 1, headers=offered)
        self.assertEqual(connection.receive()[0], {"type": "ws_accept", "id": 1, "protocol": "chat.v1",
                                                   "headers": [["set-cookie", "a=b"], ["X-Latin", "\u00e9"]]})
        self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": 1, "code": 1000})
        connection.open("/invents", 2, headers=offered)
        self.assertEqual(connection.receive()[0]["status"], 500)
        connection.open("/forbids", 3)
        head, body = connection.receive()
        self.assertEqual((head["type"], head["id"], head["status"], body), ("response", 3, 403, b"forbidden\n"))
        connection.open("/denies", 4)
        head, body = connection.receive()
        self.assertEqual((head["id"], head["status"], head["headers"], body), (4, 401, [["www-authenticate", "Basic"]], b"who are you?"))
        self.eventually(lambda: process.log().count("{'type': 'websocket.disconnect', 'code': 1006, 'reason': ''}") == 2)

    def test_the_end(self):
        process, first, connection = self.begin()
        connection.accepted("/closes", 1)
        self.assertEqual(connection.messages(1, 1), ["bye"])
        self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": 1, "code": 4001, "reason": "enough"})
        connection.hang_up(1, code=4001, reason="enough")
        self.until_logged(process, "{'type': 'websocket.disconnect', 'code': 4001, 'reason': 'enough'}")
        for number, path in ((2, "/returns"), (3, "/closes_plainly")):
            connection.accepted(path, number)
            self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": number, "code": 1000})
        connection.accepted("/echo", 4)
        connection.close()
        self.until_logged(process, "gone 1006 ")
        self.assertNotIn("Traceback", process.log())
        self.assertEqual(first.get("/x")[1], b"0")

    def test_failures(self):
        process, _, connection = self.begin()
        for number, (path, said) in enumerate((
                ("/fails", "ValueError: before the answer"), ("/silent", "returned before it accepted or closed the socket"),
                ("/half_denies", "returned before it accepted or closed the socket"), ("/unaccepted", "sent before websocket.accept"),
                ("/bodiless", "sent before websocket.http.response.start"), ("/unknown", "no message 'websocket.other'"),
                ("/success", "refused with a status of 300 to 599, got 200"), ("/missing", "KeyError"))):
            with self.subTest(path):
                connection.open(path, number)
                if path == "/silent":
                    self.eventually(lambda: said in process.log())
                head, body = connection.receive()
                self.assertEqual((head["type"], head["id"], head["status"], body), ("response", number, 500, b"internal error\n"))
                self.assertIn(said, process.log())
        for number, (path, said) in enumerate((
                ("/fails_later", "ValueError: after the acceptance"), ("/exits", "SystemExit: 3"), ("/twice", "sent after the answer"),
                ("/large", "a message of 1048577 bytes; a WebSocket takes at most 1048576")), 10):
            with self.subTest(path):
                connection.accepted(path, number)
                self.assertEqual(connection.receive()[0], {"type": "ws_close", "id": number, "code": 1011})
                self.assertIn(said, process.log())
        connection.accepted("/echo", 20)

    def test_credit_returns_when_the_application_has_received_the_message(self):
        process, _, connection = self.begin()
        connection.accepted("/slow_reader")
        connection.say(b"x" * (CREDIT - COST - 1))
        connection.say(b"x" * base.MIB)
        self.assertTrue(connection.is_silent())
        self.go(process)
        self.assertEqual([connection.receive()[0]["bytes"] for _ in range(2)], [CREDIT - 1, base.MIB + COST])

    def test_a_host_that_sends_without_credit_breaks_the_protocol(self):
        process, first, connection = self.begin()
        connection.accepted("/slow_reader")
        connection.say(b"x" * base.MIB)
        connection.say(b"")
        self.assertIsNone(connection.receive())
        self.assertIn("came without credit", process.log())
        self.assert_alive(first)

    def test_send_waits_for_credit_and_the_loop_does_not(self):
        process, first, connection = self.begin(1)
        connection.accepted("/flood")
        sent = CREDIT // (1000 + COST) + 1
        self.assertEqual(connection.messages(sent), [b"x" * 1000] * sent)
        self.assertTrue(connection.is_silent())
        connection.accepted("/echo", 8)
        connection.say("quick", 8)
        self.assertEqual(connection.messages(1, 8), ["quick"])
        connection.credit(1)
        self.assertTrue(connection.is_silent(), "the last message took more than there was")
        connection.credit(sent * (1000 + COST))
        self.assertEqual(len(connection.messages(sent)), sent)
        connection.hang_up(code=1001)
        self.until_logged(process, "flood ended: SocketClosed 1001")
        self.assertNotIn("Traceback", process.log())
        self.assert_alive(first)

    def test_a_broadcast_ends_a_send_that_waits(self):
        process, first, connection = self.begin()
        connection.accepted("/flood")
        connection.messages(CREDIT // (1000 + COST) + 1)
        self.assertEqual(first.get("/x")[1], b"0")
        self.assertEqual(connection.receive()[0]["code"], 1013)
        connection.hang_up(code=1013)
        self.until_logged(process, "flood ended: SocketClosed 1013")

    def test_a_receive_that_is_given_up_loses_nothing(self):
        process, _, connection = self.begin()
        connection.accepted("/timed_receive")
        self.eventually(lambda: process.log().count("timed out") == 3)
        connection.say("two")
        self.assertEqual(connection.messages(1), ["two"])

    def test_sockets_share_the_loop_whatever_the_concurrency_is(self):
        _, first, connection = self.begin(1)
        connection.accepted("/meet", 1)
        self.assertEqual(first.get("/x")[1], b"1")
        self.assertEqual(connection.messages(1, 1), ["from http"])
        connection.accepted("/meet", 2)
        self.assertEqual(sorted(connection.receive()[0]["id"] for _ in range(2)), [1, 2])

    def test_a_client_that_goes_before_the_answer(self):
        _, first, connection = self.begin()
        for number in range(20):
            connection.open("/echo", number)
            connection.hang_up(number, code=1006)
        connection.open("/echo", 50)
        while connection.receive()[0]["id"] != 50:
            pass
        self.assertEqual(first.get("/x")[1], b"1")

    def test_what_goes_on_after_the_end_is_bounded(self):
        process, first, connection = self.begin()
        for number in range(1001):
            connection.accepted("/lingers", number)  # sockets that are open do not count
        for number in range(1000):
            connection.hang_up(number)
        self.eventually(lambda: first.get("/x")[0]["status"] == 503)
        connection.open("/echo", 2000)
        while True:
            head = connection.receive()[0]
            if head["id"] == 2000:
                break
        self.assertEqual((head["type"], head["status"]), ("response", 503))
        self.go(process)
        self.eventually(lambda: process.log().count("lingered") == 1000)
        self.eventually(lambda: first.get("/x")[0]["status"] == 200)

    def test_the_shutdown(self):
        process, first, connection = self.begin()
        connection.accepted("/flood", 1)
        connection.messages(CREDIT // (1000 + COST) + 1, 1)
        connection.accepted("/echo", 2)
        connection.hang_up(2, code=1012)
        connection.shutdown()
        self.assertIsNone(connection.receive())
        first.send({"type": "shutdown", "id": 99})
        self.assertEqual(process.wait(), 0)
        self.assertIn("gone 1012 \n", process.log())
        self.assertIn("flood ended: SocketClosed 1006\n", process.log())
        self.assertIn("shutdown\n", process.log())
        self.assertNotIn("Traceback", process.log())


CONFORMING = r'''
from asgiref.typing import (WebSocketScope, WebSocketConnectEvent, WebSocketReceiveEvent, WebSocketDisconnectEvent)
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench")

def check(value, form):
    """Whether a message has the fields of the specification, and no others."""
    assert set(value) == set(form.__annotations__), (value, form.__annotations__)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise ValueError("no lifespan here")
    check(scope, WebSocketScope)
    assert all(type(each) is bytes for pair in scope["headers"] for each in pair)
    await send({"type": "websocket.accept", "subprotocol": None, "headers": []})
    while True:
        message = await receive()
        check(message, {"websocket.connect": WebSocketConnectEvent, "websocket.receive": WebSocketReceiveEvent,
                        "websocket.disconnect": WebSocketDisconnectEvent}[message["type"]])
        if message["type"] == "websocket.disconnect":
            print("conforms")
            return
        if message["type"] == "websocket.receive":
            await send({"type": "websocket.send", "bytes": message["bytes"], "text": message["text"]})

plugin.websocket(plugrack.asgi(app))
plugin.run()
'''

STARLETTE = r'''
import contextlib
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=2)

@contextlib.asynccontextmanager
async def lifespan(app):
    yield {"visits": [0]}
    print("shutdown")

async def echo(socket):
    await socket.accept(subprotocol=(socket.scope["subprotocols"] or [None])[0])
    socket.state.visits[0] += 1
    await socket.send_json({"url": str(socket.url_for("item", number=3)), "client": socket.client.host, "visits": socket.state.visits[0],
                            "query": dict(socket.query_params)})
    async for text in socket.iter_text():
        await socket.send_text(text.upper())
    print("echo left")

async def denies(socket):
    await socket.send_denial_response(PlainTextResponse("members only", status_code=402))

class Item(WebSocketEndpoint):
    encoding = "bytes"
    async def on_receive(self, socket, data):
        await socket.send_bytes(data * socket.path_params["number"])
    async def on_disconnect(self, socket, close_code):
        print("item left", close_code)

async def flood(socket):
    await socket.accept()
    try:
        while True:
            await socket.send_bytes(b"x" * 1000)
    except WebSocketDisconnect as error:
        print("flood left", error.code)

api = FastAPI()

def token(socket: WebSocket, token: str = ""):
    if not token:
        raise WebSocketException(code=1008, reason="no token")
    return token

@api.websocket("/rooms/{room}")
async def room(socket: WebSocket, room: int, token: str = Depends(token)):
    await socket.accept()
    try:
        while True:
            await socket.send_json({"room": room, "token": token, "said": await socket.receive_json()})
    except WebSocketDisconnect as error:
        print("room left", error.code)

async def index(request):
    return PlainTextResponse("page")

app = Starlette(lifespan=lifespan, routes=[
    Route("/", index), WebSocketRoute("/", echo), WebSocketRoute("/items/{number:int}", Item, name="item"), WebSocketRoute("/denies", denies),
    WebSocketRoute("/flood", flood), Mount("/api", api)])
site = plugrack.asgi(app)
plugin.http(site)
plugin.websocket(site)
plugin.run()
'''


class RealApplicationTest(TestCase):
    python = PACKAGES / "python" / "bin" / "python"

    def test_conformance(self):
        process, _, connection = self.begin(plugin=CONFORMING)
        connection.accepted("/a%20b", remote="203.0.113.9")
        connection.say("text")
        connection.say(b"bytes")
        self.assertEqual(connection.messages(2), ["text", b"bytes"])
        connection.hang_up(code=1000)
        self.until_logged(process, "conforms")
        self.assertNotIn("Traceback", process.log())

    def test_an_application_of_starlette_and_fastapi(self):
        process, first, connection = self.begin(plugin=STARLETTE)
        self.assertEqual(first.get("/")[1], b"page")
        connection.open("/", 1, query="a=b", remote="203.0.113.9", headers=[["host", "example.org"], ["sec-websocket-protocol", "x, y"]])
        self.assertEqual(connection.receive()[0]["protocol"], "x")
        connection.say("hello", 1)
        told, said = connection.messages(2, 1)
        self.assertEqual(json.loads(told), {"url": "ws://example.org/bench/items/3", "client": "203.0.113.9", "visits": 1, "query": {"a": "b"}})
        self.assertEqual(said, "HELLO")
        connection.hang_up(1, code=1000)
        self.until_logged(process, "echo left")
        connection.accepted("/items/3", 2)
        connection.say(b"ab", 2)
        self.assertEqual(connection.messages(1, 2), [b"ababab"])
        connection.hang_up(2, code=4000)
        self.until_logged(process, "item left 4000")
        for number, (path, status) in enumerate((("/denies", 402), ("/nowhere", 403), ("/api/rooms/5", 403), ("/api/rooms/x", 403)), 3):
            connection.open(path, number)
            self.assertEqual((connection.receive()[0]["status"], path), (status, path))
        connection.accepted("/api/rooms/5", 10, query="token=t")
        connection.say('{"a": 1}', 10)
        self.assertEqual(json.loads(connection.messages(1, 10)[0]), {"room": 5, "token": "t", "said": {"a": 1}})
        connection.hang_up(10)
        self.until_logged(process, "room left 1005")
        connection.accepted("/flood", 11)
        connection.messages(CREDIT // (1000 + COST) + 1, 11)
        connection.hang_up(11, code=1001)
        self.until_logged(process, "flood left 1006")
        self.assertNotIn("Traceback", process.log())
        connection.shutdown()
        first.send({"type": "shutdown", "id": 99})
        self.assertEqual(process.wait(), 0)
        self.assertIn("shutdown", process.log())


if __name__ == "__main__":
    unittest.main()
