"""The momentum-queue model, and that several processes are one."""
import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

import builder
import losses
import pretrain


def small_moco(seed=0, dim=8, queue_size=20, **options):
    torch.manual_seed(seed)
    model = builder.MoCo("shufflenet_v2_x0_5", dim, queue_size, momentum=0.9, small_images=True, **options)
    model.queue.copy_(F.normalize(torch.randn(dim, queue_size), dim=0))
    return model


def test_queue_wraps_around(group):
    model = small_moco(queue_size=7)
    keys = F.normalize(torch.randn(12, 8), dim=1)
    before = model.queue.clone()
    model.enqueue(keys[:5])
    assert torch.equal(model.queue[:, :5], keys[:5].T) and torch.equal(model.queue[:, 5:], before[:, 5:])
    model.enqueue(keys[5:10])
    assert torch.equal(model.queue, keys[[7, 8, 9, 3, 4, 5, 6]].T) and model.queue_ptr.item() == 3


def test_a_batch_larger_than_the_queue_leaves_its_last_keys(group):
    model = small_moco(queue_size=4)
    keys = F.normalize(torch.randn(10, 8), dim=1)
    model.enqueue(keys)
    assert torch.equal(model.queue, keys[[8, 9, 6, 7]].T) and model.queue_ptr.item() == 2


def test_key_encoder_moves_by_one_minus_momentum(group):
    model = small_moco()
    with torch.no_grad():
        for parameter in model.encoder_q.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = [0.9 * k + 0.1 * q for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters())]
    model.update_key_encoder()
    for k, value in zip(model.encoder_k.parameters(), expected):
        torch.testing.assert_close(k, value)
        assert not k.requires_grad


def test_keys_come_back_in_the_order_of_their_images(group):
    model = small_moco().eval()  # without batch statistics each image has a key of its own
    images = torch.randn(6, 3, 8, 8)
    _, k = model(images, images, torch.tensor([3, 1, 5, 0, 2, 4]))
    torch.testing.assert_close(k, F.normalize(model.encoder_k(images), dim=1))
    assert not k.requires_grad


def test_state_dict_has_mocos_keys(group):
    model = builder.MoCo("resnet18", dim=8, queue_size=16)
    keys = model.state_dict().keys()
    assert {"queue", "queue_ptr", "encoder_q.conv1.weight", "encoder_k.layer4.1.bn2.running_mean", "encoder_q.fc.0.weight",
            "encoder_k.fc.2.bias"} <= keys
    assert all(key.startswith(("encoder_q.", "encoder_k.")) or key in ("queue", "queue_ptr") for key in keys)
    assert "encoder_q.fc.weight" in builder.MoCo("resnet18", dim=8, queue_size=16, mlp=False).state_dict()


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v2_x0_5", "regnet_x_400mf"])
def test_small_image_stem_keeps_the_resolution(arch, group):
    net = builder.build_backbone(arch, small_images=True)
    sizes = []
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.MaxPool2d)):
            module.register_forward_hook(lambda module, _, out: sizes.append(tuple(out.shape[-2:])))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 1000)
    assert sizes[0] == (32, 32) and min(sizes)[0] >= 2


@pytest.mark.parametrize("arch", ["vgg11", "vit_b_16", "densenet121", "googlenet", "inception_v3"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nets_that_do_not_end_in_fc_are_refused(arch):
    with pytest.raises(ValueError, match=f"--arch {arch}: does not end in one layer named fc"):
        builder.build_backbone(arch)


def test_without_head_shares_modules_and_keeps_the_head(group):
    net = builder.build_backbone("shufflenet_v2_x0_5", small_images=True, num_classes=5).eval()
    images = torch.randn(2, 3, 8, 8)
    features = builder.without_head(net)(images)
    assert features.shape == (2, 1024)
    torch.testing.assert_close(net.fc(features), net(images))


def test_split_batch_norm_is_batch_norm_of_each_slice():
    bn = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        bn.weight.copy_(torch.rand(3))
    slices, split = copy.deepcopy(bn), builder.SplitBatchNorm2d(bn, 2)
    x = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(split(x), torch.cat([bn(x[:4]), slices(x[4:])]))
    torch.testing.assert_close(split.running_var, bn.running_var)  # the first slice's
    torch.testing.assert_close(split.eval()(x), bn.eval()(x))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", ["moco", "backbone"])
def test_read_backbone_takes_every_layout(prefix, layout):
    weights = models.resnet18(num_classes=4).state_dict()
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    if layout == "moco":
        state = {f"{prefix}encoder_q.{name}": value for name, value in weights.items()}
        state |= {f"{prefix}encoder_k.{name}": value * 0 for name, value in weights.items()}
        state |= {f"{prefix}encoder_q.fc.0.weight": torch.zeros(2), f"{prefix}queue": torch.zeros(2, 2)}
        checkpoint = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    else:
        checkpoint = {f"{prefix}{name}": value for name, value in weights.items()} | {f"{prefix}fc.bias": torch.zeros(4)}
    read = builder.read_backbone(checkpoint)
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("thing", [{}, [], "text", {"state_dict": {}}, {"epoch": 3}])
def test_read_backbone_refuses_what_holds_no_weights(thing):
    with pytest.raises(ValueError, match="holds no weights"):
        builder.read_backbone(thing)


# ------------------------------------------------------------------------- several processes are one with the whole batch

WORLD, N = 2, 12


def train_two_steps(rank, world_size, bn_splits, path):
    """Two optimizer steps of the whole loss in float64 on fixed data; saves what process `rank` has at the end."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{path}/meet{world_size}", rank=rank, world_size=world_size)
    args = pretrain.parse_args(["--num-negatives", "3", "--temperature", "0.3"])
    args.device = torch.device("cpu")
    torch.set_default_dtype(torch.float64)
    model = small_moco(bn_splits=bn_splits)
    model.train()
    ddp = DistributedDataParallel(model, **pretrain.NO_BUFFERS)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1, momentum=0.9)
    fixed = torch.Generator().manual_seed(1)
    clusterings = [(torch.randint(0, size, (40,), generator=fixed),
                    F.normalize(torch.randn(size, 8, generator=fixed).double(), dim=1),
                    0.1 + torch.rand(size, generator=fixed).double()) for size in (11, 17)]
    rows = slice(rank * N // world_size, (rank + 1) * N // world_size)
    result = []
    for step in range(2):
        im_q, im_k = torch.randn(2, N, 3, 8, 8, generator=fixed).double()
        index, permutation = torch.randperm(40, generator=fixed)[:N], torch.randperm(N, generator=fixed)
        q, k = ddp(im_q[rows], im_k[rows], permutation)
        loss, terms = pretrain.pauc(q, k, index, model.queue, clusterings, args, epoch=3, step=step)
        optimizer.zero_grad()
        loss.backward()
        report = torch.stack([loss.detach(), *(term.detach().double() for term in terms.values())])
        dist.all_reduce(report)
        gradients = [parameter.grad.clone() for parameter in model.encoder_q.parameters()]
        optimizer.step()
        model.enqueue(k)
        result += [report / world_size, gradients, model.queue.clone(), model.queue_ptr.clone()]
    model.share_running_statistics()
    torch.save((result, model.state_dict()), path / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    mp.spawn(train_two_steps, (WORLD, 1, tmp_path), WORLD)
    train_two_steps(0, 1, WORLD, tmp_path)  # BN over the same groups
    one = torch.load(tmp_path / "1-0.pt")
    for rank in range(WORLD):
        several = torch.load(tmp_path / f"2-{rank}.pt")
        for a, b in zip(several[0], one[0]):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        for name, value in one[1].items():
            torch.testing.assert_close(several[1][name], value, rtol=1e-8, atol=1e-10, msg=lambda text: f"{name}: {text}")


def gather_rows(rank, world_size, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=world_size)
    x = torch.full((2, 3), float(rank), requires_grad=True)
    rows = builder.gather_with_gradient(x)
    assert rows[:, 0].tolist() == [0, 0, 1, 1]
    (rows * torch.arange(4.0)[:, None] * (rank + 1)).sum().backward()  # a different loss on each process
    assert x.grad[:, 0].tolist() == [3 * (2 * rank), 3 * (2 * rank + 1)]  # the sum of both losses' gradients
    dist.destroy_process_group()


def test_gather_sums_the_gradients_of_all_processes(tmp_path):
    mp.spawn(gather_rows, (WORLD, tmp_path), WORLD)


def test_the_prototype_terms_reach_every_parameter_of_the_query_encoder(group):
    model = small_moco()
    args = pretrain.parse_args([])
    q = F.normalize(model.encoder_q(torch.randn(N, 3, 8, 8)), dim=1)
    k = F.normalize(torch.randn(N, 8), dim=1)
    clustering = torch.arange(N) % 4, F.normalize(torch.randn(4, 8), dim=1), torch.full((4,), 0.2)
    terms = pretrain.prototype_terms(q, k, *clustering, args, None)
    for name in ("loss_proto", "loss_align", "loss_uniform", "loss_corr"):
        gradients = torch.autograd.grad(terms[name], list(model.encoder_q.parameters()), retain_graph=True, allow_unused=True)
        assert all(gradient is not None for gradient in gradients), name


def test_the_loss_is_the_weighted_sum_of_its_terms(group):
    model, args = small_moco(), pretrain.parse_args("--temperature 0.2 --align 0.5 --uniform 0 --corr 3".split())
    args.device = torch.device("cpu")
    q, k = (F.normalize(torch.randn(N, 8), dim=1) for _ in range(2))
    clusterings = [(torch.arange(N) % size, F.normalize(torch.randn(size, 8), dim=1), torch.full((size,), 0.2))
                   for size in (4, 6)]
    loss, terms = pretrain.pauc(q, k, torch.arange(N), model.queue, clusterings, args, 0, 0)
    assert "loss_uniform" not in terms
    expected = losses.info_nce(q, k, model.queue, 0.2)[0]
    for assignments, prototypes, phi in clusterings:
        (p, _), (p_positive, _) = (losses.prototype_features(z, assignments) for z in (q, k))
        expected += (losses.proto_nce(q, prototypes, phi, assignments)[0] + 0.5 * losses.alignment(p, p_positive)
                     + 3 * losses.correlation(p, p_positive)) / 2
    torch.testing.assert_close(loss, expected)
