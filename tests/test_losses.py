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
    assert value.shape == () and value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs)):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def loop_info_nce(q, k, queue, temperature, excluded):
    total = 0
    for i in range(len(q)):
        positive = torch.exp(dot(q[i], k[i]) / temperature)
        negatives = sum(torch.exp(dot(q[i], queue[:, j]) / temperature)
                        for j in range(queue.shape[1]) if not excluded[i, j])
        total = total - torch.log(positive / (positive + negatives))
    return total / len(q)


def loop_proto_nce(q, prototypes, phi, assignments, chosen):
    total = 0
    for i, s in enumerate(assignments.tolist()):
        below = sum(torch.exp(dot(q[i], prototypes[j]) / phi[j]) for j in chosen)
        total = total - torch.log(torch.exp(dot(q[i], prototypes[s]) / phi[s]) / below)
    return total / len(q)


def loop_features(z, assignments):
    rows = []
    for j in sorted(set(assignments.tolist())):
        total = sum(z[i] for i in range(len(z)) if assignments[i] == j)
        rows.append(total / torch.sqrt(dot(total, total)))
    return torch.stack(rows)


def loop_deviations(z, prototypes, assignments):
    return torch.stack([x - prototypes[s] for x, s in zip(z, assignments.tolist())])


def loop_uniformity(z, t):
    pairs = [-t * dot(z[i] - z[j], z[i] - z[j])
             for i in range(len(z)) for j in range(len(z)) if i != j]
    largest = max(pairs).detach()  # so that exp does not underflow
    return largest + torch.log(sum(torch.exp(pair - largest) for pair in pairs) / len(pairs))


def loop_correlation(d, d_positive, off_diagonal):
    def standardised(x):
        return [(column - column.mean()) / ((column - column.mean()) ** 2).mean().add(1e-5).sqrt()
                for column in x.T]
    a, b = standardised(d), standardised(d_positive)
    total = 0
    for e in range(len(a)):
        for f in range(len(a)):
            r = dot(a[e], b[f]) / len(d)
            total = total + ((1 - r) ** 2 if e == f else off_diagonal * r ** 2)
    return total / len(a)


# -------------------------------------------------------------------------------------------- NCE


@pytest.mark.parametrize("share", [None, 0.3])
def test_info_nce_without_the_excluded_keys_equals_plain_loop(share):
    q, k, *_ = batch()
    queue = unit(Q, C, seed=4).T
    excluded = torch.rand(N, Q, generator=torch.Generator().manual_seed(0)) < (share or 0)
    excluded[2] = bool(share)  # no negative is left: nothing to lose
    same(lambda *x: losses.info_nce(*x, 0.2, excluded if share else None)[0],
         lambda *x: loop_info_nce(*x, 0.2, excluded), q, k, queue)


def test_info_nce_of_identical_logits_is_log_of_their_number():
    rows = F.normalize(torch.ones(4, C), dim=1)
    loss, _ = losses.info_nce(rows, rows, rows[:1].T.expand(C, Q), 0.2)
    assert loss.item() == pytest.approx(math.log(Q + 1), rel=1e-6)


def test_info_nce_accuracy_counts_positives_with_the_largest_logit():
    q, k = torch.eye(4), torch.eye(4)
    queue = torch.eye(4)[:, :1]  # the first query's own direction: its negative beats its key
    k[0] = torch.tensor([0.6, 0.8, 0, 0])
    assert losses.info_nce(q, k, queue, 0.2)[1].item() == 0.75


def test_proto_nce_over_all_prototypes_equals_plain_loop():
    q, _, assignments, prototypes, phi = batch()
    same(lambda q, c: losses.proto_nce(q, c, phi, assignments)[0],
         lambda q, c: loop_proto_nce(q, c, phi, assignments, range(P)), q, prototypes)


@pytest.mark.parametrize("num_negatives", [0, 1, 2, 3, 8])  # 6 of 9 are touched: 3 others
def test_sampled_proto_nce_equals_plain_loop_over_its_set(num_negatives):
    q, _, assignments, prototypes, phi = batch()

    def sampled(q, prototypes):
        random = torch.Generator().manual_seed(5)
        return losses.proto_nce(q, prototypes, phi, assignments, num_negatives, random)[0]
    prototypes.requires_grad_()
    gradient, = torch.autograd.grad(sampled(q, prototypes), prototypes)
    chosen = set(gradient.abs().sum(1).nonzero()[:, 0].tolist())  # those that took part
    touched = set(assignments.tolist())
    assert touched <= chosen and len(chosen) == len(touched) + min(num_negatives, P - len(touched))
    same(sampled, lambda q, c: loop_proto_nce(q, c, phi, assignments, chosen),
         q, prototypes.detach())


def test_proto_nce_draws_every_other_prototype_equally_often():
    q, _, assignments, prototypes, phi = batch()
    prototypes.requires_grad_()
    counts, generator = torch.zeros(P), torch.Generator().manual_seed(0)
    for _ in range(600):
        loss, _ = losses.proto_nce(q, prototypes, phi, assignments, 1, generator)
        counts += torch.autograd.grad(loss, prototypes)[0].abs().sum(1) > 0
    others = counts[[j for j in range(P) if j not in assignments.tolist()]]
    assert others.sum() == 600 and (others - 200).abs().max() < 60  # 5 standard deviations


def test_perfect_batch_mates_of_one_prototype_have_proto_nce_near_zero():
    prototypes, assignments = torch.eye(C).double(), torch.tensor([2, 2, 2])
    phi = torch.full((C,), 0.05).double()
    for num_negatives in (None, 2):
        loss, accuracy = losses.proto_nce(prototypes[assignments], prototypes, phi, assignments,
                                          num_negatives, torch.Generator().manual_seed(0))
        assert 0 <= loss.item() < 1e-6 and accuracy.item() == 1


def test_proto_nce_of_identical_logits_is_log_of_their_number():
    q, _, assignments, *_ = batch()
    prototypes = F.normalize(torch.ones(P, C).double(), dim=1)
    loss, _ = losses.proto_nce(q, prototypes, torch.full((P,), 0.3).double(), assignments, 2,
                               torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(6 + 2), rel=1e-12)


@pytest.mark.parametrize("wrong", [-1, P])
@pytest.mark.parametrize("function", [
    lambda q, c, phi, s: losses.proto_nce(q, c, phi, s),
    lambda q, c, phi, s: losses.proto_nce(q, c, phi, s, 1),
    lambda q, c, phi, s: losses.deviations(q, c, s)])
def test_an_assignment_out_of_range_is_refused(function, wrong):
    q, _, assignments, prototypes, phi = batch()
    assignments[4] = wrong
    with pytest.raises(IndexError, match=f"assignments from .*{wrong}.* of {P} prototypes"):
        function(q, prototypes, phi, assignments)


# -------------------------------------------------------------------------------- PAUC's terms


def test_prototype_features_equal_plain_loop():
    q, _, assignments, *_ = batch()
    weights = unit(6, C, seed=7)
    same(lambda q: (losses.prototype_features(q, assignments)[0] * weights).sum(),
         lambda q: (loop_features(q, assignments) * weights).sum(), q)
    assert losses.prototype_features(q, assignments)[1].tolist() == [0, 1, 3, 5, 7, 8]


def test_deviations_equal_plain_loop():
    q, _, assignments, prototypes, _ = batch()
    weights = unit(N, C, seed=7)
    same(lambda q: (losses.deviations(q, prototypes, assignments) * weights).sum(),
         lambda q: (loop_deviations(q, prototypes, assignments) * weights).sum(), q)


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
    same(lambda z: losses.uniformity(z, t), lambda z: loop_uniformity(z, t), unit(7, C))


def test_uniformity_of_equal_images_is_zero_with_finite_gradient():
    z = unit(1, C).repeat(4, 1).requires_grad_()
    loss = losses.uniformity(z)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("off_diagonal", [0.0, 0.005, 0.3, 1.0])
def test_correlation_of_deviations_equals_plain_loop(off_diagonal):
    q, k, assignments, prototypes, _ = batch()

    def term(q, k):
        d, d_positive = (losses.deviations(z, prototypes, assignments) for z in (q, k))
        return losses.correlation(d, d_positive, off_diagonal)

    def plain(q, k):
        d, d_positive = (loop_deviations(z, prototypes, assignments) for z in (q, k))
        return loop_correlation(d, d_positive, off_diagonal)
    same(term, plain, q, k)


def test_correlation_of_decorrelated_equal_deviations_is_near_zero():
    d = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    assert losses.correlation(d, d).item() < 1e-9


def test_correlation_of_equal_dimensions_is_their_share_of_the_off_diagonal():
    d = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).double().expand(50, 4)
    assert losses.correlation(d, d, 0.3).item() == pytest.approx(0.3 * 3, rel=1e-3)


def test_a_batch_of_one_image_gives_zero_and_a_gradient_of_zero():
    z = unit(1, C).requires_grad_()
    for loss in (losses.uniformity(z), losses.correlation(z, z.detach())):
        assert loss.item() == 0 and torch.autograd.grad(loss, z)[0].abs().max() == 0


# -------------------------------------------------------------------------------------- all of them


def every_loss(q, k, assignments, prototypes, phi):
    (p, _), (p_positive, _) = (losses.prototype_features(z, assignments) for z in (q, k))
    d, d_positive = (losses.deviations(z, prototypes, assignments) for z in (q, k))
    return torch.stack([losses.info_nce(q, k, prototypes.T, 0.2)[0],
                        losses.proto_nce(q, prototypes, phi, assignments)[0],
                        losses.alignment(p, p_positive), losses.uniformity(q),
                        losses.correlation(d, d_positive)])


def test_losses_do_not_depend_on_the_order_of_the_batch():
    q, k, assignments, prototypes, phi = batch()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(every_loss(q, k, assignments, prototypes, phi),
                               every_loss(q[order], k[order], assignments[order], prototypes, phi))


def test_losses_keep_float32():
    values = every_loss(*(x.float() if x.is_floating_point() else x for x in batch()))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), every_loss(*batch()), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ figures of a clustering


def loop_concentration(distances, assignments, num_prototypes, temperature):
    phi = np.full(num_prototypes, np.nan)
    for j in range(num_prototypes):
        members = distances[assignments == j]
        if len(members) > 1:
            phi[j] = sum(members) / len(members) / math.log(len(members) + 10)
    phi[np.isnan(phi)] = np.nanmax(phi)
    phi = phi.clip(*np.percentile(phi, [10, 90]))
    return torch.tensor([max(temperature * x / phi.mean(), temperature / 10) for x in phi])


def test_concentration_equals_plain_loop_with_empty_and_single_clusters():
    sizes = torch.tensor([9, 5, 1, 0, 7, 3, 2, 0] + [4] * 32)
    assignments = torch.arange(40).repeat_interleave(sizes)
    distances = unit(1, len(assignments))[0].abs()
    phi = losses.concentration(distances, assignments, 40, 0.2)
    torch.testing.assert_close(phi, loop_concentration(distances, assignments, 40, 0.2))
    assert phi.mean().item() == pytest.approx(0.2) and phi[2] == phi[3] == phi[7] == phi.max()


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


def test_concentration_of_duplicates_alone_is_the_temperature():
    phi = losses.concentration(torch.zeros(10), torch.arange(10) % 3, 4, 0.2)
    torch.testing.assert_close(phi, torch.full((4,), 0.2))


def test_concentration_is_never_under_a_tenth_of_the_temperature():
    assignments = torch.arange(40) % 10  # half of the clusters are duplicates
    phi = losses.concentration((assignments > 4).float(), assignments, 10, 0.2)
    assert phi.min().item() == pytest.approx(0.02) and phi.max().item() == pytest.approx(0.4)


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


def test_effective_rank_of_a_point_is_one():
    assert losses.effective_rank(torch.ones(9, 4)) == pytest.approx(1)


def test_effective_rank_of_unequal_axes_is_exp_of_their_entropy():
    values = np.array([4.0, 2, 1])
    v = torch.cat([torch.tensor(values).diag(), -torch.tensor(values).diag()]) + 3
    shares = values / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert losses.effective_rank(v) == pytest.approx(expected)
    assert losses.effective_rank(v.repeat_interleave(10, dim=0), most=30) == pytest.approx(expected)
