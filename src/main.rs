//! The `plugrack` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    plugrack::main()
}
