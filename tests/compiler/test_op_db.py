"""A slice of torch's operator database; `effc bench ops` runs all of it."""

import pytest

from effc.benchmarks.op_sweep import operators, sweep

# One of each kind: pointwise, promoted, in place by nature, views, reductions, indexing, random,
# linear algebra with several results, images, losses, uninitialised memory.
NAMES = (
    "add", "sub", "div", "pow", "remainder", "clamp", "where", "isclose", "logaddexp", "sum", "amax",
    "var_mean", "softmax", "cumsum", "sort", "topk", "view", "permute", "roll", "diagonal", "unfold",
    "index_put", "scatter_add", "gather", "masked_fill", "cat", "stack", "einsum", "matmul", "baddbmm",
    "linalg.svd", "linalg.inv", "fft.fft", "nn.functional.conv2d", "nn.functional.layer_norm",
    "nn.functional.group_norm", "nn.functional.interpolate", "nn.functional.max_pool2d",
    "nn.functional.gelu", "nn.functional.cross_entropy", "nn.functional.embedding",
    "nn.functional.scaled_dot_product_attention", "nn.functional.dropout", "empty_like", "zero_",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_operator_gives_eager_s_answer(name):
    for result in sweep(operators([name]), samples=1):
        assert result.skipped or not result.failure, result.failure


def test_a_wrong_backend_is_noticed():
    def wrong(gm, inputs):
        return lambda *args: [a + 1 for a in gm(*args)]

    (result,) = sweep(operators(["mul"]), samples=1, backend=wrong)
    assert result.failure
