"""torch.compile(..., backend="effc") at the edges: what a user's program may do to a graph."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import effc


def compiled(fn, **options):
    return torch.compile(fn, backend="effc", options=options or None)


def check(fn, *args, tolerance=1e-6, **kwargs):
    with torch.no_grad():
        want = fn(*args, **kwargs)
        got = compiled(fn)(*args, **kwargs)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    return got


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x, *, scale=1.0):
        y = F.leaky_relu(self.norm(self.conv(x)), 0.1) * scale
        return self.head(y.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def records(fn):
    return effc.explain(fn).records


# ------------------------------------------------------------------ calls


def test_keyword_arguments(net):
    x = torch.randn(2, 3, 9, 11)
    fast = compiled(net)
    with torch.no_grad():
        torch.testing.assert_close(fast(x=x, scale=2.0), net(x, scale=2.0))
        torch.testing.assert_close(fast(x, scale=0.5), net(x, scale=0.5))


def test_inference_mode_and_no_grad_agree(net):
    x = torch.randn(2, 3, 8, 8)
    fast = compiled(net)
    with torch.inference_mode():
        a = fast(x)
    with torch.no_grad():
        b = fast(x)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(b, net(x).detach())


def test_one_compile_serves_all_sizes_of_a_dynamic_dimension(net):
    fast = compiled(net)
    x = torch.randn(4, 3, 10, 12)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 3)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
        for shape in ((2, 3, 10, 7), (7, 3, 10, 31)):
            y = torch.randn(shape)
            torch.testing.assert_close(fast(y), net(y))
    assert len(records(fast)) == 1
    assert any("<= s" in g.expr for g in records(fast)[0].guards)


def test_a_new_static_size_recompiles_and_says_why(net):
    fast = compiled(net)
    with torch.no_grad():
        fast(torch.randn(2, 3, 8, 8))
        fast(torch.randn(3, 3, 8, 8))
    found = records(fast)
    assert len(found) == 2
    assert "size" in " ".join(r.recompile_cause for r in found)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 0), (3, 1)])
def test_sizes_0_and_1(shape):
    check(lambda x: torch.softmax(F.gelu(x) * 2 + x.sum(), -1).t(), torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types(net, dtype):
    net = net.to(dtype)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    with torch.no_grad():
        want, got = net(x), compiled(net)(x)
    assert got.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 5).t(),
        lambda: torch.randn(5, 12)[:, ::2],
        lambda: torch.randn(1, 6).expand(5, 6),
        lambda: torch.randn(40)[10:].view(5, 6),
        lambda: torch.randn(5, 6).flip(0),
    ],
    ids=["transposed", "strided", "expanded", "offset", "flipped"],
)
def test_inputs_that_are_not_contiguous(make):
    w = torch.randn(6, 4)
    check(lambda x: (F.silu(x) + 1) @ w + x.sum(1, keepdim=True), make())


def test_numbers_none_and_nested_results():
    def fn(x, n):
        return {"a": x * n, "b": (x.shape[0], None, [x.sum()])}

    x = torch.randn(3, 4)
    with torch.no_grad():
        got = compiled(fn)(x, 3)
    torch.testing.assert_close(got["a"], x * 3)
    assert got["b"][0] == 3 and got["b"][1] is None
    torch.testing.assert_close(got["b"][2][0], x.sum())


# ------------------------------------------------------------------ memory: views, aliases, writes


def test_a_result_that_is_a_view_of_an_input_shares_its_memory():
    x = torch.randn(4, 6)
    with torch.no_grad():
        y = compiled(lambda x: x.view(-1)[2:10])(x)
    assert y.data_ptr() == x[0, 2:].data_ptr()


def test_results_are_not_overwritten_by_the_next_call():
    fast = compiled(lambda x: (torch.exp(x) + 1).relu())
    with torch.no_grad():
        first = fast(torch.zeros(100))
        kept = first.clone()
        fast(torch.ones(100))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_equal_results_are_distinct_tensors():
    with torch.no_grad():
        a, b = compiled(lambda x: (x + 1, x + 1))(torch.zeros(5))
        same = compiled(lambda x: x * 1.0)
        x = torch.zeros(5)
        c = same(x)
    a.fill_(7)
    c.fill_(7)
    assert b.sum() == 5 and x.sum() == 0


def test_inputs_changed_in_place():
    def fn(x, y):
        x.mul_(2)
        y[0] = x.sum()
        return x + y

    a, b = torch.randn(3), torch.randn(3)
    c, d = a.clone(), b.clone()
    with torch.no_grad():
        want, got = fn(a, b), compiled(fn)(c, d)
    for got_, want_ in ((got, want), (c, a), (d, b)):
        torch.testing.assert_close(got_, want_)


def test_overlapping_inputs_one_of_them_written():
    def fn(x, y):
        x.add_(1)
        return y * 2

    fast = compiled(fn)
    with torch.no_grad():
        fast(torch.zeros(4), torch.zeros(4))
        base = torch.zeros(6)
        got = fast(base[:4], base[2:])
    torch.testing.assert_close(got, torch.tensor([2.0, 2, 0, 0]))


def test_results_have_eager_strides(net):
    x = torch.randn(2, 3, 8, 8)
    for fn in (net.conv, lambda x: x.permute(0, 2, 3, 1) + 1, lambda x: net.conv(x).relu()):
        with torch.no_grad():
            assert compiled(fn)(x).stride() == fn(x).stride()


def test_buffers_written_by_the_model():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            self.count += x
            return self.count * 2

    a, b = Counter(), Counter()
    fast = compiled(b)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(torch.ones(3)), a(torch.ones(3)))
    torch.testing.assert_close(a.count, b.count)


# ------------------------------------------------------------------ weights


def test_weights_changed_in_place_are_never_stale(net):
    fast, x = compiled(net), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        fast(x)
        net.conv.weight.mul_(3)
        torch.testing.assert_close(fast(x), net(x))
        net.norm.running_mean.add_(1)
        torch.testing.assert_close(fast(x), net(x))
        net.head.weight.data = torch.randn(5, 8)
        torch.testing.assert_close(fast(x), net(x))
        net.head.bias = nn.Parameter(torch.randn(5))
        torch.testing.assert_close(fast(x), net(x))
        net.load_state_dict({k: torch.rand_like(v, dtype=torch.float32) + 0.5 if v.is_floating_point() else v
                             for k, v in net.state_dict().items()})  # fmt: skip
        torch.testing.assert_close(fast(x), net(x))


def test_layers_that_share_one_compiled_code():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(5)).eval()
    run = [compiled(layer) for layer in layers]
    x = torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(2):
            for fast, layer in zip(run, layers):
                torch.testing.assert_close(fast(x), layer(x))


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.out = nn.Linear(6, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.embed(ids))

    check(Tied().eval(), torch.randint(0, 11, (2, 3)))


# ------------------------------------------------------------------ training


def test_gradients_are_eager_s_and_the_report_says_who_ran(net):
    x = torch.randn(2, 3, 8, 8)
    fast = compiled(net)
    fast(x).square().sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for a, p in zip(got, net.parameters()):
        torch.testing.assert_close(a, p.grad)
    assert records(fast)[0].refusal.kind == "training"


def test_gradients_through_inductor(net):
    x = torch.randn(2, 3, 8, 8)
    fast = compiled(net, fallback="inductor")
    fast(x).square().sum().backward()
    got = net.conv.weight.grad.clone()
    net.zero_grad()
    net(x).square().sum().backward()
    torch.testing.assert_close(got, net.conv.weight.grad, rtol=1e-4, atol=1e-5)


def test_batch_norm_in_training_mode_updates_its_statistics():
    torch.manual_seed(0)
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(b)(x), a(x))
    torch.testing.assert_close(a.running_var, b.running_var)
    assert b.num_batches_tracked == 1


def test_dropout_draws_what_eager_draws():
    x = torch.ones(1000)
    with torch.no_grad():
        torch.manual_seed(3)
        want = F.dropout(x, 0.3) + torch.rand(1000)
        torch.manual_seed(3)
        got = compiled(lambda x: F.dropout(x, 0.3) + torch.rand(1000))(x)
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------ the rest of the program


def test_graph_breaks():
    def fn(x):
        y = torch.relu(x) + 1
        if y.sum().item() > 0:
            y = y * 2
        return y - 1

    fast = compiled(fn)
    x = torch.randn(10)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), fn(x))
    assert len(records(fast)) == 2


def test_autocast(net):
    x = torch.randn(2, 3, 8, 8)
    fast = compiled(net)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fast(x), net(x), rtol=3e-2, atol=3e-2)


def test_several_threads(net):
    fast = compiled(net)
    inputs = [torch.randn(2, 3, 16, 16) for _ in range(8)]
    with torch.no_grad():
        wanted = [net(x) for x in inputs]
        fast(inputs[0])
    wrong = []

    def work(x, want):
        with torch.no_grad():
            for _ in range(50):
                if not torch.allclose(fast(x), want, rtol=1e-4, atol=1e-5):
                    wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ------------------------------------------------------------------ options


def message(fn, *args):
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        fn(*args)
    return str(caught.value.inner_exception)


def test_an_unknown_option_names_the_nearest():
    text = message(compiled(torch.relu, stricct=True), torch.zeros(3))
    assert "unknown option 'stricct'" in text and "did you mean 'strict'?" in text


def test_an_unknown_pass_names_the_nearest():
    text = message(compiled(torch.relu, pipeline="simplifi"), torch.zeros(3))
    assert "unknown pass 'simplifi'" in text and "did you mean 'simplify'?" in text


def test_an_option_of_the_wrong_type():
    assert "option strict must be bool" in message(
        compiled(torch.relu, strict="yes"), torch.zeros(3)
    )


def test_strict_lists_every_unsupported_node_with_line_and_reason():
    def fn(x):
        return torch.cumsum(x, 0) + torch.cumprod(x, 0)

    text = message(compiled(fn, strict=True), torch.randn(4))
    assert "2 nodes" in text
    assert "aten.cumsum" in text and "aten.cumprod" in text
    assert "test_dynamo.py:" in text


def test_nan_weights_stay_nan(net):
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] = float("nan")
        x = torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(compiled(net)(x), net(x), equal_nan=True)


def test_a_result_that_is_memory_of_a_written_argument():
    def fn(a):
        a.add_(1)
        return a[0]

    a = torch.zeros(3)
    with torch.no_grad():
        compiled(fn)(a).fill_(9)
    assert a.tolist() == [9, 1, 1]


def test_arguments_that_swap_their_contents():
    def fn(a, b):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
        return kept

    a, b = torch.zeros(3), torch.ones(3)
    with torch.no_grad():
        c = compiled(fn)(a, b)
    assert a.sum() == 3 and b.sum() == 0 and c.sum() == 0


def test_assertions_of_the_user_are_kept():
    def fn(x):
        torch._assert_async(x.sum() > 0, "must be positive")
        return x * 2

    fast = compiled(fn)
    with torch.no_grad():
        assert fast(torch.ones(3)).sum() == 6
        with pytest.raises(RuntimeError, match="must be positive"):
            fast(-torch.ones(3))


def test_autocast_is_off_inside_a_region_that_turns_it_off():
    def fn(x, w):
        with torch.autocast("cpu", enabled=False):
            return x @ w

    x = torch.randn(4, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(fn)(x, x).dtype == torch.float32


@pytest.mark.parametrize("constant", [True, False])
def test_a_convolution_whose_bias_is_not_packed(constant):
    x, w, b = torch.randn(2, 16, 32, 32), torch.randn(49, 16, 3, 3), torch.randn(1)
    conv = nn.Conv2d(16, 49, 3)
    bias = torch.randn(98)[::2]

    def fn(x, b):
        return F.conv2d(x, conv.weight, bias if constant else b.expand(49)).relu()

    check(fn, x, b, tolerance=1e-4)
    check(lambda x, b: F.conv2d(x, w, b.expand(49)), x, b, tolerance=1e-4)
