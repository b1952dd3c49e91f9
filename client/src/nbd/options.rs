//! The data of options that carry more than a name.

use bytes::Buf;

use super::limits::STRING_BYTES_MAX;

/// Why an option's data can't be read: words for `NBD_REP_ERR_INVALID`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Malformed(pub(super) &'static str);

const TRUNCATED: Malformed = Malformed("the option's data ends too early");

/// What `NBD_OPT_INFO` and `NBD_OPT_GO` carry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct InfoRequest<'a> {
    pub(super) name: &'a str,
    requests: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    pub(super) fn parse(mut data: &'a [u8]) -> Result<InfoRequest<'a>, Malformed> {
        let name = string(&mut data)?;
        let count = data.try_get_u16().map_err(|_| TRUNCATED)?;
        if data.len() != usize::from(count) * 2 {
            return Err(Malformed(
                "the number of information requests does not fit the option's length",
            ));
        }
        Ok(InfoRequest { name, requests: data })
    }

    pub(super) fn asks_for(&self, info: u16) -> bool {
        self.requests
            .chunks_exact(2)
            .any(|request| request == info.to_be_bytes())
    }
}

/// What `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT` carry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct MetaContextRequest<'a> {
    pub(super) name: &'a str,
    pub(super) queries: Vec<&'a str>,
}

impl<'a> MetaContextRequest<'a> {
    pub(super) fn parse(mut data: &'a [u8]) -> Result<MetaContextRequest<'a>, Malformed> {
        let name = string(&mut data)?;
        let count = data.try_get_u32().map_err(|_| TRUNCATED)?;
        let mut queries = Vec::new();
        for _ in 0..count {
            // Each takes at least the four bytes of its length, so what was received bounds the list.
            queries.push(string(&mut data)?);
        }
        if !data.is_empty() {
            return Err(Malformed("bytes stand after the last query"));
        }
        Ok(MetaContextRequest { name, queries })
    }
}

/// A name that takes all of an option's data.
pub(super) fn whole_string(data: &[u8]) -> Result<&str, Malformed> {
    if data.len() > STRING_BYTES_MAX {
        return Err(Malformed("a string is longer than 4096 bytes"));
    }
    match std::str::from_utf8(data) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(Malformed("a string is not UTF-8 without zero bytes")),
    }
}

fn string<'a>(data: &mut &'a [u8]) -> Result<&'a str, Malformed> {
    let length = data.try_get_u32().map_err(|_| TRUNCATED)?;
    let (text, rest) = data.split_at_checked(length as usize).ok_or(TRUNCATED)?;
    *data = rest;
    whole_string(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    #[test]
    fn an_information_request_is_read_as_written() {
        let data = b"\0\0\0\x03abc\0\x02\0\x01\0\x03";
        let request = InfoRequest::parse(data).unwrap();
        assert_eq!(request.name, "abc");
        assert!(request.asks_for(1) && request.asks_for(3) && !request.asks_for(0));
        assert!(InfoRequest::parse(&data[..data.len() - 1]).is_err());
        assert!(InfoRequest::parse(b"\xff\xff\xff\xffabc").is_err());
        assert!(InfoRequest::parse(b"\0\0\0\x01\xff\0\0").is_err());
    }

    #[test]
    fn queries_are_read_as_written() {
        let data = b"\0\0\0\x01v\0\0\0\x02\0\0\0\x05base:\0\0\0\0";
        let request = MetaContextRequest::parse(data).unwrap();
        assert_eq!((request.name, request.queries), ("v", vec!["base:", ""]));
        assert_eq!(
            MetaContextRequest::parse(b"\0\0\0\x01v\xff\xff\xff\xff"),
            Err(TRUNCATED)
        );
        assert!(MetaContextRequest::parse(b"\0\0\0\x01v\0\0\0\0x").is_err());
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_read(data in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = InfoRequest::parse(&data);
            if let Ok(request) = MetaContextRequest::parse(&data) {
                prop_assert!(request.queries.len() * 4 <= data.len());
            }
        }
    }
}
