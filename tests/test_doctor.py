"""The doctor: what would fail is found before the run, with what fixes it, and by the exit code."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from launch import ROOT, finished
from shard_sets import make_shard_set
from test_doctor_mistakes import FITS

from caco_scale.config import load_recipe, recipe_names, replace
from caco_scale.config.fit import fit
from caco_scale.data import augment_cpu
from caco_scale.doctor import checks as doctor
from caco_scale.doctor.memory import _bank_bytes, estimate_memory
from caco_scale.errors import UserError
from caco_scale.run.directory import check_place
from caco_scale.training import checks
from caco_scale.training.checks import Start

FITTING = [word for name, value in FITS.items() for word in (f"--{name}", str(value))]


def failures(findings):
    return [finding.text for finding in findings if finding.status == "FAIL"]


def test_missing_and_old_packages_are_failures_with_their_fix():
    assert failures(doctor.check_versions("ddp")) == []
    versions = {"torch": "2.9.1", "transformers": None, "deepspeed": "0.19.8"}

    def version(package):
        return versions.get(package, "9999.0")

    assert failures(doctor.check_versions("ddp", version)) == [
        "torch 2.9.1 is older than 2.11: pip install -U 'torch>=2.11'"
    ]
    found = failures(doctor.check_versions("zero2", version))
    assert len(found) == 2
    assert (
        "transformers is not installed, which accelerate needs for DeepSpeed: pip install transformers"
        in found[1]
    )


def start_of(config, world_size, strategy="ddp"):
    return Start(config, strategy, 0, world_size, torch.device("cpu"))


def test_world_size_arithmetic():
    config = replace(
        load_recipe("demo"), data__global_batch_size=96, data__micro_batch_size=16, bank__size=100
    )
    (shared,) = doctor.found(checks.check_batch, start_of(config, 3))
    assert "global batch 96 = 3 process(es) x 32 images in 2 micro-batches of 16" in shared.text
    assert "34 to 32 on a rank" in doctor.bank_rows(config, 3)
    (refused,) = failures(doctor.found(checks.check_batch, start_of(config, 7)))
    assert "cannot be divided by 7 processes" in refused
    more = replace(config, data__micro_batch_size=128)  # than a process has: all at once
    (whole,) = doctor.found(checks.check_batch, start_of(more, 3))
    assert "3 process(es) x 32 images; peak lr" in whole.text
    config = replace(config, data__micro_batch_size=15)
    (refused,) = failures(doctor.found(checks.check_batch, start_of(config, 3)))
    assert "does not divide the 32 images" in refused


def test_workers_are_suggested_from_the_rate_that_one_has_here(tmp_path, monkeypatch):
    make_shard_set(tmp_path)
    settings = {"data__shards": str(tmp_path), "data__val_shards": "", "data__workers": 5}
    config = replace(load_recipe("demo"), data__global_batch_size=8, **settings)
    start = start_of(config, 1)
    batch, shards = doctor.found(checks.check_batch, start) + doctor.found(checks.check_data, start)
    assert batch.status == shards.status == "ok"
    data = start.data
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: range(8))
    (found,) = doctor.check_loader(config, data, {"LOCAL_WORLD_SIZE": "2"})
    assert found.status == "note"
    assert "data.workers 5 can feed" in found.text
    assert "8 core(s) for 2 process(es) here bear at most 3 each: give --data.workers 3" in found.text
    (found,) = doctor.check_loader(config, data, {})
    assert "give --data.workers" not in found.text
    assert doctor.worker_rate(config, data.store.manifest) > 0
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    (found,) = doctor.check_loader(config, data, {})
    assert found.status == "FAIL"


def test_a_run_directory_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "file").touch()
    (refused,) = failures(doctor.found(check_place, tmp_path / "file/run"))
    assert "cannot be written" in refused
    (free,) = doctor.found(check_place, tmp_path / "new/run")
    assert (free.status, free.text.endswith(" GB free")) == ("ok", True)
    assert not (tmp_path / "new").exists()


def test_the_doctor_goes_on_where_training_stops_and_says_the_same(tmp_path, monkeypatch):
    """Of several mistakes training names the first, the doctor all that do not follow from another."""
    config = replace(load_recipe("demo"), data__shards=make_shard_set(tmp_path / "set", num_images=96))
    config = replace(config, data__val_shards="", eval__knn_every=0, run__dir=str(tmp_path / "run"))
    config = replace(config, precision__compute="fp32", data__global_batch_size=8)
    healthy = doctor.examine_start(start_of(config, 2), offloaded=False)
    assert failures(healthy) == []
    monkeypatch.setattr(augment_cpu, "load", lambda: "it was not built")
    slow = [f for f in doctor.examine_start(start_of(config, 2), offloaded=False) if f not in healthy]
    assert [f.text for f in slow if "augment" in f.text] == [augment_cpu.absent()]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").touch()
    wrong = replace(config, model__arch="resnet5", loss__temperature=0.01, data__micro_batch_size=3)
    stop, temperature, arch, batch = failures(doctor.examine_start(start_of(wrong, 2), offloaded=False))
    assert "STOP is there" in stop
    assert "loss.temperature is 0.01: give at least 0.02" in temperature
    assert "no architecture 'resnet5' (did you mean resnet50?)" in arch
    assert "data.micro_batch_size 3 does not divide the 4 images that each of 2 process(es)" in batch
    with pytest.raises(UserError) as first:
        checks.refuse_to_start(start_of(wrong, 2), checks.CHECKS)
    assert str(first.value) == stop
    assert not (tmp_path / "run/checkpoints").exists()


def test_partitioning_divides_what_it_should():
    """Against the ViT-B/16 recipe's own numbers: 106 million parameters in an encoder, two AdamW tensors each."""
    config = replace(load_recipe("caco_vitb16_300ep"), precision__compute="bf16")
    of = {name: estimate_memory(config, name, 8, 2) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}
    num_bytes = of["ddp"].gradients
    assert of["ddp"].parameters == 2 * num_bytes == of["ddp"].optimizer_state
    assert of["zero1"].optimizer_state == pytest.approx(2 * num_bytes / 8, rel=1e-6)
    assert of["zero1"].gradients == num_bytes
    assert of["zero2"].gradients == pytest.approx(num_bytes / 8, rel=1e-6)
    assert of["zero2"].parameters == 2 * num_bytes
    for name in ("zero3", "fsdp2"):
        assert of[name].parameters == pytest.approx(2 * num_bytes / 8, rel=1e-6)
    assert of["ddp"].masters == of["fsdp2"].masters == 0
    assert of["zero3"].masters == pytest.approx(num_bytes / 8, rel=1e-6)
    offloaded = estimate_memory(config, "zero3", 8, 2, offloaded=True)
    assert offloaded == dataclasses.replace(of["zero3"], masters=0, optimizer_state=0)
    header = (ROOT / "caco_scale/recipes/caco_vitb16_300ep.yaml").read_text()
    state = of["ddp"].parameters + of["ddp"].gradients + of["ddp"].optimizer_state
    assert f" {state / 1e9:.2f} GB under ddp.yaml" in header
    assert f"the bank takes {_bank_bytes(config, 32, 4) / 1e9:.2f} GB" in header


def test_one_image_at_a_time_can_be_estimated():
    """As every rank has it where the global batch is the number of ranks; BatchNorm alone would refuse it."""
    config = replace(load_recipe("demo"), precision__compute="fp32")
    one, two = (estimate_memory(config, "ddp", 128, micro_batch_size) for micro_batch_size in (1, 2))
    assert one == dataclasses.replace(two, activations=two.activations // 2)


def test_activations_are_what_the_forward_really_saves():
    from caco_scale.training.assemble import build_encoder

    config = replace(
        load_recipe("demo"), precision__compute="fp32", views__num_local_crops=1, views__local_size=16
    )
    encoder, saved, outputs = build_encoder(config), {}, []
    own = {t.untyped_storage().data_ptr() for t in (*encoder.parameters(), *encoder.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for size in (32, 32, 16):
            images = torch.randn(6, 3, size, size)
            saved[images.untyped_storage().data_ptr()] = images.untyped_storage()
            outputs.append(encoder(images))
    expected = sum(storage.nbytes() for storage in saved.values())
    assert estimate_memory(config, "ddp", 1, 6).activations == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_can_be_estimated(recipe):
    config = replace(fit(load_recipe(recipe), 50_000)[0], precision__compute="bf16")
    estimate = estimate_memory(config, "fsdp2", 4, 2)
    assert min(dataclasses.astuple(estimate)) >= 0
    assert estimate.total > estimate.activations > 0


def examine(arguments, config=None, num_processes=2):
    launcher = [sys.executable]
    if config:
        launcher += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / f"ds_configs/{config}.yaml"),
        ]
        launcher += ["--num_processes", str(num_processes)]
    command = [*launcher, "-m", "caco_scale.doctor", *arguments]
    return finished(command)


def test_a_healthy_launch_is_ready_and_a_broken_one_is_not(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=96)
    flags = ["demo", *FITTING, "--data.shards", str(shards), "--run.dir", str(tmp_path / "run")]
    healthy = examine(flags, "zero2")
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert "strategy zero2, 2 process(es), backend gloo, cpu" in healthy.stdout
    assert "global batch 8 = 2 process(es) x 4 images" in healthy.stdout
    assert "96 images, 12 steps an epoch" in healthy.stdout
    assert healthy.stdout.count("memory of a rank under zero2") == 1
    assert not (tmp_path / "run").exists()

    (tmp_path / "set/manifest.json").unlink()
    broken = examine(flags)
    assert broken.returncode == 1
    assert broken.stdout.count("FAIL") == 1
    assert "python -m data_prep" in broken.stdout


def test_what_is_not_there_is_told_before_torch_is_loaded(tmp_path):
    program = f"""
import sys
from caco_scale.doctor import checks
from caco_scale.doctor.__main__ import main
checks.examine = lambda *_: sys.exit("late" if "torch" in sys.modules else "early")
main(["demo", "--data.shards", {str(tmp_path / "none")!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "early\n")
    assert done.stdout.startswith(f"FAIL data.shards {tmp_path / 'none'} does not exist")


def test_a_launch_to_come_is_answered_by_one_process(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=96)
    flags = ["demo", *FITTING, "--data.shards", str(shards), "--run.dir", str(tmp_path / "run")]
    plan = ["--processes", "4", "--strategy", "zero2"]
    planned = examine([*flags, *plan])
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "planned: strategy zero2, 4 process(es), cpu" in planned.stdout
    assert "global batch 8 = 4 process(es) x 2 images" in planned.stdout
    assert "a fresh start" in planned.stdout
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").touch()
    offloaded = examine([*flags, *plan, "--strategy", "zero3_offload"])
    assert "planned: strategy zero3, 4 process(es)" in offloaded.stdout
    assert "memory of a rank under zero3 with offloading" in offloaded.stdout
    refused = examine([*flags, *plan, "--data.global_batch_size", "10"])
    assert "cannot be divided by 4 processes" in refused.stdout
    stopped = examine([*flags, *plan])
    assert f"FAIL {tmp_path / 'run/STOP'} is there, which stops this run" in stopped.stdout
    assert (refused.returncode, stopped.returncode) == (1, 1)


def small_start(**changes):
    config = replace(load_recipe("demo"), data__global_batch_size=96, **changes)
    start = start_of(config, 1)
    doctor.found(checks.check_batch, start)
    return start


def test_the_estimate_is_held_against_the_memory_there_is_and_what_fits_is_proposed(monkeypatch):
    start = small_start()
    needed = estimate_memory(start.config, "ddp", 1, start.micro_batch_size)
    six = estimate_memory(start.config, "ddp", 1, 6).total

    def found(room, **more):
        monkeypatch.setattr("caco_scale.data.in_memory.free_memory", lambda: room)
        (finding,) = doctor.check_memory(start, **more)
        return finding.status, finding.text

    assert found(needed.total)[0] == "ok"
    status, text = found(needed.total - 1)
    assert (status, "but this machine has" in text) == ("FAIL", True)
    assert "give --data.micro_batch_size 48, which fits" in text
    assert "give --data.micro_batch_size 6," in found(six)[1]  # not 8, and a divisor of 96
    status, text = found(needed.total - needed.activations)
    assert (status, "no smaller --data.micro_batch_size" in text) == ("FAIL", True)
    of_batch = small_start(bank__rule="inbatch")  # its negatives are those of one forward
    assert "no smaller --data.micro_batch_size" in failures(doctor.check_memory(of_batch))[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "but each of 2 processes here has" in found(1.9 * needed.total)[1]
    assert found(2 * needed.total)[0] == "ok"
    assert found(1, plan=doctor.Planned("ddp", 1))[0] == "warn"  # perhaps another machine's matter


def test_a_micro_batch_that_is_proposed_fits(monkeypatch):
    start = small_start()
    needed = estimate_memory(start.config, "ddp", 1, 96)
    monkeypatch.setattr(
        "caco_scale.data.in_memory.free_memory", lambda: needed.total - needed.activations / 2
    )
    (refused,) = failures(doctor.check_memory(start))
    size = int(refused.split("--data.micro_batch_size ")[1].split(",")[0])
    start = small_start(data__micro_batch_size=size)
    assert start.micro_batch_size == size
    assert failures(doctor.check_memory(start)) == []


def test_a_plan_that_cannot_be():
    config = replace(load_recipe("demo"), run__world_size=8)
    assert (
        "run.world_size 8, but 4 processes"
        in failures(doctor.plan_launch(config, doctor.Planned("ddp", 4))[0])[0]
    )
    assert "give one of ddp, zero1" in failures(doctor.plan_launch(config, doctor.Planned("zero9", 8))[0])[0]
    config = replace(config, precision__compute="fp64")
    _, start = doctor.plan_launch(config, doctor.Planned("zero2", 8))
    (refused,) = failures(doctor.found(checks.check_precision, start))
    assert "fp64 cannot be had from DeepSpeed" in refused
    assert examine(["demo", "--processes", "0"]).stderr == "error: --processes is 0: give at least 1\n"
