"""The index that is kept between starts: used where nothing changed, never where something did."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from fastkd.data import headers, index, sources
from fastkd.data.sources import FolderSource, ShardSource
from fastkd.errors import DataError
from fastkd.files.mounts import kind_of_mount
from fastkd.files.sealed import seal

from .image_trees import SCRIPT

TICK = index._TICK  # before the tests change it


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder; every index is kept, also of parts that have just been written."""
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "WORTH_KEEPING", 1)
    monkeypatch.setattr(index, "_TICK", -(10**18))
    return tmp_path / "cache"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one for each folder or shard that is scanned."""
    seen: list[object] = []

    def noted(scan: Callable[..., object]) -> Callable[..., object]:
        def noting(*arguments: object) -> object:
            seen.append(arguments)
            return scan(*arguments)

        return noting

    monkeypatch.setattr(sources, "part_of", noted(sources.part_of))
    monkeypatch.setattr(sources, "samples_of", noted(sources.samples_of))
    return seen


def tree(root: Path) -> Path:
    for folder in ("a", "b", "b/deep", "c"):
        (root / folder).mkdir(parents=True)
        for name in ("1.jpg", "2.JPEG", ".3.jpg", "note.txt"):
            (root / folder / name).write_bytes(folder.encode())
    return root


def shards(root: Path) -> Path:
    pytest.importorskip("webdataset")
    root.mkdir()
    for number in range(3):
        with tarfile.open(root / f"train-{number}.tar", "w") as archive:
            for label in range(2):
                add(archive, f"{number}-{label}.jpg", b"%d" % (10 + number))
                add(archive, f"{number}-{label}.cls", b"%d" % label)
    return root


def add(archive: tarfile.TarFile, name: str, content: bytes = b"0") -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def append(shard: Path, *names: str) -> None:
    with tarfile.open(shard, "a") as archive:
        for name in names:
            add(archive, name)


def of_shards(root: Path) -> ShardSource:
    return ShardSource(root, "train-*.tar")


KINDS = pytest.mark.parametrize(("make", "source"), [(tree, FolderSource), (shards, of_shards)])


def content(source: FolderSource | ShardSource) -> list[tuple[str, int, bytes]]:
    every = range(len(source.labels))
    return [(source.name(i), int(source.labels[i]), source.read(i)) for i in every]


@KINDS
def test_the_second_start_scans_nothing(
    make: Callable[[Path], Path],
    source: Callable[[Path], FolderSource | ShardSource],
    tmp_path: Path,
    kept: Path,
    scanned: list[object],
) -> None:
    root = make(tmp_path / "data")
    before = sorted(root.rglob("*"))
    first = source(root)
    assert len(scanned) == len(first._index.paths)
    (file,) = kept.iterdir()
    scanned.clear()
    second = source(root)
    assert not scanned
    assert content(second) == content(first)
    assert second.digest() == first.digest()
    assert sorted(root.rglob("*")) == before  # nothing is written into the data set
    # Damage is noticed, and mended.
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100] + b"?" + whole[101:], b""):
        file.write_bytes(damaged)
        assert content(source(root)) == content(first)
        assert scanned
        scanned.clear()
        source(root)
        assert not scanned


def with_times_of(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file or folder and set its time of modification back, as ``rsync -t`` and ``tar -x`` do."""
    before = path.stat().st_mtime_ns
    change(path)
    os.utime(path, ns=(before, before))


def replaced(path: Path) -> None:
    shutil.copytree(path, path.with_name("new"))
    (path.with_name("new") / "4.jpg").write_bytes(b"4")
    shutil.rmtree(path)
    path.with_name("new").rename(path)


def linked_elsewhere(root: Path) -> None:
    (root / "d").unlink()
    (root / "d").symlink_to(root / "c")


CHANGES_OF_A_TREE: dict[str, Callable[[Path], object]] = {
    "an image more": lambda root: (root / "a/0.jpg").write_bytes(b"0"),
    "an image less": lambda root: (root / "b/2.JPEG").unlink(),
    "an image more, deep": lambda root: (root / "b/deep/0.jpg").write_bytes(b"0"),
    "an image renamed": lambda root: (root / "a/1.jpg").rename(root / "a/7.jpg"),
    "a class more": lambda root: shutil.copytree(root / "a", root / "aa"),
    "a class less": lambda root: shutil.rmtree(root / "c"),
    "a class renamed": lambda root: (root / "a").rename(root / "z"),
    "a folder more": lambda root: shutil.copytree(root / "a", root / "c/more"),
    "a folder less": lambda root: shutil.rmtree(root / "b/deep"),
    "a link to another folder": linked_elsewhere,
    "an image more, the time set back": lambda root: with_times_of(
        root / "a", lambda folder: (folder / "0.jpg").write_bytes(b"0")
    ),
    "a folder replaced, the time set back": lambda root: with_times_of(root / "a", replaced),
}


@pytest.mark.parametrize("change", CHANGES_OF_A_TREE.values(), ids=CHANGES_OF_A_TREE)
def test_a_changed_tree_is_noticed(
    change: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: list[object]
) -> None:
    root = tree(tmp_path / "data")
    (root / "d").symlink_to(root / "b")
    before = content(FolderSource(root))
    folders = len(scanned)
    change(root)
    scanned.clear()
    after = FolderSource(root)
    assert len(scanned) < folders  # the others were not listed
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path / "another"))
    assert content(after) == content(FolderSource(root)) != before


def longer(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(1024))


CHANGES_OF_SHARDS: dict[str, Callable[[Path], object]] = {
    "a shard more": lambda root: shutil.copy(root / "train-0.tar", root / "train-7.tar"),
    "a shard less": lambda root: (root / "train-1.tar").unlink(),
    "a shard replaced": lambda root: shutil.copy(root / "train-0.tar", root / "train-2.tar"),
    "a shard replaced, the time set back": lambda root: with_times_of(
        root / "train-2.tar", lambda shard: shutil.copy(root / "train-0.tar", shard)
    ),
}


@pytest.mark.parametrize("change", CHANGES_OF_SHARDS.values(), ids=CHANGES_OF_SHARDS)
def test_a_changed_shard_is_noticed(
    change: Callable[[Path], object], tmp_path: Path, scanned: list[object]
) -> None:
    root = shards(tmp_path / "data")
    before = of_shards(root)
    change(root)
    scanned.clear()
    after = of_shards(root)
    assert len(scanned) <= 1
    assert after.digest() != before.digest()
    for number, shard in enumerate(after.shards):
        with tarfile.open(shard) as archive:
            names = archive.getnames()
        stems = [f"{name.partition('.')[0]}" for name in names[::2]]
        assert [after.name(2 * number + i).rpartition(" ")[2] for i in range(2)] == stems


def test_incomplete_samples_of_shards_are_noted(tmp_path: Path, kept: Path, scanned: list[object]) -> None:
    root = shards(tmp_path / "data")
    assert of_shards(root).notes == ()
    append(root / "train-1.tar", "a.jpg", "b.cls", "d/._c.cls", "d/c.cls", "d/._c.jpg", "d/c.jpg")
    append(root / "train-2.tar", "e.json", "f.jpg", "f.mask.png", "f.cls")
    for scans in (2, 0):  # the second time from the index that is kept
        scanned.clear()
        source = of_shards(root)
        assert len(scanned) == scans
        assert [source.name(i).rpartition(" ")[2] for i in (4, 7)] == ["d/c", "f"]
        assert source.notes == (
            f"{root}/train-1.tar: samples without an image and a .cls side by side are ignored: "
            "the first is a, of 3 in 3 shards",
        )
    (file,) = kept.iterdir()
    older = io.BytesIO()
    np.savez(older, **{name: array for name, array in np.load(file).items() if name != "left_out"})
    seal(older)
    file.write_bytes(older.getvalue())
    assert of_shards(root).notes == ()  # of a version that did not count them
    assert not scanned


def test_a_dot_in_a_key_is_refused(tmp_path: Path) -> None:
    root = shards(tmp_path / "data")
    append(root / "train-1.tar", "d.1/a_0.v2.JPG", "d.1/a_0.v2.cls")
    with pytest.raises(DataError, match=r"d\.1/a_0\.v2\.jpg .* at the first dot, .* keys without a dot"):
        of_shards(root)


def test_what_was_just_written_is_scanned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: list[object]
) -> None:
    # A further change in the same tick of the clock would leave the same time.
    monkeypatch.setattr(index, "_TICK", TICK)
    root = tree(tmp_path / "data")
    for _ in range(2):
        scanned.clear()
        FolderSource(root)
        assert len(scanned) == 4


def test_small_data_is_not_kept(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WORTH_KEEPING", 20_000)
    FolderSource(tree(tmp_path / "data"))
    assert not kept.exists()


def test_no_place_for_the_index(tmp_path: Path, kept: Path) -> None:
    kept.write_text("a file where the folder should be")
    source = FolderSource(tree(tmp_path / "data"))
    assert len(content(source)) == 8
    (note,) = source.notes
    assert "every start finds the 8 images anew: cannot create the folder" in note
    assert "FASTKD_CACHE" in note


def digest_of(root: Path) -> str:
    index.WORTH_KEEPING, index._TICK = 1, -(10**18)
    return FolderSource(root).digest()


def test_processes_at_once(tmp_path: Path, kept: Path, scanned: list[object]) -> None:
    root = tree(tmp_path / "data")
    # Forked: an earlier fork server, which is Python 3.14's default, would have another FASTKD_CACHE.
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        digests = list(pool.map(digest_of, [root] * 12))
    assert len(set(digests)) == 1
    assert len(list(kept.iterdir())) == 1
    assert FolderSource(root).digest() == digests[0]
    assert not scanned


def test_folders_without_times_of_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: list[object]
) -> None:
    root = tree(tmp_path / "data")
    FolderSource(root)
    monkeypatch.setattr(sources, "keeps_times", lambda folder: False)
    scanned.clear()
    FolderSource(root)
    assert len(scanned) == 4
    mounts = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "30 22 0:40 / /data rw - fuse.gcsfuse bucket rw\n"
        "31 30 0:41 / /data/my\\040disk rw master:1 - nfs /dev/sdb rw\n"
        "32 31 0:42 / /data/my\\040disk rw master:1 - xfs /dev/sdb rw\n"
    )
    for path, kind in {
        "/": "ext4",
        "/home": "ext4",
        "/data": "fuse.gcsfuse",
        "/data/x": "fuse.gcsfuse",
        "/database": "ext4",
        "/data/my disk/train": "xfs",
    }.items():
        assert kind_of_mount(path, mounts) == kind


def test_a_shard_that_is_replaced_in_use(tmp_path: Path) -> None:
    root = shards(tmp_path / "data")
    source = of_shards(root)
    source.read(0)
    longer(root / "train-1.tar")
    assert source.read(1) == b"10"
    with pytest.raises(OSError, match="the shard was replaced while it is in use"):
        source.read(2)


def test_a_copy_for_another_process_opens_its_own_shards(tmp_path: Path) -> None:
    """The number of an open file means nothing there, or another file."""
    source = of_shards(shards(tmp_path / "data"))
    first = source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    source.close()
    assert copy.read(0) == first


def archive_of(
    path: Path, form: int, names: list[str], *, time: float = 0, kind: bytes = tarfile.REGTYPE
) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.type = 100 * number, time, kind
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


SHORT = ["./a/b.jpg", "a/b.cls", "é.jpg", "d" * 99]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("names", [SHORT, ["p" * 90 + "/" + "n" * 90], ["n" * 200], []])
@pytest.mark.parametrize("time", [0, 1.5])
def test_headers_are_read_as_by_tarfile(tmp_path: Path, form: int, names: list[str], time: float) -> None:
    if form == tarfile.USTAR_FORMAT and names == ["n" * 200]:
        return  # cannot be written
    path = archive_of(tmp_path / "a.tar", form, names, time=time)
    assert headers.members(path) == list(headers._any(path))
    usual = headers._usual(os.open(path, os.O_RDONLY), path.stat().st_size)
    if names == SHORT and form == tarfile.GNU_FORMAT:
        assert usual == headers.members(path)  # without tarfile


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_headers_of_what_is_no_file(tmp_path: Path, kind: bytes) -> None:
    path = archive_of(tmp_path / "a.tar", tarfile.GNU_FORMAT, ["x"], kind=kind)
    assert headers.members(path) == []


@pytest.mark.parametrize("at", [0, 100, 124, 130, 148, 156, 257, 700])
def test_damaged_headers_are_refused_as_by_tarfile(tmp_path: Path, at: int) -> None:
    path = archive_of(tmp_path / "a.tar", tarfile.GNU_FORMAT, ["0", "b.jpg", "c.jpg"])
    whole = bytearray(path.read_bytes())
    whole[at + 512] ^= 1
    path.write_bytes(whole)
    try:
        expected = list(headers._any(path))
    except tarfile.TarError as error:
        with pytest.raises(type(error)):
            headers.members(path)
    else:
        assert headers.members(path) == expected


def test_old_headers_of_gnu_have_times_where_others_have_a_prefix(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.tar", tarfile.GNU_FORMAT, ["a.jpg"])
    whole = bytearray(path.read_bytes())
    whole[345:369] = b"15163523016\0" * 2
    whole[148:156] = b"%06o\0 " % (sum(whole[:148]) + 8 * ord(" ") + sum(whole[156:512]))
    path.write_bytes(whole)
    assert headers.members(path) == list(headers._any(path))


def test_the_script_repeats_images(tmp_path: Path) -> None:
    count = {"totals": (11, 5), "scale": 0.1}
    SCRIPT.make_tree(tmp_path / "tree", 3, 2, 1, **count)
    files = sorted((tmp_path / "tree/train").rglob("*.JPEG"))
    assert len(files) == 11
    assert len({file.stat().st_ino for file in files}) == 6  # two of each class, and links to them
    assert FolderSource(tmp_path / "tree/val").labels.tolist() == [0, 0, 1, 1, 2]
    pytest.importorskip("webdataset")
    SCRIPT.make_shards(tmp_path / "shards", 3, 2, 1, 2, **count)
    source = of_shards(tmp_path / "shards")
    assert np.bincount(source.labels).tolist() == [4, 4, 3]
    assert len({source.read(i) for i in range(11)}) == 6


def test_no_more_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(31, "Too many links")

    monkeypatch.setattr(SCRIPT.os, "link", full)
    SCRIPT.make_tree(tmp_path / "tree", 2, 1, 1, totals=(6, 2), scale=0.1)
    assert len(FolderSource(tmp_path / "tree/train").labels) == 6


def test_an_unreadable_class_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "data")
    scandir = os.scandir

    def refused(path: object) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"Permission denied: .*b/deep"):
        FolderSource(root)
