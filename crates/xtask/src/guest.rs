//! What runs inside of the guest: the init script, and the command as a shell script.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The first process of the guest.
pub(crate) const INIT: &str = include_str!("guest-init.sh");

/// The variables of the caller that a command in the guest sees, by their first letters.
const FORWARDED: [&str; 5] = ["RUST_", "PROPTEST_", "NVME_ASYNC_", "LC_", "LANG"];

/// A command as the guest runs it.
#[derive(Debug)]
pub(crate) struct GuestCommand {
    /// The program and its arguments.
    pub(crate) words: Vec<OsString>,
    /// Where it starts.
    pub(crate) directory: PathBuf,
    /// Where the guest looks for programs before it looks where the caller does.
    pub(crate) programs: PathBuf,
    /// Variables beyond those that are forwarded from the caller.
    pub(crate) environment: Vec<(String, OsString)>,
}

impl GuestCommand {
    /// The script that becomes this command. It fails as a shell does: with status 127 for a
    /// program that does not exist, and 126 for one that can't be run.
    pub(crate) fn script(&self) -> Vec<u8> {
        let mut script = Vec::new();
        let mut export = |name: &str, value: &OsStr| {
            script.extend_from_slice(format!("export {name}=").as_bytes());
            script.extend_from_slice(&quoted(value));
            script.push(b'\n');
        };
        let mut path = OsString::from(&self.programs);
        path.push(":");
        path.push(env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin")));
        export("PATH", &path);
        export("HOME", OsStr::new("/root"));
        for (name, value) in env::vars_os() {
            if let Some(name) = name.to_str()
                && FORWARDED.iter().any(|prefix| name.starts_with(prefix))
            {
                export(name, &value);
            }
        }
        for (name, value) in &self.environment {
            export(name, value);
        }
        script.extend_from_slice(b"cd ");
        script.extend_from_slice(&quoted(self.directory.as_os_str()));
        script.extend_from_slice(b" || exit 126\nexec");
        for word in &self.words {
            script.push(b' ');
            script.extend_from_slice(&quoted(word));
        }
        script.push(b'\n');
        script
    }
}

fn quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend_from_slice(br"'\''"),
            _ => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn command(words: &[&str]) -> GuestCommand {
        GuestCommand {
            words: words.iter().map(OsString::from).collect(),
            directory: PathBuf::from("/"),
            programs: PathBuf::from("/programs"),
            environment: vec![("GREETING".to_owned(), OsString::from("it's $HOME\n\"hi\""))],
        }
    }

    fn run(command: &GuestCommand) -> (Option<i32>, String) {
        let script = String::from_utf8(command.script()).unwrap();
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    }

    #[test]
    fn words_and_variables_arrive_as_they_are() {
        let words = [
            "printf",
            "%s|",
            "a b",
            "",
            "it's",
            "$HOME",
            "*",
            "\\",
            "new\nline",
        ];
        let (status, output) = run(&command(&words));
        assert_eq!(status, Some(0));
        assert_eq!(output, "a b||it's|$HOME|*|\\|new\nline|");

        let (_, output) = run(&command(&[
            "sh",
            "-c",
            "echo \"$GREETING\"; pwd; echo ${PATH%%:*}",
        ]));
        assert_eq!(output, "it's $HOME\n\"hi\"\n/\n/programs\n");
    }

    #[test]
    fn status_is_the_one_of_the_command() {
        assert_eq!(run(&command(&["sh", "-c", "exit 7"])).0, Some(7));
        assert_eq!(run(&command(&["no-such-program"])).0, Some(127));
    }
}
