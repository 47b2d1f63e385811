"""The momentum-queue model (MoCo, arXiv 1911.05722): two encoders, a queue, shuffled BN, gathering across processes.

A process group must exist, also for one process. Shapes: n images of this process, N of all of them, C dimensions,
Q queue length.
"""
import copy
import difflib

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision import models

# ---------------------------------------------------------------------------------------------------------- encoders


def build_backbone(arch, small_images=False, bn_splits=1, num_classes=1000):
    """A torchvision classifier whose last layer is `fc`, from scratch: (n, 3, H, W) -> (n, num_classes).

    small_images: the usual stem for crops under 64 pixels, a 3x3 convolution of stride 1 and no max-pool.
    bn_splits: BN statistics over so many slices of the batch. Raises ValueError with a line for the user.
    """
    known = models.list_models(module=models)
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=1) or ["resnet50"]
        raise ValueError(f"--arch {arch}: torchvision has no such classifier; did you mean {close[0]}?")
    net = models.get_model(arch, num_classes=num_classes)
    if not isinstance(getattr(net, "fc", None), nn.Linear) or hasattr(net, "aux_logits"):
        raise ValueError(f"--arch {arch}: does not end in one layer named fc; resnets, resnexts, wide resnets, regnets "
                         f"and shufflenets do")
    if small_images:
        first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
        stem = nn.Conv2d(3, first.out_channels, kernel_size=3, stride=1, padding=1, bias=first.bias is not None)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        _replace(net, lambda module: stem if module is first else module)
        if hasattr(net, "maxpool"):
            net.maxpool = nn.Identity()
    if bn_splits > 1:
        _replace(net, lambda module: SplitBatchNorm2d(module, bn_splits) if type(module) is nn.BatchNorm2d else module)
    return net


def without_head(net):
    """The same modules and weights with the identity in place of `fc`: a view that gives the backbone's features."""
    view = copy.copy(net)
    view._modules = dict(net._modules, fc=nn.Identity())
    return view


def read_backbone(checkpoint):
    """The state dict of the query encoder's backbone, without its `fc`, from whatever `torch.load` gave.

    Takes this project's checkpoints and backbone.pth, MoCo's and PCL's checkpoints, each with or without the "module."
    that DDP puts before its keys, and torchvision's own weights. Raises ValueError where it finds no weights.
    """
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    state = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if any(name.startswith("encoder_q.") for name in state):
        state = {name.removeprefix("encoder_q."): value for name, value in state.items() if name.startswith("encoder_q.")}
    state = {name: value for name, value in state.items() if name.split(".")[0] != "fc"}
    if not state:
        raise ValueError("holds no weights; give a checkpoint or backbone.pth of PAUC, or a checkpoint of MoCo or PCL")
    return state


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BN over `splits` consecutive slices of the batch, each with statistics of its own, as if on as many processes.

    The running statistics are those of the first slice, as in a run of several processes they are those of the first.
    """

    def __init__(self, bn, splits):
        super().__init__(bn.num_features, bn.eps, bn.momentum)
        self.load_state_dict(bn.state_dict())
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        first, *others = x.chunk(self.splits)
        return torch.cat([super().forward(first), *(
            F.batch_norm(part, None, None, self.weight, self.bias, training=True, eps=self.eps) for part in others)])


def _replace(module, function):
    for name, child in module.named_children():
        setattr(module, name, function(child))
        _replace(child, function)


# -------------------------------------------------------------------------------------------------------------- MoCo


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and queue. The state dict's keys are those of MoCo's own checkpoints.

    arch, small_images, bn_splits: see build_backbone. dim: C. queue_size: Q. momentum: of the key encoder. mlp: MoCo v2's
    two-layer head, else one layer.
    """

    def __init__(self, arch, dim=128, queue_size=65536, momentum=0.999, mlp=True, small_images=False, bn_splits=1):
        super().__init__()
        self.momentum = momentum
        self.encoder_q = build_backbone(arch, small_images, bn_splits, num_classes=dim)
        if mlp:
            width = self.encoder_q.fc.in_features
            self.encoder_q.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.encoder_q.fc)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(dim, queue_size))  # keys: CxQ, empty at first
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q, im_k, permutation):
        """Queries of this process's images and keys of all: q (n, C) with gradient, k (N, C) without, unit rows, in the
        queue's dtype.

        im_q, im_k: (n, 3, H, W), the two views. permutation: (N,) long, the same on every process: the order in which the
        processes' images meet in the key encoder's BN, so that a key's statistics do not give its query away.
        """
        q = F.normalize(self.encoder_q(im_q).to(self.queue.dtype), dim=1)  # queries: nxC
        with torch.no_grad():
            self.update_key_encoder()
            n, rank, device = len(im_k), dist.get_rank(), im_k.device.type
            if torch.is_autocast_enabled(device):  # what the first convolution would do: half the bytes to exchange
                im_k = im_k.to(torch.get_autocast_dtype(device))
            im_k = gather(im_k)[permutation[rank * n:(rank + 1) * n]]
            k = gather(F.normalize(self.encoder_k(im_k).to(self.queue.dtype), dim=1))  # keys: NxC, permuted
            k = torch.empty_like(k).index_copy_(0, permutation, k)
        return q, k

    @torch.no_grad()
    def update_key_encoder(self):
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, k):
        """Replace the oldest keys by k (N, C). After backward, which still needs the queue as it was."""
        size = self.queue.shape[1]
        columns = (self.queue_ptr + torch.arange(len(k), device=k.device)) % size  # on the device: nothing waits for it
        self.queue[:, columns[-size:]] = k[-size:].T
        self.queue_ptr.add_(len(k)).remainder_(size)

    @torch.no_grad()
    def share_running_statistics(self):
        """Send process 0's BN statistics to all, before any use in eval mode."""
        for name, buffer in self.named_buffers():
            if name.startswith("encoder_"):
                dist.broadcast(buffer, src=0)


# ------------------------------------------------------------------------------------------------- across processes

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch renamed it


@torch.no_grad()
def gather(x):
    """The rows of all processes, in order of rank: (n, ...) -> (N, ...). No gradient."""
    rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    _all_gather(rows, x.contiguous())
    return rows


class GatherWithGradient(torch.autograd.Function):
    """As `gather`, with a backward that sums the gradients of all processes (as VICReg's, arXiv 2105.04906).

    A loss that every process evaluates on the gathered rows so gives each process world_size times its gradient, and
    DDP's mean over processes is exact.
    """

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
