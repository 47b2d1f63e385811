"""The momentum-queue model, the loss made of it, and that several processes are one."""
import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import clusterings, in_processes, unit
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

import builder
import losses
import pretrain


def small_moco(seed=0, dim=8, queue_size=20, arch="shufflenet_v2_x0_5", **options):
    torch.manual_seed(seed)
    model = builder.MoCo(arch, dim, queue_size, momentum=0.9, small_images=True, **options)
    model.queue.copy_(F.normalize(torch.randn(dim, queue_size), dim=0))
    return model


# ---------------------------------------------------------------------------------------- the queue


@pytest.fixture
def queue_of_seven():
    with torch.device("meta"):
        model = builder.MoCo("shufflenet_v2_x0_5", dim=8, queue_size=7)
    for name in ("queue", "queue_ptr", "queue_index"):
        setattr(model, name, torch.zeros_like(getattr(model, name), device="cpu"))
    model.queue_index.fill_(builder.EMPTY)
    return model


def test_the_queue_wraps_around_and_its_images_with_it(queue_of_seven):
    model, keys, images = queue_of_seven, unit(12, 8).float(), torch.arange(100, 112)
    model.enqueue(keys[:5], images[:5])
    assert torch.equal(model.queue[:, :5], keys[:5].T) and not model.queue[:, 5:].any()
    assert model.queue_index.tolist() == [100, 101, 102, 103, 104] + 2 * [builder.EMPTY]
    model.enqueue(keys[5:10], images[5:10])
    assert torch.equal(model.queue, keys[[7, 8, 9, 3, 4, 5, 6]].T)
    assert model.queue_index.tolist() == [107, 108, 109, 103, 104, 105, 106]
    assert model.queue_ptr.item() == 3


def test_a_batch_larger_than_the_queue_leaves_its_last_keys(queue_of_seven):
    model, keys = queue_of_seven, unit(10, 8).float()
    model.enqueue(keys, torch.arange(10))
    assert torch.equal(model.queue, keys[[7, 8, 9, 3, 4, 5, 6]].T)
    assert model.queue_index.tolist() == [7, 8, 9, 3, 4, 5, 6] and model.queue_ptr.item() == 3


def test_a_new_queue_is_empty():
    model = builder.MoCo("shufflenet_v2_x0_5", dim=8, queue_size=7)
    assert model.queue_index.tolist() == 7 * [builder.EMPTY]


def test_a_moco_checkpoint_has_a_full_queue_of_unknown_images():
    model = small_moco()
    state = model.state_dict()
    del state["queue_index"]
    keys = small_moco(seed=1).load_state_dict(state)
    assert not keys.missing_keys and not keys.unexpected_keys
    model = small_moco(seed=1)
    model.load_state_dict(state)
    assert model.queue_index.tolist() == 20 * [builder.UNKNOWN]
    ddp = {f"module.{name}": x for name, x in state.items()}
    holder = torch.nn.Module()
    holder.module = small_moco(seed=1)
    holder.load_state_dict(ddp)
    assert holder.module.queue_index.tolist() == 20 * [builder.UNKNOWN]


def test_the_queues_images_are_in_the_checkpoint():
    model, other = small_moco(), small_moco(seed=1)
    model.queue_index.copy_(torch.arange(20))
    other.load_state_dict(model.state_dict())
    assert other.queue_index.tolist() == list(range(20))


# ----------------------------------------------------------------------------------- the encoders


def test_the_key_encoder_moves_by_one_minus_momentum():
    model = small_moco()
    with torch.no_grad():
        for parameter in model.encoder_q.parameters():
            parameter.add_(torch.randn_like(parameter))
    pairs = zip(model.encoder_q.parameters(), model.encoder_k.parameters())
    expected = [0.9 * k + 0.1 * q for q, k in pairs]
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


def test_the_state_dict_has_mocos_names():
    with torch.device("meta"):
        names = builder.MoCo("resnet18", dim=8, queue_size=16).state_dict().keys()
        one_layer = builder.MoCo("resnet18", dim=8, queue_size=16, mlp=False).state_dict()
    buffers = {"queue", "queue_ptr", "queue_index"}
    assert buffers | {"encoder_q.conv1.weight", "encoder_k.layer4.1.bn2.running_mean",
                      "encoder_q.fc.0.weight", "encoder_k.fc.2.bias"} <= names
    assert all(name.startswith(("encoder_q.", "encoder_k.")) for name in names - buffers)
    assert "encoder_q.fc.weight" in one_layer


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v2_x0_5", "regnet_x_400mf"])
def test_the_small_image_stem_keeps_the_resolution(arch):
    net, width = builder.build_backbone(arch, small_images=True)  # regnets do not build on meta
    net, images, sizes = net.to("meta"), torch.randn(2, 3, 32, 32, device="meta"), []
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.MaxPool2d)):
            module.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[-2:])))
    assert net(images).shape == (2, width)
    assert sizes[0] == (32, 32) and min(sizes)[0] >= 2


@pytest.mark.parametrize("arch", ["vgg11", "vit_b_16", "densenet121", "googlenet", "inception_v3"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nets_that_do_not_end_in_fc_are_refused(arch):
    with torch.device("meta"), pytest.raises(builder.UsageError, match="one layer named fc"):
        builder.build_backbone(arch)


def test_an_encoder_and_its_backbone_are_views_of_the_same_modules():
    net, width = builder.build_backbone("shufflenet_v2_x0_5", small_images=True)
    encoder = builder.with_head(net, torch.nn.Linear(width, 5)).eval()
    images = torch.randn(2, 3, 8, 8)
    features = builder.backbone_of(encoder)(images)
    assert features.shape == (2, width)
    torch.testing.assert_close(builder.head_of(encoder)(features), encoder(images))
    assert encoder(images).shape == (2, 5)  # taking its backbone has left it as it was
    assert torch.equal(net(images), features)


def test_split_batch_norm_is_batch_norm_of_each_slice():
    bn = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        bn.weight.copy_(torch.rand(3))
    slices, split = copy.deepcopy(bn), builder.SplitBatchNorm2d(bn, 2)
    x = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(split(x), torch.cat([bn(x[:4]), slices(x[4:])]))
    torch.testing.assert_close(split.running_var, bn.running_var)  # the first slice's
    torch.testing.assert_close(split.eval()(x), bn.eval()(x))


# -------------------------------------------------------------- the backbone in others' checkpoints


@pytest.fixture(scope="module")
def weights():
    """A ResNet-18's, from torchvision."""
    return models.resnet18(num_classes=4).state_dict()


def prefixed(prefix, weights, factor=1):
    return {prefix + name: factor * value for name, value in weights.items()}


# Checkpoints as methods save them. Where a prefix comes twice, the other one's weights are zeros.
LAYOUTS = {
    "torchvision": ("", lambda w: w),
    "backbone.pth": ("", lambda w: {name: x for name, x in w.items() if "fc." not in name}),
    "DDP": ("module.", lambda w: {"state_dict": prefixed("module.", w)}),
    "torch.compile": ("_orig_mod.", lambda w: {"model": prefixed("_orig_mod.", w)}),
    "MoCo, PCL": ("module.encoder_q.", lambda w: {
        "epoch": 200, "optimizer": {"state": {0: {"momentum_buffer": w["conv1.weight"]}}},
        "state_dict": prefixed("module.encoder_k.", w, 0) | prefixed("module.encoder_q.", w)
        | {"module.queue": torch.zeros(2, 2)}}),
    "MoCo without DDP": ("encoder_q.", lambda w:
                         prefixed("encoder_q.", w) | prefixed("encoder_k.", w, 0)),
    "MoCo v3": ("module.base_encoder.", lambda w: {
        "state_dict": prefixed("module.momentum_encoder.", w, 0)
        | prefixed("module.base_encoder.", w)}),
    "SimSiam": ("module.encoder.", lambda w: {
        "state_dict": prefixed("module.encoder.", w)
        | {"module.predictor.0.weight": torch.zeros(2)}}),
    "SwAV": ("module.", lambda w:
             prefixed("module.", w) | {"module.prototypes.weight": torch.zeros(2)}),
    "solo-learn's BYOL": ("backbone.", lambda w: {
        "state_dict": prefixed("momentum_backbone.", w, 0) | prefixed("backbone.", w)}),
    "lightly": ("backbone.", lambda w:
                prefixed("backbone.", w) | prefixed("backbone_momentum.", w, 0)),
    "DINO": ("student.module.backbone.", lambda w: {
        "teacher": prefixed("backbone.", w, 0), "student": prefixed("module.backbone.", w)}),
    "Barlow Twins": ("model.module.backbone.", lambda w: {
        "model": prefixed("module.backbone.", w)}),
    "an nn.Sequential of its layers": ("state_dict.backbone.", lambda w: {
        "state_dict": prefixed("backbone.", numbered(w))}),
}


def numbered(w):
    with torch.device("meta"):
        net = models.resnet18()
    layers = nn.Sequential(*list(net.children())[:-1])
    names = dict(zip(net.state_dict(), layers.state_dict()))  # in the same order, but for fc
    return {other: w[name] for name, other in names.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backbone_is_read_out_of(layout, weights):
    prefix, make = LAYOUTS[layout]
    encoder, _ = builder.build_backbone("resnet18")
    with torch.no_grad():
        found = builder.load_backbone(encoder, make(weights))
    assert found.endswith(prefix)
    state = encoder.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in state)


def test_a_backbone_is_read_out_of_a_checkpoint_of_ours(group, weights):
    ours, theirs = (small_moco(arch="resnet18", seed=seed) for seed in (0, 1))
    head = builder.head_of(theirs.encoder_q)[0].weight.clone()
    checkpoint = {"state_dict": DistributedDataParallel(ours).state_dict(), "epoch": 3}
    assert builder.load_backbone(theirs.encoder_q, checkpoint) == "state_dict.module.encoder_q."
    a, b = (builder.backbone_of(model.encoder_q).state_dict() for model in (ours, theirs))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(builder.head_of(theirs.encoder_q)[0].weight, head)  # it stays new


@pytest.mark.parametrize("thing", [{}, [], "text", {"state_dict": {}}, {"epoch": 3}, torch.ones(3)])
def test_what_holds_no_weights_is_refused(thing):
    with torch.device("meta"):
        encoder, _ = builder.build_backbone("resnet18")
    with pytest.raises(builder.UsageError, match="holds no backbone"):
        builder.load_backbone(encoder, thing)


@pytest.mark.parametrize("arch, what", [
    ("resnet34", r"layer1\.2\.\S+ is missing"), ("resnet50", r"layer1\.0\.\S+ is "),
    ("shufflenet_v2_x0_5", "holds no backbone"), ("resnext50_32x4d", "not those of this network")])
def test_the_backbone_of_another_network_is_refused(arch, what, weights):
    with torch.device("meta"):
        encoder, _ = builder.build_backbone(arch)
    with pytest.raises(builder.UsageError, match=what):
        builder.load_backbone(encoder, weights)


@pytest.mark.parametrize("name", ["layer1.2.conv1.weight", "layer4.1.se.weight"])
def test_a_backbone_with_more_layers_is_refused_and_one_named(name, weights):
    encoder, _ = builder.build_backbone("resnet18")
    deeper = prefixed("module.", weights | {name: torch.zeros(2)})
    with pytest.raises(builder.UsageError, match=f"module.{name} is one too many"):
        builder.load_backbone(encoder, {"state_dict": deeper})


def test_what_tools_add_to_a_layer_is_no_other_network(weights):
    encoder, _ = builder.build_backbone("resnet18")
    more = {"conv1.total_ops": torch.zeros(1), "fc.2.weight": torch.zeros(1)}
    assert builder.load_backbone(encoder, prefixed("module.", weights | more)) == "module."


def test_other_numbered_layers_are_no_backbone():
    encoder, _ = builder.build_backbone("resnet18")
    other = {"head.0.weight": torch.zeros(1), "blocks.0.weight": torch.zeros(1)}
    with pytest.raises(builder.UsageError, match="holds no backbone"):
        builder.load_backbone(encoder, other)


def test_weights_that_are_not_finite_are_refused(weights):
    encoder, _ = builder.build_backbone("resnet18")
    spoilt = weights | {"layer2.0.bn1.weight": weights["layer2.0.bn1.weight"] * math.nan}
    with pytest.raises(builder.UsageError, match="not finite"):
        builder.load_backbone(encoder, spoilt)


def test_a_backbone_of_which_a_layer_is_missing_is_refused_and_the_layer_named(weights):
    encoder, _ = builder.build_backbone("resnet18")
    before = encoder.conv1.weight.clone()
    partly = {name: x for name, x in weights.items() if name != "layer3.0.conv2.weight"}
    with pytest.raises(builder.UsageError, match="layer3.0.conv2.weight is missing"):
        builder.load_backbone(encoder, partly)
    assert torch.equal(encoder.conv1.weight, before)


def test_mocos_rule_finds_all_of_a_torchvision_backbone_in_our_checkpoint(group):
    """That of MoCo's linear probe and its converter for detectron2."""
    state = DistributedDataParallel(small_moco(arch="resnet18")).state_dict()
    found = {name.removeprefix("module.encoder_q."): x for name, x in state.items()
             if name.startswith("module.encoder_q") and not name.startswith("module.encoder_q.fc")}
    del found["conv1.weight"]  # a small image's stem has another shape
    with torch.device("meta"):
        keys = models.resnet18().load_state_dict(found, strict=False, assign=True)
    assert keys.missing_keys == ["conv1.weight", "fc.weight", "fc.bias"]
    assert not keys.unexpected_keys


# --------------------------------------------------------------------------------------- the loss

N = 12


def made(*flags):
    """args, a batch in float64 with a queue of some of its own images, and two clusterings."""
    args = pretrain.parse_args(["--temperature", "0.3", *flags])
    args.device = torch.device("cpu")
    index = torch.tensor([30, 4, 17, 8, 22, 11, 0, 39, 5, 9, 13, 2])
    queue_index = torch.tensor([4, 1, 8, 8, 39, 6, builder.UNKNOWN, builder.UNKNOWN, 12, 2, 2, 2,
                                builder.EMPTY, builder.EMPTY])
    batch = losses.Batch(unit(N, 8, seed=1), unit(N, 8, seed=2), index,
                         unit(len(queue_index), 8, seed=3).T, queue_index, slice(0, N), 3, 1)
    return args, batch, clusterings(40, 8, 4, 6)


def loop_over_older_keys(batch, temperature):
    """InfoNCE whose negatives are the keys in the queue of all images but the query's own."""
    total = 0
    for i, image in enumerate(batch.index.tolist()):
        logits = [(batch.q[i] * batch.k[i]).sum()]
        for j, other in enumerate(batch.queue_index.tolist()):
            if other not in (image, builder.EMPTY):
                logits.append((batch.q[i] * batch.queue[:, j]).sum())
        logits = torch.stack(logits) / temperature
        total = total - torch.log(logits[0].exp() / logits.exp().sum())
    return total / len(batch.q)


def test_own_older_keys_and_empty_places_of_the_queue_are_no_negatives():
    args, batch, _ = made()
    batch = batch._replace(q=batch.q.requires_grad_())
    loss, figures = pretrain.pauc(batch, [], args)
    expected = loop_over_older_keys(batch, 0.3)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, batch.q)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert figures.keys() == {"loss_ins", "acc_ins"} and torch.equal(figures["loss_ins"], loss)


def test_a_process_takes_its_rows_of_infonce_and_masks_their_images():
    args, batch, _ = made()
    rows = slice(3, 7)
    loss, _ = pretrain.pauc(batch._replace(rows=rows), [], args)
    torch.testing.assert_close(loss, loop_over_older_keys(
        batch._replace(q=batch.q[rows], k=batch.k[rows], index=batch.index[rows]), 0.3))


@pytest.mark.parametrize("left_out", ["proto", "align", "uniform", "corr", None])
def test_the_loss_is_the_weighted_sum_of_its_terms(left_out):
    weights = dict(proto=0.7, align=0.5, uniform=0.4, corr=3)
    if left_out:
        weights[left_out] = 0
    args, batch, found = made(*(f"--{name}={weight}" for name, weight in weights.items()))
    loss, figures = pretrain.pauc(batch, found, args)
    q, k = batch.q, batch.k
    expected = loop_over_older_keys(batch, 0.3) + weights["uniform"] * losses.uniformity(q)
    for assignments, prototypes, phi in found:
        s = assignments[batch.index]
        (p, _), (p_positive, _) = (losses.prototype_features(z, s) for z in (q, k))
        d, d_positive = (losses.deviations(z, prototypes, s) for z in (q, k))
        expected = expected + (weights["proto"] * losses.proto_nce(q, prototypes, phi, s)[0]
                               + weights["align"] * losses.alignment(p, p_positive)
                               + weights["corr"] * losses.correlation(d, d_positive)) / len(found)
    torch.testing.assert_close(loss, expected)
    assert {name for name in figures if name.startswith("loss_")} == {
        "loss_ins", *(f"loss_{name}" for name, weight in weights.items() if weight)}
    assert ("acc_proto" in figures) == (left_out != "proto")


@pytest.mark.parametrize("name", ["proto", "align", "uniform", "corr"])
def test_a_prototype_term_reaches_every_parameter_of_the_query_encoder(name):
    model = small_moco()
    args, batch, found = made(*(f"--{other}={int(other == name)}"
                                for other in ("proto", "align", "uniform", "corr")))
    found = [losses.Clustering(c.assignments, c.prototypes.float(), c.concentration.float())
             for c in found]
    q = F.normalize(model.encoder_q(torch.randn(N, 3, 8, 8)), dim=1)
    batch = batch._replace(q=q, k=batch.k.float(), queue=batch.queue.float())
    with_term, without = (
        torch.autograd.grad(pretrain.pauc(batch, prototypes, args)[0],
                            list(model.encoder_q.parameters()), retain_graph=True)
        for prototypes in (found, []))
    assert all((a - b).abs().max() > 0 for a, b in zip(with_term, without))


# --------------------------------------------------- several processes are one with the whole batch

WORLD = 2


def in_group(rank, world_size, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet{world_size}", rank=rank,
                            world_size=world_size)


def train_two_steps(rank, world_size, bn_splits, path):
    """Two optimizer steps of the whole loss in float64 on fixed data, and what is left then."""
    in_group(rank, world_size, path)
    args = pretrain.parse_args(["--num-negatives", "3", "--temperature", "0.3"])
    args.device = torch.device("cpu")
    torch.set_default_dtype(torch.float64)
    model = small_moco(bn_splits=bn_splits)
    model.queue_index.copy_(torch.arange(20))  # some of the 40 images' own
    ddp = DistributedDataParallel(model)
    ddp.broadcast_buffers = ddp.forward_sync_buffers = False
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1, momentum=0.9)
    fixed = torch.Generator().manual_seed(1)
    found = clusterings(40, 8, 11, 17)
    rows = slice(rank * N // world_size, (rank + 1) * N // world_size)
    result = []
    for step in range(2):
        im_q, im_k = torch.randn(2, N, 3, 8, 8, generator=fixed).double()
        index = torch.randperm(40, generator=fixed)[:N]
        permutation = torch.randperm(N, generator=fixed)
        q, k = ddp(im_q[rows], im_k[rows], permutation)
        batch = losses.Batch(builder.gather_with_gradient(q), k, index, model.queue,
                             model.queue_index, rows, epoch=3, step=step)
        loss, figures = pretrain.pauc(batch, found, args)
        optimizer.zero_grad()
        loss.backward()
        report = torch.stack([loss.detach(), *(x.double() for x in figures.values())])
        dist.all_reduce(report)
        gradients = [parameter.grad.clone() for parameter in model.encoder_q.parameters()]
        optimizer.step()
        model.enqueue(k, index)
        result += [report / world_size, gradients, model.queue.clone()]
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    torch.save((result, model.state_dict()), path / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    in_processes(train_two_steps, WORLD, 1, tmp_path)
    train_two_steps(0, 1, WORLD, tmp_path)  # BN over the same groups
    one = torch.load(tmp_path / "1-0.pt")
    assert one[1]["queue_ptr"].item() == 2 * N % 20
    assert len(set(one[1]["queue_index"].tolist()) - set(range(20))) > 0
    for rank in range(WORLD):
        several = torch.load(tmp_path / f"2-{rank}.pt")
        for a, b in zip(several[0], one[0]):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert several[1].keys() == one[1].keys()  # with the queue, its pointer and its images
        for name, value in one[1].items():
            torch.testing.assert_close(several[1][name], value, rtol=1e-8, atol=1e-10,
                                       msg=lambda text: f"{name}: {text}")


def gather_rows(rank, world_size, path):
    in_group(rank, world_size, path)
    x = torch.full((2, 3), float(rank), requires_grad=True)
    rows = builder.gather_with_gradient(x)
    assert rows[:, 0].tolist() == [0, 0, 1, 1]
    (rows * torch.arange(4.0)[:, None] * (rank + 1)).sum().backward()  # each has another loss
    assert x.grad[:, 0].tolist() == [3 * (2 * rank), 3 * (2 * rank + 1)]  # of both losses
    dist.destroy_process_group()


def test_gather_sums_the_gradients_of_all_processes(tmp_path):
    in_processes(gather_rows, WORLD, tmp_path)
