//! How an application is told where to listen. Pure.

/// Programs and modules, and the arguments by which they listen on 127.0.0.1 and the host's port.
const ARGUMENTS: [(&str, &str); 18] = [
    ("http.server", "{port} --bind 127.0.0.1"),
    ("flask", "--host 127.0.0.1 --port {port}"),
    ("fastapi", "--host 127.0.0.1 --port {port}"),
    ("uvicorn", "--host 127.0.0.1 --port {port}"),
    ("hypercorn", "--bind 127.0.0.1:{port}"),
    ("gunicorn", "--bind 127.0.0.1:{port}"),
    ("daphne", "-b 127.0.0.1 -p {port}"),
    ("waitress-serve", "--listen 127.0.0.1:{port}"),
    ("runserver", "127.0.0.1:{port}"),
    ("datasette", "--host 127.0.0.1 --port {port}"),
    ("streamlit", "--server.address 127.0.0.1 --server.port {port}"),
    ("puma", "-b tcp://127.0.0.1:{port}"),
    ("rackup", "-o 127.0.0.1 -p {port}"),
    ("rails", "-b 127.0.0.1 -p {port}"),
    ("php", "-S 127.0.0.1:{port}"),
    ("vite", "--host 127.0.0.1 --port {port}"),
    ("next", "-H 127.0.0.1 -p {port}"),
    ("http-server", "-a 127.0.0.1 -p {port}"),
];

/// Programs whose applications listen by a call in their source, and that call.
const CALLS: [(&str, &str); 6] = [
    ("node", NODE),
    ("npm", NODE),
    ("npx", NODE),
    ("bun", NODE),
    ("deno", "Deno.serve({ hostname: \"127.0.0.1\", port: Number(Deno.env.get(\"PORT\")) }, …)"),
    ("go", "http.ListenAndServe(\"127.0.0.1:\"+os.Getenv(\"PORT\"), …)"),
];

const NODE: &str = "server.listen(process.env.PORT, \"127.0.0.1\")";

/// What lets the application of a command listen on 127.0.0.1 and the host's port, as the end of a sentence.
pub(super) fn local_port(command: &[String]) -> String {
    let words = || command.iter().flat_map(|word| word.split_whitespace()).filter_map(|word| word.rsplit('/').next());
    let find =
        |known: &[(&'static str, &'static str)]| words().find_map(|word| known.iter().find(|known| known.0 == word).copied());
    match (find(&ARGUMENTS), find(&CALLS)) {
        (Some((name, arguments)), _) => format!("give {name} the arguments {arguments}"),
        (None, Some((_, call))) => format!("let it listen by {call}"),
        (None, None) => "let it listen on 127.0.0.1 and the port in $PORT, or put {port} into its command".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_framework_is_known_by_a_word_of_the_command() {
        for (command, advice) in [
            (&["/venv/bin/flask", "--app", "x", "run"][..], "give flask the arguments --host 127.0.0.1 --port {port}"),
            (&["python3", "-m", "http.server"], "give http.server the arguments {port} --bind 127.0.0.1"),
            (&["sh", "-c", "exec uvicorn app:app"], "give uvicorn the arguments --host 127.0.0.1 --port {port}"),
            (&["npx", "vite"], "give vite the arguments --host 127.0.0.1 --port {port}"),
            (&["node", "server.js"], "let it listen by server.listen(process.env.PORT, \"127.0.0.1\")"),
            (&["./app"], "let it listen on 127.0.0.1 and the port in $PORT, or put {port} into its command"),
        ] {
            let command: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
            assert_eq!(local_port(&command), advice);
        }
    }
}
