//! Finds the line of a program's last output that says why it ended. Pure.
//!
//! Runtimes print more after the reason: Node its version, Go its goroutines, Rust a hint, Java and Ruby a stack trace. Such lines are
//! skipped, and a reason next to its stack trace is preferred.

/// Number of lines after an exception, such as the fields of an error, within which it still counts as the reason.
const MAX_BEHIND: usize = 20;

/// Prefixes of lines that are not a reason in any runtime.
const NOISE: [&str; 12] = [
    "Node.js v",
    "note: run with",
    "note: Some details are omitted",
    "stack backtrace:",
    "goroutine ",
    "exit status ",
    "created by ",
    "Stack trace:",
    "#",
    "npm ",
    "Traceback (most recent call last)",
    "For further information",
];

/// The line after Node's reason for a missing module, before the list of modules that require it.
const REQUIRED_BY: &str = "Require stack:";

/// The line with the reason; none if nothing was printed.
pub(crate) fn failure_line<'a>(lines: &[&'a str]) -> Option<&'a str> {
    let exception = (0..lines.len()).rev().take(MAX_BEHIND).find(|&at| is_exception(lines, at));
    let last = || (0..lines.len()).rev().find(|&at| !is_noise(lines, at));
    let any = || (0..lines.len()).rev().find(|&at| !lines[at].trim().is_empty());
    exception.or_else(last).or_else(any).map(|at| lines[at].trim())
}

/// Whether a line names an exception, `Error: …` or `module.SomeError: …`, and is next to its stack trace.
fn is_exception(lines: &[&str], at: usize) -> bool {
    let name = lines[at].split_once(':').map_or(lines[at], |(name, _)| name);
    let named = ["Error", "Exception", "Interrupt"].iter().any(|end| name.ends_with(end)) && !name.contains(' ');
    let mut beside = [at.checked_sub(1), Some(at + 1)].into_iter().flatten().filter_map(|at| lines.get(at));
    named && beside.any(|line| is_indented(line) || *line == REQUIRED_BY)
}

fn is_noise(lines: &[&str], at: usize) -> bool {
    let line = lines[at];
    // A frame of Go: a function, and its position on the next line.
    let is_frame =
        || line.ends_with(')') && lines.get(at + 1).is_some_and(|next| next.starts_with('\t') && next.contains(".go:"));
    is_indented(line) || !line.contains(char::is_alphanumeric) || NOISE.iter().any(|start| line.starts_with(start)) || is_frame()
}

fn is_indented(line: &str) -> bool {
    line.starts_with([' ', '\t']) && !line.trim().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_says_why_is_found_in_what_each_runtime_prints() {
        let cases = [
            ("", None),
            ("\n \n", None),
            ("one line", Some("one line")),
            ("first\nno database\n\n", Some("no database")),
            ("loading\n  the settings\ncannot read x: no such file", Some("cannot read x: no such file")),
            ("    only indented\n", Some("only indented")),
            (
                "/p/plugin:3\nthrow new Error('boom')\n^\n\nError: boom\n    at Object.<anonymous> (/p/plugin:3:7)\n    at node:internal/main\n\nNode.js v20.20.2",
                Some("Error: boom"),
            ),
            (
                "node:internal/modules/cjs/loader:1228\n  throw err;\n  ^\n\nError: Cannot find module 'x'\nRequire stack:\n- /p/plugin\n    at Module._load (node:1)\n    at node:internal {\n  code: 'MODULE_NOT_FOUND',\n  requireStack: [ '/p/plugin' ]\n}\n\nNode.js v20.20.2",
                Some("Error: Cannot find module 'x'"),
            ),
            (
                "Error: listen EACCES\n    at Server.setup (node:net:1)\n    at node:x {\n  code: 'EACCES',\n  errno: -13\n}\n\nNode.js v22.1.0",
                Some("Error: listen EACCES"),
            ),
            (
                "Traceback (most recent call last):\n  File \"plugin\", line 2, in <module>\n    import nothing\nModuleNotFoundError: No module named 'nothing'",
                Some("ModuleNotFoundError: No module named 'nothing'"),
            ),
            (
                "Traceback (most recent call last):\n  File \"p\", line 9, in <module>\npydantic_core.ValidationError: 1 error for Settings\napi_key\n  Field required\n    For further information visit x",
                Some("pydantic_core.ValidationError: 1 error for Settings"),
            ),
            (
                "Traceback (most recent call last):\n  File \"p\", line 9, in <module>\n    sleep(9)\nKeyboardInterrupt",
                Some("KeyboardInterrupt"),
            ),
            (
                "\nthread 'main' panicked at src/main.rs:2:5:\nboom\nnote: run with `RUST_BACKTRACE=1` environment variable to display a backtrace",
                Some("boom"),
            ),
            ("panic: boom\n\ngoroutine 1 [running]:\nmain.main()\n\t/tmp/x.go:4 +0x18\nexit status 2", Some("panic: boom")),
            (
                "Exception in thread \"main\" java.lang.IllegalStateException: no\n\tat A.main(A.java:3)\nCaused by: java.io.IOException: gone\n\t... 1 more",
                Some("Caused by: java.io.IOException: gone"),
            ),
            ("p.rb:1:in 'main': boom (RuntimeError)\n\tfrom p.rb:3:in '<main>'", Some("p.rb:1:in 'main': boom (RuntimeError)")),
            (
                "PHP Fatal error:  Uncaught Exception: boom in /x.php:2\nStack trace:\n#0 {main}\n  thrown in /x.php on line 2",
                Some("PHP Fatal error:  Uncaught Exception: boom in /x.php:2"),
            ),
            ("Error: no connection, trying again\ngiving up: the disk is gone", Some("giving up: the disk is gone")),
        ];
        for (printed, expected) in cases {
            let lines: Vec<&str> = printed.lines().collect();
            assert_eq!(failure_line(&lines), expected, "{printed}");
        }
    }
}
