"""Capture: what both ways in give, compared with PyTorch running the same code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from effc.aliasing import overlapping
from effc.capture import ArgumentView, Captured, Refusal, capture_dynamo, capture_exported, origin


def run_captured(captured: Captured, args=()) -> list:
    """Run the captured graph as it is: pick the inputs, copy the mutations back, return results."""
    values = [i.tensor if i.position is None else args[i.position] for i in captured.inputs]
    assert not captured.needs_overlap_check or not overlapping(
        [v for v in values if isinstance(v, torch.Tensor)]
    )
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        outputs = list(captured.graph_module(*values))
        for spec, output in zip(captured.outputs, outputs, strict=True):
            if spec.mutates is not None:
                values[spec.mutates].copy_(output)
    return [
        v.of(values[v.index]) if isinstance(v := spec.value, ArgumentView) else output
        for spec, output in zip(captured.outputs, outputs)
        if spec.mutates is None
    ]


class Catch:
    """A backend that captures, keeps what it got, and runs it (or the original when refused)."""

    def __init__(self):
        self.got, self.arguments, self.calls = [], [], 0

    def __call__(self, gm, example_inputs):
        captured = capture_dynamo(gm, example_inputs)
        self.got.append(captured)
        self.arguments.append(example_inputs)
        if isinstance(captured, Refusal):
            return gm.forward

        def run(*args):
            self.calls += 1
            return run_captured(captured, args)

        return run

    @property
    def one(self) -> Captured | Refusal:
        assert len(self.got) == 1, self.got
        return self.got[0]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(fn, *args, dynamic=None, exact=True, **kwargs) -> Captured | Refusal:
    """Compile and compare with eager: results, arguments, module state and the generator after."""
    catch = Catch()
    mine, theirs = copy.deepcopy((fn, args, kwargs)), copy.deepcopy((fn, args, kwargs))
    torch.manual_seed(1)
    expected = theirs[0](*theirs[1], **theirs[2])
    state = torch.get_rng_state()
    torch.manual_seed(1)
    result = torch.compile(mine[0], backend=catch, dynamic=dynamic, fullgraph=True)(
        *mine[1], **mine[2]
    )
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(result, expected, **tolerance)
    torch.testing.assert_close(mine[1], theirs[1], **tolerance)
    if isinstance(fn, nn.Module):
        torch.testing.assert_close(mine[0].state_dict(), theirs[0].state_dict(), **tolerance)
    assert torch.equal(torch.get_rng_state(), state)
    return catch.one


def exported(module, args=(), kwargs=None, **options) -> Captured | Refusal:
    return capture_exported(torch.export.export(module, args, kwargs, **options))


def operators(captured: Captured) -> list[str]:
    assert isinstance(captured, Captured), captured
    targets = [n.target for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    return [str(target).removeprefix("aten.").removesuffix(".default") for target in targets]


def kinds(captured: Captured) -> list[tuple[str, str]]:
    return [(i.kind, i.name) for i in captured.inputs]


def rand(*shape):
    return torch.rand(*shape) * 2 - 1


# ---------------------------------------------------------------------------------- whole operators

X, S, Q = rand(2, 4, 8, 8), rand(2, 6, 8), rand(2, 2, 6, 8)
WHOLE = {
    "scaled_dot_product_attention": lambda x, s, q: F.scaled_dot_product_attention(q, q, q),
    "linear": lambda x, s, q: F.linear(s, q[0, 0]),
    "matmul": lambda x, s, q: s @ s.mT,
    "einsum": lambda x, s, q: torch.einsum("bik,bjk->bij", s, s),
    "rms_norm": lambda x, s, q: F.rms_norm(s, (8,)),
    "layer_norm": lambda x, s, q: F.layer_norm(s, (8,)),
    "group_norm": lambda x, s, q: F.group_norm(x, 2),
    "instance_norm": lambda x, s, q: F.instance_norm(x),
    "upsample_bilinear2d.vec": lambda x, s, q: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "upsample_nearest2d.vec": lambda x, s, q: F.interpolate(x, scale_factor=2),
    "_upsample_bicubic2d_aa.vec": lambda x, s, q: F.interpolate(
        x, scale_factor=2, mode="bicubic", antialias=True
    ),
    "softmax.int": lambda x, s, q: s.softmax(-1),
    "log_softmax.int": lambda x, s, q: s.log_softmax(-1),
    "max_pool2d": lambda x, s, q: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x, s, q: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x, s, q: F.adaptive_avg_pool2d(x, 1),
    "pixel_shuffle": lambda x, s, q: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x, s, q: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x, s, q: F.channel_shuffle(x, 2),
    "gelu": lambda x, s, q: F.gelu(s),
    "silu": lambda x, s, q: F.silu(s),
    "leaky_relu": lambda x, s, q: F.leaky_relu(s, 0.1),
    "pad": lambda x, s, q: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "im2col": lambda x, s, q: F.unfold(x, 3),
    "grid_sampler": lambda x, s, q: F.grid_sample(x, x[:, :, :, :2], align_corners=False),
    "cosine_similarity": lambda x, s, q: F.cosine_similarity(s, s, dim=-1),
    "split.Tensor": lambda x, s, q: s.chunk(2, -1)[0],
    "dropout": lambda x, s, q: F.dropout(s, 0.5, training=True),
}


@pytest.mark.parametrize("name", WHOLE)
def test_composite_operator_stays_whole(name):
    found = operators(compiled(WHOLE[name], X, S, Q))
    helpers = {"select.int", "transpose.int", "slice.Tensor", "<built-in function getitem>"}
    assert [op for op in found if op not in helpers] == [name]


def test_operators_that_torch_itself_takes_apart():
    """Not ours to change: recorded so that a new torch that differs is noticed."""
    norm = nn.BatchNorm2d(4).eval()
    assert operators(compiled(norm, X))[0] == "_native_batch_norm_legit_no_training"
    assert operators(compiled(lambda s: s.unflatten(-1, (2, 4)), S)) == ["view"]
    assert operators(compiled(lambda s: F.normalize(s, dim=-1), S)) == [
        "linalg_vector_norm",
        "clamp_min",
        "expand",
        "div.Tensor",
    ]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert operators(compiled(layer, S)) == ["_transformer_encoder_layer_fwd"]


# --------------------------------------------------------------------------------- inputs and names


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_1 = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.blocks[1].weight = self.blocks[0].weight
        self.register_buffer("scale", rand(8), persistent=False)
        self.shift = rand(8)
        self.unused = nn.Linear(2, 2)

    def forward(self, image, ignored=None, *, gain=1.0):
        y = self.conv_1(image)
        for block in self.blocks:
            y = block(y)
        return y * self.scale * gain + self.shift


NET_INPUTS = {
    ("weight", "conv_1.weight"),
    ("weight", "conv_1.bias"),
    ("user", "image"),
    ("weight", "blocks.0.weight"),
    ("weight", "blocks.0.bias"),
    ("weight", "blocks.1.bias"),
    ("weight", "scale"),
    ("weight", "shift"),
}


def test_weights_have_their_state_dict_names_and_live_tensors():
    net, catch = Net(), Catch()
    image = rand(1, 3, 8, 8)
    torch.compile(net, backend=catch)(image, ignored=rand(3))
    captured, arguments = catch.one, catch.arguments[0]
    assert set(kinds(captured)) == NET_INPUTS
    for given in captured.inputs:
        if given.kind == "weight":
            assert given.tensor is operator_attr(net, given.name) is arguments[given.position]
        else:
            assert given.tensor is None and arguments[given.position].shape == image.shape


def operator_attr(module, path):
    for step in path.split("."):
        module = getattr(module, step)
    return module


def test_two_modules_keep_their_own_names():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    captured = compiled(lambda x: second(first(x)), rand(2, 4))
    assert set(kinds(captured)) == {
        ("user", "x"),
        ("weight", "first.weight"),
        ("weight", "first.bias"),
        ("weight", "second.weight"),
        ("weight", "second.bias"),
    }


def test_tensors_that_a_module_only_holds_are_user_inputs():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = [rand(3), {"a": rand(3)}]
            torch._dynamo.mark_static_address(self.held[0])

        def forward(self, x):
            return x + self.held[0] + self.held[1]["a"]

    assert {kind for kind, _ in kinds(compiled(Holder(), rand(3)))} == {"user"}


def test_closed_over_tensor_is_a_user_input():
    table = rand(4)
    assert kinds(compiled(lambda x: x + table, rand(4))) == [("user", "x"), ("user", "table")]


def test_constant_of_the_graph_is_a_weight_without_a_position():
    captured = compiled(lambda x: x + torch.tensor([1.0, 2.0]), rand(2))
    assert [(i.kind, i.position) for i in captured.inputs] == [("user", 0), ("weight", None)]
    assert captured.inputs[1].tensor.tolist() == [1.0, 2.0]


def test_same_tensor_twice():
    x = rand(3)
    assert len(compiled(lambda x, y: x + 2 * y, x, x).inputs) == 1
    assert len(compiled(lambda x, y: x + 2 * y, x, x + 1).inputs) == 2


def test_blocks_that_share_code_share_a_graph():
    """Regional compilation: one capture; each call brings its own weights at the positions."""
    blocks, catch = [nn.Linear(4, 4) for _ in range(3)], Catch()
    run = [torch.compile(block, backend=catch) for block in blocks]
    x = rand(2, 4)
    for block, fast in zip(blocks, run):
        torch.testing.assert_close(fast(x), block(x))
    assert catch.calls == 3 and catch.one.inputs[0].tensor is blocks[0].weight
    assert (
        kinds(catch.one) == [("weight", "weight"), ("weight", "bias"), ("user", "args.0")]
        or [kind for kind, _ in kinds(catch.one)].count("weight") == 2
    )


def test_constants_and_sizes_as_results():
    captured = compiled(lambda x: (x + 1, None, x.shape[0], {"k": x}), rand(3), dynamic=True)
    assert isinstance(captured, Captured)


def test_python_numbers():
    def scale(x, by, add):
        return x * by, add + 1, x.shape[0] * 2

    captured = compiled(scale, rand(3, 4), 2.5, 3, dynamic=True)
    assert ("scalar", "by") in kinds(captured) and ("symbol", "add") in kinds(captured)


def test_one_capture_for_all_sizes():
    net, catch = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.LayerNorm(4)), Catch()
    fast = torch.compile(net, backend=catch)
    for n in (3, 7, 64):
        x = rand(n, 8)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(fast(x), net(x))
    [size] = [i for i in catch.one.inputs if i.kind == "symbol"]
    result = catch.one.outputs[0].value.meta["val"]
    assert result.shape[0].node.expr == size.node.meta["val"].node.expr and result.shape[1] == 4


# ---------------------------------------------------------------------------- mutation and aliasing


def mutations(captured: Captured) -> list[str]:
    return [captured.inputs[o.mutates].name for o in captured.outputs if o.mutates is not None]


def test_written_arguments_are_copied_back():
    def step(a, b, c):
        a.add_(1)
        c.copy_(b)
        return a * b

    captured = compiled(step, rand(3), rand(3), rand(3))
    assert sorted(mutations(captured)) == ["a", "c"] and captured.needs_overlap_check
    assert [captured.inputs[i].name for i in captured.written] == mutations(captured)


def test_batch_norm_in_training_mode_writes_its_statistics():
    captured = compiled(nn.BatchNorm2d(4), X)
    assert mutations(captured) == ["num_batches_tracked", "running_mean", "running_var"]
    assert {i.name for i in captured.inputs if i.kind == "state"} == set(mutations(captured))
    assert not compiled(nn.BatchNorm2d(4).eval(), X).needs_overlap_check


def setitem(a):
    a[0] = 3
    a[:, 1] += a[:, 0]
    return a.sum()


def static_cache(cache, new, at):
    cache.index_copy_(1, at, new)
    return F.dropout(cache, 0.5, training=False).softmax(-1)


def view_of_intermediate(a):
    y = a + 1
    row = y[0]
    row.mul_(2)
    return y, row, y.view(-1)


def cast_that_does_nothing(a):
    b = a.to(torch.float32)
    b.add_(1)
    return a * 2, b


@pytest.mark.parametrize(
    "fn, args",
    [
        (setitem, (rand(3, 4),)),
        (static_cache, (rand(1, 4, 2), rand(1, 1, 2), torch.tensor([2]))),
        (view_of_intermediate, (rand(3, 4),)),
        (lambda a: (a[0], a.view(-1), a.t(), a, a), (rand(3, 4),)),
        (lambda a: (F.dropout(a, training=False), a + 0), (rand(3),)),
        (cast_that_does_nothing, (rand(3),)),
        (lambda a: torch.add(a, 1, out=torch.empty(3)), (rand(3),)),
        (lambda a: (a.conj(), torch.view_as_complex(a) * 1j), (rand(3, 2),)),
    ],
)
def test_in_place_and_views(fn, args):
    assert isinstance(compiled(fn, *args), Captured)


def test_results_that_are_views_stay_views():
    captured = compiled(lambda a: (a[0], a.view(-1)), a := rand(3, 4))
    keys = {r.untyped_storage().data_ptr() for r in run_captured(captured, [a])}
    assert keys == {a.untyped_storage().data_ptr()}


def inactive_dropout_is_the_same_memory(a):
    h = F.dropout(a, training=False)
    a.add_(1)
    return h * 2


def test_write_shows_through_inactive_dropout():
    assert "dropout" not in operators(compiled(inactive_dropout_is_the_same_memory, rand(3)))


def written_and_viewed(a):
    row = a[1]
    a.add_(1)
    return a, row, a.t()[1:], a * 2, row[2:]


def test_results_that_are_memory_of_a_written_argument():
    a = rand(7, 4)[1:].as_strided((3, 4), (8, 1))
    b, catch = a.clone(), Catch()
    result = torch.compile(written_and_viewed, backend=catch)(a)
    torch.testing.assert_close(result, written_and_viewed(b), rtol=0, atol=0)
    assert result[0] is a
    assert sum(isinstance(o.value, ArgumentView) for o in catch.one.outputs) >= 3
    a.zero_()
    assert [bool(r.any()) for r in result] == [False, False, False, True, False]
    whole = compiled(lambda a: (a.add_(1), a * 2), rand(3, 4), dynamic=True)
    assert whole.outputs[1].value == ArgumentView(whole.written[0])
    refusal = compiled(written_and_viewed, rand(3, 4), dynamic=True)
    assert refusal.reason == "result 0 shares memory with a"  # of symbolic size and stride


def einsum_and_write(a):
    b = torch.einsum("ij->ji", a)
    b.add_(1)  # dead code to who thinks that einsum always makes new memory
    return a * 2


def complex_view(a):
    b = torch.view_as_complex(a.view(3, 2, 2))
    a.add_(1)
    return a * 2, b


def broadcast_and_write(a):
    b, _ = torch.broadcast_tensors(a, a + 1)
    b.add_(1)
    return a * 2


def broadcast_beside_a_write(a):
    x, y = torch.broadcast_tensors(a.type_as(a), a[0])
    kept = torch.zeros(3).index_add_(0, torch.tensor([1]), x.mT.reshape(-1)[:1])
    return x + y, kept.mul_(2)


def test_undeclared_view_of_what_nobody_writes_is_taken():
    assert "broadcast_tensors" in operators(compiled(broadcast_beside_a_write, rand(3, 4)))


@pytest.mark.parametrize(
    "fn, reason",
    [
        (broadcast_and_write, "broadcast_tensors may return memory that is written"),
        (einsum_and_write, "einsum may return memory that is written"),
        (complex_view, "result 1 shares memory with a"),
    ],
)
def test_refuses_an_alias_it_would_lose(fn, reason):
    refusal = compiled(fn, rand(3, 4))
    assert (refusal.kind, refusal.reason) == ("alias", reason)


def test_refuses_written_arguments_that_overlap():
    base, catch = rand(6), Catch()
    torch.compile(lambda a, b: a.add_(1).sum() + b, backend=catch)(base[:4], base[2:])
    assert catch.one.kind == "alias"


def test_overlapping():
    base = rand(4, 6)
    assert overlapping([base, base[1]])
    assert not overlapping([base[:2], base[2:], rand(3), rand(0)])
    assert overlapping([base[:, :3], base[:, 3:]])  # errs to True: the ranges cross
    assert overlapping([rand(2), base, base.t()], written=[1])
    assert not overlapping([rand(2), base, base.t()], written=[0])


# ---------------------------------------------------------------------- gradients, autocast, random


def test_training_is_refused():
    layer, x = nn.Linear(4, 4), rand(2, 4)
    with torch.enable_grad():
        refusal = compiled(layer, x)
    assert refusal.kind == "training" and "needs a gradient" in refusal.reason
    assert isinstance(compiled(layer, x), Captured)


def own_no_grad(x, w):
    with torch.no_grad():
        y = x @ w
    return y + 1


def moving_average(average, w):
    with torch.no_grad():
        average.mul_(0.9).add_(w, alpha=0.1)
    return average.sum()


def own_enable_grad(x, w):
    with torch.enable_grad():
        return x @ w


def history_in_argument(x, w):
    x.add_(w)


def test_gradient_modes_inside_the_graph():
    x, w = rand(3, 3), nn.Parameter(rand(3, 3))
    with torch.enable_grad():
        assert operators(compiled(own_no_grad, x, w)) == ["matmul", "add.Tensor"]
        assert operators(compiled(lambda x, w: (x @ w).detach(), x, w)) == ["matmul", "detach"]
        assert mutations(compiled(moving_average, x, w)) == ["average"]
        catch = Catch()
        torch.compile(history_in_argument, backend=catch)(y := x.clone(), w)
        assert catch.one.kind == "training" and y.requires_grad
    assert compiled(own_enable_grad, x, w).kind == "training"
    assert operators(compiled(own_enable_grad, x, w.detach())) == ["matmul"]


def test_gradient_mode_is_guarded():
    layer, x, catch = nn.Linear(4, 4), rand(2, 4), Catch()
    fast = torch.compile(layer, backend=catch)
    fast(x)
    with torch.enable_grad():
        assert fast(x).requires_grad
    assert not fast(x).requires_grad
    assert [type(got) for got in catch.got] == [Captured, Refusal]


def test_inference_mode():
    layer, x = nn.Linear(4, 4), rand(2, 4)
    with torch.inference_mode():
        assert operators(compiled(layer, x)) == ["linear"]

    def inside(x):
        with torch.inference_mode():
            return layer(x)

    assert operators(compiled(inside, x)) == ["linear"]


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.norm = nn.Conv2d(4, 8, 3), nn.Linear(6, 8), nn.LayerNorm(8)

    def forward(self, x):
        y = self.norm(self.fc(self.conv(x)))
        attended = F.scaled_dot_product_attention(y, y, y)
        with torch.autocast("cpu", enabled=False):
            exact = x @ x.mT
        z = torch.einsum("bcij,bckj->bcik", attended, y).softmax(-1)
        return z, exact, F.mse_loss(y, y.float() + 1), torch.cat([y, y.float()]), x + 1


def test_autocast_region_becomes_casts():
    def region(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    model = Mixed()
    captured = compiled(region, X)
    assert operators(captured).count("_to_copy") >= 8
    whole = {"conv2d", "linear", "layer_norm", "scaled_dot_product_attention", "softmax.int"}
    assert whole <= set(operators(captured))


def test_ambient_autocast_becomes_casts():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = compiled(Mixed(), X)
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
    assert captured.outputs[0].value.meta["val"].dtype is torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_that_changes_nothing_is_left_out():
    def regions(x, w):
        with torch.autocast("cpu", enabled=False):
            y = x @ w
        with torch.autocast("cuda", dtype=torch.float16):
            return y @ w

    assert operators(compiled(regions, rand(3, 3), rand(3, 3))) == ["matmul", "matmul"]


def test_random_numbers_come_in_the_same_order():
    def noisy(x):
        torch.rand(3)  # unused, but it moves the generator
        y = F.dropout(x, 0.3, training=True) + torch.randn_like(x)
        weights = torch.empty(4).exponential_().log_normal_(0.1).uniform_(0.1, 1)
        picked = torch.multinomial(weights, 2), torch.randperm(5), torch.randint(0, 9, (3,))
        attended = F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)
        dropped = F.alpha_dropout(x, 0.5, True), F.dropout2d(x[None, None], 0.5, True)
        return y, torch.bernoulli(x.sigmoid()), picked, attended, dropped, F.rrelu(x, training=True)

    captured = compiled(noisy, rand(4, 5))
    assert [node.target for node in captured.effects] == [torch.ops.aten.rand.default]


def test_assertion_of_the_user_is_kept():
    def checked(x):
        torch._assert_async((x < 10).all(), "too large")  # what Dynamo makes of an assert
        torch._assert_async((x > -10).all())
        return x + 1

    captured = compiled(checked, rand(3))
    assert [node.target for node in captured.effects] == [torch.ops.aten._assert_async.msg] * 2
    with pytest.raises(RuntimeError, match="too large"):
        run_captured(captured, [rand(3) + 10])


# -------------------------------------------------------------------------------- regions, refusals


def test_regions_are_inlined():
    @torch.compiler.nested_compile_region
    def block(x):
        return x.sin() + 1

    assert operators(compiled(lambda x: block(block(x)), rand(3))) == ["sin", "add.Tensor"] * 2

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False) + 1

    assert operators(compiled(checkpointed, rand(3))) == ["sin", "add.Tensor"]


def test_the_dynamo_graph_is_left_as_it_was():
    seen = []

    def backend(gm, example_inputs):
        before = gm.code
        assert isinstance(capture_dynamo(gm, example_inputs), Captured)
        seen.append(gm.code == before)
        return gm.forward

    torch.compile(inactive_dropout_is_the_same_memory, backend=backend)(rand(3))
    assert seen == [True]


@torch.library.custom_op("effc_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("effc_test::double_", mutates_args=("x",))
def double_(x: torch.Tensor) -> None:
    x.mul_(2)


def test_functional_custom_operator_is_an_ordinary_node():
    assert operators(compiled(lambda x: twice(x) + 1, rand(3))) == ["effc_test.twice", "add.Tensor"]


def calls_double(x):
    y = x + 1
    double_(y)
    return y


@pytest.mark.parametrize(
    "fn, kind, reason",
    [
        (calls_double, "mutation", "effc_test.double_.default writes into its argument"),
        (
            lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
            "higher-order",
            "cond holds a graph of its own",
        ),
        (
            lambda x: torch.vmap(lambda row: row.sum())(x),
            "transform",
            "the graph holds a torch.func transform",
        ),
    ],
)
def test_refusals(fn, kind, reason):
    refusal = compiled(fn, rand(3, 3))
    assert (refusal.kind, refusal.reason) == (kind, reason)
    assert refusal.where.endswith(".py:" + refusal.where.rpartition(":")[2])


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
def test_sizes_from_data_are_refused_with_their_line():
    def found(x):
        return x.nonzero()

    def taken(x):
        return x * x.sum().item()

    for fn in (found, taken):
        refusal = compiled(fn, rand(3).abs())
        line = fn.__code__.co_firstlineno + 1
        assert (refusal.kind, refusal.where) == ("unbacked-size", f"test_capture.py:{line}")


def test_operators_that_ask_for_an_effect_token():
    assert operators(compiled(torch.linalg.inv, torch.eye(3))) == ["linalg_inv"]


def test_other_tensors():
    assert isinstance(compiled(lambda x: x * 1j, rand(3) + 1j), Captured)
    assert operators(compiled(lambda x: x + 1, torch.empty(3, device="meta"))) == ["add.Tensor"]
    sparse = rand(3, 3).to_sparse()
    refusal = capture_dynamo(_graph_of_one(sparse), [sparse])
    assert str(refusal) == "layout: argument x is stored as torch.sparse_coo"


def _graph_of_one(value):
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"),))
    return torch.fx.GraphModule({}, graph)


def test_failed_export_is_a_refusal_with_torchs_words():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.mm, (x, x)),))
    refusal = capture_dynamo(torch.fx.GraphModule({}, graph), [rand(2, 3)])
    assert refusal.kind == "export-failed" and "mm" in refusal.reason


# ------------------------------------------------------------------------------------------- export


class Rlfn(nn.Module):
    """A small residual local feature network: convolutions, attention by pooling, pixel shuffle."""

    def __init__(self, c=8):
        super().__init__()
        self.head, self.body = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.norm, self.down = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, stride=2)
        self.up, self.drop = nn.Conv2d(c, 12, 3, padding=1), nn.Dropout(0.1)

    def forward(self, x):
        x = self.head(x)
        y = F.leaky_relu(self.norm(self.body(x)), 0.05)
        a = F.max_pool2d(self.down(y), 3, 2)
        a = F.interpolate(a, y.shape[-2:], mode="bilinear", align_corners=False)
        return F.pixel_shuffle(self.up(self.drop(y * a.sigmoid()) + x), 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return BertModel(config), (torch.arange(6)[None], torch.ones(1, 6)), {}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
    )
    return LlamaForCausalLM(config), (torch.arange(6)[None],), {"use_cache": False}


MODELS = {
    "rlfn": lambda: (Rlfn(), (rand(1, 3, 16, 16),), {}),
    "attention": lambda: (Attention(), (rand(2, 5, 16),), {}),
    "bert": bert,
    "llama": llama,
}


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_in_give_the_same_graph(name):
    module, args, kwargs = MODELS[name]()
    module.eval()
    one = compiled(module, *args, exact=False, **kwargs)
    two = exported(module, args, kwargs)
    assert operators(one) == operators(two)
    weights = {i.name for i in two.inputs if i.kind == "weight"}
    assert {i.name for i in one.inputs if i.kind == "weight"} <= weights
    expected = module(*args, **kwargs)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    torch.testing.assert_close(run_captured(two, leaves)[0], expected)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("step", torch.ones(3), persistent=False)
        self.table = rand(3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, pair, *, bias=None, times: int = 2):
        self.count += self.step
        x.mul_(times)
        return self.norm(x) + self.count + self.table + pair["a"] + bias, times, None


def test_exported_program_inputs_and_mutations():
    module, pair = Counter(), {"a": rand(4, 3), "b": rand(1)}
    program = torch.export.export(module, (rand(4, 3), pair), {"bias": rand(3)})
    captured = capture_exported(program)
    state = {i.name: i for i in captured.inputs if i.kind == "state"}
    assert set(state) == {
        "count",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert {i.name for i in captured.inputs if i.kind == "weight"} == {
        "step",
        "table",
        "norm.weight",
        "norm.bias",
    }
    assert set(mutations(captured)) == {*state, "x"}
    x, other, bias = rand(4, 3), {"a": rand(4, 3), "b": rand(1)}, rand(3)
    reference, expected_x = copy.deepcopy(module), x.clone()
    expected = reference(expected_x, other, bias=bias)
    result = run_captured(captured, [x, other["a"], other["b"], bias])
    torch.testing.assert_close(result[0], expected[0])
    torch.testing.assert_close(x, expected_x)
    assert result[1:] == [2, None]
    torch.testing.assert_close(state["count"].tensor, reference.count)


def test_exported_program_with_a_dynamic_size():
    batch = torch.export.Dim("batch")
    module = nn.Sequential(nn.Linear(8, 4), nn.GELU())
    captured = exported(module, (rand(3, 8),), dynamic_shapes=({0: batch},))
    for n in (2, 9):
        torch.testing.assert_close(run_captured(captured, [x := rand(n, 8)])[0], module(x))


def test_exported_gradient_and_autocast_regions():
    class Regions(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x @ x
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = F.linear(y, x)
            return z.float() + y

    x = rand(4, 4)
    with torch.enable_grad():
        captured = exported(Regions(), (x,))
    assert "linear" in operators(captured)
    torch.testing.assert_close(run_captured(captured, [x])[0], Regions()(x), rtol=0, atol=0)


def test_exported_program_with_sizes_from_data():
    class Found(nn.Module):
        def forward(self, x):
            return x.nonzero()

    refusal = exported(Found(), (rand(3),))
    assert refusal.kind == "unbacked-size" and refusal.where.startswith("test_capture.py:")


# ------------------------------------------------------------------------------------------ origins


class Inner(nn.Module):
    def forward(self, x):
        return F.gelu(x) * 2


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), Inner()])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def test_origin_names_module_and_line():
    module, line = Outer(), Inner.forward.__code__.co_firstlineno + 1
    for captured in (compiled(module, rand(2, 4)), exported(module, (rand(2, 4),))):
        found = {str(n.target): origin(n) for n in captured.graph_module.graph.nodes}
        gelu, linear = found["aten.gelu.default"], found["aten.linear.default"]
        assert (gelu.module, gelu.module_class) == ("layers.1", "Inner")
        assert (gelu.source, gelu.text) == (f"test_capture.py:{line}", "return F.gelu(x) * 2")
        assert (linear.module, linear.module_class) == ("layers.0", "Linear")
        assert linear.text == "return self.layers[1](self.layers[0](x))"


def test_origin_in_a_library_model():
    captured = compiled(llama()[0].eval(), torch.arange(6)[None], use_cache=False)
    nodes = captured.graph_module.graph.nodes
    found = next(origin(n) for n in nodes if "scaled_dot" in str(n.target))
    assert found.module == "model.layers.0.self_attn" and found.module_class == "LlamaAttention"
    assert found.source.startswith("sdpa_attention.py:")
