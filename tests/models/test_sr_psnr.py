"""The published accuracy of RLFN x4, reached by the compiled network on the standard images."""

import pytest
import torch
from torch._dynamo.utils import counters

import effc
from examples import zoo

images = pytest.importorskip("examples.rlfn.images", reason="needs pillow")


@pytest.mark.parametrize(
    ("name", "published"),
    [("Set5", 32.24), pytest.param("Set14", 28.62, marks=pytest.mark.slow)],
)
def test_compiled_rlfn_reaches_the_published_psnr(shared_data, name, published):
    net = zoo.network("sr-rlfn").load(shared_data / "sr-rlfn")
    counters.clear()
    fast = torch.compile(net, backend="effc")
    values = []
    for high in sorted((shared_data / "sr-testsets" / name / "HR").glob("*.png")):
        low = images.load_image(high.parents[1] / "LRx4" / high.name)
        torch._dynamo.mark_dynamic(low, (2, 3))
        with torch.no_grad():
            values.append(images.y_psnr(fast(low), images.load_image(high)))
    assert sum(values) / len(values) == pytest.approx(published, abs=0.01)
    # One graph for images of any size; where the first is square, torch makes it one for squares.
    assert counters["stats"]["unique_graphs"] <= 2
    assert not any(r.refusal for r in effc.explain(fast).records)
