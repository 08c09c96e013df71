//! What an instruction is for.

use super::source::Function;

/// What is done for a read, and what is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Phase {
    /// From the call of the user to the doorbell: the future is made and polled for the first time.
    Submit,
    /// Completions are taken.
    Reap,
    /// The task is woken and run, and its future, polled again, gives the result.
    Wake,
    /// The program that reads.
    Program,
    /// The model device, which does not count.
    Device,
}

/// Functions, and modules with `::` at the end, the innermost of which says what an instruction is for.
/// A function may also be in a module of the one that is named.
const RULES: [(&str, Phase); 18] = [
    ("instructions::admin::", Phase::Device),
    ("instructions::device::", Phase::Device),
    ("instructions::memory::", Phase::Device),
    ("nvme_async::engine::reaper::", Phase::Reap),
    ("nvme_async::engine::state::reap", Phase::Reap),
    // What `reap` calls, also where that is inlined into another function.
    ("nvme_async::engine::state::finish", Phase::Reap),
    ("nvme_async::engine::state::finish_operation", Phase::Reap),
    ("nvme_async::engine::state::settle", Phase::Reap),
    ("nvme_async::engine::window::completed", Phase::Reap),
    ("poll_window::", Phase::Reap),
    ("nvme_async::queue::core::next_completion", Phase::Reap),
    ("nvme_async::queue::core::acknowledge", Phase::Reap),
    // `Aftermath::run` calls the wakers.
    ("nvme_async::engine::state::operation::run", Phase::Wake),
    ("instructions::submit", Phase::Submit),
    ("instructions::resume", Phase::Wake),
    // What makes a future, which the program does before it polls it.
    ("nvme_async::io::new", Phase::Submit),
    ("nvme_async::namespace::read_into", Phase::Submit),
    ("nvme_async::namespace::timeout", Phase::Submit),
];

/// The standard library's code belongs to who uses it.
const STANDARD: [&str; 4] = ["core", "alloc", "std", "hashbrown"];
const PROGRAM: &str = "instructions";
pub(super) const TOKIO: &str = "tokio";

/// What an instruction is for, and whose it is, by the functions that it is in, innermost first.
pub(super) fn classify(functions: &[Function]) -> (Phase, Option<&Function>) {
    let owner = functions.iter().find(|function| {
        function
            .owner()
            .is_some_and(|owner| !STANDARD.contains(&owner))
    });
    let phase = functions.iter().find_map(rule);
    let phase = match (phase, owner.and_then(Function::owner)) {
        (Some(Phase::Device), _) => Phase::Device,
        (_, Some(PROGRAM)) => Phase::Program,
        (Some(phase), _) => phase,
        // The scheduler.
        (None, Some(TOKIO)) => Phase::Wake,
        (None, _) => Phase::Program,
    };
    (phase, owner)
}

fn rule(function: &Function) -> Option<Phase> {
    let matches = |(path, _): &&(&str, Phase)| {
        path.rsplit_once("::").is_some_and(|(module, name)| {
            function.is_in(module) && (name.is_empty() || name == function.name)
        })
    };
    RULES.iter().find(matches).map(|(_, phase)| *phase)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase_of(symbols: &[&str]) -> (Phase, Option<String>) {
        let functions: Vec<_> = symbols.iter().map(|it| Function::compiled(it)).collect();
        let (phase, owner) = classify(&functions);
        (phase, owner.map(|owner| owner.name.clone()))
    }

    #[test]
    fn the_innermost_name_decides() {
        let start = "nvme_async::engine::state::State::start";
        let reap = "nvme_async::engine::state::State::reap";
        let ring = "<instructions::device::Model as D>::ring";
        let submit = "instructions::submit";
        let check = |symbols: &[&str], phase, owner: &str| {
            assert_eq!(
                phase_of(symbols),
                (phase, Some(owner.to_owned())),
                "{symbols:?}"
            );
        };
        check(&["memcpy", start, submit], Phase::Submit, "start");
        check(&[reap, start, submit], Phase::Reap, "reap");
        check(&["write", ring, reap, start, submit], Phase::Device, "ring");
        check(
            &["core::mem::swap", start, "instructions::resume"],
            Phase::Wake,
            "start",
        );
    }

    #[test]
    fn without_a_rule_the_owner_decides() {
        let closure = "instructions::read_locally::{{closure}}";
        assert_eq!(
            phase_of(&["tokio::runtime::task::poll", closure]).0,
            Phase::Wake
        );
        assert_eq!(phase_of(&[closure]).0, Phase::Program);
        assert_eq!(phase_of(&["instructions::submit"]).0, Phase::Program);
        assert_eq!(phase_of(&["malloc"]), (Phase::Program, None));
    }
}
