"""The collapse alarm: spread and RankMe on embeddings whose values are known."""

import math

import pytest
import torch
from gloo import run_ranks

from caco_scale.run.alarm import CollapseAlarm, collapse_warning
from caco_scale.run.diagnostics import embedding_std, rankme

DIM = 64
HEALTHY = DIM**-0.5


def unit_rows(num_rows, dim, seed=0):
    return torch.nn.functional.normalize(torch.randn(num_rows, dim, generator=torch.manual_seed(seed)), dim=1)


def with_spectrum(singular_values, num_rows):
    """A matrix with the singular values given."""
    generator = torch.manual_seed(1)
    left, _ = torch.linalg.qr(
        torch.randn(num_rows, len(singular_values), generator=generator, dtype=torch.float64)
    )
    right, _ = torch.linalg.qr(
        torch.randn(len(singular_values), 40, generator=generator, dtype=torch.float64).T
    )
    return left @ torch.tensor(singular_values, dtype=torch.float64).diag() @ right.T


def test_spread_of_the_sphere_and_of_a_point():
    assert embedding_std(unit_rows(4000, DIM)) == pytest.approx(HEALTHY, rel=0.01)
    assert embedding_std(unit_rows(1, DIM).expand(100, -1)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_rankme_of_equal_singular_values_is_their_number(rank):
    assert rankme(with_spectrum([3.0] * rank, num_rows=50)) == pytest.approx(rank, rel=1e-6)


def test_rankme_is_the_entropy_of_the_spectrum_whatever_its_scale():
    spectrum = [8.0, 4.0, 2.0, 1.0, 1.0]
    p = [value / sum(spectrum) for value in spectrum]
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert rankme(with_spectrum(spectrum, num_rows=30)) == pytest.approx(expected, rel=1e-6)
    assert rankme(1000 * with_spectrum(spectrum, num_rows=30).float()) == pytest.approx(expected, rel=1e-4)


def test_rankme_of_dead_and_of_broken_features():
    assert rankme(torch.zeros(8, 5)) == 0
    assert math.isnan(rankme(torch.tensor([[1.0, torch.nan], [0.0, 1.0]])))


def test_rankme_selects_evenly_from_a_large_batch():
    features = torch.randn(90, 20, generator=torch.manual_seed(2))
    assert rankme(features, max_rows=30) == rankme(features[::3])
    assert rankme(features, max_rows=44) == rankme(features[::3])


def figures_of_rank(rank, world_size):
    part = slice(rank * 24 // world_size, (rank + 1) * 24 // world_size)
    rows = unit_rows(24, DIM)
    return embedding_std(rows[part]), rankme(rows[part], max_rows=10)


def test_figures_are_of_all_ranks_batches():
    alone = figures_of_rank(0, 1)
    assert run_ranks(figures_of_rank, 2) == [alone] * 2


def test_warning_names_the_figure_and_the_remedy():
    assert collapse_warning(HEALTHY, DIM, 30.0) is None
    assert collapse_warning(HEALTHY, DIM, None) is None
    spread = collapse_warning(0.1 * HEALTHY, DIM, 30.0)
    assert "standard deviation" in spread
    assert "RankMe" not in spread
    assert "bank.warmup_epochs" in spread
    assert "ema.momentum" in spread
    assert "\n" not in spread
    assert "RankMe is 3.5" in collapse_warning(HEALTHY, DIM, 3.5)
    assert collapse_warning(HEALTHY, DIM, 3.5, max_rank=16) is None  # a batch of 16 cannot show more than 16
    assert collapse_warning(math.nan, DIM, math.nan) is not None


def test_alarm_sounds_once_per_episode():
    alarm = CollapseAlarm(DIM, patience=2)
    low, between, healthy = 0.1 * HEALTHY, 0.5 * HEALTHY, 0.9 * HEALTHY
    spreads = [low, healthy, low, low, low, between, low, low, healthy, low, between, low, low]
    sounded = [alarm.check(std, rankme=30.0) is not None for std in spreads]
    # Step 3 begins an episode (two low checks in a row), which `between` does not end; step 8 does, step 12
    # begins anew.
    assert [step for step, sound in enumerate(sounded) if sound] == [3, 12]
