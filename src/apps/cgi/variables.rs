//! The variables by which a script learns of a request: those of RFC 3875, section 4.1, and the others that nginx's `fastcgi_params` has.

use super::scripts::Script;
use crate::http::Request;
use crate::http::prefix::Mount;
use crate::http::request::{header_lines, split_head, split_target};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Headers that do not become a variable of their own. `proxy` would be read as a setting by many programs (CVE-2016-5385).
const LEFT_OUT: [&[u8]; 4] = [b"content-type", b"content-length", b"x-request-id", b"proxy"];

/// Names and values.
pub(crate) type Variables = Vec<(Vec<u8>, Vec<u8>)>;

/// The variables for a request whose body has so many bytes, if that is known.
pub(crate) fn variables(request: &Request, script: &Script, root: &Path, length: Option<u64>) -> Variables {
    let (method, target, lines) = split_head(&request.head);
    let (_, query) = split_target(target);
    let (route, https) = (Mount::of(request).route, request.origin.https);
    let host = request.header("host").unwrap_or_default();
    let (name, port) = split_host(host);
    let mut variables = Variables::with_capacity(48);
    let mut put = |name: &str, value: &[u8]| variables.push((name.as_bytes().to_vec(), value.to_vec()));
    let script_name = [route.as_bytes(), &script.name].concat();
    put("GATEWAY_INTERFACE", b"CGI/1.1");
    put("SERVER_SOFTWARE", concat!("plugrack/", env!("CARGO_PKG_VERSION")).as_bytes());
    put("SERVER_PROTOCOL", b"HTTP/1.1");
    put("SERVER_NAME", name.as_bytes());
    put("SERVER_PORT", port.unwrap_or(if https { "443" } else { "80" }).as_bytes());
    put("REQUEST_METHOD", method.as_bytes());
    put("REQUEST_SCHEME", if https { b"https" } else { b"http" });
    if https {
        put("HTTPS", b"on");
    }
    put("REQUEST_URI", target.as_bytes());
    put("DOCUMENT_URI", &[&script_name[..], &script.info].concat());
    put("DOCUMENT_ROOT", root.as_os_str().as_bytes());
    put("QUERY_STRING", query.unwrap_or_default().as_bytes());
    put("SCRIPT_FILENAME", root.join(std::ffi::OsStr::from_bytes(&script.file)).as_os_str().as_bytes());
    put("SCRIPT_NAME", &script_name);
    if !script.info.is_empty() {
        put("PATH_INFO", &script.info);
    }
    put("REMOTE_ADDR", request.origin.address.map(|address| address.to_string()).unwrap_or_default().as_bytes());
    // PHP answers nothing without it if it is built with `--enable-force-cgi-redirect`.
    put("REDIRECT_STATUS", b"200");
    put("CONTENT_TYPE", request.header("content-type").unwrap_or_default().as_bytes());
    if let Some(length) = length.filter(|length| *length > 0 || request.declares_body) {
        put("CONTENT_LENGTH", length.to_string().as_bytes());
    }
    put("HTTP_X_REQUEST_ID", request.id().as_bytes());
    // A name with `_` would be the variable of another header, with `-`.
    let headers = header_lines(lines).filter(|(name, _)| !LEFT_OUT.contains(name) && !name.contains(&b'_'));
    for (name, value) in headers {
        let name: Vec<u8> = b"HTTP_".iter().chain(name).map(|&byte| variable_byte(byte)).collect();
        // The values of a header that comes several times are one list (RFC 9110, section 5.3).
        match variables.iter_mut().find(|(each, _)| *each == name) {
            Some((_, values)) => {
                values.extend_from_slice(if name == b"HTTP_COOKIE" { b"; " } else { b", " });
                values.extend_from_slice(value);
            }
            None => variables.push((name, value.to_vec())),
        }
    }
    variables
}

/// A byte of a header's name in that of its variable.
fn variable_byte(byte: u8) -> u8 {
    if byte.is_ascii_alphanumeric() { byte.to_ascii_uppercase() } else { b'_' }
}

/// The name and the port in the value of `host`.
fn split_host(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        // Colons inside brackets are an address's (RFC 3986, section 3.2.2).
        Some((name, port)) if !port.contains(']') => (name, Some(port).filter(|port| !port.is_empty())),
        _ => (host, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::request::tests::request;
    use crate::http::request::{BodyLength, Origin};

    const ORIGIN: Origin = Origin { address: None, https: false, proxied: false };

    fn script(name: &str, info: &str) -> Script {
        Script { file: name.trim_start_matches('/').into(), name: name.into(), info: info.into() }
    }

    fn of(head: &str, mount: usize, length: u64, origin: Origin, script: &Script) -> Vec<(String, String)> {
        let request = request(head.as_bytes().to_vec(), mount, BodyLength::Known(length), origin);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let variables = variables(&request, script, Path::new("/srv/wiki"), Some(length));
        variables.into_iter().map(|(name, value)| (text(name), text(value))).collect()
    }

    #[track_caller]
    fn assert_has(variables: &[(String, String)], expected: &[(&str, Option<&str>)]) {
        for (name, value) in expected {
            let found: Vec<&str> = variables.iter().filter(|(each, _)| each == name).map(|(_, value)| &**value).collect();
            assert_eq!(found, value.iter().copied().collect::<Vec<_>>(), "{name}");
        }
    }

    #[test]
    fn a_script_is_told_what_a_web_server_tells() {
        let head = "POST /wiki/a.php/in%20fo?x=1&y=%20 HTTP/1.1\r\nhost: h.example:8443\r\ncontent-type: text/plain\r\n\
             cookie: a=1\r\ncookie: b=2\r\naccept: text/html\r\naccept: */*\r\nx-request-id: theirs\r\n";
        let origin = Origin { address: Some([192, 0, 2, 1].into()), https: true, proxied: false };
        let variables = of(head, 5, 7, origin, &script("/a.php", "/in fo"));
        assert_has(
            &variables,
            &[
                ("REQUEST_METHOD", Some("POST")),
                ("REQUEST_URI", Some("/wiki/a.php/in%20fo?x=1&y=%20")),
                ("QUERY_STRING", Some("x=1&y=%20")),
                ("SCRIPT_NAME", Some("/wiki/a.php")),
                ("SCRIPT_FILENAME", Some("/srv/wiki/a.php")),
                ("PATH_INFO", Some("/in fo")),
                ("DOCUMENT_URI", Some("/wiki/a.php/in fo")),
                ("DOCUMENT_ROOT", Some("/srv/wiki")),
                ("SERVER_NAME", Some("h.example")),
                ("SERVER_PORT", Some("8443")),
                ("SERVER_PROTOCOL", Some("HTTP/1.1")),
                ("GATEWAY_INTERFACE", Some("CGI/1.1")),
                ("REQUEST_SCHEME", Some("https")),
                ("HTTPS", Some("on")),
                ("REMOTE_ADDR", Some("192.0.2.1")),
                ("REDIRECT_STATUS", Some("200")),
                ("CONTENT_TYPE", Some("text/plain")),
                ("CONTENT_LENGTH", Some("7")),
                ("HTTP_HOST", Some("h.example:8443")),
                ("HTTP_COOKIE", Some("a=1; b=2")),
                ("HTTP_ACCEPT", Some("text/html, */*")),
                ("HTTP_X_REQUEST_ID", Some("0123456789ab-1f")),
                ("HTTP_CONTENT_TYPE", None),
            ],
        );
    }

    #[test]
    fn what_is_not_there_is_left_out_and_ports_have_defaults() {
        let variables = of("GET / HTTP/1.1\r\nhost: h\r\n", 0, 0, ORIGIN, &script("/index.php", ""));
        let expected = [
            ("SERVER_PORT", Some("80")),
            ("HTTPS", None),
            ("PATH_INFO", None),
            ("CONTENT_LENGTH", None),
            ("CONTENT_TYPE", Some("")),
            ("QUERY_STRING", Some("")),
            ("REMOTE_ADDR", Some("")),
            ("SCRIPT_NAME", Some("/index.php")),
        ];
        assert_has(&variables, &expected);
        for (host, name, port) in
            [("[::1]:8080", "[::1]", Some("8080")), ("[::1]", "[::1]", None), ("h:", "h", None), ("", "", None)]
        {
            assert_eq!(split_host(host), (name, port), "{host}");
        }
    }

    #[test]
    fn no_header_stands_for_another_or_for_a_setting() {
        let head = "GET / HTTP/1.1\r\nhost: h\r\nproxy: http://evil\r\nx_real: 1\r\nx-real: 2\r\nhttps: off\r\nx.y~z: 3\r\n";
        let variables = of(head, 0, 0, ORIGIN, &script("", "/"));
        let expected = [
            ("HTTP_PROXY", None),
            ("HTTP_X_REAL", Some("2")),
            ("HTTPS", None),
            ("HTTP_HTTPS", Some("off")),
            ("HTTP_X_Y_Z", Some("3")),
        ];
        assert_has(&variables, &expected);
    }
}
