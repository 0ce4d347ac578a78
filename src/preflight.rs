//! Why a file could not be executed, found out before it is tried: the kernel's own word is too short for an operator.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Where an ELF header says where the program headers are: for 32-bit and for 64-bit files the offset and size of the place,
/// and the offsets of the size and of the number of the headers (elf(5), Elf32_Ehdr and Elf64_Ehdr).
const ELF_LAYOUTS: [(u8, ElfLayout); 2] = [(1, (28, 4, 42, 44)), (2, (32, 8, 54, 56))];

/// See [`ELF_LAYOUTS`].
type ElfLayout = (usize, usize, usize, usize);

/// What of a file is looked at, in bytes: the kernel reads as much to tell how to run it.
const HEAD: u64 = 256;

/// The machine numbers of ELF headers (`e_machine`), by the names Rust has for the architectures.
const ELF_MACHINES: [(u64, &str); 9] = [
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
        Ok(_) if head.starts_with(b"\x7fELF") => check_elf(&head, metadata.len()),
        Ok(_) if head.starts_with(b"#!") => check_script(&head),
        Ok(0) => Err("it is empty".into()),
        Ok(_) => Err("it is neither a program for this system nor a script that begins with #!".into()),
    }
}

fn check_elf(head: &[u8], length: u64) -> Result<(), String> {
    let cut_short = || "it is an ELF file cut short".to_owned();
    let little_endian = head.get(5) == Some(&1);
    let number = |at: usize, size: usize| {
        let bytes = head.get(at..at + size)?;
        let fold = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        Some(if little_endian { bytes.iter().rev().fold(0, fold) } else { bytes.iter().fold(0, fold) })
    };
    let machine = number(18, 2).ok_or_else(cut_short)?;
    let name = ELF_MACHINES.iter().find(|(number, _)| *number == machine).map(|(_, name)| *name);
    match name {
        Some(name) if name == std::env::consts::ARCH || (name == "x86" && std::env::consts::ARCH == "x86_64") => {
            let layout = ELF_LAYOUTS.iter().find(|(class, _)| Some(class) == head.get(4)).map(|(_, layout)| *layout);
            let headers_end = layout.and_then(|(place, place_size, size, count)| {
                let (count, size) = (number(count, 2)?, number(size, 2)?);
                (count > 0).then_some(number(place, place_size)?.saturating_add(count * size))
            });
            // The kernel refuses such a file with a word that makes the C library try it as a shell script.
            headers_end.filter(|end| *end <= length).map(drop).ok_or_else(cut_short)
        }
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
        let mut truncated = fs::read("/bin/sh").unwrap();
        truncated.truncate(64);
        let cases: [(&[u8], u32, &str); 10] = [
            (b"#!/bin/sh\n", 0o644, "it is not executable: chmod +x"),
            (b"", 0o755, "it is empty"),
            (b"plain text", 0o755, "it is neither a program"),
            (b"#!/no/such/python\n", 0o755, "its interpreter /no/such/python is not installed"),
            (b"#!/usr/bin/env no-such-python\n", 0o755, "its interpreter no-such-python is not installed"),
            (b"#!/bin/sh\r\n", 0o755, "its first line ends in CR LF"),
            (b"#!\n", 0o755, "its first line, #!, names no interpreter"),
            (&elf, 0o755, "it is built for s390x, this machine is"),
            (b"\x7fELF", 0o755, "it is an ELF file cut short"),
            (&truncated, 0o755, "it is an ELF file cut short"),
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
