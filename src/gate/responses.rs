//! Answers: takes them from the response channel, and sends them as fast as clients read them.

use super::connection::{ConnectionKey, Exchange};
use super::event_loop::{EventLoop, TURN};
use crate::http::response_channel::{Address, Begun, Next, ResponsePart, Then};
use slotmap::KeyData;

/// Parts taken before the connections get their turn.
const PARTS: usize = 256;

impl EventLoop {
    /// Takes parts of answers from the response channel.
    pub(super) fn take_responses(&mut self) {
        for _ in 0..PARTS {
            let Some((address, part)) = self.responses.take() else { return };
            self.take_part(address, part);
        }
    }

    /// Handles a part of an answer, if its request is still under way.
    fn take_part(&mut self, address: Address, part: ResponsePart) {
        let key = KeyData::from_ffi(address.connection).into();
        let part = match part {
            // A socket has no request any more.
            ResponsePart::Socket(what) => return self.take_for_socket(key, what),
            part => part,
        };
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(exchange) = connection.exchange.as_mut().filter(|exchange| exchange.number == address.request) else { return };
        match part {
            ResponsePart::Upgraded { begun, bytes, other } => self.switch_protocol(key, begun, &bytes, other),
            ResponsePart::Socket(_) => {}
            ResponsePart::Interim(head) => self.send(key, &head),
            ResponsePart::Begun { begun, bytes, rest } => {
                let is_whole = rest.is_none();
                (exchange.pieces, exchange.has_pieces) = (rest, true);
                self.begin_answer(key, begun);
                self.send(key, &bytes);
                if is_whole {
                    self.keep_buffer(bytes);
                    self.end_answer(key);
                } else {
                    self.responses.give_back(bytes);
                    self.relay(key);
                }
            }
            ResponsePart::More => {
                if let Some(pieces) = &exchange.pieces {
                    pieces.hear();
                    exchange.has_pieces = true;
                    self.relay(key);
                }
            }
            ResponsePart::Direct { begun, unsent, then } => {
                if exchange.answer.is_none() {
                    self.begin_answer(key, begun);
                }
                self.send(key, &unsent);
                match then {
                    Then::Direct => {}
                    Then::Pieces(pieces) => {
                        if let Some(exchange) = self.exchange(key) {
                            (exchange.pieces, exchange.has_pieces) = (Some(pieces), true);
                            self.relay(key);
                        }
                    }
                    Then::Ended => self.end_answer(key),
                    Then::Broken => self.cut(key),
                }
            }
            ResponsePart::BodyRoom => {
                self.send_body(key);
                // More of the body can be read.
                self.drive(key);
            }
        }
    }

    fn exchange(&mut self, key: ConnectionKey) -> Option<&mut Exchange> {
        self.connections.get_mut(key)?.exchange.as_mut()
    }

    pub(super) fn begin_answer(&mut self, key: ConnectionKey, begun: Begun) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.deadline = None;
        if let Some(exchange) = &mut connection.exchange {
            exchange.answer = Some(begun);
            exchange.last |= begun.framed.last;
        }
    }

    fn end_answer(&mut self, key: ConnectionKey) {
        self.answered(key);
        self.drive(key);
    }

    pub(super) fn send(&mut self, key: ConnectionKey, bytes: &[u8]) {
        if let Some(connection) = self.connections.get_mut(key)
            && !bytes.is_empty()
            && connection.send(bytes).is_err()
        {
            self.close(key);
        }
    }

    /// Sends the pieces of an answer, as far as the client takes them.
    pub(super) fn relay(&mut self, key: ConnectionKey) {
        for _ in 0..TURN {
            let Some(connection) = self.connections.get(key) else { return };
            let Some(exchange) = &connection.exchange else { return };
            // While output is unsent, further pieces stay in their channel.
            if !exchange.has_pieces || connection.unsent() > 0 {
                return;
            }
            match exchange.pieces.as_ref().map_or(Next::Nothing, |pieces| pieces.next()) {
                Next::Piece(piece) => {
                    self.send(key, &piece);
                    self.responses.give_back(piece);
                }
                Next::Nothing => {
                    if let Some(exchange) = self.exchange(key) {
                        exchange.has_pieces = false;
                    }
                    return;
                }
                Next::End => return self.end_answer(key),
                Next::Broken => return self.cut(key),
            }
        }
        self.again.push(key);
    }
}
