//! `nvme-async serve nbd`: namespaces as network block devices.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use nvme_export::Export;
use nvme_export::nbd::{Listener, Options, Server, Tls};
use nvme_vfio_user::Socket;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::range::ByteRange;
use crate::failure::Failure;
use crate::target::{Target, is_same_controller};

/// Serves namespaces as network block devices (NBD), each as an export with a name.
///
/// Clients are qemu, nbdcopy, nbd-client and others. At a network address that is not the machine's own,
/// TLS is required, if not told otherwise.
#[derive(Args, Clone, Debug)]
pub(super) struct Arguments {
    /// Where: a network address, or a socket that only its owner can connect to.
    #[arg(long, value_name = "ADDR:PORT|unix:PATH")]
    listen: ListenArgument,

    /// What to serve: a URL, which may have a name and a range of bytes before it, as in
    /// boot=nvme://0000:44:00.0/1 or data@1G+64G=file:disk.img. Those without a name are called by their
    /// place: 1, 2... The first one is also the one that clients get that give no name.
    #[arg(required = true, value_name = "[[NAME][@OFFSET+SIZE]=]URL")]
    exports: Vec<ExportArgument>,

    /// The server's certificate, and those that vouch for it, in PEM. Then all clients have to use TLS.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of the certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Serve only clients with a certificate of one of these, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,

    /// Serve without TLS where others can listen in.
    #[arg(long)]
    allow_plaintext: bool,

    /// Refuse writes.
    #[arg(long)]
    read_only: bool,

    /// How many clients may be connected; further ones are turned away. Each has a queue pair of the controller for
    /// itself; where there are not enough, or more than 64, some share one.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    max_connections: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ListenArgument {
    Tcp(String),
    Unix(PathBuf),
}

impl FromStr for ListenArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("the path of the socket is missing".to_owned()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        match text.rsplit_once(':') {
            Some((address, port)) if !address.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(text.to_owned()))
            }
            _ => Err("it is neither ADDR:PORT nor unix:PATH".to_owned()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ExportArgument {
    name: Option<String>,
    range: Option<ByteRange>,
    url: String,
}

impl FromStr for ExportArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The options of a URL have such signs too, after its scheme.
        let (label, url) = match text.split_once('=') {
            Some((label, url)) if !label.contains(':') => (label, url),
            _ => ("", text),
        };
        let (name, range) = match label.split_once('@') {
            Some((name, range)) => (name, Some(range.parse()?)),
            None => (label, None),
        };
        Ok(Self {
            name: (!name.is_empty()).then(|| name.to_owned()),
            range,
            url: url.to_owned(),
        })
    }
}

/// Runs `serve nbd`.
pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut options = Options::default();
    options.tls = tls(arguments)?;
    options.allow_plaintext = arguments.allow_plaintext;
    options.max_connections = arguments.max_connections.into();
    let names = names(&arguments.exports)?;
    // Many connections, and TLS takes time.
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(serve(arguments, names, options))
}

async fn serve(arguments: &Arguments, names: Vec<String>, options: Options) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Before files are made, for nothing if there is no socket.
    let place = Place::bind(&arguments.listen).await?;
    let has_tls = options.tls.is_some();
    if !has_tls && !options.allow_plaintext && !place.listener.is_local()? {
        return Err(Failure::request(
            "others can listen in on this address: give --tls-cert and --tls-key, or say --allow-plaintext",
        ));
    }
    let mut targets = Vec::new();
    let server = match start(arguments, &names, options, &mut targets).await {
        Ok(server) => server,
        Err(failure) => {
            for target in targets {
                target.discard().await;
            }
            return Err(failure);
        }
    };
    for (export, name) in arguments.exports.iter().zip(&names) {
        super::announce(&export.url, place.uri(name, has_tls))?;
    }
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let served = server.run(place.listener, stop).await;
    let closed = close(&targets).await;
    served.map_err(Failure::from).and(closed)
}

/// Opens everything, into `targets`.
async fn start(
    arguments: &Arguments,
    names: &[String],
    options: Options,
    targets: &mut Vec<Target>,
) -> Result<Server, Failure> {
    let mut exports = Vec::new();
    for (argument, name) in arguments.exports.iter().zip(names) {
        let open = super::options_for(options.max_connections);
        let target = Target::open(&argument.url, open).await?;
        let namespace = target.namespace.clone();
        targets.push(target);
        let export = match &argument.range {
            None => Export::new(namespace)?,
            Some(ByteRange(range)) => Export::of_range(namespace, range.clone())?,
        };
        let export = match arguments.read_only {
            true => export.read_only(),
            false => export,
        };
        exports.push((name.clone(), export));
    }
    Server::new(exports, options).map_err(Failure::request)
}

/// Shuts all controllers down, each once.
async fn close(targets: &[Target]) -> Result<(), Failure> {
    let mut outcome = Ok(());
    for (index, target) in targets.iter().enumerate() {
        let controller = target.namespace.controller();
        let is_closed = targets[..index]
            .iter()
            .any(|other| is_same_controller(other.namespace.controller(), controller));
        if !is_closed {
            let closed = controller.shutdown().await.map_err(Failure::from);
            outcome = outcome.and(closed);
        }
    }
    outcome
}

/// The names of all exports: those that they were given, or else their places.
fn names(exports: &[ExportArgument]) -> Result<Vec<String>, Failure> {
    let mut names: Vec<String> = Vec::new();
    for (index, export) in exports.iter().enumerate() {
        let name = match &export.name {
            Some(name) => name.clone(),
            None => (index + 1).to_string(),
        };
        if names.contains(&name) {
            return Err(Failure::request(format_args!(
                "two exports are called {name:?}"
            )));
        }
        names.push(name);
    }
    Ok(names)
}

fn tls(arguments: &Arguments) -> Result<Option<Tls>, Failure> {
    let (Some(certificate), Some(key)) = (&arguments.tls_cert, &arguments.tls_key) else {
        return Ok(None);
    };
    let read = |path: &Path| {
        let context = path.display().to_string();
        fs::read(path).map_err(|error| Failure::from(error).context(context))
    };
    let authority = arguments.tls_client_ca.as_deref().map(read).transpose()?;
    Tls::from_pem(&read(certificate)?, &read(key)?, authority.as_deref())
        .map(Some)
        .map_err(Failure::request)
}

/// Where clients connect to.
struct Place {
    listener: Listener,
    /// Removed when it is dropped.
    socket: Option<Socket>,
}

impl Place {
    async fn bind(argument: &ListenArgument) -> Result<Self, Failure> {
        match argument {
            ListenArgument::Tcp(address) => {
                let listener = TcpListener::bind(address).await;
                let listener =
                    listener.map_err(|error| Failure::from(error).context(address.clone()))?;
                Ok(Self {
                    listener: listener.into(),
                    socket: None,
                })
            }
            ListenArgument::Unix(path) => {
                let socket = Socket::bind(path)?;
                Ok(Self {
                    listener: super::listener(&socket)?.into(),
                    socket: Some(socket),
                })
            }
        }
    }

    /// How clients name an export here.
    fn uri(&self, name: &str, has_tls: bool) -> String {
        let scheme = if has_tls { "nbds" } else { "nbd" };
        let name = Escaped(name);
        match (&self.socket, self.listener.tcp_address()) {
            (Some(socket), _) => {
                let path = socket.path().to_string_lossy();
                format!("{scheme}+unix:///{name}?socket={}", Escaped(&path))
            }
            (None, Some(address)) => format!("{scheme}://{address}/{name}"),
            (None, None) => format!("{scheme}:///{name}"),
        }
    }
}

/// Text as a part of a URI.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match byte {
                b'-' | b'.' | b'_' | b'~' | b'/' => write!(f, "{}", char::from(byte))?,
                _ if byte.is_ascii_alphanumeric() => write!(f, "{}", char::from(byte))?,
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_to_listen() {
        let parse = |text: &str| text.parse::<ListenArgument>();
        assert_eq!(
            parse("[::1]:10809"),
            Ok(ListenArgument::Tcp("[::1]:10809".to_owned()))
        );
        assert_eq!(
            parse("unix:/run/a:b"),
            Ok(ListenArgument::Unix("/run/a:b".into()))
        );
        for wrong in ["", "unix:", "127.0.0.1", ":10809", "127.0.0.1:65536"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_to_serve() {
        let parse = |text: &str| {
            let export = text.parse::<ExportArgument>().expect(text);
            let range = export.range.map(|range| range.0);
            (export.name.unwrap_or_default(), range, export.url)
        };
        let expected = |name: &str, range, url: &str| (name.to_owned(), range, url.to_owned());
        assert_eq!(
            parse("mem:?size=1M&lba=4096"),
            expected("", None, "mem:?size=1M&lba=4096")
        );
        assert_eq!(parse("a=mem:?size=1M"), expected("a", None, "mem:?size=1M"));
        assert_eq!(
            parse("a@4K+8K=nvme://0000:44:00.0/1"),
            expected("a", Some(4096..12288), "nvme://0000:44:00.0/1")
        );
        assert_eq!(
            parse("@0+8K=file:a@b=c"),
            expected("", Some(0..8192), "file:a@b=c")
        );
        assert!("a@4K=mem:".parse::<ExportArgument>().is_err());
    }

    #[test]
    fn names_are_places_or_given() {
        let all = |texts: &[&str]| {
            let exports: Vec<_> = texts
                .iter()
                .map(|text| text.parse().expect("fine"))
                .collect();
            names(&exports).ok()
        };
        assert_eq!(
            all(&["mem:", "b=mem:", "mem:"]),
            Some(vec!["1".to_owned(), "b".to_owned(), "3".to_owned()])
        );
        assert_eq!(all(&["mem:", "1=mem:"]), None);
    }

    #[test]
    fn text_in_uris() {
        assert_eq!(Escaped("/run/a b?.sock").to_string(), "/run/a%20b%3F.sock");
    }
}
