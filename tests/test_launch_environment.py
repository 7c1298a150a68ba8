"""What other launches leave in the environment: one line that names it, or nothing changes; and peers that are away."""

import signal
import socket
import subprocess
import sys

import pytest
from launch import environment, start_command

from caco_scale.distributed import environment as launched
from caco_scale.distributed.environment import place_of, share_of_node
from caco_scale.distributed.launch import launched_strategy
from caco_scale.errors import UserError, is_loss_of_peers

MET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_launch_is_read():
    assert place_of({}, on_cpu=True) == launched.ALONE
    assert place_of({"RANK": "0", "WORLD_SIZE": "1"}, on_cpu=True) == launched.ALONE
    torch = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MET}
    assert place_of(torch, on_cpu=False)[:4] == (3, 4, 1, "node0:29500")
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "MASTER_ADDR": "node0"}
    assert place_of(mpi, on_cpu=True)[:4] == (1, 2, 0, "node0:29500")
    assert place_of({**mpi, **torch}, on_cpu=True).size == 4
    assert place_of(mpi, on_cpu=True, asked_world_size=1) == launched.ALONE  # srun starts single runs, too
    assert place_of(mpi, on_cpu=False) == launched.ALONE  # and check_world_size refuses it


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 .*without RANK, MASTER_ADDR, MASTER_PORT: unset WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''.*unset WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "0"}, "at least 1"),
        ({"WORLD_SIZE": "1e9"}, "no whole number"),
        ({"WORLD_SIZE": "9" * 5000}, "no whole number"),
        ({"WORLD_SIZE": "٢"}, "no whole number"),
        ({"LOCAL_RANK": "7"}, "LOCAL_RANK=7 .*without WORLD_SIZE, RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 .*without"),
        ({"RANK": "3"}, "RANK is 3 but WORLD_SIZE is not above 1"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MET}, "RANK=2 .*below the number"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2", **MET}, "LOCAL_RANK=2 .*below"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1", **MET},
            "LOCAL_WORLD_SIZE=1",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"}, "without MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "1 to 65535"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4 .*without PMI_RANK, MASTER_ADDR.*--run.world_size 1"),
        ({"PMI_SIZE": "4", "PMI_RANK": "9", **MET}, "PMI_RANK=9"),
        ({"PMI_SIZE": "four"}, "PMI_SIZE is 'four'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "without OMPI_COMM_WORLD_RANK"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, "without MASTER_ADDR"),
    ],
)
def test_a_broken_or_stale_launch_is_one_line(variables, words):
    with pytest.raises(UserError, match=words) as error:
        place_of(variables, on_cpu=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"PARALLELISM_CONFIG_CP_SIZE": "2"},
            "PARALLELISM_CONFIG_CP_SIZE=2.*unset PARALLELISM_CONFIG_CP_SIZE",
        ),
        ({"PARALLELISM_CONFIG_SP_SIZE": "x"}, "PARALLELISM_CONFIG_SP_SIZE=x"),
        ({"ACCELERATE_USE_MEGATRON_LM": "banana"}, "give true or false"),
        ({"ACCELERATE_USE_DEEPSPEED": "maybe"}, "give true or false"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "two"},
            "ZERO_STAGE is 'two'",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "abc"},
            "gradient_clipping abc",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "two"}, "FSDP version two"),
    ],
)
def test_an_engine_of_another_job_is_one_line(variables, words):
    with pytest.raises(UserError, match=words):
        launched_strategy(variables)


def test_another_device_is_refused_and_what_is_not_followed_is_said():
    launched.check_device({"ACCELERATE_TORCH_DEVICE": "cpu"}, "cpu")
    for device in ("cuda", "cuda:0", "banana", ""):
        with pytest.raises(UserError, match="unset ACCELERATE_TORCH_DEVICE"):
            launched.check_device({"ACCELERATE_TORCH_DEVICE": device}, "cpu")
    accelerates = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    assert launched.not_followed(accelerates) == []
    lines = launched.not_followed({"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert lines == ["ACCELERATE_MIXED_PRECISION=fp16 is not followed: --precision.compute decides"]


START = """
import os, sys
from caco_scale.errors import exit_on_user_error, run_command
@exit_on_user_error
def main():
    from caco_scale.distributed.launch import start_processes
    accelerator = start_processes(0, float(sys.argv[1]))
    print("started", accelerator.num_processes, accelerator.gradient_accumulation_steps, flush=True)
run_command(main)
"""
LEFT_BY_OTHERS = {
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many",
    "ACCELERATE_DYNAMO_MODE": "no-such",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DEBUG_MODE": "perhaps",
    "FSDP_SHARDING_STRATEGY": "9",
    "FSDP_OFFLOAD_PARAMS": "x",
    "MEGATRON_LM_TP_DEGREE": "x",
    "RANK": "0",
}


def start(seconds, **variables):
    words = [sys.executable, "-c", START, str(seconds)]
    return start_command(words, stderr=subprocess.PIPE, env={**environment(), **variables})


def test_what_another_job_has_left_changes_nothing():
    process = start(60, **LEFT_BY_OTHERS)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == "started 1 1"
    assert "note: ACCELERATE_MIXED_PRECISION=fp8 is not followed" in output


def a_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("kind", ["torch", "ompi"])
def test_a_peer_that_is_away_is_waited_for_as_long_as_asked(kind):
    names = launched.TORCH if kind == "torch" else launched.MPI[1]
    met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": a_port()}
    process = start(1, **{names.size: "2", names.rank: "0"}, **met)
    _, errors = process.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2
    assert len(lines) == 1, errors
    assert "2 process(es) at 127.0.0.1" in lines[0]
    assert "for 1 seconds at most (run.timeout_seconds)" in lines[0]
    assert "Traceback" not in errors


MEETS_NOBODY = """
import os, sys
from caco_scale.run.signals import Signals
signals = Signals().install()
import torch.distributed as dist
with signals.ending_at_once():
    print("waits", flush=True)
    dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, True)  # for ever, where Python runs no handler
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_start_that_waits_for_a_peer(name):
    variables = {**environment(), "MASTER_PORT": a_port()}
    words = [sys.executable, "-c", MEETS_NOBODY]
    process = start_command(words, stderr=subprocess.PIPE, env=variables)
    assert process.stdout.readline() == "waits\n"
    process.send_signal(getattr(signal, name))
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith(f"stopped by {name} before the first step: there was nothing to save")


def test_losing_a_peer_is_known_by_who_says_so(monkeypatch):
    closed = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:5] Connection closed by peer"
    )
    assert not is_loss_of_peers(closed)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_loss_of_peers(closed)
    assert is_loss_of_peers(RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited"))
    assert not is_loss_of_peers(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


LOSES = """
import os, sys, time
from caco_scale.errors import exit_on_user_error, run_command
@exit_on_user_error
def main():
    from caco_scale.distributed.launch import start_processes
    import torch, torch.distributed as dist
    accelerator = start_processes(2, 60)
    print("meets", flush=True)
    sys.stdin.readline()
    dist.all_reduce(torch.ones(1))
run_command(main)
"""


def test_a_peer_that_is_killed_is_one_line():
    met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": a_port(), "WORLD_SIZE": "2"}
    options = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LOSES],
            env={**environment(), **met, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            **options,
        )
        for rank in (0, 1)
    ]
    try:
        assert [process.stdout.readline() for process in both] == ["meets\n"] * 2
        both[1].kill()
        both[1].wait()
        _, errors = both[0].communicate("\n", timeout=300)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert both[0].returncode == 1
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: another process of this launch has ended or does not answer")
    assert "Traceback" not in errors


def test_the_share_of_a_node():
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    shares = {("3", "4"): (3, 4), ("0", "8"): (0, 8), ("0", "1"): (0, 1)}
    for values, share in shares.items():
        assert share_of_node(dict(zip(names, values, strict=True)), world_size=8) == share
    # What another launch has left, or half of it: this process looks at everything itself.
    for found, world_size in (({}, 8), ({"LOCAL_RANK": "3"}, 8), ({"LOCAL_WORLD_SIZE": "4"}, 1)):
        assert share_of_node(found, world_size) == (0, 1)
