"""The losses of PAUC (arXiv 2210.10194): tensors in, tensors out.

    L = L_ins + w_u L_uniform + mean over clusterings [ w_p L_proto + w_a L_align + w_c L_corr ]

`info_nce` is MoCo's, `proto_nce` and `concentration` are PCL's. No code for PAUC was published: its
three terms are this project's reading of the abstract. There are two levels, each with its head:
InfoNCE and uniformity act on instances q, k; ProtoNCE, alignment and correlation on x, y. With one
head x is q and y is k.

N images of the global batch, C dimensions, Q queue length, P prototypes of one clustering, J of
them in the batch. Losses are 0-dim and keep their input's dtype and device; call them in float32 or
float64, outside autocast. Assignments are best on the CPU: no loss waits for a GPU then, and those
not in [0, P) raise IndexError. An `accuracy` is how often the positive's logit is the largest.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Batch(NamedTuple):
    """What one step's losses are made of, the same on every process but for `rows`."""
    q: torch.Tensor  # (N, C) queries, unit rows, with gradient: the instance level
    k: torch.Tensor  # (N, C) keys, unit rows
    x: torch.Tensor  # (N, C) as q at the prototype level; q itself with one head
    y: torch.Tensor  # (N, C) as k there
    index: torch.Tensor  # (N,) the images' indices in the data set, on the CPU
    queue: torch.Tensor  # (C, Q) older k, unit columns
    queue_index: torch.Tensor  # (Q,) the indices of their images; under 0: none
    rows: slice  # those of this process
    epoch: int
    step: int


class Clustering(NamedTuple):
    """What the E-step found for one number of prototypes."""
    assignments: torch.Tensor  # (n,) long, the prototype of every training image, on the CPU
    prototypes: torch.Tensor  # (P, C) unit rows
    concentration: torch.Tensor  # (P,) the temperature of each


# -------------------------------------------------------------------------------------------- NCE


def info_nce(q, k, queue, temperature, excluded=None):
    """InfoNCE with a queue (MoCo, arXiv 1911.05722, eq. 1): which of [q.k, q.queue] / T is the key?
    q, k: (N, C) unit rows, queue: (C, Q) unit columns. excluded: (N, Q) bool, queued keys that are
    no negatives of a query. Returns loss, accuracy."""
    negatives = q @ queue  # NxQ
    if excluded is not None:
        negatives = negatives.masked_fill(excluded, -math.inf)
    logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], dim=1) / temperature
    return _cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def proto_nce(q, prototypes, concentration, assignments, num_negatives=None, generator=None):
    """ProtoNCE of one clustering (PCL, arXiv 2005.04966, eq. 11):
    -log exp(q.c_s / phi_s) / sum_{j in S} exp(q.c_j / phi_j).

    q: (N, C) unit rows, prototypes: (P, C) unit rows, concentration: (P,) phi > 0, assignments:
    (N,) long, each image's own prototype s. S is the set (PCL's code has a list, with repetitions)
    of those that the batch touches and `num_negatives` others, drawn without replacement from
    `generator` on its device; all P if there are no more, or with None. Returns loss, accuracy."""
    num_prototypes = len(prototypes)
    _check_range(assignments, num_prototypes)
    if num_negatives is None or num_negatives >= num_prototypes:
        target = assignments.to(q.device, non_blocking=True)
        return _cross_entropy(q @ prototypes.T / concentration, target)
    ids, target = (x.to(q.device, non_blocking=True)
                   for x in assignments.unique(return_inverse=True))
    device = generator.device if generator is not None else q.device
    order = torch.randperm(num_prototypes, generator=generator, device=device).to(q.device)
    order[ids] = torch.arange(-len(ids), 0, device=q.device)  # those touched come first
    size = min(num_prototypes, len(ids) + num_negatives)
    chosen = order.topk(size, largest=False).indices  # S
    return _cross_entropy(q @ prototypes[chosen].T / concentration[chosen], target)


def _check_range(assignments, num_prototypes):
    """A negative one would be taken from the end, in silence; a GPU is not waited for."""
    if len(assignments) and not assignments.is_cuda:
        low, high = assignments.aminmax()
        if low < 0 or high >= num_prototypes:
            raise IndexError(f"assignments from {low} to {high}, of {num_prototypes} prototypes")


def _cross_entropy(logits, target):
    accuracy = (logits.detach().argmax(1) == target).to(logits.dtype).mean()
    return F.cross_entropy(logits, target), accuracy


# -------------------------------------------------------------------------------- PAUC's terms


def prototype_features(z, assignments):
    """Batch prototypes (after ProPos, arXiv 2111.11821): p_j = normalise(sum of the z_i of j).

    z: (N, C) embeddings, assignments: (N,) long. Returns p (J, C) unit rows, in the order of the
    assignments: both views of a batch have the same rows."""
    ids, row = assignments.unique(return_inverse=True)
    row = row.to(z.device, non_blocking=True)
    members = (torch.arange(len(ids), device=z.device)[:, None] == row).to(z.dtype)  # JxN
    return F.normalize(members @ z, dim=1)


def deviations(z, prototypes, assignments):
    """How each image differs from its own stored prototype: d_i = z_i - c_s(i), (N, C).
    z: (N, C) embeddings, prototypes: (P, C), assignments: (N,) long."""
    _check_range(assignments, len(prototypes))
    return z - prototypes[assignments.to(z.device, non_blocking=True)]


def alignment(p, p_positive, alpha=2.0):
    """Prototype-level alignment, our reading after Wang & Isola (arXiv 2005.10242): mean_j ||p_j -
    p+_j||^alpha, alpha 1 or more. p, p_positive: (J, C) unit rows, one prototype's in two views."""
    return (p - p_positive).norm(dim=1).pow(alpha).mean()


def uniformity(z, t=2.0):
    """Uniformity of the batch's images, our reading after Wang & Isola (arXiv 2005.10242):
    log mean_{i != l} exp(-t ||z_i - z_l||^2). z: (N, C) unit rows. At most 0; 0 when N < 2."""
    if len(z) < 2:
        return 0 * z.sum()
    square = z.square().sum(1)
    distances = square[:, None] + square - 2 * z @ z.T  # NxN; pdist's backward takes C times this
    pairs = (-t * distances).fill_diagonal_(-math.inf)
    return pairs.flatten().logsumexp(0) - math.log(len(z) * (len(z) - 1))


def correlation(d, d_positive, off_diagonal=0.3):
    """Correlation of deviations across the views, our reading after Barlow Twins (arXiv
    2103.03230): with the columns of d and d+ standardised over the images (biased variance, eps
    1e-5) and R = d^T d+ / N, a (C, C) cross-correlation,

        1/C * [ sum_e (1 - R_ee)^2 + off_diagonal * sum_{e != f} R_ef^2 ]

    d, d_positive: (N, C), the deviations of the same images in the two views. 0 when N < 2."""
    if len(d) < 2:
        return 0 * d.sum()
    a, b = (F.batch_norm(x, None, None, training=True, eps=1e-5) for x in (d, d_positive))
    r = a.T @ b / len(d)  # CxC
    on = (1 - r.diagonal()).pow(2).sum()
    off = r.pow(2).sum() - r.diagonal().pow(2).sum()
    return (on + off_diagonal * off) / len(r)


# ------------------------------------------------------------------------ figures of a clustering


@torch.no_grad()
def concentration(distances, assignments, num_prototypes, temperature):
    """The temperature of each prototype (PCL, arXiv 2005.04966, section 3.3): (P,), in the dtype of
    distances (n,), each image's to its centroid, not squared; assignments: (n,) long.

    phi_j = (mean over members of ||v - c_j||) / log(n_j + 10). A prototype with one member or none
    takes the largest phi; phi is clipped to its 10th..90th percentile, scaled to have mean
    `temperature`, and never under temperature / 10."""
    size = torch.bincount(assignments, minlength=num_prototypes)
    total = torch.zeros(num_prototypes, dtype=torch.float64, device=distances.device)
    total.index_add_(0, assignments, distances.double())
    phi = total / size.clamp(min=1) / torch.log(size + 10.0)
    phi = torch.where(size > 1, phi, phi.where(size > 1, 0).max())
    low, high = torch.quantile(phi, torch.tensor([0.1, 0.9], dtype=phi.dtype, device=phi.device))
    phi = phi.clamp(low, high)
    phi = torch.where(phi.any(), phi, 1)  # where every distance is 0
    return (temperature * phi / phi.mean()).clamp(min=temperature / 10).to(distances.dtype)


@torch.no_grad()
def prototype_level(y, assignments, num_prototypes, temperature):
    """The Clustering at the prototype level, of the instances' assignments: c_j = normalise(mean of
    the members' y), phi of the distances ||y_i - mean_j||. y: (n, C) unit rows."""
    mean = means(y, assignments, num_prototypes)
    distances = (y - mean[assignments]).norm(dim=1)
    phi = concentration(distances, assignments, num_prototypes, temperature)
    return Clustering(assignments, F.normalize(mean, dim=1), phi)


def means(v, assignments, num_prototypes):
    """The mean of each prototype's members, (P, C); where there are none, of all."""
    size = torch.bincount(assignments, minlength=num_prototypes)[:, None]
    total = v.new_zeros(num_prototypes, v.shape[1]).index_add_(0, assignments, v)
    return torch.where(size > 0, total / size.clamp(min=1), v.mean(0))


@torch.no_grad()
def coagulation(v, assignments, prototypes):
    """How far the embeddings v (n, C) have collapsed onto their prototypes (P, C): floats by name.
    diversity: mean squared distance of two members, over prototypes with two or more; separation:
    of two prototypes; balance: entropy of the sizes / log P; empty: prototypes with no member."""
    num_prototypes = len(prototypes)
    size = torch.bincount(assignments, minlength=num_prototypes)
    mean = means(v, assignments, num_prototypes)
    spread = (2 * size / (size - 1) * (1 - mean.square().sum(1)))[size > 1].clamp(min=0)
    pairs = num_prototypes * (num_prototypes - 1)
    separation = 2 * (num_prototypes ** 2 - prototypes.sum(0).square().sum()) / pairs
    entropy = torch.special.entr(size / len(v)).sum()
    return dict(diversity=spread.mean().item() if len(spread) else 0.0,
                separation=max(0.0, separation.item()),
                balance=(entropy / math.log(num_prototypes)).item(), empty=int((size == 0).sum()))


@torch.no_grad()
def effective_rank(v, most=10_000):
    """RankMe (arXiv 2210.02885): exp of the entropy of the normalised singular values of v (n, C),
    centred, evenly thinned to at most `most` rows."""
    v = v[::math.ceil(len(v) / most)].double()
    values = torch.linalg.svdvals(v - v.mean(0))
    return torch.special.entr(values / values.sum().clamp(min=1e-12)).sum().exp().item()
