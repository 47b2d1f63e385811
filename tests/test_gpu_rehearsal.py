"""What would fail or wait on a GPU, found by PyTorch's fake tensors without one, as process 1 of 8.

Not rehearsed are DDP, faiss, pinned memory, inference mode, and the backward that is PyTorch's own.
"""
import sys
import traceback
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

import builder
import loader
import losses
import pretrain

CUDA, IMAGENET, aten = torch.device("cuda", 0), 1_281_167, torch.ops.aten
READS = {  # operations whose result the host needs, and a result that will do
    aten._local_scalar_dense.default: lambda x: x.dtype == torch.bool,
    aten.nonzero.default: lambda x: x.new_empty(x.numel(), x.dim(), dtype=torch.long),
    aten.bincount.default: lambda x, _, size: x.new_empty(size)}


class PretendedGPU(FakeTensorMode):
    """Raises RuntimeError where devices mix or NCCL gets a CPU tensor, and collects what the host
    `waits` for: "read in f" or "upload in f", by the project's function f."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, leaves = kwargs or {}, tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        real = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        if real and func.namespace == "c10d":
            raise RuntimeError(f"{func} of a CPU tensor")
        if not fakes and CUDA not in [x for x in leaves if isinstance(x, torch.device)]:
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            if kwargs.get("device", CUDA) != CUDA:
                self.wait("read")
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            if real and not (kwargs.get("non_blocking") and real[0].nbytes <= 2 ** 16):
                self.wait("upload")  # what is larger would have to be pinned
        elif real:
            raise RuntimeError(f"{func} of CPU and CUDA tensors")
        elif func in READS:
            self.wait("read")
            return READS[func](*args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def wait(self, kind):
        ours = [frame.name for frame in traceback.extract_stack() if frame.name[0] != "<"
                and Path(frame.filename).parent == Path(pretrain.__file__).parent]
        self.waits.add(f"{kind} in {ours[-1]}")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(pretrain, "generator", lambda *_: None)  # a GPU's own needs one
    monkeypatch.setattr(pretrain, "embed", torch.no_grad()(pretrain.embed.__wrapped__))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    with PretendedGPU() as mode:
        yield mode
    dist.destroy_process_group()


def images(n):
    data = loader.Arrays(np.zeros((1, 2, 2), np.uint8), [9])
    data.images = torch.empty(n, 3, 250, 250, dtype=torch.uint8, device=CUDA)
    data.labels = torch.zeros(n, dtype=torch.long)
    return data


def views(n, aug, size):
    batches = loader.Batches(torch.arange(n), 256, seed=0, rank=1, world_size=8)
    return loader.Views(images(n), batches, loader.Augment(aug, size, ((0,) * 3, (1,) * 3)), CUDA)


def set_up(arch, **values):
    args = pretrain.parse_args(["DIR"])
    vars(args).update(dict(device=CUDA, amp="bf16", batch_size=256, workers=0) | values)
    with torch.device("meta"):
        model = builder.MoCo(arch)
    return model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=CUDA)), args


@pytest.mark.filterwarnings("error:.*Disabling autocast")
def test_a_training_step_waits_only_where_its_losses_are_read(gpu):
    (model, args), steps = set_up("resnet50"), IMAGENET // 256
    optimizer, scaler = torch.optim.SGD(model.encoder_q.parameters(), 0.1, 0.9), MagicMock()

    def backward():
        builder.GatherWithGradient.backward(Mock(rows=32), torch.empty(256, 128, device=CUDA))
        for parameter in model.encoder_q.parameters():
            parameter.grad = torch.empty_like(parameter)
    scaler.scale().backward, scaler.step = backward, lambda optimizer: optimizer.step()
    run = dict(epoch=30, step=steps - 1, steps=steps, clusterings=[
        losses.Clustering(torch.arange(IMAGENET) % size, torch.empty(size, 128, device=CUDA),
                          torch.empty(size, device=CUDA)) for size in (25_000, 50_000, 100_000)])
    pretrain.m_step(Mock(side_effect=model, module=model), optimizer, scaler,
                    views(IMAGENET, "v2", 224), run, args, MagicMock(), Mock())
    assert gpu.waits == {"upload in __init__", "read in read_report"}


@pytest.mark.parametrize("mistake, error, what", [
    (lambda x: x + torch.zeros(()), RuntimeError, "aten.add.Tensor of CPU and CUDA"),
    (lambda x: dist.all_reduce(torch.ones(1)) or x, RuntimeError, "c10d.allreduce_.* of a CPU"),
    (lambda x: x / x.detach().item(), AssertionError, "read in add"),
    (lambda x: 0 * x if x > 1 else x, AssertionError, "read in add"),
], ids=["a term on the CPU", "a collective on the CPU", "item", "if"])
def test_the_rehearsal_fails_by(mistake, error, what, gpu, monkeypatch):
    monkeypatch.setattr(losses, "alignment", lambda p, positive, _: mistake((p - positive).mean()))
    with pytest.raises(error, match=what):
        test_a_training_step_waits_only_where_its_losses_are_read(gpu)


@pytest.mark.parametrize("aug, size", [(x, y) for x in ("v1", "v2", "crop") for y in (32, 224)])
def test_images_are_waited_for_only_at_the_start(aug, size, gpu):
    evaluation = loader.evaluation(images(1000), size, CUDA, 50, rank=1, world_size=8)
    next(evaluation)
    gpu.waits.clear()
    batches = [x for x, _ in evaluation] + [x for x, *_ in views(512, aug, size).epoch(0)]
    assert {x.device for x in batches} == {CUDA}
    assert gpu.waits == {"upload in __init__"}


def test_e_step_and_monitor_wait_only_in_named_places(gpu, monkeypatch):
    model, args = set_up("resnet18", num_clusters=(25, 50, 100), kmeans_threads=None)
    faiss = MagicMock(get_num_gpus=lambda: 0)
    faiss.vector_to_array.return_value = np.zeros(50 * 128, np.float32)  # the second of three
    faiss.IndexFlatL2().search.return_value = np.zeros((1000, 1)), np.zeros((1000, 1), int)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    clusterings, _ = pretrain.e_step(model, images(1000), args, 0)
    pretrain.knn.__wrapped__(builder.backbone_of(model.encoder_q), images(1000), images(99), args)
    assert [x.device.type for x in clusterings[1]] == ["cpu", "cuda", "cuda"]
    assert gpu.waits == {
        "read in e_step", "read in kmeans", "read in concentration", "read in cluster",
        "read in coagulation", "read in effective_rank", "read in vote",
        "upload in evaluation", "upload in kmeans", "upload in concentration"}
