//! Removal of a temporary directory with what others have put there.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Removes a directory and all that is in it, also in directories that are read-only, as in Go's module cache. Follows no link. It is no
/// error if there is nothing.
///
/// # Errors
/// Something cannot be removed.
pub(crate) fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        done => return done,
    }
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        // If this fails, the removal says why.
        fs::set_permissions(&directory, Permissions::from_mode(0o700)).ok();
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        directories.extend(entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
    fs::remove_dir_all(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_removed_with_those_that_are_read_only_and_without_what_links_lead_to() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("file"), "").unwrap();
        std::os::unix::fs::symlink(outside.path(), inner.join("link")).unwrap();
        for path in [&inner, &directory.path().join("a")] {
            fs::set_permissions(path, Permissions::from_mode(0o500)).unwrap();
        }
        remove(directory.path()).unwrap();
        assert!(!directory.path().exists() && outside.path().join("kept").exists());
        remove(directory.path()).unwrap();
    }
}
