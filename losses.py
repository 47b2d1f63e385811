"""The losses of PAUC (arXiv 2210.10194): tensors in, tensors out.

    L = info_nce + mean over clusterings [ proto_nce + w_a alignment + w_u uniformity + w_c correlation ]

`info_nce` is MoCo's, `proto_nce` and `concentration` are PCL's. No code for PAUC was published: `prototype_features`,
`alignment`, `uniformity` and `correlation` are this project's reading of its abstract.

N images of the global batch, C dimensions, Q queue length, P prototypes, J distinct prototypes in the batch.
Losses are 0-dim and keep the dtype and device of their input; call them in float32 or float64, outside autocast.
Assignments may be on the CPU when the rest is on a GPU: then no loss waits for the GPU.
An `accuracy` is how often the positive has the largest logit: a detached fraction in [0, 1].
"""
import math

import torch
import torch.nn.functional as F


def info_nce(q, k, queue, temperature):
    """InfoNCE with a queue (MoCo, arXiv 1911.05722, eq. 1): which of [q.k, q.queue] / temperature is the key?

    q, k: (N, C) unit rows, queue: (C, Q) unit columns. Returns loss, accuracy.
    """
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], dim=1) / temperature  # Nx(1+Q)
    return _cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def proto_nce(q, prototypes, concentration, assignments, num_negatives=None, generator=None):
    """ProtoNCE of one clustering (PCL, arXiv 2005.04966, eq. 11): -log exp(q.c_s / phi_s) / sum_{j in S} exp(q.c_j / phi_j).

    q: (N, C) unit rows, prototypes: (P, C) unit rows, concentration: (P,) phi > 0, assignments: (N,) long, each image's
    own prototype s. S is the set of distinct prototypes that the batch touches and `num_negatives` others, drawn without
    replacement from `generator`, on the device that it lives on; all P where there are no more, or with None. Returns
    loss, accuracy. An assignment of P or more raises IndexError (on a GPU: a device assert).

    S is a set, unlike in PCL's code, where two images of one prototype are each other's negatives.
    """
    num_prototypes = len(prototypes)
    if num_negatives is None or num_negatives >= num_prototypes:
        return _cross_entropy(q @ prototypes.T / concentration, assignments.to(q.device, non_blocking=True))
    ids, target = (x.to(q.device, non_blocking=True) for x in assignments.unique(return_inverse=True))
    device = generator.device if generator is not None else q.device
    rank = torch.randperm(num_prototypes, generator=generator, device=device).to(q.device)
    rank[ids] = torch.arange(-len(ids), 0, device=q.device)  # those touched come first, in order
    chosen = rank.topk(min(num_prototypes, len(ids) + num_negatives), largest=False).indices  # S
    return _cross_entropy(q @ prototypes[chosen].T / concentration[chosen], target)


def prototype_features(z, assignments):
    """Batch prototypes (after ProPos, arXiv 2111.11821): p_j = normalise(sum of the z_i assigned to j).

    z: (N, C) embeddings, assignments: (N,) long. Returns p (J, C) unit rows and ids (J,), the distinct assignments in
    ascending order. The same assignments give the rows of both views in the same order.
    """
    ids, row = assignments.unique(return_inverse=True)
    row = row.to(z.device, non_blocking=True)
    members = (torch.arange(len(ids), device=z.device)[:, None] == row).to(z.dtype)  # JxN
    return F.normalize(members @ z, dim=1), ids


def alignment(p, p_positive, alpha=2.0):
    """Prototype-level alignment, our reading after Wang & Isola (arXiv 2005.10242): mean_j ||p_j - p+_j||^alpha.

    p, p_positive: (J, C) unit rows, the features of the same prototypes in the two views. alpha >= 1.
    """
    return (p - p_positive).norm(dim=1).pow(alpha).mean()


def uniformity(p, t=2.0):
    """Prototype-level uniformity, our reading after Wang & Isola (arXiv 2005.10242):
    log mean_{j != l} exp(-t ||p_j - p_l||^2).

    p: (J, C) unit rows. At most 0; 0 when J < 2.
    """
    if len(p) < 2:
        return 0 * p.sum()
    square = p.square().sum(1)
    distances = square[:, None] + square - 2 * p @ p.T  # JxJ; torch.pdist's backward takes C times this memory
    pairs = (-t * distances).fill_diagonal_(-math.inf)
    return pairs.flatten().logsumexp(0) - math.log(len(p) * (len(p) - 1))


def correlation(p, p_positive, off_diagonal=0.3):
    """Prototype-level correlation, our reading after Barlow Twins (arXiv 2103.03230): with the columns of p and p+
    standardised over the J prototypes (biased variance, eps 1e-5) and R = p^T p+ / J, a (C, C) cross-correlation,

        1/C * [ sum_d (1 - R_dd)^2 + off_diagonal * sum_{d != e} R_de^2 ]

    p, p_positive: (J, C), the features of the same prototypes in the two views. 0 when J < 2.
    """
    if len(p) < 2:
        return 0 * p.sum()
    a, b = (F.batch_norm(x, None, None, training=True, eps=1e-5) for x in (p, p_positive))
    r = a.T @ b / len(p)  # CxC
    on = (1 - r.diagonal()).pow(2).sum()
    off = r.pow(2).sum() - r.diagonal().pow(2).sum()
    return (on + off_diagonal * off) / len(r)


@torch.no_grad()
def concentration(distances, assignments, num_prototypes, temperature):
    """The temperature of each prototype (PCL, arXiv 2005.04966, section 3.3): (P,), larger for a looser cluster.

    phi_j = (mean over members of ||v - c_j||) / log(n_j + 10). A prototype with one member or none takes the largest
    phi; phi is clipped to its 10th..90th percentile, scaled to have mean `temperature`, and never under temperature / 10.

    distances: (n,) from each image to its centroid, not squared. assignments: (n,) long, in [0, P). Keeps the dtype of
    the distances.
    """
    size = torch.bincount(assignments, minlength=num_prototypes)
    total = torch.zeros(num_prototypes, dtype=torch.float64, device=distances.device)
    total.index_add_(0, assignments, distances.double())
    phi = total / size.clamp(min=1) / torch.log(size + 10.0)
    phi = torch.where(size > 1, phi, phi.where(size > 1, 0).max())
    low, high = torch.quantile(phi, torch.tensor([0.1, 0.9], dtype=phi.dtype, device=phi.device))
    phi = phi.clamp(low, high)
    if not phi.any():  # every distance is 0
        phi += 1
    return (temperature * phi / phi.mean()).clamp(min=temperature / 10).to(distances.dtype)


def _cross_entropy(logits, target):
    accuracy = (logits.detach().argmax(1) == target).to(logits.dtype).mean()
    return F.cross_entropy(logits, target), accuracy
