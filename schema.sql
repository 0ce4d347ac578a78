-- The whole database of a plugrack instance, as a fresh install has it: <data>/plugrack.db.
-- Times are milliseconds since 1970-01-01 UTC. A change here raises VERSION in src/store/schema.rs and adds a migration there.

-- What the host knows of itself: instance_id, and what else must outlive a restart.
CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- What the operator has decided about each plugin, the file that its id belongs to, and the account of its key-value namespace.
-- A plugin has a row once it was accepted; the row stays when its file goes, until `plugrack forget`.
CREATE TABLE plugins (
    id       TEXT PRIMARY KEY,
    enabled  INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    kv_rev   INTEGER NOT NULL DEFAULT 0,   -- the last revision given out; never goes back
    kv_keys  INTEGER NOT NULL DEFAULT 0,   -- keys held
    kv_bytes INTEGER NOT NULL DEFAULT 0,   -- bytes held by keys and values
    uid      INTEGER,                      -- the user it runs as where each has its own; NULL until it needs one
    file     TEXT,                         -- the name in the plugins directory that the id belongs to; NULL: the next that claims it
    seen     INTEGER                       -- when it was last accepted
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX plugins_by_uid ON plugins (uid);

-- What each file in the plugins directory has answered to --metadata, so that a start asks only what is new or changed.
CREATE TABLE programs (
    file        TEXT PRIMARY KEY,          -- its name there
    fingerprint TEXT,                      -- which file it was then; NULL: never answered
    metadata    TEXT CHECK (json_valid(metadata)),
    uid         INTEGER                    -- the user it answers as where plugins have uids of their own
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX programs_by_uid ON programs (uid);

-- The operator's settings for a plugin, handed to it in `init`. Values are JSON.
CREATE TABLE config (
    plugin TEXT NOT NULL,
    key    TEXT NOT NULL,
    value  TEXT NOT NULL CHECK (json_valid(value)),
    PRIMARY KEY (plugin, key)
) STRICT, WITHOUT ROWID;

-- The operator's environment variables for a plugin. They may be secrets.
CREATE TABLE env (
    plugin TEXT NOT NULL,
    name   TEXT NOT NULL,
    value  TEXT NOT NULL,
    PRIMARY KEY (plugin, name)
) STRICT, WITHOUT ROWID;

-- The operator's limits for a plugin, in place of the host's: open-files is a number, start-timeout and request-timeout are milliseconds.
CREATE TABLE limits (
    plugin TEXT    NOT NULL,
    name   TEXT    NOT NULL,
    value  INTEGER NOT NULL,
    PRIMARY KEY (plugin, name)
) STRICT, WITHOUT ROWID;

-- The licence of a plugin, handed to it in `init`: the token as the vendor issued it.
CREATE TABLE licenses (
    plugin TEXT PRIMARY KEY,
    token  TEXT NOT NULL,
    warned INTEGER                         -- the last day its end was warned of in the log, from 1970-01-01 UTC; NULL: none yet
) STRICT, WITHOUT ROWID;

-- What happened to each plugin: started, ready, crashed, refused, stopped, …
CREATE TABLE events (
    seq    INTEGER PRIMARY KEY AUTOINCREMENT,
    plugin TEXT    NOT NULL,
    at     INTEGER NOT NULL,
    kind   TEXT    NOT NULL,
    detail TEXT    NOT NULL
) STRICT;
CREATE INDEX events_by_plugin ON events (plugin, seq);

-- The key-value store, a namespace a plugin.
CREATE TABLE kv (
    plugin     TEXT    NOT NULL,
    key        TEXT    NOT NULL,
    rev        INTEGER NOT NULL,
    expires_at INTEGER,                    -- NULL: never
    value      BLOB    NOT NULL
) STRICT;
CREATE UNIQUE INDEX kv_by_key ON kv (plugin, key);
CREATE INDEX kv_by_expiry ON kv (expires_at) WHERE expires_at IS NOT NULL;
