"""The momentum-queue model (MoCo, arXiv 1911.05722): two encoders, a queue, shuffled BN, gathering
across processes, of which there is a group also where it is one; and reading any checkpoint.

n images of this process, N of all, C dimensions, H heads, Q queue length.
"""
import copy

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision import models

from loader import UsageError

HEAD = "fc"  # what torchvision, and so MoCo's checkpoints, call the last layer
EMPTY = -1  # in place of the index of a queued key's image


# --------------------------------------------------------------------------------------- encoders


def build_backbone(arch, small_images=False, bn_splits=1):
    """A torchvision network from scratch, (n, 3, H, W) -> (n, width), and its width. small_images:
    the usual stem for crops under 64 pixels, a 3x3 convolution of stride 1 and no max-pool.
    bn_splits: BN statistics over so many slices of the batch. A network of one's own is a branch
    where `net` is made: its last layer, an nn.Linear called `fc`, and, small, its first go."""
    if arch not in models.list_models(module=models):
        raise UsageError(f"--arch {arch}: no classifier of torchvision's, as resnet50 is")
    net = models.get_model(arch)
    head = getattr(net, HEAD, None)
    if not isinstance(head, nn.Linear) or hasattr(net, "aux_logits"):
        raise UsageError(f"--arch {arch}: does not end in one layer named fc, as resnets do")
    setattr(net, HEAD, nn.Identity())
    if small_images:
        name, first = next(x for x in net.named_modules() if isinstance(x[1], nn.Conv2d))
        stem = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=first.bias is not None)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        net.set_submodule(name, stem)
        if hasattr(net, "maxpool"):
            net.maxpool = nn.Identity()
    for name, module in [*net.named_modules()]:
        if bn_splits > 1 and type(module) is nn.BatchNorm2d:
            net.set_submodule(name, SplitBatchNorm2d(module, bn_splits))
    return net, head.in_features


def with_head(net, head):
    """The same modules and weights with `head` as the last layer: a view of them."""
    view = copy.copy(net)
    view._modules = net._modules | {HEAD: head}
    return view


def backbone_of(encoder):
    """A view of an encoder that gives its backbone's features."""
    return with_head(encoder, nn.Identity())


def build_head(width, dim, mlp):
    last = nn.Linear(width, dim)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), last) if mlp else last


class TwoHeads(nn.Sequential):
    """Two heads on the same features: MoCo's own, under its usual names, and `prototype`.
    (n, width) -> (n, 2, C): the instance level and the prototype level."""

    def __init__(self, instance, prototype):
        super().__init__(*(instance if isinstance(instance, nn.Sequential) else [instance]))
        self.prototype = prototype

    def forward(self, features):
        instance = features
        for layer in [*self][:-1]:
            instance = layer(instance)
        return torch.stack([instance, self.prototype(features)], dim=1)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BN over `splits` consecutive slices of the batch, each with statistics of its own, as if on
    as many processes; the running ones are the first's, as theirs are the first process's."""

    def __init__(self, bn, splits):
        super().__init__(bn.num_features, bn.eps, bn.momentum)
        self.load_state_dict(bn.state_dict())
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        first, *others = x.chunk(self.splits)
        others = [F.batch_norm(part, None, None, self.weight, self.bias, training=True,
                               eps=self.eps) for part in others]
        return torch.cat([super().forward(first), *others])


# ------------------------------------------------------------------------------------ checkpoints

# Encoders that follow another one by momentum; where a checkpoint has both, the other is wanted.
FOLLOWERS = "encoder_k", "momentum", "target", "teacher", "ema"


def tensors(checkpoint):
    """All tensors of whatever `torch.load` gave by name, those of nested dicts joined by dots."""
    found = {}
    for name, value in checkpoint.items() if isinstance(checkpoint, dict) else ():
        if isinstance(value, torch.Tensor):
            found[str(name)] = value
        elif isinstance(value, dict):
            found |= {f"{name}.{inner}": x for inner, x in tensors(value).items()}
    return found


def load_backbone(encoder, checkpoint, path, arch):
    """Load an encoder's weights but for its head from what `torch.load` gave of the file `path`:
    the backbone is recognised by its own names behind whatever prefix, which is returned.
    UsageError says what is missing or too much."""
    state, wanted = tensors(checkpoint), backbone_of(encoder).state_dict()
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in state if name.endswith(first)]
    if not prefixes:
        raise UsageError(f"{path}: holds no backbone with a tensor {first}, as --arch {arch} has")
    prefix = max(prefixes, key=lambda prefix: (  # of equal ones the first
        sum(prefix + name in state for name in wanted),
        not any(word in prefix for word in FOLLOWERS)))
    found = {name: state[prefix + name] for name in wanted if prefix + name in state}
    layers = tuple({f"{prefix}{name.split('.')[0]}." for name in wanted})
    more = {name for name in state if name.startswith(layers)
            and name.endswith((".weight", ".bias"))} - {prefix + name for name in wanted}
    wrong = [f"{name} is missing" for name in wanted
             if name not in found and "num_batches" not in name]
    wrong += [f"{name} is {list(x.shape)}, not {list(wanted[name].shape)}"
              for name, x in found.items() if x.shape != wanted[name].shape]
    wrong += [f"{name} is one too many" for name in sorted(more)]
    if wrong:
        raise UsageError(f"{path}: its weights are not those of --arch {arch} ({wrong[0]}); name "
                         f"the --arch and --crop-size that it was trained with")
    if not all(x.isfinite().all() for x in found.values()):
        raise UsageError(f"{path}: its weights are not finite: that run has diverged")
    encoder.load_state_dict(found, strict=False)
    return f"{prefix}*"


# ------------------------------------------------------------------------------------------- MoCo


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and queue, by the names of MoCo's own checkpoints. arch,
    small_images, bn_splits: see build_backbone. dim: C. queue_size: Q. momentum: of the key
    encoder. mlp: MoCo v2's two-layer head, else one layer. heads: H, 1 or 2, see TwoHeads."""

    def __init__(self, arch, dim=128, queue_size=65536, momentum=0.999, mlp=True,
                 small_images=False, bn_splits=1, heads=1):
        super().__init__()
        self.momentum = momentum
        backbone, width = build_backbone(arch, small_images, bn_splits)
        head = build_head(width, dim, mlp)
        if heads == 2:
            head = TwoHeads(head, build_head(width, dim, mlp))
        self.encoder_q = with_head(backbone, head)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(dim, queue_size))  # keys: CxQ
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_index", torch.full((queue_size,), EMPTY))  # their images

    def forward(self, im_q, im_k, permutation):
        """Queries of this process's images and keys of all: q (n, H, C) with gradient, k (N, H, C)
        without, unit rows, in the queue's dtype. im_q, im_k: (n, 3, S, S), the two views.
        permutation: (N,) long, the same on every process: the order in which the images meet in the
        key encoder's BN, so that a key's statistics do not give its query away."""
        q = self.unit_rows(self.encoder_q(im_q))  # queries: nxHxC
        with torch.no_grad():
            self.update_key_encoder()
            n, rank, device = len(im_k), dist.get_rank(), im_k.device.type
            if torch.is_autocast_enabled(device):  # as the first convolution: half the bytes
                im_k = im_k.to(torch.get_autocast_dtype(device))
            im_k = gather(im_k)[permutation[rank * n:(rank + 1) * n]]
            k = gather(self.unit_rows(self.encoder_k(im_k)))  # keys: NxHxC, permuted
            k = torch.empty_like(k).index_copy_(0, permutation, k)
        return q, k

    def unit_rows(self, z):
        """Of what an encoder gives: (n, H, C)."""
        return F.normalize(z.to(self.queue.dtype).view(len(z), -1, len(self.queue)), dim=2)

    def parameter_groups(self):
        """What is trained; a prototype head, which has no loss at first, as a second group."""
        named = [*self.encoder_q.named_parameters()]
        groups = [[x for name, x in named if ("fc.prototype." in name) == second]
                  for second in (False, True)]
        return [dict(params=group) for group in groups if group]

    @torch.no_grad()
    def update_key_encoder(self):
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()),
                             1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, k, index):
        """Replace the oldest keys by k (N, C) of the images index (N,). After backward, which still
        needs the queue as it was. Nothing waits for the device."""
        size = self.queue.shape[1]
        columns = (self.queue_ptr + torch.arange(len(k), device=k.device)) % size
        self.queue[:, columns[-size:]] = k[-size:].T
        self.queue_index[columns[-size:]] = index[-size:].to(k.device, non_blocking=True)
        self.queue_ptr.add_(len(k)).remainder_(size)


# ------------------------------------------------------------------------------- across processes

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed


@torch.no_grad()
def gather(x):
    """The rows of all processes, in order of rank: (n, ...) -> (N, ...). No gradient."""
    rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    _all_gather(rows, x.contiguous())
    return rows


class GatherWithGradient(torch.autograd.Function):
    """As `gather`, with a backward that sums the gradients of all processes (as VICReg's, arXiv
    2105.04906): where each has the same loss of all rows, DDP's mean over processes is exact."""

    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows:][:ctx.rows]


gather_with_gradient = GatherWithGradient.apply
