"""The momentum-queue model, gathering across processes, backbones out of checkpoints."""
import copy
import hashlib
import math

import pytest
import torch
from conftest import REAL, assert_same, in_processes, joined, unit
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

import builder
from loader import UsageError


def small_moco(seed=0, dim=8, queue_size=20, arch="tiny", **options):
    torch.manual_seed(seed)
    return builder.MoCo(arch, dim, queue_size, momentum=0.9, small_images=True, **options)


# ---------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize("parts, rows", [
    ([5], [0, 1, 2, 3, 4, -1, -1]), ([5, 5], [7, 8, 9, 3, 4, 5, 6]), ([10], [7, 8, 9, 3, 4, 5, 6])])
def test_the_queue_wraps_around_and_its_images_with_it(parts, rows):
    model, keys = small_moco(queue_size=7), unit(10, 8).float()
    for images in torch.arange(sum(parts)).split(parts):
        model.enqueue(keys[images], images)
    assert torch.equal(model.queue, torch.cat([keys, torch.zeros(1, 8)])[rows].T)
    assert model.queue_index.tolist() == rows and builder.EMPTY == -1
    assert model.queue_ptr.item() == sum(parts) % 7


# ------------------------------------------------------------------------------------- the encoders


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


@pytest.mark.parametrize("heads", [1, 2])
def test_keys_meet_in_shuffled_groups_and_come_back_in_the_order_of_their_images(heads, group):
    model, whole = (small_moco(bn_splits=splits, heads=heads) for splits in (2, 1))  # as like
    permutation, expected = torch.tensor([3, 1, 5, 0, 2, 4]), torch.empty(6, heads, 8)
    im_q, im_k = torch.randn(2, 6, 3, 8, 8)
    for images in permutation.chunk(2):
        expected[images] = whole.unit_rows(whole.encoder_k(im_k[images])).detach()
    q, k = model(im_q, im_k, permutation)
    torch.testing.assert_close(k, expected)
    queries = [whole.unit_rows(whole.encoder_q(images)) for images in im_q.chunk(2)]
    torch.testing.assert_close(q, torch.cat(queries))
    assert q.requires_grad and not k.requires_grad
    torch.testing.assert_close(k.norm(dim=2), torch.ones(6, heads))


@pytest.mark.parametrize("mlp, head", [(True, ["fc.0", "fc.2"]), (False, ["fc"])])
def test_the_state_dict_has_mocos_names(mlp, head):
    """By which MoCo's linear probe and its converter for detectron2 find a torchvision backbone."""
    with torch.device("meta"):
        model = builder.MoCo("resnet18", dim=8, queue_size=16, mlp=mlp, small_images=True)
        names = [name for name in models.resnet18().state_dict() if not name.startswith("fc.")]
    names += [f"{layer}.{kind}" for layer in head for kind in ("weight", "bias")]
    names = {f"encoder_{encoder}.{name}" for encoder in "qk" for name in names}
    assert model.state_dict().keys() == names | {"queue", "queue_ptr", "queue_index"}


@pytest.mark.parametrize("arch", ["resnet18", REAL, "regnet_x_400mf"])
def test_the_small_image_stem_keeps_the_resolution(arch):
    net, width = builder.build_backbone(arch, small_images=True)  # regnets do not build on meta
    net, images, sizes = net.to("meta"), torch.randn(2, 3, 32, 32, device="meta"), []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            module.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[-2:])))
    assert net(images).shape == (2, width)
    assert sizes[0] == (32, 32) and min(sizes)[0] >= 2


@pytest.mark.parametrize("arch, words", [
    ("resnet19", "no classifier of torchvision's"), ("vit_b_16", "one layer named fc"),
    ("googlenet", "one layer named fc")])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nets_that_do_not_end_in_fc_are_refused(arch, words):
    with torch.device("meta"), pytest.raises(UsageError, match=f"--arch {arch}: .*{words}"):
        builder.build_backbone(arch)


def test_an_encoder_and_its_backbone_are_views_of_the_same_modules():
    net, width = builder.build_backbone(REAL, small_images=True)
    encoder = builder.with_head(net, nn.Linear(width, 5)).eval()
    images = torch.randn(2, 3, 8, 8)
    features = builder.backbone_of(encoder)(images)
    assert features.shape == (2, width)
    torch.testing.assert_close(encoder.fc(features), encoder(images))
    assert encoder(images).shape == (2, 5)  # taking its backbone has left it as it was
    assert torch.equal(net(images), features)


def test_split_batch_norm_is_batch_norm_of_each_slice():
    bn = nn.BatchNorm2d(3)
    with torch.no_grad():
        bn.weight.copy_(torch.rand(3))
    slices, split = copy.deepcopy(bn), builder.SplitBatchNorm2d(bn, 2)
    x = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(split(x), torch.cat([bn(x[:4]), slices(x[4:])]))
    torch.testing.assert_close(split.running_var, bn.running_var)  # the first slice's
    torch.testing.assert_close(split.eval()(x), bn.eval()(x))


def test_bn_splits_reach_every_batch_norm_of_a_network():
    net, _ = builder.build_backbone(REAL, bn_splits=2)
    kinds = {type(module) for module in net.modules() if isinstance(module, nn.BatchNorm2d)}
    assert kinds == {builder.SplitBatchNorm2d}


# -------------------------------------------------------------- the backbone in others' checkpoints


@pytest.fixture(scope="module")
def weights():
    """A ResNet-18's, from torchvision."""
    return models.resnet18(num_classes=4).state_dict()


def prefixed(prefix, weights, factor=1):
    return {prefix + name: factor * value for name, value in weights.items()}


def both(own, other, w):
    """Of two encoders in one checkpoint the other one's weights are zeros."""
    return prefixed(other, w, 0) | prefixed(own, w)


# Checkpoints as methods save them.
LAYOUTS = {
    "torchvision": ("", lambda w: w),
    "backbone.pth": ("state_dict.", lambda w: {
        "arch": "resnet18", "epoch": 3, "args": {"lr": 0.1},
        "state_dict": {name: x for name, x in w.items() if "fc." not in name}}),
    "DDP": ("module.", lambda w: {"state_dict": prefixed("module.", w)}),
    "torch.compile": ("_orig_mod.", lambda w: {"model": prefixed("_orig_mod.", w)}),
    "MoCo, PCL": ("module.encoder_q.", lambda w: {
        "epoch": 200, "optimizer": {"state": {0: {"momentum_buffer": w["conv1.weight"]}}},
        "state_dict": both("module.encoder_q.", "module.encoder_k.", w)
        | {"module.queue": torch.zeros(2, 2)}}),
    "MoCo without DDP": ("encoder_q.", lambda w: both("encoder_q.", "encoder_k.", w)),
    "MoCo v3": ("module.base_encoder.", lambda w: {
        "state_dict": both("module.base_encoder.", "module.momentum_encoder.", w)}),
    "SimSiam": ("module.encoder.", lambda w: {
        "state_dict": prefixed("module.encoder.", w)
        | {"module.predictor.0.weight": torch.zeros(2)}}),
    "SwAV": ("module.", lambda w:
             prefixed("module.", w) | {"module.prototypes.weight": torch.zeros(2)}),
    "BYOL": ("online_encoder.", lambda w: both("online_encoder.", "target_encoder.", w)),
    "DINO": ("student.module.backbone.", lambda w: {
        "teacher": prefixed("backbone.", w, 0), "student": prefixed("module.backbone.", w)}),
    "layers with what tools add": ("module.", lambda w: prefixed("module.", w | {
        "conv1.total_ops": torch.zeros(1), "fc.2.weight": torch.zeros(1)})),
    "an average alone": ("model_ema.module.", lambda w: {"model_ema": prefixed("module.", w)}),
    "an average and weights": ("model.", lambda w: {
        "model_ema": prefixed("module.", w, 0), "model": w}),
}


def read(state, arch="resnet18"):
    encoder, _ = builder.build_backbone(arch)
    return builder.load_backbone(encoder, state, "it.pth", arch), encoder.state_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backbone_is_read_out_of(layout, weights):
    prefix, make = LAYOUTS[layout]
    taken, state = read(make(weights))
    assert taken.endswith(f"{prefix}*")
    assert all(torch.equal(state[name], weights[name]) for name in state)


def of_lightly(shapes):
    body = {name: shape for name, shape in shapes.items() if "fc." not in name}
    head = {"layers.0.weight": (512, 512), "layers.0.bias": (512,),
            "layers.2.weight": (128, 512), "layers.2.bias": (128,)}
    model = (prefixed("backbone.", body) | prefixed("projection_head.", head)
             | prefixed("key_backbone.", body) | prefixed("key_projection_head.", head)
             | prefixed("online_classifier.classification_head.",
                        {"weight": (10, 512), "bias": (10,)}))
    return prefixed("state_dict.", model) | {
        "callbacks.EarlyStopping{'monitor': 'train_loss', 'mode': 'min'}.best_score": (),
        "callbacks.ModelCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0, "
        "'every_n_epochs': 1, 'train_time_interval': None}.kth_value": ()}


def of_timm(shapes):
    parameters = [shape for name, shape in shapes.items() if name.endswith(("weight", "bias"))]
    momenta = sorted(parameters, key=lambda shape: len(shape) > 1)  # without weight decay first
    return ({f"optimizer.state.{i}.momentum_buffer": shape for i, shape in enumerate(momenta)}
            | prefixed("state_dict.", shapes) | prefixed("state_dict_ema.", shapes))


# The names and shapes in a ResNet-18's checkpoint that another project's own code wrote, as a rule
# and as the digest of their list there: STUDY.md has the commands. Last, what is taken.
@pytest.mark.parametrize("rule, digest, words", [
    (of_lightly, "2631f6504a57758b", "state_dict.backbone.*"),
    (of_timm, "2024df540fc8eb4f", "state_dict.*")], ids=["lightly 1.6.0", "timm 1.0.31"])
def test_a_backbone_is_read_out_of_what_another_project_saved(rule, digest, words, weights):
    names = rule({name: tuple(x.shape) for name, x in weights.items()})
    lines = "\n".join(f"{name} {list(shape)}" for name, shape in names.items())
    assert hashlib.sha256(lines.encode()).hexdigest().startswith(digest)
    saved = {name: torch.full(shape, i) for i, (name, shape) in enumerate(names.items())}
    taken, state = read(saved)
    assert taken == words
    assert all(torch.equal(x, saved[words[:-1] + name].to(x)) for name, x in state.items())


def test_a_backbone_is_read_out_of_a_checkpoint_of_ours_and_the_head_stays_new(group):
    ours, theirs = (small_moco(seed=seed) for seed in (0, 1))
    head = theirs.encoder_q.fc[0].weight.clone()
    checkpoint = {"state_dict": DistributedDataParallel(ours).state_dict(), "epoch": 3}
    taken = builder.load_backbone(theirs.encoder_q, checkpoint, "it.pth", "tiny")
    assert taken == "state_dict.module.encoder_q.*"
    a, b = (builder.backbone_of(model.encoder_q).state_dict() for model in (ours, theirs))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(theirs.encoder_q.fc[0].weight, head)


@pytest.mark.parametrize("thing", [{}, [], "text", {"state_dict": {}}, {"epoch": 3}, torch.ones(3),
                                   {"head.0.weight": torch.zeros(1)}])
def test_what_holds_no_weights_is_refused(thing):
    with torch.device("meta"), pytest.raises(UsageError, match="it.pth: holds no backbone"):
        read(thing)


@pytest.mark.parametrize("arch, words", [
    ("resnet50", "not those of --arch resnet50"), (REAL, "holds no backbone")])
def test_the_backbone_of_another_network_is_refused(arch, words, weights):
    with torch.device("meta"), pytest.raises(UsageError, match=words):
        read(weights, arch)


@pytest.mark.parametrize("name, value, words", [
    ("layer1.2.conv1.weight", torch.zeros(2), "module.layer1.2.conv1.weight is one too many"),
    ("layer4.1.se.weight", torch.zeros(2), "module.layer4.1.se.weight is one too many"),
    ("conv1.weight", torch.zeros(64, 3, 3, 3), r"conv1.weight is \[64, 3, 3, 3\], not"),
    ("layer2.0.bn1.weight", torch.full((128,), math.nan), "not finite"),
    ("layer3.0.conv2.weight", None, "layer3.0.conv2.weight is missing")])
def test_a_wrong_tensor_is_named_and_refused_before_any_is_loaded(name, value, words, weights):
    encoder, _ = builder.build_backbone("resnet18")
    before = copy.deepcopy(encoder.state_dict())
    state = {name: x for name, x in (weights | {name: value}).items() if x is not None}
    with pytest.raises(UsageError, match=words):
        builder.load_backbone(encoder, prefixed("module.", state), "it.pth", "resnet18")
    assert_same(before, encoder.state_dict())


# ------------------------------------------------------------------------------- several processes


def gather_rows(rank, world_size, path):
    with joined(rank, world_size, path):
        x = torch.full((2, 3), float(rank), requires_grad=True)
        rows = builder.gather_with_gradient(x)
        assert rows[:, 0].tolist() == [0, 0, 1, 1]
        (rows * torch.arange(4.0)[:, None] * (rank + 1)).sum().backward()  # each has another loss
        assert x.grad[:, 0].tolist() == [3 * (2 * rank), 3 * (2 * rank + 1)]  # of both losses


def test_gather_sums_the_gradients_of_all_processes(tmp_path):
    in_processes(gather_rows, 2, tmp_path)
