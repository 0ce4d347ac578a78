//! What is answered for a file: validators, ranges, codings, pages.

use super::*;

#[test]
fn a_file_has_its_type_length_and_validators_and_head_has_the_same_head() {
    let fixture = Fixture::new();
    fixture.write("a b/page.html", "<p>hello").write("empty", "");
    let got = fixture.get("/a%20b/page.html?query", &[]);
    assert_eq!((got.status, got.text(), got.complete), (200, "<p>hello", true));
    for (name, value) in [
        ("content-type", "text/html; charset=utf-8"),
        ("content-length", "8"),
        ("accept-ranges", "bytes"),
        ("x-content-type-options", "nosniff"),
        ("vary", "accept-encoding"),
    ] {
        assert_eq!(got.header(name), Some(value), "{}", got.head);
    }
    assert!(got.header("etag").unwrap().starts_with('"'), "{}", got.head);
    assert!(got.header("last-modified").unwrap().ends_with(" GMT") && got.header("date").is_some(), "{}", got.head);
    assert_eq!(got.header("cache-control"), None);

    let head = fixture.ask(&mut fixture.site(), "HEAD", "/a%20b/page.html", &["range: bytes=0-1"]);
    let without_date =
        |answer: &Answer| answer.head.lines().filter(|line| !line.starts_with("date")).collect::<Vec<_>>().join("\n");
    assert_eq!((without_date(&head), head.body.len()), (without_date(&got), 0));

    let empty = fixture.get("/empty", &[]);
    assert_eq!((empty.status, empty.header("content-length"), empty.text()), (200, Some("0"), ""));
    assert_eq!(empty.header("content-type"), Some("application/octet-stream"));
    assert!(fixture.lines().is_empty());
}

#[test]
fn a_known_version_is_304_and_another_than_demanded_412() {
    let fixture = Fixture::new();
    fixture.write("a.css", "1");
    let options = SiteOptions { cache_control: Some("max-age=60".into()), ..fixture.options() };
    let mut site = Site::open(&options).unwrap();
    let mut ask = |method, lines: &[&str]| fixture.ask(&mut site, method, "/a.css", lines);
    let first = ask("GET", &[]);
    assert_eq!(first.header("cache-control"), Some("max-age=60"));
    let (etag, date) = (first.header("etag").unwrap(), first.header("last-modified").unwrap());
    for method in ["GET", "HEAD"] {
        for line in [format!("if-none-match: {etag}"), format!("if-modified-since: {date}")] {
            let got = ask(method, &[&line]);
            assert_eq!((got.status, got.body.len()), (304, 0), "{line}");
            for name in ["etag", "last-modified", "cache-control", "vary"] {
                assert_eq!(got.header(name), first.header(name), "{name}");
            }
            assert!(
                got.header("content-length").is_none() && got.header("content-type").is_none() && got.header("date").is_some()
            );
        }
        for line in ["if-match: \"other\"", "if-unmodified-since: Thu, 01 Jan 1970 00:00:00 GMT"] {
            let got = ask(method, &[line]);
            assert_eq!((got.status, got.header("cache-control")), (412, Some("no-store")), "{line}");
        }
    }
    fixture.write("a.css", "2");
    let changed = ask("GET", &[&format!("if-none-match: {etag}")]);
    assert_eq!((changed.status, changed.text()), (200, "2"));
    assert_ne!(changed.header("etag"), Some(etag));

    // One that was written a moment ago.
    fs::write(fixture.path("a.css"), "3").unwrap();
    fs::File::options().write(true).open(fixture.path("a.css")).unwrap().set_modified(SystemTime::now() + PATIENCE).unwrap();
    assert!(ask("GET", &[]).header("etag").unwrap().starts_with("W/\""));
}

#[test]
fn a_range_is_a_part_and_several_are_the_whole() {
    let fixture = Fixture::new();
    fixture.write("a.bin", "0123456789");
    let whole = fixture.get("/a.bin", &[]);
    let etag = whole.header("etag").unwrap();
    for (lines, range, body) in [
        (&["range: bytes=2-4"][..], "bytes 2-4/10", "234"),
        (&["range: bytes=-3"], "bytes 7-9/10", "789"),
        (&["range: bytes=0-99"], "bytes 0-9/10", "0123456789"),
        (&["range: bytes=9-", &format!("if-range: {etag}")], "bytes 9-9/10", "9"),
    ] {
        let got = fixture.get("/a.bin", lines);
        assert_eq!((got.status, got.header("content-range"), got.text()), (206, Some(range), body), "{lines:?}");
        assert_eq!(got.header("content-length"), Some(&*body.len().to_string()));
        assert_eq!(got.header("etag"), Some(etag));
    }
    for lines in [
        &["range: bytes=0-1,3-4"][..],
        &["range: bytes=x"],
        &["range: bytes=2-4", "if-range: \"other\""],
        &["range: bytes=99-", "if-range: \"other\""],
    ] {
        let got = fixture.get("/a.bin", lines);
        assert_eq!((got.status, got.text(), got.header("content-range")), (200, "0123456789", None), "{lines:?}");
    }
    let none = fixture.get("/a.bin", &["range: bytes=10-", "accept: text/html"]);
    assert_eq!((none.status, none.header("content-range")), (416, Some("bytes */10")));
    assert!(none.text().contains("Error 416") && none.header("content-length") == Some(&*none.body.len().to_string()));
    let known = fixture.get("/a.bin", &["range: bytes=10-", &format!("if-none-match: {etag}")]);
    assert_eq!(known.status, 304);
}

#[test]
fn a_compressed_file_beside_it_is_sent_to_those_who_accept_it() {
    let fixture = Fixture::new();
    fixture.write("a.js", "plain").write("a.js.br", "brotli").write("a.js.gz", "gzip").write("a.js.zst", "zstd");
    fixture
        .write("b.js", "plain")
        .write("b.js.gz", "gzip")
        .write("b.js.br", "old")
        .write("p.png", "plain")
        .write("p.png.gz", "gzip");
    set_age(&fixture.path("b.js.br"), 2000);
    fs::create_dir(fixture.path("a.js.gz.br")).unwrap();
    let mut tags = Vec::new();
    for (path, accept, coding, body) in [
        ("/a.js", "gzip, deflate, br, zstd", Some("br"), "brotli"),
        ("/a.js", "gzip;q=1, br;q=0.5", Some("gzip"), "gzip"),
        ("/a.js", "zstd", Some("zstd"), "zstd"),
        ("/a.js", "br;q=0", None, "plain"),
        ("/b.js", "br, gzip;q=0.1", Some("gzip"), "gzip"),
        ("/b.js", "br", None, "plain"),
        ("/p.png", "gzip", None, "plain"),
    ] {
        let got = fixture.get(path, &[&format!("accept-encoding: {accept}")]);
        assert_eq!((got.status, got.header("content-encoding"), got.text()), (200, coding, body), "{path} {accept}");
        assert_eq!(got.header("content-length"), Some(&*body.len().to_string()));
        let js = path.ends_with(".js");
        assert_eq!(got.header("vary"), js.then_some("accept-encoding"), "{path}");
        assert_eq!(got.header("content-type"), Some(if js { "text/javascript; charset=utf-8" } else { "image/png" }));
        tags.push(got.header("etag").unwrap().to_owned());
    }
    tags[..4].sort();
    assert!(tags[..4].windows(2).all(|two| two[0] != two[1]), "{tags:?}");
    let part = fixture.get("/a.js", &["accept-encoding: br", "range: bytes=1-2"]);
    assert_eq!((part.status, part.header("content-range"), part.text()), (206, Some("bytes 1-2/6"), "ro"));
    fixture.link("../secret.txt", "b.js.zst");
    assert_eq!(fixture.get("/b.js", &["accept-encoding: zstd"]).text(), "plain");
    // A compressor may copy the time of the plain file in whole seconds.
    for (path, nanoseconds) in [("c.js", 999_999_999), ("c.js.br", 0)] {
        fixture.write(path, path);
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, nanoseconds);
        fs::File::options().write(true).open(fixture.path(path)).unwrap().set_modified(time).unwrap();
    }
    assert_eq!(fixture.get("/c.js", &["accept-encoding: br"]).text(), "c.js.br");
    // An index has its compressed files too.
    fixture.write("index.html", "plain").write("index.html.br", "brotli");
    assert_eq!(fixture.get("/", &["accept-encoding: br"]).text(), "brotli");
}

#[test]
fn an_unknown_path_of_a_single_page_application_shows_its_index_to_browsers() {
    let fixture = Fixture::new();
    fixture.write("index.html", "app").write("assets/a.js", "script").write(".env", "HIDDEN");
    let mut site = Site::open(&SiteOptions { spa: true, ..fixture.options() }).unwrap();
    let mut ask = |path, accept: &str| fixture.ask(&mut site, "GET", path, &[&format!("accept: {accept}")]);
    for path in ["/users/7", "/users/7/", "/a.b.c", "/assets/", "/index.html/x"] {
        let got = ask(path, "text/html,*/*;q=0.8");
        assert_eq!((got.status, got.text(), got.header("vary")), (200, "app", Some("accept, accept-encoding")), "{path}");
        assert_eq!(ask(path, "*/*").status, 404, "{path}");
    }
    assert_eq!(ask("/assets/a.js", "text/html").text(), "script");
    assert_eq!(ask("/", "text/html").header("vary"), Some("accept-encoding"));
    for path in ["/.env", "/../secret.txt", "/%2e%2e/secret.txt"] {
        assert_eq!(ask(path, "text/html").status, 404, "{path}");
    }
    fs::remove_file(fixture.path("index.html")).unwrap();
    assert_eq!(ask("/users/7", "text/html").status, 404);
}

#[test]
fn a_site_has_its_own_page_for_404() {
    let fixture = Fixture::new();
    fixture.write("404.html", "<p>nothing").write(".env", "HIDDEN");
    for path in ["/missing", "/.env", "/missing/"] {
        for (method, body) in [("GET", "<p>nothing"), ("HEAD", "")] {
            let got = fixture.ask(&mut fixture.site(), method, path, &["range: bytes=0-1", "if-none-match: *"]);
            assert_eq!((got.status, got.text(), got.header("content-length")), (404, body, Some("10")), "{path}");
            assert_eq!(got.header("content-type"), Some("text/html; charset=utf-8"));
            assert_eq!((got.header("cache-control"), got.header("etag")), (Some("no-store"), None));
        }
    }
    assert_eq!(fixture.get("/404.html", &[]).status, 200);
}

#[test]
fn files_are_only_read() {
    let fixture = Fixture::new();
    fixture.write("a", "a");
    for path in ["/a", "/missing", "/", ""] {
        let options = fixture.ask(&mut fixture.site(), "OPTIONS", path, &[]);
        assert_eq!((options.status, options.header("allow"), options.body.len()), (204, Some("GET, HEAD, OPTIONS"), 0));
        for method in ["POST", "PUT", "DELETE", "PATCH", "PROPFIND", "get"] {
            let got = fixture.ask(&mut fixture.site(), method, path, &[]);
            assert_eq!((got.status, got.header("allow")), (405, Some("GET, HEAD, OPTIONS")), "{method} {path}");
        }
    }
}
