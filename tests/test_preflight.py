"""The preflight: bad nodes named, each once, by real processes that meet; good ones let through."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from launch import ROOT, environment

from caco_scale.doctor.meeting import against_the_others, majority
from caco_scale.doctor.node import read_ecc
from caco_scale.doctor.preflight import BAD_NODES, main, parse, step_nodes
from caco_scale.errors import UserError


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Nodes:
    """Preflights of nodes n0, n1, ... that are processes of this machine; ended with the test."""

    def __init__(self, number, *flags):
        self.names = [f"n{rank}" for rank in range(number)]
        self.flags = ["--gpus", "0", "--hosts", ",".join(self.names), *flags]
        self.port, self.processes = free_port(), {}

    def start(self, rank, *flags, checkout=ROOT, **variables):
        place = ["--rank", f"{rank}", "--master-addr", "127.0.0.1", "--master-port", f"{self.port}"]
        self.processes[rank] = subprocess.Popen(
            [sys.executable, "-m", "caco_scale.doctor.preflight", *self.flags, *place, *flags],
            cwd=checkout,
            env={
                **environment(),
                "PYTHONPATH": str(checkout),
                "SLURMD_NODENAME": self.names[rank],
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def end(self):
        """What each printed and its exit code, when all have ended: {rank: (lines, code)}."""
        outputs = {rank: process.communicate(timeout=300)[0] for rank, process in self.processes.items()}
        return {rank: (out.splitlines(), self.processes[rank].returncode) for rank, out in outputs.items()}


def test_good_nodes_pass():
    with Nodes(2) as nodes:
        nodes.start(0)
        nodes.start(1)
        ended = nodes.end()
    assert [code for _, code in ended.values()] == [0, 0], ended
    assert ended[1][0] == []
    (line,) = ended[0][0]
    summary = json.loads(line)
    assert (summary["nodes"], summary["bad"], summary["network"]) == (["n0", "n1"], {}, "ok")


@pytest.mark.long
def test_each_bad_node_is_named_once(tmp_path):
    shutil.copytree(ROOT / "caco_scale", tmp_path / "caco_scale")
    with open(tmp_path / "caco_scale/training/step.py", "a") as file:
        file.write("# edited on this node only\n")
    with Nodes(4, "--timeout", "60") as nodes:  # n3 never comes
        nodes.start(0)
        nodes.start(1, checkout=tmp_path)
        nodes.start(2, "--shm-gb", "1e9")
        ended = nodes.end()
    assert {code for _, code in ended.values()} == {BAD_NODES}, ended
    assert ended[1][0] == ended[2][0] == []
    *lines, summary = ended[0][0]
    first, second, third = lines
    assert first.startswith("bad node n1: caco_scale is ")
    assert first.count(";") == 0
    assert second.startswith("bad node n2: ")
    assert "GB free in /dev/shm, not 1000000000.00" in second
    assert third == "bad node n3: did not arrive in 60 seconds"
    assert list(json.loads(summary)["bad"]) == ["n1", "n2", "n3"]


def test_rank_1_names_the_node_that_should_lead():
    with Nodes(3, "--timeout", "3") as nodes:
        nodes.start(1)
        nodes.start(2)
        ended = nodes.end()
    assert [code for _, code in ended.values()] == [BAD_NODES, BAD_NODES]
    assert ended[1][0][0] == f"bad node n0: no answer from 127.0.0.1 port {nodes.port}"
    assert ended[2][0] == []


@pytest.mark.slow
def test_a_node_whose_network_fails_is_found_in_pairs():
    with Nodes(3, "--timeout", "60") as nodes:
        nodes.start(0)
        nodes.start(1, GLOO_SOCKET_IFNAME="nosuchcard")
        nodes.start(2)
        ended = nodes.end()
    assert {code for _, code in ended.values()} == {BAD_NODES}, ended
    assert ended[0][0][0].startswith("bad node n1: the all-reduce with n0 fails (n1: ")
    assert len(ended[0][0]) == 2


def connections(process):
    return sum(found.status == psutil.CONN_ESTABLISHED for found in process.net_connections("tcp"))


@pytest.mark.slow
def test_the_node_that_leads_dies_meanwhile():
    with Nodes(3, "--timeout", "600") as nodes:  # n2 never comes: n0 and n1 wait for it
        nodes.start(0)
        nodes.start(1)
        leader, deadline = psutil.Process(nodes.processes[0].pid), time.monotonic() + 240
        while connections(leader) < 3:  # both ends of its own, and n1's
            assert time.monotonic() < deadline
            time.sleep(0.1)
        leader.kill()
        lines, code = nodes.end()[1]
    assert (lines[0], code) == ("bad node n0: died during the preflight", BAD_NODES)


def test_a_node_alone_needs_no_port(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--gpus", "0"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["network"] == "not compared: one good node"


def test_missing_gpus_are_counted():
    with Nodes(1) as nodes:
        nodes.start(0, "--gpus", "1000")
        lines, code = nodes.end()[0]
    assert code == BAD_NODES
    assert "bad node n0: torch sees " in lines[0]
    assert "not 1000" in lines[0]


def test_memory_errors_as_nvidia_smi_prints_them():
    assert read_ecc("0, 0\n1, 3\n2, [N/A]\n") == {0: 0, 1: 3, 2: None}
    assert read_ecc("") == {}


def test_most_nodes_are_right():
    assert majority({0: "a", 1: "b", 2: "b"}) == 1
    assert majority({0: "a", 1: "b"}) == 0
    facts = {rank: {"software": {"torch": "2.15" if rank else "2.14"}} for rank in range(3)}
    reasons = against_the_others(facts, {0: 0.0, 1: 60.0, 2: 61.0}, max_skew=5)
    assert reasons == {
        0: ["torch is 2.14, on most nodes 2.15", "its clock is -60.0 seconds off"],
        1: [],
        2: [],
    }
    assert against_the_others({0: facts[0]}, {0: 0.0}, max_skew=5) == {0: []}
    other = {
        "software": {"caco_scale": "b", "torch": "2.14", "rich": "14.0"}
    }  # other code, which needs another package
    ours = {"software": {"caco_scale": "a", "torch": "2.14"}}
    assert against_the_others({0: ours, 1: other}, {0: 0.0, 1: 0.0}, max_skew=5) == {
        0: [],
        1: ["caco_scale is b, on most nodes a"],
    }
    facts = {0: facts[1], 1: facts[1]}
    assert against_the_others(facts, {0: 0.0, 1: 7.0}, max_skew=5)[1] == ["its clock is +7.0 seconds off"]
    assert against_the_others(facts, {0: 0.0}, max_skew=5)[1] == ["arrived and then fell silent"]


def test_what_slurm_says_is_taken_and_what_cannot_be_is_refused():
    slurm = {"SLURM_NNODES": "4", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "MASTER_PORT": "29400"}
    options = parse(["--gpus", "8", "--hosts", "a,b,c,d"], slurm)
    assert (options.nodes, options.rank, options.master_addr, options.master_port) == (4, 2, "a", 29400)
    assert parse(["--gpus", "0"], {}).names == ["of-rank-0"]
    assert step_nodes({}) is None
    for arguments, variables, message in (
        ([], {}, "--gpus"),
        (["--gpus", "8", "--nodez", "2"], {}, "--nodez"),
        (["--gpus", "8"], {**slurm, "SLURM_STEP_NUM_TASKS": "32"}, "32 processes on 4 nodes"),
        (["--gpus", "8"], {**slurm, "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        (["--gpus", "8"], {**slurm, "MASTER_PORT": ""}, "give --master-port"),
        (["--gpus", "8", "--rank", "4"], slurm, "not one of 4 nodes"),
        (["--gpus", "-1"], {}, "--gpus is -1: give a number from 0 up"),
    ):
        with pytest.raises(UserError, match=message):
            parse(arguments, variables)
    with Nodes(2) as nodes:
        nodes.start(0, "--rank", "7")
        lines, code = nodes.end()[0]
    assert (len(lines), code) == (1, 2)
