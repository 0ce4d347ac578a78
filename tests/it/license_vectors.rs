//! The licence vectors that the SDKs of all languages read: made here from fixed keys, so that the file cannot drift from its meaning.

use crate::support::root;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use pasetors::keys::AsymmetricPublicKey;
use pasetors::token::{Public, UntrustedToken};
use pasetors::version4::{PublicToken, V4};
use plugrack_sdk::license::{Code, Keyring, MAX_TOKEN, Place, SigningKey, Standing, Time, verify};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;

/// Set to 1, the file is written anew instead of compared.
const WRITE: &str = "PLUGRACK_WRITE_VECTORS";

const FILE: &str = "tests/protocol/licenses.json";

const ASSERTION: &[u8] = b"plugrack/plugin-licence/v1";

/// Keys made for these vectors alone: two of the vendor's, another vendor's, and one that pretends to be the vendor's first.
const ACME_A: &str = "k4.secret.8EaBmZEuTV9HNV2m8dNt-JsGbbv1XefLS0RtPWXLQ8BtkPWhJ3CLXFcVdHpFajJw1p2mBo-cBK9jLgEU1CG3_g";
const ACME_B: &str = "k4.secret.20QkX3RZWCCHuR3RqP522Go3BfLUFOAY6-YUql0kGh2MjZp3FrNGiZkLuDu4rnTUVDt-2haR25IvBgyGh7lU9A";
const OTHER: &str = "k4.secret.USuLd_T6J4oBKEqBuFpCHkjjNW54o4UtChKx4n2UymbIbiYR4fLAsYHUId5XTcjsQnwdBzEBMLAZAxONhNbPaQ";
const IMPOSTOR: &str = "k4.secret.DRfsGwRRPFKB-Ci_TBQq1UiblC6lDUeUo9DgQeDgWqdNSSfXtD24o9U3Hc2taZFKhVAnKJKNDGSNvVfu24mbrg";

const PLUGIN: &str = "report";
const INSTANCE: &str = "5f0c3f0e-8a52-4c1e-9d55-0c6a4f0b7a11";
const ELSEWHERE: &str = "0b1f7c9a-3c8e-4f37-8f3c-6a1d2e5b9c44";

/// A time at which the usual licence is good.
const NOW: &str = "2026-10-01T12:00:00Z";

/// The usual licence.
fn claims() -> Value {
    json!({
        "v": 1, "jti": "b2d7e6a0-6a0e-4a46-9a55-5a3b1f0a9c01", "iss": "acme", "aud": PLUGIN, "inst": [INSTANCE], "sub": "Müller & Söhne",
        "iat": "2026-09-26T12:00:00Z", "exp": "2027-09-26T12:00:00Z", "grace_days": 14, "upd": "2027-09-26",
        "feat": ["export"], "lim": {"users": 25},
    })
}

/// The usual licence with some claims changed; null takes one away.
fn with(changes: &Value) -> String {
    let mut claims = claims();
    for (name, value) in changes.as_object().unwrap() {
        let object = claims.as_object_mut().unwrap();
        match value {
            Value::Null => drop(object.remove(name)),
            value => drop(object.insert(name.clone(), value.clone())),
        }
    }
    claims.to_string()
}

/// The usual licence with one more claim, as it would be written.
fn written(claim: &str) -> String {
    claims().to_string().replacen('{', &format!("{{{claim},"), 1)
}

fn sign(key: &str, payload: impl AsRef<[u8]>, footer: &str, assertion: &[u8]) -> String {
    let key = pasetors::keys::AsymmetricSecretKey::try_from(key).unwrap();
    PublicToken::sign(&key, payload.as_ref(), Some(footer.as_bytes()), Some(assertion)).unwrap()
}

/// A licence of the vendor's, with this payload.
fn licence(payload: impl AsRef<[u8]>) -> String {
    sign(ACME_A, payload, r#"{"kid":"acme-2026a"}"#, ASSERTION)
}

/// The usual licence with another footer, rightly signed.
fn footer(footer: &str) -> String {
    sign(ACME_A, claims().to_string(), footer, ASSERTION)
}

/// Changes a bit of a byte in the payload, signature or footer; a negative place counts from the end.
fn flip(token: &str, part: usize, at: isize, bit: u8) -> String {
    let mut parts: Vec<_> = token.split('.').map(str::to_owned).collect();
    let mut bytes = URL_SAFE_NO_PAD.decode(&parts[part]).unwrap();
    let at = at.rem_euclid(isize::try_from(bytes.len()).unwrap());
    bytes[usize::try_from(at).unwrap()] ^= 1 << bit;
    parts[part] = URL_SAFE_NO_PAD.encode(bytes);
    parts.join(".")
}

/// A licence of so many bytes.
fn sized(bytes: usize) -> String {
    let pad = |size: usize| licence(written(&format!("\"pad\":\"{}\"", "x".repeat(size))));
    (0..).map(|more| pad(bytes * 3 / 4 - 700 + more)).find(|token| token.len() >= bytes).unwrap()
}

/// The cases under construction.
#[derive(Default)]
struct Cases(Vec<Value>);

impl Cases {
    /// A token in the usual place.
    fn add(&mut self, name: &str, token: impl Into<Value>, expect: &str) {
        self.at(name, token, &json!({}), expect);
    }

    /// A token in a place that differs from the usual one.
    fn at(&mut self, name: &str, token: impl Into<Value>, place: &Value, expect: &str) {
        let (expect, days) =
            expect.split_once(' ').map_or((expect, None), |(expect, days)| (expect, Some(days.parse::<u32>().unwrap())));
        let mut case = json!({
            "name": name, "token": token.into(), "plugin": PLUGIN, "instance": INSTANCE, "release_date": "2026-09-01",
            "now": NOW, "not_before_time": null, "expect": expect, "days_left": days,
        });
        for (field, value) in place.as_object().unwrap() {
            assert!(case.get(field).is_some(), "{name}: {field}");
            case[field] = value.clone();
        }
        self.0.push(case);
    }
}

fn vectors() -> Value {
    let mut cases = Cases::default();
    let usual = licence(claims().to_string());
    let changed = |changes: &Value| licence(with(changes));

    // 1: there, trimmed, not too long.
    cases.add("a licence that is good", &*usual, "valid");
    cases.add("no licence", Value::Null, "missing");
    cases.add("an empty one", "", "missing");
    cases.add("white space alone", " \t\r\n\u{c} ", "missing");
    cases.add("white space around it", format!("\r\n \t\u{c}{usual}\n\n"), "valid");
    cases.add("white space within it", usual.replacen("v4.public.", "v4.public. ", 1), "malformed");
    cases.add("white space that is not ASCII", format!("\u{a0}{usual}"), "malformed");
    cases.add("a vertical tab, which is no white space", format!("{usual}\u{b}"), "malformed");
    let longest = sized(MAX_TOKEN);
    assert_eq!(longest.len(), MAX_TOKEN);
    cases.add("8192 bytes", &*longest, "valid");
    cases.add("8192 bytes and white space around them", format!("  {longest}\n"), "valid");
    cases.add("more than 8192 bytes, rightly signed", sized(MAX_TOKEN + 1), "malformed");
    cases.add("far too long", "v4.public.".repeat(1000), "malformed");

    // 2: the form.
    for (name, token) in [
        ("no token at all", "hello".to_owned()),
        ("zero bytes", "\0\0\0\0".to_owned()),
        ("another purpose", usual.replacen("v4.public", "v4.local", 1)),
        ("another version of PASETO", usual.replacen("v4", "v3", 1)),
        ("the header in upper case", usual.replacen("v4.public", "V4.PUBLIC", 1)),
        ("the header with a bit flipped", usual.replacen('u', "t", 1)),
        ("the header alone", "v4.public.".to_owned()),
        (
            "no payload",
            usual.split('.').enumerate().map(|(i, part)| if i == 2 { "" } else { part }).collect::<Vec<_>>().join("."),
        ),
        ("no footer", usual.rsplit_once('.').unwrap().0.to_owned()),
        ("an empty footer", format!("{}.", usual.rsplit_once('.').unwrap().0)),
        ("a fifth part", format!("{usual}.e30")),
        ("a dot at the end", format!("{usual}.")),
        ("padding", format!("{usual}==")),
        ("a letter of the other base64 alphabet", usual.replacen("v4.public.e", "v4.public.+", 1)),
        ("a letter of no alphabet", usual.replacen("v4.public.e", "v4.public.é", 1)),
        ("too short for a signature", format!("v4.public.{}.eyJraWQiOiJhY21lLTIwMjZhIn0", URL_SAFE_NO_PAD.encode([1; 63]))),
        ("a signature without a payload", format!("v4.public.{}.eyJraWQiOiJhY21lLTIwMjZhIn0", URL_SAFE_NO_PAD.encode([1; 64]))),
        ("no base64 in the payload, and a key that is not known", {
            footer(r#"{"kid":"nobody"}"#).replacen("v4.public.e", "v4.public.!", 1)
        }),
    ] {
        cases.add(name, token, "malformed");
    }
    let trailing = footer(r#"{"kid":"acme-2026a","n":1}"#);
    assert!(URL_SAFE_NO_PAD.decode(trailing.rsplit_once('.').unwrap().1).unwrap().len() % 3 == 2);
    let (head, last) = trailing.split_at(trailing.len() - 1);
    let next = char::from(last.as_bytes()[0] + 1);
    cases.add("a footer that carries more", &*trailing, "valid");
    cases.add("bits behind the last byte", format!("{head}{next}"), "malformed");
    let padded = |size: usize| {
        let bare = r#"{"kid":"acme-2026a","note":""}"#;
        footer(&bare.replacen(r#""""#, &format!("\"{}\"", "x".repeat(size - bare.len())), 1))
    };
    cases.add("a footer of 256 bytes", padded(256), "valid");
    cases.add("a footer of 257 bytes", padded(257), "malformed");
    cases.add("a footer with spaces between", footer(" { \"kid\" : \"acme-2026a\" }\n"), "valid");
    cases.add("a footer with an escape", footer(r#"{"k\u0069d":"acme\u002d2026a"}"#), "valid");
    for (name, text) in [
        ("a footer that is not JSON", "acme-2026a"),
        ("a footer that is a list", r#"["acme-2026a"]"#),
        ("a footer that is a string", r#""acme-2026a""#),
        ("a footer with more behind it", r#"{"kid":"acme-2026a"}{}"#),
        ("a footer with a comma too many", r#"{"kid":"acme-2026a",}"#),
        ("a footer in Python's own words", r#"{"kid":"acme-2026a","n":NaN}"#),
        ("a footer with a byte order mark", "\u{feff}{\"kid\":\"acme-2026a\"}"),
        ("a footer without a key", r#"{"key":"acme-2026a"}"#),
        ("a footer whose key is a number", r#"{"kid":2026}"#),
        ("a footer whose key is null", r#"{"kid":null}"#),
        ("a footer whose key is empty", r#"{"kid":""}"#),
        ("a footer whose key has a space", r#"{"kid":"acme 2026a"}"#),
        ("a footer whose key ends its line", r#"{"kid":"acme-2026a\n"}"#),
        ("a footer whose key is not ASCII", r#"{"kid":"acmé"}"#),
        ("a footer whose key is there twice", r#"{"kid":"acme-2026a","kid":"acme-2026a"}"#),
        ("a footer with an object in it", r#"{"kid":"acme-2026a","x":{}}"#),
        ("a footer with a list in it", r#"{"kid":"acme-2026a","x":[]}"#),
    ] {
        cases.add(name, footer(text), "malformed");
    }
    let deep = format!(r#"{{"kid":"acme-2026a","x":{}1{}}}"#, "[".repeat(110), "]".repeat(110));
    cases.add("a footer with much in each other", footer(&deep), "malformed");
    let token = |footer: &[u8]| format!("{}.{}", usual.rsplit_once('.').unwrap().0, URL_SAFE_NO_PAD.encode(footer));
    cases.add("a footer that is not UTF-8", token(b"{\"kid\":\"acme-2026a\",\"x\":\"\xff\"}"), "malformed");
    cases.add("a key's name of 65 characters", footer(&json!({"kid": "k".repeat(65)}).to_string()), "malformed");

    // 3: the key.
    cases.add("a key's name of 64 characters, not known", footer(&json!({"kid": "k".repeat(64)}).to_string()), "unknown_key");
    cases.add("another vendor's key", sign(OTHER, claims().to_string(), r#"{"kid":"other-2026"}"#, ASSERTION), "unknown_key");
    cases.add("a key's name in another case", footer(r#"{"kid":"ACME-2026A"}"#), "unknown_key");
    cases.add("a name that every object has", footer(r#"{"kid":"constructor"}"#), "unknown_key");
    cases.add("another name that every object has", footer(r#"{"kid":"__proto__"}"#), "unknown_key");
    cases.add("the vendor's other key", sign(ACME_B, claims().to_string(), r#"{"kid":"acme-2026b"}"#, ASSERTION), "valid");

    // 4: the signature, before anything of the payload.
    cases.add(
        "another key under the same name",
        sign(IMPOSTOR, claims().to_string(), r#"{"kid":"acme-2026a"}"#, ASSERTION),
        "bad_signature",
    );
    cases.add(
        "the vendor's one key under the other's name",
        sign(ACME_B, claims().to_string(), r#"{"kid":"acme-2026a"}"#, ASSERTION),
        "bad_signature",
    );
    cases.add("signed for no purpose", sign(ACME_A, claims().to_string(), r#"{"kid":"acme-2026a"}"#, b""), "bad_signature");
    cases.add(
        "signed for another purpose",
        sign(ACME_A, claims().to_string(), r#"{"kid":"acme-2026a"}"#, b"plugrack/plugin-licence/v2"),
        "bad_signature",
    );
    cases.add("no JSON, wrongly signed", sign(IMPOSTOR, "no JSON", r#"{"kid":"acme-2026a"}"#, ASSERTION), "bad_signature");
    cases.add(
        "expired, for another plugin, wrongly signed",
        flip(&changed(&json!({"aud": "other", "exp": "2026-09-27T00:00:00Z"})), 2, -1, 0),
        "bad_signature",
    );
    for (part, places) in [("payload", [0, 1, 40, 120, -65]), ("signature", [-64, -40, -33, -32, -1])] {
        for at in places {
            cases.add(&format!("the {part} with a bit flipped at {at}"), flip(&usual, 2, at, 0), "bad_signature");
        }
    }
    for at in [8, 10, -3] {
        cases.add(&format!("the footer with a bit flipped at {at}, in the key's name"), flip(&usual, 3, at, 1), "unknown_key");
    }
    cases.add("the footer with a bit flipped in its form", flip(&usual, 3, 0, 0), "malformed");
    cases.add("the footer with a bit flipped in the name of kid", flip(&usual, 3, 3, 0), "malformed");
    cases.add("the footer with a bit flipped in what it carries beside", flip(&trailing, 3, -2, 0), "bad_signature");
    cases.add("a footer with a space more", token(b"{\"kid\":\"acme-2026a\"} "), "bad_signature");
    let halves: Vec<_> = [&usual, &changed(&json!({"sub": "another"}))]
        .map(|token| URL_SAFE_NO_PAD.decode(token.split('.').nth(2).unwrap()).unwrap())
        .into();
    let spliced = [&halves[0][..halves[0].len() - 64], &halves[1][halves[1].len() - 64..]].concat();
    cases.add(
        "the signature of another licence",
        format!("v4.public.{}.eyJraWQiOiJhY21lLTIwMjZhIn0", URL_SAFE_NO_PAD.encode(spliced)),
        "bad_signature",
    );

    // 5: the claims.
    for (name, payload) in [
        ("claims that are no JSON", b"hello".to_vec()),
        ("claims that are a list", b"[1]".to_vec()),
        ("claims that are null", b"null".to_vec()),
        ("claims that are a number", b"1".to_vec()),
        ("claims that are not UTF-8", [written("\"x\":\"").as_bytes(), b"\xff\"}"].concat()),
        ("claims with a byte order mark", format!("\u{feff}{}", claims()).into()),
        ("claims with more behind them", format!("{} x", claims()).into()),
        ("claims in Python's own words", written("\"x\":NaN").into()),
        ("claims with a number without bounds", written("\"x\":1e999").into()),
        ("claims with half a character", written(r#""x":"\ud800""#).into()),
        ("claims with a line end in a string", written("\"x\":\"\n\"").into()),
        ("a claim that is there twice", written("\"aud\":\"report\"").into()),
        ("an unknown claim that is there twice", written("\"x\":1,\"x\":2").into()),
        ("a limit that is there twice", with(&json!({"lim": {"a": 1, "b": 2}})).replace("\"b\"", "\"a\"").into()),
        ("claims 200 deep", written(&format!("\"x\":{}{}", "[".repeat(200), "]".repeat(200))).into()),
        ("claims 4000 deep", format!("{}{}", "[".repeat(4000), "]".repeat(2000)).into()),
    ] {
        cases.add(name, licence(payload), "malformed");
    }
    cases.add(
        "claims 100 deep, which nobody needs to know",
        licence(written(&format!("\"x\":{}{}", "[".repeat(99), "]".repeat(99)))),
        "valid",
    );
    cases.add("claims with spaces between", licence(serde_json::to_string_pretty(&claims()).unwrap()), "valid");
    cases.add(
        "unknown claims",
        changed(&json!({"seats": 5, "x": {"y": [false]}, "__proto__": {"v": 2}, "constructor": 1})),
        "valid",
    );
    cases.add("a perpetual licence", changed(&json!({"exp": null, "grace_days": null, "upd": null})), "valid");
    cases.add(
        "the claims that must be there and no others",
        licence(json!({"v": 1, "jti": "x", "iss": "acme", "aud": PLUGIN, "inst": [INSTANCE], "iat": NOW}).to_string()),
        "valid",
    );
    for name in ["v", "jti", "iss", "aud", "inst", "iat"] {
        cases.add(&format!("without {name}"), changed(&json!({ name: null })), "malformed");
    }
    for (name, values) in [
        ("v", vec![json!("1"), json!(true), json!([1]), json!(1.5)]),
        ("jti", vec![json!(1)]),
        ("iss", vec![json!({})]),
        ("aud", vec![json!([PLUGIN]), json!(1)]),
        ("inst", vec![json!(INSTANCE), json!([INSTANCE, 1]), json!({})]),
        ("sub", vec![json!(1)]),
        ("iat", vec![json!(1_790_000_000), json!("yesterday")]),
        ("nbf", vec![json!(false)]),
        ("grace_days", vec![json!("14"), json!(-1), json!(1.5), json!(3651), json!(true), json!([])]),
        (
            "upd",
            vec![json!("2027-09-26T00:00:00Z"), json!("2027-02-29"), json!("26.09.2027"), json!(20_270_926), json!("2027-9-26")],
        ),
        ("feat", vec![json!("export"), json!([1]), json!({"export": true}), json!([null])]),
        (
            "lim",
            vec![
                json!({"users": -1}),
                json!({"users": 1.5}),
                json!({"users": "25"}),
                json!({"users": true}),
                json!([["users", 25]]),
                json!({"users": 9_007_199_254_740_992_u64}),
                json!({"users": null}),
            ],
        ),
        ("crit", vec![json!("exp"), json!([1]), json!({})]),
    ] {
        for value in values {
            cases.add(&format!("{name} that is {value}"), changed(&json!({ name: value })), "malformed");
        }
    }
    for name in ["sub", "nbf", "exp", "grace_days", "upd", "feat", "lim", "crit"] {
        let payload = with(&json!({ name: null })).replacen('{', &format!("{{\"{name}\":null,"), 1);
        cases.add(&format!("{name} that is null"), licence(payload), "malformed");
    }
    for time in [
        "2027-09-26",
        "2027-09-26T12:00:00",
        "2027-09-26T12:00:00+00:00",
        "2027-09-26 12:00:00Z",
        "2027-09-26t12:00:00z",
        "2027-09-26T12:00:00.5Z",
        "2027-09-26T12:00Z",
        "2027-09-26T24:00:00Z",
        "2027-09-26T23:59:60Z",
        "2027-02-29T00:00:00Z",
        "2027-02-30T00:00:00Z",
        "2027-13-01T00:00:00Z",
        "2027-00-01T00:00:00Z",
        "2027-01-00T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "+02027-09-26T12:00:00Z",
        "-2027-09-26T12:00:00Z",
        "２027-09-26T12:00:00Z",
        " 2027-09-26T12:00:00Z",
        "2027-09-26T12:00:00Z\n",
        "",
    ] {
        cases.add(&format!("exp that is {time:?}"), changed(&json!({ "exp": time })), "malformed");
    }
    cases.add("exp on a leap day", changed(&json!({"exp": "2028-02-29T00:00:00Z"})), "valid");
    cases.add("exp at the end of all times", changed(&json!({"exp": "9999-12-31T23:59:59Z", "grace_days": 3650})), "valid");
    cases.add(
        "limits at their bounds",
        changed(&json!({"lim": {"a": 0, "b": 9_007_199_254_740_991_u64}, "grace_days": 3650})),
        "valid",
    );
    cases.add("empty lists", changed(&json!({"feat": [], "lim": {}, "crit": [], "grace_days": 0})), "valid");
    for (name, changes) in [
        ("a later version", json!({"v": 2})),
        ("a later version of another form", json!({"v": 2, "inst": {"any": true}, "iat": 5, "exp": null, "crit": 7})),
        ("version 0", json!({"v": 0})),
        ("version -1", json!({"v": -1})),
        ("a critical claim that is not known", json!({"crit": ["seats"], "seats": 5})),
        ("a critical claim that is not known and not there", json!({"crit": ["exp", "seats"]})),
        ("a critical claim, and others of another form", json!({"crit": ["seats"], "iat": 5})),
        ("a critical claim that every object has", json!({"crit": ["constructor"]})),
    ] {
        cases.add(name, changed(&changes), "unsupported");
    }
    cases.add("critical claims that are known", changed(&json!({"crit": ["v", "jti", "iss", "aud", "inst", "sub", "iat", "nbf", "exp", "grace_days", "upd", "feat", "lim", "crit"]})), "valid");

    // 6 and 7: the plugin and the instance.
    cases.add("for another plugin", changed(&json!({"aud": "reports"})), "wrong_plugin");
    cases.add("for the plugin in another case", changed(&json!({"aud": "Report"})), "wrong_plugin");
    cases.add("for every plugin, which no licence is", changed(&json!({"aud": "*"})), "wrong_plugin");
    cases.add("for another plugin and another instance", changed(&json!({"aud": "other", "inst": [ELSEWHERE]})), "wrong_plugin");
    cases.add("for another instance", changed(&json!({"inst": [ELSEWHERE]})), "wrong_instance");
    cases.add(
        "for several instances, not this one",
        changed(&json!({"inst": [ELSEWHERE, "a", "b", "c", "d"]})),
        "wrong_instance",
    );
    cases.add("for no instance", changed(&json!({"inst": []})), "wrong_instance");
    cases.add("for a beginning of the instance and a star", changed(&json!({"inst": ["5f0c3f0e*", "**", ""]})), "wrong_instance");
    cases.add("for this instance and another", changed(&json!({"inst": [ELSEWHERE, INSTANCE]})), "valid");
    cases.add("for every instance", changed(&json!({"inst": ["*"]})), "valid");
    cases.add(
        "expired, and for another instance",
        changed(&json!({"inst": [ELSEWHERE], "exp": "2026-09-27T00:00:00Z", "grace_days": 0})),
        "wrong_instance",
    );

    // 8: the release.
    for (released, expect) in [
        (json!("2027-09-25"), "valid"),
        (json!("2027-09-26"), "valid"),
        (json!("2027-09-27"), "update_not_covered"),
        (json!("2028-01-01"), "update_not_covered"),
        (json!("9999-12-31"), "update_not_covered"),
        (Value::Null, "valid"),
    ] {
        cases.at(
            &format!("updates until 2027-09-26, and a release of {released}"),
            &*usual,
            &json!({ "release_date": released }),
            expect,
        );
    }
    cases.at("every release", changed(&json!({"upd": null})), &json!({"release_date": "2099-01-01"}), "valid");
    cases.at(
        "not covered, and expired",
        &*usual,
        &json!({"release_date": "2027-09-27", "now": "2030-01-01T00:00:00Z"}),
        "update_not_covered",
    );

    // 9: the clock.
    for (now, expect) in [
        ("1970-01-01T00:00:00Z", "clock_not_set"),
        ("2026-09-25T11:59:59Z", "clock_not_set"),
        ("2026-09-25T12:00:00Z", "valid"),
        ("2026-09-26T11:59:59Z", "valid"),
        ("2026-09-26T12:00:00Z", "valid"),
    ] {
        cases.at(&format!("issued at 2026-09-26T12:00:00Z, and it is {now}"), &*usual, &json!({ "now": now }), expect);
    }
    cases.at(
        "a clock behind the licence, and a mark ahead of it",
        &*usual,
        &json!({"now": "2026-09-25T11:59:59Z", "not_before_time": NOW}),
        "clock_not_set",
    );

    // 10: its beginning.
    let begins = changed(&json!({"nbf": "2026-11-01T00:00:00Z"}));
    for (now, mark, expect) in [
        ("2026-10-31T23:59:59Z", Value::Null, "not_yet_valid"),
        ("2026-11-01T00:00:00Z", Value::Null, "valid"),
        (NOW, json!("2026-10-31T23:59:59Z"), "not_yet_valid"),
        (NOW, json!("2026-11-01T00:00:00Z"), "valid"),
        ("2026-11-01T00:00:00Z", json!(NOW), "valid"),
    ] {
        cases.at(
            &format!("begins at 2026-11-01T00:00:00Z, it is {now}, the mark {mark}"),
            &*begins,
            &json!({"now": now, "not_before_time": mark}),
            expect,
        );
    }

    // 11: its end.
    let bare = changed(&json!({"grace_days": null}));
    for (now, mark, with_grace, without) in [
        ("2027-08-27T11:59:59Z", None, "valid", "valid"),
        ("2027-08-27T12:00:00Z", None, "warning 30", "warning 30"),
        ("2027-08-27T12:00:01Z", None, "warning 30", "warning 30"),
        ("2027-08-28T12:00:00Z", None, "warning 29", "warning 29"),
        ("2027-09-25T11:59:59Z", None, "warning 2", "warning 2"),
        ("2027-09-25T12:00:00Z", None, "warning 1", "warning 1"),
        ("2027-09-26T11:59:59Z", None, "warning 1", "warning 1"),
        ("2027-09-26T12:00:00Z", None, "grace 14", "expired"),
        ("2027-09-26T12:00:01Z", None, "grace 14", "expired"),
        ("2027-09-27T12:00:00Z", None, "grace 13", "expired"),
        ("2027-10-10T11:59:59Z", None, "grace 1", "expired"),
        ("2027-10-10T12:00:00Z", None, "expired", "expired"),
        ("9999-12-31T23:59:59Z", None, "expired", "expired"),
        (NOW, Some("2026-10-01T11:00:00Z"), "valid", "valid"),
        (NOW, Some("2027-08-27T11:59:59Z"), "valid", "valid"),
        (NOW, Some("2027-08-27T12:00:00Z"), "warning 30", "warning 30"),
        (NOW, Some("2027-09-26T11:59:59Z"), "warning 1", "warning 1"),
        (NOW, Some("2027-09-26T12:00:00Z"), "grace 14", "expired"),
        (NOW, Some("2027-10-10T12:00:00Z"), "expired", "expired"),
        ("2027-10-10T12:00:00Z", Some(NOW), "expired", "expired"),
    ] {
        let place = json!({"now": now, "not_before_time": mark});
        let when = mark.map_or(format!("it is {now}"), |mark| format!("it is {now}, the mark {mark}"));
        cases.at(&format!("14 days of grace, {when}"), &*usual, &place, with_grace);
        cases.at(&format!("no grace, {when}"), &*bare, &place, without);
    }
    cases.at(
        "a perpetual licence in a far year",
        changed(&json!({"exp": null, "upd": null})),
        &json!({"now": "9999-12-31T23:59:59Z"}),
        "valid",
    );
    cases.at(
        "a grace of ten years",
        changed(&json!({"grace_days": 3650})),
        &json!({"now": "2027-09-27T12:00:00Z"}),
        "grace 3649",
    );
    cases.add("expired before it was issued", changed(&json!({"exp": "2026-01-01T00:00:00Z"})), "expired");

    let keys = [("acme-2026a", ACME_A), ("acme-2026b", ACME_B)]
        .map(|(kid, secret)| (kid.to_owned(), SigningKey::parse(kid, secret).unwrap().public().into()));
    json!({"keys": serde_json::Map::from_iter(keys), "cases": cases.0})
}

/// One case a line, so that a change is seen in a diff.
fn file(vectors: &Value) -> String {
    let cases: Vec<_> = vectors["cases"].as_array().unwrap().iter().map(Value::to_string).collect();
    format!("{{\"keys\": {},\n\"cases\": [\n{}\n]}}\n", vectors["keys"], cases.join(",\n"))
}

#[test]
fn the_file_of_licences_is_what_its_keys_sign() {
    let (path, made) = (root().join(FILE), file(&vectors()));
    if std::env::var(WRITE).is_ok_and(|write| write == "1") {
        fs::write(&path, &made).unwrap();
    }
    let differs = fs::read_to_string(&path)
        .unwrap()
        .lines()
        .zip(made.lines())
        .find(|(have, want)| have != want)
        .map(|(have, _)| have.to_owned());
    assert!(
        fs::read_to_string(&path).unwrap() == made,
        "{FILE} is not what this test makes ({WRITE}=1 writes it), from here on: {differs:?}"
    );
    assert_eq!(serde_json::from_str::<Value>(&made).unwrap(), vectors());
}

#[test]
fn every_licence_of_the_file_is_taken_or_refused_as_it_says() {
    let file = vectors();
    let keyring = file["keys"]
        .as_object()
        .unwrap()
        .iter()
        .fold(Keyring::new(), |keys, (kid, key)| keys.with(kid, key.as_str().unwrap()).unwrap());
    let time = |value: &Value| value.as_str().map(|text| text.parse::<Time>().unwrap());
    let (mut wrong, mut met, mut names) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for case in file["cases"].as_array().unwrap() {
        let place = Place {
            plugin_id: case["plugin"].as_str().unwrap(),
            instance_id: case["instance"].as_str().unwrap(),
            release_date: case["release_date"].as_str().map(|date| date.parse().unwrap()),
            now: time(&case["now"]).unwrap(),
            not_before_time: time(&case["not_before_time"]),
        };
        let verdict = verify(case["token"].as_str(), &keyring, &place);
        let (found, days) = match &verdict {
            Ok(licence) => match licence.standing {
                Standing::Valid => ("valid", None),
                Standing::Warning { days_left } => ("warning", Some(days_left)),
                Standing::Grace { days_left } => ("grace", Some(days_left)),
            },
            Err(refusal) => (refusal.code.as_str(), None),
        };
        if (json!(found), json!(days)) != (case["expect"].clone(), case["days_left"].clone()) {
            wrong.push(format!("{}: {verdict:?}, not {} {}", case["name"], case["expect"], case["days_left"]));
        }
        if let Err(refusal) = &verdict {
            let line = refusal.to_string();
            assert!(
                line.starts_with(&format!("licence: {found}: ")) && line.len() < 700 && !line.contains(char::is_control),
                "{line}"
            );
        }
        met.insert(found);
        assert!(names.insert(case["name"].as_str().unwrap()), "two cases of the name {}", case["name"]);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let all: BTreeSet<_> = Code::ALL.map(Code::as_str).into_iter().chain(["valid", "warning", "grace"]).collect();
    assert_eq!(met, all, "each verdict is there");
}

/// The library that signs and verifies is PASETO's: by the vectors of its standard.
#[test]
fn the_official_vectors_of_paseto_hold() {
    let file: Value = serde_json::from_slice(&fs::read(root().join("tests/protocol/paseto_v4_public.json")).unwrap()).unwrap();
    let hex = |text: &Value| -> Vec<u8> {
        text.as_str()
            .unwrap()
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    };
    let mut ran = 0;
    for test in file["tests"].as_array().unwrap() {
        let text = |field: &str| test[field].as_str().unwrap_or_default();
        let public = AsymmetricPublicKey::<V4>::from(&hex(&test["public-key"])).unwrap();
        let (footer, assertion) = (text("footer").as_bytes(), text("implicit-assertion").as_bytes());
        let verified = UntrustedToken::<Public, V4>::try_from(text("token")).and_then(|token| {
            PublicToken::verify(&public, &token, Some(footer).filter(|footer| !footer.is_empty()), Some(assertion))
        });
        assert_eq!(verified.is_err(), test["expect-fail"] == true, "{}", test["name"]);
        if let Ok(verified) = verified {
            assert_eq!(verified.payload(), text("payload"), "{}", test["name"]);
            let secret = pasetors::keys::AsymmetricSecretKey::<V4>::from(&hex(&test["secret-key"])).unwrap();
            let signed = PublicToken::sign(&secret, text("payload").as_bytes(), Some(footer), Some(assertion)).unwrap();
            assert_eq!(signed, text("token"), "{}", test["name"]);
        }
        ran += 1;
    }
    assert_eq!(ran, 4);
}
