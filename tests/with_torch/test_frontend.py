"""Any torch CNN enters: equal to the module in float64, or refused with every reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from zoo import EXAMPLE, imported

import manidp
import manidp.torch
from manidp import reference
from manidp.data.images import load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.engine.engine import Engine
from manidp.errors import FrontendError, UnsupportedError
from manidp.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from manidp.graph import Activation, BatchNorm, Conv, LayerNorm, Linear, Pool, Shuffle
from manidp.torch.convert import network_from
from manidp.torch.frontend import from_torch, to_state_dict
from manidp.training.recipe import Recipe


class Net(nn.Module):
    """A convolution, what the test does with its map, and a linear layer on the pooled result."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.c, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.middle = middle
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.middle(self, self.c(x)).mean((2, 3)))
        return logits


def small(middle: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> Checkpoint:
    return from_torch(Net(middle, **parts), EXAMPLE[:, :, :12, :10])


def kinds(checkpoint: Checkpoint) -> list[str]:
    return [type(node).__name__ for node in checkpoint.graph.nodes]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo_enters_and_goes_back(name: str) -> None:
    """``from_torch`` compares with the module itself, to 1e-10; here the float32 logits beside it."""
    module, checkpoint = zoo.fresh(name).eval(), imported(name)
    with torch.no_grad():
        meant = module(EXAMPLE).numpy()
    came = reference.run(checkpoint.graph, checkpoint.weights, EXAMPLE.numpy()).logits
    assert np.abs(came - meant).max() <= 1e-5 * np.abs(meant).max()
    other = zoo.fresh(name, seed=1)
    other.load_state_dict(to_state_dict(checkpoint, other))
    assert all(torch.equal(ours, theirs) for ours, theirs in
               zip(other.state_dict().values(), module.state_dict().values(), strict=True))  # fmt: skip


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_engine_runs_what_entered(name: str) -> None:
    checkpoint = imported(name)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    try:
        engine = Engine(checkpoint)
    except UnsupportedError as error:
        pytest.skip(str(error))
    meant = reference.run(checkpoint.graph, checkpoint.weights, checkpoint.preprocessing.apply(images)).logits
    assert np.abs(engine.run(images).logits - meant).max() <= 1e-4 * np.abs(meant).max()


def test_what_is_returned_is_a_whole_checkpoint(tmp_path: Any) -> None:
    module = zoo.fresh("resnet")
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    checkpoint = manidp.from_torch(module, EXAMPLE, preprocessing=CIFAR10_PREPROCESSING, classes=CIFAR10_CLASSES)
    assert all(part.training for part in module.modules())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert checkpoint.classes == CIFAR10_CLASSES and checkpoint.preprocessing == CIFAR10_PREPROCESSING
    save_checkpoint(checkpoint, tmp_path / "net.safetensors")
    again = load_checkpoint(tmp_path / "net.safetensors")
    assert again.graph == checkpoint.graph and again.provenance == checkpoint.provenance
    with torch.no_grad():
        assert torch.allclose(network_from(again)(EXAMPLE).logits, module.eval()(EXAMPLE), atol=1e-5)
    names = checkpoint.provenance["imported"]["names"]
    assert names["1.body.0.0.weight"] == "1.body.0.0.weight"
    assert names["1.body.0.1.moving_mean"] == "1.body.0.1.running_mean"


def test_defaults() -> None:
    checkpoint = imported("lenet")
    assert checkpoint.classes[9] == "class 9"
    assert checkpoint.preprocessing.mean == (0, 0, 0) and checkpoint.preprocessing.size == (32, 32)


def test_a_1x1_convolution_of_a_pooled_map_is_a_linear_layer() -> None:
    made = kinds(imported("mobilenet-v3"))
    assert made.count("Linear") == 2 * 2 + 2  # two in each squeeze, two in the head
    assert made.count("GlobalPool") == 3 and "Pool" not in made


def test_names_of_activations_written_by_hand() -> None:
    made = small(lambda s, x: F.relu6(x + 3) / 6 + x * torch.sigmoid(x) + x * F.relu6(x + 3) * (1 / 6))
    assert sorted(node.kind for node in made.graph.nodes if isinstance(node, Activation)) == [
        "hardsigmoid", "hardswish", "silu",
    ]  # fmt: skip
    made = small(lambda s, x: x * (F.relu6(x + 3) / 6) + x * F.relu6(x + 3) / 6)
    assert [node.kind for node in made.graph.nodes if isinstance(node, Activation)] == ["hardswish", "hardswish"]


MADE_OF_SEVERAL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "maximum": lambda s, x: torch.maximum(x, s.one(x)) - torch.minimum(x, s.many(x)),  # FReLU; a map repeated
    "maxout": lambda s, x: torch.cat([torch.max(*s.many(x).chunk(2, 1)), x.abs()[:, :4]], 1),
    "powers": lambda s, x: x**3 - x**2 + x**1 - 0.5 * x.pow(4),
    "elus": lambda s, x: F.selu(x) + F.celu(x, 1.3) + F.celu(x),
    "tanh": lambda s, x: F.gelu(x, approximate="tanh"),
    "tanh, written": lambda s, x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "mean": lambda s, x: x * torch.sigmoid(x.mean(1, keepdim=True)) + x.sum(1)[:, None],
    "largest": lambda s, x: x * torch.cat([x.amax(1, keepdim=True), s.one(x)], 1).max(1, keepdim=True)[0],
    "largest of an odd number": lambda s, x: x + s.many(x)[:, :7].amax(1).unsqueeze(1),
    "CBAM": lambda s, x: x * s.two(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)).sigmoid(),
    "scSE": lambda s, x: torch.max(x * s.one(x).sigmoid(), x * s.many(x.mean((2, 3), keepdim=True)).sigmoid()),
}


@pytest.mark.parametrize("name", MADE_OF_SEVERAL)
def test_what_no_op_is_like_is_made_of_several(name: str) -> None:
    """Sources: CBAM, Woo et al. 2018; scSE, Roy et al. 2018; FReLU, Ma et al. 2020."""
    parts = {"one": nn.Conv2d(8, 1, 1), "many": nn.Conv2d(8, 8, 1), "two": nn.Conv2d(2, 1, 7, padding=3)}
    made = small(MADE_OF_SEVERAL[name], **parts)
    images = np.random.default_rng(0).normal(size=(3, 3, 12, 10)).astype(np.float32)
    exact = reference.run(made.graph, made.weights, images.astype(np.float64)).logits
    assert np.abs(Engine(made).run(images).logits - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("ending", [F.softmax, F.log_softmax])
def test_a_softmax_at_the_end_is_left_out(ending: Any) -> None:
    class Ended(Net):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = ending(super().forward(x), -1)
            return made

    net = Ended(lambda s, x: x.relu())
    plain = Net(net.middle)
    plain.load_state_dict(net.state_dict())
    ours, theirs = (from_torch(one, EXAMPLE) for one in (net, plain))
    assert ours.graph == theirs.graph
    assert all(np.array_equal(value, theirs.weights[name]) for name, value in ours.weights.items())


def test_mish_written_out_is_mish() -> None:
    made = small(lambda s, x: x * torch.tanh(F.softplus(x)))
    assert [node.kind for node in made.graph.nodes if isinstance(node, Activation)] == ["mish"]


def test_windows_of_any_shape() -> None:
    made = small(lambda s, x: s.d(F.pad(x, (0, 1, 2, 1))), d=nn.Conv2d(8, 8, (3, 2), (2, 1), (1, 0), (2, 1), groups=2))
    (conv,) = (node for node in made.graph.nodes if isinstance(node, Conv) and node.name == "d")
    assert conv.padding == (3, 0, 2, 1) and conv.dilation == (2, 1)
    made = small(lambda s, x: F.max_pool2d(F.pad(F.relu(x), (1, 1, 0, 0)), 3, 2))
    assert [node.padding for node in made.graph.nodes if isinstance(node, Pool)] == [(0, 1)]
    made = small(lambda s, x: F.max_pool2d(x, 3, 2, ceil_mode=True))  # 12 x 10: a row and a column more
    assert [node.padding for node in made.graph.nodes if isinstance(node, Pool)] == [(0, 0, 1, 1)]
    small(lambda s, x: F.adaptive_max_pool2d(x, (4, 5)) + F.adaptive_avg_pool2d(x, (4, 5)))
    small(lambda s, x: s.d(x), d=nn.Conv2d(8, 8, (4, 3), padding="same", dilation=2))


FRAMED: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.pad(x, (1, 2, 0, 1)),
    lambda x: F.pad(x, (1, 1, 1, 1)).relu() + F.pad(x, (2, 0, 1, 1)) + F.pad(x, (1, 1, 1, 1)),
    lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3),
    lambda x: F.max_pool2d(F.pad(F.relu(x), (3, 3, 3, 3)), 3),
    lambda x: F.pad(x, (-1, 1, -1, 1)),  # moved by a pixel
    lambda x: F.pad(x, (-2, -3, 1, -7)),
    lambda x: x[:, :, 1:, 2:-1] + F.avg_pool2d(x, 2, 1)[..., 1:9:1][..., :7],
    lambda x: torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)[:, ::4],
]


def test_zeros_around_a_map_and_less_of_it() -> None:
    class Framed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.c(x)
            logits: Tensor = self.fc(torch.cat([framed(x).square().mean((2, 3)) for framed in FRAMED], 1))
            return logits

    module = Framed(lambda s, x: x)
    module.fc = nn.Linear(8 * len(FRAMED), 4)
    checkpoint = from_torch(module, EXAMPLE[:, :, :12, :10])
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 10, 3), np.uint8)
    meant = reference.run(checkpoint.graph, checkpoint.weights, checkpoint.preprocessing.apply(images)).logits
    assert np.abs(Engine(checkpoint).run(images).logits - meant).max() <= 1e-5 * np.abs(meant).max()


@pytest.mark.parametrize("counted", [True, False])
def test_averages_count_the_padding_in_or_not(counted: bool) -> None:
    """Windows that are not whole leave out what is beyond the padding."""

    class Averages(Net):
        def forward(self, x: Tensor) -> Tensor:
            x, total = self.c(x), torch.zeros(1)
            for size, stride, padding, ceil in product((2, 3), (1, 2, 3), (0, 1), (True, False)):
                for around in ((0, 0, 0, 0), (1, 0, 0, 1)):
                    pooled = F.avg_pool2d(F.pad(x, around), size, stride, padding, ceil, counted)
                    total = total + pooled.mean((2, 3))
            logits: Tensor = self.fc(total)
            return logits

    made = from_torch(Averages(lambda s, x: x), EXAMPLE[:, :, :12, :10])
    assert {node.count_include_pad for node in made.graph.nodes if isinstance(node, Pool)} == {True, False}


def test_writes_in_place_are_seen() -> None:
    def middle(s: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 2:5] *= 2
        y[:, :1] = y[:, 7:]
        return y + x

    assert kinds(small(middle)).count("Concat") == 3


def test_channels_are_sliced_and_shuffled() -> None:
    made = small(lambda s, x: torch.cat(torch.split(x, [3, 5], 1)[::-1], 1))
    assert kinds(made).count("Slice") == 2
    made = small(lambda s, x: torch.cat([x[:, ::2], x[:, 1::2]], 1))  # every second channel
    assert [node.groups for node in made.graph.nodes if isinstance(node, Shuffle)] == [4]
    made = small(lambda s, x: torch.cat([x.view(-1, 4, 2, 12, 10)[:, :, 1], x.view(-1, 2, 4, 12, 10)[:, 0]], 1))
    assert kinds(made).count("Shuffle") == 1 and kinds(made).count("Slice") == 2
    made = small(lambda s, x: x[:, [0, 2, 4, 6, 1, 3, 5, 7]] + x.flip(1))  # by index, and backwards: one by one
    assert kinds(made).count("Shuffle") == 1 and kinds(made).count("Slice") == 8
    made = small(lambda s, x: x.view(-1, 2, 2, 2, 12, 10).transpose(2, 3).reshape(x.shape))  # no one shuffle of all
    assert [node.groups for node in made.graph.nodes if isinstance(node, Shuffle)] == [4]
    assert kinds(made).count("Slice") == 4


def test_constants() -> None:
    made = small(lambda s, x: s.g * (x - 0.5) / torch.arange(1.0, 9.0).view(8, 1, 1), g=nn.Parameter(torch.tensor(0.3)))
    scaled = [node for node in made.graph.nodes if isinstance(node, Conv) and node.groups == 8]
    assert len(scaled) == 3 and all(node.kernel == 1 for node in scaled)
    assert {name.partition(".")[0] for name in made.provenance["imported"]["fixed"]} == {
        "scaled",
        "scaled_2",
        "scaled_3",
    }


def test_constants_on_vectors() -> None:
    class Scaled(Net):
        g: nn.Parameter
        b: nn.Parameter

        def forward(self, x: Tensor) -> Tensor:
            x = self.g * F.relu(self.c(x)).mean((2, 3)) + self.b
            logits: Tensor = 0.125 * self.fc(x) + 1
            return logits

    parts = {name: nn.Parameter(torch.randn(8)) for name in "gb"}
    checkpoint = from_torch(Scaled(lambda s, x: x, **parts), EXAMPLE)
    scaled = [node for node in checkpoint.graph.nodes if isinstance(node, BatchNorm)]
    assert len(scaled) == 2 and all(node.use_global_stats for node in scaled)
    assert {"g", "b"} <= set(checkpoint.provenance["imported"]["names"].values())
    assert kinds(checkpoint)[-1] == "Linear"  # behind a linear layer it is that layer
    network = network_from(checkpoint)
    with torch.no_grad():  # no statistics of a batch, nor does training move theirs
        assert torch.equal(network.train()(EXAMPLE).logits, network.eval()(EXAMPLE).logits)
    assert all(np.array_equal(value, checkpoint.weights[name]) for name, value in network.weights().items())
    checkpoint.weights["scaled.gamma"][:] = 3
    module = Scaled(lambda s, x: x, **parts)
    module.load_state_dict(to_state_dict(checkpoint, module))
    assert torch.equal(module.g, torch.full((8,), 3.0))


def test_normalised_weights_are_folded() -> None:
    made = small(lambda s, x: s.d(x), d=nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    assert list(made.provenance["imported"]["fixed"]) == ["d.conv.weight"]


@pytest.mark.parametrize("pooled", ["vector", "map"])
def test_a_convolution_over_channels_is_a_matrix(pooled: str) -> None:
    """Source: ECA-Net, Wang et al. 2020."""

    def middle(s: Any, x: Tensor) -> Tensor:
        y = x.mean((2, 3)).view(len(x), 1, 8) if pooled == "vector" else F.avg_pool2d(x, (12, 10)).flatten(2).mT
        y = torch.sigmoid(s.d(y)).view(len(x), 8, 1, 1)
        return x * y.expand_as(x)

    made = small(middle, d=nn.Conv1d(1, 1, 3, padding=2, dilation=2))
    assert kinds(made).count("Linear") == 2
    assert list(made.provenance["imported"]["fixed"]) == ["d.weight", "d.bias"]
    with pytest.raises(FrontendError, match="not one, with stride 1, over a vector's channels"):
        small(lambda s, x: s.d(x.flatten(2)).view(-1, 8, 12, 10), d=nn.Conv1d(8, 8, 3, padding=1))


def test_blocks_of_pixels_become_channels() -> None:
    made = small(lambda s, x: s.d(F.pixel_unshuffle(x, 2)), d=nn.Conv2d(32, 8, 1))
    (blocks,) = [node for node in made.graph.nodes if isinstance(node, Conv) and node.stride == 2]
    assert blocks.kernel == 2 and blocks.channels == 32
    small(lambda s, x: s.d(x.view(-1, 8, 4, 3, 2, 5).permute(0, 3, 5, 1, 2, 4).reshape(-1, 120, 4, 2)),
          d=nn.Conv2d(120, 8, 1))  # fmt: skip
    with pytest.raises(FrontendError, match="whose axes are not"):  # one of each block, with the others in the map
        small(lambda s, x: s.d(x.view(-1, 8, 3, 4, 10).transpose(2, 3).reshape(-1, 8, 12, 10)), d=nn.Conv2d(8, 8, 1))


def test_attention_between_two_branches_is_a_sigmoid() -> None:
    """Sources: SKNet, Li et al. 2019; ResNeSt, Zhang et al. 2020."""

    def middle(s: Any, x: Tensor) -> Tensor:
        both = torch.stack([x, s.d(x)], 1)
        shares = torch.softmax(s.e(both.sum(1).sum((2, 3), keepdim=True)).view(-1, 2, 8, 1, 1), 1)
        x = (both * shares).sum(1)
        shares = s.e(x.mean((2, 3), keepdim=True)).view(-1, 1, 2, 8).transpose(1, 2).softmax(1).reshape(-1, 16, 1, 1)
        x = (shares.view(-1, 2, 8, 1, 1) * both).sum(1)
        return x

    made = small(middle, d=nn.Conv2d(8, 8, 3, padding=1), e=nn.Conv2d(8, 16, 1))
    assert [node.kind for node in made.graph.nodes if isinstance(node, Activation)] == ["sigmoid"] * 4
    with pytest.raises(FrontendError, match="at most 8 are added"):
        small(lambda s, x: torch.cat([torch.cat([x] * 9, 1).view(-1, 9, 8, 12, 10).sum(1)]))


def test_adaptive_pools_whose_windows_are_alike() -> None:
    small(lambda s, x: F.adaptive_avg_pool2d(x, (11, 5)) + F.adaptive_max_pool2d(x, (11, 5)))
    made = small(lambda s, x: F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(x, 1), (3, 2)))
    assert [node.kernel for node in made.graph.nodes if isinstance(node, Conv)] == [3, (3, 2)]


def test_batch_norm_of_vectors() -> None:
    graph = imported("vgg").graph
    assert any(isinstance(node, BatchNorm) and len(graph.shapes[node.name]) == 1 for node in graph.nodes)


def test_a_module_called_twice_is_two_copies_that_must_stay_equal() -> None:
    module = Net(lambda s, x: s.d(s.d(x)), d=nn.Conv2d(8, 8, 3, padding=1))
    checkpoint = from_torch(module, EXAMPLE)
    names = checkpoint.provenance["imported"]["names"]
    assert [ours for ours, theirs in names.items() if theirs == "d.weight"] == ["d.weight", "d_2.weight"]
    to_state_dict(checkpoint, module)
    checkpoint.weights["d_2.weight"][0] += 1
    with pytest.raises(FrontendError, match=r"'d.weight' is used more than once"):
        to_state_dict(checkpoint, module)


def test_what_was_trained_and_has_no_name_does_not_go_back() -> None:
    checkpoint = small(lambda s, x: x * 3)
    module = Net(lambda s, x: x * 3)
    to_state_dict(checkpoint, module)
    checkpoint.weights["scaled.weight"][0] += 1
    with pytest.raises(FrontendError, match=r"cannot hold .* no parameter of it: scaled\.weight"):
        to_state_dict(checkpoint, module)
    with pytest.raises(FrontendError, match="does not fit"):
        to_state_dict(checkpoint, nn.Linear(2, 2))
    with pytest.raises(FrontendError, match="not imported"):
        to_state_dict(manidp.load_model("dense-res20"), module)


def test_all_that_is_unsupported_is_listed() -> None:
    with pytest.raises(FrontendError, match="4 ops of this network") as told:
        small(lambda s, x: s.up(s.norm(x.sign())).softmax(1), up=nn.ConvTranspose2d(8, 8, 2), norm=nn.GroupNorm(2, 8))
    assert len(told.value.refused) == 4 and "\n" not in str(told.value)
    by_op = {line.split(": ")[1]: line for line in told.value.refused}
    assert by_op.keys() == {"sign.default", "group_norm.default", "conv_transpose2d.input", "_softmax.default"}
    assert by_op["group_norm.default"].startswith("norm (test_frontend.py:")
    assert "transposed convolution" in by_op["conv_transpose2d.input"]
    assert "a softmax that is neither the network's end" in by_op["_softmax.default"]


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda s, x: F.dropout(x), "random numbers"),
        (lambda s, x: x + torch.rand(1), "random numbers"),
        (lambda s, x: F.adaptive_avg_pool2d(x, 5), "from 12x10 to 5x5"),
        (lambda s, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "mode 'reflect'"),
        (lambda s, x: F.pad(x, (1, 1, 1, 1), value=-math.inf).relu(), "taken by a maximum that follows"),
        (lambda s, x: F.pad(x, (1, 1, 1, 1), value=0.5), "padding with 0.5, not with zeros"),
        (lambda s, x: F.pad(x, (1, -2, 0, 0, -1, 1)), "cuts off channels"),
        (lambda s, x: x[:, :, 8:], "more than 7 rows or columns are cut off"),
        (lambda s, x: F.batch_norm(x, None, None, training=True), "statistics of the image at hand"),
        (lambda s, x: F.softplus(x, 2.0), "a softplus with settings of its own"),
        (lambda s, x: x.relu() ** 0.5, "a power of 0.5; whole ones up to 8 are products"),
        (lambda s, x: x.log_softmax(1), "a logarithm of a softmax that is not the network's end"),
        (lambda s, x: F.group_norm(x, 1), "statistics of the image at hand"),
        (lambda s, x: F.layer_norm(x, x.shape[1:]), "a layer norm over other axes than channels"),
        (lambda s, x: F.layer_norm(x, x.shape[3:]), "a layer norm over other axes than channels"),
        (lambda s, x: x * x.mean((1, 2), keepdim=True), "not over whole height, width or both, or a map's channels"),
        (lambda s, x: x + x.mean((2, 3), keepdim=True), "repeated along an axis"),
        (lambda s, x: torch.cat([x, x], 2), "another axis than channels"),
        (lambda s, x: x + x.sum((1, 2, 3), keepdim=True), "not over whole height, width or both"),
        (lambda s, x: F.conv2d(torch.cat([x] * 5, 1).view(-1, 4800, 1, 1), torch.ones(8, 4800, 1, 1)), "at most 4096"),
        (lambda s, x: x.transpose(2, 3)[:, :, :, :10] + x[:, :, :10], "not a range of its channels"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(middle: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(FrontendError, match=reason):
        small(middle)


def test_decisions_on_data_are_one_line() -> None:
    def middle(s: Any, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(FrontendError, match=r"decides by what is in its data.*test_frontend\.py"):
        small(middle)


def test_outputs() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    class Mapped(Net):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    with pytest.raises(FrontendError, match="2 outputs"):
        from_torch(Two(lambda s, x: x), EXAMPLE)
    assert from_torch(Mapped(lambda s, x: x), EXAMPLE).graph.num_classes == 4
    with pytest.raises(FrontendError, match=r"\(B, classes\).*got \(2, 8, 30, 30\)"):
        from_torch(nn.Conv2d(3, 8, 3), EXAMPLE)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("image", "float tensor"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "float tensor"),
        (torch.zeros(3, 32, 32), r"\(B, 3, H, W\); got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), "RGB"),
        (torch.zeros(1, 3, 20, 20), "does not run on images"),
    ],
)
def test_a_wrong_example_is_one_line(example: Any, message: str) -> None:
    with pytest.raises(FrontendError, match=message):
        from_torch(zoo.LeNet(), example)


def test_a_module_that_depends_on_the_batch_is_found_out() -> None:
    with pytest.raises(FrontendError, match="differs from the module"):
        small(lambda s, x: x * len(x))
    with pytest.raises(FrontendError, match=r"does not run on images \(1, 3, 12, 10\)"):
        small(lambda s, x: x.view(2, 8, 12, 10))


def test_an_import_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from manidp.torch.lowering import walk as lowering

    real = lowering._HANDLERS["relu.default"]
    monkeypatch.setitem(lowering._HANDLERS, "relu.default", lambda low, x: x)
    with pytest.raises(FrontendError, match="differs from the module"):
        small(lambda s, x: F.relu(x))
    monkeypatch.setitem(lowering._HANDLERS, "relu.default", real)
    module = Net(lambda s, x: x + s.g * s.d(x), g=nn.Parameter(torch.zeros(1)), d=nn.Conv2d(8, 8, 3, padding=1))
    monkeypatch.setitem(lowering._HANDLERS, "add.Tensor", lambda low, x, y: x)  # forgets a branch that is still zero
    with pytest.raises(FrontendError, match="differs from the module"):
        from_torch(module, EXAMPLE)


def test_what_rounding_makes_of_a_network_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn of the logistic map about doubles an error: in the end a rounding is 1e-9, and 1e-12 more than that."""
    from manidp.torch import frontend
    from manidp.torch.lowering import walk as lowering

    def middle(s: Any, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        for _ in range(24):
            x = 4 * x * (1 - x)
        return x

    small(middle)
    with monkeypatch.context() as m, pytest.raises(FrontendError, match=r"\(at most 1e-10\)"):
        m.setattr(frontend, "ROUNDINGS", 0)
        small(middle)
    wrong = lowering._HANDLERS["rsub.Scalar"]
    monkeypatch.setitem(lowering._HANDLERS, "rsub.Scalar", lambda low, x, y: wrong(low, x, y * (1 + 1e-12)))
    with pytest.raises(FrontendError, match=r"\(at most [1-9]e-0[6-9]\)"):
        small(middle)


def test_a_linear_layer_on_channels_last_is_a_convolution() -> None:
    made = imported("convnext").graph
    assert {node.name: node.kernel for node in made.nodes if isinstance(node, Conv)}["2.wide"] == 1
    assert sum(isinstance(node, Linear) for node in made.nodes) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_over_channels_in_any_layout_is_one_op(bias: bool) -> None:
    """Of a map with its channels last, of a vector, of one that lies as a map of 1 x 1, and written out."""

    def last(s: Any, x: Tensor) -> Any:
        return s.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def vector(s: Any, x: Tensor) -> Any:
        return s.n(x.mean((2, 3)))[:, :, None, None] * x

    def one_by_one(s: Any, x: Tensor) -> Any:
        return s.n(x.mean((2, 3), keepdim=True).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * x

    def factors(s: Any, x: Tensor) -> Any:
        b, c, h, w = x.shape
        y = s.two(x.reshape(b, 2, c // 2, h * w).permute(0, 3, 2, 1))
        return y.permute(0, 3, 2, 1).reshape(b, c, h, w)

    ways: list[Callable[[Any, Tensor], Any]] = [last, vector, one_by_one, factors]
    for middle in ways:
        made = small(middle, n=nn.LayerNorm(8, bias=bias), two=nn.LayerNorm((4, 2), bias=bias))
        assert kinds(made).count("LayerNorm") == 1
        (node,) = [node for node in made.graph.nodes if isinstance(node, LayerNorm)]
        assert len(made.graph.shapes[node.name]) == (3 if middle in (last, factors) else 1)
    by_hand = imported("convnext").graph
    assert sum(isinstance(node, LayerNorm) for node in by_hand.nodes) == 6


def test_what_was_trained_goes_back_into_the_module(tmp_path: Any) -> None:
    layers = (nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    dense = from_torch(module, EXAMPLE, preprocessing=CIFAR10_PREPROCESSING, classes=CIFAR10_CLASSES)
    recipe = Recipe(epochs=1, batch_size=4, learning_rate=0.01, keep_rate=0.5)
    sample = load_sample().take(np.arange(8))
    trained = manidp.torch.train(manidp.gate(dense).network, sample, recipe, tmp_path, threads=1)
    state = to_state_dict(trained, module)
    assert not torch.equal(state["3.weight"], module.state_dict()["3.weight"])
    module.load_state_dict(state)
    again = from_torch(module, EXAMPLE)
    assert all(np.array_equal(again.weights[name], trained.weights[name]) for name in again.weights)


def test_constants_are_not_trained(tmp_path: Any) -> None:
    """What a module's forward does with numbers of its own, and its buffers, stay; so all goes back into the module."""

    def middle(s: Any, x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(x[:, :, 1:], (0, 1, 2, 0)), s.blur, groups=8)  # a cut, zeros, a buffer as weights
        x = s.norm(x) * 0.5 + torch.arange(8.0).view(8, 1, 1)
        made: Tensor = s.two(F.pixel_unshuffle(x, 2)) * s.factor
        return made

    net = Net(middle, norm=nn.BatchNorm2d(8, affine=False), two=nn.Conv2d(32, 8, 1))
    net.fc = nn.Linear(8, 10)
    net.register_buffer("blur", torch.rand(8, 1, 2, 2))
    net.factor = nn.Parameter(torch.rand(8, 1, 1))
    dense = from_torch(net, EXAMPLE, preprocessing=CIFAR10_PREPROCESSING, classes=CIFAR10_CLASSES)
    recipe = Recipe(epochs=1, batch_size=4, learning_rate=0.01, momentum=0.9, weight_decay=0.1, ema=0.9)
    sample = load_sample().take(np.arange(8))
    state = to_state_dict(manidp.torch.train(dense, sample, recipe, tmp_path, threads=1), net)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == state.keys() - {"blur", "norm.num_batches_tracked"}


def test_a_pooled_vector_becomes_a_map_of_one_pixel_again() -> None:
    """Where a larger convolution reads what has been convolved, normalised, added and put together on the way."""

    def middle(s: Any, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 1)
        y = F.relu(s.norm(s.one(x)))
        z: Tensor = s.three(torch.cat([y + x, y * torch.sigmoid(x)], 1))  # of one pixel, as y and x are
        return y + z

    net = Net(middle, one=nn.Conv2d(8, 8, 1), norm=nn.BatchNorm2d(8), three=nn.Conv2d(16, 8, 3, padding=1))
    checkpoint = from_torch(net, EXAMPLE[:, :, :12, :10])
    assert sum(node.name.startswith("one") for node in checkpoint.graph.nodes) == 2  # as a vector for the end, as a map
    back = to_state_dict(checkpoint, net)
    assert all(torch.equal(back[name], value) for name, value in net.state_dict().items())


def test_a_vector_becomes_a_map_again_in_time_that_goes_with_its_ops() -> None:
    """Each of these sums reads the one before twice: along every path there would be 2^60 of them."""

    def middle(s: Any, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 1)
        for _ in range(60):
            x = x.relu() + x.sigmoid()
        made: Tensor = s.three(x)
        return made

    assert len(small(middle, three=nn.Conv2d(8, 8, 3, padding=1)).graph.nodes) < 200
