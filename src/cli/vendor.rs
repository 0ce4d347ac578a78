//! What a vendor does with licences, and what anybody can ask of one: none of it needs a host.

use super::console::{Console, token};
use crate::license::{self, Claims, Date, Inspection, Keyring, Known, MAX_GRACE_DAYS, MAX_LIMIT, SigningKey, Time, Verdict};
use crate::protocol::metadata::is_plugin_id;
use crate::util::escape;
use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use uuid::Uuid;

/// Most bytes that are read of a key file: many times what one has.
const MAX_KEY_FILE: u64 = 64 * 1024;

#[derive(Debug, Subcommand)]
pub(super) enum Vendor {
    /// Create a key pair that signs licences: write the private key to a file, print the public key
    Keygen {
        /// Name of the key, such as acme-2026a
        #[arg(long)]
        kid: String,
        /// File for the private key [default: KID.key]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Overwrite an existing key
        #[arg(long)]
        force: bool,
    },
    /// Issue a licence and print its token
    Issue(Box<Issue>),
    /// Explain what a licence says, and check it
    Inspect(Inspect),
}

#[derive(Debug, Args)]
pub(super) struct Issue {
    /// The private key's file
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The plugin's id
    #[arg(long, value_name = "ID")]
    plugin: String,
    /// An instance it is for, as `plugrack instance` prints it there; '*' is every one
    #[arg(long = "instance", value_name = "UUID", required = true)]
    instances: Vec<String>,
    /// Who issues it; the key's name unless given
    #[arg(long, value_name = "NAME")]
    issuer: Option<String>,
    /// Who it is issued to
    #[arg(long, value_name = "NAME")]
    customer: Option<String>,
    /// The last day it is good, or the time at which it expires; never unless given
    #[arg(long, value_name = "DATE", value_parser = last_second)]
    expires: Option<Time>,
    /// The first day it is good, or the time; at once unless given
    #[arg(long, value_name = "DATE", value_parser = first_second)]
    not_before: Option<Time>,
    /// Days the plugin still runs after it has expired
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=i64::from(MAX_GRACE_DAYS)))]
    grace_days: u16,
    /// The last release date of the plugin that it covers; every one unless given
    #[arg(long, value_name = "DATE")]
    updates_until: Option<Date>,
    /// A feature that it switches on
    #[arg(long = "feature", value_name = "FEATURE")]
    features: Vec<String>,
    /// A limit that it sets
    #[arg(long = "limit", value_name = "NAME=N", value_parser = limit)]
    limits: Vec<(String, u64)>,
}

#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// The token; - reads it from standard input
    token: String,
    /// A public key of the vendor's, as keygen printed it
    #[arg(long = "public-key", value_name = "KID=KEY", value_parser = key)]
    keys: Vec<(String, String)>,
    /// The plugin it has to be for
    #[arg(long, value_name = "ID")]
    plugin: Option<String>,
    /// The instance it has to be for
    #[arg(long, value_name = "UUID")]
    instance: Option<String>,
    /// The release date of the plugin it has to cover
    #[arg(long, value_name = "DATE")]
    release_date: Option<Date>,
    /// The time at which it has to be good, such as 2026-09-26T12:00:00Z; now unless given
    #[arg(long, value_name = "TIME")]
    now: Option<Time>,
}

/// A private key's file.
#[derive(Deserialize, Serialize)]
struct KeyFile {
    kid: String,
    secret: String,
}

/// A time, or the first second of a day.
fn first_second(text: &str) -> Result<Time, license::NoTime> {
    text.parse().or_else(|_| text.parse::<Date>().map(Time::from))
}

/// A time, or the end of a day.
fn last_second(text: &str) -> Result<Time, license::NoTime> {
    text.parse().or_else(|_| text.parse::<Date>().map(Time::end_of))
}

fn limit(text: &str) -> Result<(String, u64), String> {
    let limit = text.split_once('=').and_then(|(name, number)| Some((name.to_owned(), number.parse().ok()?)));
    limit
        .filter(|(name, number)| !name.is_empty() && *number <= MAX_LIMIT)
        .ok_or_else(|| format!("a limit is a name and a whole number up to {MAX_LIMIT}, such as users=25"))
}

fn key(text: &str) -> Result<(String, String), String> {
    let key = text.split_once(['=', ' ']).map(|(kid, key)| (kid.to_owned(), key.to_owned()));
    key.ok_or_else(|| "a key is its name and its text, such as acme-2026a=k4.public.…".to_owned())
}

impl Vendor {
    pub(super) fn run(self, console: &Console) -> Result<()> {
        match self {
            Self::Keygen { kid, out, force } => keygen(console, &kid, out, force),
            Self::Issue(issue) => issue.run(console),
            Self::Inspect(inspect) => inspect.run(console),
        }
    }
}

fn keygen(console: &Console, kid: &str, out: Option<PathBuf>, force: bool) -> Result<()> {
    let key = SigningKey::generate(kid)?.context("the system gives no random bytes: try again")?;
    let path = out.unwrap_or_else(|| PathBuf::from(format!("{kid}.key")));
    write_key(&path, &key, force).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            anyhow!("{} is there already: name another file with --out, or write over the key in it with --force", path.display())
        }
        _ => anyhow!("cannot write the key to {}: {error}", path.display()),
    })?;
    let answer = json!({"kid": kid, "public_key": key.public(), "file": path.display().to_string()});
    console.print(&answer, |_| format!("{kid} {}\n", key.public()))
}

/// Writes it beside and renames it, so that a key is there whole or not at all, and readable by nobody else at any time.
fn write_key(path: &Path, key: &SigningKey, force: bool) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(0o600)).tempfile_in(dir)?;
    let content = KeyFile { kid: key.kid().to_owned(), secret: key.secret() };
    writeln!(file, "{}", serde_json::to_string(&content)?)?;
    file.as_file().sync_all()?;
    if force {
        file.persist(path)?
    } else {
        file.persist_noclobber(path)?
    };
    Ok(())
}

fn read_key(path: &Path) -> Result<SigningKey> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_KEY_FILE).read_to_string(&mut text));
    read.with_context(|| format!("cannot read the key {}", path.display()))?;
    // The reader's own words could quote the key.
    let Ok(KeyFile { kid, secret }) = serde_json::from_str(&text) else {
        bail!("{} is no private key: plugrack license keygen makes one", path.display());
    };
    SigningKey::parse(&kid, &secret).with_context(|| path.display().to_string())
}

impl Issue {
    fn run(self, console: &Console) -> Result<()> {
        let key = read_key(&self.key)?;
        if !is_plugin_id(&self.plugin) {
            bail!("{:?} cannot be the id of a plugin: see the plugin's --metadata", self.plugin);
        }
        let mut lim = BTreeMap::new();
        for (name, number) in self.limits {
            if lim.insert(name.clone(), number).is_some() {
                bail!("the limit {name:?} is given twice");
            }
        }
        let claims = Claims {
            v: 1,
            jti: Uuid::new_v4().to_string(),
            iss: self.issuer.unwrap_or_else(|| key.kid().to_owned()),
            aud: self.plugin,
            inst: self.instances.iter().map(|text| instance(text)).collect::<Result<_>>()?,
            sub: self.customer,
            iat: SystemTime::now().into(),
            nbf: self.not_before,
            exp: self.expires,
            grace_days: self.grace_days,
            upd: self.updates_until,
            feat: self.features,
            lim,
        };
        if claims.exp.is_none() && claims.grace_days > 0 {
            bail!("a licence that never expires needs no grace: give it an end with --expires, or leave out --grace-days");
        }
        if let (Some(nbf), Some(exp)) = (claims.nbf, claims.exp)
            && nbf >= exp
        {
            bail!("the licence would expire at {exp}, before it begins at {nbf}: give another --expires or --not-before");
        }
        let token = license::issue(&claims, &key)?;
        console.print(&json!({"token": token, "claims": claims}), |_| format!("{token}\n"))
    }
}

/// An instance's id as the host writes it, or the star.
fn instance(text: &str) -> Result<String> {
    match Uuid::try_parse(text) {
        Ok(id) => Ok(id.to_string()),
        Err(_) if text == license::ANY_INSTANCE => Ok(text.to_owned()),
        Err(_) => {
            bail!("{text:?} is no instance id: plugrack instance prints it on the customer's machine, and '*' is every one")
        }
    }
}

impl Inspect {
    fn run(self, console: &Console) -> Result<()> {
        let token = token(self.token)?;
        let keyring = self.keys.iter().try_fold(Keyring::new(), |keys, (kid, key)| keys.with(kid, key))?;
        let known = Known {
            keyring: (!self.keys.is_empty()).then_some(&keyring),
            plugin_id: self.plugin.as_deref(),
            instance_id: self.instance.as_deref(),
            release_date: self.release_date,
            now: self.now.unwrap_or_else(|| SystemTime::now().into()),
        };
        let inspection = license::inspect(&token, &known);
        console.print(&as_json(&inspection), |_| report(&inspection))?;
        match inspection
            .checks
            .into_iter()
            .find_map(|(_, verdict)| if let Verdict::Refused(refusal) = verdict { Some(refusal) } else { None })
        {
            Some(refusal) => Err(refusal.into()),
            None => Ok(()),
        }
    }
}

/// All that is known of a licence, for programs.
fn as_json(inspection: &Inspection) -> Value {
    let check = |(name, verdict): &(&str, Verdict)| match verdict {
        Verdict::Passed(how) => json!({"check": name, "result": "ok", "code": null, "message": how}),
        Verdict::Refused(refusal) => {
            json!({"check": name, "result": "refused", "code": refusal.code.as_str(), "message": refusal.what})
        }
        Verdict::Unchecked(missing) => json!({"check": name, "result": "unchecked", "code": null, "message": missing}),
    };
    let checks: Vec<Value> = inspection.checks.iter().map(check).collect();
    json!({"kid": inspection.kid, "claims": inspection.claims, "checks": checks})
}

/// All that is known of a licence, a line each.
fn report(inspection: &Inspection) -> String {
    let mut lines = Vec::new();
    if let Some(claims) = &inspection.claims {
        let list = |items: Vec<String>, none: &str| if items.is_empty() { none.to_owned() } else { items.join(", ") };
        let some = |item: Option<String>, none: &str| item.unwrap_or_else(|| none.to_owned());
        let key = inspection.kid.as_deref().unwrap_or_default();
        let instances =
            claims.inst.iter().map(|id| if id == license::ANY_INSTANCE { "every one".to_owned() } else { id.clone() });
        let grace = match claims.grace_days {
            0 => String::new(),
            days => format!(", and the plugin still runs for {} after that", license::days(days.into())),
        };
        lines.extend([
            ("licence", claims.jti.clone()),
            ("issued", format!("by {} at {}, to be signed with the key {key}", claims.iss, claims.iat)),
            ("customer", some(claims.sub.clone(), "not named")),
            ("plugin", claims.aud.clone()),
            ("instances", list(instances.collect(), "none")),
            ("begins", some(claims.nbf.map(|time| time.to_string()), "at once")),
            ("expires", some(claims.exp.map(|time| format!("{time}{grace}")), "never")),
            ("releases", some(claims.upd.map(|date| format!("up to {date}")), "every one")),
            ("features", list(claims.feat.clone(), "none")),
            ("limits", list(claims.lim.iter().map(|(name, number)| format!("{name} {number}")).collect(), "none")),
        ]);
    }
    let claims = lines.iter().map(|(name, value)| format!("{name:<12}{}\n", escape::shown(value)));
    let checks = inspection.checks.iter().map(|(name, verdict)| {
        let verdict = match verdict {
            Verdict::Passed(how) => format!("ok: {how}"),
            Verdict::Refused(refusal) => format!("refused: {}: {}", refusal.code, refusal.what),
            Verdict::Unchecked(missing) => format!("not checked: {missing}"),
        };
        format!("  {name:<12}{}\n", escape::shown(&verdict))
    });
    claims.chain(std::iter::once("checks\n".to_owned())).chain(checks).collect()
}
