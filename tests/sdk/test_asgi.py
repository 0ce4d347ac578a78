"""ASGI applications as plugins: one that checks what it gets against the specification, and others of Starlette and FastAPI."""

import json
import unittest

import test_plugrack as base
from test_wsgi import PACKAGES

APP = r'''
import asyncio, os
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=CONCURRENCY)
meeting = None
sent = 0

async def until(name):
    while not os.path.exists(name):
        await asyncio.sleep(0.005)

async def lifespan(scope, receive, send):
    global meeting
    mode = plugin.context.config.get("lifespan")
    if mode == "none":
        raise ValueError("only http here")
    assert await receive() == {"type": "lifespan.startup"}
    if mode == "fails":
        await send({"type": "lifespan.startup.failed", "message": "no database"})
        return
    if mode == "raises":
        await send({"type": "lifespan.startup.failed", "message": "Traceback and so on"})
        raise OSError("no disk")
    if mode == "refuses":
        raise plugrack.Refuse("set the key: plugrack config bench set key VALUE")
    scope["state"]["started"] = "yes"
    print("startup")
    await send({"type": "lifespan.startup.complete"})
    assert await receive() == {"type": "lifespan.shutdown"}
    print("shutdown")
    if mode == "hangs":
        await asyncio.sleep(60)
    await send({"type": "lifespan.shutdown.complete"})

async def start(send, status=200, headers=()):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain"), *headers]})

async def body(send, piece=b"", more=False):
    await send({"type": "http.response.body", "body": piece, "more_body": more})

async def scope(scope, receive, send):
    await start(send)
    await body(send, ascii(scope).encode())

async def echo(scope, receive, send):
    pieces = []
    while True:
        message = await receive()
        assert set(message) == {"type", "body", "more_body"} and message["type"] == "http.request", message
        pieces.append(message["body"])
        if not message["more_body"]:
            break
    await start(send)
    await body(send, b"|".join(pieces))

async def slow_reader(scope, receive, send):
    size = len((await receive())["body"])
    await until("go")
    while True:
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    await start(send)
    await body(send, b"%d" % size)

async def pieces(scope, receive, send):
    await start(send)
    for piece in (b"one", b"", b"two"):
        await body(send, piece, True)
    await send({"type": "http.response.body"})

async def gated(scope, receive, send):
    await start(send)
    await body(send, b"begun", True)
    await until("go")
    await body(send, b"over")

async def flood(scope, receive, send):
    global sent
    await start(send)
    try:
        while True:
            await body(send, b"x" * 65536, True)
            sent += 65536
    except OSError as error:
        print("flood:", error, await receive())
        raise

async def count(scope, receive, send):
    await start(send)
    await body(send, b"%d" % sent)

async def listens(scope, receive, send):
    await receive()
    print("listening")
    print("got", (await receive())["type"])
    await start(send)
    try:
        await body(send, b"late")
    except OSError:
        print("cannot send")

async def early(scope, receive, send):
    reading = [asyncio.create_task(receive()) for _ in range(3)]
    await asyncio.sleep(0.05)
    await start(send, 413)
    await body(send, b"enough", True)
    await body(send)
    print("received", [(await each)["type"] for each in reading])

async def timed_receive(scope, receive, send):
    await receive()
    for _ in range(3):
        try:
            await asyncio.wait_for(receive(), 0.02)
        except asyncio.TimeoutError:
            print("timed out")
    message = await receive()
    await start(send)
    await body(send, message["body"])

async def background(scope, receive, send):
    await start(send)
    await body(send, b"answered")
    assert (await receive())["type"] == "http.disconnect"
    await until("go")
    print("background done")
    if scope["query_string"] == b"fails":
        raise ValueError("in the background")

async def meet(scope, receive, send):
    global meeting
    if meeting is None:
        meeting = asyncio.Event()
        print("first")
        await meeting.wait()
    meeting.set()
    await start(send)
    await body(send, b"met")

async def empty(scope, receive, send):
    await start(send, 204)
    await body(send)

async def fails(scope, receive, send):
    raise ValueError("at once")

async def fails_later(scope, receive, send):
    await start(send)
    await body(send, b"begun", True)
    raise ValueError("later")

async def returns(scope, receive, send):
    await start(send)

async def exits(scope, receive, send):
    raise SystemExit(3)

async def twice(scope, receive, send):
    await start(send)
    await start(send)

async def unstarted(scope, receive, send):
    await body(send)

async def unknown(scope, receive, send):
    await send({"type": "http.response.other"})

async def after_the_last(scope, receive, send):
    await start(send)
    await body(send)
    await body(send)

HTTP = {f.__name__: f for f in (
    scope, echo, slow_reader, pieces, gated, flood, count, listens, early, timed_receive, background, meet, empty, fails, fails_later,
    returns, exits, twice, unstarted, unknown, after_the_last)}

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(scope, receive, send)
    else:
        await HTTP[scope["path"].split("/")[2]](scope, receive, send)

site = plugrack.asgi(app)

@plugin.init
def init(context):
    print("init")

@plugin.http
def handle(request):
    return "native" if request.path == "/native" else site(request)

plugin.run()
'''


class ASGITest(base.TestCase):
    def begin(self, concurrency=8, **config):
        return self.start(APP.replace("CONCURRENCY", str(concurrency)), config=config)

    def go(self, process):
        (process.directory / "go").touch()

    def frames(self, connection, path, **options):
        connection.http(path, **options)
        frames = [connection.receive()]
        while frames[-1][0].get("more"):
            frames.append(connection.receive())
        return frames[0][0]["status"], [(body, head.get("more", False)) for head, body in frames]

    def test_the_scope(self):
        _, connection = self.begin()
        headers = [["x-forwarded-proto", "https"], ["cookie", "a=b"], ["cookie", "c=d"], ["x-latin", "\u00e9"]]
        text = connection.get("/scope/caf%C3%A9/a%2Fb", method="PUT", headers=headers, query="a=%20b")[1].decode()
        scope = eval(text, {})  # as ascii() writes it
        self.assertEqual(scope, {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "PUT", "scheme": "https",
            "path": "/bench/scope/caf\u00e9/a/b", "raw_path": b"/bench/scope/caf%C3%A9/a%2Fb", "query_string": b"a=%20b",
            "root_path": "/bench", "client": ("203.0.113.9", 0), "server": ("example.org", 443), "state": {"started": "yes"},
            "headers": [(b"host", b"example.org"), (b"x-forwarded-proto", b"https"), (b"cookie", b"a=b"), (b"cookie", b"c=d"),
                        (b"x-latin", b"\xe9")]})

    def test_the_lifespan(self):
        process, connection = self.begin()
        self.assertEqual(process.log(), "init\nstartup\n")
        self.assertEqual(connection.get("/native")[1], b"native")
        connection.send({"type": "shutdown", "id": 9})
        self.assertEqual(process.wait(), 0)
        self.assertEqual(process.log(), "init\nstartup\nshutdown\n")

    def test_a_start_that_fails(self):
        for mode, code, message, status in (("fails", "internal", "RuntimeError: no database", 1), ("raises", "internal", "OSError: no disk", 1),
                                            ("refuses", "config", "set the key: plugrack config bench set key VALUE", 78)):
            process = self.launch(APP.replace("CONCURRENCY", "2"))
            _, (reply, _) = process.init(config={"lifespan": mode})
            self.assertEqual((reply["type"], reply["code"], reply["message"]), ("error", code, message))
            self.assertEqual(process.wait(), status)
            self.assertIn(message, process.log())

    def test_an_application_without_a_lifespan(self):
        process, connection = self.begin(lifespan="none")
        self.assertEqual(connection.get("/echo", b"x", method="POST")[1], b"x")
        connection.send({"type": "shutdown", "id": 9})
        self.assertEqual(process.wait(), 0)
        self.assertIn("runs without: only http here", process.log())
        self.assertNotIn("Traceback", process.log())

    def test_a_shutdown_that_hangs_is_cut_short(self):
        process, connection = self.begin(lifespan="hangs")
        connection.send({"type": "shutdown", "id": 9})
        self.assertEqual(process.wait(), 0)
        self.assertIn("shutdown took more than 1.5 s", process.log())

    def test_a_request_under_way_is_answered_before_the_shutdown(self):
        process, connection = self.begin()
        connection.http("/gated")
        self.assertEqual(connection.receive()[1], b"begun")
        connection.send({"type": "shutdown", "id": 9})
        other = process.connect()
        other.send({"type": "shutdown", "id": 9})
        self.assertIsNone(other.receive())
        self.assertNotIn("shutdown", process.log())
        self.go(process)
        self.assertEqual(connection.receive()[1], b"over")
        self.assertEqual(process.wait(), 0)
        self.assertIn("shutdown", process.log())

    def test_the_body_comes_in_pieces(self):
        _, connection = self.begin()
        self.assertEqual(connection.get("/echo")[1], b"")
        connection.http("/echo", b"one", method="POST", more=True)
        connection.send({"type": "data", "id": 7, "more": True}, b"two")
        connection.send({"type": "data", "id": 7}, b"three")
        self.assertEqual(connection.response()[1], b"one|two|three")
        connection.http("/echo", method="POST", more=True)
        data = base.frame({"type": "data", "id": 7}, b"x" * base.MIB)
        for at in range(0, len(data), 300_000):
            connection.write(data[at:at + 300_000])
        self.assertEqual(connection.response()[1], b"x" * base.MIB)
        self.assert_alive(connection)

    def test_a_body_that_is_not_received_holds_up_the_host(self):
        process, connection = self.begin()
        connection.http("/slow_reader", b"x", method="POST", more=True)
        connection.sock.settimeout(0.3)
        frame, sent, rest = base.frame({"type": "data", "id": 7, "more": True}, b"x" * 65536), 0, b""
        with self.assertRaises(base.socket.timeout):
            for _ in range(1000):
                rest = frame
                while rest:
                    rest = rest[connection.sock.send(rest):]
                sent += 65536
        connection.sock.settimeout(base.PATIENCE)
        self.assertLess(sent, 8 * base.MIB)
        self.go(process)
        connection.write(rest)
        connection.send({"type": "data", "id": 7})
        self.assertEqual(connection.response()[1], b"%d" % (1 + sent + 65536))

    def test_a_receive_that_is_given_up_loses_nothing(self):
        process, connection = self.begin()
        connection.http("/timed_receive", b"one", method="POST", more=True)
        self.eventually(lambda: process.log().count("timed out") == 3)
        connection.send({"type": "data", "id": 7}, b"two")
        self.assertEqual(connection.response()[1], b"two")
        self.assert_alive(connection)

    def test_answers_in_as_many_frames_as_they_need(self):
        _, connection = self.begin()
        self.assertEqual(self.frames(connection, "/pieces"), (200, [(b"one", True), (b"", True), (b"two", True), (b"", False)]))
        self.assertEqual(self.frames(connection, "/echo", body=b"x"), (200, [(b"x", False)]))
        self.assertEqual(self.frames(connection, "/empty"), (204, [(b"", False)]))
        self.assertEqual(self.frames(connection, "/pieces", method="HEAD"), (200, [(b"", True), (b"", False)]))
        self.assertEqual(self.frames(connection, "/count", method="HEAD"), (200, [(b"0", False)]))

    def test_an_endless_answer_to_head_ends(self):
        process, connection = self.begin()
        self.assertEqual(self.frames(connection, "/flood", method="HEAD"), (200, [(b"", True), (b"", False)]))
        self.eventually(lambda: "flood:" in process.log())
        self.assert_alive(connection)

    def test_a_piece_is_sent_before_the_next_and_a_slow_client_holds_up_the_application(self):
        process, connection = self.begin()
        connection.http("/gated")
        self.assertEqual(connection.receive()[1], b"begun")
        self.go(process)
        self.assertEqual(connection.receive()[1], b"over")
        connection.http("/flood")
        other = process.connect()
        counts = [-1, 0]
        while counts[-1] != counts[-2]:
            counts.append(int(other.get("/count")[1]))
            base.time.sleep(0.2)
        self.assertLess(counts[-1], 8 * base.MIB)
        connection.close()
        self.eventually(lambda: "flood: " in process.log() and "http.disconnect" in process.log())
        self.assertNotIn("Traceback", process.log())

    def test_a_client_that_goes_while_the_application_waits(self):
        process, connection = self.begin()
        connection.http("/listens")
        self.eventually(lambda: "listening" in process.log())
        connection.close()
        self.eventually(lambda: "got http.disconnect\ncannot send" in process.log())
        connection = process.connect()
        connection.http("/echo", b"x", method="POST", more=True)
        connection.close()
        self.assert_alive(process.connect())

    def test_an_early_answer_drops_the_rest_of_the_body(self):
        process, connection = self.begin()
        connection.http("/early", b"x", method="POST", more=True)
        head, body = connection.receive()
        self.assertEqual((head["status"], body), (413, b"enough"))
        connection.send({"type": "data", "id": 7, "more": True}, b"x" * 1000)
        connection.send({"type": "data", "id": 7, "aborted": True})
        self.assertEqual(connection.receive()[1], b"")
        self.assert_alive(connection)
        self.eventually(lambda: "received ['http.request', 'http.disconnect', 'http.disconnect']" in process.log())

    def test_a_broken_body_closes_the_connection(self):
        process, connection = self.begin()
        connection.http("/echo", b"x", method="POST", more=True)
        connection.send({"type": "data", "id": 8}, b"y")
        self.assertIsNone(connection.receive())
        self.assertIn("the host broke the protocol", process.log())
        self.assert_alive(process.connect())

    def test_the_application_goes_on_after_its_answer(self):
        process, connection = self.begin()
        for query in ("", "fails"):
            self.assertEqual(connection.get("/background", query=query)[1], b"answered")
        self.assert_alive(connection)
        self.go(process)
        self.eventually(lambda: process.log().count("background done") == 2 and "ValueError: in the background" in process.log())
        self.assertIn("GET /background failed after its answer", process.log())

    def test_what_goes_on_is_bounded(self):
        process, connection = self.begin()
        for _ in range(1000):
            self.assertEqual(connection.get("/background")[0]["status"], 200)
        self.assertEqual(connection.get("/count")[0]["status"], 503)
        self.go(process)
        self.eventually(lambda: process.log().count("background done") == 1000)
        self.eventually(lambda: connection.get("/count")[0]["status"] == 200)

    def test_requests_run_side_by_side_on_one_loop(self):
        process, first = self.begin()
        first.http("/meet")
        self.eventually(lambda: "first" in process.log())
        self.assertEqual(process.connect().get("/meet")[1], b"met")
        self.assertEqual(first.response()[1], b"met")

    def test_a_failure_is_answered_once(self):
        process, connection = self.begin(1)
        for path, said in (("/fails", "ValueError: at once"), ("/returns", "returned before its answer was complete"),
                           ("/exits", "ended by SystemExit"), ("/twice", "http.response.start was sent twice"),
                           ("/unstarted", "sent before http.response.start"), ("/unknown", "no message 'http.response.other'")):
            self.assertEqual(self.frames(connection, path), (500, [(b"internal error\n", False)]), path)
            self.assertIn(said, process.log())
        connection.http("/fails_later")
        self.assertEqual(connection.receive()[1], b"begun")
        error, _ = connection.receive()
        self.assertEqual((error["type"], error["id"], error["message"]), ("error", 7, "ValueError: later"))
        self.assertEqual(self.frames(connection, "/after_the_last"), (200, [(b"", False)]))
        self.eventually(lambda: "sent after the last one" in process.log())
        self.assert_alive(connection)


CONFORMING = r'''
from asgiref.compatibility import guarantee_single_callable
from asgiref.typing import HTTPScope, HTTPRequestEvent, HTTPDisconnectEvent, LifespanScope, LifespanStartupEvent
from asgiref.wsgi import WsgiToAsgi
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench")
OPTIONAL = {"extensions"}  # the specification says so

def check(value, form):
    """Whether a message has the fields of the specification, and these their types."""
    missing = set(form.__annotations__) - set(value) - OPTIONAL
    unknown = set(value) - set(form.__annotations__)
    assert not missing and not unknown, (value, missing, unknown)

def wsgi_app(environ, start_response):
    body = environ["wsgi.input"].read(100_000)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["SCRIPT_NAME"].encode(), b" ", environ["PATH_INFO"].encode(), b" ", str(len(body)).encode()]

inner = guarantee_single_callable(WsgiToAsgi(wsgi_app))

async def app(scope, receive, send):
    async def checked():
        message = await receive()
        check(message, {"http.request": HTTPRequestEvent, "http.disconnect": HTTPDisconnectEvent,
                        "lifespan.startup": LifespanStartupEvent}[message["type"]])
        return message
    if scope["type"] == "lifespan":
        check(scope, LifespanScope)
        await checked()
        await send({"type": "lifespan.startup.complete"})
        return
    check(scope, HTTPScope)
    assert all(type(each) is bytes for pair in scope["headers"] for each in pair)
    assert all(name == name.lower() for name, _ in scope["headers"])
    await inner(scope, checked, send)

plugin.http(plugrack.asgi(app))
plugin.run()
'''

STARLETTE = r'''
import asyncio, contextlib
from typing import List
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=8)

@contextlib.asynccontextmanager
async def lifespan(app):
    if plugin.context.config.get("fail"):
        raise OSError("no database")
    print("startup")
    yield {"visits": [0]}
    print("shutdown")

async def index(request):
    request.state.visits[0] += 1
    return PlainTextResponse(f"{request.url_for('items', number=3)} {request.client.host} {request.state.visits[0]}")

async def items(request):
    return JSONResponse(request.path_params)

async def upload(request):
    size = 0
    async for piece in request.stream():
        size += len(piece)
    return PlainTextResponse(str(size), background=BackgroundTask(print, "background", size))

async def ticks(request):
    async def pieces():
        try:
            for number in range(100_000):
                yield f"data: {number}\n\n"
                await asyncio.sleep(0.01)
        finally:
            print("ticks left")
    return StreamingResponse(pieces(), media_type="text/event-stream")

async def patient(request):
    print("patient")
    while not await request.is_disconnected():
        await asyncio.sleep(0.01)
    print("impatient")

async def fails(request):
    raise ValueError("in a view")

class Marked(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        response = await call_next(request)
        response.headers["x-marked"] = "yes"
        return response

api = FastAPI()

@api.get("/square/{number}")
def square(number: int):  # in a thread of its own
    return {"square": number * number}

@api.post("/sum")
async def total(numbers: List[int]):
    return {"sum": sum(numbers)}

app = Starlette(lifespan=lifespan, routes=[
    Route("/", index, middleware=[Middleware(Marked)]), Route("/items/{number:int}", items), Route("/upload", upload, methods=["POST"]), Route("/ticks", ticks),
    Route("/patient", patient), Route("/fails", fails), Mount("/api", api)])
plugin.http(plugrack.asgi(app))
plugin.run()
'''


class RealApplicationTest(base.TestCase):
    python = PACKAGES / "python" / "bin" / "python"

    def test_conformance(self):
        process, connection = self.start(CONFORMING)
        self.assertEqual(connection.get("/a%20b")[1], b"/bench /a b 0")
        connection.http("/x", b"x" * 10, method="POST", more=True, headers=[["content-length", "20"]])
        connection.send({"type": "data", "id": 7}, b"x" * 10)
        self.assertEqual(connection.response()[1], b"/bench /x 20")
        self.assertEqual(process.log(), "")

    def test_an_application_of_starlette_and_fastapi(self):
        process, connection = self.start(STARLETTE)
        head, body = connection.get("/")
        self.assertEqual(body, b"http://example.org/bench/items/3 203.0.113.9 1")
        self.assertEqual(dict(head["headers"])["x-marked"], "yes")
        self.assertEqual(connection.get("/items/3")[1], b'{"number":3}')
        connection.http("/upload", b"x" * 65536, method="POST", more=True)
        connection.send({"type": "data", "id": 7}, b"x" * 65536)
        self.assertEqual(connection.response()[1], b"131072")
        self.eventually(lambda: "background 131072" in process.log())
        self.assertEqual(json.loads(connection.get("/api/square/7")[1]), {"square": 49})
        self.assertEqual(json.loads(connection.get("/api/sum", b"[1, 2, 3]", method="POST", headers=[["content-type", "application/json"]])[1]), {"sum": 6})
        self.assertEqual(connection.get("/api/square/x")[0]["status"], 422)
        self.assertEqual(connection.get("/items/3", method="HEAD")[0]["status"], 200)
        self.assertEqual(connection.get("/nowhere")[0]["status"], 404)
        connection.http("/ticks")
        self.assertEqual([connection.receive()[1] for _ in range(2)], [b"data: 0\n\n", b"data: 1\n\n"])
        connection.close()
        self.eventually(lambda: "ticks left" in process.log())
        connection = process.connect()
        connection.http("/patient")
        self.eventually(lambda: "patient" in process.log())
        connection.close()
        self.eventually(lambda: "impatient" in process.log())
        connection = process.connect()
        self.assertEqual(connection.get("/fails")[0]["status"], 500)
        self.eventually(lambda: "ValueError: in a view" in process.log())
        connection.send({"type": "shutdown", "id": 9})
        self.assertEqual(process.wait(), 0)
        self.assertIn("shutdown", process.log())

    def test_a_start_that_fails(self):
        process = self.launch(STARLETTE)
        _, (reply, _) = process.init(config={"fail": True})
        self.assertEqual((reply["type"], reply["message"]), ("error", "OSError: no database"))
        self.assertEqual(process.wait(), 1)


if __name__ == "__main__":
    unittest.main()
