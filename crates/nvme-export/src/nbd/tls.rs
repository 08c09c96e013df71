//! TLS: who the server is, and who may be its client.

use std::fmt;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

/// A server's certificate and key, and which clients it believes. TLS 1.2 and 1.3.
#[derive(Clone)]
pub struct Tls {
    pub(super) acceptor: TlsAcceptor,
}

/// Why TLS can't be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The certificates are no PEM, or there are none.
    #[error("the certificate: {0}")]
    Certificate(pem::Error),
    /// The private key is no PEM, or there is none.
    #[error("the private key: {0}")]
    Key(pem::Error),
    /// The certificates of those who vouch for clients are no PEM, or there are none.
    #[error("the certificates that clients are checked by: {0}")]
    ClientAuthority(pem::Error),
    /// There are none that can vouch for clients.
    #[error("the certificates that clients are checked by: {0}")]
    Verifier(#[from] VerifierBuilderError),
    /// Certificate and key are of no use, or don't belong together.
    #[error(transparent)]
    Config(#[from] rustls::Error),
}

impl Tls {
    /// Takes a chain of certificates, the server's first, and its private key, both in PEM. With
    /// `client_authority`, certificates in PEM, only clients that have a certificate of one of these are
    /// served.
    ///
    /// # Errors
    ///
    /// [`TlsError`].
    pub fn from_pem(
        certificates: &[u8],
        key: &[u8],
        client_authority: Option<&[u8]>,
    ) -> Result<Self, TlsError> {
        let chain = all_of(certificates).map_err(TlsError::Certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(TlsError::Key)?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?;
        let builder = match client_authority {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                for certificate in all_of(pem).map_err(TlsError::ClientAuthority)? {
                    roots.add(certificate)?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build()?)
            }
        };
        let config = builder.with_single_cert(chain, key)?;
        Ok(Self {
            acceptor: Arc::new(config).into(),
        })
    }
}

/// All certificates, of which there is one at least.
fn all_of(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>()?;
    if all.is_empty() {
        return Err(pem::Error::NoItemsFound);
    }
    Ok(all)
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}
