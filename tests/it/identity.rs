//! Who the installation is, who may touch it, and what the host refuses to start on.

use crate::support::{Site, binary, command, copy_program, range, uids};
use rusqlite::Connection;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a command complained of, which must be one line that needs no reading of logs.
#[track_caller]
fn one_sentence(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("plugrack: "), "{text}");
    text
}

/// `plugrack serve` with nothing else said.
fn bare_serve() -> Command {
    let mut serve = command(binary());
    serve.arg("serve");
    serve
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn instance(site: &Site) -> String {
    let output = site.cli(&["instance"]);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_instance_and_its_token_outlive_restarts_and_kills() {
    let server = Site::new().start();
    let (id, token_path) = (server.cli(&["instance"]), server.site().data().join("admin-token"));
    let token = fs::read_to_string(&token_path).unwrap();
    let uuid = id.strip_suffix('\n').unwrap();
    let version_4 = uuid.len() == 36 && uuid.as_bytes()[14] == b'4' && matches!(uuid.as_bytes()[19], b'8' | b'9' | b'a' | b'b');
    assert!(version_4, "{uuid}");
    assert_eq!(server.api("GET", "/instance", b"").1["instance_id"], uuid);

    let site = server.stop().1;
    assert_eq!(instance(&site), id);
    let server = site.start();
    assert_eq!(server.cli(&["instance"]), id);
    let site = server.kill();
    assert_eq!(instance(&site), id);
    let server = site.start();
    assert_eq!(server.api("GET", "/instance", b"").1["instance_id"], uuid);
    assert_eq!(fs::read_to_string(&token_path).unwrap(), token);
}

#[test]
fn two_installations_are_two_instances() {
    let [a, b] = [Site::new().start(), Site::new().start()];
    assert_ne!(a.cli(&["instance"]), b.cli(&["instance"]));
}

#[test]
fn where_there_is_no_instance_that_is_said() {
    let site = Site::new();
    let complaint = one_sentence(&site.cli(&["instance"]));
    assert!(complaint.contains("no instance") && complaint.contains(site.data().to_str().unwrap()), "{complaint}");
    let nowhere = site.data().join("nowhere");
    let complaint = one_sentence(&command(binary()).arg("--data").arg(&nowhere).arg("instance").output().unwrap());
    assert!(complaint.contains(nowhere.to_str().unwrap()) && complaint.contains("--data"), "{complaint}");
    assert!(!nowhere.exists());
}

#[test]
fn a_second_host_is_refused_and_the_first_goes_on() {
    let server = Site::new().fake("p").start();
    let before = server.wait_state("p", "ready")["process"]["pid"].clone();
    let complaint = one_sentence(&server.site().run_to_end());
    assert!(complaint.contains(&server.pid().to_string()), "{complaint}");
    assert!(complaint.contains("stop it") && complaint.contains("--data"), "{complaint}");

    assert_eq!(server.get("/p/x").status, 200);
    assert_eq!(server.get("/p/init").json()["type"], "init");
    assert_eq!(server.plugin("p")["process"]["pid"], before);
    server.cli(&["list"]);

    // However it ended, the kernel has freed the lock.
    let server = server.kill().start();
    server.wait_state("p", "ready");
}

#[test]
fn a_database_of_a_newer_version_is_refused_and_left_as_it_is() {
    let site = Site::new().start().stop().1;
    let database = site.data().join("plugrack.db");
    Connection::open(&database).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let before = fs::read(&database).unwrap();
    let complaint = one_sentence(&site.run_to_end());
    assert!(complaint.contains("99") && complaint.contains("newer"), "{complaint}");
    assert!(complaint.contains(database.to_str().unwrap()), "{complaint}");
    assert!(fs::read(&database).unwrap() == before, "the database was changed");
}

/// The columns of every table, and the indices with theirs: what a database is, however it came to be.
fn shape(database: &Path) -> Vec<String> {
    let connection = Connection::open(database).unwrap();
    let sql = "SELECT t.name || ' ' || t.wr || t.strict || ' ' || group_concat(c.name || c.type || c.'notnull' || ifnull(c.dflt_value, '') || c.pk, ',')
               FROM pragma_table_list t, pragma_table_xinfo(t.name) c WHERE t.schema = 'main' GROUP BY t.name
               UNION ALL SELECT m.name || i.'unique' || i.partial || ' on ' || m.tbl_name || ' ' || ifnull(m.sql, '')
               FROM sqlite_schema m JOIN pragma_index_list(m.tbl_name) i ON i.name = m.name ORDER BY 1";
    let mut statement = connection.prepare(sql).unwrap();
    statement.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
}

/// The fixtures are the databases of earlier versions as they were.
#[test]
fn a_database_of_an_earlier_version_is_brought_up_to_date_and_nothing_is_lost() {
    let schemas = [
        include_str!("../fixtures/schema-1.sql"),
        include_str!("../fixtures/schema-2.sql"),
        include_str!("../fixtures/schema-3.sql"),
        include_str!("../fixtures/schema-4.sql"),
    ];
    for (version, schema) in (1..).zip(schemas) {
        brings_up_to_date(version, schema);
    }
}

fn brings_up_to_date(version: i64, schema: &str) {
    let fresh = Site::new().start().stop().1;
    let site = Site::new().fake("p").fake("q");
    let database = site.data().join("plugrack.db");
    let id = "5f0c3f0e-3d3b-4c0a-9a43-3d5d1f1f7a10";
    let connection = Connection::open(&database).unwrap();
    connection.execute_batch(schema).unwrap();
    let rows = format!(
        "PRAGMA application_id = 0x706c6772; PRAGMA user_version = {version};
         INSERT INTO settings VALUES ('instance_id', '{id}');
         INSERT INTO plugins (id, enabled, kv_rev, kv_keys, kv_bytes) VALUES ('p', 1, 7, 1, 6), ('q', 0, 0, 0, 0);
         INSERT INTO config VALUES ('p', 'token', '\"t\"');
         INSERT INTO kv VALUES ('p', 'key', 7, NULL, CAST('old' AS BLOB));"
    );
    connection.execute_batch(&rows).unwrap();
    drop(connection);
    let mut site = site;
    // The second time it is up to date.
    for _ in 0..2 {
        let server = site.start();
        server.wait_state("p", "ready");
        assert_eq!(server.cli(&["instance"]).trim(), id);
        assert_eq!(
            (server.cli(&["kv", "get", "p", "key"]), server.plugin("q")["state"].as_str()),
            ("old".into(), Some("stopped"))
        );
        assert_eq!(server.cli(&["config", "get", "p", "token"]), "\"t\"\n");
        site = server.stop().1;
        assert_eq!(shape(&database), shape(&fresh.data().join("plugrack.db")));
    }
    let version: i64 = Connection::open(&database).unwrap().pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    assert_eq!(version, 5);
}

#[test]
fn a_file_that_is_no_database_of_ours_is_refused_and_left_as_it_is() {
    type Make = fn(&Path);
    let cases: [(Make, &str); 3] = [
        (
            |path| Connection::open(path).unwrap().execute_batch("CREATE TABLE cats (name TEXT)").unwrap(),
            "not a plugrack database",
        ),
        (|path| fs::write(path, b"garbage ".repeat(2000)).unwrap(), "not a database"),
        // The right beginning does not make it one.
        (|path| fs::write(path, [&b"SQLite format 3\0"[..], &b"\xff".repeat(8000)].concat()).unwrap(), "not a"),
    ];
    for (make, reason) in cases {
        let site = Site::new();
        let database = site.data().join("plugrack.db");
        make(&database);
        let before = fs::read(&database).unwrap();
        for output in [site.run_to_end(), site.cli(&["instance"])] {
            let complaint = one_sentence(&output);
            assert!(complaint.contains(database.to_str().unwrap()), "{complaint}");
        }
        let complaint = one_sentence(&site.run_to_end());
        assert!(complaint.contains(reason), "{complaint}");
        assert!(fs::read(&database).unwrap() == before, "{reason}: the file was changed");
    }
}

/// What others could open below `dir`: by its own mode, with no directory above that keeps them out.
fn open_to_others(dir: &Path, found: &mut Vec<PathBuf>) {
    if mode(dir) & 0o077 == 0 {
        return;
    }
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => open_to_others(&entry.path(), found),
            kind if kind.is_symlink() => {}
            _ if mode(&entry.path()) & 0o077 != 0 => found.push(entry.path()),
            _ => {}
        }
    }
}

#[test]
fn what_the_host_keeps_is_not_open_to_others() {
    let site = Site::new().fake("p");
    // A directory that others may enter is what `mkdir` makes.
    for path in [site.data(), &site.plugins()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let server = site.start();
    server.wait_state("p", "ready");
    assert_eq!(server.get("/p/print?text=x").status, 200);
    let data = server.site().data();
    let mut found = Vec::new();
    open_to_others(data, &mut found);
    // Plugins are the operator's files, and host.log is this test's.
    found.retain(|path| !path.starts_with(data.join("plugins")) && !path.ends_with("host.log"));
    assert!(found.is_empty(), "{found:?}");

    assert_eq!(mode(&data.join("admin-token")), 0o600);
    for dir in ["run", "run/p.d", "logs", "plugin-data", "plugin-data/p"] {
        assert_eq!(mode(&data.join(dir)), 0o700, "{dir}");
    }
    // The test would hold of a host that makes none of these.
    assert!(data.join("plugrack.db").is_file() && data.join("logs/p.log").is_file());
    for socket in ["run/host.sock", "run/p.d/sock"] {
        assert!(fs::metadata(data.join(socket)).unwrap().file_type().is_socket(), "{socket}");
    }
}

#[test]
fn a_data_directory_is_made_for_its_owner_alone() {
    let site = Site::new();
    let data = site.data().join("deep/data");
    // The port is taken, so that the host ends by itself when all else is done.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut serve = bare_serve();
    serve.arg("--data").arg(&data).args(["--listen", &taken.local_addr().unwrap().to_string()]);
    one_sentence(&serve.output().unwrap());
    assert_eq!(mode(&data), 0o700);
}

#[test]
fn a_token_that_others_may_read_is_refused() {
    let server = Site::new().start();
    let token = server.site().data().join("admin-token");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o640)).unwrap();
    let complaint = server.cli_fails(&["list"]);
    assert!(complaint.contains("admin-token") && complaint.contains("chmod 600"), "{complaint}");
    let site = server.stop().1;
    let complaint = one_sentence(&site.run_to_end());
    assert!(complaint.contains("admin-token") && complaint.contains("chmod 600"), "{complaint}");

    fs::write(&token, "").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let complaint = one_sentence(&site.run_to_end());
    assert!(complaint.contains("empty"), "{complaint}");
}

#[test]
fn the_environment_says_what_the_arguments_do_not() {
    let site = Site::new();
    let (data, plugins) = (site.data().to_owned(), site.data().join("mine"));
    let mut serve = bare_serve();
    serve.env("PLUGRACK_DATA", &data).env("PLUGRACK_PLUGINS", &plugins).env("PLUGRACK_LISTEN", "127.0.0.1:0");
    let server = site.start_as(serve);
    assert_eq!(server.get("/healthz").status, 200);
    assert!(plugins.is_dir());
    let list = command(binary()).arg("list").env("PLUGRACK_DATA", &data).output().unwrap();
    assert!(list.status.success(), "{list:?}");
    let site = server.stop().1;

    // Each variable would keep the host from starting; the arguments win.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut serve = site.serve();
    serve.arg("--plugins").arg(&plugins);
    serve.env("PLUGRACK_DATA", "/proc/nowhere").env("PLUGRACK_PLUGINS", "/proc/nowhere");
    serve.env("PLUGRACK_LISTEN", taken.local_addr().unwrap().to_string());
    let server = site.start_as(serve);
    assert_eq!(server.get("/healthz").status, 200);
}

#[test]
fn a_port_in_use_is_said_in_a_sentence() {
    let site = Site::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let complaint = one_sentence(&bare_serve().arg("--data").arg(site.data()).args(["--listen", &address]).output().unwrap());
    assert!(
        complaint.contains(&address) && complaint.contains("--listen") && complaint.contains("another program listens there"),
        "{complaint}"
    );
}

#[test]
fn an_address_that_cannot_be_had_is_said_in_a_sentence() {
    let listen = |address: &str, uid: Option<u32>| {
        let site = Site::new();
        let mut serve = bare_serve();
        if let Some(uid) = uid {
            let own = site.data().join("plugrack");
            copy_program(binary(), &own);
            let uid = uid.to_string();
            assert!(command("chown").args(["-R", &uid]).arg(site.data()).status().unwrap().success());
            serve = command("setpriv");
            serve.args(["--reuid", &uid, "--regid", &uid, "--clear-groups"]).arg(own).arg("serve");
        }
        one_sentence(&serve.arg("--data").arg(site.data()).args(["--listen", address]).output().unwrap())
    };
    // An address for documentation, RFC 5737.
    let complaint = listen("192.0.2.1:0", None);
    assert!(complaint.contains("cannot listen on 192.0.2.1:0: this machine does not have that address"), "{complaint}");
    let first = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    // Only root can become another user.
    if first.trim() != "0" && fs::metadata("/proc/self").unwrap().uid() == 0 {
        let complaint = listen("127.0.0.1:1", Some(*uids().start()));
        assert!(complaint.contains("only root may listen on port 1") && complaint.contains("setcap"), "{complaint}");
    }
}

#[test]
fn a_host_that_runs_plugins_as_root_says_so() {
    const WARNING: &str = "plugins run as root: set --plugin-uids";
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let log = Site::new().start().log();
    assert_eq!(log.matches(WARNING).count(), usize::from(is_root), "{log}");
    if is_root {
        let log = Site::new().args(&["--plugin-uids", &range(&uids())]).start().log();
        assert!(!log.contains(WARNING), "{log}");
    }
}

#[test]
fn unless_told_otherwise_only_this_machine_is_served() {
    let help = bare_serve().arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap().split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    assert!(help.contains("[default: 127.0.0.1:8080]"), "{help}");
}

/// The address of a Unix socket has room for 107 bytes.
#[test]
fn a_data_directory_whose_path_is_too_long_for_sockets_is_said_in_a_sentence() {
    let site = Site::new();
    let data = site.data().join("long".repeat(25));
    let complaint = one_sentence(&bare_serve().args(["--listen", "127.0.0.1:0", "--data"]).arg(&data).output().unwrap());
    assert!(complaint.contains("socket") && complaint.contains("shorter --data"), "{complaint}");
}

#[test]
fn a_data_directory_that_cannot_be_made_is_said_in_a_sentence() {
    let site = Site::new().file("file", b"", 0o644);
    let blocked = site.plugins().join("file/data");
    let complaint = one_sentence(&bare_serve().arg("--data").arg(&blocked).output().unwrap());
    assert!(complaint.contains(blocked.to_str().unwrap()) && complaint.contains("--data"), "{complaint}");
}
