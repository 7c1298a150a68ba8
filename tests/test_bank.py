"""The sharded bank against the golden figures and the dense float64 oracle, on 1 to 4 ranks.

Each SCENARIO is a check that every rank runs on its share of the same global batch; one launch per world size runs
them all, and each is a test of its own.
"""

import contextlib
import io
import json
import traceback
from datetime import timedelta
from pathlib import Path

import oracle_kin
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run_ranks
from oracle import enqueue, oracle_step, random_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from caco_scale.benchmark.counts import Counts
from caco_scale.distributed import collectives
from caco_scale.errors import UserError, is_loss_of_peers
from caco_scale.flags.choices import BANK_EXCHANGES as EXCHANGES
from caco_scale.method import bank_compute
from caco_scale.method.bank import ShardedBank
from caco_scale.method.bank_exchange import pack_nearest, unpack_nearest
from caco_scale.method.bank_rows import initial_rows

GOLDEN = Path(__file__).parent / "golden" / "caco_step.json"


def share(x, rank, world_size):
    """This rank's contiguous part of a global batch."""
    size = len(x) // world_size
    return x[rank * size : (rank + 1) * size]


def make_bank(rows, velocity, exchange="statistics", dtype=torch.float64, group=None):
    bank = ShardedBank(*rows.shape, dtype=dtype, exchange=exchange, group=group, device=rows.device)
    bank.load_full(rows, velocity)
    return bank


def contrast(bank, inputs, micro_steps=1, **settings):
    """Contrast this rank's share in micro-steps: the results, and per view this rank's part of the global dq."""
    queries, keys = ([share(x, bank.rank, bank.num_ranks) for x in views] for views in inputs[:2])
    queries = [q.detach().clone().requires_grad_() for q in queries]
    results = []
    for m in range(micro_steps):
        q, k = ([share(x, m, micro_steps) for x in views] for views in (queries, keys))
        results.append(bank.contrast(q, k, weight=1 / micro_steps, **settings))
        results[-1].loss.backward()
    return results, [q.grad / bank.num_ranks for q in queries]


def expected_step(bank, inputs, rows, velocity, micro_steps, **settings):
    if settings.get("rule") not in oracle_kin.RULES:
        return oracle_step(*inputs[:2], rows, velocity, pointer=bank.pointer, **settings)
    by_rank = torch.arange(len(inputs[0][0])).view(
        bank.num_ranks, micro_steps, -1
    )  # a micro-batch: some of each
    groups = [by_rank[:, m].flatten() for m in range(micro_steps)]
    return oracle_kin.kin_step(*inputs[:2], rows, velocity, pointer=bank.pointer, groups=groups, **settings)


def assert_step(bank, inputs, tolerance=1e-10, lr=3.0, micro_steps=1, **settings):
    """One step of the bank and of the oracle on the same global batch: everything agrees on this rank."""
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    rows, velocity = bank.full()
    expected = expected_step(bank, inputs, rows, velocity, micro_steps, lr=lr, **settings)
    results, dq = contrast(bank, inputs, micro_steps, **settings)
    bank.step(results if micro_steps > 1 else results[0], lr)

    loss = sum(r.loss.detach() for r in results)
    torch.testing.assert_close(loss, expected.loss, **close)
    assert len(set(collectives.gather_objects(loss.item(), bank.group))) == 1
    for view, gradient in enumerate(dq):
        torch.testing.assert_close(gradient, share(expected.dq[view], bank.rank, bank.num_ranks), **close)
    for view in range(2 if expected.positives else 0):
        mine = torch.cat([r.positives[view] for r in results])
        assert torch.equal(mine, share(expected.positives[view], bank.rank, bank.num_ranks))
    probability = sum(r.positive_probability.item() for r in results) / micro_steps
    assert probability == pytest.approx(expected.positive_probability, rel=tolerance, abs=tolerance)
    start, stop = bank.rows_range
    if expected.bank_gradient is not None:
        gradient = sum(r.bank_gradient for r in results)
        torch.testing.assert_close(gradient, expected.bank_gradient[start:stop], **close)
    for mine, whole in zip(bank.full(), (expected.rows, expected.velocity), strict=True):
        torch.testing.assert_close(mine, whole, **close)


@contextlib.contextmanager
def tiles_of(num_bytes, block_bytes=None):
    """Tiles of a few bytes; with ``block_bytes`` also blocks of queries, however few fit in."""
    limits = {"TILE_BYTES_CPU": num_bytes}
    if block_bytes:
        limits |= {"BLOCK_BYTES_CPU": block_bytes, "LEAST_QUERIES": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(bank_compute, name, value)
        yield


class Spy(TorchDispatchMode):
    """Records the collectives and the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.collectives, self.largest = [], 0

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else every process imports torch.compile, for 3 seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self.collectives.append(function.__name__.split(".")[0])
        elif isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


# ---- scenarios: run by every rank


def golden(rank, world_size, device="cpu"):
    for name, case in json.loads(GOLDEN.read_text()).items():
        q, k, rows, velocity, dq, rows_after, velocity_after = (
            torch.tensor(case[field], dtype=torch.float64, device=device)
            for field in ("q", "k", "W0", "v0", "dq", "W1", "v1")
        )
        for exchange in EXCHANGES:
            bank = make_bank(rows, velocity, exchange)
            settings = {"temperature": case["T"], "bank_temperature": case["Tbank"]}
            (result,), gradients = contrast(bank, (list(q), list(k)), **settings)
            bank.step(result, case["bank_lr"])
            assert result.loss.item() == pytest.approx(case["loss"], abs=1e-10), name
            assert case["bank_momentum"] == bank.momentum
            for view in range(2):
                expected = share(case["positive"][view], rank, world_size)
                assert result.positives[view].tolist() == expected
            for gradient, expected in zip(gradients, dq, strict=True):
                assert (gradient - share(expected, rank, world_size)).abs().max() < 1e-10
            assert (bank.full()[0] - rows_after).abs().max() < 1e-10
            assert (bank.full()[1] - velocity_after).abs().max() < 1e-10


def caco_at_any_size(rank, world_size):
    sizes = [(1000, 2, 0.08), (1000, 5, 0.1), (997, 2, 0.05), (5, 2, 0.05), (5, 5, 0.1), (1, 2, 0.08)]
    for num_rows, num_views, bank_temperature in sizes:  # even, uneven, and empty blocks
        for exchange in EXCHANGES:
            inputs = random_inputs(12, num_rows, 16, num_views, seed=num_rows + num_views)
            assert_step(make_bank(*inputs[2:], exchange), inputs, bank_temperature=bank_temperature)


def adco(rank, world_size):
    for exchange in EXCHANGES:
        for num_views, bank_temperature in ((2, 0.08), (4, 0.05)):
            inputs = random_inputs(12, 97, 16, num_views, seed=num_views)
            assert_step(
                make_bank(*inputs[2:], exchange), inputs, rule="adco", bank_temperature=bank_temperature
            )


def kin(rank, world_size):
    """Rules whose positive is the nearest row of a queue, or whose negatives are the batch."""
    for rule in oracle_kin.RULES:
        for exchange in EXCHANGES:
            for num_rows, num_views, temperature in ((97, 2, 0.1), (5, 2, 0.08), (60, 4, 0.2)):
                inputs = random_inputs(12, num_rows, 16, num_views, seed=num_rows)
                bank = make_bank(*inputs[2:], exchange)
                for step in range(3):  # the queue wraps; what it holds is looked up in the next step
                    inputs = random_inputs(12, num_rows, 16, num_views, seed=1000 + step)
                    assert_step(bank, inputs, rule=rule, temperature=temperature)
                assert bank.pointer == (0 if rule == "inbatch" else 72 % num_rows)


def moco_queue(rank, world_size):
    for num_rows in (
        100,
        24,
        20,
        5,
    ):  # 24 keys a step: the pointer wraps, the queue is exactly filled, overfull
        inputs = random_inputs(12, num_rows, 16, seed=num_rows)
        bank = make_bank(*inputs[2:])
        for step in range(6):
            inputs = random_inputs(12, num_rows, 16, seed=1000 + step)
            assert_step(bank, inputs, tolerance=1e-10, rule="moco", temperature=0.2)
            assert bank.pointer == 24 * (step + 1) % num_rows


def rules_follow_each_other(rank, world_size):
    for exchange in EXCHANGES:
        rows, velocity = random_inputs(12, 61, 8)[2:]
        bank = make_bank(rows, velocity, exchange)
        for step, rule in enumerate(("moco", "moco", "caco", "nnclr", "caco", "adco", "nearest", "caco")):
            assert_step(bank, random_inputs(12, 61, 8, seed=step), tolerance=1e-9, rule=rule)


def accumulation(rank, world_size):
    own = [(rule, 31) for rule in ("moco", *oracle_kin.RULES)]
    for rule, num_rows in (("caco", 50), ("adco", 50), ("moco", 50), *own):
        inputs = random_inputs(24, num_rows, 8, 3, seed=3)
        assert_step(make_bank(*inputs[2:]), inputs, micro_steps=2, rule=rule, bank_temperature=0.07)


def small_blocks_and_tiles(rank, world_size):
    inputs = random_inputs(12, 100, 8, 4)
    most_rows = -(-100 // world_size)
    with tiles_of(
        7 * 20 * 8, 21 * most_rows * 8
    ):  # 5 samples a block and 2 in the last; 7 rows a tile and 17
        for rule in ("caco", "adco", "moco", "nearest"):
            for exchange in EXCHANGES:
                for bank_temperature in (0.05, 0.08):
                    settings = {"rule": rule, "bank_temperature": bank_temperature}
                    assert_step(make_bank(*inputs[2:], exchange), inputs, **settings)


def float32(rank, world_size):
    for exchange in EXCHANGES:
        for temperature, bank_temperature in ((0.08, 0.08), (0.2, 0.05)):
            inputs = random_inputs(48, 2000, 32, seed=7)
            inputs = [x.float() if isinstance(x, torch.Tensor) else [y.float() for y in x] for x in inputs]
            bank = make_bank(*inputs[2:], exchange, torch.float32)
            settings = {"temperature": temperature, "bank_temperature": bank_temperature}
            assert_step(bank, inputs, tolerance=2e-5, **settings)


def ties_take_the_lowest_row(rank, world_size):
    eye = torch.eye(4)
    rows = torch.cat([eye * 2.0**n for n in range(5)])  # rows j, j + 4, j + 8, … point the same way
    keys = [eye[[3, 2, 1, 0] * 3], eye[[0, 0, 1, 1] * 3]]
    for dtype in (torch.float32, torch.float64):
        for exchange in EXCHANGES:
            bank = make_bank(rows.to(dtype), torch.zeros(20, 4, dtype=dtype), exchange, dtype)
            with tiles_of(1):
                (result,), _ = contrast(bank, (keys, keys))
            for key, positive in zip(keys, result.positives, strict=True):
                assert torch.equal(positive, share(key.argmax(1), rank, world_size))


def gradient_has_the_queries_dtype(rank, world_size):
    inputs = random_inputs(12, 40, 16)
    inputs = [[x.bfloat16() for x in views] for views in inputs[:2]] + [x.float() for x in inputs[2:]]
    bank = make_bank(*inputs[2:], dtype=torch.float32)
    (plain,), dq = contrast(bank, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (result,), dq_autocast = contrast(bank, inputs)
    assert result.loss.dtype == result.bank_gradient.dtype == torch.float32
    assert torch.equal(plain.loss, result.loss)  # computed in the bank's dtype all the same
    assert torch.equal(plain.bank_gradient, result.bank_gradient)
    assert all(g.dtype == torch.bfloat16 and torch.equal(g, h) for g, h in zip(dq, dq_autocast, strict=True))


def not_finite_is_known_on_every_rank(rank, world_size):
    for exchange in EXCHANGES:
        for dtype in (torch.float32, torch.float64):
            for broken in ("query", "key", "infinite key", "row"):
                queries, keys, rows, velocity = random_inputs(12, 40, 16)
                if broken == "query":
                    queries[1][0, 3] = torch.nan
                elif broken == "row":
                    rows[39] = torch.nan
                else:
                    keys[0][11] = torch.nan if broken == "key" else torch.inf
                bank = make_bank(rows.to(dtype), velocity.to(dtype), exchange, dtype)
                for rule in ("caco", "inbatch", "nnclr"):
                    if rule != "caco" and broken == "row":
                        continue  # it is no row's nearest, then
                    (result,), _ = contrast(bank, (queries, keys), rule=rule)
                    assert result.loss.isnan(), (broken, rule)
                    for positive in result.positives or ():
                        assert ((positive >= 0) & (positive < 40)).all()


def whole_bank(rank, world_size):
    for num_rows in (9000, 5):  # 9000: several seeds, whose blocks are not the ranks' blocks
        bank = ShardedBank(num_rows, 4, seed=11, dtype=torch.float64)
        rows, velocity = bank.full()
        assert torch.equal(rows, initial_rows(0, num_rows, 4, 11, torch.float64, "cpu"))
        assert torch.equal(velocity, torch.zeros(num_rows, 4, dtype=torch.float64))
        start, stop = bank.rows_range
        assert torch.equal(bank.rows, rows[start:stop])
        rows += 1
        assert not torch.equal(bank.full()[0], rows)  # a copy


def state_continues(rank, world_size):
    """A bank that takes another's state, after torch.save, goes on as the other does, moco's pointer included."""
    for num_rows in (50, 5):
        first, second = (ShardedBank(num_rows, 8, dtype=torch.float64, seed=s) for s in (0, 1))
        for step, rule in enumerate(("moco", "caco", "nnclr", "moco")):
            first.step(contrast(first, random_inputs(12, num_rows, 8, seed=step), rule=rule)[0], 3.0)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert second.pointer == first.pointer == 72 % num_rows
        for step, rule in enumerate(("nearest", "caco", "moco")):
            for bank in (first, second):
                bank.step(contrast(bank, random_inputs(12, num_rows, 8, seed=step), rule=rule)[0], 3.0)
        for name, value in first.state_dict().items():
            assert torch.equal(torch.as_tensor(second.state_dict()[name]), torch.as_tensor(value)), name


def similarities(rank, world_size):
    for num_rows in (97, 5):
        queries, _, rows, velocity = random_inputs(12, num_rows, 8)
        bank = make_bank(rows, velocity)
        found = bank.similarities(share(queries[0], rank, world_size).requires_grad_())
        assert not found.requires_grad
        torch.testing.assert_close(found, share(queries[0], rank, world_size) @ F.normalize(rows).T)


def diagnostics(rank, world_size):
    inputs = random_inputs(12, 30, 8)
    bank = make_bank(*inputs[2:])
    assert bank.diagnostics()["rows_used"] == bank.diagnostics()["assignment_entropy"] == 0
    counts = torch.zeros(30, dtype=torch.float64)
    for seed in range(3):
        inputs = random_inputs(12, 30, 8, seed=seed)
        for positives in oracle_step(*inputs[:2], *bank.full()).positives:
            counts += positives.bincount(minlength=30)
        (result,), _ = contrast(bank, inputs)
        contrast(bank, inputs)  # a step that is not taken counts nothing
        bank.step(result, 3.0)
    found = bank.diagnostics()
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * p.log()).sum() / torch.tensor(30.0).log()
    assert found["rows_used"] == pytest.approx((counts > 0).double().mean().item())
    assert found["assignment_entropy"] == pytest.approx(entropy.item(), rel=1e-6)
    assert found["row_norm"] == pytest.approx(bank.full()[0].norm(dim=1).mean().item())
    bank.reset_assignments()
    assert bank.diagnostics()["rows_used"] == 0


def collectives_and_memory(rank, world_size):
    queries, keys, rows, velocity = random_inputs(36, 4000, 8)
    most_rows = -(-4000 // world_size)
    for rule, expected in (("caco", 4), ("adco", 3), ("moco", 3)):
        for num_blocks in (1, 3):
            block = 72 // num_blocks * most_rows
            limits = 50 * 72 * 4, block * 4
            bank = make_bank(rows.float(), velocity.float(), dtype=torch.float32)
            mine = [[share(x, rank, world_size).float() for x in views] for views in (queries, keys)]
            mine[0] = [q.requires_grad_() for q in mine[0]]
            with tiles_of(*limits), Spy() as check:
                bank._check(*mine, 0.08, 0.05, rule, 1.0)
            with tiles_of(*limits), Spy() as forward:
                result = bank.contrast(*mine, bank_temperature=0.05, rule=rule)
            with Spy() as backward:
                result.loss.backward()
                bank.step(result, 3.0)
            forward.collectives = forward.collectives[len(check.collectives) :]
            wanted = expected + num_blocks - 1 if world_size > 1 else 0
            assert len(forward.collectives) == wanted, forward.collectives
            assert backward.collectives == []
            local, batch = bank.rows.numel(), 36 * 4 * 8
            assert forward.largest <= max(block, local, batch) <= 72 * 4000 // num_blocks


SCENARIOS = [
    golden,
    caco_at_any_size,
    adco,
    kin,
    moco_queue,
    rules_follow_each_other,
    accumulation,
    small_blocks_and_tiles,
    float32,
    ties_take_the_lowest_row,
    gradient_has_the_queries_dtype,
    not_finite_is_known_on_every_rank,
    whole_bank,
    state_continues,
    similarities,
    diagnostics,
    collectives_and_memory,
]


def disagreement_is_an_error_on_every_rank(rank, world_size):
    queries, keys, rows, velocity = random_inputs(12, 20, 8)
    last = rank == world_size - 1
    for exchange in EXCHANGES:
        bank = make_bank(rows, velocity, exchange)
        good = (queries, keys)
        short = ([q[:-1] for q in queries], [k[:-1] for k in keys])
        wrong_dim = ([q[:, :5] for q in queries], keys)
        for arguments, settings, words in (
            (short, {}, ["batch size", "12 on rank 0", f"11 on rank {world_size - 1}"]),
            (([*queries, queries[0]], keys), {}, ["number of views", f"3 on rank {world_size - 1}"]),
            (wrong_dim, {}, ["(12, 5)", "(12, 8)", f"rank {world_size - 1}"]),
            (good, {"rule": "moco"}, ["rule", f"moco on rank {world_size - 1}"]),
            (good, {"rule": "mocco"}, ["moco"]),
            (good, {"temperature": 0.1}, ["temperature", "0.08 on rank 0"]),
        ):
            with pytest.raises(UserError) as error:
                bank.contrast(*arguments, **settings) if last else bank.contrast(*good)
            assert "\n" not in str(error.value)
            assert all(word in str(error.value) for word in words), str(error.value)
        with pytest.raises(UserError, match="shape"):
            bank.similarities(queries[0][:-1] if last else queries[0])
        assert_step(bank, random_inputs(12, 20, 8))  # and the ranks are still in step
    with pytest.raises(UserError, match="size must be the same"):
        ShardedBank(20 + last, 8)


def agreeing_once(rank, world_size):
    """What is new is compared with the other ranks, on any; what was there last is not."""
    queries, keys, rows, velocity = random_inputs(12, 20, 8)
    bank = make_bank(rows, velocity)
    exchanges = []
    for temperature in (0.08, 0.08, 0.1, 0.1, 0.08):
        with Counts() as counts:
            bank.contrast(queries, keys, temperature, agree_once=True)
        exchanges.append(counts.exchanges)
    assert exchanges == [2, 0, 2, 0, 2]
    with pytest.raises(UserError, match="temperature must be the same"):
        bank.contrast(queries, keys, 0.1 + 0.1 * rank, agree_once=True)
    with Counts() as counts:
        bank.contrast(queries, keys)
        bank.contrast(queries, keys)
    assert counts.exchanges == 4


def wrong_alone(rank, world_size):
    """What was agreed once and is wrong later, on the last rank alone, ends that rank at once, by its number."""
    queries, keys, rows, velocity = random_inputs(12, 20, 8)
    bank, last = make_bank(rows, velocity), rank == world_size - 1
    bank.contrast(queries, keys, agree_once=True)
    if last:  # the others would wait in the next exchange of embeddings
        with pytest.raises(UserError, match=rf"queries of view 2 are \(12, 8\).* \(rank {rank}\)$"):
            bank.contrast([queries[0][:-1], *queries[1:]], keys, agree_once=True)
    dist.barrier()
    # Exchanges between hosts have a group of their own where tensors travel by NCCL.
    own = dist.new_group(backend="gloo", timeout=timedelta(seconds=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_host_group", lambda group: own)
        if last:
            with pytest.raises(RuntimeError) as ended:
                bank.contrast(queries, keys, 0.2, agree_once=True)
            text = f"contrast: rank {rank} alone changes the temperature (0.08 -> 0.2): "
            assert str(ended.value).startswith(text)
            patch.setenv("WORLD_SIZE", "2")
            assert is_loss_of_peers(ended.value)  # a command ends with that line
    dist.barrier()


def bank_of_a_subgroup(rank, world_size):
    group = dist.new_group([0, world_size - 1])
    if rank in (0, world_size - 1):
        for exchange in EXCHANGES:
            inputs = random_inputs(12, 21, 8)
            assert_step(make_bank(*inputs[2:], exchange, group=group), inputs)


ONLY_SEVERAL_RANKS = [disagreement_is_an_error_on_every_rank, agreeing_once, wrong_alone, bank_of_a_subgroup]


def run_scenarios(rank, world_size):
    """What went wrong in each scenario on this rank: a traceback, or None."""
    failures = {}
    for scenario in SCENARIOS + (ONLY_SEVERAL_RANKS if world_size > 1 else []):
        try:
            failures[scenario.__name__] = scenario(rank, world_size)
        except Exception:
            failures[scenario.__name__] = traceback.format_exc()
    return failures


LAUNCHES = {}


@pytest.mark.parametrize("scenario", SCENARIOS + ONLY_SEVERAL_RANKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_sharded(world_size, scenario):
    if world_size not in LAUNCHES:
        LAUNCHES[world_size] = run_ranks(run_scenarios, world_size)
    for rank, failures in enumerate(LAUNCHES[world_size]):
        assert failures[scenario.__name__] is None, (
            f"rank {rank} of {world_size}: {failures[scenario.__name__]}"
        )


# ---- one process, no process group


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
def test_one_process(scenario):
    scenario(0, 1)


@pytest.mark.parametrize("rule", ["caco", "adco"])
@pytest.mark.parametrize("num_views", [2, 4])
def test_oracle_bank_gradient_is_the_gradient_of_the_bank_objective(rule, num_views):
    inputs = random_inputs(12, 33, 8, num_views)
    settings = {"rule": rule, "bank_temperature": 0.05}
    by_formula = oracle_step(*inputs, **settings)
    by_autograd = oracle_step(*inputs, **settings, bank_gradient_by="autograd")
    torch.testing.assert_close(by_formula.bank_gradient, by_autograd.bank_gradient, rtol=1e-12, atol=1e-12)


def test_query_gradient_by_finite_differences():
    queries, keys, rows, velocity = random_inputs(4, 9, 3, 3)
    bank = make_bank(rows, velocity)
    queries = [q.requires_grad_() for q in queries]
    for rule in ("caco", "adco"):
        assert torch.autograd.gradcheck(lambda *q, rule=rule: bank.contrast(q, keys, rule=rule).loss, queries)


def test_contrast_changes_nothing_and_step_counts():
    queries, keys, rows, velocity = random_inputs(12, 20, 8)
    bank = make_bank(rows, velocity)
    for rule in ("caco", "adco", "moco"):
        bank.contrast(queries, keys, rule=rule)
    assert torch.equal(bank.rows, rows)
    assert torch.equal(bank.velocity, velocity)
    assert bank.pointer == bank.assignments.sum() == 0
    bank.step(bank.contrast(queries, keys), lr=0.0)
    assert bank.assignments.sum() == 24
    bank.reset_velocity()
    assert not bank.velocity.any()


def test_the_queue_keeps_its_pointer():
    queries, keys, rows, velocity = random_inputs(12, 50, 8)
    bank = make_bank(rows, velocity)
    bank.pointer = 40  # as after a resume
    bank.step(bank.contrast(queries, keys, rule="moco"), lr=3.0)
    assert torch.equal(bank.rows, enqueue(rows, keys, 40))
    assert bank.pointer == 14


def test_initial_rows_are_unit_and_seeded():
    rows = initial_rows(0, 5000, 16, 1, torch.float32, "cpu")
    assert rows.norm(dim=1).sub(1).abs().max() < 1e-6
    assert torch.equal(rows[4000:4500], initial_rows(4000, 4500, 16, 1, torch.float32, "cpu"))
    assert rows.unique(dim=0).shape == rows.shape
    other = initial_rows(0, 5000, 16, 2, torch.float32, "cpu")
    assert (rows * other).sum(1).abs().mean() < 0.3  # independent directions: about 0.2 in 16 dimensions


def test_packed_maximum_orders_as_floats_do():
    values = torch.tensor([-1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0, -torch.inf])
    packed = pack_nearest(values, torch.arange(9), 4_000_000_000)
    assert torch.equal(unpack_nearest(packed, 4_000_000_000), torch.arange(9))
    for a in range(9):
        for b in range(9):
            larger = values[a] > values[b] or (values[a] == values[b] and a < b)
            assert bool(packed[a] > packed[b]) == bool(larger)


def test_nothing_waits_for_the_device():
    """On fake tensors reading a value (.item(), a boolean mask) raises: the hot path on a GPU never synchronises."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for exchange in EXCHANGES:
            bank = ShardedBank(300, 16, exchange=exchange)
            bank.rows, bank.velocity = torch.empty(300, 16), torch.empty(300, 16)
            bank.assignments = torch.empty(300, dtype=torch.int64)
            for rule in ("caco", "adco", "moco"):
                queries = [torch.empty(8, 16, requires_grad=True) for _ in range(4)]
                keys = [torch.empty(8, 16) for _ in range(2)]
                result = bank.contrast(queries, keys, bank_temperature=0.05, rule=rule)
                result.loss.backward()
                bank.step([result, result], 3.0)
                assert queries[3].grad.fake_mode is mode


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exchange": "logit"}, ["logit", "did you mean logits?"]),
        ({"size": 0}, ["at least one row"]),
        ({"dtype": torch.bfloat16}, ["bfloat16", "torch.float32"]),
    ],
)
def test_a_bank_that_cannot_be(settings, words):
    with pytest.raises(UserError) as error:
        ShardedBank(**{"size": 20, "dim": 8, **settings})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "caca"}, ["'caca'", "did you mean caco?"]),
        ({"temperature": 0.019}, ["temperature 0.019", "0.02"]),
        ({"bank_temperature": 0.0}, ["bank temperature 0.0", "0.02"]),
        ({"temperature": float("nan")}, ["temperature nan"]),
        ({"keys": [torch.randn(4, 8)]}, ["keys of 2", "got 2 and 1"]),
        ({"queries": [torch.randn(4, 8)]}, ["2 or more", "got 1 and 2"]),
        ({"keys": [torch.randn(4, 8), torch.randn(4, 7)]}, ["keys of view 2", "(4, 7)", "(4, 8)"]),
        ({"keys": [torch.randn(4, 8), torch.randn(3, 8)]}, ["keys of view 2", "(3, 8)", "(4, 8)"]),
        (
            {"queries": [torch.randn(0, 8)] * 2, "keys": [torch.randn(0, 8)] * 2},
            ["queries of view 1", "(0, 8)"],
        ),
        ({"keys": [torch.randn(4, 8, requires_grad=True)] * 2}, ["keys carry a gradient"]),
    ],
)
def test_wrong_arguments_are_one_clear_line(change, words):
    bank = ShardedBank(20, 8)
    arguments = {"queries": [torch.randn(4, 8)] * 2, "keys": [torch.randn(4, 8)] * 2, **change}
    with pytest.raises(UserError) as error:
        bank.contrast(**arguments)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_one_step_is_of_one_rule_and_one_shape():
    bank = ShardedBank(20, 8)
    views = [F.normalize(torch.randn(4, 8)) for _ in range(2)]
    results = [bank.contrast(views, views, rule=rule) for rule in ("caco", "moco")]
    with pytest.raises(UserError, match="one rule"):
        bank.step(results, 3.0)
    with pytest.raises(UserError, match=r"\(19, 8\).*\(20, 8\)"):
        bank.load_full(torch.zeros(19, 8), torch.zeros(20, 8))
    before = bank.rows.clone()
    with pytest.raises(UserError, match=r"rank 0 are \(19, 8\).*\(20, 8\).*load_full"):
        bank.load_state_dict(
            {**bank.state_dict(), "rows": torch.zeros_like(before), "velocity": torch.zeros(19, 8)}
        )
    assert torch.equal(bank.rows, before)
