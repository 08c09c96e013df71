//! Values that are seldom there.

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};

/// A value that is seldom there. It is dropped like any, but where there is none nothing is called for
/// that.
pub(crate) struct Rare<T>(ManuallyDrop<Option<T>>);

impl<T> Rare<T> {
    /// Drops the value.
    #[inline(never)]
    pub(crate) fn clear(&mut self) {
        *self.0 = None;
    }
}

impl<T> Default for Rare<T> {
    #[inline]
    fn default() -> Self {
        Self(ManuallyDrop::new(None))
    }
}

impl<T> Deref for Rare<T> {
    type Target = Option<T>;

    #[inline]
    fn deref(&self) -> &Option<T> {
        &self.0
    }
}

impl<T> DerefMut for Rare<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Option<T> {
        &mut self.0
    }
}

impl<T> Drop for Rare<T> {
    #[inline]
    fn drop(&mut self) {
        if self.is_some() {
            self.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[test]
    fn what_is_there_is_dropped_once() {
        let value = Rc::new(());
        let mut rare = Rare::default();
        assert!(rare.is_none());
        *rare = Some(value.clone());
        assert_eq!(Rc::strong_count(&value), 2);
        rare.clear();
        assert_eq!(Rc::strong_count(&value), 1);
        *rare = Some(value.clone());
        drop(rare);
        assert_eq!(Rc::strong_count(&value), 1);
    }
}
