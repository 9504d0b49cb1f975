//! What `scripts/install.sh` lays out builds and is complete: the DKMS sources against Debian's own headers
//! with the metadata that `scripts/rust-headers.sh` adds, in the laboratory; the units as systemd reads them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use tests::program::{afterimage_path, outcome};
use tests::story;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn lab(arguments: &[&str]) -> Result<String> {
    let done = outcome(Command::new(repository().join("tests/vm/lab.sh")).args(arguments))?.expect(0)?;
    Ok(done.stdout.trim().to_owned())
}

#[test]
fn the_installed_tree_is_complete_and_its_module_builds() -> Result<()> {
    story("packaging", |home| {
        let dest = home.path("dest");
        let install = repository().join("scripts/install.sh");
        outcome(Command::new(install).env("DESTDIR", &dest).env("AFTERIMAGE_BIN", afterimage_path()?))?
            .expect(0)?;
        for file in [
            "usr/bin/afterimage",
            "usr/lib/systemd/system/afterimage-replicate@.service",
            "usr/lib/systemd/system/afterimage-receive@.service",
            "usr/lib/udev/rules.d/60-kfilter.rules",
            "usr/lib/modules-load.d/afterimage.conf",
            "usr/share/doc/afterimage/operations.md",
            "usr/share/doc/afterimage/LICENSE-APACHE",
            "usr/share/doc/afterimage/LICENSE-GPL-2.0",
        ] {
            ensure!(dest.join(file).is_file(), "{file} is missing");
        }
        let version = env!("CARGO_PKG_VERSION");
        let sources = dest.join(format!("usr/src/kfilter-{version}"));
        let dkms = fs::read_to_string(sources.join("dkms.conf"))?;
        ensure!(dkms.contains(&format!("PACKAGE_VERSION=\"{version}\"")), "dkms.conf: {dkms}");

        lab(&["make"])?;
        let root = PathBuf::from(lab(&["path"])?).join("root");
        let kernel = lab(&["kernel"])?;
        // As DKMS does: a copy of the sources, its command with its variables.
        let build = root.join("build/dkms");
        let _ = fs::remove_dir_all(&build);
        fs::create_dir_all(root.join("build"))?;
        outcome(Command::new("cp").arg("-r").arg(&sources).arg(&build))?.expect(0)?;
        let script = repository().join("scripts/rust-headers.sh");
        outcome(Command::new("cp").arg(script).arg(root.join("build")))?.expect(0)?;
        let source = lab(&["make-line"])?;
        let source = source.rsplit(' ').next().unwrap_or_default().to_owned();
        lab(&["sh", &format!("bash /build/rust-headers.sh --source {source} {kernel}")])?;
        let built = format!(
            "cd /build/dkms; kernel_source_dir=/usr/src/linux-headers-{kernel}; . ./dkms.conf; eval \"${{MAKE[0]}}\" && modinfo -F vermagic \
             ${{BUILT_MODULE_LOCATION[0]}}/${{BUILT_MODULE_NAME[0]}}.ko"
        );
        let said = lab(&["sh", &built])?;
        ensure!(said.contains(&format!("{kernel} ")), "for another kernel: {said}");

        // The guest's systemd reads the units; the binary that they name is put where they say.
        let guest = root.join("guest");
        for unit in ["afterimage-replicate@.service", "afterimage-receive@.service"] {
            fs::copy(dest.join("usr/lib/systemd/system").join(unit), guest.join("tmp").join(unit))?;
        }
        let verify = "systemd-analyze verify --recursive-errors=no --man=no /tmp/afterimage-replicate@x.service /tmp/afterimage-receive@x.service";
        for unit in ["replicate", "receive"] {
            let (from, to) =
                (format!("tmp/afterimage-{unit}@.service"), format!("tmp/afterimage-{unit}@x.service"));
            let text = fs::read_to_string(guest.join(&from))?.replace("/usr/bin/afterimage", "/bin/true");
            fs::write(guest.join(to), text)?;
        }
        outcome(Command::new("chroot").arg(&guest).args(["/bin/bash", "-c", verify]))?.expect(0)?;
        Ok(())
    })
}
