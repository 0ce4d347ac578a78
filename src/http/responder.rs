//! The responder sends an answer to the client: directly to the socket if that is possible, and otherwise through the response channel.

use super::HttpError;
use super::direct_writer::Revoked;
use super::errors::{self, Audience};
use super::framing::{Framed, ResponseHead, after_piece, frame, put_chunk_size};
use super::in_flight::InFlight;
use super::response_channel::{
    Address, Begun, MAX_WHOLE, OtherProtocol, PIECE, PieceWriter, ResponseChannel, ResponsePart, Then,
};
use super::websocket::SocketReturn;
use rustix::fd::BorrowedFd;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest body in bytes that does not use one of the channel's buffers.
const SMALL: usize = 16 * 1024;

/// Answers one request. If it is dropped without an answer, the client gets 502. If it is dropped within an answer, the answer is aborted,
/// so that the client can tell that it is incomplete.
pub(crate) struct Responder {
    in_flight: Arc<InFlight>,
    channel: Arc<ResponseChannel>,
    address: Address,
    state: State,
    /// Whether a file follows the bytes that are sent next.
    file_follows: bool,
}

enum State {
    Unanswered,
    /// The answer continues directly to the client.
    Direct(Begun),
    /// The answer continues through the response channel.
    Pieces(PieceWriter, Framed),
    /// It is complete, aborted or cancelled.
    Over,
}

impl Responder {
    /// The responder of a request.
    pub(crate) fn new(in_flight: Arc<InFlight>, channel: Arc<ResponseChannel>, address: Address) -> Self {
        Self { in_flight, channel, address, state: State::Unanswered, file_follows: false }
    }

    /// The request's state.
    pub(super) fn in_flight(&self) -> &Arc<InFlight> {
        &self.in_flight
    }

    /// Whether the request was cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.in_flight.is_cancelled()
    }

    /// Ends without an answer, because the request was cancelled.
    pub(super) fn abandon(&mut self) {
        self.state = State::Over;
    }

    /// Sends the head of a plugin's answer, and the beginning of its body. `rest` more bytes of it follow in pieces. With neither those nor
    /// `more` the answer is complete.
    ///
    /// # Errors
    /// The client has gone.
    pub(crate) fn answer(&mut self, head: ResponseHead, first: &[u8], rest: usize, more: bool) -> io::Result<()> {
        let ResponseHead { status, lines, mut length } = head;
        let size = first.len() + rest;
        let bodiless = self.in_flight.writer.terms().head || matches!(status, 204 | 304);
        if length.is_none() && !more && (!bodiless || size > 0) {
            length = Some(size as u64);
        }
        self.begin(status, lines, length, first, rest == 0 && !more)
    }

    /// Sends the head of an interim response (1xx) before the answer, unless the client speaks HTTP/1.0, which has none.
    pub(crate) fn interim(&mut self, head: Vec<u8>) {
        if matches!(self.state, State::Unanswered) && !self.in_flight.writer.terms().old {
            // The event loop writes it, so the answer must take the same way, or it could come first.
            self.in_flight.writer.revoke();
            self.channel.put(self.address, ResponsePart::Interim(head));
        }
    }

    /// The way to the client of a socket that this request asks for.
    pub(crate) fn socket_return(&self) -> SocketReturn {
        SocketReturn::new(Arc::clone(&self.channel), self.address)
    }

    /// Passes on that the plugin has switched to another protocol: `bytes` is its response, and what followed it. From here on the event
    /// loop connects it with the client.
    pub(crate) fn upgrade(&mut self, bytes: Vec<u8>, other: OtherProtocol) {
        if matches!(self.state, State::Unanswered) {
            self.in_flight.writer.revoke();
            let framed = Framed { chunked: false, bodiless: true, last: true };
            let begun = Begun { status: 101, at: Instant::now(), framed };
            self.channel.put(self.address, ResponsePart::Upgraded { begun, bytes, other });
            self.state = State::Over;
        }
    }

    /// Sends a complete answer. `head` is its status line and headers without those of the framing.
    pub(crate) fn answer_whole(&mut self, status: u16, head: Vec<u8>, body: &[u8]) {
        // A client that has left needs no answer.
        self.begin(status, head, Some(body.len() as u64), body, true).ok();
    }

    /// Answers with an error, rendered for its audience.
    pub(super) fn fail(&mut self, error: HttpError, audience: Option<Audience<'_>>) {
        if let State::Unanswered = self.state {
            let (head, body) = errors::render(error, audience);
            self.answer_whole(error.status, head, body.as_bytes());
        }
    }

    /// Waits until another piece can be sent without waiting for the client; false if that takes longer than `time`.
    pub(crate) fn has_room_within(&self, time: Duration) -> bool {
        if let State::Pieces(writer, _) = &self.state { writer.has_room_within(time) } else { true }
    }

    /// Sends the head and the beginning of a body of `length` bytes, the rest of which are in a file.
    ///
    /// # Errors
    /// The client has gone.
    pub(crate) fn begin_file(&mut self, status: u16, head: Vec<u8>, length: u64, body: &[u8]) -> io::Result<()> {
        self.file_follows = true;
        self.begin(status, head, Some(length), body, false)
    }

    /// Whether [`Responder::send_file`] can be tried.
    pub(crate) fn takes_file(&self) -> bool {
        matches!(&self.state, State::Direct(begun) if !begun.framed.chunked && !begun.framed.bodiless)
    }

    /// Sends bytes of a file directly to the client, as many as it takes at once; the `last` complete the answer. Returns their number, or
    /// none if they have to be read and sent as a piece.
    pub(crate) fn send_file(&mut self, file: BorrowedFd<'_>, offset: u64, length: usize, last: bool) -> Option<usize> {
        let State::Direct(begun) = self.state else { return None };
        let sent = self.in_flight.writer.send_file(file, offset, length, last)?;
        if last && sent == length {
            self.state = State::Over;
            self.end_direct(begun, Vec::new());
        }
        Some(sent)
    }

    /// Waits until the client takes more of a file, but not longer than `time`.
    pub(crate) fn wait_for_client(&self, time: Duration) {
        if !self.in_flight.writer.has_room_within(time) {
            // While the client takes nothing, the event loop holds it to the least rate.
            self.channel.wake();
        }
    }

    /// Sends another piece of the body; the `last` completes the answer.
    ///
    /// # Errors
    /// The client has gone.
    pub(crate) fn piece(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        // What a client does not take at once is buffered, so a piece is small.
        let mut rest = bytes;
        while let Some((piece, behind)) = rest.split_at_checked(PIECE).filter(|(_, behind)| !behind.is_empty()) {
            self.put(piece, false)?;
            rest = behind;
        }
        self.put(rest, last)
    }

    /// A buffer of [`PIECE`] bytes to read a piece into.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.channel.used_buffer();
        buffer.resize(PIECE, 0);
        buffer
    }

    /// Sends the first `length` bytes of such a buffer.
    ///
    /// # Errors
    /// The client has gone.
    pub(crate) fn filled(&mut self, mut buffer: Vec<u8>, length: usize, last: bool) -> io::Result<()> {
        if let State::Pieces(writer, framed) = &mut self.state
            && !framed.chunked
            && !framed.bodiless
        {
            // The buffer is passed on without a copy.
            buffer.truncate(length);
            writer.put(buffer)?;
            return self.put(&[], last);
        }
        let sent = self.piece(&buffer[..length], last);
        self.channel.give_back(buffer);
        sent
    }

    /// Aborts an answer that has begun.
    pub(crate) fn cut(&mut self) {
        if let State::Direct(begun) = &self.state {
            self.in_flight.writer.revoke();
            self.channel.put(self.address, ResponsePart::Direct { begun: *begun, unsent: Vec::new(), then: Then::Broken });
        }
        // Pieces that end without being marked complete abort the answer.
        self.state = State::Over;
    }

    /// Sends the head and the beginning of the body; the `whole` answer if nothing follows. `head` is the status line and the headers
    /// without those of the framing, `length` that of the body, if it is known.
    ///
    /// # Errors
    /// The client has gone.
    pub(crate) fn begin(
        &mut self,
        status: u16,
        mut head: Vec<u8>,
        length: Option<u64>,
        body: &[u8],
        whole: bool,
    ) -> io::Result<()> {
        if body.len() > MAX_WHOLE {
            let (first, rest) = body.split_at(PIECE);
            self.begin(status, head, length, first, false)?;
            return self.piece(rest, whole);
        }
        if !matches!(self.state, State::Unanswered) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.state = State::Over;
        let framed = frame(&mut head, status, length, self.in_flight.writer.terms());
        let begun = Begun { status, at: Instant::now(), framed };
        let body = if framed.bodiless { &[] } else { body };
        if framed.chunked && !body.is_empty() {
            put_chunk_size(&mut head, body.len());
        }
        let after = after_piece(framed, body.is_empty(), whole);
        // The event loop sends complete answers while the worker continues, unless it sleeps and no other request is in flight.
        if (!whole || (self.in_flight.writer.is_alone() && self.channel.is_asleep()))
            && self.send_direct(begun, [&head, body, after], whole).is_ok()
        {
            if let State::Direct(_) = self.state {
                let part = ResponsePart::Direct { begun, unsent: Vec::new(), then: Then::Direct };
                self.channel.put_quietly(self.address, part);
            }
            return Ok(());
        }
        let (writer, rest) = if whole { (None, None) } else { Some(self.channel.pieces(self.address)).unzip() };
        if body.len() > SMALL {
            let mut buffer = self.channel.buffer();
            buffer.append(&mut head);
            head = buffer;
        }
        head.extend_from_slice(body);
        head.extend_from_slice(after);
        self.channel.put(self.address, ResponsePart::Begun { begun, bytes: head, rest });
        self.state = writer.map_or(State::Over, |writer| State::Pieces(writer, framed));
        Ok(())
    }

    fn put(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        let framed = match &self.state {
            State::Direct(begun) => begun.framed,
            State::Pieces(_, framed) => *framed,
            State::Unanswered | State::Over => return Err(io::ErrorKind::BrokenPipe.into()),
        };
        let body = if framed.bodiless { &[] } else { bytes };
        let mut before = Vec::new();
        if framed.chunked && !body.is_empty() {
            put_chunk_size(&mut before, body.len());
        }
        let parts = [&before, body, after_piece(framed, body.is_empty(), last)];
        match std::mem::replace(&mut self.state, State::Over) {
            State::Direct(begun) => self.send_direct(begun, parts, last).map_err(|Revoked| io::ErrorKind::BrokenPipe.into()),
            State::Pieces(mut writer, framed) => {
                parts.into_iter().try_for_each(|part| writer.write_all(part))?;
                writer.flush()?;
                if last {
                    writer.end();
                } else {
                    self.state = State::Pieces(writer, framed);
                }
                Ok(())
            }
            State::Unanswered | State::Over => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Sends parts of an answer directly to the client. If the client does not take all of them at once, the event loop sends the rest and
    /// what follows.
    fn send_direct(&mut self, begun: Begun, parts: [&[u8]; 3], last: bool) -> Result<(), Revoked> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let sent = self.in_flight.writer.send(&parts, last, std::mem::take(&mut self.file_follows))?;
        let unsent = if sent < total { parts.concat().split_off(sent) } else { Vec::new() };
        if last {
            self.end_direct(begun, unsent);
        } else if unsent.is_empty() {
            self.state = State::Direct(begun);
        } else {
            let (writer, pieces) = self.channel.pieces(self.address);
            self.channel.put(self.address, ResponsePart::Direct { begun, unsent, then: Then::Pieces(pieces) });
            self.state = State::Pieces(writer, begun.framed);
        }
        Ok(())
    }

    /// Hands the end of an answer to the event loop, with what the client did not take of it.
    fn end_direct(&self, begun: Begun, unsent: Vec<u8>) {
        let is_sent = unsent.is_empty();
        self.channel.put_quietly(self.address, ResponsePart::Direct { begun, unsent, then: Then::Ended });
        // The event loop need not be woken if nothing depends on it.
        if !is_sent || begun.framed.last || self.in_flight.writer.is_awaited() {
            self.channel.wake();
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        match self.state {
            State::Unanswered => self.fail(errors::BAD_GATEWAY, None),
            State::Direct(_) => self.cut(),
            State::Pieces(..) | State::Over => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::direct_writer::{DirectWriter, Progress};
    use super::super::framing::{Terms, status_line};
    use super::super::response_channel::{Next, Responses, response_channel};
    use super::*;
    use rustix::fd::{AsFd, OwnedFd};
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    const ADDRESS: Address = Address { connection: 7, request: 1 };
    const HEAD: &str = "HTTP/1.1 200 OK\r\n";

    /// A request that is alone, its client, and an event loop that is woken, once it sleeps, by what is put into the channel.
    struct Bench {
        channel: Arc<ResponseChannel>,
        responses: Responses,
        in_flight: Arc<InFlight>,
        client: UnixStream,
    }

    fn bench(last: bool) -> Bench {
        let (channel, responses) = response_channel().unwrap();
        let (socket, client) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let terms = Terms { head: false, old: false, last };
        let writer = DirectWriter::new(Some(Arc::new(OwnedFd::from(socket))), terms, true);
        let in_flight = InFlight::new(writer, Instant::now());
        Bench { channel: Arc::new(channel), responses, in_flight, client }
    }

    impl Bench {
        fn responder(&self) -> Responder {
            Responder::new(Arc::clone(&self.in_flight), Arc::clone(&self.channel), ADDRESS)
        }

        fn begin(&self, length: Option<u64>, body: &[u8], whole: bool) -> Responder {
            let mut responder = self.responder();
            responder.begin(200, status_line(200), length, body, whole).unwrap();
            responder
        }

        fn sleep(&self) {
            self.responses.waker().go_to_sleep();
        }

        /// Whether the event loop was woken since it slept.
        fn was_woken(&self) -> bool {
            !self.channel.is_asleep()
        }

        fn take(&self) -> Option<ResponsePart> {
            self.responses.take().map(|(address, part)| {
                assert_eq!(address, ADDRESS);
                part
            })
        }

        /// What the client has got, once the event loop has given its socket up.
        fn got(mut self) -> String {
            self.in_flight.writer.revoke();
            let mut got = Vec::new();
            self.client.read_to_end(&mut got).unwrap();
            String::from_utf8(got).unwrap()
        }

        /// How an answer was framed that has ended on the direct way, and what was left of it.
        fn ended(&self) -> (Framed, Vec<u8>) {
            match self.take() {
                Some(ResponsePart::Direct { begun, unsent, then: Then::Ended }) => (begun.framed, unsent),
                _ => panic!("not the end of an answer on the direct way"),
            }
        }
    }

    const PLAIN: Framed = Framed { chunked: false, bodiless: false, last: false };

    #[test]
    fn a_small_answer_to_one_that_is_alone_goes_straight_and_lets_the_event_loop_sleep() {
        let bench = bench(false);
        bench.sleep();
        drop(bench.begin(Some(5), b"hello", true));
        assert!(!bench.was_woken());
        assert_eq!(bench.ended(), (PLAIN, Vec::new()));
        assert!(bench.take().is_none());
        assert_eq!(bench.in_flight.cancel(), Progress::Over);
        assert_eq!(bench.got(), format!("{HEAD}content-length: 5\r\n\r\nhello"));
    }

    #[test]
    fn the_event_loop_is_woken_where_something_waits_for_the_end() {
        let last = bench(true);
        last.sleep();
        drop(last.begin(Some(0), b"", true));
        assert!(last.was_woken() && last.ended().0.last);
        assert!(last.got().ends_with("connection: close\r\n\r\n"));

        let awaited = bench(false);
        awaited.sleep();
        awaited.in_flight.writer.await_end();
        drop(awaited.begin(Some(0), b"", true));
        assert!(awaited.was_woken());
    }

    #[test]
    fn a_small_answer_goes_by_the_channel_while_the_event_loop_is_awake() {
        let bench = bench(false);
        drop(bench.begin(Some(5), b"hello", true));
        let Some(ResponsePart::Begun { begun, bytes, rest: None }) = bench.take() else { panic!() };
        assert_eq!((begun.status, begun.framed), (200, PLAIN));
        assert_eq!(String::from_utf8(bytes).unwrap(), format!("{HEAD}content-length: 5\r\n\r\nhello"));
        assert_eq!(bench.in_flight.cancel(), Progress::Untouched);
        assert_eq!(bench.got(), "");
    }

    #[test]
    fn an_answer_of_unknown_length_goes_straight_in_chunks() {
        let bench = bench(false);
        let mut responder = bench.begin(None, b"", false);
        assert!(matches!(bench.take(), Some(ResponsePart::Direct { then: Then::Direct, .. })));
        responder.piece(b"abc", false).unwrap();
        responder.filled(vec![b'd'; 100], 16, false).unwrap();
        responder.piece(b"", false).unwrap();
        responder.piece(b"e", true).unwrap();
        assert_eq!(bench.ended(), (Framed { chunked: true, ..PLAIN }, Vec::new()));
        assert_eq!(responder.piece(b"f", true).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        drop(responder);
        assert!(bench.take().is_none());
        let chunks = "3\r\nabc\r\n10\r\ndddddddddddddddd\r\n1\r\ne\r\n0\r\n\r\n";
        assert_eq!(bench.got(), format!("{HEAD}transfer-encoding: chunked\r\n\r\n{chunks}"));
    }

    #[test]
    fn chunks_by_the_channel_are_those_of_the_direct_way() {
        let bench = bench(false);
        bench.in_flight.writer.revoke();
        let mut responder = bench.begin(None, b"ab", false);
        responder.piece(b"c", false).unwrap();
        responder.filled(vec![b'd'; 100], 2, true).unwrap();
        let Some(ResponsePart::Begun { bytes, rest: Some(pieces), .. }) = bench.take() else { panic!() };
        let mut got = bytes;
        loop {
            match pieces.next() {
                Next::Piece(piece) => got.extend_from_slice(&piece),
                Next::End => break,
                Next::Nothing | Next::Broken => panic!("it does not end"),
            }
        }
        let chunks = "2\r\nab\r\n1\r\nc\r\n2\r\ndd\r\n0\r\n\r\n";
        assert_eq!(String::from_utf8(got).unwrap(), format!("{HEAD}transfer-encoding: chunked\r\n\r\n{chunks}"));
    }

    #[test]
    fn what_a_client_does_not_take_at_once_is_left_to_the_event_loop_and_nothing_is_lost() {
        let body: Vec<u8> = (0..2_000_000_u32).map(|n| b'a' + n.to_le_bytes()[n as usize % 3] % 26).collect();
        let bench = bench(false);
        let (mut responder, sent) = (bench.responder(), body.clone());
        let send = move || {
            responder.begin(200, status_line(200), Some(sent.len() as u64), &sent, true).unwrap();
        };
        let sender = std::thread::Builder::new().name("sender".into()).spawn(send).unwrap();
        let (mut got, mut pieces) = (Vec::new(), None);
        while pieces.is_none() {
            match bench.take() {
                Some(ResponsePart::Direct { then: Then::Direct, .. }) => {}
                Some(ResponsePart::Direct { unsent, then: Then::Pieces(more), .. }) => {
                    assert!(!unsent.is_empty() && unsent.len() <= PIECE, "{}", unsent.len());
                    (got, pieces) = (unsent, Some(more));
                }
                Some(_) => panic!("not what was left"),
                None => std::thread::yield_now(),
            }
        }
        loop {
            match pieces.as_ref().unwrap().next() {
                Next::Piece(piece) => got.extend_from_slice(&piece),
                Next::Nothing => std::thread::yield_now(),
                Next::End => break,
                Next::Broken => panic!("it broke off"),
            }
        }
        sender.join().unwrap();
        let direct = bench.got().into_bytes();
        let at = direct.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
        assert!(at < direct.len());
        assert_eq!([&direct[at..], &got[..]].concat(), body);
    }

    #[test]
    fn a_file_goes_straight_as_far_as_its_client_takes_it_and_its_end_completes_the_answer() {
        let bench = bench(false);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b'f'; 1_000_000]).unwrap();
        let mut responder = bench.responder();
        responder.begin_file(200, status_line(200), 1_000_003, b"abc").unwrap();
        assert!(matches!(bench.take(), Some(ResponsePart::Direct { then: Then::Direct, .. })));
        let sent = responder.send_file(file.as_fd(), 0, 1_000_000, true).unwrap();
        assert!(sent > 0 && sent < 1_000_000 && bench.in_flight.writer.is_full(), "{sent}");
        assert_eq!(responder.send_file(file.as_fd(), sent as u64, 1_000_000 - sent, true), Some(0));
        bench.sleep();
        responder.wait_for_client(Duration::from_millis(1));
        assert!(bench.was_woken() && bench.take().is_none());
        // Nothing is there behind the end of the file.
        assert_eq!(responder.send_file(file.as_fd(), 1_000_000, 1, false), None);

        let (mut at, mut client) = (sent, bench.client.try_clone().unwrap());
        while at < 1_000_000 {
            std::io::copy(&mut (&mut client).take(50_000), &mut io::sink()).unwrap();
            at += responder.send_file(file.as_fd(), at as u64, 1_000_000 - at, true).unwrap();
        }
        assert!(!bench.in_flight.writer.is_full());
        assert_eq!(bench.ended(), (PLAIN, Vec::new()));
        assert_eq!(responder.send_file(file.as_fd(), 0, 1, true), None);
        assert!(bench.in_flight.writer.sent() > 1_000_003 && bench.got().ends_with('f'));
    }

    #[test]
    fn no_file_goes_straight_where_bytes_do_not_or_chunks_are_needed() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        let revoked = bench(false);
        let mut responder = revoked.begin(Some(10), b"", false);
        revoked.in_flight.cancel();
        assert_eq!(responder.send_file(file.as_fd(), 0, 10, true), None);
        assert!(!revoked.got().contains('\0'));

        let chunked = bench(false);
        assert!(!chunked.begin(None, b"", false).takes_file());
        let by_channel = bench(false);
        by_channel.in_flight.writer.revoke();
        assert!(!by_channel.begin(Some(10), b"", false).takes_file());
        assert!(bench(false).begin(Some(10), b"", false).takes_file());
    }

    #[test]
    fn a_socket_that_was_revoked_is_not_used() {
        let unused = bench(false);
        assert_eq!(unused.in_flight.writer.revoke(), Progress::Untouched);
        drop(unused.begin(Some(100_000), &[0; 100_000], true));
        assert!(matches!(unused.take(), Some(ResponsePart::Begun { rest: None, .. })));
        assert_eq!(unused.got(), "");

        let begun = bench(false);
        let mut responder = begun.begin(Some(10), b"01234", false);
        responder.piece(b"5", false).unwrap();
        assert_eq!(begun.in_flight.cancel(), Progress::Begun);
        assert!(responder.is_cancelled());
        assert_eq!(responder.piece(b"6789", true).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(begun.got().ends_with("\r\n\r\n012345"));
    }

    #[test]
    fn an_answer_that_is_dropped_before_its_end_is_broken_off_and_one_never_begun_is_an_error() {
        let direct = bench(false);
        let responder = direct.begin(None, b"a", false);
        direct.take();
        direct.sleep();
        drop(responder);
        assert!(direct.was_woken());
        assert!(matches!(direct.take(), Some(ResponsePart::Direct { then: Then::Broken, .. })));

        let by_channel = bench(false);
        by_channel.in_flight.writer.revoke();
        let responder = by_channel.begin(None, b"a", false);
        let Some(ResponsePart::Begun { rest: Some(pieces), .. }) = by_channel.take() else { panic!() };
        drop(responder);
        assert!(matches!(pieces.next(), Next::Broken));

        let unanswered = bench(false);
        drop(unanswered.responder());
        assert!(matches!(unanswered.take(), Some(ResponsePart::Begun { begun: Begun { status: 502, .. }, .. })));
    }
}
