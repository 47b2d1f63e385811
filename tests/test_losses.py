"""Every loss against a plain loop in float64, in value and gradient, and against closed forms."""
import math

import pytest
import torch
import torch.nn.functional as F

import losses

N, C, Q, P = 12, 6, 20, 9


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def batch():
    """q, k, assignments with duplicates, prototypes, concentration."""
    assignments = torch.tensor([0, 3, 3, 5, 0, 8, 3, 1, 1, 7, 5, 0])
    return unit(N, C, seed=1), unit(N, C, seed=2), assignments, unit(P, C, seed=3), torch.linspace(0.1, 0.9, P).double()


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


def loop_info_nce(q, k, queue, temperature):
    total = 0
    for i in range(len(q)):
        positive = torch.exp(dot(q[i], k[i]) / temperature)
        negatives = sum(torch.exp(dot(q[i], queue[:, j]) / temperature) for j in range(queue.shape[1]))
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


def loop_correlation(p, p_positive, off_diagonal):
    def standardised(x):
        columns = []
        for d in range(x.shape[1]):
            mean = sum(x[:, d]) / len(x)
            variance = sum((value - mean) ** 2 for value in x[:, d]) / len(x)
            columns.append([(value - mean) / torch.sqrt(variance + 1e-5) for value in x[:, d]])
        return columns
    a, b = standardised(p), standardised(p_positive)
    total = 0
    for d in range(len(a)):
        for e in range(len(a)):
            r = dot(a[d], b[e]) / len(p)
            total = total + ((1 - r) ** 2 if d == e else off_diagonal * r ** 2)
    return total / len(a)


def test_info_nce_equals_plain_loop():
    q, k, *_ = batch()
    queue = unit(Q, C, seed=4).T
    same(lambda q: losses.info_nce(q, k, queue, 0.2)[0], lambda q: loop_info_nce(q, k, queue, 0.2), q)


def test_info_nce_of_identical_logits_is_log_of_their_number():
    rows = F.normalize(torch.ones(4, C), dim=1)
    loss, _ = losses.info_nce(rows, rows, rows[:1].T.expand(C, Q), 0.2)
    assert loss.item() == pytest.approx(math.log(Q + 1), rel=1e-6)


def test_info_nce_accuracy_counts_positives_with_the_largest_logit():
    q = torch.eye(4)
    queue = torch.eye(4)[:, :1]  # the first query's own direction, so that its negative beats its key
    k = torch.eye(4)
    k[0] = torch.tensor([0.6, 0.8, 0, 0])
    assert losses.info_nce(q, k, queue, 0.2)[1].item() == 0.75


def test_proto_nce_over_all_prototypes_equals_plain_loop():
    q, _, assignments, prototypes, phi = batch()
    same(lambda q, c: losses.proto_nce(q, c, phi, assignments)[0],
         lambda q, c: loop_proto_nce(q, c, phi, assignments, range(P)), q, prototypes)


@pytest.mark.parametrize("num_negatives", [0, 1, 2, 3, 8])  # 6 of 9 prototypes are touched: 3 others
def test_sampled_proto_nce_equals_plain_loop_over_its_set(num_negatives):
    q, _, assignments, prototypes, phi = batch()
    prototypes.requires_grad_()
    loss, _ = losses.proto_nce(q, prototypes, phi, assignments, num_negatives, torch.Generator().manual_seed(5))
    gradient, = torch.autograd.grad(loss, prototypes)
    chosen = set(gradient.abs().sum(1).nonzero()[:, 0].tolist())  # the prototypes that took part
    touched = set(assignments.tolist())
    assert touched <= chosen and len(chosen) == len(touched) + min(num_negatives, P - len(touched))
    same(lambda q: losses.proto_nce(q, prototypes.detach(), phi, assignments, num_negatives,
                                    torch.Generator().manual_seed(5))[0],
         lambda q: loop_proto_nce(q, prototypes.detach(), phi, assignments, chosen), q)


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
    prototypes = torch.eye(C).double()
    phi = torch.full((C,), 0.05).double()
    for num_negatives in (None, 2):
        loss, accuracy = losses.proto_nce(prototypes[[2, 2, 2]], prototypes, phi, torch.tensor([2, 2, 2]), num_negatives,
                                          torch.Generator().manual_seed(0))
        assert 0 <= loss.item() < 1e-6 and accuracy.item() == 1


def test_proto_nce_of_identical_logits_is_log_of_their_number():
    q, _, assignments, _, _ = batch()
    prototypes = F.normalize(torch.ones(P, C, dtype=torch.float64), dim=1)
    loss, _ = losses.proto_nce(q, prototypes, torch.full((P,), 0.3).double(), assignments, 2, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(6 + 2), rel=1e-12)


@pytest.mark.parametrize("num_negatives", [None, 1])
def test_proto_nce_refuses_an_assignment_out_of_range(num_negatives):
    q, _, _, prototypes, phi = batch()
    with pytest.raises(IndexError):
        losses.proto_nce(q, prototypes, phi, torch.full((N,), P), num_negatives)


def test_prototype_features_equal_plain_loop():
    q, _, assignments, *_ = batch()
    weights = unit(6, C, seed=7)
    same(lambda q: (losses.prototype_features(q, assignments)[0] * weights).sum(),
         lambda q: (loop_features(q, assignments) * weights).sum(), q)
    assert losses.prototype_features(q, assignments)[1].tolist() == [0, 1, 3, 5, 7, 8]


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_equals_plain_loop(alpha):
    def plain(p, p_positive):
        return sum(dot(a - b, a - b) ** (alpha / 2) for a, b in zip(p, p_positive)) / len(p)
    same(lambda p, p_positive: losses.alignment(p, p_positive, alpha), plain, unit(5, C, seed=1), unit(5, C, seed=2))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment_of_equal_features_is_zero_with_zero_gradient(alpha):
    p = unit(5, C).requires_grad_()
    loss = losses.alignment(p, p.detach().clone(), alpha)
    assert loss.item() == 0 and torch.autograd.grad(loss, p)[0].abs().max() == 0


@pytest.mark.parametrize("t", [2.0, 500.0])
def test_uniformity_equals_plain_loop(t):
    def plain(p):
        pairs = [-t * dot(p[j] - p[l], p[j] - p[l]) for j in range(len(p)) for l in range(len(p)) if j != l]
        largest = max(pairs).detach()  # so that exp does not underflow
        return largest + torch.log(sum(torch.exp(pair - largest) for pair in pairs) / len(pairs))
    same(lambda p: losses.uniformity(p, t), plain, unit(7, C))


def test_uniformity_of_equal_features_is_zero_with_finite_gradient():
    p = unit(1, C).repeat(4, 1).requires_grad_()
    loss = losses.uniformity(p)
    assert loss.item() == pytest.approx(0, abs=1e-12) and torch.autograd.grad(loss, p)[0].isfinite().all()


@pytest.mark.parametrize("off_diagonal", [0.0, 0.005, 0.3, 1.0])
def test_correlation_equals_plain_loop(off_diagonal):
    same(lambda p, p_positive: losses.correlation(p, p_positive, off_diagonal),
         lambda p, p_positive: loop_correlation(p, p_positive, off_diagonal), unit(8, C, seed=1), unit(8, C, seed=2))


def test_correlation_of_decorrelated_equal_features_is_near_zero():
    p = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    assert losses.correlation(p, p).item() < 1e-9


def test_one_prototype_gives_zero_and_a_gradient_of_zero():
    p = unit(1, C).requires_grad_()
    for loss in (losses.uniformity(p), losses.correlation(p, p.detach())):
        assert loss.item() == 0 and torch.autograd.grad(loss, p)[0].abs().max() == 0


def test_losses_do_not_depend_on_the_order_of_the_batch():
    q, k, assignments, prototypes, phi = batch()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))

    def all_terms(q, k, s):
        (p, _), (p_positive, _) = losses.prototype_features(q, s), losses.prototype_features(k, s)
        return torch.stack([losses.proto_nce(q, prototypes, phi, s)[0], losses.alignment(p, p_positive),
                            losses.uniformity(p), losses.correlation(p, p_positive)])
    torch.testing.assert_close(all_terms(q, k, assignments), all_terms(q[order], k[order], assignments[order]))


def test_losses_keep_float32():
    q, k, assignments, prototypes, phi = (x.float() if x.is_floating_point() else x for x in batch())
    p, _ = losses.prototype_features(q, assignments)
    for loss in (losses.info_nce(q, k, prototypes.T, 0.2)[0], losses.proto_nce(q, prototypes, phi, assignments, 1)[0],
                 losses.alignment(p, -p), losses.uniformity(p), losses.correlation(p, -p)):
        assert loss.dtype == torch.float32


def loop_concentration(distances, assignments, num_prototypes, temperature):
    phi = []
    for j in range(num_prototypes):
        members = [d.item() for d, s in zip(distances, assignments) if s == j]
        phi.append(sum(members) / len(members) / math.log(len(members) + 10) if len(members) > 1 else None)
    largest = max(value for value in phi if value is not None)
    phi = sorted((largest if value is None else value, j) for j, value in enumerate(phi))
    values = [value for value, _ in phi]

    def percentile(share):
        place = share * (len(values) - 1)
        low = int(place)
        return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])
    clipped = {j: min(max(value, percentile(0.1)), percentile(0.9)) for value, j in phi}
    mean = sum(clipped.values()) / len(clipped)
    return torch.tensor([max(temperature * clipped[j] / mean, temperature / 10) for j in range(num_prototypes)])


def test_concentration_equals_plain_loop_with_empty_and_single_clusters():
    assignments = torch.tensor([0] * 9 + [1] * 5 + [2] + [4] * 7 + [5] * 3 + [6] * 2)  # 2 is single, 3 and 7 are empty
    distances = torch.rand(len(assignments), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    phi = losses.concentration(distances, assignments, 8, 0.2)
    torch.testing.assert_close(phi, loop_concentration(distances, assignments, 8, 0.2).double(), rtol=1e-6, atol=0)
    assert phi.mean().item() == pytest.approx(0.2)
    assert phi[2] == phi[3] == phi[7] == phi.max()


def test_concentration_of_duplicates_alone_is_the_temperature():
    phi = losses.concentration(torch.zeros(10), torch.arange(10) % 3, 4, 0.2)
    torch.testing.assert_close(phi, torch.full((4,), 0.2))


def test_concentration_is_never_under_a_tenth_of_the_temperature():
    assignments = torch.arange(40) % 10
    phi = losses.concentration((assignments > 4).float(), assignments, 10, 0.2)  # half of the clusters are duplicates
    assert phi.min().item() == pytest.approx(0.02) and phi.max().item() == pytest.approx(0.4)
