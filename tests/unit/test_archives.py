"""Archives that hold what they should, and those that would write where they must not."""

import gzip
import io
import stat
import tarfile
import zipfile

import pytest

from biojepa import disk
from biojepa.download import archives, unpack_archives, unpack_file
from biojepa.errors import InputError

MATRIX = {"matrix.mtx.gz": b"m" * 1000, "features.tsv.gz": b"f" * 300, "barcodes.tsv.gz": b"b" * 20}


def tar_entry(name, content=b"x", kind=tarfile.REGTYPE, target=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    entry.size = len(content) if kind == tarfile.REGTYPE else 0
    return entry, content


def write_tar(path, *entries, mode=None):
    with tarfile.open(path, mode or ("w" if path.suffix == ".tar" else "w:gz")) as file:
        for entry, content in entries:
            file.addfile(entry, io.BytesIO(content))
    return path


def write_zip(path, *entries):
    """Write names, or entries with their attributes, and contents."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def write(path, contents):
    """Write an archive of plain files, of the kind that its name says."""
    if path.suffix == ".zip":
        return write_zip(path, *contents.items())
    return write_tar(path, *(tar_entry(name, content) for name, content in contents.items()))


def content_of(folder):
    """Return all below a folder, hidden files too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "unpacked"


def require_nothing(folder):
    """Nothing was written, in the folder or around it."""
    assert list(folder.parent.iterdir()) == []
    assert {p.name for p in folder.parent.parent.iterdir()} <= {"data", "a.tar", "a.tar.gz", "a.tgz", "a.zip"}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "A.TGZ", "a.zip"])
@pytest.mark.parametrize("prefix", ["", "./", "filtered_feature_bc_matrix/", "outs/filtered/"])
def test_the_files_of_an_archive_are_there_without_the_folder_around_them(tmp_path, folder, name, prefix):
    archive = write(tmp_path / name, {prefix + member: content for member, content in MATRIX.items()})
    assert unpack_archives([archive], folder) == sorted(MATRIX)
    assert content_of(folder) == MATRIX
    assert [path.name for path in folder.parent.iterdir()] == ["unpacked"]


def test_several_folders_stay_apart(tmp_path, folder):
    samples = {f"{sample}/{name}": content for sample in ("s1", "s2") for name, content in MATRIX.items()}
    unpack_archives([write(tmp_path / "a.tar", {f"all/{k}": v for k, v in samples.items()})], folder)
    assert content_of(folder) == samples


def test_several_archives_get_a_folder_each(tmp_path, folder):
    one = write(tmp_path / "one.tar.gz", {"x/matrix.mtx": b"1"})
    two = write(tmp_path / "two.zip", {"matrix.mtx": b"2"})
    unpack_archives([one, two], folder)
    assert content_of(folder) == {"one/matrix.mtx": b"1", "two/matrix.mtx": b"2"}


def test_folders_and_hidden_files_of_an_archive_are_left_out(tmp_path, folder):
    entries = [
        tar_entry("x", kind=tarfile.DIRTYPE),
        tar_entry("x/._matrix.mtx"),
        tar_entry("__MACOSX/x/._y"),
        tar_entry("x/.DS_Store"),
        tar_entry("x/matrix.mtx", b"1"),
    ]
    unpack_archives([write_tar(tmp_path / "a.tar", *entries)], folder)
    assert content_of(folder) == {"matrix.mtx": b"1"}


def test_what_was_there_before_is_replaced(tmp_path, folder):
    folder.mkdir(parents=True)
    (folder / "old").write_text("old")
    unpack_archives([write(tmp_path / "a.zip", MATRIX)], folder)
    assert content_of(folder) == MATRIX


BAD_NAMES = [
    "../evil",
    "x/../../evil",
    "/etc/evil",
    "x//evil",
    "x/./evil",
    "..",
    "a\\..\\evil",
    "C:evil",
    "x/-rf",
    "~/evil",
    ".hidden/evil",
    "x/new\nline",
]


@pytest.mark.parametrize("kind", ["a.tar", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_elsewhere_refuses_the_whole_archive(tmp_path, folder, kind, name):
    archive = write(tmp_path / kind, {"x/good": b"1", name: b"2"})
    with pytest.raises(InputError) as caught:
        unpack_archives([archive], folder)
    message = str(caught.value)
    assert message.startswith(f"{archive}, member {name!r}: found one that ")
    assert "Fix: unpack it yourself" in message
    require_nothing(folder)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "is a link"),
        (tarfile.LNKTYPE, "is a link"),
        (tarfile.CHRTYPE, "is a device or pipe"),
        (tarfile.BLKTYPE, "is a device or pipe"),
        (tarfile.FIFOTYPE, "is a device or pipe"),
    ],
)
@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_links_and_devices_in_a_tar_refuse_it(tmp_path, folder, name, kind, what):
    archive = write_tar(tmp_path / name, tar_entry("x/good"), tar_entry("x/inner", kind=kind, target="/etc"))
    with pytest.raises(InputError, match=rf"member 'x/inner': found one that {what}"):
        unpack_archives([archive], folder)
    require_nothing(folder)


@pytest.mark.parametrize(
    ("mode", "what"), [(stat.S_IFLNK, "is a link"), (stat.S_IFIFO, "is a device or pipe")]
)
def test_links_and_devices_in_a_zip_refuse_it(tmp_path, folder, mode, what):
    entry = zipfile.ZipInfo("x/inner")
    entry.external_attr = (mode | 0o777) << 16
    with pytest.raises(InputError, match=rf"member 'x/inner': found one that {what}"):
        unpack_archives([write_zip(tmp_path / "a.zip", ("x/good", b"1"), (entry, b"/etc"))], folder)
    require_nothing(folder)


def test_an_encrypted_member_refuses_a_zip(tmp_path, folder):
    archive = write_zip(tmp_path / "a.zip", ("x", b"1"))
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    archive.write_bytes(content)
    with pytest.raises(InputError, match="member 'x': found one that is encrypted"):
        unpack_archives([archive], folder)
    require_nothing(folder)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
@pytest.mark.parametrize(
    ("members", "what"),
    [
        (["x/A", "x/a"], "is there twice"),
        (["x/a", "x/A"], "is there twice"),
        (["x", "x/a"], "is a file and a folder"),
    ],
)
def test_members_in_each_others_place_refuse_an_archive(tmp_path, folder, name, members, what):
    archive = write(tmp_path / name, dict.fromkeys(members, b"1"))
    with pytest.raises(InputError, match=rf"member '{members[1]}': found one that {what}"):
        unpack_archives([archive], folder)
    require_nothing(folder)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
def test_a_small_archive_of_a_huge_file_is_refused(tmp_path, folder, name, monkeypatch):
    monkeypatch.setattr(archives, "SMALLEST_BOUND", 1000)
    archive = write(tmp_path / name, {"a": bytes(3_000_000)})
    assert archive.stat().st_size * archives.LARGEST_RATIO < 3_000_000
    with pytest.raises(InputError, match=rf"{name}: found 3\.00 MB of files in an archive of .*200 times"):
        unpack_archives([archive], folder)
    require_nothing(folder)


def test_what_comes_is_counted_and_not_what_was_announced(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(archives, "SMALLEST_BOUND", 1000)
    monkeypatch.setattr(archives, "LARGEST_RATIO", 1)
    packed = tmp_path / "screen.h5ad.gz"
    packed.write_bytes(gzip.compress(bytes(1_000_000)))
    destination = folder / "screen.h5ad"
    with pytest.raises(InputError, match=r"found more than 1\.0\d kB of files in an archive of 1\.0\d kB"):
        unpack_file(packed, destination)
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(archives, "LARGEST_RATIO", 1000)
    unpack_file(packed, destination)
    assert destination.read_bytes() == bytes(1_000_000)


def test_many_files_are_refused(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(archives, "MOST_MEMBERS", 3)
    three = {str(i): b"1" for i in range(3)}
    unpack_archives([write(tmp_path / "a.tar", three)], folder)
    with pytest.raises(InputError, match=r"b\.tar: found more than 3 files"):
        unpack_archives([write(tmp_path / "b.tar", {**three, "4": b"1"})], folder.with_name("b"))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_a_disk_without_room_is_noticed_before_a_file_is_written(tmp_path, folder, name, monkeypatch):
    archive = write(tmp_path / name, {"matrix.mtx": bytes(5000)})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("usage", (), {"free": 4000}))
    with pytest.raises(InputError, match=rf"4\.00 kB free; expected 5\.00 kB for the content of {name}"):
        unpack_archives([archive], folder)
    require_nothing(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_a_torn_archive_leaves_nothing(tmp_path, folder, name, share):
    archive = write(tmp_path / name, {"a": bytes(range(256)) * 200, "b": bytes(range(255)) * 200})
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        InputError, match=rf"{name}: found (an archive that cannot be read to its end|no files)"
    ):
        unpack_archives([archive], folder)
    require_nothing(folder)


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_an_empty_archive_is_no_screen(tmp_path, folder, name):
    with pytest.raises(InputError, match=rf"{name}: found no files"):
        unpack_archives([write(tmp_path / name, {})], folder)
    require_nothing(folder)


def test_a_compressed_file_is_decompressed(tmp_path, folder):
    packed = tmp_path / "screen.h5ad.gz"
    packed.write_bytes(gzip.compress(b"\x89HDF" * 1000))
    unpack_file(packed, folder / "screen.h5ad")
    assert content_of(folder) == {"screen.h5ad": b"\x89HDF" * 1000}


@pytest.mark.parametrize("damage", ["torn", "flipped", "plain"])
def test_a_damaged_gzip_file_leaves_nothing(tmp_path, folder, damage):
    packed = tmp_path / "screen.h5ad.gz"
    content = bytearray(gzip.compress(bytes(range(256)) * 1000))
    if damage == "flipped":
        content[-6] ^= 1  # of the checksum at its end
    packed.write_bytes({"torn": content[:-20], "plain": b"plain"}.get(damage, content))
    with pytest.raises(
        InputError, match=r"screen\.h5ad\.gz: found an archive that cannot be read to its end"
    ):
        unpack_file(packed, folder / "screen.h5ad")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
def test_the_only_h5ad_of_an_archive_is_taken_whatever_lies_beside_it(tmp_path, folder, name):
    archive = write(tmp_path / name, {"x/README.txt": b"read", "x/y/inner.h5ad": b"1"})
    unpack_file(archive, folder / "a.h5ad")
    assert content_of(folder) == {"a.h5ad": b"1"}


@pytest.mark.parametrize(
    ("members", "found"),
    [({"x.csv": b"1"}, "0 .h5ad files"), ({"b.h5ad": b"1", "c.h5ad": b"2"}, "2 .h5ad files")],
)
def test_an_archive_without_exactly_one_h5ad_is_refused(tmp_path, folder, members, found):
    archive = write(tmp_path / "a.zip", members)
    with pytest.raises(InputError) as caught:
        unpack_file(archive, folder / "a.h5ad")
    assert f"{archive}: found {found} in the archive" in str(caught.value)
    assert "as the format h5ad is one file" in str(caught.value)
    assert all(name in str(caught.value) for name in members if name.endswith("h5ad"))
    assert list(folder.iterdir()) == []
