//! The chunked body of a request (RFC 9112, section 7.1), taken apart. Pure.
//!
//! Only the data comes out: extensions and trailers are checked and thrown away, as nobody here knows what they mean. What is
//! refused: sizes that are anything but hexadecimal digits, line ends other than CRLF, characters that do not belong in a
//! header, and more of extensions and trailers than anybody needs.

use super::head::{is_token, is_value};

/// Most digits of a chunk's size: with 16 the number always fits 64 bits.
const MAX_SIZE_DIGITS: u8 = 16;

/// Most bytes of extensions in one body. Nobody reads them, and they must not be a way past the limit of bodies.
const MAX_EXTENSIONS: usize = 16 * 1024;

/// Most bytes of trailers, their line ends included: as much as a head may have.
const MAX_TRAILERS: usize = 16 * 1024;

/// Most lines of trailers: as many as a head may have headers.
const MAX_TRAILER_LINES: usize = 64;

/// Takes a chunked body apart as it comes.
#[derive(Debug)]
pub(crate) struct Decoder {
    state: State,
    /// Bytes of extensions so far.
    extensions: usize,
    /// Bytes of trailers so far.
    trailers: usize,
    /// Trailers so far.
    trailer_lines: usize,
}

/// What is expected next.
#[derive(Debug, Clone, Copy)]
enum State {
    /// A digit of a chunk's size, or what ends it.
    Size {
        size: u64,
        digits: u8,
    },
    /// More of an extension, or its end.
    Extension {
        size: u64,
    },
    /// The end of the line of a chunk's size.
    SizeEnd {
        size: u64,
    },
    /// So many bytes of data, at least one.
    Data {
        left: u64,
    },
    /// The line end after a chunk's data.
    DataCr,
    DataLf,
    /// A trailer, or the end of all.
    Trailer,
    TrailerName,
    TrailerValue,
    TrailerEnd,
    /// The line end after which nothing follows.
    LastLf,
    Ended,
}

/// What a piece of the body has given.
pub(crate) struct Step<'a> {
    /// Bytes that need not be shown again.
    pub(crate) used: usize,
    /// Data among them.
    pub(crate) data: &'a [u8],
    /// The body has ended; what follows is not part of it.
    pub(crate) ended: bool,
}

/// Why a body cannot be read. Nothing after it can be either.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// It is not a chunked body.
    Malformed,
    /// It has more extensions or trailers than are taken.
    TooLarge,
}

impl Decoder {
    /// Before the first chunk.
    pub(crate) fn new() -> Self {
        let state = State::Size { size: 0, digits: 0 };
        Self { state, extensions: 0, trailers: 0, trailer_lines: 0 }
    }

    /// Takes the next piece of the body, up to the end of one run of data. Uses at least one byte of it, unless it is empty or the
    /// body has ended. Of no more use after an error.
    pub(crate) fn step<'a>(&mut self, input: &'a [u8]) -> Result<Step<'a>, Broken> {
        let mut used = 0;
        while let Some(&byte) = input.get(used) {
            match self.state {
                State::Data { left } => {
                    let rest = &input[used..];
                    let length = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
                    let left = left - length as u64;
                    self.state = if left == 0 { State::DataCr } else { State::Data { left } };
                    return Ok(Step { used: used + length, data: &rest[..length], ended: false });
                }
                State::Ended => break,
                _ => self.state = self.next(byte)?,
            }
            used += 1;
        }
        Ok(Step { used, data: &[], ended: matches!(self.state, State::Ended) })
    }

    /// The state after a byte that is not data.
    fn next(&mut self, byte: u8) -> Result<State, Broken> {
        match (self.state, byte) {
            (State::Size { size, digits: 1.. }, b'\r') => Ok(State::SizeEnd { size }),
            (State::Size { size, digits: 1.. }, b';') => self.extension(size),
            (State::Size { size, digits: digits @ 0..MAX_SIZE_DIGITS }, _) => {
                let digit = char::from(byte).to_digit(16).ok_or(Broken::Malformed)?;
                Ok(State::Size { size: size << 4 | u64::from(digit), digits: digits + 1 })
            }
            (State::Extension { size }, b'\r') => Ok(State::SizeEnd { size }),
            (State::Extension { size }, _) if is_value(byte) => self.extension(size),
            (State::SizeEnd { size: 0 }, b'\n') => Ok(State::Trailer),
            (State::SizeEnd { size }, b'\n') => Ok(State::Data { left: size }),
            (State::DataCr, b'\r') => Ok(State::DataLf),
            (State::DataLf, b'\n') => Ok(State::Size { size: 0, digits: 0 }),
            (State::Trailer, b'\r') => Ok(State::LastLf),
            (State::Trailer, _) if is_token(byte) => {
                self.trailer_lines += 1;
                if self.trailer_lines > MAX_TRAILER_LINES {
                    return Err(Broken::TooLarge);
                }
                self.trailer(State::TrailerName)
            }
            (State::TrailerName, b':') => self.trailer(State::TrailerValue),
            (State::TrailerName, _) if is_token(byte) => self.trailer(State::TrailerName),
            (State::TrailerValue, b'\r') => self.trailer(State::TrailerEnd),
            (State::TrailerValue, _) if is_value(byte) => self.trailer(State::TrailerValue),
            (State::TrailerEnd, b'\n') => self.trailer(State::Trailer),
            (State::LastLf, b'\n') => Ok(State::Ended),
            _ => Err(Broken::Malformed),
        }
    }

    /// Counts a byte of an extension of the chunk of this size.
    fn extension(&mut self, size: u64) -> Result<State, Broken> {
        self.extensions += 1;
        if self.extensions > MAX_EXTENSIONS { Err(Broken::TooLarge) } else { Ok(State::Extension { size }) }
    }

    /// Counts a byte of a trailer.
    fn trailer(&mut self, next: State) -> Result<State, Broken> {
        self.trailers += 1;
        if self.trailers > MAX_TRAILERS { Err(Broken::TooLarge) } else { Ok(next) }
    }
}
