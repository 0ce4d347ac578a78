//! An answer as the host's threads send it: straight to the client where that can be, and else by the mailbox.

use super::mailbox::{MAX_WHOLE, Mailbox, PIECE, Parcel, PieceWriter, Then};
use super::outlet::{Outlet, TakenBack};
use super::response::{self, Answer, Framed};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

/// Largest body that is not put into one of the mailbox's buffers.
const SMALL: usize = 16 * 1024;

/// Bytes that are set aside for the line before a chunk.
const SIZE_ROOM: usize = 24;

/// An answer that was begun.
pub(crate) struct Reply {
    address: u64,
    mailbox: Arc<Mailbox>,
    way: Way,
}

enum Way {
    /// To the client, framed like this.
    Straight(Arc<Outlet>, Framed),
    /// By the mailbox, to be framed by the gate.
    Pieces(PieceWriter),
    /// It has come to its end, or cannot go on.
    Over,
}

impl Reply {
    /// Sends the head of an answer, which is its status line and headers but for those that frame it, and the first of its body; with
    /// that it is over where it is `whole`.
    pub(crate) fn begin(
        mailbox: &Arc<Mailbox>,
        address: u64,
        outlet: Option<Arc<Outlet>>,
        (answer, mut head): (Answer, Vec<u8>),
        body: &[u8],
        whole: bool,
    ) -> io::Result<Self> {
        if body.len() > MAX_WHOLE {
            let (first, rest) = body.split_at(PIECE);
            let mut reply = Self::begin(mailbox, address, outlet, (answer, head), first, false)?;
            return reply.piece(rest, whole).map(|()| reply);
        }
        let mut reply = Self { address, mailbox: Arc::clone(mailbox), way: Way::Over };
        // One that is whole the gate sends while others are worked at, unless there are none, of which it need not even hear at once.
        let is_better_straight = |outlet: &Arc<Outlet>| !whole || (outlet.is_alone() && mailbox.gate_sleeps());
        if let Some(outlet) = outlet.filter(is_better_straight) {
            let lines = head.len();
            let framed = response::frame(&mut head, &answer, outlet.terms());
            match reply.send_straight(outlet, framed, &mut head, body, whole) {
                Ok(()) => {
                    if let Way::Straight(..) = reply.way {
                        mailbox.put_quietly(address, Parcel::Straight { framed, left: Vec::new(), then: Then::Straight });
                    }
                    return Ok(reply);
                }
                Err(TakenBack) => head.truncate(lines),
            }
        }
        let (writer, rest) = if whole { (None, None) } else { Some(mailbox.pieces(address)).unzip() };
        let body_at = head.len();
        if body.len() > SMALL {
            let mut buffer = mailbox.buffer();
            buffer.append(&mut head);
            head = buffer;
        }
        head.extend_from_slice(body);
        mailbox.put(address, Parcel::Answer { answer, bytes: head, body_at, rest });
        reply.way = writer.map_or(Way::Over, Way::Pieces);
        Ok(reply)
    }

    /// Waits until another piece can be sent without a wait for the client; false where that takes longer than `time`.
    pub(crate) fn has_room_within(&self, time: Duration) -> bool {
        if let Way::Pieces(writer) = &self.way { writer.has_room_within(time) } else { true }
    }

    /// Sends another piece of the body; `last` ends the answer.
    pub(crate) fn piece(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        // What a client does not take at once is kept for it, so it is not to be much.
        let mut rest = bytes;
        while let Some((piece, behind)) = rest.split_at_checked(PIECE).filter(|(_, behind)| !behind.is_empty()) {
            self.put(piece, false)?;
            rest = behind;
        }
        self.put(rest, last)
    }

    /// The same with the first `length` bytes of one of the mailbox's buffers.
    pub(crate) fn filled(&mut self, mut buffer: Vec<u8>, length: usize, last: bool) -> io::Result<()> {
        if let Way::Pieces(writer) = &mut self.way {
            // It goes on as it is.
            buffer.truncate(length);
            writer.put(buffer)?;
            return self.put(&[], last);
        }
        let sent = self.piece(&buffer[..length], last);
        self.mailbox.give_back(buffer);
        sent
    }

    fn put(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        match std::mem::replace(&mut self.way, Way::Over) {
            Way::Straight(outlet, framed) => self
                .send_straight(outlet, framed, &mut Vec::with_capacity(SIZE_ROOM), bytes, last)
                .map_err(|TakenBack| io::ErrorKind::BrokenPipe.into()),
            Way::Pieces(mut writer) => {
                writer.write_all(bytes)?;
                writer.flush()?;
                if last {
                    writer.end();
                } else {
                    self.way = Way::Pieces(writer);
                }
                Ok(())
            }
            Way::Over => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Sends bytes of the body, framed, behind what stands in `before`. What the client does not take at once is left to the gate, and
    /// with it what follows.
    fn send_straight(
        &mut self,
        outlet: Arc<Outlet>,
        framed: Framed,
        before: &mut Vec<u8>,
        body: &[u8],
        last: bool,
    ) -> Result<(), TakenBack> {
        let after: &[u8] = match (framed.chunked, body.is_empty(), last) {
            (true, false, false) => b"\r\n",
            (true, false, true) => b"\r\n0\r\n\r\n",
            (true, true, true) => b"0\r\n\r\n",
            _ => b"",
        };
        if framed.chunked && !body.is_empty() {
            response::put_size(before, body.len());
        }
        let parts = [&before[..], body, after];
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let sent = outlet.send(&parts, last)?;
        let left = if sent < total { parts.concat().split_off(sent) } else { Vec::new() };
        if last {
            let is_sent = left.is_empty();
            self.mailbox.put_quietly(self.address, Parcel::Straight { framed, left, then: Then::Ended });
            // The gate need not be woken where nothing depends on its knowing.
            if !is_sent || framed.last || outlet.is_awaited() {
                self.mailbox.wake_gate();
            }
        } else if left.is_empty() {
            self.way = Way::Straight(outlet, framed);
        } else {
            let (writer, pieces) = self.mailbox.pieces(self.address);
            self.mailbox.put(self.address, Parcel::Straight { framed, left, then: Then::Pieces(pieces) });
            self.way = Way::Pieces(writer);
        }
        Ok(())
    }
}

impl Drop for Reply {
    /// What has not come to its end is broken off.
    fn drop(&mut self) {
        if let Way::Straight(outlet, framed) = &self.way {
            outlet.take_back();
            self.mailbox.put(self.address, Parcel::Straight { framed: *framed, left: Vec::new(), then: Then::Broken });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mailbox::{Inbox, Next, mailbox};
    use super::super::outlet::Progress;
    use super::super::response::Terms;
    use super::*;
    use rustix::fd::OwnedFd;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    const ADDRESS: u64 = 7;
    const LINES: &[u8] = b"HTTP/1.1 200 OK\r\na: b\r\n";

    struct Desk {
        mailbox: Arc<Mailbox>,
        inbox: Inbox,
        outlet: Arc<Outlet>,
        client: UnixStream,
    }

    /// A request that is alone, its client, and a gate that is woken, once it sleeps, by what is put in the mailbox.
    fn desk(last: bool) -> Desk {
        let (mailbox, inbox) = mailbox().unwrap();
        let (socket, client) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let terms = Terms { head: false, old: false, last };
        let outlet = Arc::new(Outlet::new(Arc::new(OwnedFd::from(socket)), terms, true));
        Desk { mailbox: Arc::new(mailbox), inbox, outlet, client }
    }

    impl Desk {
        fn begin(&self, length: Option<u64>, body: &[u8], whole: bool) -> Reply {
            let answer = Answer { status: 200, length, chunked: false, close: false };
            Reply::begin(&self.mailbox, ADDRESS, Some(Arc::clone(&self.outlet)), (answer, LINES.to_vec()), body, whole).unwrap()
        }

        fn sleep(&self) {
            self.inbox.bell().go_to_sleep();
        }

        /// Whether the gate was woken since it slept.
        fn was_woken(&self) -> bool {
            !self.mailbox.gate_sleeps()
        }

        /// What the client has got, once the gate has given its socket up.
        fn got(mut self) -> Vec<u8> {
            self.outlet.take_back();
            let mut got = Vec::new();
            self.client.read_to_end(&mut got).unwrap();
            got
        }

        fn ended(&self) -> (Framed, Vec<u8>) {
            match self.inbox.take() {
                Some((ADDRESS, Parcel::Straight { framed, left, then: Then::Ended })) => (framed, left),
                _ => panic!("not the end of an answer that went straight to the client"),
            }
        }
    }

    #[test]
    fn a_small_answer_to_one_that_is_alone_goes_straight_and_lets_the_gate_sleep() {
        let desk = desk(false);
        desk.sleep();
        drop(desk.begin(Some(5), b"hello", true));
        assert!(!desk.was_woken());
        assert_eq!(desk.ended(), (Framed { chunked: false, last: false }, Vec::new()));
        assert!(desk.inbox.is_empty());
        assert_eq!(desk.outlet.take_back(), Progress::Over);
        assert_eq!(desk.got(), b"HTTP/1.1 200 OK\r\na: b\r\ncontent-length: 5\r\n\r\nhello");
    }

    #[test]
    fn the_gate_is_woken_where_something_waits_for_the_end() {
        let last = desk(true);
        last.sleep();
        drop(last.begin(Some(0), b"", true));
        assert!(last.was_woken() && last.ended().0.last);
        assert!(last.got().ends_with(b"connection: close\r\n\r\n"));

        let awaited = desk(false);
        awaited.sleep();
        awaited.outlet.await_end();
        drop(awaited.begin(Some(0), b"", true));
        assert!(awaited.was_woken());
    }

    #[test]
    fn a_small_answer_goes_by_the_mailbox_while_the_gate_is_awake() {
        let desk = desk(false);
        drop(desk.begin(Some(5), b"hello", true));
        let Some((ADDRESS, Parcel::Answer { answer, bytes, body_at, rest: None })) = desk.inbox.take() else { panic!() };
        assert_eq!((answer.length, &bytes[..body_at], &bytes[body_at..]), (Some(5), LINES, &b"hello"[..]));
        assert_eq!(desk.outlet.take_back(), Progress::Untouched);
        assert_eq!(desk.got(), b"");
    }

    #[test]
    fn an_answer_of_unknown_length_goes_straight_in_chunks() {
        let desk = desk(false);
        let mut reply = desk.begin(None, b"", false);
        assert!(matches!(desk.inbox.take(), Some((ADDRESS, Parcel::Straight { then: Then::Straight, .. }))));
        reply.piece(b"abc", false).unwrap();
        reply.filled(vec![b'd'; 100], 16, false).unwrap();
        reply.piece(b"", false).unwrap();
        reply.piece(b"e", true).unwrap();
        assert_eq!(desk.ended(), (Framed { chunked: true, last: false }, Vec::new()));
        assert_eq!(reply.piece(b"f", true).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        drop(reply);
        assert!(desk.inbox.is_empty());
        let chunks = "3\r\nabc\r\n10\r\ndddddddddddddddd\r\n1\r\ne\r\n0\r\n\r\n";
        let head = "HTTP/1.1 200 OK\r\na: b\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(String::from_utf8(desk.got()).unwrap(), format!("{head}{chunks}"));
    }

    #[test]
    fn what_a_client_does_not_take_at_once_is_left_to_the_gate_and_nothing_is_lost() {
        let body: Vec<u8> = (0..2_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
        let desk = desk(false);
        let (mailbox, outlet, sent) = (Arc::clone(&desk.mailbox), Arc::clone(&desk.outlet), body.clone());
        let send = move || {
            let answer = Answer { status: 200, length: Some(sent.len() as u64), chunked: false, close: false };
            drop(Reply::begin(&mailbox, ADDRESS, Some(outlet), (answer, LINES.to_vec()), &sent, true).unwrap());
        };
        let sender = std::thread::Builder::new().name("sender".into()).spawn(send).unwrap();
        let (mut got, mut pieces) = (Vec::new(), None);
        while pieces.is_none() {
            match desk.inbox.take() {
                Some((ADDRESS, Parcel::Straight { then: Then::Straight, .. })) => {}
                Some((ADDRESS, Parcel::Straight { left, then: Then::Pieces(more), .. })) => {
                    assert!(!left.is_empty() && left.len() <= PIECE, "{}", left.len());
                    (got, pieces) = (left, Some(more));
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
        let straight = desk.got();
        let at = straight.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
        assert!(at < straight.len());
        assert_eq!([&straight[at..], &got[..]].concat(), body);
    }

    #[test]
    fn a_way_that_was_taken_back_is_not_used() {
        let unused = desk(false);
        assert_eq!(unused.outlet.take_back_unused(), Progress::Untouched);
        drop(unused.begin(Some(100_000), &[0; 100_000], true));
        let parcel = unused.inbox.take();
        assert!(matches!(parcel, Some((ADDRESS, Parcel::Answer { body_at, rest: None, .. })) if body_at == LINES.len()));
        assert_eq!(unused.got(), b"");

        let begun = desk(false);
        let mut reply = begun.begin(Some(10), b"01234", false);
        assert_eq!(begun.outlet.take_back_unused(), Progress::Begun);
        reply.piece(b"5", false).unwrap();
        assert_eq!(begun.outlet.take_back(), Progress::Begun);
        assert_eq!(reply.piece(b"6789", true).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(begun.got().ends_with(b"\r\n\r\n012345"));
    }

    #[test]
    fn an_answer_that_is_dropped_before_its_end_is_broken_off() {
        let straight = desk(false);
        let reply = straight.begin(None, b"a", false);
        straight.inbox.take();
        straight.sleep();
        drop(reply);
        assert!(straight.was_woken());
        assert!(matches!(straight.inbox.take(), Some((ADDRESS, Parcel::Straight { then: Then::Broken, .. }))));

        let by_mailbox = desk(false);
        by_mailbox.outlet.take_back();
        let reply = by_mailbox.begin(None, b"a", false);
        let Some((ADDRESS, Parcel::Answer { rest: Some(pieces), .. })) = by_mailbox.inbox.take() else { panic!() };
        drop(reply);
        assert!(matches!(pieces.next(), Next::Broken));
    }
}
