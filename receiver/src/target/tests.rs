use super::*;
use journal::io::RealDisk;

fn disk() -> Arc<dyn Disk> {
    Arc::new(RealDisk)
}

fn create(path: &Path, force: bool) -> Result<Target> {
    Target::create(&disk(), &Place::find(path)?, 1 << 20, force, || Ok(()))
}

fn checked(path: &Path, force: bool) -> Result<()> {
    check(&Place::find(path)?, path, 1 << 20, force, &Guarded::default())
}

#[test]
fn a_target_being_written_is_refused_to_all_others() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x.img");
    let mut first = create(&path, false).unwrap();
    first.write(b"first", 0).unwrap();
    for force in [false, true] {
        assert_eq!(checked(&path, force).unwrap_err().kind, ErrorKind::NotPossible);
        assert_eq!(create(&path, force).err().unwrap().kind, ErrorKind::NotPossible);
    }
    assert!(!path.exists(), "no part has the final name");
    first.sync().unwrap();
    first.finish().unwrap();
    assert_eq!(&fs::read(&path).unwrap()[..5], b"first");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600, "for its owner only");
}

#[test]
fn what_was_left_is_removed_on_request_and_what_was_dropped_is_gone() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x.img");
    let partial = home.path().join("x.img.partial");
    fs::write(&partial, "left by a process that was killed").unwrap();
    assert_eq!(checked(&path, false).unwrap_err().kind, ErrorKind::Usage);
    assert_eq!(create(&path, false).err().unwrap().kind, ErrorKind::Usage);
    checked(&path, true).unwrap();
    drop(create(&path, true).unwrap());
    assert!(!partial.exists() && !path.exists());
    std::os::unix::fs::symlink("/etc/passwd", &partial).unwrap();
    assert!(create(&path, true).is_err(), "no link is followed");
}

#[test]
fn what_came_meanwhile_is_not_replaced() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x.img");
    let target = create(&path, false).unwrap();
    fs::write(&path, "mine").unwrap();
    assert_eq!(target.finish().unwrap_err().kind, ErrorKind::Usage);
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    let target = create(&path, true).unwrap();
    fs::remove_file(home.path().join("x.img.partial")).unwrap();
    fs::write(home.path().join("x.img.partial"), "foreign").unwrap();
    assert_eq!(target.finish().unwrap_err().kind, ErrorKind::Busy);
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}
