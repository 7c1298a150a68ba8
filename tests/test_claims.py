"""Files of torch.save that claim more than they hold: refused in one line, in a process that may have 4 GB."""

import json
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from caco_scale.weights.claims import LEGACY_MAGIC
from caco_scale.weights.files import read_tensors


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def whole(number):
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(module, name, *arguments):
    return named(module, name) + group(*arguments) + b"R"


def storage(length, kind="FloatStorage", key="0"):
    return group(text("storage"), named("torch", kind), text(key), text("cpu"), whole(length)) + b"Q"


def tensor(length, size, stride, offset=0, kind="FloatStorage", name="_rebuild_tensor_v2"):
    """A pickled tensor of a storage that says that it has ``length`` elements."""
    sizes = [group(*map(whole, numbers)) for numbers in (size, stride)]
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", name, storage(length, kind), whole(offset), *sizes, b"\x89", hooks)


GOOD = tensor(16, [4, 4], [4, 1])
LARGE = 10**9  # elements: 4 GB of floats
LAUGHS = whole(1) + b"".join(
    b"q%ch%c\x86" % (n, n) for n in range(48)
)  # 2^48 parts: hashing it would take for ever

# What stands for the tensor "w" of a file whose record has room for 16 floats, and what the line says.
CLAIMS = {
    "a storage longer than its record": (tensor(LARGE, [4], [1]), "storage '0' claims 4,000,000,000 bytes"),
    "a storage of less than nothing": (tensor(-LARGE, [4], [1]), "claims -4,000,000,000 bytes"),
    "a storage of another record": (
        storage(16, key="1"),
        "storage '1' claims 64 bytes, of which there are 0",
    ),
    "doubles in the place of floats": (tensor(16, [4], [1], kind="DoubleStorage"), "claims 128 bytes"),
    "a storage of no kind": (tensor(16, [4], [1], kind="Storage"), "no known kind"),
    "a tensor longer than its storage": (tensor(16, [LARGE], [1]), "a tensor claims 4,000,000,000 bytes"),
    "a tensor by the older name": (tensor(16, [LARGE], [1], name="_rebuild_tensor"), "a tensor claims"),
    "a wide stride": (tensor(16, [4], [LARGE]), "a tensor claims 12,000,000,004 bytes"),
    "a far offset": (tensor(16, [4], [1], offset=LARGE), "a tensor claims 4,000,000,016 bytes"),
    "a negative stride": (tensor(16, [4], [-1]), "without storage or size"),
    "a tensor set anew": (
        GOOD + group(storage(16), whole(0), group(whole(LARGE)), group(whole(1))) + b"b",
        "torch 0.1",
    ),
    "bytes out of nothing": (call("builtins", "bytearray", whole(3 * LARGE)), "builtins.bytearray"),
    "the same by Python 2's name": (call("__builtin__", "bytearray", whole(3 * LARGE)), "builtins.bytearray"),
    "the same as a new object": (
        *(named("builtins", "bytearray") + group(whole(3 * LARGE)) + b"\x81", "builtins.bytearray"),
    ),
    "a tensor out of nothing": (call("torch", "FloatTensor", whole(LARGE)), "torch.FloatTensor"),
    "a call within a call": (
        *(
            call(
                "torch._tensor",
                "_rebuild_from_type_v2",
                named("builtins", "bytearray"),
                b"N",
                group(whole(LARGE)),
                b"}",
            ),
            "builtins.bytearray",
        ),
    ),
    "a copy of an expanded tensor": (
        *(call("torch._utils", "_rebuild_device_tensor_from_cpu_tensor", GOOD), "_rebuild_device_tensor"),
    ),
    "a sparse tensor": (call("torch._utils", "_rebuild_sparse_tensor", b"N", b"N"), "no plain dense tensor"),
    "a quantised tensor": (call("torch._utils", "_rebuild_qtensor", storage(16)), "no plain dense tensor"),
    "a number of numpy without bytes": (
        *(
            call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("S2000000000"))),
            "multiarray.scalar",
        ),
    ),
    "a slow encoding": (call("_codecs", "encode", text("x"), text("punycode")), "_codecs.encode"),
    "a tuple of 2^48 parts": (b"}" + LAUGHS + b"Ns", "a tuple of"),
    "a tuple 100,000 deep": (b"}" + whole(1) + b"\x85" * 100_000 + b"Ns", "101 deep"),
    "2 million sets": (b"](" + b"\x8f" * 2_000_000 + b"e", "more than 1,000,000 parts"),
    "a stack that is empty": (b"\x87\x87\x87", "does not hold together"),
    "a memo that is not there": (b"h\x09", "does not hold together"),
    "a text that ends too early": (b"X\xff\xff\xff\x7f", "ends or breaks off"),
}


def write_zip(path, content, compression=zipfile.ZIP_STORED, more=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}" + text("w") + content + b"s.")
        for name, data in (("w/data/0", bytes(64)), ("w/byteorder", b"little"), ("w/version", b"3\n"), *more):
            archive.writestr(name, data)


def write_legacy(path, content):
    machine = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    start = b"".join(pickle.dumps(value, 2) for value in (LEGACY_MAGIC, 1001, machine))
    content = content.replace(b"tQ", b"NtQ")  # it had one word more
    end = pickle.dumps(["0"], 2) + struct.pack("<q", 16) + bytes(64)
    path.write_bytes(start + b"\x80\x02}" + text("w") + content + b"s." + end)


def write_all(folder):
    """Every file, and beside it what the line about it says."""
    for number, (name, (content, says)) in enumerate(CLAIMS.items()):
        write_zip(folder / f"{number:02}.pth", content)
        yield f"{number:02}.pth", name, says
    for name, content, says in (
        ("legacy storage", tensor(LARGE, [4], [1]), "claims 4,000,000,000 bytes"),
        ("legacy tensor", tensor(16, [LARGE], [1]), "a tensor claims"),
        ("legacy call", call("builtins", "bytearray", whole(3 * LARGE)), "builtins.bytearray"),
    ):
        write_legacy(folder / f"{name}.pth", content)
        yield f"{name}.pth", name, says
    write_zip(
        folder / "zeros.pth", tensor(LARGE, [4], [1]), zipfile.ZIP_DEFLATED, [("w/x", bytes(50_000_000))]
    )
    yield "zeros.pth", "compressed", "its records claim 50,"
    write_zip(folder / "small.pth", GOOD, zipfile.ZIP_BZIP2)
    yield "small.pth", "compressed without gain", "compressed or one upon the other"
    write_zip(folder / "case.pth", GOOD, more=[("w/DATA.pkl", b"")])
    yield "case.pth", "two pickles", "two records of one name"
    record = {"dtype": "F32", "shape": [LARGE], "data_offsets": [0, 4 * LARGE]}
    header = json.dumps({"w": record}).encode()
    (folder / "lies").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    yield "lies", "safetensors", "damaged safetensors"


READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from caco_scale.errors import UserError
from caco_scale.weights.files import read_tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        print("read", read_tensors(path)[0].keys())
    except UserError as error:
        print(error)
print("grown", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_no_file_takes_more_memory_than_its_size_justifies(tmp_path):
    expected = list(write_all(tmp_path))
    files = [str(tmp_path / file) for file, _, _ in expected]
    done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, grown = done.stdout.splitlines()
    assert len(lines) == len(files), done.stdout
    for line, (_, name, says) in zip(lines, expected, strict=True):
        assert says in line, (name, line)
        assert line.startswith(str(tmp_path)), (name, line)
    assert int(grown.split()[1]) < 500  # MB


@pytest.mark.parametrize("new_format", [True, False])
def test_what_torch_saves_is_read(tmp_path, new_format):
    noted = torch.zeros(3)
    noted.note = "an attribute"
    content: dict = {
        "w": torch.arange(20.0).view(4, 5),
        "part": torch.arange(10)[2:7:2],
        "turned": torch.arange(6.0).view(2, 3).t(),
        "expanded": torch.ones(1).expand(10**6),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "noted": noted,
        "none": torch.zeros(0, 7),
        "number": torch.tensor(3.0),
        "kinds": [
            torch.zeros(3, dtype=d) for d in (torch.bfloat16, torch.uint8, torch.bool, torch.complex64)
        ],
        "rare": [torch.zeros(3, dtype=torch.uint16), torch.zeros(3).to(torch.float8_e5m2)],
        "plain": (
            {1, 2},
            b"bytes",
            torch.Size([2]),
            torch.device("cpu"),
            torch.float16,
            2.5,
            None,
            10**20,
            (1, (2,)),
        ),
        "optimizer": {"state": {k: {"exp_avg": torch.zeros(2)} for k in range(50)}, "losses": [0.5] * 1000},
    }
    if not new_format:  # torch itself does not read them back from it
        del content["rare"]
    torch.save(content, tmp_path / "w", _use_new_zipfile_serialization=new_format)
    found, _ = read_tensors(tmp_path / "w")
    assert found["plain"] == content["plain"]
    for name in ("w", "part", "turned", "expanded", "parameter", "none", "number"):
        assert torch.equal(found[name], content[name]), name


def test_an_expanded_tensor_is_not_made_whole(tmp_path):
    """A projector whose size nothing limits, of some bytes."""
    from weight_files import torchvision_state

    from caco_scale.errors import UserError
    from caco_scale.weights.load import load_weights

    state = {n: t for n, t in torchvision_state().state_dict().items() if not n.startswith("fc.")}
    one, hidden = torch.zeros(1), 2_000_000
    state |= {"fc.0.weight": one.expand(hidden, 512), "fc.3.weight": one.expand(hidden, hidden)}
    state |= {"fc.6.weight": one.expand(64, hidden)}
    state |= {
        f"fc.{n}.{kind}": one.expand(hidden)
        for n in (1, 4)
        for kind in ("weight", "bias", "running_mean", "running_var")
    }
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth, projector: 0.weight claims \(2000000, 512\) of 4 bytes"):
        load_weights(tmp_path / "w.pth")
