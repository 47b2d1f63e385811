"""Every loss against a plain loop in float64, in value and gradient, and against closed forms."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import unit

import losses

N, C, Q, P = 12, 6, 20, 9


def batch():
    """q, k, assignments with duplicates, prototypes, concentration."""
    assignments = torch.tensor([0, 3, 3, 5, 0, 8, 3, 1, 1, 7, 5, 0])
    phi = torch.linspace(0.1, 0.9, P).double()
    return unit(N, C, seed=1), unit(N, C, seed=2), assignments, unit(P, C, seed=3), phi


def same(function, plain, *inputs):
    """Both functions have the same value and the same gradient for each input."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value, expected = function(*inputs), plain(*inputs)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)  # and shape, and dtype
    weights = torch.linspace(1, 2, value.numel()).double().view(value.shape)
    gradients = (torch.autograd.grad(x, inputs, weights) for x in (value, expected))
    for a, b in zip(*gradients):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


# -------------------------------------------------------------------------------------------- NCE


@pytest.mark.parametrize("share", [None, 0.3])
def test_info_nce_without_the_excluded_keys_equals_plain_loop(share):
    q, k, *_ = batch()
    excluded = torch.rand(N, Q, generator=torch.Generator().manual_seed(0)) < (share or 0)
    excluded[2] = bool(share)  # no negative is left: nothing to lose

    def plain(q, k, queue):
        total = 0
        for i in range(N):
            positive = torch.exp(dot(q[i], k[i]) / 0.2)
            negatives = sum(torch.exp(dot(q[i], queue[:, j]) / 0.2)
                            for j in range(Q) if not excluded[i, j])
            total = total - torch.log(positive / (positive + negatives))
        return total / N
    same(lambda *x: losses.info_nce(*x, 0.2, excluded if share else None)[0], plain,
         q, k, unit(Q, C, seed=4).T)


def test_info_nce_accuracy_counts_positives_with_the_largest_logit():
    q, k = torch.eye(4), torch.eye(4)
    queue = torch.eye(4)[:, :1]  # the first query's own direction: its negative beats its key
    k[0] = torch.tensor([0.6, 0.8, 0, 0])
    assert losses.info_nce(q, k, queue, 0.2)[1].item() == 0.75


@pytest.mark.parametrize("num_negatives", [0, 2, 3, 8, None])  # 6 of 9 are touched: 3 others
def test_proto_nce_equals_plain_loop_over_its_set(num_negatives):
    q, _, assignments, prototypes, phi = batch()
    touched, others = {*assignments.tolist()}, 3 if num_negatives is None else num_negatives

    def ours(q, prototypes):
        random = torch.Generator().manual_seed(5)
        return losses.proto_nce(q, prototypes, phi, assignments, num_negatives, random)[0]

    def plain(q, prototypes):
        total = 0
        for i, s in enumerate(assignments.tolist()):
            below = sum(torch.exp(dot(q[i], prototypes[j]) / phi[j]) for j in chosen)
            total = total - torch.log(torch.exp(dot(q[i], prototypes[s]) / phi[s]) / below)
        return total / N
    chosen = took_part(ours(q, prototypes.requires_grad_()), prototypes)
    assert touched <= {*chosen} and len(chosen) == len(touched) + min(others, 3)
    same(ours, plain, q, prototypes.detach())


def took_part(loss, prototypes):
    """Those to which a loss has a gradient."""
    return torch.autograd.grad(loss, prototypes)[0].abs().sum(1).nonzero()[:, 0].tolist()


def test_proto_nce_draws_every_other_prototype_equally_often():
    q, _, assignments, prototypes, phi = batch()
    prototypes.requires_grad_()
    counts, generator = torch.zeros(P), torch.Generator().manual_seed(0)
    for _ in range(600):
        loss, _ = losses.proto_nce(q, prototypes, phi, assignments, 1, generator)
        counts[took_part(loss, prototypes)] += 1
    others = counts[[j for j in range(P) if j not in assignments.tolist()]]
    assert others.sum() == 600 and (others - 200).abs().max() < 60  # 5 standard deviations


@pytest.mark.parametrize("num_negatives", [None, 2])
def test_perfect_batch_mates_of_one_prototype_have_proto_nce_near_zero(num_negatives):
    prototypes, assignments = torch.eye(C).double(), torch.tensor([2, 2, 2])
    loss, accuracy = losses.proto_nce(prototypes[assignments], prototypes,
                                      torch.full((C,), 0.05).double(), assignments, num_negatives)
    assert 0 <= loss.item() < 1e-6 and accuracy.item() == 1


def test_identical_logits_lose_the_log_of_their_number():
    rows, assignments = F.normalize(torch.ones(Q, C).double(), dim=1), batch()[2]
    loss, _ = losses.info_nce(rows, rows, rows.T, 0.2)
    assert loss.item() == pytest.approx(math.log(Q + 1), rel=1e-12)
    loss, _ = losses.proto_nce(rows[:N], rows[:P], torch.full((P,), 0.3).double(), assignments, 2)
    assert loss.item() == pytest.approx(math.log(6 + 2), rel=1e-12)


@pytest.mark.parametrize("wrong", [-1, P])
@pytest.mark.parametrize("function", [losses.proto_nce,
                                      lambda q, c, phi, s: losses.deviations(q, c, s)])
def test_an_assignment_out_of_range_is_refused(function, wrong):
    q, _, assignments, prototypes, phi = batch()
    assignments[4] = wrong
    with pytest.raises(IndexError, match=f"assignments from .*{wrong}.* of {P} prototypes"):
        function(q, prototypes, phi, assignments)


# -------------------------------------------------------------------------------- PAUC's terms


def test_prototype_features_equal_plain_loop():
    q, _, assignments, *_ = batch()

    def plain(q):
        rows = []
        for j in (0, 1, 3, 5, 7, 8):
            total = sum(q[i] for i in range(N) if assignments[i] == j)
            rows.append(total / torch.sqrt(dot(total, total)))
        return torch.stack(rows)
    same(lambda q: losses.prototype_features(q, assignments), plain, q)


def test_deviations_equal_plain_loop():
    q, _, assignments, prototypes, _ = batch()
    same(lambda q, prototypes: losses.deviations(q, prototypes, assignments),
         lambda q, prototypes: torch.stack([q[i] - prototypes[assignments[i]] for i in range(N)]),
         q, prototypes)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_equals_plain_loop(alpha):
    def plain(p, p_positive):
        return sum(dot(a - b, a - b) ** (alpha / 2) for a, b in zip(p, p_positive)) / len(p)
    same(lambda p, p_positive: losses.alignment(p, p_positive, alpha), plain,
         unit(5, C, seed=1), unit(5, C, seed=2))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment_of_equal_features_is_zero_with_zero_gradient(alpha):
    p = unit(5, C).requires_grad_()
    loss = losses.alignment(p, p.detach().clone(), alpha)
    assert loss.item() == 0 and torch.autograd.grad(loss, p)[0].abs().max() == 0


@pytest.mark.parametrize("t", [2.0, 500.0])
def test_uniformity_equals_plain_loop(t):
    def plain(z):
        pairs = [-t * dot(z[i] - z[j], z[i] - z[j]) for i in range(7) for j in range(7) if i != j]
        largest = max(pairs).detach()  # so that exp does not underflow
        return largest + torch.log(sum(torch.exp(pair - largest) for pair in pairs) / len(pairs))
    same(lambda z: losses.uniformity(z, t), plain, unit(7, C))


def test_uniformity_of_equal_images_is_zero_with_finite_gradient():
    z = unit(1, C).repeat(4, 1).requires_grad_()
    loss = losses.uniformity(z)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("off_diagonal", [0.0, 0.3, 1.0])
def test_correlation_equals_plain_loop(off_diagonal):
    def standardised(x):
        return [(column - column.mean()) / ((column - column.mean()) ** 2).mean().add(1e-5).sqrt()
                for column in x.T]

    def plain(d, d_positive):
        a, b, total = standardised(d), standardised(d_positive), 0
        for e in range(C):
            for f in range(C):
                r = dot(a[e], b[f]) / N
                total = total + ((1 - r) ** 2 if e == f else off_diagonal * r ** 2)
        return total / C
    same(lambda *d: losses.correlation(*d, off_diagonal), plain, *batch()[:2])


def test_equal_deviations_have_the_correlation_of_their_equal_dimensions_alone():
    d = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    assert losses.correlation(d, d).item() < 1e-9
    d = d[:, :1].expand(8, 4)
    assert losses.correlation(d, d, 0.3).item() == pytest.approx(0.3 * 3, rel=1e-3)


def test_a_batch_of_one_image_gives_zero_and_a_gradient_of_zero():
    z = unit(1, C).requires_grad_()
    for loss in (losses.uniformity(z), losses.correlation(z, z.detach())):
        assert loss.item() == 0 and torch.autograd.grad(loss, z)[0].abs().max() == 0


def test_losses_keep_float32():
    def every(q, k, assignments, prototypes, phi):
        p, p_positive = (losses.prototype_features(z, assignments) for z in (q, k))
        d, d_positive = (losses.deviations(z, prototypes, assignments) for z in (q, k))
        return torch.stack([losses.info_nce(q, k, prototypes.T, 0.2)[0],
                            losses.proto_nce(q, prototypes, phi, assignments)[0],
                            losses.alignment(p, p_positive), losses.uniformity(q),
                            losses.correlation(d, d_positive)])
    values = every(*(x.float() if x.is_floating_point() else x for x in batch()))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), every(*batch()), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ figures of a clustering


def test_concentration_equals_plain_loop_with_empty_and_single_clusters():
    sizes = torch.tensor([9, 5, 1, 0, 7, 3, 2, 0] + [4] * 32)
    assignments = torch.arange(40).repeat_interleave(sizes)
    distances, expected = unit(1, len(assignments))[0].abs(), np.full(40, np.nan)
    for j, size in enumerate(sizes.tolist()):
        if size > 1:
            expected[j] = sum(distances[assignments == j]) / size / math.log(size + 10)
    expected[np.isnan(expected)] = np.nanmax(expected)
    expected = torch.from_numpy(expected.clip(*np.percentile(expected, [10, 90])))
    phi = losses.concentration(distances, assignments, 40, 0.2)
    torch.testing.assert_close(phi, 0.2 * expected / expected.mean())
    assert phi[2] == phi[3] == phi[7] == phi.max()


def test_the_prototype_level_is_of_the_members_means():
    y = unit(9, 4)
    s = torch.tensor([0, 0, 0, 3, 3, 3, 1, 1, 4])  # nobody's is 2, one image's is 4
    found, distances = losses.prototype_level(y, s, 5, 0.3), []
    for i in range(9):
        mean = sum(y[j] for j in range(9) if s[j] == s[i]) / (s == s[i]).sum()
        torch.testing.assert_close(found.prototypes[s[i]], mean / mean.norm())
        distances.append((y[i] - mean).norm())
    torch.testing.assert_close(found.prototypes[2], F.normalize(y.mean(0), dim=0))
    phi = losses.concentration(torch.stack(distances), s, 5, 0.3)
    torch.testing.assert_close(found.concentration, phi)


@pytest.mark.parametrize("duplicates, least, most", [(10, 0.2, 0.2), (5, 0.02, 0.4)])
def test_concentration_of_duplicates_alone_and_beside_others(duplicates, least, most):
    assignments = torch.arange(40) % 10
    phi = losses.concentration((assignments >= duplicates).float(), assignments, 10, 0.2)
    assert [phi.min().item(), phi.max().item()] == pytest.approx([least, most])


def test_coagulation_figures_equal_plain_loops():
    v, prototypes = unit(40, 5), unit(5, 5, seed=1)
    assignments = torch.tensor([0] * 20 + [1] * 12 + [3] * 7 + [4])
    figures = losses.coagulation(v, assignments, prototypes)

    def spread(x):
        return np.mean([((a - b) ** 2).sum().item()
                        for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    expected = np.mean([spread(v[assignments == j]) for j in (0, 1, 3)])
    shares = np.array([20, 12, 7, 1]) / 40
    assert figures == pytest.approx(dict(
        diversity=expected, separation=spread(prototypes), empty=1,
        balance=-(shares * np.log(shares)).sum() / np.log(5)))


@pytest.mark.parametrize("seed", range(5))
def test_no_figure_of_a_collapsed_clustering_is_negative_by_rounding(seed):
    one = unit(1, 128, seed=seed).float()
    figures = losses.coagulation(one.expand(50, -1), torch.arange(50) % 3, one.expand(3, -1))
    assert all(0 <= value < 1.01 for value in figures.values()), figures
    assert figures["diversity"] < 1e-5 and figures["separation"] < 1e-5
    assert losses.uniformity(one.expand(50, -1)).item() < 1e-5  # it is at most 0, but for this


def test_effective_rank_is_exp_of_the_entropy_of_the_axes():
    values = np.array([4.0, 2, 1])
    v = torch.cat([torch.tensor(values).diag(), -torch.tensor(values).diag()]) + 3
    shares = values / values.sum()
    expected = pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert losses.effective_rank(v) == expected
    assert losses.effective_rank(v.repeat_interleave(10, dim=0), most=30) == expected
    assert losses.effective_rank(torch.ones(9, 4)) == pytest.approx(1)  # a point has no axis
