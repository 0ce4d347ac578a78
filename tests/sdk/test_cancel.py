"""Requests that the host gives up while the plugin neither reads nor writes. The plugins are real processes, as in test_plugrack.py."""

import test_plugrack as base

PLUGIN = r'''
import os, time
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=CONCURRENCY)

def wait(request):
    print("waiting")
    print("cancelled" if request.cancelled.wait(50) else "not cancelled")

def handler(request):
    wait(request)
    return "late"

def stream(request):
    try:
        yield "begun"
        wait(request)
        yield "more"
        print("went on")
    finally:
        print("closed")

def blocked(request):
    yield "begun"
    print("blocked")
    while not os.path.exists("release"):
        time.sleep(0.01)
    yield "released"

def hello(request):
    return "cancelled" if request.cancelled.is_set() else "hello"

@plugin.http
def handle(request):
    return {f.__name__: f for f in (handler, stream, blocked, hello)}[request.path[1:]](request)

plugin.run()
'''


class CancelTest(base.TestCase):
    def begin(self, concurrency=2):
        return self.start(PLUGIN.replace("CONCURRENCY", str(concurrency)))

    def abandon(self, process, connection):
        """Reads the beginning of a stream, and closes the connection once the stream is blocked."""
        blocked = process.log().count("blocked")
        connection.http("/blocked")
        self.assertEqual(connection.receive()[1], b"begun")
        self.eventually(lambda: process.log().count("blocked") > blocked)
        connection.close()

    def test_a_handler_that_writes_nothing_learns_that_the_host_has_gone(self):
        process, connection = self.begin()
        connection.http("/handler")
        self.eventually(lambda: "waiting" in process.log())
        connection.close()
        self.eventually(lambda: "\ncancelled" in process.log())
        self.assert_alive(process.connect())

    def test_a_silent_stream_learns_it_and_is_closed(self):
        process, connection = self.begin()
        connection.http("/stream")  # its first piece is left unread, which makes the end a reset
        self.eventually(lambda: "waiting" in process.log())
        connection.close()
        self.eventually(lambda: "\ncancelled\nclosed" in process.log())
        self.assertNotIn("went on", process.log())

    def test_a_shutdown_cancels_every_request_and_nothing_else_does(self):
        process, first = self.begin()
        busy = process.connect()
        busy.http("/handler")
        self.eventually(lambda: "waiting" in process.log())
        self.assertEqual(first.get("/hello")[1], b"hello")
        self.assertNotIn("cancelled", process.log())
        first.send({"type": "shutdown", "id": 8})
        self.assertEqual(busy.response()[1], b"late")
        self.assertIn("\ncancelled", process.log())
        busy.send({"type": "shutdown", "id": 9})
        self.assertEqual(process.wait(), 0)

    def test_a_half_closed_connection_is_not_cancelled(self):
        _, connection = self.begin()
        connection.http("/hello")
        connection.sock.shutdown(base.socket.SHUT_WR)
        self.assertEqual(connection.response()[1], b"hello")

    def test_abandoned_streams_leave_room_for_others_until_there_are_twice_as_many_as_the_concurrency(self):
        for concurrency in (1, 2):
            process, connection = self.begin(concurrency)
            self.abandon(process, connection)
            for _ in range(2 * concurrency - 1):
                connection = process.connect()
                self.assertEqual(connection.get("/hello")[1], b"hello")
                self.assertNotIn("no connection is accepted", process.log())
                self.abandon(process, connection)
            connection = process.connect()
            connection.http("/hello")
            self.eventually(lambda: "no connection is accepted" in process.log())
            self.assertIn(f": {2 * concurrency} handlers still run", process.log())
            connection.sock.settimeout(0.1)
            with self.assertRaises(base.socket.timeout):
                connection.sock.recv(1)
            connection.sock.settimeout(base.PATIENCE)
            (process.directory / "release").touch()
            self.assertEqual(base.Connection(connection.sock).response()[1], b"hello")
            self.assertEqual(process.log().count("no connection is accepted"), 1)
            self.assertNotIn("Traceback", process.log())

    def test_an_abandoned_stream_does_not_keep_the_plugin_from_its_exit(self):
        process, connection = self.begin(1)
        self.abandon(process, connection)
        connection = process.connect()
        connection.send({"type": "shutdown", "id": 8})
        self.assertIsNone(connection.receive())
        self.assertEqual(process.wait(), 0)
