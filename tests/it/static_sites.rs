//! Files of a directory, as their clients get them: whole, in parts, slowly, and while they change.

use crate::support::http::{Client, Reply};
use crate::support::tls::Authority;
use crate::support::{Server, Site, blocks, pause, wait_for};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// More than the host and the kernel's buffers hold of an answer.
const LARGE: usize = 32 * MIB;

/// A host with the static site `p`, which has the file `large` of so many bytes.
fn serve(arguments: &[&str], bytes: usize) -> Server {
    let site = Site::new().args(arguments);
    let dir = site.plugins().join("p");
    fs::create_dir_all(dir.join("public")).unwrap();
    fs::write(dir.join("public/large"), content(bytes)).unwrap();
    fs::write(dir.join("public/small"), "small").unwrap();
    let manifest = "id = \"p\"\nroute = \"/p\"\n\n[run]\nkind = \"static\"\nroot = \"public\"\n";
    fs::write(dir.join("plugrack.toml"), manifest).unwrap();
    let server = site.start();
    server.wait_state("p", "ready");
    server
}

fn content(bytes: usize) -> Vec<u8> {
    blocks(bytes as u64).collect::<Vec<_>>().concat()
}

fn file(server: &Server, name: &str) -> PathBuf {
    server.site().plugins().join("p/public").join(name)
}

/// Asks for the large file, and reads the head of the answer.
fn ask(client: &mut Client) -> Reply {
    client.send(b"GET /p/large HTTP/1.1\r\nhost: test\r\n\r\n");
    let head = client.reply_head();
    assert_eq!(head.status, 200);
    head
}

/// Calls `check` with a host and a client of it, without and with TLS.
fn over_tcp_and_tls(bytes: usize, check: impl Fn(&Server, &dyn Fn() -> Client)) {
    let plain = serve(&[], bytes);
    check(&plain, &|| plain.client());
    let authority = Authority::new();
    let encrypted = serve(&authority.issue("host").arguments(), bytes);
    check(&encrypted, &|| authority.client(encrypted.address()));
}

#[test]
fn a_file_of_100_mib_comes_byte_for_byte_to_a_slow_client_and_costs_no_memory() {
    let server = serve(&[], 100 * MIB);
    assert_eq!(server.get("/p/small").text(), "small");
    let before = server.memory("VmRSS");
    let mut client = server.client();
    let head = ask(&mut client);
    assert_eq!(head.header("content-length"), Some(&*(100 * MIB).to_string()));
    for (number, block) in blocks(100 * MIB as u64).enumerate() {
        assert!(client.bytes(block.len()) == block, "block {number}");
        if number % 8 == 0 {
            pause(Duration::from_millis(10));
            assert_eq!(server.get("/p/small").text(), "small");
        }
    }
    // The connection is kept.
    assert_eq!(client.get("/p/small").text(), "small");
    let more = server.memory("VmHWM").saturating_sub(before);
    assert!(more < 16 * MIB as u64, "{more} bytes more");
}

#[test]
fn files_ranges_and_heads_come_whole_by_tcp_and_tls() {
    over_tcp_and_tls(5 * MIB + 1, |_, client| {
        let (mut client, sent) = (client(), content(5 * MIB + 1));
        for _ in 0..2 {
            assert!(client.get("/p/large").body == sent);
            let head = client.request("HEAD", "/p/large", &[], b"");
            assert_eq!((head.status, head.header("content-length")), (200, Some("5242881")));
            for (first, last) in [(1, 4), (0, 131_071), (0, 131_072), (4095, 3_000_000), (4_000_000, 5_242_880)] {
                let part = client.request("GET", "/p/large", &[("range", &format!("bytes={first}-{last}"))], b"");
                assert_eq!(part.header("content-range"), Some(&*format!("bytes {first}-{last}/5242881")));
                assert!(part.status == 206 && part.body == sent[first..=last], "{first}-{last}");
            }
        }
        // The end of the connection follows that of the answer.
        client.send(b"GET /p/large HTTP/1.0\r\nhost: test\r\n\r\n");
        assert_eq!(client.reply_head().header("connection"), Some("close"));
        assert!(client.rest() == sent);
    });
}

#[test]
fn many_clients_get_their_files_at_once() {
    let server = serve(&[], 3 * MIB);
    let sent = content(3 * MIB);
    std::thread::scope(|scope| {
        for number in 0..24 {
            let (server, sent) = (&server, &sent);
            scope.spawn(move || {
                let mut client = server.client();
                for _ in 0..3 {
                    let head = ask(&mut client);
                    assert_eq!(head.header("content-length"), Some("3145728"));
                    for part in sent.chunks(MIB) {
                        assert!(client.bytes(part.len()) == part);
                        if number % 4 == 0 {
                            pause(Duration::from_millis(50));
                        }
                    }
                    assert_eq!(client.get("/p/small").text(), "small");
                }
            });
        }
    });
}

#[test]
fn a_client_can_tell_that_its_file_changed_in_place_and_the_log_says_why() {
    over_tcp_and_tls(LARGE, |server, client| {
        let shorten = || fs::File::options().write(true).open(file(server, "large")).unwrap().set_len(20 * MIB as u64).unwrap();
        let rewrite = || {
            let file = fs::File::options().write(true).open(file(server, "large")).unwrap();
            file.write_all_at(b"another version", 25 * MIB as u64).unwrap();
        };
        for (change, why) in [(&shorten as &dyn Fn(), "the file became shorter"), (&rewrite, "the file was rewritten")] {
            fs::write(file(server, "large"), content(LARGE)).unwrap();
            let mut client = client();
            ask(&mut client);
            client.bytes(MIB);
            change();
            let come = MIB + client.rest().len();
            assert!(come < LARGE, "{why}: {come}");
            server.wait_logged("p", &[&format!("the answer was cut short: {why}")]);
        }
        assert_eq!(client().get("/p/small").text(), "small");
    });
}

#[test]
fn a_download_under_way_gets_the_old_file_to_its_end_when_another_takes_its_place() {
    over_tcp_and_tls(LARGE, |server, client| {
        let mut old = client();
        ask(&mut old);
        let begin = old.bytes(MIB);
        fs::write(file(server, "new"), "new").unwrap();
        fs::rename(file(server, "new"), file(server, "large")).unwrap();
        assert_eq!(client().get("/p/large").text(), "new");
        assert!([begin, old.bytes(LARGE - MIB)].concat() == content(LARGE));
        assert_eq!(old.get("/p/large").text(), "new");
    });
}

#[test]
fn a_client_that_goes_in_the_middle_leaves_nothing_behind() {
    let server = serve(&["--write-timeout", "5m"], LARGE);
    assert_eq!(server.get("/p/small").text(), "small");
    let leave = |number: usize| {
        let mut client = server.client();
        ask(&mut client);
        client.bytes(number * MIB / 4);
        if number.is_multiple_of(2) {
            client.reset();
        }
    };
    (0..8).for_each(leave);
    wait_for("the file to be closed by all", || {
        let files = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
        let open =
            files.flatten().filter_map(|file| fs::read_link(file.path()).ok()).filter(|path| path.ends_with("public/large"));
        (open.count() == 0).then_some(())
    });
    assert!(server.get("/p/large").body == content(LARGE));
    assert!(!fs::read_to_string(server.site().data().join("logs/p.log")).is_ok_and(|log| log.contains("cut short")));
}

/// The worker waits for such a client, and the gate holds it to the limits.
#[test]
fn a_client_that_stops_reading_is_cut_off_and_one_that_reads_slowly_is_not() {
    let server = serve(&["--write-timeout", "3s"], LARGE);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = server.client();
            ask(&mut client);
            let begin = Instant::now();
            wait_for("the connection to be ended by the host", || (!client.try_send(b" ")).then_some(()));
            assert!(begin.elapsed() >= Duration::from_millis(2_500), "{:?}", begin.elapsed());
            assert!(client.rest().len() < LARGE);
        });
        let mut client = server.client();
        ask(&mut client);
        let (begin, mut come) = (Instant::now(), 0);
        // Far less than the kernel has to get rid of before it reports room.
        while begin.elapsed() < Duration::from_secs(10) {
            come += client.some(400).unwrap_or_else(|| panic!("cut after {:?} and {come} bytes", begin.elapsed()));
            pause(Duration::from_millis(100));
        }
        assert_eq!(come + client.all(LARGE - come).len(), LARGE);
    });
}
