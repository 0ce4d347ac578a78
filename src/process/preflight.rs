//! Explains why a file cannot be executed, since the kernel's error code tells an operator too little.
//!
//! Before the execution only checks run that hold for every kernel: the type of the file, and who may execute it. The content explains a
//! failure afterwards, because the kernel may support formats that are unknown here (binfmt_misc).

use elf::abi::{EI_NIDENT, PT_INTERP};
use elf::endian::AnyEndian;
use elf::file::{FileHeader, parse_ident};
use elf::segment::SegmentTable;
use rustix::fs::{Access, AtFlags, CWD, StatVfsMountFlags, accessat, statvfs};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Bytes of a file to examine: the kernel reads as many to choose a binary format.
const HEAD: u64 = 256;

/// Most bytes of program headers and of a loader's path, the kernel's own limit (binfmt_elf.c).
const MAX_PROGRAM_HEADERS: usize = 64 * 1024;
const MAX_LOADER_PATH: usize = 4096;

/// Machine numbers of ELF headers (`e_machine`), with Rust's names of the architectures.
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

/// Checks what every kernel requires to execute a file.
///
/// # Errors
/// One sentence for the operator.
pub(crate) fn check(program: &Path) -> Result<(), String> {
    let metadata = fs::metadata(program).map_err(|error| format!("cannot examine it: {error}"))?;
    if !metadata.is_file() {
        return Err("it is not a regular file".into());
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(format!("it is not executable: chmod +x {}", program.display()));
    }
    if statvfs(program).is_ok_and(|system| system.f_flag.contains(StatVfsMountFlags::NOEXEC)) {
        return Err(
            "it lies on a file system that is mounted noexec: mount -o remount,exec it, or choose another --plugins".into()
        );
    }
    if accessat(CWD, program, Access::EXEC_OK, AtFlags::EACCESS).is_err_and(|error| error == Errno::ACCESS) {
        return Err(format!("the host's user may not execute it: see the modes and owners of {}", program.display()));
    }
    Ok(())
}

/// One sentence about why the kernel did not execute a file, judged by its content.
pub(crate) fn explain(program: &Path) -> Option<String> {
    // A file may be executable without being readable.
    let file = File::open(program).ok()?;
    let head = head(&file)?;
    if head.starts_with(b"\x7fELF") {
        let length = file.metadata().ok()?.len();
        return check_elf(&file, &head, length).err();
    }
    if head.starts_with(b"#!") {
        return check_script(&head).err();
    }
    let what =
        if head.is_empty() { "it is empty" } else { "it is neither a program for this system nor a script that starts with #!" };
    Some(what.into())
}

/// One sentence about why a script failed although the kernel executed its interpreter, judged by its first line.
pub(crate) fn explain_script(program: &Path) -> Option<String> {
    let head = head(&File::open(program).ok()?)?;
    head.starts_with(b"#!").then(|| check_script(&head).err())?
}

/// The part of a file that the kernel reads to choose a binary format.
fn head(file: &File) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    file.take(HEAD).read_to_end(&mut head).ok()?;
    Some(head)
}

/// The interpreter in the first line of a script; none if it is not a script.
pub(crate) fn interpreter(program: &Path) -> Option<PathBuf> {
    let head = head(&File::open(program).ok()?)?;
    let line = head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    String::from_utf8_lossy(line).split_ascii_whitespace().next().map(PathBuf::from)
}

/// For a truncated file the kernel returns an error on which the C library tries a shell (ENOEXEC), and for a missing loader the error
/// of a missing file (ENOENT).
fn check_elf(file: &File, head: &[u8], length: u64) -> Result<(), String> {
    let cut_short = || "it is a truncated ELF file".to_owned();
    let tail = head.get(EI_NIDENT..).ok_or_else(cut_short)?;
    let header = parse_ident::<AnyEndian>(head).and_then(|ident| FileHeader::parse_tail(ident, tail)).map_err(|_| cut_short())?;
    let here = std::env::consts::ARCH;
    match ELF_MACHINES.iter().find(|(number, _)| *number == header.e_machine) {
        Some((_, name)) if *name == here || (*name == "x86" && here == "x86_64") => {}
        Some((_, name)) => return Err(format!("it is built for {name}, this machine is {here}")),
        None => return Err(format!("it is built for another machine (ELF number {}), this machine is {here}", header.e_machine)),
    }
    let size = usize::from(header.e_phnum) * usize::from(header.e_phentsize);
    if size == 0 || size > MAX_PROGRAM_HEADERS || header.e_phoff.saturating_add(size as u64) > length {
        return Err(cut_short());
    }
    let read = |at, size| {
        let mut bytes = vec![0; size];
        file.read_exact_at(&mut bytes, at).map(|()| bytes).map_err(|_| cut_short())
    };
    let headers = read(header.e_phoff, size)?;
    let segments = SegmentTable::new(header.endianness, header.class, &headers);
    let Some(interpreter) = segments.iter().find(|segment| segment.p_type == PT_INTERP) else { return Ok(()) };
    let size = usize::try_from(interpreter.p_filesz).ok().filter(|size| *size <= MAX_LOADER_PATH).ok_or_else(cut_short)?;
    let path = read(interpreter.p_offset, size)?;
    let loader = Path::new(OsStr::from_bytes(path.split(|byte| *byte == 0).next().unwrap_or_default()));
    if loader.exists() {
        Ok(())
    } else {
        Err(format!("its loader {} is not installed: install that C library, or a static build of the plugin", loader.display()))
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
    // "#!/usr/bin/env name" searches PATH. Options of env are not interpreted here.
    match words.next() {
        Some(name) if interpreter.ends_with("/env") && !name.starts_with('-') && !name.contains(['=', '/']) && !in_path(name) => {
            Err(format!("its interpreter {name} is not installed (not found in PATH)"))
        }
        _ => Ok(()),
    }
}

/// Whether a program is in `PATH`; true if the variable is not set.
fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH");
    path.is_none_or(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_has_its_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        let mut elf = vec![0; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[18..20].copy_from_slice(&22u16.to_le_bytes());
        let shell = fs::read("/bin/sh").unwrap();
        let truncated = shell[..64].to_vec();
        // Another loader's name, as long as the one that is there.
        let mut foreign = shell.clone();
        let name = foreign.windows(7).position(|window| window == b"/lib64/").expect("the shell is linked dynamically");
        foreign[name..name + 7].copy_from_slice(b"/nolib/");
        let cases: [(&[u8], u32, &str); 11] = [
            (b"#!/bin/sh\n", 0o644, "it is not executable: chmod +x"),
            (b"", 0o755, "it is empty"),
            (b"plain text", 0o755, "it is neither a program"),
            (b"#!/no/such/python\n", 0o755, "its interpreter /no/such/python is not installed"),
            (b"#!/usr/bin/env no-such-python\n", 0o755, "its interpreter no-such-python is not installed"),
            (b"#!/bin/sh\r\n", 0o755, "its first line ends in CR LF"),
            (b"#!\n", 0o755, "its first line, #!, names no interpreter"),
            (&elf, 0o755, "it is built for s390x, this machine is"),
            (b"\x7fELF", 0o755, "it is a truncated ELF file"),
            (&truncated, 0o755, "it is a truncated ELF file"),
            (&foreign, 0o755, "its loader /nolib/ld-"),
        ];
        for (content, mode, reason) in cases {
            fs::write(&program, content).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
            let said = if mode == 0o755 { explain(&program) } else { check(&program).err() };
            assert!(said.as_ref().is_some_and(|said| said.starts_with(reason)), "{reason}: {said:?}");
            // What the kernel has the last word on is not forbidden.
            assert_eq!(check(&program).is_ok(), mode == 0o755, "{reason}");
        }
        fs::write(&program, b"#!/usr/bin/env sh\n").unwrap();
        assert_eq!((check(&program), explain(&program), explain_script(&program)), (Ok(()), None, None));
        assert_eq!((check(Path::new("/bin/sh")), explain(Path::new("/bin/sh"))), (Ok(()), None));
        assert_eq!(check(dir.path()), Err("it is not a regular file".into()));
        fs::write(&program, b"PK\x03\x04").unwrap();
        assert_eq!(explain_script(&program), None, "it is no script");
    }
}
