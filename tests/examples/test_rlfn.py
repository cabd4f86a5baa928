"""The RLFN example: network and checkpoints, MATLAB bicubic, tiled inference, training, weights."""

import dataclasses
import json
import random
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from examples.rlfn import images, model, tiled, train  # noqa: E402

DATA = ROOT.parent / "shared" / "data"


def folder(name):
    path = DATA / name
    if not path.is_dir():
        pytest.skip(f"needs the folder ../shared/data/{name} beside the repository")
    return path


@pytest.fixture
def released():
    return folder("sr-rlfn")


@pytest.fixture
def testsets():
    return folder("sr-testsets")


@pytest.fixture(autouse=True)
def reproducible():
    """A fixed seed, and one thread: these networks are too small to share between busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pairs(testsets, name):
    for high in sorted((testsets / name / "HR").glob("*.png")):
        low = testsets / name / "LRx4" / high.name
        yield images.load_image(high), images.load_image(low)


# The network


@pytest.mark.parametrize(
    ("build", "x2", "x4"),
    [
        (model.rlfn, 526_856, 543_740),
        (model.rlfn_s, 454_620, 470_208),
        (model.rlfn_prune, None, 317_218),
    ],
)
def test_parameter_counts_equal_the_published_table(build, x2, x4):
    assert model.count_parameters(build(4)) == x4
    assert x2 is None or model.count_parameters(build(2)) == x2


def test_number_of_convolutions():
    def convolutions(net):
        return sum(isinstance(m, torch.nn.Conv2d) for m in net.modules())

    assert (convolutions(model.rlfn()), convolutions(model.rlfn_prune())) == (57, 39)
    assert (len(model.rlfn().state_dict()), len(model.rlfn_prune().state_dict())) == (114, 78)


@pytest.mark.parametrize("size", [(15, 15), (16, 17), (31, 23)])
def test_output_is_upscaled(size):
    for scale in (2, 4):
        out = model.RLFN(8, 12, 2, scale)(torch.rand(2, 3, *size))
        assert out.shape == (2, 3, scale * size[0], scale * size[1])


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match=r"at least 15x15 pixels, got 20x14; pad the image"):
        model.RLFN(8, blocks=1)(torch.zeros(1, 3, 20, 14))


@pytest.mark.slow
def test_exports_with_dynamic_sizes():
    # A pooled grid of one pixel (sizes below 21) is a case of its own for torch.export.
    net = model.RLFN(8, blocks=1).eval()
    x = torch.rand(2, 3, 24, 32)
    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(net, (x,), dynamic_shapes=(dims,))
    y = torch.rand(3, 3, 31, 23)
    torch.testing.assert_close(program.module()(y), net(y))


# Checkpoints


@pytest.mark.parametrize("name", ["rlfn_x4", "rlfn_ntire_x4"])
def test_released_weights_reproduce_their_golden_output(released, name):
    from safetensors.torch import load_file

    golden = load_file(released / f"{name}.golden.safetensors")
    net = model.load_rlfn(released / f"{name}.safetensors")
    with torch.inference_mode():
        out = net(golden["input"])
    # 0..255 in float32: other convolution algorithms sum in another order.
    torch.testing.assert_close(out, golden["output"], atol=2e-2, rtol=0)


def test_variant_is_inferred(tmp_path):
    net = model.RLFN(10, 12, 3, 2, esa_channels=6)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    again = model.load_rlfn(tmp_path / "net.pth")
    assert (again.channels, again.mid_channels, again.blocks) == (10, 12, 3)
    assert (again.upscale, again.esa_channels) == (2, 6)
    x = torch.rand(1, 3, 15, 18)
    assert torch.equal(again(x), net(x))


def test_half_precision_files_load_as_float32(tmp_path):
    from safetensors.torch import save_file

    state = {k: v.half() for k, v in model.RLFN(8, blocks=1).state_dict().items()}
    save_file(state, tmp_path / "net.safetensors")
    assert {p.dtype for p in model.load_rlfn(tmp_path / "net.safetensors").parameters()} == {
        torch.float32
    }


def test_bad_checkpoints_say_what_is_wrong(tmp_path):
    def load(state, name="net.pth"):
        torch.save(state, tmp_path / name)
        return model.load_rlfn(tmp_path / name)

    good = model.RLFN(8, blocks=2).state_dict()
    with pytest.raises(ValueError, match=r"missing block_2\.c5\.bias \[8\]"):
        load({k: v for k, v in good.items() if k != "block_2.c5.bias"})
    with pytest.raises(ValueError, match=r"conv_2\.bias has shape \[9\], expected \[8\]"):
        load(good | {"conv_2.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"unknown fc\.weight \[3\]"):
        load(good | {"fc.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"holds no RLFN:\n  missing conv_1\.weight"):
        load({"fc.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"47 outputs, which is no 3 \* scale\*\*2"):
        load(good | {"upsampler.0.weight": torch.zeros(47, 8, 3, 3)})
    with pytest.raises(ValueError, match="no flat dictionary of tensors"):
        load([1, 2])
    with pytest.raises(ValueError, match=r"unknown kind of weights file; have \.safetensors"):
        load(good, "net.bin")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        model.load_rlfn(tmp_path / "absent.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        model.load_rlfn(tmp_path / "torn.safetensors")
    (tmp_path / "torn.pth").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="not a readable file of tensors"):
        model.load_rlfn(tmp_path / "torn.pth")


def test_released_weights_reach_the_published_psnr_on_set5(released, testsets):
    net = model.load_rlfn(released / "rlfn_x4.safetensors")
    with torch.inference_mode():
        values = [images.y_psnr(net(low), high) for high, low in pairs(testsets, "Set5")]
    assert sum(values) / len(values) == pytest.approx(32.24, abs=0.01)


# Images


def test_downscale_makes_the_benchmarks_low_resolution_images(testsets):
    for high, low in pairs(testsets, "Set5"):
        # The benchmark was shrunk before its truth was cut, so only the rims can differ.
        diff = (images.downscale(high) - low).abs()[..., 2:-2, 2:-2]
        assert diff.max() <= 1
        assert (diff > 0).float().mean() < 0.02


def test_resizing_keeps_constants_and_ramps():
    flat = torch.full((1, 3, 20, 12), 77.0)
    assert torch.equal(images.resize_bicubic(flat, (5, 3)).round(), torch.full((1, 3, 5, 3), 77.0))
    ramp = torch.arange(32.0).expand(1, 3, 8, 32)
    up = images.resize_bicubic(ramp, (32, 128))
    want = (torch.arange(128) + 0.5) / 4 - 0.5
    torch.testing.assert_close(up[0, 0, 5, 12:-12], want[12:-12], atol=1e-4, rtol=0)


def test_downscale_refuses_odd_sizes():
    with pytest.raises(ValueError, match="22x24 is no multiple of 4; call modcrop first"):
        images.downscale(torch.zeros(1, 3, 22, 24))
    assert images.modcrop(torch.zeros(1, 3, 22, 25)).shape == (1, 3, 20, 24)


def test_psnr_of_a_known_error():
    a = torch.full((1, 3, 16, 16), 100.0)
    # Equal steps in R, G and B change Y by 219/255 of a step.
    assert images.y_psnr(a + 1, a) == pytest.approx(48.1308 + 1.3219, abs=1e-3)
    assert images.y_psnr(a, a) == float("inf")
    with pytest.raises(ValueError, match="shapes differ"):
        images.y_psnr(a, a[..., :8])


def test_images_survive_a_file(tmp_path):
    image = torch.randint(0, 256, (1, 3, 9, 7)).float()
    images.save_image(image + 0.3, tmp_path / "a.png")
    assert torch.equal(images.load_image(tmp_path / "a.png"), image)


def test_held_out_photographs_are_not_trained_on():
    trained, held = {p.file for p in images.TRAINING}, {p.file for p in images.HELD_OUT}
    assert len(held) >= 3
    assert not trained & held
    assert images.DEMO in images.HELD_OUT
    assert all(p.path.is_file() for p in images.TRAINING + images.HELD_OUT)


def test_absent_photograph_is_named():
    photo = images.Photograph("x", "no_such_package", "x.png", "")
    with pytest.raises(FileNotFoundError, match="comes with the package no_such_package"):
        _ = photo.path
    with pytest.raises(FileNotFoundError, match=r"this skimage does not ship data/x\.png"):
        _ = dataclasses.replace(photo, package="skimage", file="data/x.png").path


# Tiled inference


@pytest.mark.parametrize(("length", "overlap"), [(64, 16), (65, 16), (200, 0), (131, 31), (15, 4)])
def test_tiles_cover_and_shares_sum_to_one(length, overlap):
    starts = tiled.tile_starts(length, 48, overlap)
    tile = min(48, length)
    assert starts[0] == 0
    assert starts[-1] + tile == length
    assert all(a + tile - b >= overlap for a, b in pairwise(starts))
    total = torch.zeros(2 * length, dtype=torch.float64)
    for start, share in zip(starts, tiled.blend_weights(length, tile, overlap, 2), strict=True):
        total[2 * start : 2 * start + 2 * tile] += share
    torch.testing.assert_close(total, torch.ones_like(total))


def test_tiling_is_exact_for_a_local_network():
    def nearest(x):
        assert x.shape[-2:] == (32, 32)  # one shape only
        return F.interpolate(x, scale_factor=4)

    image = torch.rand(1, 3, 75, 90) * 255
    seen = []
    out = tiled.super_resolve(nearest, image, 32, 8, lambda *n: seen.append(n))
    torch.testing.assert_close(out, nearest_of(image), atol=1e-4, rtol=0)
    assert seen == [(n, 12) for n in range(1, 13)]


def nearest_of(image):
    return F.interpolate(image, scale_factor=4)


def largest_jumps(error, tile, overlap):
    """Mean jump of `error` along lines where a tile begins or ceases to count, and elsewhere."""
    seams, elsewhere = [], []
    for dim, other, n in ((2, 3, error.shape[2] // 4), (3, 2, error.shape[3] // 4)):
        jump = error.diff(dim=dim).abs().mean(dim=(0, 1, other)).tolist()
        starts = tiled.tile_starts(n, tile, overlap)
        shares = tiled.blend_weights(n, tile, overlap, 4)
        lines = {
            4 * start + int(edge)
            for start, share in zip(starts, shares, strict=True)
            for edge in (share > 0).diff().nonzero()
        } or {4 * start - 1 for start in starts[1:]}
        seams += [jump[line] for line in lines]
        elsewhere += [j for line, j in enumerate(jump) if line not in lines]
    return max(seams), max(elsewhere)


def test_tiling_leaves_no_seams():
    net = model.load_rlfn(train.WEIGHTS)
    low = images.downscale(images.DEMO.load())  # 128x128
    with torch.inference_mode():
        whole = net(low)
        feathered = tiled.super_resolve(net, low, 56, 20) - whole
        cut = tiled.super_resolve(net, low, 64, 0) - whole
    assert feathered.abs().mean() < 0.5
    seam, interior = largest_jumps(feathered, 56, 20)
    assert seam < 1.5 * interior
    assert largest_jumps(cut, 64, 0)[0] > 5 * seam  # the measure does see seams


def test_one_pass_is_the_network_itself():
    net = model.RLFN(8, blocks=1).eval()
    image = torch.rand(1, 3, 40, 33) * 255
    with torch.inference_mode():
        want = net(image)
    assert torch.equal(tiled.super_resolve(net, image, 40), want)
    assert torch.equal(tiled.super_resolve(net, image, None), want)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (14, 9), (60, 2)])
def test_tiny_images_are_padded_and_cut(size):
    out = tiled.super_resolve(model.RLFN(8, blocks=1), torch.rand(1, 3, *size), 24, 8)
    assert out.shape == (1, 3, 4 * size[0], 4 * size[1])


def test_bad_tiles_are_refused():
    image = torch.zeros(1, 3, 20, 20)
    with pytest.raises(ValueError, match="tile=8, overlap=4: a tile needs at least 15 pixels"):
        tiled.super_resolve(model.RLFN(8, blocks=1), image, 8, 4)
    with pytest.raises(ValueError, match=r"takes \[B, 3, H, W\], got shape \[3, 20, 20\]"):
        tiled.super_resolve(model.RLFN(8, blocks=1), image[0])


# Training

TINY = train.Recipe(
    channels=8, mid_channels=8, blocks=1, stages=2, batch=2, patch=16, shrink=(1.0, 0.5)
)


@pytest.fixture
def examples():
    return train.examples_of("coffee", images.HELD_OUT[2].load()[..., :160, :160], TINY.shrink)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_untrained_network_repeats_pixels_roughly():
    low = images.downscale(images.DEMO.load())[..., :48, :48] / 255
    with torch.no_grad():
        error = train.new_network(train.Recipe())(low) - nearest_of(low)
    assert error.abs().mean() < 0.1


def test_folding_the_range_is_exact_up_to_rounding():
    net = model.RLFN(8, blocks=2).double()
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    want = net(x) * 255
    net.load_state_dict(train.fold_range(net.state_dict()))
    torch.testing.assert_close(net(255 * x), want, rtol=1e-12, atol=1e-12)


def test_learning_rate_restarts_with_every_stage():
    r = train.Recipe()
    assert train.learning_rate(r.warmup, r) == pytest.approx(r.lr)
    assert train.learning_rate(1.0, r) == pytest.approx(r.lr_end)
    assert 0 < train.learning_rate(0.0, r) < 0.1 * r.lr


def test_crops_stay_aligned(examples):
    low, high, bicubic = train.Crops(examples, 16, 4).batch(8, random.Random(1))
    assert low.shape == (8, 3, 16, 16)
    assert high.shape == bicubic.shape == (8, 3, 64, 64)
    for image in (high, bicubic):
        assert (F.avg_pool2d(image, 4) - low).abs().mean() < 0.03


def test_stages_start_warm(examples):
    trainer = train.Trainer(TINY, train.Budget(steps=8), examples)
    for _ in range(4):
        trainer.train_step()
    assert trainer.stage == 0
    before = {k: v.clone() for k, v in trainer.average.state_dict().items()}
    optimiser = trainer.optimiser
    trainer._enter_stage()
    assert trainer.stage == 1
    assert same(before, trainer.net.state_dict())
    assert trainer.optimiser is not optimiser
    assert trainer._is_contrastive()
    assert not trainer.optimiser.state


def test_training_lowers_the_loss(examples):
    recipe = dataclasses.replace(TINY, stages=1, contrastive_stages=0)
    trainer = train.Trainer(recipe, train.Budget(steps=40), examples)
    losses = [trainer.train_step() for _ in range(40)]
    assert sum(losses[-12:]) < 0.95 * sum(losses[:12])


def test_resuming_continues_exactly(tmp_path, examples):
    budget = train.Budget(steps=8)
    straight = train.Trainer(TINY, budget, examples)
    for _ in range(8):
        straight.train_step()
    part = train.Trainer(TINY, budget, examples)
    for _ in range(5):
        part.train_step()
    part.save(tmp_path / "last.pt")
    again = train.Trainer.resume(tmp_path / "last.pt", examples)
    assert again.recipe == TINY
    while again.progress < 1:
        again.train_step()
    assert (again.step, again.stage) == (8, 1)
    assert same(straight.weights(), again.weights())


def test_interrupt_leaves_a_checkpoint_and_weights(tmp_path, examples, capsys):
    trainer = train.Trainer(TINY, train.Budget(steps=6), examples)
    step = trainer.train_step

    def interrupted_step():
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step()

    trainer.train_step = interrupted_step
    checkpoint, weights = tmp_path / "last.pt", tmp_path / "w.safetensors"
    assert not train.run(trainer, checkpoint, weights)
    assert "stopped at 50.0%; go on with --resume" in capsys.readouterr().out
    assert json.loads(weights.with_suffix(".json").read_text())["finished"] is False
    again = train.Trainer.resume(checkpoint, examples)
    assert train.run(again, checkpoint, weights)
    result = json.loads(weights.with_suffix(".json").read_text())
    assert (result["finished"], result["steps"]) == (True, 6)
    x = torch.rand(1, 3, 20, 20) * 255
    torch.testing.assert_close(model.load_rlfn(weights)(x), again.network()(x))


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        train.main(["--resume", "--checkpoint", str(tmp_path)])


# The committed weights


def test_committed_weights_beat_bicubic_on_held_out_photographs():
    assert train.WEIGHTS.stat().st_size <= 2.5e6
    scores = train.evaluate(model.load_rlfn(train.WEIGHTS))
    assert scores.gain >= 1.0
    stored = json.loads(train.WEIGHTS.with_suffix(".json").read_text())
    assert stored["gain_db"] == pytest.approx(scores.gain, abs=0.02)
    assert not set(stored["trained_on"]) & set(stored["held_out"])
