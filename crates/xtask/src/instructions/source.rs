//! Where instructions are from: the functions, inlined ones included, and the lines in them.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};

/// A function in which an instruction is, by itself or inlined into another one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Function {
    /// The path of the module: a part of the symbol, or, where a function is inlined, the file.
    pub(super) module: String,
    pub(super) name: String,
    /// File and line, where that is known.
    pub(super) line: Option<String>,
}

impl Function {
    /// A function by its symbol, without the type that it belongs to:
    /// `<a::b::C<D> as e::F>::g` is `g` of `a::b`.
    pub(super) fn compiled(symbol: &str) -> Self {
        let plain = without_parameters(symbol);
        let (path, name) = plain.rsplit_once("::").unwrap_or(("", &plain));
        // A closure is part of the function around it, if that is known.
        let (path, name) = match path.rsplit_once("::") {
            Some(around) if name.starts_with('{') => around,
            _ => (path, name),
        };
        let segments = path.split("::");
        let is_module = |segment: &&str| segment.starts_with(|c: char| c.is_ascii_lowercase());
        let module: Vec<_> = segments.take_while(is_module).collect();
        Self {
            module: module.join("::"),
            name: name.to_owned(),
            line: None,
        }
    }

    /// Its symbol may be missing, and only its own name be known, or be that of the function that it is
    /// inlined into; the file is right.
    fn inlined(name: &str, line: &str) -> Self {
        let function = Self::compiled(name);
        let (file, _) = line.rsplit_once(':').unwrap_or((line, ""));
        Self {
            module: match module(file) {
                unknown if unknown.is_empty() => function.module,
                module => module,
            },
            name: function.name,
            line: short(line),
        }
    }

    /// The crate, or nothing for what is no Rust code.
    pub(super) fn owner(&self) -> Option<&str> {
        let owner = self.module.split("::").next();
        owner.filter(|owner| !owner.is_empty())
    }

    /// Whether it is of this module or of one in it.
    pub(super) fn is_in(&self, module: &str) -> bool {
        let rest = self.module.strip_prefix(module);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    }
}

/// The functions of each instruction of `program`, the innermost first.
pub(super) fn functions(
    program: &Path,
    addresses: &BTreeSet<u64>,
) -> Result<HashMap<u64, Vec<Function>>> {
    let mut addr2line = Command::new("addr2line")
        .args([
            "--addresses",
            "--functions",
            "--inlines",
            "--demangle",
            "--exe",
        ])
        .arg(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("addr2line")?;
    let mut input = addr2line.stdin.take().context("it was just piped")?;
    let list: String = addresses
        .iter()
        .map(|address| format!("{address:#x}\n"))
        .collect();
    // It answers while it reads.
    let writer = thread::spawn(move || input.write_all(list.as_bytes()));
    let output = addr2line.wait_with_output().context("addr2line")?;
    ensure!(output.status.success(), "addr2line failed");
    let written = writer.join().ok().context("addr2line's input")?;
    written.context("addr2line's input")?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

/// After each address there are pairs of lines, a function and where it is in there.
fn parse(text: &str) -> Result<HashMap<u64, Vec<Function>>> {
    let mut all = HashMap::new();
    let mut lines = text.lines().peekable();
    while let Some(address) = lines.next() {
        let number = address.strip_prefix("0x");
        let number = number.and_then(|hex| u64::from_str_radix(hex, 16).ok());
        let number = number.with_context(|| format!("addr2line: {address}"))?;
        let mut functions: Vec<Function> = Vec::new();
        while let Some(name) = lines.next_if(|line| !line.starts_with("0x")) {
            let line = lines.next().context("addr2line's output ends early")?;
            let is_compiled = lines.peek().is_none_or(|next| next.starts_with("0x"));
            functions.push(if is_compiled {
                Function {
                    line: short(line),
                    ..Function::compiled(name)
                }
            } else {
                Function::inlined(name, line)
            });
        }
        all.insert(number, functions);
    }
    Ok(all)
}

/// A symbol without what is between angle brackets, but for the type that an `impl` is of.
fn without_parameters(symbol: &str) -> String {
    let mut plain = String::new();
    let mut rest = symbol;
    // `<A as B>::c`, `<impl A for B>::c` after the path of a module, and combinations of them.
    if let Some(inner) = rest.strip_prefix('<') {
        let inner = inner.trim_start_matches(['&', '*', '<', '(', '[']);
        let inner = ["mut ", "const ", "dyn "]
            .iter()
            .fold(inner, |inner, word| {
                inner.strip_prefix(word).unwrap_or(inner)
            });
        let end = inner.find(['<', ' ', '>', ',', ';']).unwrap_or(inner.len());
        plain.push_str(&inner[..end]);
        let (_, after) = symbol.split_at(closing(symbol));
        rest = after;
    }
    let mut depth = 0;
    let mut previous = ' ';
    for character in rest.chars() {
        match character {
            '<' => depth += 1,
            // Not that of an arrow.
            '>' if previous != '-' => depth -= 1,
            _ if depth == 0 => plain.push(character),
            _ => {}
        }
        previous = character;
    }
    plain.replace("::::", "::")
}

/// Where the first bracket of a text that begins with it is closed.
fn closing(text: &str) -> usize {
    let mut depth = 0;
    let mut previous = ' ';
    for (index, character) in text.char_indices() {
        match character {
            '<' => depth += 1,
            '>' if previous != '-' => depth -= 1,
            _ => {}
        }
        previous = character;
        if depth == 0 {
            return index + 1;
        }
    }
    text.len()
}

/// The path of the module that is in a file.
fn module(file: &str) -> String {
    let Some((before, inside)) = file.rsplit_once("/src/") else {
        // Those of the root package.
        let target = file
            .rsplit_once("benches/")
            .map_or("", |(_, target)| target);
        return target.trim_end_matches(".rs").replace('/', "::");
    };
    let package = before.rsplit('/').next().unwrap_or(before);
    // From a registry a package comes with its version.
    let (name, _) = package
        .rsplit_once('-')
        .filter(|(_, version)| version.starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or((package, ""));
    let inside = inside.trim_end_matches(".rs");
    let inside = inside.strip_suffix("/mod").unwrap_or(inside);
    let name = name.replace('-', "_");
    match inside {
        "lib" | "main" | "mod" => name,
        inside => format!("{name}::{}", inside.replace('/', "::")),
    }
}

/// File and line, from the package's directory on; nothing if that is unknown.
fn short(line: &str) -> Option<String> {
    // There may be a remark after it.
    let line = line.split(' ').next().unwrap_or(line);
    if line.starts_with('?') {
        return None;
    }
    let start = ["/crates/", "/benches/", "/library/"]
        .iter()
        .find_map(|root| line.rfind(root))
        .or_else(|| line[..line.rfind("/src/")?].rfind('/'));
    Some(line[start.map_or(0, |start| start + 1)..].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_have_modules_and_names() {
        let check = |symbol: &str, module: &str, name: &str| {
            let function = Function::compiled(symbol);
            assert_eq!(
                (&*function.module, &*function.name),
                (module, name),
                "{symbol}"
            );
        };
        check("malloc", "", "malloc");
        check("a::b::State::reap", "a::b", "reap");
        check("a::task::{{closure}}", "a", "task");
        check("<a::b::C<D> as core::future::Future>::poll", "a::b", "poll");
        check("<&mut a::C<fn() -> D> as E>::g", "a", "g");
        check("a::b::<impl a::c::State>::submit", "a::b", "submit");
        check("a::Vec<T,A>::push", "a", "push");
        check(
            "core::ptr::drop_in_place<a::Stage<alloc::Rc<b::C>>>",
            "core::ptr",
            "drop_in_place",
        );
    }

    #[test]
    fn files_have_modules() {
        let registry = "/home/u/.cargo/registry/src/index-1/";
        assert_eq!(
            module("/w/crates/nvme-async/src/engine/mod.rs"),
            "nvme_async::engine"
        );
        assert_eq!(module("/w/crates/iova/src/lib.rs"), "iova");
        assert_eq!(
            module(&format!("{registry}tokio-1.54.1/src/task/a.rs")),
            "tokio::task::a"
        );
        assert_eq!(
            module("/rustc/59/library/core/src/option.rs"),
            "core::option"
        );
        assert_eq!(
            module("/w/benches/instructions/device.rs"),
            "instructions::device"
        );
        assert_eq!(module("??"), "");
    }

    #[test]
    fn inlined_functions_come_first() {
        let text = "\
0x0000000000000010
take<u8>
/rustc/59/library/core/src/option.rs:7
with
/w/crates/nvme-async/src/engine/local.rs:81 (discriminator 2)
nvme_async::engine::state::State::reap
/w/crates/nvme-async/src/engine/state.rs:211
0x0000000000000020
??
??:0
0x0000000000000030
{closure#0}
/w/crates/iova/src/lib.rs:5
tokio::task::Core<T,S>::poll
/rustc/59/library/core/src/cell.rs:?
a::b
??:0
";
        let functions = parse(text).expect("valid");
        let at = |address: u64| -> Vec<_> {
            let of = functions[&address].iter();
            of.map(|of| (&*of.module, &*of.name, of.line.as_deref()))
                .collect()
        };
        assert_eq!(
            at(0x10),
            [
                ("core::option", "take", Some("library/core/src/option.rs:7")),
                (
                    "nvme_async::engine::local",
                    "with",
                    Some("crates/nvme-async/src/engine/local.rs:81")
                ),
                (
                    "nvme_async::engine::state",
                    "reap",
                    Some("crates/nvme-async/src/engine/state.rs:211")
                ),
            ]
        );
        assert_eq!(at(0x20), [("", "??", None)]);
        assert_eq!(
            at(0x30),
            [
                ("iova", "{closure#0}", Some("crates/iova/src/lib.rs:5")),
                ("core::cell", "poll", Some("library/core/src/cell.rs:?")),
                ("a", "b", None),
            ]
        );
        parse("0x10\nname").expect_err("no line");
    }

    #[test]
    fn modules_hold_modules() {
        let function = Function::compiled("a::b::c::d");
        assert!(function.is_in("a::b") && function.is_in("a::b::c"));
        assert!(!function.is_in("a::bb") && !Function::compiled("a::bc::d").is_in("a::b"));
        assert_eq!(function.owner(), Some("a"));
        assert_eq!(Function::compiled("malloc").owner(), None);
    }
}
