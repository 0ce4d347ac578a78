//! The plugin that the benchmark measures the host with: the answers that its peers give as well, and the key-value store timed
//! from where a plugin stands.
//!
//! It takes its id and route from the name of its file, so that links to one file make as many plugins as are wanted.

mod kv;

use plugrack_sdk::{Error, Plugin, Request, Response};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Requests handled side by side: 64 places in the host's queue for each, so that 1000 clients find room there.
const CONCURRENCY: u32 = 16;

/// The largest body that is sent back.
const MAX_ECHO: usize = 1 << 20;

/// Of the requests for `/tenth` each tenth takes so long.
const SLOW: Duration = Duration::from_millis(20);

/// The bytes of a download: 1 MiB of this.
static MIB: [u8; 1 << 20] = [b'm'; 1 << 20];

static TENTH: AtomicUsize = AtomicUsize::new(0);

fn main() -> ExitCode {
    let Some(id) = own_name() else {
        return ExitCode::FAILURE;
    };
    Plugin::new(&id, "Benchmark", env!("CARGO_PKG_VERSION"), "⏱", &format!("/{id}")).concurrency(CONCURRENCY).serve(answer)
}

#[expect(clippy::disallowed_methods, reason = "a handler that takes its time is what is wanted")]
fn dawdle() {
    thread::sleep(SLOW);
}

/// The name this program was started by. The host passes another first argument, so the system is asked.
fn own_name() -> Option<String> {
    Some(std::env::current_exe().ok()?.file_name()?.to_str()?.to_owned())
}

fn answer(request: &mut Request<'_>) -> Result<Response, Error> {
    match request.path() {
        "/hello" => Ok(Response::text("Hello, world!")),
        "/echo" => Ok(Response::bytes("application/octet-stream", request.read_body(MAX_ECHO)?)),
        "/mib" => Ok(Response::bytes("application/octet-stream", &MIB[..])),
        "/tenth" => {
            if TENTH.fetch_add(1, Ordering::Relaxed) % 10 != 9 {
                return Ok(Response::text("Hello, world!"));
            }
            dawdle();
            Ok(Response::text("Hello, sleeper"))
        }
        path => match path.strip_prefix("/kv/") {
            Some(task) => kv::run(task, request.query().unwrap_or_default(), request.kv()).map(Response::text),
            None => Ok(Response::text("not found").status(404)),
        },
    }
}
