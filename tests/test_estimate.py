"""What a run will cost, from a stated or measured number of images a second."""

import pytest
from shard_sets import make_shard_set

from caco_scale.config import load_recipe, parse, replace
from caco_scale.doctor.estimate import estimate, main
from caco_scale.errors import UserError
from caco_scale.run.directory import RunDirectory


def test_a_stated_rate(capsys):
    """800 epochs of 312 steps, and 16 steps that fill 65,536 rows."""
    config = parse(["caco_r50_800ep"])
    lines = estimate(config, gpus=32, images_per_second=10_000, price=2.0)
    steps = 800 * (1_281_167 // 4096) + 16
    assert (
        lines[0]
        == f"{steps:,} steps of 4,096 images (1,281,167 in ImageNet, for data.shards is empty), 0 done"
    )
    hours = steps * 4096 / 10_000 / 3600
    assert (
        f"at 10,000 images/s (stated): {hours:,.1f} hours on 32 GPU(s) = {hours * 32:,.1f} GPU-hours"
        in lines[1]
    )
    assert lines[1].endswith(f", {hours * 64:,.2f} at 2 each")
    main(["caco_r50_800ep", "--gpus", "32", "--images-per-second", "10000", "--price", "2"])
    assert capsys.readouterr().out.splitlines() == lines


def test_a_measured_rate_counts_in_proportion_and_what_is_done_counts_no_more(tmp_path):
    shards = make_shard_set(tmp_path / "set", num_images=96)
    config = replace(
        load_recipe("demo"), data__shards=shards, data__global_batch_size=8, run__dir=str(tmp_path / "run")
    )
    config = replace(config, run__max_steps=100)
    assert "no images/s known" in estimate(config, gpus=4)[-1]
    directory = RunDirectory(tmp_path / "run", is_main=True)
    directory.start_attempt(world_size=2)
    for step, rate in enumerate((None, 9.0, 10.0, 50.0), 1):
        directory.append_metrics({"step": step, "images_per_second": rate})
    directory.close()
    more = RunDirectory(tmp_path / "run", is_main=True)  # which has no line of its own yet
    more.start_attempt(world_size=8, resumed_step=4)
    (tmp_path / "run/checkpoints/step_00000010").mkdir()
    first, second = estimate(config, gpus=4)
    assert first == f"100 steps of 8 images (96 in {shards}), 10 done"
    hours = 90 * 8 / 20 / 3600
    assert second.startswith(f"at 20 images/s (measured: 10 on 2): {hours:.1f} hours on 4 GPU(s)")
    more.append_metrics({"step": 5, "images_per_second": 32.0})
    more.close()
    assert "(measured: 32 on 8)" in estimate(config, gpus=4)[1]


def test_what_cannot_be_estimated(tmp_path):
    config = replace(load_recipe("demo"), data__shards=make_shard_set(tmp_path / "set", num_images=96))
    with pytest.raises(UserError, match="128 is more than the 96 training images"):
        estimate(config, gpus=1)
