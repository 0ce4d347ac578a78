"""The host under measurement: its real binary, started, asked and stopped from outside."""

import functools
import http.client
import json
import os
import re
import shutil

from processes import (ROOT, children, command_line, fail, output_of, policy_of, start, stop, wait_for)

# Far above what any point of the benchmark needs; the defaults are for a server on the open net.
ROOMY = {"--max-connections": "4096", "--max-connections-per-address": "4096",
         "--kv-max-keys": "4000000", "--kv-max-bytes": "4GiB"}


def release(name):
    path = os.path.join(ROOT, "target", "release", name)
    if not os.access(path, os.X_OK):
        fail("target/release/%s is missing; `make bench` builds it." % name)
    return path


@functools.lru_cache(maxsize=None)
def serve_help():
    return output_of(release("plugrack"), "serve", "--help")


def supports_unix():
    """Whether the host can listen on a Unix socket, for nginx before it."""
    return "unix:" in serve_help()


def request(address, method, path, body=None, headers=None, timeout=10):
    """Status and body, or None while there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", address, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def rust_plugin(name="bench"):
    """Puts the plugin in Rust in place, which takes its id from its file's name. Many are links to one file."""
    def install(plugins):
        copy = os.path.join(os.path.dirname(plugins), "bench-plugin")
        if not os.path.exists(copy):
            shutil.copy(release("bench-plugin"), copy)
        os.link(copy, os.path.join(plugins, name))
    return install


def python_plugin(plugins):
    directory = os.path.join(plugins, "bench-python")
    os.mkdir(directory)
    shutil.copy(os.path.join(ROOT, "tests/bench/plugin-python/plugin"), directory)
    shutil.copy(os.path.join(ROOT, "sdk/python/plugrack.py"), directory)


def application(manifest):
    """Puts a manifest in place, as the plugin `bench`."""
    def install(plugins):
        directory = os.path.join(plugins, "bench")
        os.mkdir(directory)
        with open(os.path.join(directory, "plugrack.toml"), "w") as file:
            file.write(manifest)
    return install


class Host:
    """A host with a data directory of its own, below `directory`. `unix` is the path of its socket, if it listens on one."""

    def __init__(self, directory, plugins, policy=None, unix=None, port=0):
        self.data = os.path.join(directory, "data")
        self.plugins = os.path.join(directory, "plugins")
        if not os.path.exists(self.plugins):
            os.makedirs(self.plugins)
            for install in plugins:
                install(self.plugins)
        limits = [word for flag, value in ROOMY.items() if flag + " " in serve_help() for word in (flag, value)]
        self.log = open(os.path.join(directory, "plugrack.log"), "w+b")
        self.process = start(
            [release("plugrack"), "serve", "--data", self.data, "--plugins", self.plugins,
             "--listen", "unix:" + unix if unix else "127.0.0.1:%d" % port] + limits, self.log, policy)
        self.port, self.unix = port, unix

    def wait(self):
        """Until it listens, and has said where."""
        if self.unix:
            ready = self.wait_for(lambda: os.path.exists(self.unix))
        else:
            self.port = self.wait_for(self._bound_port)
            ready = self.port and self.wait_for(lambda: (request(self.port, "GET", "/healthz") or (0,))[0] == 200)
        if not ready:
            fail("plugrack did not come up; see its log: %s" % self.last_line())
        return self

    def wait_for(self, check):
        return wait_for("plugrack", self.process, self.log, check)

    def wait_plugins(self, number):
        """Until so many plugins are ready."""
        if not self.wait_for(lambda: len(self.states("ready")) >= number):
            fail("of %d plugins only %d became ready; the host's last line: %s"
                 % (number, len(self.states("ready")), self.last_line()))
        return self

    def states(self, state):
        return [plugin for plugin in self.api("GET", "/api/plugins")["plugins"] if plugin["state"] == state]

    def api(self, method, path):
        with open(os.path.join(self.data, "admin-token")) as file:
            token = file.read().strip()
        answer = request(self.port, method, path, headers={"authorization": "Bearer " + token}, timeout=30)
        if not answer or answer[0] != 200:
            fail("plugrack answers %s %s with %r." % (method, path, answer))
        return json.loads(answer[1])

    def task(self, path):
        """What the plugin's own measuring of the store has found."""
        answer = request(self.port, "GET", "/bench/kv/" + path, timeout=60)
        if not answer or answer[0] != 200:
            fail("the plugin answers %s with %r." % (path, answer))
        return json.loads(answer[1])

    def pids(self):
        """The host and its watchdog, without the plugins."""
        pid = self.process.pid
        return [pid] + [child for child in children(pid) if b"__watchdog" in command_line(child)]

    def policy(self):
        return policy_of(self.process.pid)

    def last_line(self):
        self.log.seek(0)
        return (self.log.read().decode(errors="replace").strip().split("\n") or ["nothing"])[-1]

    def stop(self):
        stop(self.process)
        self.log.close()

    def _bound_port(self):
        try:
            with open(os.path.join(self.data, "run", "listen")) as listen:
                match = re.match(r"127\.0\.0\.1:(\d+)\s*$", listen.read())
        except OSError:
            return None
        return match and int(match.group(1))
