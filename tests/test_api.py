"""``import caco_scale`` and what it gives: a run, a loader and a backbone in one call each.

Runs are trained in processes of their own, by scripts as a user writes them: no guard of ``__main__``.
"""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from launch import (
    ROOT,
    SMALL,
    by,
    environment,
    final_state,
    finished,
    launch,
    planned_keys,
    relative_difference,
)
from PIL import Image
from run_directories import save_run
from shard_sets import make_shard_set, smooth_image
from weight_files import torchvision_state

import caco_scale
from caco_scale.data.augment import normalise
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.store import open_store
from caco_scale.errors import UserError

STEPS = SMALL["run.max_steps"]
PUBLIC = sorted(caco_scale.__all__)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shard_set(tmp_path_factory.mktemp("data") / "set", num_images=96, samples_per_shard=20)


def python(code, *arguments, cwd=None, code_by="file", launcher=()):
    """Run a script (as a file, or on standard input as a notebook has none) and return what its last line says."""
    words = [sys.executable, *launcher]
    if code_by == "file":
        (cwd / "script.py").write_text(code)
        words.append("script.py")
    else:
        words.append("-")
    done = subprocess.run(
        [*words, *map(str, arguments)],
        input=None if code_by == "file" else code,
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- the import


def test_the_import_loads_nothing_else():
    code = "import sys; before = set(sys.modules); import caco_scale; dir(caco_scale)\n"
    code += "import json; print(json.dumps(sorted(set(sys.modules) - before)))"
    loaded = python(code, code_by="input")
    assert [name for name in loaded if name.startswith("caco_scale")] == ["caco_scale"]
    assert not {"torch", "numpy", "yaml", "tyro", "rich", "accelerate"} & set(loaded)


def test_what_needs_no_torch_imports_none():
    code = "import sys, caco_scale; caco_scale.pretrain, caco_scale.read_metrics, caco_scale.UserError\n"
    code += "import json; print(json.dumps('torch' in sys.modules))"
    assert python(code, code_by="input") is False


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_documented_and_annotated(name):
    value = getattr(caco_scale, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(caco_scale)
    members = [value] if inspect.isfunction(value) else [m for m in vars(value).values() if callable(m)]
    for member in members:
        if inspect.isfunction(member) and (
            not member.__name__.startswith("_") or member.__name__ == "__init__"
        ):
            signature = inspect.signature(member)
            bare = [
                p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"
            ]
            assert not bare, f"{name}.{member.__name__}: {bare} without a type"


def test_the_page_shows_every_public_name():
    page = (ROOT / "caco_scale" / "examples" / "README.md").read_text()
    assert [name for name in caco_scale.__all__ if name not in page] == []


def test_pretrain_is_the_function_whatever_was_imported():
    import caco_scale.pretrain  # the command's module

    assert inspect.isfunction(caco_scale.pretrain)
    assert inspect.ismodule(sys.modules["caco_scale.pretrain"])
    assert callable(sys.modules["caco_scale.pretrain"].main)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'pretain'"):
        caco_scale.pretain  # noqa: B018


# ---- pretrain


@pytest.mark.parametrize(
    ("arguments", "flags", "words"),
    [
        (["dem"], {}, "no recipe 'dem' (did you mean demo?)"),
        ([], {"bank.sise": 5}, "did you mean --bank.size?"),
        ([], {"bank__sise": 5}, "did you mean --bank.size?"),
        ([], {"size": 5}, "unknown flag --size"),
        ([], {"bank.size": "many"}, "many"),
        ([], {"bank.size": 512, "bank__size": 512}, "bank.size and bank__size are the same flag"),
        ([], {"bank.size": None}, "bank.size is None: leave it out"),
        ([], {"bank.temperature": -1.0}, "bank.temperature is -1.0"),
        ([], {"views.scale": (0.5, 0.2)}, "views.scale"),
        ([], {"views.scale": 0.5}, "views.scale"),
        ([], {"optim.epochs": True}, "True"),
        ([], {"data.shards": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        caco_scale.pretrain(*arguments, **flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


TWICE = """
import json, signal, sys, threading
import caco_scale

flags, records = json.loads(sys.argv[1]), []

def note(record):
    records.append(record)
    if len(records) == 5:
        signal.raise_signal(signal.SIGINT)

handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
stopped = caco_scale.pretrain("demo", on_metrics=note, **{**flags, "run.dir": "stopped"})
assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
first = [stopped.stopped_by, stopped.step, repr(stopped), len(records)]
rest = []
resumed = caco_scale.pretrain("demo", on_metrics=rest.append, run__dir="stopped", **flags)
again = caco_scale.pretrain("demo", run__dir="stopped", **flags)
found = []
thread = threading.Thread(target=lambda: found.append(caco_scale.pretrain(**flags, run__dir="thread")))
thread.start()
thread.join()
print(json.dumps({
    "first": first,
    "records": records + rest,
    "metrics": resumed.metrics(),
    "runs": [[str(r.path), r.step, r.stopped_by, r.checkpoint.name, repr(r)] for r in (resumed, again, *found)],
    "curve": found[0].curve("loss"),
    "size": [resumed.config.bank.size, resumed.load_backbone().num_features],
}))
"""


@pytest.mark.parametrize("code_by", [pytest.param("file", marks=pytest.mark.slow), "input"])
def test_runs_in_a_script_equal_the_commands_to_the_last_bit(shards, tmp_path, code_by):
    flags = {**SMALL, "data.shards": shards}
    if code_by == "input":  # a notebook has no file that a loader's worker could import again
        flags |= {"run.max_steps": 6}
    steps = flags["run.max_steps"]
    launch({**flags, "run.dir": tmp_path / "command"})
    said = python(TWICE, json.dumps(flags), cwd=tmp_path, code_by=code_by)
    assert said["first"][:2] == ["SIGINT", 5]
    assert said["first"][2] == "Run('stopped', stopped by SIGINT, step 5)"
    assert [record["step"] for record in said["records"]] == list(range(1, steps + 1))
    assert said["records"] == said["metrics"]
    last = f"step_{steps:08d}"
    assert said["runs"][0] == ["stopped", steps, None, last, f"Run('stopped', finished, step {steps})"]
    assert said["runs"][1] == said["runs"][0]
    assert said["runs"][2][:4] == ["thread", steps, None, last]
    expected, values = final_state(tmp_path / "command")
    losses = [record["loss"] for record in caco_scale.read_metrics(tmp_path / "command")]
    assert said["curve"] == [list(range(1, steps + 1)), losses]
    for name in ("stopped", "thread"):
        state, found = final_state(tmp_path / name)
        assert found["step"] == values["step"] == steps
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
        assert [record["loss"] for record in caco_scale.read_metrics(tmp_path / name)] == losses
    assert said["size"] == [20, 128]


LAUNCHED = """
import json, os, sys
import caco_scale

records = []
run = caco_scale.pretrain("demo", on_metrics=records.append, run__dir="launched", **json.loads(sys.argv[1]))
if os.environ["RANK"] == "0":
    print(json.dumps([run.step, len(records)]))
else:
    assert records == [] and run.step == 15, (records, run)
"""


@pytest.mark.long
def test_the_same_script_under_the_launcher_trains_with_all_processes(shards, tmp_path):
    flags = {**SMALL, "data.shards": shards, "run.world_size": 2}
    launcher = ["-m", "accelerate.commands.launch", *by("ddp", 2)["launcher"]]
    assert python(LAUNCHED, json.dumps(flags), cwd=tmp_path, launcher=launcher) == [STEPS, STEPS]
    launch({**flags, "run.dir": tmp_path / "command"}, num_processes=2)
    difference, name = relative_difference(
        final_state(tmp_path / "launched")[0], final_state(tmp_path / "command")[0]
    )
    assert difference == 0, name


REFUSED = """
import json, sys
import caco_scale

flags = json.loads(sys.argv[1])
caco_scale.pretrain(**flags, run__max_steps=4)
said = []
for change in ({"bank.lr": 1.0}, {"bank.momentum": 0.5}):
    try:
        caco_scale.pretrain(**flags, **change, run__max_steps=6)
    except caco_scale.UserError as error:
        said.append(error)  # as a notebook keeps the last error, with all its frames
run = caco_scale.pretrain(**flags, run__max_steps=6)
print(json.dumps([[str(error) for error in said], run.step]))
"""


TWICE_UNDER_ZERO = """
import json, sys, caco_scale
flags = json.loads(sys.argv[1])
for name in ("first", "second"):
    print(caco_scale.pretrain("demo", **flags, run__dir=name))
"""


@pytest.mark.long
def test_a_script_trains_twice_under_zero_and_the_second_run_is_the_first_to_the_last_bit(shards, tmp_path):
    (tmp_path / "script.py").write_text(TWICE_UNDER_ZERO)
    flags = {**SMALL, "data.shards": str(shards), "precision.compute": "fp32"}
    words = [sys.executable, "-m", "accelerate.commands.launch", *by("zero2", 1)["launcher"], "script.py"]
    done = finished([*words, json.dumps(flags)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (final_state(tmp_path / name)[0] for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_refused_call_leaves_the_run_free_for_the_next(shards, tmp_path):
    """An error is kept by who asked, and its frames with it: neither the folder's lock nor anything else may stay."""
    flags = {**SMALL, "data.shards": shards, "run.dir": "run"}
    del flags["run.max_steps"]
    said, step = python(REFUSED, json.dumps(flags), cwd=tmp_path)
    assert "bank.lr: 3.0 -> 1.0" in said[0]
    assert "bank.momentum" in said[1]
    assert step == 6


def test_figures_of_a_run(tmp_path):
    lines = [
        '{"step": 1, "loss": 2.5}',
        '{"step": 2, "loss": null}',
        '{"step": 2, "knn_top1": 50.0}',
        '{"step": 3, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = caco_scale.Run(tmp_path, caco_scale.config.Config(), 2, None)
    assert (
        caco_scale.read_metrics(tmp_path)
        == run.metrics()
        == caco_scale.read_metrics(tmp_path / "metrics.jsonl")
    )
    assert run.metrics() == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": None},
        {"step": 2, "knn_top1": 50.0},
    ]
    assert run.curve("loss") == ([1], [2.5])
    assert run.checkpoint is None
    with pytest.raises(UserError, match="no figure 'los': it has knn_top1, loss, step"):
        run.curve("los")
    with pytest.raises(UserError, match="no metrics at"):
        caco_scale.read_metrics(tmp_path / "elsewhere")


# ---- load_backbone


def test_a_runs_backbone(tmp_path):
    model = save_run(tmp_path / "run", numbers=(30, 40))
    backbone = caco_scale.load_backbone(tmp_path / "run")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone(images), model.query.backbone.eval()(images))
    assert (backbone.num_features, backbone.arch, backbone.step) == (128, "tiny", 40)
    assert not backbone.training
    assert all(p.requires_grad for p in backbone.parameters())
    assert caco_scale.load_backbone(tmp_path / "run", step=30).step == 30
    key = caco_scale.load_backbone(tmp_path / "run", which="key")
    assert torch.equal(key(images), model.key.backbone.eval()(images))
    with pytest.raises(UserError, match="give query or key"):
        caco_scale.load_backbone(tmp_path / "run", which="teacher")


def test_a_file_of_weights(tmp_path):
    model = torchvision_state("resnet18")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = caco_scale.load_backbone(tmp_path / "weights.pth")
    model.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone(images), model(images))
    assert (backbone.num_features, backbone.arch, backbone.step, backbone.size) == (
        512,
        "resnet18",
        None,
        224,
    )
    assert model.load_state_dict(backbone.module.state_dict())


def test_an_image_is_prepared_as_the_evaluation_sees_it(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=4, size=40, vary=20)
    save_run(tmp_path / "run")
    backbone = caco_scale.load_backbone(tmp_path / "run")
    backbone.size = 32
    pixels = smooth_image(np.random.default_rng(0), 50, 43)
    _, crops, _ = next(
        evaluation_batches(open_store(shards), 32, rank=0, world_size=1, batch_size=4, workers=0)
    )
    store = open_store(shards)
    index = store.index(0)
    from caco_scale.data.shard_index import read_sample

    first = read_sample(index, 0, store.read(0, *index.span(0)))["jpg"]
    (tmp_path / "first.jpg").write_bytes(first)
    assert torch.equal(backbone.prepare(tmp_path / "first.jpg"), normalise(crops[:1])[0])
    Image.fromarray(pixels).save(tmp_path / "image.png")
    prepared = backbone.prepare(pixels)
    assert prepared.shape == (3, 32, 32)
    assert torch.equal(backbone.prepare(Image.fromarray(pixels)), prepared)
    assert torch.equal(backbone.prepare(str(tmp_path / "image.png")), prepared)
    (tmp_path / "cut.jpg").write_bytes(first[:100])
    for wrong in (tmp_path / "none.jpg", tmp_path / "cut.jpg", pixels[:, :, 0], pixels.astype(float)):
        with pytest.raises(UserError):
            backbone.prepare(wrong)


# ---- batches


def test_batches_are_those_that_pretrain_trains_on(shards):
    flags = {"data.global_batch_size": 8, "data.window": 16}
    loader = caco_scale.batches(
        shards, global_batch_size=8, window=16, epochs=2, views=caco_scale.Views(size=24), workers=0
    )
    assert (len(loader), loader.steps_per_epoch, loader.num_samples, loader.batch_size) == (24, 12, 96, 8)
    found = list(loader)
    assert [batch.keys for batch in found] == planned_keys(shards, flags, 24)
    assert [(batch.step, batch.epoch) for batch in found] == [(step, step // 12) for step in range(24)]
    assert all(
        view.shape == (8, 3, 24, 24) and view.dtype == torch.float32 for b in found for view in b.views
    )
    assert len(found[0].views) == 2
    again = next(iter(loader))
    assert torch.equal(again.views[1], found[0].views[1])


def test_batches_are_the_same_at_any_number_of_processes_and_workers(shards):
    options = {"global_batch_size": 8, "epochs": 2, "views": caco_scale.Views(size=24, num_local_crops=1)}
    whole = list(caco_scale.batches(shards, workers=0, **options))
    halves = [
        list(caco_scale.batches(shards, workers=2 * rank, rank=rank, world_size=2, start_step=9, **options))
        for rank in range(2)
    ]
    assert len(halves[0]) == len(halves[1]) == 15
    for batch, *parts in zip(whole[9:], *halves, strict=True):
        assert batch.keys == [key for part in parts for key in part.keys]
        for view, *rows in zip(batch.views, *(part.views for part in parts), strict=True):
            assert torch.equal(view, torch.cat(rows))
    other = next(iter(caco_scale.batches(shards, workers=0, seed=1, **options)))
    assert other.keys != whole[0].keys


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch_size": 7, "rank": 0, "world_size": 2}, "cannot be divided by 2"),
        ({"global_batch_size": 8, "rank": 1}, "give rank and world_size together"),
        ({"global_batch_size": 8, "rank": 2, "world_size": 2}, "rank 2 is none of 0 to 1"),
        ({"global_batch_size": 8, "start_step": 13}, "not within the 12 steps"),
        ({"global_batch_size": 1000}, "96 images"),
        ({"global_batch_size": 8, "views": caco_scale.Views(size=0)}, "size 0"),
    ],
)
def test_batches_refuse_what_cannot_be(shards, options, words):
    with pytest.raises(UserError, match=words):
        caco_scale.batches(shards, workers=0, **options)


def test_batches_refuse_processes_that_have_not_met(shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="one of 4 processes"):
        caco_scale.batches(shards, global_batch_size=8)
    assert caco_scale.batches(shards, global_batch_size=8, rank=3, world_size=4).batch_size == 2
