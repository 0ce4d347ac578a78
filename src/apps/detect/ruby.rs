//! Ruby: Rack applications, Rails among them.

use super::draft::Draft;
use super::files::Files;
use serde_json::json;

/// The manifest for a `config.ru`, or for a Sinatra application in `app.rb`.
pub(super) fn detect(files: &Files) -> Option<Draft> {
    let gemfile = files.text("Gemfile");
    // The lock file names what the others bring along.
    let gems = |name: &str| {
        let locked =
            || files.text("Gemfile.lock").is_some_and(|lock| lock.lines().any(|line| line.trim_start().starts_with(name)));
        gemfile.as_deref().is_some_and(|gems| has_gem(gems, name)) || locked()
    };
    let mut command = if gemfile.is_some() { vec!["bundle", "exec"] } else { Vec::new() };
    let from = if gemfile.is_some() { "; through bundler, because there is a Gemfile" } else { "" };
    let Some(config) = files.text("config.ru") else {
        if gemfile.is_some() && gems("sinatra") && files.is_file("app.rb") {
            command.extend(["ruby", "app.rb", "-o", "127.0.0.1", "-p", "{port}"]);
            let draft = Draft::new("Sinatra", "http", "Gemfile names sinatra, and there is app.rb")
                .run("command", json!(command), format!("a Sinatra application takes -o and -p{from}"))
                .run("listen", "port", "it listens on the port of -p")
                .run("prefix", "strip", "the application sees the path without the route");
            return Some(draft.hint(bundle(files)).hint(RACK_PREFIX));
        }
        if gemfile.is_some() {
            files.note("there is a Gemfile, but neither config.ru nor app.rb with Sinatra".to_owned());
        }
        return None;
    };
    let is_rails = config.contains("Rails.application") || files.is_file("config/application.rb");
    let (application, evidence) = match is_rails {
        true => ("Rails", "config.ru, of a Rails application"),
        false => ("Rack", "config.ru"),
    };
    let has_puma = gemfile.is_none() || gems("puma");
    let mut draft = Draft::new(application, "http", evidence);
    draft = if has_puma {
        command.extend(["puma", "-b", "unix://{socket}"]);
        draft.run("command", json!(command), format!("puma serves config.ru{from}")).run(
            "listen",
            "socket",
            "puma makes the socket",
        )
    } else {
        command.extend(["rackup", "-o", "127.0.0.1", "-p", "{port}"]);
        draft.run("command", json!(command), format!("rackup, because the Gemfile does not name puma{from}")).run(
            "listen",
            "port",
            "rackup listens on the port of -p",
        )
    };
    if is_rails {
        draft = draft.run("env", json!({"RAILS_RELATIVE_URL_ROOT": "{route}"}), "Rails puts this before its links");
    }
    draft = draft.run("prefix", "strip", "the application sees the path without the route");
    if gemfile.is_some() {
        draft = draft.hint(bundle(files));
    }
    Some(match is_rails {
        true => draft.hint("Rails runs in development until RAILS_ENV is set: plugrack env set ID RAILS_ENV production"),
        false => draft.hint(RACK_PREFIX),
    })
}

const RACK_PREFIX: &str =
    "Rack makes links from SCRIPT_NAME, which is empty here: use relative links, or a host name of its own (host)";

fn bundle(files: &Files) -> &'static str {
    match files.is_file("Gemfile.lock") {
        true => "the gems must be installed: bundle install --deployment",
        false => "there is no Gemfile.lock: bundle install",
    }
}

/// Whether a Gemfile has a line `gem "NAME"`.
fn has_gem(gemfile: &str, name: &str) -> bool {
    gemfile.lines().any(|line| {
        let quoted = line.trim_start().strip_prefix("gem").map(|rest| rest.trim_start_matches([' ', '(']));
        quoted.and_then(|quoted| quoted.split(['"', '\'']).nth(1)) == Some(name)
    })
}
