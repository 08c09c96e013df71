use rustix::event::{EventfdFlags, eventfd};

use super::*;

fn set(start: u32, count: u32, action: IrqAction, data: IrqData<'_>) -> SetIrqs<'_> {
    SetIrqs {
        index: vfio_user::irq::MSIX,
        start,
        count,
        action,
        data,
    }
}

fn new_eventfd() -> (OwnedFd, OwnedFd) {
    let ours = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    let theirs = ours.try_clone().expect("cloned");
    (ours, theirs)
}

fn is_signalled(eventfd: &OwnedFd) -> bool {
    rustix::io::read(eventfd, &mut [0; 8]).is_ok()
}

fn pages() -> Arc<SharedPages> {
    Arc::new(SharedPages::new().expect("pages"))
}

/// Four vectors, of which 1 and 2 have eventfds, enabled.
fn vectors() -> (Vectors, [OwnedFd; 2]) {
    let vectors = Vectors::new(4, pages());
    let ((first, one), (second, two)) = (new_eventfd(), new_eventfd());
    let set = set(1, 2, IrqAction::Trigger, IrqData::Eventfd);
    vectors.set(&set, vec![one, two]).expect("set");
    vectors.set_control(true, false);
    (vectors, [first, second])
}

#[test]
fn a_vector_fires_while_nothing_masks_it() {
    let (vectors, [first, second]) = vectors();
    vectors.raise(1);
    assert!(is_signalled(&first) && !is_signalled(&second));
    // Each way to hold it back, and to let it go.
    for way in 0..4 {
        let hold = |holds: bool| match way {
            0 => vectors.write_table(ENTRY + CONTROL, holds.into()),
            1 => vectors.set_control(true, holds),
            2 => vectors.set_control(!holds, false),
            _ => {
                let action = if holds {
                    IrqAction::Mask
                } else {
                    IrqAction::Unmask
                };
                vectors
                    .set(&set(1, 1, action, IrqData::None), Vec::new())
                    .expect("set");
            }
        };
        hold(true);
        vectors.raise(1);
        vectors.raise(1);
        assert!(!is_signalled(&first));
        assert_eq!(vectors.read_pending(0), 0b10);
        hold(false);
        assert!(is_signalled(&first));
        assert_eq!(vectors.read_pending(0), 0);
        hold(false);
        assert!(!is_signalled(&first));
    }
}

#[test]
fn masks_that_are_stored_are_found() {
    let pages = pages();
    let vectors = Vectors::new(2, pages.clone());
    let ((ours, theirs), (other, others)) = (new_eventfd(), new_eventfd());
    let both = set(0, 2, IrqAction::Trigger, IrqData::Eventfd);
    vectors.set(&both, vec![theirs, others]).expect("set");
    vectors.set_control(true, false);
    let store = |value| pages.set_table_word(CONTROL, value);
    assert!(!vectors.raise_unmasked(), "nothing is held back");
    store(MASKED);
    assert_eq!(vectors.read_table(CONTROL), MASKED);
    vectors.raise(0);
    vectors.raise(1);
    assert!(!is_signalled(&ours) && is_signalled(&other));
    assert!(vectors.raise_unmasked() && !is_signalled(&ours));
    // While the function is masked, a message has to tell first.
    vectors.set_control(true, true);
    assert!(!vectors.raise_unmasked());
    vectors.set_control(true, false);
    assert!(vectors.raise_unmasked() && !is_signalled(&ours));
    store(!MASKED);
    assert!(!vectors.raise_unmasked());
    assert!(is_signalled(&ours));
    assert_eq!(vectors.read_pending(0), 0);
    vectors.raise(0);
    assert!(is_signalled(&ours) && !is_signalled(&other));
    // Whatever is stored past the table.
    (2..256).for_each(|index| pages.set_table_word(index * ENTRY + CONTROL, 0));
    vectors.raise(2);
    assert!(!vectors.raise_unmasked());
}

#[test]
fn what_came_before_the_eventfd_is_kept() {
    let vectors = Vectors::new(1, pages());
    vectors.set_control(true, false);
    vectors.raise(0);
    vectors.raise(9);
    let (ours, theirs) = new_eventfd();
    assert_eq!(vectors.read_table(CONTROL), 1);
    vectors
        .set(
            &set(0, 1, IrqAction::Trigger, IrqData::Eventfd),
            vec![theirs],
        )
        .expect("set");
    assert!(is_signalled(&ours));
    assert_eq!(vectors.read_table(CONTROL), 0);
}

#[test]
fn all_kinds_of_data() {
    let (vectors, [first, second]) = vectors();
    let run = |set: &SetIrqs<'_>| vectors.set(set, Vec::new());
    // Triggered by the client, by choice.
    run(&set(1, 2, IrqAction::Trigger, IrqData::Bool(&[0, 1]))).expect("set");
    assert!(!is_signalled(&first) && is_signalled(&second));
    // Masked by choice, and told of it.
    let (told, eventfd) = new_eventfd();
    let tell = set(1, 1, IrqAction::Mask, IrqData::Eventfd);
    vectors.set(&tell, vec![eventfd]).expect("set");
    run(&set(0, 3, IrqAction::Mask, IrqData::Bool(&[0, 1, 0]))).expect("set");
    assert!(is_signalled(&told));
    vectors.raise(1);
    vectors.raise(2);
    assert!(!is_signalled(&first) && is_signalled(&second));
    // Out of range.
    for (start, count) in [(4, 1), (0, 5), (u32::MAX, 0), (1, u32::MAX - 1)] {
        assert_eq!(
            run(&set(start, count, IrqAction::Mask, IrqData::None)),
            Err(Errno::INVAL)
        );
    }
    // Taken away: one, and all.
    run(&set(2, 1, IrqAction::Trigger, IrqData::Eventfd)).expect("set");
    vectors.raise(2);
    assert!(!is_signalled(&second));
    run(&set(0, 0, IrqAction::Trigger, IrqData::None)).expect("set");
    run(&set(1, 1, IrqAction::Trigger, IrqData::None)).expect("set");
    assert!(!is_signalled(&first));
    assert_eq!(vectors.read_table(ENTRY + CONTROL), 1);
}

#[test]
fn only_eventfds_are_taken() {
    let vectors = Vectors::new(1, pages());
    let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("sockets");
    let set = set(0, 1, IrqAction::Trigger, IrqData::Eventfd);
    assert_eq!(vectors.set(&set, vec![socket.into()]), Err(Errno::INVAL));
}

#[test]
fn a_full_eventfd_holds_nobody_up_for_ever() {
    let (vectors, [first, _second]) = vectors();
    rustix::io::write(&first, &(u64::MAX - 1).to_ne_bytes()).expect("filled");
    vectors.raise(1);
    // The client makes it block again.
    fcntl_setfl(&first, OFlags::empty()).expect("set");
    std::thread::scope(|scope| {
        let raise = scope.spawn(|| vectors.raise(1));
        while !raise.is_finished() && Arc::strong_count(&vectors.trigger(1)) < 3 {
            std::thread::yield_now();
        }
        vectors.clear();
        raise.join().expect("no panic");
    });
}

#[test]
fn an_empty_eventfd_that_blocks_is_not_waited_for() {
    let (ours, theirs) = new_eventfd();
    let held = Arc::new(theirs);
    fcntl_setfl(&ours, OFlags::empty()).expect("set");
    std::thread::scope(|scope| {
        let eventfds = vec![held.clone()];
        // Whoever signals it holds it for a while, and the client has read what was signalled.
        let release = scope.spawn(|| release(eventfds));
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        drop(held);
        release.join().expect("no panic");
    });
}

#[test]
fn who_waits_for_one_eventfd_has_others_to_signal() {
    let (vectors, _eventfds) = vectors();
    let (full, told) = new_eventfd();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).expect("filled");
    let tell = set(2, 1, IrqAction::Unmask, IrqData::Eventfd);
    vectors.set(&tell, vec![told]).expect("set");
    fcntl_setfl(&full, OFlags::empty()).expect("set");
    let both = |action| vectors.set(&set(1, 2, action, IrqData::None), Vec::new());
    both(IrqAction::Mask).expect("set");
    vectors.raise(1);
    std::thread::scope(|scope| {
        // Vector 2 tells first, and then vector 1 fires.
        let unmask = scope.spawn(|| both(IrqAction::Unmask));
        while vectors.read_table(2 * ENTRY + CONTROL) != 0 {
            std::thread::yield_now();
        }
        vectors.close();
        unmask.join().expect("no panic").expect("set");
    });
    // Nothing of the client is taken any more.
    let (ours, theirs) = new_eventfd();
    let again = set(1, 1, IrqAction::Trigger, IrqData::Eventfd);
    vectors.set(&again, vec![theirs]).expect("set");
    vectors.raise(1);
    assert!(!is_signalled(&ours));
}

impl Vectors {
    fn trigger(&self, vector: usize) -> Arc<OwnedFd> {
        self.state().vectors[vector]
            .trigger
            .clone()
            .expect("it was set")
    }
}

#[test]
fn the_table_is_kept_and_reset() {
    let (vectors, _eventfds) = vectors();
    for (offset, value) in [(16, 0xfee0_0000), (20, 1), (24, 0x4021), (28, 0)] {
        vectors.write_table(offset, value);
        assert_eq!(vectors.read_table(offset), value);
    }
    // Past the end.
    vectors.write_table(4 * ENTRY, 7);
    assert_eq!(vectors.read_table(4 * ENTRY), 0);
    assert_eq!(
        (vectors.read_pending(8), vectors.read_pending(u32::MAX)),
        (0, 0)
    );
    vectors.reset_table();
    assert_eq!((vectors.read_table(16), vectors.read_table(12)), (0, 1));
}
