//! `plugrack env`: environment variables of a plugin.

use super::config::hint;
use super::console::{Console, Given, items, print_bytes, word};
use crate::cli::api_client::segment;
use crate::util::escape;
use anyhow::Result;
use clap::Subcommand;
use serde_json::Value;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(super) enum Env {
    /// Print the exact value of a variable
    Get {
        /// The plugin's id
        id: String,
        name: String,
    },
    /// Set a variable; it takes effect at the plugin's next start
    Set {
        /// The plugin's id
        id: String,
        name: String,
        /// The value; without it, or with -, it is read from standard input, which keeps secrets off the command line
        #[arg(allow_hyphen_values = true)]
        value: Option<String>,
        /// Read the value from this file
        #[arg(long, value_name = "FILE", conflicts_with = "value")]
        file: Option<PathBuf>,
    },
    /// List the names of the variables that are set, without their values
    List {
        /// The plugin's id
        id: String,
    },
    /// Remove variables
    Unset {
        /// The plugin's id
        id: String,
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

impl Env {
    pub(super) fn run(self, console: &Console) -> Result<()> {
        let api = console.api()?;
        let path = |id: &str| format!("/plugins/{}/env", segment(id));
        match self {
            Self::Get { id, name } => {
                let answer = api.call("GET", &format!("{}/{}", path(&id), segment(&name)), b"")?;
                if console.json {
                    return console.print(&answer, |_| String::new());
                }
                let value = answer["value"].as_str().unwrap_or_default();
                if io::stdout().is_terminal() {
                    return print_bytes(format!("{}\n", escape::shown(value)).as_bytes());
                }
                print_bytes(value.as_bytes())
            }
            Self::Set { id, name, value, file } => {
                let value = Given { value, file }.text()?;
                let answer = api.call("PUT", &format!("{}/{}", path(&id), segment(&name)), value.as_bytes())?;
                console.print(&answer, |answer| hint(&id, answer))
            }
            Self::List { id } => {
                let answer = api.call("GET", &path(&id), b"")?;
                console.print(&answer, |answer| items(&answer["env"]).map(|name| format!("{}\n", word(name))).collect())
            }
            Self::Unset { id, names } => {
                let mut answer = Value::Null;
                for name in names {
                    answer = api.call("DELETE", &format!("{}/{}", path(&id), segment(&name)), b"")?;
                }
                console.print(&answer, |answer| hint(&id, answer))
            }
        }
    }
}
