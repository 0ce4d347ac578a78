//! How the programs that run applications are told the prefix of their links. Pure.

use super::manifest::{Kind, Run};
use std::path::Path;

/// A setting of programs that run applications.
struct Setting {
    /// Names of the programs, as the command has them.
    programs: &'static [&'static str],
    /// What stands in command or environment if the setting is made already.
    mark: &'static str,
    /// What to do, as the second half of a sentence.
    cure: &'static str,
}

/// The settings, by the first that fits. The table in docs/apps.md has the same.
const SETTINGS: [Setting; 9] = [
    Setting {
        programs: &["gunicorn"],
        mark: "SCRIPT_NAME",
        cure: "tell gunicorn its prefix by env = { SCRIPT_NAME = \"{route}\" } and prefix = \"keep\"",
    },
    Setting {
        programs: &["uvicorn", "hypercorn", "daphne", "fastapi"],
        mark: "--root-path",
        cure: "give the command the arguments --root-path {route}",
    },
    Setting { programs: &["waitress-serve"], mark: "--url-prefix", cure: "give the command the argument --url-prefix={route}" },
    Setting {
        programs: &["flask"],
        mark: "SCRIPT_NAME",
        cure: "wrap the application: app.wsgi_app = ProxyFix(app.wsgi_app, x_prefix=1)",
    },
    Setting {
        programs: &["manage.py"],
        mark: "FORCE_SCRIPT_NAME",
        cure: "set FORCE_SCRIPT_NAME and STATIC_URL in the settings of Django",
    },
    Setting {
        programs: &["puma", "rackup", "rails"],
        mark: "RAILS_RELATIVE_URL_ROOT",
        cure: "set RAILS_RELATIVE_URL_ROOT = \"{route}\" in env for Rails, or map the route in config.ru with prefix = \"keep\"",
    },
    Setting { programs: &["next"], mark: "basePath", cure: "set basePath in next.config.js, with prefix = \"keep\"" },
    Setting { programs: &["datasette"], mark: "base_url", cure: "add --setting base_url {route}/, with prefix = \"keep\"" },
    Setting {
        programs: &["node", "npm", "npx", "bun", "deno"],
        mark: "x-forwarded-prefix",
        cure: "put the header x-forwarded-prefix before its paths: req.get('x-forwarded-prefix')",
    },
];

/// For a site that a generator has written.
const STATIC_SITE: &str = "build the site with its route as the base, such as vite build --base=ROUTE/";

/// For any other application.
const OTHER: &str = "set the base path in the application's configuration";

/// What makes the links of an application stay below its route, other than a host name of its own, as the second half of a sentence.
pub(crate) fn cure(run: Option<&Run>) -> String {
    let Some(run) = run else { return OTHER.to_owned() };
    if run.kind == Kind::Static {
        return STATIC_SITE.to_owned();
    }
    let is_run_by = |program: &&str| {
        let words = run.command.iter().flat_map(|word| word.split_ascii_whitespace());
        words.filter_map(|word| Path::new(word).file_name()).any(|name| name == *program)
    };
    let Some(setting) = SETTINGS.iter().find(|setting| setting.programs.iter().any(is_run_by)) else { return OTHER.to_owned() };
    let is_made =
        run.command.iter().any(|word| word.contains(setting.mark)) || run.env.iter().any(|(name, _)| name == setting.mark);
    if is_made {
        // The application knows its prefix, and does not use it.
        return format!("make these links with the framework's function for URLs, which uses {}", setting.mark);
    }
    setting.cure.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apps::manifest::parse;

    fn cure_of(run: &str) -> String {
        let manifest = parse(&format!("id = \"a\"\nroute = \"/a\"\n\n[run]\n{run}"), Path::new("/plugins/a")).unwrap();
        cure(Some(&manifest.run))
    }

    #[test]
    fn the_cure_is_that_of_the_program_that_runs_the_application() {
        for (run, expected) in [
            ("kind = \"http\"\ncommand = [\".venv/bin/gunicorn\", \"app:app\"]", "SCRIPT_NAME = \"{route}\""),
            ("kind = \"http\"\ncommand = [\"sh\", \"-c\", \"exec uvicorn main:app\"]", "--root-path {route}"),
            ("kind = \"http\"\ncommand = [\"python\", \"manage.py\", \"runserver\"]", "FORCE_SCRIPT_NAME"),
            ("kind = \"http\"\ncommand = [\"node\", \"app.js\"]", "x-forwarded-prefix"),
            ("kind = \"http\"\ncommand = [\"./server\"]", OTHER),
            ("kind = \"static\"\nroot = \".\"", STATIC_SITE),
            (
                "kind = \"http\"\ncommand = [\"gunicorn\", \"app:app\"]\nenv = { SCRIPT_NAME = \"{route}\" }",
                "function for URLs, which uses SCRIPT_NAME",
            ),
            ("kind = \"http\"\ncommand = [\"uvicorn\", \"--root-path\", \"/x\", \"main:app\"]", "function for URLs"),
        ] {
            assert!(cure_of(run).contains(expected), "{run}: {}", cure_of(run));
        }
        assert_eq!(cure(None), OTHER);
    }

    #[test]
    fn the_page_about_applications_has_each_setting() {
        let page = include_str!("../../docs/apps.md");
        let (_, section) = page.split_once("\n## Links that lead outside of the route\n").unwrap();
        let section = section.split("\n## ").next().unwrap();
        for Setting { programs, mark, .. } in &SETTINGS {
            assert!(section.contains(mark) && programs.iter().all(|program| section.contains(program)), "{programs:?} {mark}");
        }
    }
}
