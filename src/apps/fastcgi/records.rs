//! Records of FastCGI (the specification, version 1.0, sections 3.3 and 5). Pure.

use std::ops::Range;

/// The version in each record.
const VERSION: u8 = 1;

/// The one request of a connection.
const REQUEST_ID: u16 = 1;

/// Size of a record's header in bytes.
const HEADER: usize = 8;

/// Most bytes of content in a record that the host sends: the format's limit, rounded down to a multiple of 8, so that none needs padding.
const MAX_CONTENT: usize = 0xFFF8;

/// The role of an application that answers requests.
const RESPONDER: u16 = 1;

/// Size of the content of a record that ends a request.
const END_SIZE: usize = 8;

const BEGIN_REQUEST: u8 = 1;
const END_REQUEST: u8 = 3;
const PARAMS: u8 = 4;
const STDIN: u8 = 5;
const STDOUT: u8 = 6;
const STDERR: u8 = 7;

/// Appends the beginning of a request: its role, for a connection that the application is to close, and its variables.
pub(super) fn put_request<'a>(out: &mut Vec<u8>, variables: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) {
    put_header(out, BEGIN_REQUEST, 8);
    out.extend_from_slice(&RESPONDER.to_be_bytes());
    // No flags, so the application closes the connection; and five reserved bytes.
    out.extend_from_slice(&[0; 6]);
    let mut params = Vec::new();
    for (name, value) in variables {
        put_length(&mut params, name.len());
        put_length(&mut params, value.len());
        params.extend_from_slice(name);
        params.extend_from_slice(value);
    }
    put_stream(out, PARAMS, &params);
    put_header(out, PARAMS, 0);
}

/// Appends a part of the request's body.
pub(super) fn put_body(out: &mut Vec<u8>, bytes: &[u8]) {
    put_stream(out, STDIN, bytes);
}

/// Appends the end of the request's body.
pub(super) fn put_body_end(out: &mut Vec<u8>) {
    put_header(out, STDIN, 0);
}

fn put_stream(out: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
    for content in bytes.chunks(MAX_CONTENT) {
        put_header(out, kind, u16::try_from(content.len()).unwrap_or(u16::MAX));
        out.extend_from_slice(content);
    }
}

fn put_header(out: &mut Vec<u8>, kind: u8, length: u16) {
    let [id_high, id_low] = REQUEST_ID.to_be_bytes();
    let [length_high, length_low] = length.to_be_bytes();
    out.extend_from_slice(&[VERSION, kind, id_high, id_low, length_high, length_low, 0, 0]);
}

/// A length in one byte or four (section 3.4).
fn put_length(out: &mut Vec<u8>, length: usize) {
    match u8::try_from(length) {
        Ok(length) if length < 0x80 => out.push(length),
        _ => out.extend_from_slice(&(u32::try_from(length).unwrap_or(u32::MAX >> 1) | 1 << 31).to_be_bytes()),
    }
}

/// What a step has found, as ranges of its input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A part of the response.
    Output(Range<usize>),
    /// A part of what the application complains of.
    Complaint(Range<usize>),
    /// The end of the request, with the application's status.
    End(u32),
    /// Nothing: more input is needed.
    Nothing,
}

/// Reads the records of a response.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// The header of the current record, as far as it was received.
    header: Vec<u8>,
    /// Bytes left of its content, and of the padding behind that.
    content: usize,
    padding: usize,
    /// The content of a record that ends the request.
    end: Vec<u8>,
}

impl Decoder {
    /// Reads one part of the input, and returns how many bytes were used. After an error nothing more can be read.
    ///
    /// # Errors
    /// What is wrong with the records, or the reason of the application that it refused the request, as a sentence about it.
    pub(super) fn step(&mut self, input: &[u8]) -> Result<(usize, Found), String> {
        let mut used = 0;
        loop {
            if self.header.len() < HEADER {
                let n = (HEADER - self.header.len()).min(input.len() - used);
                self.header.extend_from_slice(&input[used..used + n]);
                used += n;
                let &[version, kind, id_high, id_low, length_high, length_low, padding, _] = &self.header[..] else {
                    return Ok((used, Found::Nothing));
                };
                (self.content, self.padding) = (u16::from_be_bytes([length_high, length_low]).into(), padding.into());
                check(version, kind, u16::from_be_bytes([id_high, id_low]), self.content)?;
            }
            if self.content > 0 {
                let n = self.content.min(input.len() - used);
                let part = used..used + n;
                self.content -= n;
                match self.header[1] {
                    _ if n == 0 => return Ok((used, Found::Nothing)),
                    STDOUT => return Ok((part.end, Found::Output(part))),
                    STDERR => return Ok((part.end, Found::Complaint(part))),
                    _ => self.end.extend_from_slice(&input[part.clone()]),
                }
                used = part.end;
                if let &[first, second, third, fourth, status, ..] = &self.end[..]
                    && self.content == 0
                {
                    return match status {
                        0 => Ok((used, Found::End(u32::from_be_bytes([first, second, third, fourth])))),
                        1 => Err("it refused the request, because it takes one at a time on a connection".into()),
                        2 => Err("it refused the request, because it is overloaded".into()),
                        3 => Err("it refused the request, because it is no responder".into()),
                        _ => Err(format!("it ended the request with the unknown status {status}")),
                    };
                }
                continue;
            }
            let n = self.padding.min(input.len() - used);
            self.padding -= n;
            used += n;
            if self.padding > 0 {
                return Ok((used, Found::Nothing));
            }
            self.header.clear();
        }
    }
}

/// Checks the header of a record that the application sent.
fn check(version: u8, kind: u8, id: u16, length: usize) -> Result<(), String> {
    if version != VERSION {
        return Err(format!("it does not speak FastCGI: a record has the version {version}, and must have {VERSION}"));
    }
    match kind {
        STDOUT | STDERR | END_REQUEST if id != REQUEST_ID => {
            Err(format!("a record is for request {id}, and there is only request {REQUEST_ID}"))
        }
        STDOUT | STDERR => Ok(()),
        END_REQUEST if length == END_SIZE => Ok(()),
        END_REQUEST => Err(format!("the record that ends the request has {length} bytes, and must have {END_SIZE}")),
        _ => Err(format!("a record has the type {kind}, which no application sends to a responder's request")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u8, content: &[u8], padding: u8) -> Vec<u8> {
        let mut out = Vec::new();
        put_header(&mut out, kind, u16::try_from(content.len()).unwrap());
        out[6] = padding;
        [&out[..], content, &vec![0xEE; padding.into()]].concat()
    }

    /// Output, complaints, and the status at the end.
    type Decoded = (Vec<u8>, Vec<u8>, Option<u32>);

    /// What stands in a stream that arrives in pieces of this size.
    fn decode(input: &[u8], size: usize) -> Result<Decoded, String> {
        let (mut decoder, mut output, mut complaint) = (Decoder::default(), Vec::new(), Vec::new());
        for piece in input.chunks(size) {
            let mut rest = piece;
            while !rest.is_empty() {
                let (used, found) = decoder.step(rest)?;
                match found {
                    Found::Output(part) => output.extend_from_slice(&rest[part]),
                    Found::Complaint(part) => complaint.extend_from_slice(&rest[part]),
                    Found::End(status) => return Ok((output, complaint, Some(status))),
                    Found::Nothing => assert_eq!(used, rest.len()),
                }
                rest = &rest[used..];
            }
        }
        Ok((output, complaint, None))
    }

    #[test]
    fn a_request_is_written_as_the_specification_has_it() {
        let mut out = Vec::new();
        let long = vec![b'x'; 200];
        put_request(&mut out, [(&b"A"[..], &b"12"[..]), (b"EMPTY", b""), (b"LONG", &long)]);
        put_body(&mut out, b"body");
        put_body_end(&mut out);
        let params = [b"\x01\x02A12\x05\x00EMPTY\x04\x80\x00\x00\xc8LONG", &long[..]].concat();
        let expected = [
            &b"\x01\x01\x00\x01\x00\x08\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00"[..],
            &record(PARAMS, &params, 0),
            b"\x01\x04\x00\x01\x00\x00\x00\x00",
            b"\x01\x05\x00\x01\x00\x04\x00\x00body",
            b"\x01\x05\x00\x01\x00\x00\x00\x00",
        ];
        assert_eq!(out, expected.concat());
    }

    #[test]
    fn a_long_body_is_divided_among_records() {
        let mut out = Vec::new();
        put_body(&mut out, &vec![7; MAX_CONTENT + 1]);
        assert_eq!(out, [record(STDIN, &vec![7; MAX_CONTENT], 0), record(STDIN, &[7], 0)].concat());
    }

    #[test]
    fn what_an_application_sends_is_told_apart_however_it_arrives() {
        let stream = [
            record(STDOUT, b"head\n\n", 2),
            record(STDERR, b"warning\n", 0),
            record(STDOUT, b"body", 255),
            record(STDOUT, b"", 0),
            record(STDERR, b"", 0),
            record(END_REQUEST, b"\0\0\x01\x02\0\0\0\0", 0),
        ];
        for size in [1, 2, 3, 7, 8, 9, 1000] {
            let expected = (b"head\n\nbody".to_vec(), b"warning\n".to_vec(), Some(258));
            assert_eq!(decode(&stream.concat(), size), Ok(expected), "{size}");
        }
    }

    #[test]
    fn broken_records_and_refusals_have_a_reason() {
        let mut version = record(STDOUT, b"x", 0);
        version[0] = 2;
        let mut other = record(STDOUT, b"x", 0);
        other[3] = 2;
        for (input, why) in [
            (version, "version 2"),
            (b"HTTP/1.1 200 OK\r\n".to_vec(), "does not speak FastCGI"),
            (other, "for request 2"),
            (record(STDIN, b"x", 0), "type 5"),
            (record(11, &[0; 8], 0), "type 11"),
            (record(END_REQUEST, &[0; 7], 0), "has 7 bytes"),
            (record(END_REQUEST, b"\0\0\0\0\x01\0\0\0", 0), "one at a time"),
            (record(END_REQUEST, b"\0\0\0\0\x02\0\0\0", 0), "overloaded"),
            (record(END_REQUEST, b"\0\0\0\0\x03\0\0\0", 0), "no responder"),
            (record(END_REQUEST, b"\0\0\0\0\x04\0\0\0", 0), "unknown status 4"),
        ] {
            for size in [1, 100] {
                let decoded = decode(&input, size);
                assert!(decoded.as_ref().is_err_and(|error| error.contains(why)), "{why}: {decoded:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_input_stops_the_decoder(input in prop::collection::vec(any::<u8>(), 0..200), size in 1..40usize) {
            drop(decode(&input, size));
        }

        #[test]
        fn a_stream_reads_the_same_in_pieces(
            parts in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..40), 0..9u8), 0..8),
            size in 1..30usize,
        ) {
            let record_of = |(out, bytes, padding): &(bool, Vec<u8>, u8)| record(if *out { STDOUT } else { STDERR }, bytes, *padding);
            let stream: Vec<u8> = parts.iter().flat_map(record_of).collect();
            let of = |out| parts.iter().filter(|part| part.0 == out).flat_map(|part| part.1.clone()).collect::<Vec<u8>>();
            prop_assert_eq!(decode(&stream, size), Ok((of(true), of(false), None)));
        }
    }
}
