//! Who a side is: a P-256 key with a self-signed certificate, known to others by the certificate's SHA-256.
//!
//! Both lie in one file, `identity.pem` (mode 0600), so that there is never one without the other. Names,
//! validity and issuer in the certificate mean nothing: the fingerprint is pinned on the other side, and
//! replaced there by hand.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::str::FromStr;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::tls;

/// The file in the identity's directory.
pub const FILE_NAME: &str = "identity.pem";

/// SHA-256 of a certificate in DER; shown and read as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of this certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Fingerprint {
        Fingerprint(Sha256::digest(certificate).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut bytes = [0; 32];
        let wrong =
            |e| Error::because(ErrorKind::Setting, format!("identity {text:?} is not 64 hex digits"), e);
        hex::decode_to_slice(text, &mut bytes).map_err(wrong)?;
        Ok(Fingerprint(bytes))
    }
}

impl serde::Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// This side's key and certificate.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.fingerprint())
    }
}

impl Identity {
    /// Makes an identity in `dir`, which is made (mode 0700) if it is absent. It is durable when this
    /// returns.
    ///
    /// # Errors
    /// [`ErrorKind::IdentityExists`] where `dir` holds one: peers have pinned it, so it is never overwritten.
    pub fn create(dir: &Path) -> Result<Identity> {
        let path = dir.join(FILE_NAME);
        let io = |what: &str| {
            let at = format!("{what} {}", path.display());
            move |e: io::Error| Error::because(ErrorKind::Io, at, e)
        };
        let pem = generate()?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io("create directory of"))?;

        // 1. Write and sync under another name: a crash leaves no half identity under the real one.
        let draft = dir.join(format!("{FILE_NAME}.{}.new", std::process::id()));
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&draft).map_err(io("create"))?;
        let written = file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()).map_err(io("write"));
        // 2. A hard link fails where the name is taken, so of two at once one wins and none overwrites.
        let linked = written.and_then(|()| {
            fs::hard_link(&draft, &path).map_err(|e| match e.kind() {
                io::ErrorKind::AlreadyExists => exists(&path),
                _ => io("create")(e),
            })
        });
        fs::remove_file(&draft).map_err(io("remove draft of"))?;
        linked?;
        // 3. Sync the directory and its parent: a fingerprint that was shown must not be gone after a power
        //    cut.
        for dir in [Some(dir), dir.parent().filter(|p| !p.as_os_str().is_empty())].into_iter().flatten() {
            File::open(dir).and_then(|d| d.sync_all()).map_err(io("sync directory of"))?;
        }
        Identity::load(dir)
    }

    /// Reads the identity in `dir`.
    ///
    /// # Errors
    /// [`ErrorKind::IdentityMissing`]; [`ErrorKind::IdentityDamaged`] where others may read it, or where key
    /// and certificate are not there, not readable or not of one another.
    pub fn load(dir: &Path) -> Result<Identity> {
        let path = dir.join(FILE_NAME);
        let pem = fs::read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                let at = format!("no identity at {}: `afterimage identity new` makes one", path.display());
                Error::because(ErrorKind::IdentityMissing, at, e)
            }
            _ => Error::because(ErrorKind::Io, format!("read {}", path.display()), e),
        })?;
        let damaged = |what: &str| format!("{}: {what}", path.display());
        let mode = fs::metadata(&path)
            .map_err(|e| Error::because(ErrorKind::Io, format!("read {}", path.display()), e))?
            .permissions()
            .mode();
        if mode & 0o077 != 0 {
            let at = damaged(&format!("mode {:o} lets others read the key; set it to 600", mode & 0o777));
            return Err(Error::new(ErrorKind::IdentityDamaged, at));
        }
        let certificate = CertificateDer::from_pem_slice(&pem)
            .map_err(|e| Error::because(ErrorKind::IdentityDamaged, damaged("no certificate"), e))?;
        let key = PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|e| Error::because(ErrorKind::IdentityDamaged, damaged("no key"), e))?;
        CertifiedKey::from_der(vec![certificate.clone()], key.clone_key(), &tls::provider()).map_err(
            |e| Error::because(ErrorKind::IdentityDamaged, damaged("key and certificate do not match"), e),
        )?;
        Ok(Identity { certificate, key })
    }

    /// What peers pin.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone()]
    }

    /// A secret of this identity for one purpose, the same in every process.
    pub(crate) fn derive(&self, purpose: &[u8]) -> [u8; 32] {
        use sha2::Digest as _;
        sha2::Sha256::new().chain_update(purpose).chain_update(self.key.secret_der()).finalize().into()
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

fn exists(path: &Path) -> Error {
    let at =
        format!("an identity exists at {}: peers may have pinned it, it is not overwritten", path.display());
    Error::new(ErrorKind::IdentityExists, at)
}

/// A new key and certificate, as the file's text.
fn generate() -> Result<String> {
    let make = || {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = rcgen::CertificateParams::new([tls::SERVER_NAME.to_owned()])?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, tls::SERVER_NAME);
        let certificate = params.self_signed(&key)?;
        Ok(format!("{}{}", certificate.pem(), key.serialize_pem()))
    };
    make().map_err(|e: rcgen::Error| Error::because(ErrorKind::Io, "generate key and certificate", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_created_is_loaded_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/identity");
        assert_eq!(Identity::load(&dir).unwrap_err().kind, ErrorKind::IdentityMissing);
        let created = Identity::create(&dir).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(FILE_NAME))), (0o700, 0o600));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "the draft is gone");

        assert_eq!(Identity::create(&dir).unwrap_err().kind, ErrorKind::IdentityExists);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "the draft is gone");
        assert_eq!(Identity::load(&dir).unwrap().fingerprint(), created.fingerprint());
        let shown = created.fingerprint().to_string();
        assert_eq!(shown.len(), 64);
        assert_eq!(shown.parse::<Fingerprint>().unwrap(), created.fingerprint());
        assert!(!format!("{created:?}").contains("PRIVATE"));
    }

    #[test]
    fn damaged_identities_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        Identity::create(&a).unwrap();
        Identity::create(&b).unwrap();
        let path = a.join(FILE_NAME);
        let good = fs::read_to_string(&path).unwrap();
        let other = fs::read_to_string(b.join(FILE_NAME)).unwrap();
        let key_at = |pem: &str| pem.find("-----BEGIN PRIVATE").unwrap();

        for bad in [
            String::new(),
            good[..key_at(&good)].to_owned(),
            good[key_at(&good)..].to_owned(),
            good[..good.len() - 60].to_owned(),
            format!("{}{}", &good[..key_at(&good)], &other[key_at(&other)..]),
        ] {
            fs::write(&path, &bad).unwrap();
            assert_eq!(Identity::load(&a).unwrap_err().kind, ErrorKind::IdentityDamaged, "{bad}");
        }
        fs::write(&path, &good).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = Identity::load(&a).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::IdentityDamaged);
        assert!(refused.to_string().contains("640"), "{refused}");
    }

    #[test]
    fn fingerprints_are_64_hex_digits() {
        for bad in ["", "ab", &"g".repeat(64), &"a".repeat(63), &"a".repeat(66)] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
