"""What the benchmark needs beside the host: installed by apt where that can be done, and the peers built."""

import glob
import os
import shutil
import subprocess
import sys

from processes import ROOT, fail, say

BIN = os.path.join(ROOT, "target", "bench", "bin")
GOCODE = "/usr/share/gocode"  # where Debian's packages of Go libraries are
PYTHON = os.path.join(ROOT, "target", "test-packages", "python", "bin", "python3")  # the one that `make test-tools` makes



def php_fpm():
    """The program, whose name has PHP's version in it; None if there is none."""
    return next(iter(sorted(glob.glob("/usr/sbin/php-fpm*"))), None)


# What is looked for, and the packages of the system that bring it. Without a needed one nothing can be measured, without another a
# peer or an application is left out.
NEEDED = {
    "nginx": (lambda: shutil.which("nginx"), ["nginx-light"]),
    "wrk": (lambda: shutil.which("wrk"), ["wrk"]),
}
OPTIONAL = {
    "go": (lambda: shutil.which("go"), ["golang-go"]),
    "go-plugin": (lambda: shutil.which("go") and all(map(os.path.isdir, (
        GOCODE + "/src/github.com/hashicorp/go-plugin", GOCODE + "/src/google.golang.org/grpc"))),
                  ["golang-go", "golang-github-hashicorp-go-plugin-dev", "golang-google-grpc-dev"]),
    "fastcgi": (lambda: shutil.which("gcc") and os.path.exists("/usr/include/fcgiapp.h"),
                ["gcc", "libc6-dev", "libfcgi-dev"]),
    "uwsgi": (lambda: shutil.which("uwsgi") and os.path.exists("/usr/lib/uwsgi/plugins/python3_plugin.so"),
              ["uwsgi-core", "uwsgi-plugin-python3"]),
    "php-fpm": (php_fpm, ["php-fpm"]),
    "gunicorn": (lambda: os.path.exists(os.path.join(os.path.dirname(PYTHON), "gunicorn")), []),
}


def provide():
    """Installs what is missing, if we may. Gives the optional tools that are there."""
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin"  # where nginx is, not on every user's PATH
    tools = {**NEEDED, **OPTIONAL}
    missing = [name for name, (there, packages) in tools.items() if packages and not there()]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        say("bench: installing " + ", ".join(missing))
        _apt("update")
        for name in missing:  # one by one, so that one that cannot be had does not keep out the others
            _apt("install", "-y", "--no-install-recommends", *tools[name][1])
    for name, (there, packages) in NEEDED.items():
        if not there():
            fail("%s not found; install it with `apt-get install %s` or the like." % (name, " ".join(packages)))
    return {name for name, (there, _) in OPTIONAL.items() if there()}


def _apt(*arguments):
    # RUNLEVEL=1 keeps the packages from starting the system's services.
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")
    try:
        subprocess.run(("apt-get", "-qq") + arguments, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=300)
    except subprocess.TimeoutExpired:
        say("bench: apt-get %s took too long" % arguments[0])


def build_go(name):
    """A program of Go, from the libraries that are packages of the system."""
    environment = dict(os.environ, GO111MODULE="off", GOPATH=GOCODE, GOFLAGS="",
                       GOCACHE=os.path.join(ROOT, "target", "bench", "go-cache"))
    return _build("bench-" + name, ["go", "build", "-o", _path("bench-" + name), "./tests/bench/" + name], environment)


def build_c(name, *libraries):
    program = "bench-" + name
    return _build(program, ["gcc", "-O2", "-o", _path(program), "tests/bench/%s/main.c" % name, *libraries])


def build_rust_peer():
    target = os.path.join(ROOT, "target", "bench", "peer")
    _build("bench-peer", ["cargo", "build", "--release", "--quiet", "--manifest-path", "tests/bench/peer/Cargo.toml",
                          "--target-dir", target])
    return os.path.join(target, "release", "bench-peer")


def _path(program):
    return os.path.join(BIN, program)


def _build(program, command, environment=None):
    os.makedirs(BIN, exist_ok=True)
    try:
        built = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        fail("%s could not be built: %s." % (program, error))
    if built.returncode != 0:
        fail("%s could not be built; the compiler has said why above." % program)
    return _path(program)
