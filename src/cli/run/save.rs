//! The manifest of an application that was tried: its text, and where it is written.

use crate::apps::manifest::{self, FILE};
use crate::server::options::DEFAULT_DATA;
use anyhow::{Context, Result, anyhow, bail};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Directory of the plugins in a data directory.
const PLUGINS: &str = "plugins";

/// What the manifest of an application says.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    pub(super) id: String,
    /// None if it has the host name `ID.localhost`.
    pub(super) route: Option<String>,
    /// The key `listen`.
    pub(super) listen: &'static str,
    pub(super) command: Vec<String>,
    pub(super) env: Vec<(String, String)>,
    pub(super) start_timeout: Duration,
}

impl Draft {
    /// The text of the manifest.
    ///
    /// # Errors
    /// What a manifest cannot say.
    pub(super) fn text(&self) -> Result<String> {
        let mut text = format!("id = {}\n", quoted(&self.id));
        match &self.route {
            Some(route) => text += &format!("route = {}\n", quoted(route)),
            None => text += &format!("host = [{}]\n", quoted(&format!("{}.localhost", self.id))),
        }
        let words = self.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(", ");
        text += &format!("\n[run]\nkind = \"http\"\ncommand = [{words}]\nlisten = {}\n", quoted(self.listen));
        let (seconds, ms) = (self.start_timeout.as_secs(), self.start_timeout.as_millis());
        let time = if self.start_timeout.subsec_nanos() == 0 { format!("{seconds}s") } else { format!("{ms}ms") };
        text += &format!("start-timeout = {}\n", quoted(&time));
        if !self.env.is_empty() {
            text += "\n[run.env]\n";
            self.env.iter().for_each(|(name, value)| text += &format!("{name} = {}\n", quoted(value)));
        }
        match manifest::parse(&text, Path::new("/")) {
            Ok(_) => Ok(text),
            // The line is of a text that nobody has seen.
            Err(why) => Err(anyhow!(why.split_once(": ").map_or(why.clone(), |(_, why)| why.to_owned()))),
        }
    }

    /// The draft for an application that listens on a port of its own, whatever it is told: if that stands in its command, the host's port
    /// takes its place. None if the command does not have it.
    pub(super) fn with_port_for(&self, own: u16) -> Option<Self> {
        let own = own.to_string();
        let before = |word: &String| {
            let before = word.strip_suffix(&own)?;
            (!before.ends_with(|last: char| last.is_ascii_digit())).then(|| format!("{before}{{port}}"))
        };
        let mut draft = Self { listen: "port", ..self.clone() };
        let word = draft.command.iter_mut().skip(1).find_map(|word| before(word).map(|fresh| (word, fresh)));
        let (word, fresh) = word?;
        *word = fresh;
        Some(draft)
    }
}

/// A string of TOML. Its escapes are those of JSON, but JSON leaves DEL as it is.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Where a manifest is written.
#[derive(Debug)]
pub(super) struct Target {
    file: PathBuf,
    /// The plugin's directory.
    directory: PathBuf,
    /// The directory in which the application was tried.
    tried_in: PathBuf,
}

impl Target {
    /// The place for the manifest of the plugin `name`: in the plugins directory if one is given or is in `data`, or else in the
    /// directory in which it is tried.
    ///
    /// # Errors
    /// The plugins directory does not exist, or something is in the place.
    pub(super) fn choose(name: &str, plugins: Option<&Path>, data: &Path, tried_in: &Path) -> Result<Self> {
        let of_data = data.join(PLUGINS);
        let plugins = plugins.or((data != Path::new(DEFAULT_DATA) || of_data.is_dir()).then_some(of_data.as_path()));
        let directory = match plugins {
            None => tried_in.to_owned(),
            Some(plugins) => {
                let found = fs::canonicalize(plugins).ok().filter(|found| found.is_dir());
                let found = found.ok_or_else(|| {
                    anyhow!("there is no plugins directory {}: start a host with it once, or make it", plugins.display())
                })?;
                found.join(name)
            }
        };
        let is_here = fs::canonicalize(&directory).is_ok_and(|found| fs::canonicalize(tried_in).is_ok_and(|here| here == found));
        let file = directory.join(FILE);
        let in_way =
            [(!is_here).then_some(&directory), Some(&file)].into_iter().flatten().find(|path| path.symlink_metadata().is_ok());
        if let Some(path) = in_way {
            bail!("{} exists already, and is not overwritten: choose another name with --save, or move it away", path.display());
        }
        Ok(Self { file, directory, tried_in: tried_in.to_owned() })
    }

    /// Writes a manifest, and returns what to say about it: the file, its text, and what is left to do.
    pub(super) fn write(&self, draft: &Draft) -> Result<String> {
        let here = &self.tried_in;
        let is_elsewhere = !self.directory.exists();
        let mut draft = draft.clone();
        if is_elsewhere {
            let directory = here.to_str().with_context(|| format!("the path {} is not UTF-8", here.display()))?;
            let script = format!("cd {} && exec \"$0\" \"$@\"", shell_quoted(directory));
            draft.command.splice(0..0, ["sh".to_owned(), "-c".to_owned(), script]);
        }
        let text = draft.text()?;
        let cannot = || format!("cannot write {}", self.file.display());
        if is_elsewhere {
            fs::create_dir(&self.directory).with_context(cannot)?;
        }
        File::create_new(&self.file).and_then(|mut file| file.write_all(text.as_bytes())).with_context(cannot)?;
        let follow = match is_elsewhere {
            true => format!(
                "the application stays in {}; to keep it with its manifest, copy its files to {} and take sh, -c and cd out of command",
                here.display(),
                self.directory.display()
            ),
            false => "this directory is a plugin now: copy or move it into the plugins directory, if it is not there".to_owned(),
        };
        let indented: String =
            text.lines().map(|line| if line.is_empty() { "\n".into() } else { format!("    {line}\n") }).collect();
        Ok(format!("wrote {}:\n\n{indented}\nplugrack: {follow}; then: plugrack rescan", self.file.display()))
    }
}

/// A word of a shell's command.
fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(command: &[&str]) -> Draft {
        Draft {
            id: "wiki".into(),
            route: None,
            listen: "port",
            command: command.iter().map(|&word| word.to_owned()).collect(),
            env: vec![("NAME".into(), "a\"b\\c\u{7f}\t{port}\n".into())],
            start_timeout: Duration::from_millis(1500),
        }
    }

    #[test]
    fn the_text_says_what_was_given() {
        let given = draft(&["./a b", "é\"'\\{port}", ""]);
        let read = manifest::parse(&given.text().unwrap(), Path::new("/x")).unwrap();
        assert_eq!((read.run.command, read.run.env), (given.command, given.env));
        assert_eq!((read.run.start_timeout, read.metadata.host), (Some(given.start_timeout), vec!["wiki.localhost".to_owned()]));
        let routed = Draft { route: Some("/w".into()), ..draft(&["a"]) };
        let read = manifest::parse(&routed.text().unwrap(), Path::new("/x")).unwrap();
        assert_eq!((read.metadata.route.as_deref(), read.metadata.host.len()), (Some("/w"), 0));
    }

    #[test]
    fn what_no_manifest_can_say_is_refused_without_a_line() {
        let refused = draft(&["a", "{name}"]).text().unwrap_err().to_string();
        assert!(refused.starts_with("{name} is no placeholder"), "{refused}");
        let refused = Draft { id: "A".into(), ..draft(&["a"]) }.text().unwrap_err().to_string();
        assert!(refused.contains("id \"A\" is not valid"), "{refused}");
    }

    #[test]
    fn a_fixed_port_in_the_command_becomes_the_hosts() {
        let command = |words: &[&str]| draft(words).with_port_for(8000).map(|draft| draft.command.join(" "));
        assert_eq!(command(&["a", "8000"]).as_deref(), Some("a {port}"));
        assert_eq!(command(&["a", "--bind=0.0.0.0:8000", "-v"]).as_deref(), Some("a --bind=0.0.0.0:{port} -v"));
        assert_eq!(command(&["a", "18000"]), None);
        assert_eq!(command(&["a8000"]), None);
    }
}
