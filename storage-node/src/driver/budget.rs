//! Memory for received data: block-aligned buffers that count against a budget until the last user of them is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::limits::BLOCK_BYTES;

/// Bytes that may be held at the same time.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

/// A buffer that counts against its budget until it is dropped.
#[derive(Debug)]
pub(super) struct BudgetBuf {
    buf: BlockBufDebug,
    used: Arc<AtomicUsize>,
}

struct BlockBufDebug(BlockBuf);

impl std::fmt::Debug for BlockBufDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Budget {
    pub(super) fn new(limit: usize) -> Budget {
        let used = Arc::default();
        Budget { used, limit }
    }

    /// Bytes held now.
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// A buffer of whole blocks, to be filled; `None` while too much is held. One buffer is always to be had when nothing is.
    pub(super) fn take(&self, bytes: usize) -> Option<BudgetBuf> {
        assert!(bytes.is_multiple_of(BLOCK_BYTES), "{bytes} bytes are not whole blocks");
        // Only the driver's thread adds, others only take away: what is read here is an upper bound.
        let used = self.used.load(Ordering::Relaxed);
        if used > 0 && used + bytes > self.limit {
            return None;
        }
        self.used.fetch_add(bytes, Ordering::Relaxed);
        let buf = BlockBufDebug(BlockBuf::to_be_filled(bytes / BLOCK_BYTES));
        let used = self.used.clone();
        Some(BudgetBuf { buf, used })
    }
}

impl BudgetBuf {
    /// For sharing, without a copy. It counts until the last share is gone.
    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl std::ops::Deref for BudgetBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buf.0
    }
}

impl std::ops::DerefMut for BudgetBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buf.0
    }
}

impl AsRef<[u8]> for BudgetBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for BudgetBuf {
    fn drop(&mut self) {
        self.used.fetch_sub(self.buf.0.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_counts_until_its_last_share_is_gone() {
        let budget = Budget::new(2 * BLOCK_BYTES);
        let first = budget.take(BLOCK_BYTES).unwrap().freeze();
        let second = first.slice(1..2);
        assert!(budget.take(2 * BLOCK_BYTES).is_none());
        drop(first);
        assert_eq!(budget.used(), BLOCK_BYTES);
        drop(second);
        assert_eq!(budget.used(), 0);
        assert!(budget.take(5 * BLOCK_BYTES).is_some(), "one is always to be had");
    }
}
