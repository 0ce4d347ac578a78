"""The key-value store: how its time grows with its keys, and durable writes beside SQLite's own, one commit a write and many."""

import os
import time
from contextlib import closing
from statistics import median

from report import Section, Target, number, table

KEYS = (10_000, 100_000, 1_000_000)
WRITERS = (1, 4, 16, 64)
FILL_THREADS = 64
FILL_AT_ONCE = 100_000  # keys a request, so that it is answered in time
VALUE = "v%099d"  # SQLite passes over a write that changes nothing, so each has its own
WRITER_KEYS = 10_000
MIN_GAIN = 20  # of 64 writers over one commit a write


def sizes(bench):
    """Time of a get and of a set, as a plugin waits for them, by the number of keys that are there."""
    host, have, rows = bench.host("kv"), 0, []
    milliseconds = 500 if bench.quick else 1500
    for keys in KEYS[:2] if bench.quick else KEYS:
        begun, first = time.monotonic(), have
        have = fill(host, have, keys)
        filled = (keys - first) / (time.monotonic() - begun)
        use = "?keys=%d&ms=%d&threads=1" % (keys, milliseconds)
        get, put = host.task("get" + use), host.task("set" + use)
        rows.append([str(keys)] + ["%.0f / %.0f" % (each["p50_us"], each["p99_us"]) for each in (get, put)] + [number(filled)])
    host.stop()
    text = ("Get and set of 100 bytes in Rust, one after another over all keys, p50 / p99 in µs; a set is on disk when it returns. "
            "The keys are made by %d threads in transactions of 128.\n\n" % FILL_THREADS)
    return Section("Keys", text + table(["keys", "get", "set", "keys made a second"], rows), [])


def fill(host, have, keys):
    while have < keys:
        end = min(keys, have + FILL_AT_ONCE)
        host.task("fill?from=%d&to=%d&threads=%d" % (have, end, FILL_THREADS))
        have = end
    return have


def writers(bench):
    """Durable sets and gets a second by the number of threads at them, SQLite's own in turns with them."""
    host = bench.host("writers")
    fill(host, 0, WRITER_KEYS)
    sqlite = OneCommitAWrite(os.path.join(bench.room("sqlite"), "sqlite.db"))
    milliseconds = 500 if bench.quick else 1000
    sets, gets, together = [], [], []
    for _ in range(1 if bench.quick else 3):
        for task, rounds, own in (("set", sets, sqlite.writes), ("get", gets, sqlite.reads)):
            figures = {many: host.task("%s?keys=%d&ms=%d&threads=%d" % (task, WRITER_KEYS, milliseconds, many))
                       for many in WRITERS}
            rounds.append(({many: each["rate"] for many, each in figures.items()}, own(milliseconds / 1000)))
        together.append(sqlite.writes_together(milliseconds / 1000))
    host.stop()
    sqlite.close()

    def row(name, rounds):
        own = median(own for _, own in rounds)
        return [name, number(own)] + ["%s (%.1f×)" % (number(median(rates[many] for rates, _ in rounds)), _gain(rounds, many))
                                      for many in WRITERS]

    gain = _gain(sets, WRITERS[-1])
    text = ("A second: threads of one plugin that set and get values of 100 bytes among %d keys, each set durable when it returns; "
            "beside them SQLite itself from Python on the same disk, one thread, one commit a write (WAL, synchronous=FULL), no "
            "plugin and no socket between. In parentheses the ratio to SQLite.\n\n" % WRITER_KEYS)
    limit = median(rate / own for rate, (_, own) in zip(together, sets))
    after = ("\nThe limit that SQLite sets: that one thread with %d sets a commit, which wait for nobody, writes %s a second (%.1f×).\n"
             % (WRITERS[-1], number(median(together)), limit))
    text += table(["", "SQLite"] + ["%d thread%s" % (many, "s" if many > 1 else "") for many in WRITERS],
                  [row("sets", sets), row("gets", gets)])
    return Section("Durable writes", text + after, [Target(
        "durable KV sets of %d writers ≥ %d × one commit a write" % (WRITERS[-1], MIN_GAIN), "%.1f ×" % gain, gain >= MIN_GAIN)])


def _gain(rounds, many):
    return median(rates[many] / own for rates, own in rounds)


class OneCommitAWrite:
    """SQLite as one would use it without the host."""

    def __init__(self, path):
        import sqlite3  # some builds of Python have none; only this part needs it
        self._done = WRITER_KEYS
        self._database = sqlite3.connect(path, isolation_level=None)
        with closing(self._database.cursor()) as cursor:
            cursor.execute("pragma journal_mode = wal")
            cursor.execute("pragma synchronous = full")
            cursor.execute("create table kv (key text primary key, value blob not null) without rowid")
            cursor.execute("begin")
            cursor.executemany("insert into kv values (?, ?)", ((self._key(at), VALUE % at) for at in range(WRITER_KEYS)))
            cursor.execute("commit")

    def writes(self, seconds):
        return self._rate(seconds, self._write)

    def writes_together(self, seconds):
        """As many in a transaction as there are writers."""
        def write(key, done):
            if not self._database.in_transaction:
                self._database.execute("begin immediate")
            self._write(key, done)
            if done % WRITERS[-1] == 0:
                self._database.commit()

        rate = self._rate(seconds, write)
        self._database.commit()
        return rate

    def reads(self, seconds):
        return self._rate(seconds, lambda key, _: self._database.execute("select value from kv where key = ?", (key,)).fetchone())

    def close(self):
        self._database.close()

    def _write(self, key, done):
        self._database.execute("insert into kv values (?, ?) on conflict (key) do update set value = excluded.value",
                               (key, VALUE % done))

    @staticmethod
    def _key(at):
        return "key/%09d" % at

    def _rate(self, seconds, use):
        begun, done = time.monotonic(), 0
        while time.monotonic() < begun + seconds:
            # A step that has no part in common with the number of keys goes all over them.
            use(self._key(done * 611_953 % WRITER_KEYS), self._done)
            done += 1
            self._done += 1
        return done / (time.monotonic() - begun)
