"""The collectives on three gloo ranks, uneven and empty blocks included, and alone without a process group."""

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks

from caco_scale.distributed import collectives
from caco_scale.errors import UserError


@pytest.mark.parametrize("size", [1, 5, 12, 997])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shard_range_is_dtensors(size, world_size):
    chunks = list(torch.arange(size).chunk(world_size))  # what DTensor's Shard(0) does
    chunks += [torch.arange(0)] * (world_size - len(chunks))
    for rank, chunk in enumerate(chunks):
        start, stop = collectives.shard_range(size, world_size, rank)
        assert list(range(start, stop)) == chunk.tolist()


def test_without_a_process_group():
    x = torch.randn(6, 3)
    assert collectives.world_size() == 1
    assert collectives.rank() == 0
    assert torch.equal(collectives.all_gather_rows(x), x)
    assert torch.equal(collectives.all_gather_shards(x, 6), x)
    assert torch.equal(collectives.all_reduce_(x.clone()), x)
    assert torch.equal(collectives.reduce_scatter_rows(x), x)
    assert torch.equal(collectives.exchange_row_blocks(x, 3), x)
    assert collectives.gather_objects("a") == ["a"]
    assert collectives.gather_if_any("a", True) == ["a"]
    assert collectives.gather_if_any("a", False) is None
    assert collectives.all_max(3) == 3
    collectives.assert_equal_on_all_ranks({"batch size": 4}, "test")
    with pytest.raises(UserError, match=r"^too small$"):
        collectives.assert_equal_on_all_ranks({"batch size": 4}, "test", error="too small")


def exchange_everything(rank, world_size):
    assert (collectives.rank(), collectives.world_size()) == (rank, world_size)
    parts = torch.randn(world_size, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(collectives.all_gather_rows(parts[rank]), parts.flatten(0, 1))
    assert torch.equal(collectives.all_gather_rows(parts[rank].T.contiguous().T), parts.flatten(0, 1))
    assert torch.equal(collectives.all_reduce_(parts[rank].clone(), dist.ReduceOp.MAX), parts.amax(0))

    shares = torch.randn(world_size, world_size * 2, 3, generator=torch.Generator().manual_seed(1))
    found = collectives.reduce_scatter_rows(shares[rank])
    torch.testing.assert_close(found, shares.sum(0)[2 * rank : 2 * rank + 2])

    for size in (7, 4, 2, 1):  # uneven blocks; 4 and fewer leave the last ranks with none
        start, stop = collectives.shard_range(size, world_size, rank)
        whole = torch.arange(world_size * 2 * size).view(world_size * 2, size)
        rows = collectives.exchange_row_blocks(whole[:, start:stop], size)
        assert torch.equal(rows, whole[2 * rank : 2 * rank + 2])
        assert torch.equal(collectives.all_gather_shards(whole.T[start:stop], size), whole.T)

    assert collectives.gather_objects({"rank": rank}) == [{"rank": r} for r in range(world_size)]
    assert collectives.gather_if_any(rank, False) is None
    for teller in range(world_size):
        assert collectives.gather_if_any(rank, rank == teller) == [*range(world_size)]
    assert collectives.all_max(-rank) == 0
    return True


def disagree(rank, world_size):
    """The message each rank sees when one differs, and when one complains."""
    collectives.assert_equal_on_all_ranks({"batch size": 4, "name": "a"}, "test")
    messages = []
    for values, error in (({"batch size": 4 + (rank == 1)}, None), ({}, "no images" if rank == 2 else None)):
        with pytest.raises(UserError) as caught:
            collectives.assert_equal_on_all_ranks(values, "test", error=error)
        messages.append(str(caught.value))
    return messages


def within_a_subgroup(rank, world_size):
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    x = torch.full((2, 1), float(rank))
    gathered = collectives.all_gather_rows(x, group).flatten().tolist()
    return collectives.rank(group), gathered, collectives.gather_objects(rank, group)


def only_rank_0_looks(rank, world_size):
    def refused():
        raise UserError(f"not there, says rank {rank}")

    with pytest.raises(UserError) as caught:
        collectives.from_rank_0(refused)
    return collectives.from_rank_0(lambda: f"seen by {rank}"), str(caught.value)


def run_all(rank, world_size):
    return [
        f(rank, world_size) for f in (exchange_everything, disagree, within_a_subgroup, only_rank_0_looks)
    ]


def test_three_ranks():
    moved, messages, subgroup, looked = zip(*run_ranks(run_all, 3), strict=True)
    assert moved == (True, True, True)
    different = (
        "test: the batch size must be the same on every rank, but is 4 on rank 0, 5 on rank 1, 4 on rank 2"
    )
    assert messages == ([different, "no images (rank 2)"],) * 3
    gathered = [0.0, 0.0, 2.0, 2.0]
    assert subgroup == ((0, gathered, [0, 2]), None, (1, gathered, [0, 2]))
    assert looked == (("seen by 0", "not there, says rank 0"),) * 3
