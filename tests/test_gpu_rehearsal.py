"""What would fail or wait on a GPU, found by PyTorch's fake tensors without one, as process 1 of 8:
all but DDP, faiss, inference mode, and the backward that is PyTorch's own."""
import sys
import traceback
from pathlib import Path
from unittest.mock import MagicMock, Mock, patch

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

CUDA, aten = torch.device("cuda", 0), torch.ops.aten
IMAGENET, SIZES = 1_281_167, (25_000, 50_000, 100_000)
READS = {  # operations whose result the host needs, and a result that will do
    aten._local_scalar_dense.default: lambda x: x.dtype == torch.bool,
    aten.nonzero.default: lambda x: x.new_empty(x.numel(), x.dim(), dtype=torch.long),
    aten.bincount.default: lambda x, _, size: x.new_empty(size)}


class PretendedGPU(FakeTensorMode):
    """Raises RuntimeError where devices mix or NCCL gets a CPU tensor, and collects what the host
    `waits` for: "read in f" or "upload in f", by the project's function f."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, leaves = kwargs or {}, tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        real = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        on_gpu = fakes or CUDA in [x for x in leaves if isinstance(x, torch.device)]
        if not on_gpu and func.namespace != "c10d":
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            if kwargs.get("device", CUDA) != CUDA:
                self.wait("read")
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            small = real and (real[0].nbytes <= 2 ** 16 or hasattr(real[0], "pinned"))
            if real and not (kwargs.get("non_blocking") and small):
                self.wait("upload")
        elif real:
            raise RuntimeError(f"{func} of a CPU tensor")
        elif func in READS:
            self.wait("read")
            return READS[func](*args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def wait(self, kind):
        ours = [frame.name for frame in traceback.extract_stack() if frame.name[0] != "<"
                and Path(frame.filename).parent == Path(pretrain.__file__).parent]
        self.waits.add(f"{kind} in {ours[-1]}")


def pin_memory(x):
    if x.is_cuda:
        raise RuntimeError("pin_memory of a GPU's tensor")
    x = x.clone()
    x.pinned = True
    return x


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    own = loader.generator  # a GPU's needs one
    monkeypatch.setattr(loader, "generator", lambda *key, **on: None if on else own(*key))
    monkeypatch.setattr(pretrain, "embed", torch.no_grad()(pretrain.embed.__wrapped__))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    with PretendedGPU(allow_non_fake_inputs=True) as mode:
        mode.waits = set()
        yield mode
    dist.destroy_process_group()


def images(n):
    data = loader.Arrays(np.zeros((1, 2, 2), np.uint8), [9])
    data.images = torch.empty(n, 3, 250, 250, dtype=torch.uint8, device=CUDA)
    data.device, data.labels = CUDA, torch.zeros(n, dtype=torch.long)
    return data


def views(n, size, aug="v2"):
    augment = loader.Augment(aug, size, loader.IMAGENET_STATISTICS)
    return loader.Views(images(n), torch.arange(n), 256, augment, 0, rank=1, world_size=8)


def set_up(arch):
    args = pretrain.parse_args(["DIR"])
    vars(args).update(device=CUDA, amp="bf16", batch_size=256, workers=0, num_clusters=SIZES,
                      statistics=loader.IMAGENET_STATISTICS)
    with torch.device("meta"):
        model = builder.MoCo(arch, heads=args.heads)
    return model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=CUDA)), args


@pytest.mark.filterwarnings("error:.*Disabling autocast")
def test_a_training_step_waits_only_where_its_losses_are_read(gpu):
    model, args = set_up("resnet50")
    ddp, data = Mock(side_effect=model, module=model), views(IMAGENET, 224)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1, 0.9)

    def backward(_):  # autograd's threads want a real GPU
        builder.GatherWithGradient.backward(Mock(rows=32), torch.empty(256, 2, 128, device=CUDA))
        for parameter in model.encoder_q.parameters():
            parameter.grad = torch.empty_like(parameter)
    run = dict(epoch=30, step=len(data) - 1, steps=len(data), clusterings=[
        losses.Clustering(torch.arange(IMAGENET) % size, torch.empty(size, 128, device=CUDA),
                          torch.empty(size, device=CUDA)) for size in SIZES])
    with patch.object(torch.Tensor, "backward", backward):
        pretrain.m_step(ddp, optimizer, data, run, args, MagicMock(), [], Mock())
    assert gpu.waits == {"upload in __init__", "read in exchange"}


@pytest.mark.parametrize("found, mistake", [
    ("aten.add.Tensor of a CPU tensor", lambda x: x + torch.zeros(())),
    ("c10d.allreduce_.* of a CPU tensor", lambda x: dist.all_reduce(torch.ones(1)) or x),
    ("Extra items .*read in pauc", lambda x: 0 * x if x > 1 else x)])
def test_the_rehearsal_fails_by(found, mistake, gpu, monkeypatch):
    monkeypatch.setattr(losses, "alignment", lambda p, positive, _: mistake((p - positive).mean()))
    with pytest.raises((RuntimeError, AssertionError), match=f"(?s){found}"):
        test_a_training_step_waits_only_where_its_losses_are_read(gpu)


@pytest.mark.parametrize("aug, size", [("v2", 224), ("crop", 32)])
def test_images_are_waited_for_only_at_the_start(aug, size, gpu):
    evaluation = loader.centre_batches(images(9000), size, loader.IMAGENET_STATISTICS, 1, 8)
    next(evaluation)
    gpu.waits.clear()
    batches = [x for x, _ in evaluation] + [x for x, *_ in views(512, size, aug).epoch(0)]
    assert {x.device for x in batches} == {CUDA}
    assert gpu.waits == {"upload in __init__"}


def test_e_step_and_monitor_wait_only_in_named_places(gpu, monkeypatch):
    model, args = set_up("resnet18")
    monkeypatch.setitem(sys.modules, "faiss", faiss := MagicMock(get_num_gpus=lambda: 0))
    faiss.vector_to_array.return_value = np.zeros(50_000 * 128, np.float32)  # the second
    faiss.IndexFlatL2().search.return_value = np.zeros((1000, 1)), np.zeros((1000, 1), int)
    clusterings, _ = pretrain.e_step(model, images(1000), args, 0)
    backbone = builder.backbone_of(model.encoder_q)
    pretrain.monitor.__wrapped__(backbone, images(1000), images(99), args)
    assert [x.device.type for x in clusterings[1]] == ["cpu", "cuda", "cuda"]
    assert gpu.waits == {
        "read in e_step", "read in embed", "read in kmeans", "read in concentration",
        "read in cluster_all", "read in coagulation", "read in means", "read in effective_rank",
        "read in vote", "upload in centre_batches", "upload in kmeans", "upload in concentration"}
