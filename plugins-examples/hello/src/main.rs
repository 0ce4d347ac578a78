//! The smallest plugin in Rust: it says hello, to the world or by name.

use plugrack_sdk::{Plugin, Response};
use std::process::ExitCode;

fn main() -> ExitCode {
    Plugin::new("hello", "Hello", env!("CARGO_PKG_VERSION"), "👋", "/hello")
        .description("Says hello, to the world or by name")
        .concurrency(8)
        .serve(|request| match (request.method(), request.path()) {
            ("GET" | "HEAD", "/") => Response::text("Hello, world!"),
            // Plain text needs no escaping, and the name is greeted as it stands in the URL.
            ("GET" | "HEAD", path) => Response::text(format!("Hello, {}!", &path[1..])),
            _ => Response::text("method not allowed").status(405).header("allow", "GET, HEAD"),
        })
}
