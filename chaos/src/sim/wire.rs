//! Frames as bytes: what one process encodes, another decodes with the same codec that production uses, and a line in
//! between may flip a bit.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::frame::{EncodedFrame, FrameError, FrameHeader};
use cairn_proto::limits::FRAME_HEADER_BYTES;
use cairn_proto::message::Envelope;

/// Reads a frame as a socket would give it: first the header, then what the header announces.
pub fn decode(frame: &EncodedFrame) -> Result<Envelope, FrameError> {
    let start = frame
        .head
        .first_chunk::<FRAME_HEADER_BYTES>()
        .expect("a frame has a header");
    let header = FrameHeader::decode(start)?;
    let control_end = FRAME_HEADER_BYTES + header.control_bytes as usize;
    let data = joined(&frame.data);
    if control_end != frame.head.len() || data.len() != header.data_bytes as usize {
        // Only a flipped bit in a length leads here. On a socket the reader would take the bytes that follow for the
        // missing ones and then find that the CRC does not match.
        return Err(FrameError::DataLength(header.data_bytes));
    }
    Envelope::decode(&header, &frame.head, data)
}

fn joined(pieces: &[Bytes]) -> Bytes {
    match pieces {
        [] => Bytes::new(),
        [one] => one.clone(),
        many => {
            let all: Vec<u8> = many.concat();
            BlockBuf::copied_from(&all).freeze()
        }
    }
}

/// The frame with one bit flipped, chosen by `draw`.
pub fn flip_bit(frame: &EncodedFrame, draw: u64) -> EncodedFrame {
    let mut frame = frame.clone();
    let bit = draw % (frame.len() as u64 * 8);
    let (byte, mask) = ((bit / 8) as usize, 1u8 << (bit % 8));
    if byte < frame.head.len() {
        let mut head = frame.head.to_vec();
        head[byte] ^= mask;
        frame.head = head.into();
    } else {
        let mut data = BlockBuf::copied_from(&joined(&frame.data));
        data[byte - frame.head.len()] ^= mask;
        frame.data = vec![data.freeze()];
    }
    frame
}

#[cfg(test)]
mod tests {
    use cairn_proto::ids::Correlation;
    use cairn_proto::message::{Empty, Message};

    use super::*;

    #[test]
    fn what_is_sent_arrives_unless_a_bit_flips() {
        let envelope = Envelope::new(Correlation(7), Message::Ping(Empty));
        let frame = envelope.encode();
        assert_eq!(decode(&frame).unwrap(), envelope);
        for draw in 0..frame.len() as u64 * 8 {
            assert!(decode(&flip_bit(&frame, draw)).is_err(), "bit {draw}");
        }
    }
}
