//! The exit of a plugin's process, or the failure of its start. Pure.

use crate::license::Code;

/// How a plugin's process, or its start, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Exit code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Killed by SIGKILL while the kernel's out-of-memory killer was active.
    OutOfMemory,
    /// The file cannot be executed here.
    Unfit,
    /// The file was replaced since its metadata was read.
    Changed,
    /// Its uid, or its directories under that uid, cannot be set up.
    NoUser,
    /// It does not speak this version of the protocol.
    Incompatible,
    /// It refused its licence with this code.
    Unlicensed(Code),
    /// Not enough files, threads or memory. Not the plugin's fault, so it does not count.
    NoCapacity,
    /// It could not be started because of a temporary lack of something.
    NotStarted,
    /// The host ended it because of a fault.
    Fault,
}

impl Exit {
    /// Whether another start would change nothing. The codes are those of sysexits.h (64 usage, 77 permission, 78 configuration)
    /// and of a shell (126 not executable, 127 not found).
    pub(crate) fn is_permanent(self) -> bool {
        match self {
            Self::Code(64 | 77 | 78 | 126 | 127) | Self::Unfit | Self::NoUser | Self::Incompatible => true,
            Self::Unlicensed(code) => !code.is_temporary(),
            _ => false,
        }
    }

    /// Whether the plugin reports a temporary failure (75 of sysexits.h), which never counts towards a crash loop.
    pub(crate) fn is_temporary(self) -> bool {
        match self {
            Self::Code(code) => code == 75,
            Self::Unlicensed(code) => code.is_temporary(),
            _ => false,
        }
    }

    /// What the operator can do about it for the plugin `id`, one sentence.
    pub(crate) fn advice(self, id: &str) -> String {
        match self {
            Self::Code(64) => "install a build of the plugin that fits this plugrack".into(),
            Self::Code(75) => "nothing, unless it persists: the plugin waits for something that it needs".into(),
            Self::Code(77) => format!("grant the missing permission, then: plugrack start {id}"),
            Self::Code(78) => {
                format!(
                    "set the missing setting, which starts it again: plugrack config set {id} KEY VALUE, or plugrack env set {id} NAME VALUE"
                )
            }
            Self::Code(126 | 127) | Self::Unfit => {
                "replace it by a file that can be executed; it is then tried again by itself".into()
            }
            Self::Changed => "nothing: the host reads the metadata of the new file, then starts it".into(),
            Self::NoUser => format!("do what the reason says, then: plugrack start {id}"),
            Self::Incompatible => "install a build of the plugin that speaks the protocol of this plugrack".into(),
            Self::Unlicensed(Code::ClockNotSet) => "set the clock of this machine; it is then tried again by itself".into(),
            Self::Unlicensed(_) => {
                format!(
                    "ask its vendor for a licence for this instance (plugrack instance), then: plugrack license set {id} TOKEN"
                )
            }
            Self::OutOfMemory => "give the machine or the container more memory, or reduce the plugin's memory use".into(),
            Self::NoCapacity => "raise that limit, or stop another plugin; it is tried again by itself".into(),
            Self::NotStarted => "provide what the reason names; it is tried again by itself".into(),
            Self::Code(_) | Self::Signal(_) | Self::Fault => {
                format!("fix the error in its last lines (plugrack logs {id}), then: plugrack start {id}")
            }
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let meaning = |code| match code {
            64 => " (usage)",
            75 => " (temporary failure)",
            77 => " (permission denied)",
            78 => " (licence or configuration refused)",
            126 => " (not executable)",
            127 => " (not found)",
            _ => "",
        };
        match *self {
            Self::Code(code) => write!(f, "exit code {code}{}", meaning(code)),
            Self::Signal(signal) => match signal_hook::low_level::signal_name(signal) {
                Some(name) => write!(f, "killed by signal {signal} ({name})"),
                None => write!(f, "killed by signal {signal}"),
            },
            Self::OutOfMemory => {
                f.write_str("killed for memory: signal 9 (SIGKILL) while the kernel's out-of-memory killer was active")
            }
            Self::Unfit => f.write_str("cannot be executed"),
            Self::Changed => f.write_str("its file was replaced: the host reads the new file's metadata before it starts it"),
            Self::NoUser => f.write_str("its uid cannot be set up"),
            Self::Incompatible => f.write_str("speaks another protocol"),
            Self::Unlicensed(code) => write!(f, "licence refused ({code})"),
            Self::NotStarted => f.write_str("did not start"),
            Self::NoCapacity => f.write_str("no capacity"),
            Self::Fault => f.write_str("ended by the host"),
        }
    }
}
