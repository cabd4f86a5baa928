"""Operators that become several ops, or none of their own: the same numbers, nothing kept whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effc.aten  # noqa: F401  (registers the converters)
from effc import ir
from effc.capture import Captured, capture_dynamo
from effc.importer import Imported, import_captured


def imported(fn, *args, dynamic=False):
    """What torch.compile's graph becomes, and what the reference interpreter makes of it."""
    found = []

    def backend(gm, example_inputs):
        captured = capture_dynamo(gm, example_inputs)
        assert isinstance(captured, Captured), captured
        made = import_captured(captured)
        assert isinstance(made, Imported), made
        found.append(made)

        def run(*arguments):
            given = [captured.inputs[i] for i in made.arguments]
            inputs = [g.tensor if g.position is None else arguments[g.position] for g in given]
            outputs = ir.interpret(made.graph, inputs)
            return [outputs[at] for _, at in made.results]

        return run

    with torch.no_grad():
        got = torch.compile(fn, backend=backend, dynamic=dynamic)(*args)
    (only,) = found
    ir.verify(only.graph)
    assert ir.parse(only.graph.text) == only.graph
    return got, only


@pytest.fixture(params=[False, True], ids=["static", "dynamic"])
def dynamic(request):
    return request.param


def check(fn, *args, dynamic):
    got, made = imported(fn, *args, dynamic=dynamic)
    assert not made.kept, [str(why) for why in made.kept.values()]
    with torch.no_grad():
        want = fn(*args)
    # float32 sums in another order
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def refused(fn, *args):
    """The reason why the operator stays whole."""
    _, made = imported(fn, *args)
    (why,) = made.kept.values()
    return str(why)


X, X3 = torch.arange(35.0).reshape(5, 7), torch.arange(60.0).reshape(3, 4, 5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda i, j: X[i],
        lambda i, j: X[:, j],
        lambda i, j: X[i, j],
        lambda i, j: X3[i, :, j],
        lambda i, j: X3[:, i, j],
        lambda i, j: (X > 3)[i],
        lambda i, j: X[torch.arange(5)[:, None], torch.arange(7)],
        lambda i, j: X[torch.arange(5), torch.arange(5)],
    ],
)
def test_indexing_by_tensors(fn, dynamic):
    check(fn, torch.tensor([[-3], [2], [0]]), torch.tensor([-1, 0, 4, 2]), dynamic=dynamic)


def test_indexing_by_whole_ranges_looks_nothing_up(dynamic):
    def fn(x):
        return x[torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])[None]]

    _, made = imported(fn, X, dynamic=dynamic)
    assert not any(node.name == "embedding" for node in made.graph.nodes)
    check(fn, X, dynamic=dynamic)


@pytest.mark.parametrize(("shape", "dim"), [((9,), 0), ((4, 6), 0), ((4, 6), 1), ((3, 4, 5), -2)])
def test_gather(shape, dim, dynamic):
    index = torch.randint(0, shape[dim], [max(1, s - 1) for s in shape])
    check(lambda x, i: x.gather(dim, i), torch.randn(shape), index, dynamic=dynamic)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nhwpqc->nchpwq", [(2, 3, 4, 2, 2, 5)]),
        ("ij->j", [(3, 4)]),
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("ij,kj->ik", [(3, 4), (5, 4)]),
        ("bhqd,bkhd->bqhk", [(2, 3, 4, 5), (2, 6, 3, 5)]),
        ("i,j->ij", [(3,), (4,)]),
        ("bi,bi->b", [(3, 4), (3, 4)]),
        ("bc,bchw->bhw", [(2, 3), (2, 3, 4, 5)]),
        ("ij,jk->i", [(3, 4), (4, 5)]),
    ],
)
def test_einsum(equation, shapes, dynamic):
    check(lambda *a: torch.einsum(equation, *a), *map(torch.randn, shapes), dynamic=dynamic)


def test_einsum_of_a_diagonal_stays_whole():
    assert "einsum ii->i" in refused(lambda x: torch.einsum("ii->i", x), torch.randn(3, 3))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_the_tensors_own_elements(mode, dynamic):
    check(lambda x: F.pad(x, (1, 2, 3, 0), mode=mode), torch.randn(2, 3, 5, 6), dynamic=dynamic)


@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_meshgrid(indexing, dynamic):
    def fn(a, b, c):
        return torch.meshgrid(a, b, c, indexing=indexing)

    check(fn, torch.randn(3), torch.randn(4), torch.randn(2), dynamic=dynamic)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.repeat_interleave(3, dim=1),
        lambda x: x.repeat_interleave(2),
        lambda x: torch.outer(x[0], x[1]),
        lambda x: torch.diff(x, dim=0),
        lambda x: torch.diff(x, prepend=x[:, :1] - 1, append=x[:, :2]),
        lambda x: F.normalize(x),
        lambda x: torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True),
    ],
)
def test_one_operand(fn, dynamic):
    check(fn, torch.randn(5, 7), dynamic=dynamic)


@pytest.mark.parametrize(("kernel", "bias"), [(2, True), (7, False)])
def test_transposed_convolution_with_windows_side_by_side(kernel, bias, dynamic):
    net = nn.ConvTranspose2d(3, 4, kernel, stride=kernel, bias=bias)
    check(net, torch.randn(2, 3, 5, 6), dynamic=dynamic)


def test_transposed_convolution_with_overlapping_windows_stays_whole():
    why = refused(nn.ConvTranspose2d(3, 4, 3, stride=2), torch.randn(2, 3, 5, 6))
    assert "a (3, 3) kernel and stride (2, 2)" in why


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer(norm_first, activation, dynamic):
    net = nn.TransformerEncoderLayer(
        16, 4, 32, activation=activation, norm_first=norm_first, batch_first=True
    )
    check(net.eval(), torch.randn(2, 5, 16), dynamic=dynamic)


def test_batch_norm_of_a_trained_network(dynamic):
    net = nn.BatchNorm2d(3).eval()
    net.running_mean.normal_()
    net.running_var.uniform_(0.5, 1)
    check(net, torch.randn(2, 3, 4, 5), dynamic=dynamic)


# ------------------------------------------------------------------ writes into a part


def to_rows(y, a):
    y[1:3] = a[1:3]


def to_each_column(y, a):
    y[:, 0::2] = a[:, :3]
    y[:, 1::2] = 2 * a[:, 3:]


def to_every_second_column(y, a):
    y[:, 1::2] = a[:, :1]


def to_one(y, a):
    y[2] = a[0]
    y[:, -1] = 0


@pytest.mark.parametrize("write", [to_rows, to_each_column, to_every_second_column, to_one])
def test_writes(write):
    def fn(x, a):
        y = x + 1
        write(y, a)
        return y

    check(fn, torch.randn(5, 6), torch.randn(5, 6), dynamic=False)


def test_writing_every_column_of_an_empty_tensor_is_a_stack():
    def rotated(x):
        y = torch.empty_like(x)
        y[..., 0::2] = -x[..., 1::2]
        y[..., 1::2] = x[..., 0::2]
        return y

    _, made = imported(rotated, torch.randn(2, 3, 8))
    assert [n.name for n in made.graph.nodes][-2:] == ["cat", "reshape"]
    assert not any(n.name == "full" for n in made.graph.nodes)
    check(rotated, torch.randn(2, 3, 8), dynamic=False)


def test_two_equal_sizes_are_one_input():
    """Dynamo makes a number of each marked dimension and may find them equal later."""
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    torch._dynamo.mark_dynamic(a, 0)
    torch._dynamo.mark_dynamic(b, 0)
    _, made = imported(lambda a, b: (a + b, a.shape[0])[0], a, b)
    names = [i.key for i in made.graph.inputs]
    assert len(names) == len(set(names)) and "a" in names and "b" in names


@pytest.mark.parametrize("index", [[[0, 3]], [[-1, 0]]])
def test_gather_refuses_an_index_that_is_outside_in_its_own_dimension(index):
    x, ids = torch.arange(12.0).reshape(4, 3), torch.tensor(index)
    fast = torch.compile(lambda x, i: torch.gather(x, 1, i), backend="effc")
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        fast(x, ids)
