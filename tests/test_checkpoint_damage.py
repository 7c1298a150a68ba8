"""Damage of a checkpoint is found before anything of the file is parsed, and nothing in it asks for memory."""

import io
import json
import pickle
import random
import subprocess
import zipfile

import pytest
import torch
from run_directories import change_values, sign

from caco_scale.checkpoint import read, sums
from caco_scale.checkpoint.folder import check_files, latest, read_values
from caco_scale.checkpoint.read import load, load_tensors
from caco_scale.checkpoint.state import State
from caco_scale.checkpoint.values import OF_A_RUN, check_run
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    tensors = {"query.w": torch.arange(300.0), "bank.rows": torch.arange(12).view(3, 4)}
    Checkpointer(tmp_path).save(5, State(tensors), wait=True)
    return latest(tmp_path)


def as_of_version_0_1(checkpoint):
    """Without hashes, as 0.1 wrote it."""
    change_values(checkpoint, sums=None)
    (checkpoint / sums.NAME).unlink()


def test_every_file_has_a_hash_that_sha256sum_reads(checkpoint):
    listed = sums.read_sums(checkpoint)
    assert {*listed, sums.NAME} == {file.name for file in checkpoint.iterdir()}
    assert listed["values.json"] == sums.file_sha256(checkpoint / "values.json")
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", sums.NAME], cwd=checkpoint, check=True)


@pytest.mark.parametrize("name", [".metadata", "values.json", "__0_0.distcp"])
def test_a_flipped_bit_is_found_before_the_file_is_parsed(checkpoint, name, monkeypatch):
    parsers = {
        ".metadata": (read, "_Unpickler"),
        "values.json": (json, "loads"),
        "__0_0.distcp": (read, "_record"),
    }
    monkeypatch.setattr(*parsers[name], lambda *_: pytest.fail("parsed"))
    path, bits = checkpoint / name, random.Random(name)
    whole = path.read_bytes()
    for _ in range(30):
        data = bytearray(whole)
        data[bits.randrange(len(data))] ^= 1 << bits.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"damaged: {name}: its bytes are not those that were written"):
            load_tensors(checkpoint)


def test_the_list_of_hashes_is_found_damaged_too(checkpoint):
    path = checkpoint / sums.NAME
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 2
        path.write_bytes(data)
        with pytest.raises(UserError, match="is damaged: "):
            load_tensors(checkpoint)
    path.unlink()
    with pytest.raises(UserError, match="damaged: SHA256SUMS: missing"):
        read_values(checkpoint)


def test_of_0_1_sizes_are_checked_and_nothing_asks_for_memory(checkpoint, monkeypatch):
    """Each bit of the table flipped, one after the other: the same tensors, or one line, and no large allocation."""
    as_of_version_0_1(checkpoint)
    whole = load_tensors(checkpoint)
    path, bits = checkpoint / ".metadata", random.Random(0)
    table, empty = path.read_bytes(), torch.empty
    assert len(table) < 10_000
    monkeypatch.setattr(torch, "empty", lambda size, **o: empty(size, **o) if size.numel() < 1000 else 1 / 0)
    refused = []
    for place in range(len(table)):
        data = bytearray(table)
        data[place] ^= 1 << bits.randrange(8)
        path.write_bytes(data)
        try:
            found = load_tensors(checkpoint)
        except UserError as error:
            refused.append(str(error))
        else:
            assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert len(refused) > 100
    assert max(map(len, refused)) < 1000


def with_table(checkpoint, change):
    """The checkpoint with a table that ``change`` has changed, and signed."""
    values, path = read_values(checkpoint), checkpoint / ".metadata"
    table = read._Unpickler(io.BytesIO(path.read_bytes())).load()
    change(table)
    path.write_bytes(pickle.dumps(table))
    change_values(checkpoint, files={**values["files"], ".metadata": path.stat().st_size})


def larger(table):
    entry = table.state_dict_metadata["query.w"]
    entry.size = entry.chunks[0].sizes = torch.Size([7_000_000_000])


def many(table):
    entry = table.state_dict_metadata["query.w"]
    entry.size = torch.Size([7_000_000_000])


def shared(table):
    first = next(iter(table.storage_data.values()))
    for info in table.storage_data.values():
        info.offset, info.length = first.offset, first.length


def beyond(table):
    next(iter(table.storage_data.values())).offset = 10**6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (larger, "7000000000 elements of query.w in"),
        (many, "300 of the 7000000000 elements of query.w"),
        (shared, "its blocks are more than"),
        (beyond, "a block of .* bytes at 1000000"),
    ],
)
def test_no_size_is_more_than_the_files_explain(checkpoint, change, message):
    with_table(checkpoint, change)
    with pytest.raises(UserError, match=rf"damaged: \.metadata: .*{message}"):
        load_tensors(checkpoint)


def test_a_block_that_unpacks_to_more_than_it_is_long(checkpoint):
    with zipfile.ZipFile(checkpoint / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    data = (checkpoint / "bomb").read_bytes()
    (checkpoint / "bomb").unlink()

    def point_to_it(table):
        for info in table.storage_data.values():
            info.offset, info.length = 0, len(data)
        table.state_dict_metadata = {"query.w": table.state_dict_metadata["query.w"]}

    (checkpoint / "__0_0.distcp").write_bytes(data * 2)
    with_table(checkpoint, point_to_it)
    files = {**read_values(checkpoint)["files"], "__0_0.distcp": 2 * len(data)}
    change_values(checkpoint, files=files, shapes={"query.w": [300]})
    with pytest.raises(UserError, match=r"compressed|elements of query\.w"):
        load_tensors(checkpoint)


WRONG = {
    "step": ["5", 10**30, -1, 5.0, True, [5], 6],
    "world_size": [0, "1", 1.5],
    "torch": [3],
    "shapes": [3, {"query.w": "300"}, {"query.w": [-300]}, {"query.w": [10**30]}, {"query.w": 300}],
    "files": [[], {"../../secret": 3}, {"values.json": 3}, {".metadata": "3"}, {".metadata": -1}],
    "end": ["9", -1, 1e9],
    "config": ["x", [1]],
    "fingerprint": [7],
    "num_samples": ["many", -1],
    "bank_pointer": [-1, "3", 10**40],
    "skipped": ["0"],
    "corrupt": [[], {"a": 1}],
    "knn": [[3], [[1, "x"]], [[1, 2, 3]], {"1": 2}],
    "seconds": [[1], {"save": "x"}, {"save": float("nan")}],
    "last_epoch_bank": [3, {"rows_used": "x"}],
    "branched_from": [3, ["a"]],
    "epoch": ["1", float("inf"), -1],
}


@pytest.mark.parametrize("name", WRONG)
def test_every_field_has_a_type_and_a_range(checkpoint, name):
    for value in WRONG[name]:
        change_values(checkpoint, **{name: value})
        with pytest.raises(UserError, match=rf"damaged: values\.json: (it says )?{name}") as caught:
            read_values(checkpoint)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "[" * 100_000, '{"format": 1}', "{", "\xff"])
def test_values_that_are_none(checkpoint, text):
    (checkpoint / "values.json").write_bytes(text.encode("latin-1"))
    sign(checkpoint)
    with pytest.raises(UserError, match=r"damaged: values\.json"):
        read_values(checkpoint)


def test_what_only_runs_save_is_missed_by_name(checkpoint):
    with pytest.raises(UserError, match=rf"no {', '.join(OF_A_RUN)}: give another"):
        check_run(read_values(checkpoint), checkpoint)


def test_every_reader_checks_the_files_that_it_reads(checkpoint):
    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    data[2] ^= 1  # in no block's tensor
    (checkpoint / "__0_0.distcp").write_bytes(data)
    state = State({"query.w": torch.zeros(300), "bank.rows": torch.zeros(3, 4, dtype=torch.int64)})
    for read_it in (
        lambda: load(checkpoint, state),
        lambda: load_tensors(checkpoint, ["query.w"]),
        lambda: check_files(checkpoint, read_values(checkpoint)),
    ):
        with pytest.raises(UserError, match=r"damaged: __0_0\.distcp: its bytes are not"):
            read_it()
    assert not state.tensors["query.w"].any()
