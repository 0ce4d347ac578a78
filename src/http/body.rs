//! A buffer for the body of a request: a queue of bytes, in memory while all bodies together fit into `--body-memory`, and then in an
//! unlinked temporary file.

use crate::protocol::message::MAX_INLINE_BODY;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest block of memory, in bytes: a body that fits into one frame to a plugin, and one byte more, so that the read of its last byte
/// also shows whether anything follows.
const BLOCK: usize = MAX_INLINE_BODY + 1;

/// The memory and disk space that all bodies share.
#[derive(Debug)]
pub(crate) struct BodySpace {
    memory_left: AtomicU64,
    disk_left: AtomicU64,
    directory: PathBuf,
    /// Limit of one body's file, in bytes. The file is a ring: its beginning is reused once it has been read.
    file_size: u64,
}

impl BodySpace {
    /// `memory` and `disk` are limits for all bodies together, `most` is the limit for one, in bytes. Files go to `directory`.
    pub(crate) fn new(memory: u64, disk: u64, directory: PathBuf, most: u64) -> Arc<Self> {
        Arc::new(Self { memory_left: memory.into(), disk_left: disk.into(), directory, file_size: most.max(1) })
    }
}

/// Reserves bytes, if so many are left.
fn take(left: &AtomicU64, bytes: u64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
}

/// Why a body could not be buffered.
#[derive(Debug)]
pub(crate) enum Full {
    /// The limit for all bodies, or for one, is reached.
    Limit,
    /// The disk has no space left.
    Disk,
    /// The file cannot be created, written or read.
    Failed(io::Error),
}

impl From<io::Error> for Full {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Disk,
            _ => Self::Failed(error),
        }
    }
}

/// The buffered bytes of one body, in order: first the blocks in memory, then the file.
#[derive(Debug)]
pub(crate) struct Body {
    space: Arc<BodySpace>,
    blocks: VecDeque<Vec<u8>>,
    /// Bytes of the first block that were read already.
    taken: usize,
    in_memory: usize,
    /// Bytes still to be received; 0 if unknown.
    expected: u64,
    file: Option<Spool>,
}

#[derive(Debug)]
struct Spool {
    file: File,
    /// Total bytes written to and read from it.
    written: u64,
    read: u64,
    /// Bytes that it occupies on disk.
    size: u64,
}

impl Body {
    /// An empty body that expects a number of bytes; 0 if that is unknown.
    pub(crate) fn new(space: &Arc<BodySpace>, expected: u64) -> Self {
        Self { space: Arc::clone(space), blocks: VecDeque::new(), taken: 0, in_memory: 0, expected, file: None }
    }

    /// Number of buffered bytes.
    pub(crate) fn len(&self) -> u64 {
        self.in_memory as u64 + self.file.as_ref().map_or(0, |spool| spool.written - spool.read)
    }

    /// Whether nothing is buffered.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `read` with the last block in memory, so that the bytes need not be copied. Returns what was read beyond the body's expected
    /// length, or `None`, without a call, if the bytes have to go to the file.
    ///
    /// # Errors
    /// The error of `read`.
    pub(crate) fn read_from(&mut self, read: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> io::Result<Option<Vec<u8>>> {
        if self.file.is_some() {
            return Ok(None);
        }
        let (space, expected) = (Arc::clone(&self.space), self.expected);
        let Some(block) = self.open_block(1) else { return Ok(None) };
        let (held, room) = (block.len(), block.capacity() - block.len());
        if !take(&space.memory_left, room as u64) {
            return Ok(None);
        }
        let outcome = read(block);
        let kept = usize::try_from(expected).unwrap_or(usize::MAX).min(block.len() - held);
        let beyond = block.split_off(held + kept);
        space.memory_left.fetch_add((room - kept) as u64, Ordering::Relaxed);
        self.note_received(kept);
        outcome.map(|()| Some(beyond))
    }

    /// The block with room at the end: the last, or a new one for all expected bytes and `least` at least.
    fn open_block(&mut self, least: usize) -> Option<&mut Vec<u8>> {
        if self.blocks.back().is_none_or(|block| block.len() == block.capacity()) {
            let size = usize::try_from(self.expected + 1).unwrap_or(BLOCK).max(least).min(BLOCK);
            self.blocks.push_back(Vec::with_capacity(size));
        }
        self.blocks.back_mut()
    }

    fn note_received(&mut self, bytes: usize) {
        self.in_memory += bytes;
        self.expected = self.expected.saturating_sub(bytes as u64);
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// There is no space for them. The body must not be used any more.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), Full> {
        // Bytes in the file follow those in memory. So all further ones go there until the file is empty.
        if self.file.is_none() && take(&self.space.memory_left, bytes.len() as u64) {
            let mut rest = bytes;
            while let Some(block) = self.open_block(rest.len())
                && !rest.is_empty()
            {
                let (now, later) = rest.split_at(rest.len().min(block.capacity() - block.len()));
                block.extend_from_slice(now);
                self.note_received(now.len());
                rest = later;
            }
            return Ok(());
        }
        let (space, length) = (&self.space, bytes.len() as u64);
        let spool = match &mut self.file {
            Some(spool) => spool,
            None => {
                let file = tempfile::tempfile_in(&space.directory)?;
                self.file.insert(Spool { file, written: 0, read: 0, size: 0 })
            }
        };
        let size = (spool.written + length).min(space.file_size).max(spool.size);
        if spool.written - spool.read + length > space.file_size || !take(&space.disk_left, size - spool.size) {
            return Err(Full::Limit);
        }
        spool.size = size;
        let at = spool.written % space.file_size;
        let to_end = usize::try_from(space.file_size - at).unwrap_or(usize::MAX).min(bytes.len());
        spool.written += length;
        self.expected = self.expected.saturating_sub(length);
        spool.file.write_all_at(&bytes[..to_end], at)?;
        Ok(spool.file.write_all_at(&bytes[to_end..], 0)?)
    }

    /// Takes the whole body if it is one block of memory.
    pub(crate) fn take_whole(&mut self) -> Option<Vec<u8>> {
        if self.blocks.len() != 1 || self.taken > 0 || self.file.is_some() {
            return None;
        }
        self.space.memory_left.fetch_add(self.in_memory as u64, Ordering::Relaxed);
        self.in_memory = 0;
        self.blocks.pop_front()
    }

    /// The unread part of the first block.
    fn front(&self) -> &[u8] {
        self.blocks.front().map_or(&[], |block| &block[self.taken..])
    }

    /// Removes bytes from the front of the first block.
    fn advance(&mut self, bytes: usize) {
        self.taken += bytes;
        self.in_memory -= bytes;
        self.space.memory_left.fetch_add(bytes as u64, Ordering::Relaxed);
        if self.front().is_empty() {
            self.blocks.pop_front();
            self.taken = 0;
        }
    }

    fn release_file(&mut self) {
        if let Some(spool) = self.file.take() {
            self.space.disk_left.fetch_add(spool.size, Ordering::Relaxed);
        }
    }
}

impl Read for Body {
    /// Reads from the front; 0 bytes if nothing is buffered.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let front = self.front();
        if !front.is_empty() {
            let n = front.len().min(buffer.len());
            buffer[..n].copy_from_slice(&front[..n]);
            self.advance(n);
            return Ok(n);
        }
        let Some(spool) = &mut self.file else { return Ok(0) };
        let at = spool.read % self.space.file_size;
        let there = (spool.written - spool.read).min(self.space.file_size - at);
        let n = usize::try_from(there).unwrap_or(usize::MAX).min(buffer.len());
        spool.file.read_exact_at(&mut buffer[..n], at)?;
        spool.read += n as u64;
        if spool.read == spool.written {
            self.release_file();
        }
        Ok(n)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.space.memory_left.fetch_add(self.in_memory as u64, Ordering::Relaxed);
        self.release_file();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl BodySpace {
        fn left(&self) -> (u64, u64) {
            (self.memory_left.load(Ordering::Relaxed), self.disk_left.load(Ordering::Relaxed))
        }
    }

    #[test]
    fn what_does_not_fit_in_memory_goes_to_disk_and_what_fits_nowhere_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let space = BodySpace::new(10, 20, directory.path().into(), 100);
        let (mut a, mut b) = (Body::new(&space, 0), Body::new(&space, 0));
        a.push(b"0123456789").unwrap();
        b.push(b"abc").unwrap();
        assert!(a.file.is_none() && b.file.is_some());
        assert!(matches!(b.push(&[0; 18]), Err(Full::Limit)));
        let mut out = Vec::new();
        b.read_to_end(&mut out).unwrap();
        assert_eq!((out.as_slice(), b.len()), (&b"abc"[..], 0));
        drop(a);
        assert_eq!(space.left(), (10, 20));
        // Once the file is empty memory is used again.
        b.push(b"x").unwrap();
        assert!(b.file.is_none());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "the file has no name");
    }

    #[test]
    fn one_with_a_length_is_read_to_one_block_and_what_came_behind_it_is_given_back() {
        let space = BodySpace::new(1000, 1000, std::env::temp_dir(), 1000);
        let come = |bytes: &'static [u8]| {
            move |block: &mut Vec<u8>| {
                assert!(block.capacity() - block.len() >= bytes.len(), "one byte more than is to come has room");
                block.extend_from_slice(bytes);
                Ok(())
            }
        };
        let mut body = Body::new(&space, 10);
        body.push(b"012").unwrap();
        assert_eq!(body.read_from(come(b"")).unwrap(), Some(vec![]));
        assert_eq!(body.read_from(come(b"3456")).unwrap(), Some(vec![]));
        assert_eq!(body.read_from(come(b"789G")).unwrap(), Some(b"G".to_vec()));
        assert_eq!((body.len(), space.left()), (10, (990, 1000)));
        assert_eq!(body.take_whole().unwrap(), b"0123456789");
        assert!(body.is_empty() && body.take_whole().is_none());
        assert_eq!(space.left(), (1000, 1000));
        // A read that fails takes nothing.
        assert!(Body::new(&space, 5).read_from(|_| Err(io::ErrorKind::ConnectionReset.into())).is_err());
        assert_eq!(space.left(), (1000, 1000));
        // Where there is no memory for all of it nothing is read, and what comes goes to the disk in time.
        let mut large = Body::new(&space, 1000);
        assert_eq!(large.read_from(|_| panic!("there is no room")).unwrap(), None);
        large.push(b"0123").unwrap();
        assert!(large.take_whole().is_some_and(|bytes| bytes == b"0123"));
        // In blocks of a frame's size.
        let space = BodySpace::new(1 << 20, 0, std::env::temp_dir(), 1);
        let mut long = Body::new(&space, 200_000);
        while long.len() < 200_000 {
            let fill = |block: &mut Vec<u8>| {
                block.resize(block.capacity(), 7);
                Ok(())
            };
            assert_eq!(long.read_from(fill).unwrap().map(|beyond| beyond.len()), Some(usize::from(long.len() == 200_000)));
        }
        assert_eq!((long.blocks.len(), long.take_whole()), (4, None));
        let mut bytes = Vec::new();
        long.read_to_end(&mut bytes).unwrap();
        assert!(bytes == [7; 200_000]);
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(
            memory in 0..200_000_u64,
            most in 1..500_000_u64,
            steps in proptest::collection::vec((0..150_000_usize, 0..200_000_usize), 1..20),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let space = BodySpace::new(memory, most, directory.path().into(), most);
            let mut body = Body::new(&space, 0);
            let (mut put, mut got, mut buffer) = (Vec::new(), Vec::new(), vec![0; 200_000]);
            for (push, take) in steps {
                let push = push.min(usize::try_from(most - body.len().min(most)).unwrap());
                let bytes: Vec<u8> = (put.len()..put.len() + push).map(|n| u8::try_from(n % 251).unwrap()).collect();
                body.push(&bytes).unwrap();
                put.extend(bytes);
                let n = body.read(&mut buffer[..take]).unwrap();
                got.extend_from_slice(&buffer[..n]);
                prop_assert_eq!(body.len(), (put.len() - got.len()) as u64);
            }
            body.read_to_end(&mut got).unwrap();
            prop_assert!(put == got);
            drop(body);
            prop_assert_eq!(space.left(), (memory, most));
        }
    }
}
