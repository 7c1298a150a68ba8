"""Listings of files: the order of a scan, links, what a run keeps of it, what has changed since."""

import os
import pickle
import random

import numpy as np
import pytest

from caco_scale.data import listed_files
from caco_scale.data.folders import FolderSource, is_image
from caco_scale.data.listed_files import ListedFiles, Listings, Rows
from caco_scale.data.scan import scan
from caco_scale.data.store import open_store
from caco_scale.errors import UserError

ODD = ("a", "a-c", "a/b", "a/b-1", "a/b/c", "ü", "Z", "a b", "c/d.jpg", "c/d", "日本")


def files(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def names_of(found):
    return [name for name, _ in found]


# ---- a scan


def test_files_come_by_top_folder_and_whole_name_whatever_the_names(tmp_path):
    draw = random.Random(0)
    names = [f"{draw.choice(ODD)}/{draw.choice('aé-_Z')}{i}.jpg" for i in range(200)]
    names += ["loose.jpg", "z.JPG", "a.jpg"]
    files(tmp_path, *names, "a/notes.txt", ".git/x.jpg", "c/.hidden.jpg", "__MACOSX/y.jpg")
    os.close(os.open(os.fsencode(tmp_path) + b"/a/\xff.jpg", os.O_CREAT))
    names.append(os.fsdecode(b"a/\xff.jpg"))
    top = lambda name: name.partition("/")[0] if "/" in name else ""
    found = scan(str(tmp_path), is_image)
    assert list(found) == [
        (n, len(n.encode()) if "\udcff" not in n else 0) for n in sorted(names, key=lambda n: (top(n), n))
    ]
    tops = {name: sum(top(n) == name for n in names) for name in sorted({top(n) for n in names})}
    assert found.top_of_each() == list(tops.items())
    assert (found.skipped, found.num_skipped) == ([("a/notes.txt", "its name is not an image's")], 1)
    assert names_of(scan(str(tmp_path), is_image, sizes=False)) == names_of(found)


def test_links_are_followed_once(tmp_path):
    top = files(tmp_path / "top", "real/0.jpg", "real/1.jpg", "b/0.jpg")
    files(tmp_path, "away/x/0.jpg", "away/x/y/1.jpg", "single.jpg")
    links = {
        "real/up": "..",  # a loop
        "real/self": ".",
        "again": "real",  # two ways to one folder
        "far1": "../away/x",
        "far2": "../away",  # holds what far1 leads to
        "far3": "../away/x/y",
        "b/copy.jpg": "../real/0.jpg",  # two ways to one file
        "b/single.jpg": "../../single.jpg",
        "c.jpg": "../single.jpg",
        "gone.jpg": "nowhere",
        "b/loop.jpg": "loop.jpg",
    }
    for name, target in links.items():
        (top / name).symlink_to(target)
    found = [scan(str(top), is_image) for _ in range(5)]
    assert names_of(found[0]) == [
        "c.jpg",
        "b/0.jpg",
        "far1/0.jpg",
        "far1/y/1.jpg",
        "real/0.jpg",
        "real/1.jpg",
    ]
    assert all(list(again) == list(found[0]) and again.skipped == found[0].skipped for again in found)
    assert {name for name, _ in found[0].skipped} == {
        *("again", "real/up", "real/self", "far2/x", "far3", "b/copy.jpg", "b/single.jpg"),
        *("gone.jpg", "b/loop.jpg"),
    }
    store = open_store(top)
    assert store.left_out.startswith(
        f"9 left out of {top}: again (a link to a folder that is listed already)"
    )
    assert {file.name for file in FolderSource(top).scan().files} == set(names_of(found[0]))


# ---- a listing


def test_a_listing_is_the_same_in_memory_in_a_file_and_in_a_pickle(tmp_path, monkeypatch):
    folder = files(tmp_path / "set", *(f"{c}/{i}é.jpg" for c in "ab" for i in range(700)))
    stores = [open_store(folder), open_store(folder, listings=Listings(tmp_path / "run", main=True))]
    stores.append(open_store(folder, listings=Listings(tmp_path / "run", main=False)))
    stores += [pickle.loads(pickle.dumps(store)) for store in stores]
    monkeypatch.setattr(listed_files, "MOST_PICKLED", 100)
    large = pickle.dumps(stores[0])
    assert len(large) < 5000, "workers find what is large, it is not sent to them"
    stores.append(pickle.loads(large))
    names = stores[0].names(range(1400))
    for store in stores:
        assert store.manifest == stores[0].manifest
        assert store.names(range(1400)) == names
        assert store.read_sample(1, 3)["jpg"].decode() == names[1003].partition("/")[2]
    damaged = next((tmp_path / "run").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"the listing .* is damaged .*: remove it"):
        open_store(folder, listings=Listings(tmp_path / "run", main=False))


def test_what_has_changed_since_it_was_listed_is_one_error_that_names_it(tmp_path):
    folder = files(tmp_path / "set", *(f"a/{i}.jpg" for i in range(30)))
    kept = tmp_path / "run"
    first = open_store(folder, listings=Listings(kept, main=True)).fingerprint()
    resumed = lambda: Listings(kept, True, lambda: kept)
    open_store(folder, listings=resumed())

    def changes():
        with pytest.raises(UserError) as caught:
            open_store(folder, listings=resumed())
        line = str(caught.value)
        assert line.startswith(f"{folder} has changed since {kept}/")
        assert line.endswith("with --data.relist true")
        return line

    (folder / "a/7.jpg").write_bytes(b"longer than before")
    assert "listed it: a/7.jpg has 18 bytes and had 7; put it back" in changes()
    (folder / "a/3.jpg").rename(folder / "a/new.jpg")
    (folder / "a/4.jpg").unlink()
    line = changes()
    assert "a/3.jpg is gone (and 1 more are gone)" in line or "a/4.jpg is gone (and 1 more are gone)" in line
    assert "; a/new.jpg is new; a/7.jpg has 18 bytes" in line
    # Of many files only the names are compared at the start; a size is seen when the file is read.
    store = open_store(folder, listings=Listings(kept, main=False))
    at = store.names(range(30)).index("000000/a/7.jpg")
    with pytest.raises(UserError, match=r"a/7\.jpg has 18 bytes and had 7: .*--data\.relist true"):
        store.read_sample(0, at)
    anew = open_store(folder, listings=Listings(kept, main=True))
    assert (anew.manifest.num_samples, anew.fingerprint() != first) == (29, True)
    open_store(folder, listings=resumed())


def test_of_many_files_only_the_names_are_compared_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(listed_files, "SIZES_AT_START", 10)
    folder = files(tmp_path / "set", *(f"{i}.jpg" for i in range(12)))
    kept = tmp_path / "run"
    open_store(folder, listings=Listings(kept, main=True))
    (folder / "3.jpg").write_bytes(b"other")
    open_store(folder, listings=Listings(kept, True, lambda: kept))
    (folder / "more.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"more\.jpg is new; put"):
        open_store(folder, listings=Listings(kept, True, lambda: kept))


def test_no_file_is_an_object_in_a_listing():
    n = 100_000
    names = "".join(f"n{i:08d}/n{i:08d}_{i}.JPEG" for i in range(n)).encode()
    lengths = np.array([len(f"n{i:08d}/n{i:08d}_{i}.JPEG") for i in range(n)])
    rows = Rows(names, lengths, np.full(n, 5), np.zeros(n, np.int32), {"classes": ["x"], "skipped": []})
    found = ListedFiles.in_memory(rows)
    size = os.stat(found.path).st_size
    assert size < len(names) + n * 21 + 10_000
    kinds = {name: type(value) for name, value in vars(found).items()}
    assert not any(
        isinstance(value, list | tuple | dict) and len(value) > 2 for value in vars(found).values()
    ), kinds
