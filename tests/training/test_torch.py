"""What torch brings to a training: its batches, its precision, torch.compile, the mean of teachers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from manidp.errors import TrainingError
from manidp.gating.place import with_gates
from manidp.torch.backend import Torch, TorchLearner
from manidp.torch.convert import network_from
from manidp.torch.losses import distillation_loss
from manidp.training.recipe import Recipe
from manidp.training.state import read_state, write_state

from .cases import GATED, PREPROCESSING, RECIPE, SHORT, fresh, image_set, trained, training

TORCH = Torch(threads=1)
AUGMENTED = replace(RECIPE, augment=True)


def learner(recipe: Recipe) -> TorchLearner:
    return TORCH.learner(fresh(TORCH), image_set(), recipe)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile itself uses what torch deprecates
def test_a_compiled_training_does_what_a_plain_one_does(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    recipe = replace(GATED, epochs=1)
    start = fresh(TORCH, with_gates(SHORT))
    plain, [expected] = trained(TORCH, tmp_path / "plain", recipe, start=start)
    compiled, [record] = trained(TORCH, tmp_path / "compiled", replace(recipe, compiled=True), start=start)
    assert record.loss == pytest.approx(expected.loss, rel=1e-3)
    wanted = plain.learner.state()
    for name, value in compiled.learner.state().items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-3, err_msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_a_compiler_it_is_said_how_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(TrainingError, match=r"torch\.compile failed: .*no-such-compiler.*compiled=false"):
        trained(TORCH, tmp_path / "run", replace(RECIPE, compiled=True), start=fresh(TORCH, SHORT))


def test_of_several_teachers_the_mean_is_followed() -> None:
    teachers = [fresh(TORCH, seed=seed) for seed in (1, 2)]
    learner = TORCH.learner(fresh(TORCH), image_set(), replace(RECIPE, distillation=1.0), teachers)
    images = torch.from_numpy(PREPROCESSING.apply(image_set().images[:8]))
    labels = torch.from_numpy(image_set().labels[:8])
    with torch.no_grad():
        output = learner.network(images)
        one, two = (network_from(teacher)(images).logits for teacher in teachers)
        wanted = distillation_loss(output.logits, (one + two) / 2, RECIPE.temperature)
        found = learner.loss(output, learner.taught(images), labels, 0.0)[0]
    torch.testing.assert_close(found, wanted)


def as_pixels(images: torch.Tensor) -> NDArray[np.uint8]:
    """What the network reads, (B, 3, H, W), back as uint8 (B, H, W, 3)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    pixels: NDArray[np.uint8] = ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def test_crops_and_flips_only_move_pixels() -> None:
    images_of = learner(AUGMENTED).batches
    plain = {tuple(p) for image in image_set().images for p in image.reshape(-1, 3)} | {(0, 0, 0)}
    batches = list(images_of(0))
    assert sum(len(labels) for _, labels in batches) == 64
    moved = 0
    for images, _ in batches:
        pixels = as_pixels(images)
        assert {tuple(p) for image in pixels[:4] for p in image.reshape(-1, 3)} <= plain
        moved += sum(not (pixels[i] == image_set().images).all((1, 2, 3)).any() for i in range(len(pixels)))
    assert moved > 48
    assert torch.equal(batches[0][0], next(iter(images_of(0)))[0])
    assert not torch.equal(batches[0][0], next(iter(images_of(1)))[0])


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_beyond_its_border_an_image_is_black_or_mirrored(mode: Literal["constant", "reflect"]) -> None:
    pad = [(0, 0), (4, 4), (4, 4), (0, 0)]
    crops = {
        padded[y : y + 8, x : x + 8][:, ::step].tobytes()
        for padded in np.pad(image_set().images, pad, mode)
        for y in range(9)
        for x in range(9)
        for step in (1, -1)
    }
    for images, _ in learner(replace(AUGMENTED, padding_mode=mode)).batches(0):
        for pixels in as_pixels(images):
            assert pixels.tobytes() in crops


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_the_precision_is_the_processors(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    able = dict.fromkeys(("avx2", "avx512_bf16", "amx_bf16", "bf16"), False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    found = [TORCH.precision]
    able[flag] = True
    assert [*found, TORCH.precision] == ["float32", "bfloat16"]


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_a_run_keeps_the_precision_it_began_with(
    first: Literal["float32", "bfloat16"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: Literal["float32", "bfloat16"] = "bfloat16" if first == "float32" else "float32"
    chosen, automatic = [first], replace(GATED, epochs=2, precision="auto")
    monkeypatch.setattr(Torch, "precision", property(lambda self: chosen[0]))
    with training(TORCH, tmp_path, automatic) as run:
        next(run.epochs())
    chosen[0] = other
    with training(TORCH, tmp_path, automatic, resume=True) as run:
        assert run.recipe.precision == first
    training(TORCH, tmp_path, replace(automatic, precision=first), resume=True).close()
    with pytest.raises(TrainingError, match=f"recipe precision '{first}' there, '{other}' here"):
        training(TORCH, tmp_path, replace(automatic, precision=other), resume=True)


def test_a_run_of_old_that_names_neither_backend_nor_processes_goes_on(tmp_path: Path) -> None:
    recipe = replace(GATED, epochs=2)
    with training(TORCH, tmp_path, recipe) as run:
        next(run.epochs())
    state = read_state(run.state_path)
    del state.run["backend"], state.run["processes"]
    write_state(run.state_path, state, load_file(run.state_path))
    with training(TORCH, tmp_path, recipe, resume=True) as run:
        assert [record.epoch for record in run.epochs()] == [1]
