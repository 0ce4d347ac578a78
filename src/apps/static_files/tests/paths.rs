//! Which paths lead to a file, and which never do.

use super::*;

#[test]
fn a_directory_shows_its_index_and_is_never_listed() {
    let fixture = Fixture::new();
    fixture.write("index.html", "start").write("docs/index.html", "docs").write("bare/a.txt", "a").write("old/main.htm", "old");
    fs::create_dir(fixture.path("old/index.html")).unwrap();
    for (path, text) in [("/", "start"), ("/docs/", "docs"), ("/docs/?a=b", "docs")] {
        let got = fixture.get(path, &[]);
        assert_eq!((got.status, got.text()), (200, text), "{path}");
        assert_eq!(got.header("content-type"), Some("text/html; charset=utf-8"));
    }
    for path in ["/bare/", "/old/", "/missing/", "/index.html/", "/bare/a.txt/", "/bare/a.txt/b"] {
        assert_eq!(fixture.get(path, &[]).status, 404, "{path}");
    }
    let options = SiteOptions { index: vec!["index.html".into(), "main.htm".into()], ..fixture.options() };
    assert_eq!(fixture.ask(&mut Site::open(&options).unwrap(), "GET", "/old/", &[]).text(), "old");
    let none = SiteOptions { index: Vec::new(), ..fixture.options() };
    assert_eq!(fixture.ask(&mut Site::open(&none).unwrap(), "GET", "/", &[]).status, 404);
}

#[test]
fn a_directory_without_its_slash_is_redirected_below_the_route_with_its_query() {
    let fixture = Fixture::new();
    fixture.write("d%e/sub/index.html", "");
    for (path, location) in [
        ("", "/site/"),
        ("?a=b?c", "/site/?a=b?c"),
        ("/d%25e", "/site/d%25e/"),
        ("/d%25e/sub?q=%2F", "/site/d%25e/sub/?q=%2F"),
        ("/d%25e?", "/site/d%25e/?"),
    ] {
        let got = fixture.get(path, &[]);
        assert_eq!((got.status, got.header("location")), (308, Some(location)), "{path}");
        assert_eq!(got.header("cache-control"), Some("no-cache"));
    }
    // At the root of a host, two slashes at the beginning would name another host.
    for (path, status) in [("/d%25e", 308), ("//d%25e", 404), ("///d%25e", 404), ("/%2fd%25e", 404)] {
        let (mut request, exchange) = request("GET", path, &[], None);
        request.mount = 0;
        fixture.site().serve(request, &fixture.log);
        let got = exchange.answer();
        assert_eq!((got.status, got.header("location")), (status, (status == 308).then_some("/d%25e/")), "{path}");
    }
}

#[test]
fn names_that_are_never_served_are_404() {
    let fixture = Fixture::new();
    fixture.write("a/b.txt", "b").write(".env", "HIDDEN").write(".git/config", "HIDDEN").write("a/.b", "HIDDEN");
    fixture.write(".well-known/acme/token", "token").write(".well-known/.hidden", "HIDDEN").write("a/.well-known/x", "HIDDEN");
    assert_eq!(fixture.get("/.well-known/acme/token", &[]).text(), "token");
    for path in [
        "/.env",
        "/%2eenv",
        "/.git/config",
        "/.git/",
        "/.git",
        "/a/.b",
        "/.well-known/.hidden",
        "/a/.well-known/x",
        "/../secret.txt",
        "/a/../../secret.txt",
        "/%2e%2e/secret.txt",
        "/a/%2E%2E/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e%2fsecret.txt",
        "/..%5csecret.txt",
        "/..\\secret.txt",
        "/a%2fb.txt",
        "/a//b.txt",
        "//a/b.txt",
        "/./a/b.txt",
        "/a/./b.txt",
        "/a/b.txt%00",
        "/%00",
        "/a/b.txt%",
        "/%zz",
        "/%252e%252e/secret.txt",
        "/a/b.txt/",
        "/missing",
    ] {
        let got = fixture.get(path, &[]);
        assert_eq!(got.status, 404, "{path}");
        assert!(got.text().contains("not_found"), "{path}: {}", got.text());
    }
    for path in [format!("/{}", "a".repeat(300)), "/a".repeat(3000)] {
        assert_eq!(fixture.get(&path, &[]).status, 404);
    }
    assert!(fixture.lines().is_empty());
}

#[test]
fn links_are_followed_inside_the_root_alone() {
    let fixture = Fixture::new();
    fixture.write("real/page.txt", "page");
    fs::create_dir(fixture.outside("other")).unwrap();
    fs::write(fixture.outside("other/index.html"), "SECRET").unwrap();
    fixture.link("real/page.txt", "file");
    fixture.link("../real/./page.txt", "real/up");
    fixture.link("real", "directory");
    fixture.link("../root/real/page.txt", "out-and-in");
    fixture.link("../secret.txt", "out");
    fixture.link("../other", "out-directory");
    fixture.link(fixture.outside("secret.txt"), "absolute");
    fixture.link(fixture.path("real/page.txt"), "absolute-inside");
    fixture.link("/proc/self/root/etc/passwd", "magic");
    fixture.link("nowhere", "dangling");
    fixture.link("circle", "circle");
    fixture.link("out", "twice");
    for path in ["/file", "/real/up", "/directory/page.txt", "/directory/up"] {
        assert_eq!(fixture.get(path, &[]).text(), "page", "{path}");
    }
    assert_eq!(fixture.get("/dangling", &[]).status, 404);
    assert!(fixture.lines().is_empty());
    for path in [
        "/out",
        "/out-directory/",
        "/out-directory/index.html",
        "/out-directory",
        "/absolute",
        "/absolute-inside",
        "/magic",
        "/twice",
        "/out-and-in",
    ] {
        let got = fixture.get(path, &[]);
        assert_eq!(got.status, 404, "{path}");
        assert!(!got.text().contains("SECRET"));
        let lines = fixture.lines();
        let expected =
            format!("GET /site{path} (request 0123456789ab-1f): a symbolic link leads out of the root, or is absolute");
        assert_eq!(lines, [expected]);
    }
    assert_eq!(fixture.get("/circle", &[]).status, 404);
    assert!(fixture.lines()[0].ends_with("its symbolic links lead in a circle"));
}

#[test]
fn what_is_no_file_is_404_and_makes_nobody_wait() {
    let fixture = Fixture::new();
    mknodat(CWD, fixture.path("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _socket = UnixListener::bind(fixture.path("socket")).unwrap();
    let mut paths = vec!["/fifo", "/socket"];
    // That of /dev/zero. It needs a privilege.
    if mknodat(CWD, fixture.path("device"), FileType::CharacterDevice, Mode::RWXU, makedev(1, 5)).is_ok() {
        paths.push("/device");
    }
    for path in paths {
        let got = fixture.get(path, &[]);
        // A file system may refuse to open a device at all.
        assert!(got.status == 404 || path == "/device" && got.status == 403, "{path}: {}", got.status);
        assert_eq!(fixture.lines().len(), 1, "{path}");
    }
}

#[test]
fn a_file_that_the_host_may_not_read_is_403() {
    let fixture = Fixture::new();
    fixture.write("locked", "SECRET");
    fs::set_permissions(fixture.path("locked"), std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    // The superuser reads it nevertheless.
    if fs::read(fixture.path("locked")).is_err() {
        let got = fixture.get("/locked", &[]);
        assert!(got.status == 403 && got.text().contains("forbidden"), "{}", got.text());
        assert!(fixture.lines()[0].contains("the host may not read it"));
    }
}

#[test]
fn a_root_that_is_replaced_is_served_a_moment_later() {
    let fixture = Fixture::new();
    fixture.write("a", "old");
    let mut site = fixture.site();
    let hour = Duration::from_secs(3600);
    let later = Instant::now() + hour;
    fs::rename(fixture.outside("root"), fixture.outside("before")).unwrap();
    site.root.refresh(later);
    assert_eq!(fixture.ask(&mut site, "GET", "/a", &[]).text(), "old");
    fixture.write("a", "new");
    site.root.refresh(later);
    assert_eq!(fixture.ask(&mut site, "GET", "/a", &[]).text(), "old");
    site.root.refresh(later + hour);
    assert_eq!(fixture.ask(&mut site, "GET", "/a", &[]).text(), "new");
    site.release();
    assert_eq!((fixture.ask(&mut site, "GET", "/a", &[]).text(), site.buffer.len()), ("new", 3));
}

#[test]
fn a_site_that_cannot_be_served_says_why() {
    let fixture = Fixture::new();
    fixture.write("file", "");
    let refused = |change: &dyn Fn(&mut SiteOptions)| {
        let mut options = fixture.options();
        change(&mut options);
        Site::open(&options).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let root = fixture.outside("root").display().to_string();
    let missing = refused(&|options| options.root.push("missing"));
    assert_eq!(
        missing,
        format!("the root {root}/missing cannot be opened as a directory: No such file or directory (os error 2)")
    );
    let file = refused(&|options| options.root.push("file"));
    assert!(file.ends_with("Not a directory (os error 20)"), "{file}");
    for name in ["", "..", "a/b", ".hidden", "/index.html"] {
        let message = refused(&|options| options.index.push(name.into()));
        assert_eq!(message, format!("index names {name:?}, which is not the name of a file without a leading dot"));
    }
    for value in ["", " ", "a\r\nx: y", "ä", "a\0"] {
        let message = refused(&|options| options.cache_control = Some(value.into()));
        assert!(message.starts_with(&format!("cache-control is {value:?}, which")), "{message}");
    }
}

proptest! {
    // Each case asks for many paths of a root of its own.
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn no_path_leaves_the_root(paths in prop::collection::vec(
        "(/|//|\\.|\\.\\.|%2e|%2E%2e|%2f|%5c|\\\\|%00|%252e|a|out|in|odir|abs|secret\\.txt|root|\\.env|index\\.html|\\?){0,10}", 40
    )) {
        let fixture = Fixture::new();
        fixture.write("a/index.html", "open").write(".env", "HIDDEN").write("a/.env", "HIDDEN");
        fixture.link("../secret.txt", "out");
        fixture.link("../secret.txt", "a/out");
        fixture.link("..", "odir");
        fixture.link("../..", "a/odir");
        fixture.link(fixture.directory.path(), "abs");
        fixture.link("a", "in");
        let mut site = Site::open(&SiteOptions { spa: true, ..fixture.options() }).unwrap();
        for path in paths {
            let got = fixture.ask(&mut site, "GET", &format!("/{path}"), &["accept: text/html"]);
            prop_assert!(matches!(got.status, 200 | 308 | 404), "{}: {}", path, got.status);
            prop_assert!(!got.text().contains("SECRET") && !got.text().contains("HIDDEN"), "{}", path);
            prop_assert!(got.status != 200 || got.text() == "open", "{}", path);
        }
    }
}
