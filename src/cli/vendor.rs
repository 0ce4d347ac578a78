//! `plugrack license keygen`, `issue` and `inspect`: commands that work without a host.

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

/// Most bytes to read of a key file: many times its usual size.
const MAX_KEY_FILE: u64 = 64 * 1024;

#[derive(Debug, Subcommand)]
pub(super) enum Vendor {
    /// Create a key pair for signing licences: write the private key to a file, print the public key
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
    /// Explain the claims of a licence, and check them
    Inspect(Inspect),
}

#[derive(Debug, Args)]
pub(super) struct Issue {
    /// File of the private key
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The plugin's id
    #[arg(long, value_name = "ID")]
    plugin: String,
    /// Instance it is for, as printed by `plugrack instance` there; '*' means every instance; may be repeated
    #[arg(long = "instance", value_name = "UUID", required = true)]
    instances: Vec<String>,
    /// Who issues it; by default the key's name
    #[arg(long, value_name = "NAME")]
    issuer: Option<String>,
    /// Who it is issued to
    #[arg(long, value_name = "NAME")]
    customer: Option<String>,
    /// Last day of validity, or the time at which it expires; by default it never expires
    #[arg(long, value_name = "DATE", value_parser = last_second)]
    expires: Option<Time>,
    /// First day of validity, or a time; by default it is valid at once
    #[arg(long, value_name = "DATE", value_parser = first_second)]
    not_before: Option<Time>,
    /// Days after expiry during which the plugin still runs
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=i64::from(MAX_GRACE_DAYS)))]
    grace_days: u16,
    /// Last release date of the plugin that it covers; by default it covers all releases
    #[arg(long, value_name = "DATE")]
    updates_until: Option<Date>,
    /// Feature that it grants; may be repeated
    #[arg(long = "feature", value_name = "FEATURE")]
    features: Vec<String>,
    /// Limit that it grants; may be repeated
    #[arg(long = "limit", value_name = "NAME=N", value_parser = limit)]
    limits: Vec<(String, u64)>,
}

#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// The token; - reads it from standard input
    token: String,
    /// Public key of the vendor, as printed by keygen; may be repeated
    #[arg(long = "public-key", value_name = "KID=KEY", value_parser = key)]
    keys: Vec<(String, String)>,
    /// Plugin that it must be for
    #[arg(long, value_name = "ID")]
    plugin: Option<String>,
    /// Instance that it must be for
    #[arg(long, value_name = "UUID")]
    instance: Option<String>,
    /// Release date of the plugin that it must cover
    #[arg(long, value_name = "DATE")]
    release_date: Option<Date>,
    /// Time at which it must be valid, such as 2026-09-26T12:00:00Z; by default now
    #[arg(long, value_name = "TIME")]
    now: Option<Time>,
}

/// The content of a private key file.
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
        .ok_or_else(|| format!("expected a name and a whole number up to {MAX_LIMIT}, such as users=25"))
}

fn key(text: &str) -> Result<(String, String), String> {
    let key = text.split_once(['=', ' ']).map(|(kid, key)| (kid.to_owned(), key.to_owned()));
    key.ok_or_else(|| "expected the name and the text of a key, such as acme-2026a=k4.public.…".to_owned())
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
    let key = SigningKey::generate(kid)?.context("the system has no random bytes: try again")?;
    let path = out.unwrap_or_else(|| PathBuf::from(format!("{kid}.key")));
    write_key(&path, &key, force).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            anyhow!("{} already exists: name another file with --out, or overwrite the key with --force", path.display())
        }
        _ => anyhow!("cannot write the key to {}: {error}", path.display()),
    })?;
    let answer = json!({"kid": kid, "public_key": key.public(), "file": path.display().to_string()});
    console.print(&answer, |_| format!("{kid} {}\n", key.public()))
}

/// Writes a key atomically, by renaming a temporary file that only its owner can read.
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
    // The parser's error is dropped, because it could quote the key.
    let Ok(KeyFile { kid, secret }) = serde_json::from_str(&text) else {
        bail!("{} is not a private key; to create one: plugrack license keygen", path.display());
    };
    SigningKey::parse(&kid, &secret).with_context(|| path.display().to_string())
}

impl Issue {
    fn run(self, console: &Console) -> Result<()> {
        let key = read_key(&self.key)?;
        if !is_plugin_id(&self.plugin) {
            bail!("{:?} is not a valid plugin id; the plugin's --metadata prints it", self.plugin);
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
            bail!("a licence that never expires has no grace period: add --expires, or leave out --grace-days");
        }
        if let (Some(nbf), Some(exp)) = (claims.nbf, claims.exp)
            && nbf >= exp
        {
            bail!("the licence would expire at {exp}, before it becomes valid at {nbf}: change --expires or --not-before");
        }
        let token = license::issue(&claims, &key)?;
        console.print(&json!({"token": token, "claims": claims}), |_| format!("{token}\n"))
    }
}

/// Parses an instance id in any UUID form, or the star.
fn instance(text: &str) -> Result<String> {
    match Uuid::try_parse(text) {
        Ok(id) => Ok(id.to_string()),
        Err(_) if text == license::ANY_INSTANCE => Ok(text.to_owned()),
        Err(_) => {
            bail!(
                "{text:?} is not an instance id: plugrack instance prints it on the customer's machine; '*' means every instance"
            )
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

/// The claims and checks of a licence as JSON.
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

/// The claims and checks of a licence, one on each line.
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
            ("issued", format!("by {} at {}, with the key {key}", claims.iss, claims.iat)),
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
