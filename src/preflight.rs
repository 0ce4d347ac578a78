//! Why a file could not be executed, found out before it is tried: the kernel's own word is too short for an operator.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What of a file is looked at, in bytes: the kernel reads as much to tell how to run it.
const HEAD: u64 = 256;

/// The machine numbers of ELF headers (`e_machine`), by the names Rust has for the architectures.
const ELF_MACHINES: [(u16, &str); 9] = [
    (3, "x86"),
    (8, "mips"),
    (20, "powerpc"),
    (21, "powerpc64"),
    (22, "s390x"),
    (40, "arm"),
    (62, "x86_64"),
    (183, "aarch64"),
    (243, "riscv64"),
];

/// Says why a file cannot be executed here, as far as it can be told by looking.
pub(crate) fn check(program: &Path) -> Result<(), String> {
    let metadata = fs::metadata(program).map_err(|error| format!("cannot look at it: {error}"))?;
    if !metadata.is_file() {
        return Err("it is not a regular file".into());
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(format!("it is not executable: chmod +x {}", program.display()));
    }
    let mut head = Vec::new();
    let read = File::open(program).and_then(|file| file.take(HEAD).read_to_end(&mut head));
    match read {
        // A file may be executable and not readable; the kernel will say more.
        Err(_) => Ok(()),
        Ok(_) if head.starts_with(b"\x7fELF") => check_elf(&head),
        Ok(_) if head.starts_with(b"#!") => check_script(&head),
        Ok(0) => Err("it is empty".into()),
        Ok(_) => Err("it is neither a program for this system nor a script that begins with #!".into()),
    }
}

fn check_elf(head: &[u8]) -> Result<(), String> {
    let little_endian = head.get(5) == Some(&1);
    let Some(&[a, b]) = head.get(18..20).and_then(<[u8]>::first_chunk) else { return Err("it is an ELF file cut short".into()) };
    let machine = if little_endian { u16::from_le_bytes([a, b]) } else { u16::from_be_bytes([a, b]) };
    let name = ELF_MACHINES.iter().find(|(number, _)| *number == machine).map(|(_, name)| *name);
    match name {
        Some(name) if name == std::env::consts::ARCH => Ok(()),
        Some("x86") if std::env::consts::ARCH == "x86_64" => Ok(()),
        Some(name) => Err(format!("it is built for {name}, this machine is {}", std::env::consts::ARCH)),
        None => Err(format!("it is built for another machine (ELF number {machine}), this one is {}", std::env::consts::ARCH)),
    }
}

fn check_script(head: &[u8]) -> Result<(), String> {
    let line = head[2..].split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    if line.ends_with('\r') {
        return Err("its first line ends in CR LF, as Windows writes it: convert it to LF".into());
    }
    let mut words = line.split_ascii_whitespace();
    let Some(interpreter) = words.next() else { return Err("its first line, #!, names no interpreter".into()) };
    if !Path::new(interpreter).exists() {
        return Err(format!("its interpreter {interpreter} is not installed"));
    }
    // "#!/usr/bin/env name" looks in PATH; with options, env's own ways are left to env.
    match words.next() {
        Some(name) if interpreter.ends_with("/env") && !name.starts_with('-') && !name.contains(['=', '/']) && !in_path(name) => {
            Err(format!("its interpreter {name} is not installed (looked in PATH)"))
        }
        _ => Ok(()),
    }
}

fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_has_its_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18..20].copy_from_slice(&22u16.to_le_bytes());
        let cases: [(&[u8], u32, &str); 9] = [
            (b"#!/bin/sh\n", 0o644, "it is not executable: chmod +x"),
            (b"", 0o755, "it is empty"),
            (b"plain text", 0o755, "it is neither a program"),
            (b"#!/no/such/python\n", 0o755, "its interpreter /no/such/python is not installed"),
            (b"#!/usr/bin/env no-such-python\n", 0o755, "its interpreter no-such-python is not installed"),
            (b"#!/bin/sh\r\n", 0o755, "its first line ends in CR LF"),
            (b"#!\n", 0o755, "its first line, #!, names no interpreter"),
            (&elf, 0o755, "it is built for s390x, this machine is"),
            (b"\x7fELF", 0o755, "it is an ELF file cut short"),
        ];
        for (content, mode, reason) in cases {
            fs::write(&program, content).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
            let error = check(&program).unwrap_err();
            assert!(error.starts_with(reason), "{error}");
        }
        fs::write(&program, b"#!/usr/bin/env sh\n").unwrap();
        assert_eq!(check(&program), Ok(()));
        assert_eq!(check(Path::new("/bin/sh")), Ok(()));
        assert_eq!(check(dir.path()), Err("it is not a regular file".into()));
    }
}
