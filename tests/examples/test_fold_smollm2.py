"""The example that folds SmolLM2: its recipes and its picture, without the model."""

import pytest

pytest.importorskip("transformers")

from effc.passes.base import Pipeline
from examples.fold_smollm2 import Point, draw, points, recipe


def test_recipes_are_pipelines():
    passes = [p.name for p in Pipeline.parse(recipe(2, "gates", True, 8, 5))]
    assert [n for n in passes if n in ("drop-blocks", "share-blocks", "distil")] == [
        "drop-blocks", "share-blocks", "distil",
    ]  # fmt: skip
    assert passes[-1] == "fuse-regions" and "raise-ops" in passes[: passes.index("drop-blocks")]
    assert "distil" not in recipe(2, "random", False, 8, 0)


def test_the_rate_is_the_number_of_blocks_asked_for():
    for count in (2, 4, 8):
        (drop,) = (
            p for p in Pipeline.parse(recipe(count, "gates", False, 8, 0)) if "drop" in p.name
        )
        assert round(drop.rate * 30) == count


def test_what_the_benchmark_measured_becomes_points():
    folded = {"way": "drop", "stored": 4e8, "perplexity": 30.0, "repaired": True}
    entries = [{"name": "drop 3", "perplexity": 40.0}, {"name": "2 by gates", **folded}]
    assert points({"entries": entries}) == [Point("drop", 4e8, 30.0, True)]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    points = [Point("whole", 5e8, 25.0), Point("drop", 4e8, 40.0), Point("drop", 4e8, 30.0, True)]
    draw(points, tmp_path / "fold.png")
    assert (tmp_path / "fold.png").stat().st_size > 1000
