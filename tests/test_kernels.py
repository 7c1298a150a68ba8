"""The bank by Triton's kernels, in Triton's interpreter, against the dense float64 oracle and the chunked path.

``pytest -m gpu`` runs them on a GPU (it passes on an H100). Without one they are compiled for two all the same.
"""

import itertools

import pytest
import torch
from gloo import run_ranks
from oracle import oracle_step, random_inputs

from caco_scale.distributed.collectives import shard_range
from caco_scale.errors import UserError
from caco_scale.flags.choices import KERNEL_INPUTS
from caco_scale.method.bank import ShardedBank

CASES = [  # samples, rows, dim, views, T, T_bank, rule
    (12, 100, 24, 2, 0.08, 0.08, "caco"),
    (6, 130, 16, 3, 0.1, 0.06, "caco"),  # uneven everywhere: 18 queries, 130 rows, two temperatures
    (42, 4, 8, 2, 0.5, 0.5, "caco"),  # fewer rows than a tile; on 3 ranks 2, 2 and none
    (6, 65, 20, 2, 0.2, 0.2, "moco"),
    (6, 65, 20, 4, 0.08, 0.05, "adco"),
]
# Relative errors of norms; bf16 has 8 bits of mantissa, tf32 11, each rounding less than half of the last.
LIMITS = {"fp32": 2e-6, "tf32": 3e-3, "bf16": 2e-2}


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def errors(case, kernel, inputs, device="cpu"):
    """One step: relative errors of loss, this rank's query and bank gradients; the share of the oracle's positives."""
    samples, size, dim, num_views, t, t_bank, rule = case
    queries, keys, rows, velocity = random_inputs(samples, size, dim, num_views, seed=size)
    bank = ShardedBank(size, dim, kernel=kernel, kernel_inputs=inputs, device=device)
    bank.load_full(rows.float(), velocity.float())
    mine = slice(*shard_range(samples, bank.num_ranks, bank.rank))
    leaves = [q[mine].float().to(device).requires_grad_() for q in queries]
    settings = {"temperature": t, "bank_temperature": t_bank, "rule": rule}
    result = bank.contrast(leaves, [k[mine].float().to(device) for k in keys], **settings)
    result.loss.backward()
    expected = oracle_step(queries, keys, rows.float(), velocity, **settings)
    dq = torch.stack([q.grad.cpu() for q in leaves]) / bank.num_ranks
    found = {"loss": relative(result.loss.detach().cpu(), expected.loss)}
    found["query gradient"] = relative(dq, torch.stack(expected.dq)[:, mine])
    if rule != "moco" and len(bank.rows):
        own = expected.bank_gradient[slice(*bank.rows_range)]
        found["bank gradient"] = relative(result.bank_gradient.cpu(), own)
    if rule == "caco":
        same = torch.stack(result.positives).cpu() == torch.stack(expected.positives)[:, mine]
        found["wrong positives"] = 1 - same.double().mean().item()
    return found


def all_errors(rank, world_size):
    return [errors(case, "triton", inputs) for inputs in KERNEL_INPUTS for case in CASES]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_kernels_are_the_oracle_within_their_number_format(world_size, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for found in run_ranks(all_errors, world_size, afresh=True):
        for (inputs, case), by_name in zip(itertools.product(KERNEL_INPUTS, CASES), found, strict=True):
            for name, error in by_name.items():
                limit = (0.05 if inputs == "bf16" else 0) if name == "wrong positives" else LIMITS[inputs]
                assert error <= limit, (inputs, case, name, error)
                if name.endswith("gradient") and inputs != "fp32":
                    assert error > LIMITS["fp32"]  # the format was really used


def ties(rank, world_size):
    """Rows 0, 1, 2 … repeat after every fourth: the lowest of equals is found, over tiles and ranks."""
    rows = torch.eye(4).repeat(30, 1)
    bank = ShardedBank(120, 4, kernel="triton", kernel_inputs="bf16")
    bank.load_full(rows, torch.zeros(120, 4))
    keys = [torch.eye(4)[[3, 2, 1, 0]], torch.eye(4)[[0, 0, 1, 1]]]
    result = bank.contrast(keys, keys)
    return [p.tolist() for p in result.positives]


@pytest.mark.parametrize("world_size", [1, 2])
def test_ties_take_the_lowest_row(world_size, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for found in run_ranks(ties, world_size, afresh=True):
        assert found == [[3, 2, 1, 0], [0, 0, 1, 1]]


def compile_for_gpus(rank, world_size):
    """Most shared memory and any local memory (spilled registers) of the kernels for D = 256, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    from caco_scale.method import kernels

    found = []
    for inputs in ("tf32", "bf16"):
        matrix, vector = ("*bf16" if inputs == "bf16" else "*fp32"), "*fp32"
        kinds = {"query": matrix, "keys": matrix, "unit": matrix, "weighted": matrix, "ratio": "fp32"}
        kinds |= {"sums": vector, "attracted": vector, "pull": vector, "values": vector, "rows_found": "*i64"}
        options = {**kernels._options(256, inputs), "NUM_SUMS": 2}
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        for kernel in (kernels._attract, kernels._pull, kernels._nearest):
            names = kernel.arg_names
            constants = {(names.index(name),): value for name, value in options.items() if name in names}
            signature = {n: "constexpr" if n in options else kinds.get(n, "i32") for n in names}
            source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
            for capability in (80, 90):
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
                found.append((made.metadata.shared, ".local" in made.asm["ptx"], "mma" in made.asm["ptx"]))
    return found


@pytest.mark.long
def test_the_kernels_compile_for_gpus_and_fit_their_shared_memory(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (found,) = run_ranks(compile_for_gpus, 1)
    assert len(found) == 12
    for shared, spills, tensor_cores in found:
        assert shared <= 99 * 1024
        assert not spills
        assert tensor_cores


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("inputs", KERNEL_INPUTS)
def test_kernels_on_a_gpu(inputs):
    for case in CASES:
        for name, error in errors(case, "triton", inputs, "cuda").items():
            limit = (0.05 if inputs == "bf16" else 0) if name == "wrong positives" else LIMITS[inputs]
            assert error <= limit, (inputs, case, name, error)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": "triton"}, ["CUDA", "cpu", "use the kernel torch"]),
        ({"kernel": "triton", "dtype": torch.float64}, ["float32", "float64"]),
        ({"kernel": "tritn"}, ["did you mean triton?"]),
        ({"kernel_inputs": "fp16"}, ["bf16"]),
    ],
)
def test_a_kernel_that_cannot_serve_is_one_clear_line(settings, words):
    with pytest.raises(UserError) as error:
        ShardedBank(20, 8, **settings)
    assert all(word in str(error.value) for word in words)
