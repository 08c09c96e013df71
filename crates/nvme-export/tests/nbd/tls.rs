//! Clients that use TLS, and those that don't.

use std::sync::Arc;

use nvme_async::Namespace;
use nvme_export::nbd::{Options, Server, Tls, TlsError};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::DuplexStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::client::{
    ABORT, ACK, Client, ERR_TLS_REQD, EXPORT_NAME, GO, LIST, Reply, STARTTLS, STRUCTURED_REPLY,
    info,
};
use crate::{connect, open, pattern, server_of};

const NAME: &str = "nbd.example";

/// A certificate and its key.
struct Identity {
    certificate: String,
    key: String,
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("signed"))
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    fn issue(&self) -> Identity {
        let params = CertificateParams::new(vec![NAME.to_owned()]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("signed");
        Identity {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        }
    }
}

fn server(namespace: &Namespace, identity: &Identity, clients: Option<&Authority>) -> Server {
    let clients = clients.map(Authority::pem);
    let tls = Tls::from_pem(
        identity.certificate.as_bytes(),
        identity.key.as_bytes(),
        clients.as_ref().map(String::as_bytes),
    );
    let mut options = Options::default();
    options.tls = Some(tls.expect("certificate and key"));
    server_of(namespace, options)
}

/// Goes over to TLS, as one who trusts `authority` and is `identity`.
async fn start_tls(
    client: Client,
    authority: &Authority,
    identity: Option<&Identity>,
) -> std::io::Result<Client<TlsStream<DuplexStream>>> {
    let mut roots = RootCertStore::empty();
    let pem = authority.pem();
    let root = CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM");
    roots.add(root).expect("a certificate");
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let chain = CertificateDer::from_pem_slice(identity.certificate.as_bytes());
            let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes());
            builder
                .with_client_auth_cert(vec![chain.expect("PEM")], key.expect("PEM"))
                .expect("an identity")
        }
    };
    let name = ServerName::try_from(NAME).expect("a name");
    let connector = TlsConnector::from(Arc::new(config));
    Ok(Client::new(connector.connect(name, client.stream).await?))
}

#[tokio::test]
async fn nothing_is_told_without_tls() {
    let authority = Authority::new();
    let namespace = open("mem:?size=1M").await;
    let server = server(&namespace, &authority.issue(), None);
    let (mut client, serving) = connect(&server);
    client.greet(3).await.expect("greeted");
    for option in [LIST, GO, STRUCTURED_REPLY, 99] {
        let outcome = client.outcome(option, &info("disk")).await;
        assert_eq!(outcome, ERR_TLS_REQD);
    }
    assert_eq!(client.outcome(ABORT, b"").await, ACK);
    client.is_over().await;
    serving.await.expect("it ends");
    let (mut client, serving) = connect(&server);
    client.greet(3).await.expect("greeted");
    client.send_option(EXPORT_NAME, b"").await.expect("sent");
    client.is_over().await;
    serving.await.expect("it ends");
}

#[tokio::test]
async fn data_goes_over_tls() {
    let authority = Authority::new();
    let namespace = open("mem:?size=4M").await;
    let server = server(&namespace, &authority.issue(), None);
    let (mut client, serving) = connect(&server);
    client.greet(3).await.expect("greeted");
    assert_eq!(client.outcome(STARTTLS, b"").await, ACK);
    let client = start_tls(client, &authority, None).await.expect("TLS");
    let mut client = client.go_on("disk").await;
    let data = pattern(1, 1 << 20);
    assert_eq!(client.write(1 << 20, &data).await, Reply::Done);
    assert_eq!(client.read(1 << 20, 1 << 20).await.bytes(), data);
    assert_eq!(client.read(0, 512).await.bytes(), [0; 512]);
    client.send(crate::client::DISC, 0, 0, 0, b"").await;
    client.is_over().await;
    serving.await.expect("it ends");
}

#[tokio::test]
async fn clients_that_nobody_vouches_for_are_not_served() {
    let (ours, others) = (Authority::new(), Authority::new());
    let namespace = open("mem:?size=1M").await;
    let server = server(&namespace, &ours.issue(), Some(&ours));
    for (identity, is_served) in [
        (None, false),
        (Some(others.issue()), false),
        (Some(ours.issue()), true),
    ] {
        let (mut client, serving) = connect(&server);
        client.greet(3).await.expect("greeted");
        assert_eq!(client.outcome(STARTTLS, b"").await, ACK);
        // The refusal may come after what the client takes for the end of the handshake.
        match start_tls(client, &ours, identity.as_ref()).await {
            Err(_) => assert!(!is_served),
            Ok(client) if is_served => {
                let mut client = client.go_on("disk").await;
                assert_eq!(client.read(0, 512).await.bytes(), [0; 512]);
            }
            Ok(mut client) => client.is_over().await,
        }
        serving.await.expect("it ends");
    }
}

#[tokio::test]
async fn what_is_no_certificate() {
    let authority = Authority::new();
    let (one, other) = (authority.issue(), authority.issue());
    let new = |certificate: &str, key: &str, clients: Option<&str>| {
        let clients = clients.map(str::as_bytes);
        Tls::from_pem(certificate.as_bytes(), key.as_bytes(), clients).map(drop)
    };
    assert!(new(&one.certificate, &one.key, Some(&authority.pem())).is_ok());
    assert!(matches!(
        new("", &one.key, None),
        Err(TlsError::Certificate(_))
    ));
    assert!(matches!(
        new(&one.certificate, "", None),
        Err(TlsError::Key(_))
    ));
    assert!(matches!(
        new(&one.certificate, &other.key, None),
        Err(TlsError::Config(_))
    ));
    assert!(matches!(
        new(&one.certificate, &one.key, Some("nobody")),
        Err(TlsError::ClientAuthority(_))
    ));
}
