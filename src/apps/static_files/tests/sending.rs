//! Large files, slow clients, and files that change.

use super::*;

#[test]
fn a_large_file_comes_whole_by_the_channel() {
    let fixture = Fixture::new();
    for length in [128 * 1024, 128 * 1024 + 1, 1024 * 1024, 3_000_001] {
        let sent = content(length);
        fixture.write("large", &sent);
        let got = fixture.exchange("/large", None, Exchange::answer);
        assert!(got.complete && got.body == sent, "{length}");
        assert_eq!(got.header("content-length"), Some(&*length.to_string()));
    }
    assert!(fixture.lines().is_empty());
}

/// Sends a file to a client with this socket, which reads its answer while the file is sent. Returns the body that came by the socket and
/// then by the channel, and whether it was complete.
fn sent_directly(fixture: &Fixture, read: impl FnOnce(&mut UnixStream, &mut Vec<u8>) + Send) -> (Vec<u8>, bool) {
    let (socket, mut client) = UnixStream::pair().unwrap();
    let (mut got, complete) = fixture.exchange("/large", Some(socket), |exchange| {
        std::thread::scope(|scope| {
            let take = move || {
                let mut got = Vec::new();
                read(&mut client, &mut got);
                client.read_to_end(&mut got).unwrap();
                got
            };
            let reader = std::thread::Builder::new().name("reader".into()).spawn_scoped(scope, take).unwrap();
            let (mut rest, mut complete) = (Vec::new(), true);
            match exchange.taken() {
                Some(ResponsePart::Direct { unsent, then: Then::Pieces(pieces), .. }) => {
                    rest = unsent;
                    complete = Exchange::rest(&pieces, &mut rest);
                }
                Some(ResponsePart::Direct { unsent, then: Then::Ended, .. }) => rest = unsent,
                _ => complete = false,
            }
            // The client then sees the end.
            exchange.in_flight.writer.revoke();
            ([reader.join().unwrap(), rest].concat(), complete)
        })
    });
    let end = got.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    (got.split_off(end), complete)
}

#[test]
fn a_large_file_goes_straight_to_a_client_however_slowly_it_reads() {
    let fixture = Fixture::new();
    let sent = content(3_000_001);
    fixture.write("large", &sent);
    let (body, complete) = sent_directly(&fixture, |_, _| {});
    assert!(complete && body == sent);
    let (body, complete) = sent_directly(&fixture, |client, got| {
        let mut bytes = [0; 40_000];
        for _ in 0..10 {
            let turns = fixture.log.turns.load(Ordering::SeqCst);
            wait_for_turns(&fixture, turns + 1);
            client.read_exact(&mut bytes).unwrap();
            got.extend_from_slice(&bytes);
        }
    });
    assert!(complete && body == sent);
    assert!(fixture.lines().is_empty());
}

#[test]
fn an_answer_that_goes_straight_is_cut_when_its_file_changes() {
    let fixture = Fixture::new();
    let path = fixture.path("large");
    let shorten = || fs::File::options().append(true).open(&path).unwrap().set_len(2_000_000).unwrap();
    let rewrite = || {
        let file = fs::File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"!", 2_500_000).unwrap();
    };
    let changes: [(&(dyn Fn() + Sync), _); 2] = [(&shorten, "the file became shorter"), (&rewrite, "the file was rewritten")];
    for (change, why) in changes {
        fixture.write("large", content(3_000_001));
        let (body, complete) = sent_directly(&fixture, |_, _| {
            wait_for_turns(&fixture, fixture.log.turns.load(Ordering::SeqCst) + 1);
            change();
        });
        assert!(!complete && body.len() < 3_000_001, "{why}: {}", body.len());
        let lines = fixture.lines();
        assert!(lines[0].ends_with(&format!("the answer was cut short: {why}")), "{lines:?}");
    }
}

/// Waits until the worker has had so many turns while it waits for its client.
fn wait_for_turns(fixture: &Fixture, turns: usize) {
    let start = Instant::now();
    while fixture.log.turns.load(Ordering::SeqCst) < turns {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn a_part_of_a_file_of_many_gigabytes_is_read_from_its_place() {
    let fixture = Fixture::new();
    let path = fixture.path("huge.iso");
    let file = fs::File::create(&path).unwrap();
    file.set_len(20 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"here", (15 << 30) + 1).unwrap();
    drop(file);
    set_age(&path, 1000);
    let head = fixture.ask(&mut fixture.site(), "HEAD", "/huge.iso", &[]);
    assert_eq!(head.header("content-length"), Some("21474836480"));
    let part = fixture.get("/huge.iso", &["range: bytes=16106127361-16106127364"]);
    assert_eq!((part.status, part.text()), (206, "here"));
    assert_eq!(part.header("content-range"), Some("bytes 16106127361-16106127364/21474836480"));
}

/// Sends a file of 2 MiB, changes it once its answer has begun, and returns the rest of the answer, and whether it was complete.
fn changed_while_sent(fixture: &Fixture, change: impl FnOnce(&Path)) -> (Vec<u8>, bool) {
    fixture.write("large", content(2 << 20));
    fixture.exchange("/large", None, |exchange| {
        let (status, bytes, pieces) = exchange.begun();
        assert_eq!(status, 200);
        let head = bytes.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
        change(&fixture.path("large"));
        let mut body = bytes[head..].to_vec();
        let complete = Exchange::rest(&pieces.unwrap(), &mut body);
        (body, complete)
    })
}

#[test]
fn an_answer_is_cut_when_its_file_shrinks_or_is_rewritten_and_never_exceeds_its_length() {
    let fixture = Fixture::new();
    let open = |path: &Path| fs::File::options().append(true).open(path).unwrap();
    for length in [0, 100_000, 1_500_000] {
        let (body, complete) = changed_while_sent(&fixture, |path| open(path).set_len(length).unwrap());
        assert!(!complete && body.len() < 2 << 20, "{length}: {}", body.len());
        let lines = fixture.lines();
        assert!(lines[0].ends_with("(request 0123456789ab-1f): the answer was cut short: the file became shorter"), "{lines:?}");
    }
    let (body, complete) = changed_while_sent(&fixture, |path| {
        std::os::unix::fs::FileExt::write_all_at(&fs::File::options().write(true).open(path).unwrap(), &[b'!'; 1000], 2_000_000)
            .unwrap();
    });
    assert!(!complete && body.len() < 2 << 20, "{}", body.len());
    assert!(fixture.lines()[0].ends_with("the file was rewritten"));
    let (body, complete) = changed_while_sent(&fixture, |path| io::Write::write_all(&mut open(path), &[b'!'; 500_000]).unwrap());
    assert!(complete && body == content(2 << 20));
    let (body, complete) = changed_while_sent(&fixture, |path| {
        fs::write(path.with_extension("new"), "new").unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    });
    assert!(complete && body == content(2 << 20));
    assert!(fixture.lines().is_empty());
}

#[test]
fn a_file_that_shrinks_before_the_first_byte_is_an_error() {
    let fixture = Fixture::new();
    fixture.write("a", "0123456789");
    let mut site = fixture.site();
    let Ok(Entry::File(file)) = site.root.find(b"a") else { panic!() };
    fixture.write("a", "01234");
    let (request, exchange) = request("GET", "/site/a", &[], None);
    Transfer { status: 200, head: status_line(200), offset: 0, length: 10 }.send(request, &file, &mut site.buffer, &fixture.log);
    let got = exchange.answer();
    assert!(got.status == 503 && got.header("retry-after") == Some("1") && got.text().contains("file_changed"), "{}", got.text());
    assert!(fixture.lines()[0].ends_with("the file became shorter while it was read"));
}

#[test]
fn a_client_that_takes_nothing_lets_the_worker_have_its_turns_and_be_interrupted() {
    let fixture = Fixture::new();
    fixture.write("large", content(2 << 20));
    let wait = |turns| wait_for_turns(&fixture, turns);
    let complete = fixture.exchange("/large", None, |exchange| {
        wait(2);
        fixture.log.interrupts.store(true, Ordering::SeqCst);
        wait(3);
        let (_, mut bytes, pieces) = exchange.begun();
        Exchange::rest(&pieces.unwrap(), &mut bytes)
    });
    assert!(!complete);
    assert!(fixture.lines()[0].ends_with("the answer was cut short: the plugin is to stop"));
    fixture.log.interrupts.store(false, Ordering::SeqCst);
    // One that has gone is no fault of the site.
    fixture.exchange("/large", None, |exchange| {
        wait(fixture.log.turns.load(Ordering::SeqCst) + 1);
        exchange.in_flight.cancel();
    });
    fixture.exchange("/large", None, |exchange| drop(exchange.begun()));
    assert!(fixture.lines().is_empty());
}
