"""Feature statistics against singular values and the values known for synthetic features."""

import itertools
import math

import pytest
import torch

from hybrid_ssl.monitor.features import (
    alpha_req,
    feature_stats,
    feature_std,
    linear_cka,
    mean_cosine,
    paired_cosine,
    rankme,
)

N, D = 512, 192


def gauss(n=N, d=D, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_gaussian_features_are_isotropic():
    stats = feature_stats(gauss())
    assert stats["std"] == pytest.approx(0.9995, abs=0.002)
    assert stats["rank"] == pytest.approx(182.0, rel=0.01)
    assert stats["rank_centred"] == pytest.approx(182.0, rel=0.01)


@pytest.mark.parametrize(("n", "rank"), [(64, 60.9), (192, 154), (2048, 190)])
def test_rank_is_biased_by_the_number_of_images(n, rank):
    assert rankme(gauss(n)) == pytest.approx(rank, rel=0.01)


def test_point_collapse_shows_in_std_and_raw_rank_only():
    collapsed = torch.ones(1, D) + 1e-3 * gauss()
    assert feature_std(collapsed) == pytest.approx(0.0010, rel=0.02)
    assert rankme(collapsed) == pytest.approx(1.15, rel=0.01)
    assert rankme(collapsed, centred=True) == pytest.approx(182, rel=0.01)
    assert mean_cosine(collapsed) == pytest.approx(1, abs=1e-4)


def test_common_offset_lowers_the_std():
    assert feature_std(3 + gauss()) == pytest.approx(0.32, rel=0.03)


def test_rank_counts_directions_and_clusters():
    flat = gauss(N, 10, 1) @ gauss(10, D, 2)
    assert rankme(flat) == pytest.approx(9.9, abs=0.2)
    clusters = gauss(5, D, 3)[torch.arange(N) % 5]
    assert rankme(clusters) == pytest.approx(5, abs=0.1) and rankme(clusters, centred=True) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_rank_equals_the_definition_by_svd(shape):
    z = gauss(*shape).double()
    for centred in (False, True):
        sigma = torch.linalg.svdvals(z - z.mean(0) if centred else z)
        p = sigma / sigma.sum() + 1e-7
        assert rankme(z, centred) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-5)


def test_identical_features_give_finite_numbers():
    stats = feature_stats(torch.zeros(8, 4))
    assert stats == {"std": 0.0, "rank": pytest.approx(1, abs=1e-4), "rank_centred": pytest.approx(1, abs=1e-4)}


def test_alpha_finds_the_exponent_of_a_power_law():
    z = gauss(2048) * torch.arange(1, D + 1) ** -0.5  # variances j^-1
    alpha, r2 = alpha_req(z)
    assert alpha == pytest.approx(1.03, abs=0.05) and r2 > 0.99
    assert alpha_req(gauss()).alpha == pytest.approx(0.35, abs=0.05)
    assert math.isnan(alpha_req(gauss(4, 3)).alpha)


def test_mean_cosine_equals_all_pairs():
    z = gauss(30, 5)
    unit = z.double() / z.double().norm(dim=1, keepdim=True)
    pairs = unit @ unit.T
    assert mean_cosine(z) == pytest.approx((pairs.sum().item() - 30) / (30 * 29), abs=1e-12)


def test_paired_cosine():
    z = gauss()
    assert paired_cosine(z, 3 * z) == pytest.approx(1)
    assert paired_cosine(z, -z) == pytest.approx(-1)


def test_linear_cka_forgives_rotation_and_scale_and_nothing_else():
    z = gauss(60, 20)
    rotation = torch.linalg.qr(gauss(20, 20, seed=1)).Q
    assert linear_cka(z, 3 * z @ rotation + 5) == pytest.approx(1, abs=1e-5)
    assert paired_cosine(z, z @ rotation) < 0.2
    assert 0.3 < linear_cka(z, z + gauss(60, 20, seed=2)) < 0.9
    unrelated = [linear_cka(gauss(60, 90, seed=s), gauss(60, 90, seed=s + 50)) for s in range(20)]
    assert abs(sum(unrelated) / 20) < 0.02  # the biased one: 90 / (90 + 60)
    assert math.isnan(linear_cka(torch.ones(9, 4), z[:9])) and math.isnan(linear_cka(z[:3], z[:3]))


def test_linear_cka_is_the_sum_over_quadruples_of_different_images():
    a, b = gauss(7, 3).double(), gauss(7, 2, seed=1).double()

    def hsic(x, y):
        k, m, total, count = x @ x.T, y @ y.T, 0.0, 0
        for i, j, q, r in itertools.permutations(range(7), 4):  # the U-statistic's own definition
            total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
            count += 1
        return (total / count).item()

    assert linear_cka(a, b) == pytest.approx(hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b)), abs=1e-9)


def test_one_image_is_refused():
    with pytest.raises(ValueError, match="N >= 2"):
        feature_std(torch.zeros(1, 4))
