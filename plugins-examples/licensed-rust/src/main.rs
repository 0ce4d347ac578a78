//! A proprietary plugin: it runs with a licence alone that its vendor has issued for this instance.
//!
//! The private half of its key lies beside it, in `demo.key`, so that anybody can issue a licence to try it with. That key is for
//! trying only: a vendor's own private key never leaves the vendor.

use plugrack_sdk::{License, Plugin, Request, Response};
use std::process::ExitCode;

/// The vendor's public keys, by their names.
const KEYS: [(&str, &str); 1] = [("demo-for-trying-only", "k4.public.LNJfMTM_FQhJ4QQzK_C7uqf1PYC6EkUPop40lRYLH3M")];

/// When this version was released: the licence must cover releases of that day.
const RELEASED: &str = "2026-11-22";

fn main() -> ExitCode {
    Plugin::new("licensed-rust", "Licensed (Rust)", env!("CARGO_PKG_VERSION"), "🔑", "/licensed-rust")
        .description("Shows what its licence grants, and exports where that is granted")
        .licensed(&KEYS, RELEASED)
        .serve(answer)
}

fn answer(request: &mut Request<'_>) -> Response {
    // A licensed plugin has started, so it has a licence.
    let Some(license) = request.context().granted() else { return Response::text("no licence\n").status(500) };
    match request.path() {
        "/" => Response::text(about(license)),
        "/export" if license.has("export") => Response::text("all there is, exported\n"),
        "/export" => Response::text("the licence does not include the feature export\n").status(403),
        _ => Response::text("not found\n").status(404),
    }
}

fn about(license: &License) -> String {
    let customer = license.claims.sub.as_deref().unwrap_or("somebody");
    let users = license.limit("users").map_or("any number of".to_owned(), |users| users.to_string());
    let end = license.claims.exp.map_or("for ever".to_owned(), |exp| format!("until {exp}"));
    format!("Licensed to {customer} for {users} users, {end}.\n")
}
