//! Why a file cannot be executed: the kernel's own word is too short for an operator.
//!
//! Before a file is executed only that is looked at which holds for every kernel: what kind of file it is, and who may execute it. What is
//! in it explains a failure afterwards; the kernel may know formats that are not known here (binfmt_misc).

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

/// What of a file is looked at, in bytes: the kernel reads as much to tell how to run it.
const HEAD: u64 = 256;

/// Most bytes of program headers, and of a loader's path: the kernel takes no more either, see binfmt_elf.c.
const MAX_PROGRAM_HEADERS: usize = 64 * 1024;
const MAX_LOADER_PATH: usize = 4096;

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

/// Says why no kernel would execute a file.
///
/// # Errors
/// A sentence.
pub(crate) fn check(program: &Path) -> Result<(), String> {
    let metadata = fs::metadata(program).map_err(|error| format!("cannot look at it: {error}"))?;
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

/// Says in a sentence why the kernel has not executed a file, as far as its content tells.
pub(crate) fn explain(program: &Path) -> Option<String> {
    // A file may be executable and not readable.
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
        if head.is_empty() { "it is empty" } else { "it is neither a program for this system nor a script that begins with #!" };
    Some(what.into())
}

/// Says in a sentence why a script has failed whose interpreter the kernel has executed, as far as its first line tells.
pub(crate) fn explain_script(program: &Path) -> Option<String> {
    let head = head(&File::open(program).ok()?)?;
    head.starts_with(b"#!").then(|| check_script(&head).err())?
}

/// What the kernel reads of a file to tell how to execute it.
fn head(file: &File) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    file.take(HEAD).read_to_end(&mut head).ok()?;
    Some(head)
}

/// The interpreter that the first line of a script names; nothing for what is none.
pub(crate) fn interpreter(program: &Path) -> Option<PathBuf> {
    let head = head(&File::open(program).ok()?)?;
    let line = head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    String::from_utf8_lossy(line).split_ascii_whitespace().next().map(PathBuf::from)
}

/// The kernel refuses a file that is cut short with a word that makes the C library try it as a shell script, and one whose
/// loader is missing with the word for a missing file.
fn check_elf(file: &File, head: &[u8], length: u64) -> Result<(), String> {
    let cut_short = || "it is an ELF file cut short".to_owned();
    let tail = head.get(EI_NIDENT..).ok_or_else(cut_short)?;
    let header = parse_ident::<AnyEndian>(head).and_then(|ident| FileHeader::parse_tail(ident, tail)).map_err(|_| cut_short())?;
    let here = std::env::consts::ARCH;
    match ELF_MACHINES.iter().find(|(number, _)| *number == header.e_machine) {
        Some((_, name)) if *name == here || (*name == "x86" && here == "x86_64") => {}
        Some((_, name)) => return Err(format!("it is built for {name}, this machine is {here}")),
        None => return Err(format!("it is built for another machine (ELF number {}), this one is {here}", header.e_machine)),
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
    // "#!/usr/bin/env name" looks in PATH; with options, env's own ways are left to env.
    match words.next() {
        Some(name) if interpreter.ends_with("/env") && !name.starts_with('-') && !name.contains(['=', '/']) && !in_path(name) => {
            Err(format!("its interpreter {name} is not installed (looked in PATH)"))
        }
        _ => Ok(()),
    }
}

/// Whether a program is in `PATH`; where there is no such variable that is not known here.
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
            (b"\x7fELF", 0o755, "it is an ELF file cut short"),
            (&truncated, 0o755, "it is an ELF file cut short"),
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
