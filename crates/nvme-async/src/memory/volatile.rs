//! Copies from and to memory that others may change at the same time.
//!
//! `memcpy` may read a byte twice and assumes that it finds the same value, and so may code that
//! works on a slice. Each access here is one volatile load or store, made once, so a concurrent
//! change shows up as some mixture of old and new bytes and as nothing worse.

use std::ptr::NonNull;

const WORD: usize = size_of::<u64>();

/// Fills `dst` from the memory at `src`.
///
/// # Safety
///
/// `src` points to `dst.len()` bytes of one allocation or mapping, valid for reads throughout.
/// `dst` is no part of them. Other threads of this process access them by volatile or atomic
/// operations only.
pub(crate) unsafe fn copy_from_volatile(src: NonNull<u8>, dst: &mut [u8]) {
    let unaligned = src.align_offset(WORD).min(dst.len());
    let (head, rest) = dst.split_at_mut(unaligned);
    let (words, tail) = rest.as_chunks_mut::<WORD>();

    // SAFETY: the whole of src..src + dst.len() is valid, by contract; `head` is a part of that.
    unsafe { read_bytes(src, head) };
    // SAFETY: head.len() <= dst.len().
    let mut from = unsafe { src.add(head.len()) };
    for word in words {
        // SAFETY: `from` is aligned, being `src` after `unaligned` bytes and whole words (without
        // words this is not reached), and the bytes that fill `word` are readable.
        let value = unsafe { from.cast::<u64>().read_volatile() };
        *word = value.to_ne_bytes();
        // SAFETY: at most one past the end of the memory that corresponds to `dst`.
        from = unsafe { from.add(WORD) };
    }
    // SAFETY: what is left of `src` corresponds to what is left of `dst`.
    unsafe { read_bytes(from, tail) };
}

/// Writes `src` to the memory at `dst`.
///
/// # Safety
///
/// `dst` points to `src.len()` bytes of one allocation or mapping, valid for writes throughout.
/// `src` is no part of them. Other threads of this process access them by volatile or atomic
/// operations only.
pub(crate) unsafe fn copy_to_volatile(dst: NonNull<u8>, src: &[u8]) {
    let unaligned = dst.align_offset(WORD).min(src.len());
    let (head, rest) = src.split_at(unaligned);
    let (words, tail) = rest.as_chunks::<WORD>();

    // SAFETY: the whole of dst..dst + src.len() is valid, by contract; `head` is a part of that.
    unsafe { write_bytes(dst, head) };
    // SAFETY: head.len() <= src.len().
    let mut to = unsafe { dst.add(head.len()) };
    for word in words {
        // SAFETY: `to` is aligned, being `dst` after `unaligned` bytes and whole words (without
        // words this is not reached), and the bytes that `word` fills are writable.
        unsafe { to.cast::<u64>().write_volatile(u64::from_ne_bytes(*word)) };
        // SAFETY: at most one past the end of the memory that corresponds to `src`.
        to = unsafe { to.add(WORD) };
    }
    // SAFETY: what is left of `dst` corresponds to what is left of `src`.
    unsafe { write_bytes(to, tail) };
}

/// # Safety
///
/// As for [`copy_from_volatile`].
unsafe fn read_bytes(src: NonNull<u8>, dst: &mut [u8]) {
    for (index, byte) in dst.iter_mut().enumerate() {
        // SAFETY: index < dst.len(), and that many bytes are valid.
        let from = unsafe { src.add(index) };
        // SAFETY: as above.
        *byte = unsafe { from.read_volatile() };
    }
}

/// # Safety
///
/// As for [`copy_to_volatile`].
unsafe fn write_bytes(dst: NonNull<u8>, src: &[u8]) {
    for (index, &byte) in src.iter().enumerate() {
        // SAFETY: index < src.len(), and that many bytes are valid.
        let to = unsafe { dst.add(index) };
        // SAFETY: as above.
        unsafe { to.write_volatile(byte) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 40;

    fn numbered() -> [u8; LEN] {
        std::array::from_fn(|index| index as u8 + 1)
    }

    #[test]
    fn reads_exactly_the_range_at_every_alignment() {
        let mut memory = numbered();
        let base = NonNull::from(&mut memory).cast::<u8>();
        for start in 0..WORD * 2 {
            for len in 0..=LEN - start {
                for skew in 0..WORD {
                    let mut out = [0xee; LEN + WORD + 1];
                    // SAFETY: start + len <= LEN.
                    let src = unsafe { base.add(start) };
                    // SAFETY: as above; `memory` is local to this test and not `out`.
                    unsafe { copy_from_volatile(src, &mut out[skew..skew + len]) };
                    assert_eq!(out[skew..skew + len], numbered()[start..start + len]);
                    assert!(out[..skew].iter().all(|&byte| byte == 0xee));
                    assert!(out[skew + len..].iter().all(|&byte| byte == 0xee));
                }
            }
        }
    }

    #[test]
    fn writes_exactly_the_range_at_every_alignment() {
        for start in 0..WORD * 2 {
            for len in 0..=LEN - start {
                for skew in 0..WORD.min(LEN - len + 1) {
                    let mut memory = [0xee; LEN];
                    let base = NonNull::from(&mut memory).cast::<u8>();
                    // SAFETY: start + len <= LEN.
                    let dst = unsafe { base.add(start) };
                    // SAFETY: as above; `memory` is local to this test and not the source.
                    unsafe { copy_to_volatile(dst, &numbered()[skew..skew + len]) };
                    assert_eq!(memory[start..start + len], numbered()[skew..skew + len]);
                    assert!(memory[..start].iter().all(|&byte| byte == 0xee));
                    assert!(memory[start + len..].iter().all(|&byte| byte == 0xee));
                }
            }
        }
    }
}
