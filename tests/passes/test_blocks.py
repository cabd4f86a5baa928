"""Block analysis: which runs of equal blocks a model has, found by structure alone."""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest
import torch
from torch import nn

import effc.aten  # registers the converters
import effc.passes  # noqa: F401  registers the passes
from effc.capture import capture_exported
from effc.importer import import_captured
from effc.ir import Graph, Op, Weight, parse
from effc.passes.analysis.blocks import (
    Run,
    find_runs,
    residual_updates,
    weight_bytes,
    weights_below,
)
from effc.passes.base import Context, Pipeline
from effc.passes.pipelines import DEFAULT
from examples.zoo.library import LIBRARY

libraries = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec("diffusers")),
    reason="needs transformers and diffusers",
)
FOLDED = DEFAULT.removesuffix(",fuse-regions")


def graph_of(model: nn.Module, *args, **kwargs) -> Graph:
    with torch.no_grad():
        program = torch.export.export(model.eval(), args, kwargs, strict=False)
    return import_captured(capture_exported(program)).graph


def passed(graph: Graph, pipeline: str) -> Graph:
    for p in Pipeline.parse(pipeline):
        graph = p.run(graph, Context())
    return graph


def checked(graph: Graph) -> tuple[Run, ...]:
    """The runs, after a look at all that their declaration promises."""
    runs = find_runs(graph)
    seen: set[Op] = set()
    for run in runs:
        first = run.blocks[0]
        inside = {n for b in run.blocks for n in b.nodes}
        entering = first.carry
        for i, block in enumerate(run.blocks):
            assert block.index == i and block.carry is entering
            entering = block.result
            assert block.result in block.nodes and block.result.type == block.carry.type
            assert not seen & set(block.nodes), "a node is in two blocks"
            seen |= set(block.nodes)
            known = {block.carry, *run.shared, *block.weights, *block.given, *block.nodes}
            for node, like in zip(block.nodes, first.nodes, strict=True):
                assert node.name == like.name and node.type == like.type
                assert known.issuperset(node.operands), "a block reads what is not told of"
            for mine, its in zip(block.weights, first.weights, strict=True):
                assert mine in graph.constants and mine.type == its.type
            assert not graph.constants & set(block.given)
            assert not inside & {*run.shared, *block.given}
            assert [u.y.name for u in block.updates] == [u.y.name for u in first.updates]
        outside = {*run.before, *run.after}
        assert not outside & inside
        assert outside | inside | graph.constants == set(graph.nodes)
        assert not any(inside & set(n.operands) for n in run.before)
    return runs


def shape_of(runs: tuple[Run, ...]) -> list[tuple[int, int, int, int]]:
    return [(len(r.before), len(r), len(r.blocks[0].nodes), len(r.after)) for r in runs]


# ------------------------------------------------------------------ plain models


class Mlp(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_residual_blocks_between_two_layers(captured):
    net = nn.Sequential(nn.Linear(4, 8), *(Mlp() for _ in range(5)), nn.Linear(8, 3))
    graph = captured(net, torch.rand(2, 4))
    [run] = checked(graph)
    assert shape_of((run,)) == [(1, 5, 5, 1)]
    assert len(run.blocks[0].weights) == 6 and not run.shared
    assert weight_bytes(run.blocks[0].weights) == 4 * (8 * 16 + 16 + 16 * 8 + 8 + 8 + 8)
    for block in run.blocks:
        [update] = block.updates
        assert update.x is block.carry and update.y is block.result
        assert [n.name for n in update.nodes] == ["layer_norm", "linear", "relu", "linear"]


def test_two_blocks_are_a_run_and_the_first_may_read_an_input(captured):
    [run] = checked(captured(nn.Sequential(Mlp(), Mlp()), torch.rand(2, 8)))
    assert shape_of((run,)) == [(0, 2, 5, 0)] and run.blocks[0].carry.name == "input"


def test_a_block_of_another_width_ends_a_run(captured):
    net = nn.Sequential(Mlp(), Mlp(), nn.Linear(8, 16), Mlp(16), Mlp(16), Mlp(16))
    runs = checked(captured(net, torch.rand(2, 8)))
    assert [len(r) for r in runs] == [2, 3]


def test_no_run_where_no_two_blocks_are_equal(captured):
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh())
    assert checked(captured(net, torch.rand(2, 8))) == ()


def test_an_attribute_that_differs_makes_blocks_differ():
    text = (
        "def graph(x: f32[2, 4]):\n    w: f32[4, 4] = weight('w')\n    a = linear(x, w)\n"
        "    b = mul(a, 2)\n    c = linear(b, w)\n    d = mul(c, {})\n    return d,\n"
    )
    assert len(checked(parse(text.format(2)))) == 1
    assert checked(parse(text.format(3))) == ()


def test_arithmetic_without_constants_is_no_block():
    text = (
        "def graph(x: f32[4]):\n    a = relu(x)\n    b = exp(a)\n    c = relu(b)\n"
        "    d = exp(c)\n    return d,\n"
    )
    assert checked(parse(text)) == ()


def test_a_run_reads_nothing_of_its_own_two_blocks_back():
    layers = "".join(
        f"    a{i} = linear(x{i}, w)\n    b{i} = relu(a{i})\n    x{i + 1} = add(b{i}, x{i - 1})\n"
        for i in range(1, 6)
    )
    text = (
        "def graph(x0: f32[2, 4], x1: f32[2, 4]):\n    w: f32[4, 4] = weight('w')\n"
        f"{layers}    return x6,\n"
    )
    for run in checked(parse(text)):
        assert len(run) == 2 and len(run.blocks[0].given) == 1


def test_names_play_no_part(captured):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other, self.third = Mlp(), nn.ModuleDict({"q": Mlp()}), Mlp()

        def forward(self, x):
            return self.third(self.other["q"](self.first(x)))

    [run] = checked(captured(Odd(), torch.rand(2, 8)))
    assert len(run) == 3


def test_a_value_that_the_first_block_computes_for_all_is_not_shared(captured):
    """Keys of one layer that later ones use: the run begins behind it."""

    class Reuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Mlp() for _ in range(4))
            self.key = nn.Linear(8, 8)

        def forward(self, x):
            key = None
            for block in self.blocks:
                x = block(x)
                key = self.key(x) if key is None else key
                x = x * key
            return x

    [run] = checked(captured(Reuse(), torch.rand(2, 8)))
    assert len(run) == 3 and [v.name for v in run.shared] == ["linear"]


def test_values_that_the_caller_gets_are_emitted(captured):
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Mlp() for _ in range(3))

        def forward(self, x):
            seen = []
            for block in self.blocks:
                x = block(x)
                seen.append(x)
            return x, *seen[:-1]

    [run] = checked(captured(Kept(), torch.rand(2, 8)))
    assert len(run) == 3
    assert [b.emitted for b in run.blocks] == [(b.result,) for b in run.blocks]


# ------------------------------------------------------------------ residual sums


def test_a_polynomial_is_no_update():
    text = (
        "def graph(x: f32[4]):\n    a = mul(x, x)\n    b = mul(a, x)\n    c = mul(b, 0.04)\n"
        "    y = add(x, c)\n    return y,\n"
    )
    assert residual_updates(parse(text)) == ()


@pytest.mark.parametrize("order", ["x, h", "h, x"])
def test_updates_are_found_either_way_round(order):
    text = (
        "def graph(x: f32[2, 4], g: f32[2, 4]):\n    w: f32[4, 4] = weight('w')\n"
        f"    f = linear(x, w)\n    h = mul(f, g)\n    y = add({order})\n    return y,\n"
    )
    [update] = residual_updates(parse(text))
    assert update.x.name == "input" and update.h.name == "mul"
    assert [n.name for n in update.nodes] == ["linear", "mul"]


def test_a_sum_of_two_branches_is_no_update():
    text = (
        "def graph(x: f32[2, 4]):\n    w: f32[4, 4] = weight('w')\n"
        "    f = linear(x, w)\n    g = relu(x)\n    y = add(f, g)\n    return y,\n"
    )
    assert residual_updates(parse(text)) == ()


# ------------------------------------------------------------------ models of the libraries


def language(config: str, model: str, layers: int, **more):
    import transformers

    sizes = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": layers, "max_position_embeddings": 64, "use_cache": False,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **more}))


LANGUAGE = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", 5, {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", 3, {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", 3, {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", 3, {}),
}  # fmt: skip


@cache
def decoder(name: str) -> Graph:
    config, model, layers, more = LANGUAGE[name]
    return graph_of(language(config, model, layers, **more), torch.randint(0, 61, (2, 7)))


@libraries
@pytest.mark.parametrize("pipeline", ["raised", FOLDED, "default"], ids=["raised", "folded", "all"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_decoders_are_one_run_between_embedding_and_head(name, pipeline):
    graph = passed(decoder(name), pipeline)
    [run] = checked(graph)
    assert len(run) == LANGUAGE[name][2]
    assert [n.name for n in run.before if not n.view] == ["embedding"]
    assert not run.blocks[0].given and not run.blocks[0].emitted
    assert run.shared and graph.constants.issuperset(run.shared), "the tables of rope"
    if pipeline != "default":  # sums are inside of regions there
        assert len(run.blocks[0].updates) == (1 if name == "gpt-neox" else 2)


@libraries
@pytest.mark.slow
def test_thirty_blocks():
    more = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
    net = language("LlamaConfig", "LlamaForCausalLM", 30, tie_word_embeddings=True, **more)
    [run] = checked(passed(graph_of(net, torch.randint(0, 61, (1, 7))), "raised"))
    assert len(run) == 30


@libraries
def test_stored_bytes_of_a_decoder_block():
    config, model, layers, more = LANGUAGE["llama"]
    net = language(config, model, layers, **more)
    [run] = checked(passed(graph_of(net, torch.randint(0, 61, (2, 7))), FOLDED))
    d, kv, inner = 32, 16, 64
    for block, layer in zip(run.blocks, net.model.layers, strict=True):
        # FoldGPT's card: 2 D^2 + 2 D D_kv + 3 D I, and two norms
        want = 4 * (2 * d * d + 2 * d * kv + 3 * d * inner + 2 * d)
        assert weight_bytes(block.weights) == want
        assert sum(p.numel() * 4 for p in layer.parameters()) == want
        assert all(isinstance(w, Weight) for w in weights_below(block.weights))


@cache
def zoo_graph(name: str) -> Graph:
    model, args, kwargs = LIBRARY[name].build()
    if name == "gpt2":
        model.config.use_cache = False
    return graph_of(model, *args, **kwargs)


ZOO = {  # blocks and updates of each run that has residual sums
    "gpt2": [(2, 2)],
    "bert": [(2, 2)],
    "dit": [(2, 2)],
    "vae": [(3, 1)],
}


@libraries
@pytest.mark.parametrize("pipeline", ["raised", FOLDED], ids=["raised", "folded"])
@pytest.mark.parametrize("name", ZOO)
def test_runs_of_the_zoo(name, pipeline):
    runs = checked(passed(zoo_graph(name), pipeline))
    found = [(len(r), len(r.blocks[0].updates)) for r in runs if r.blocks[0].updates]
    assert found == ZOO[name]


@libraries
def test_conditioning_is_shared_or_given():
    [run] = checked(passed(zoo_graph("dit"), "raised"))
    assert {v.name for v in run.shared} == {"cat", "input"}  # of the time step; the class labels
    assert [n.name for n in run.blocks[0].emitted] == ["silu"]  # that the head uses too
    [run] = checked(passed(zoo_graph("dit"), FOLDED))  # layers of several blocks became one
    assert {v.name for v in run.blocks[0].given} == {"slice"}


@libraries
def test_masks_are_shared():
    [run] = checked(passed(zoo_graph("bert"), "raised"))
    assert [str(v.dtype) for v in run.shared] == ["bool"]
    assert run.blocks[0].result.name == "layer_norm"  # norms stand behind the sums
    assert all(u.y.name == "add" for b in run.blocks for u in b.updates)


@libraries
def test_one_layer_called_again_shares_its_weights():
    import transformers

    net = transformers.AlbertModel(
        transformers.AlbertConfig(
            vocab_size=61, embedding_size=16, hidden_size=32, intermediate_size=64,
            num_attention_heads=4, num_hidden_layers=4,
        )
    )  # fmt: skip
    [run] = checked(passed(graph_of(net, torch.randint(0, 61, (2, 7))), "raised"))
    assert len(run) == 4 and not run.blocks[0].weights and len(run.shared) == 16


@libraries
@pytest.mark.slow
def test_layers_of_two_kinds_repeat_as_one():
    more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    net = language("Gemma3TextConfig", "Gemma3ForCausalLM", 4, layer_types=kinds, **more)
    [run] = checked(passed(graph_of(net, torch.randint(0, 61, (2, 7))), "raised"))
    assert len(run) == 2 and len(run.blocks[0].updates) == 4


@libraries
def test_blocks_of_a_convolutional_network_need_no_residual_stream():
    [run] = checked(passed(zoo_graph("rlfn"), "raised"))
    assert shape_of((run,)) == [(1, 2, 18, 4)]
    [update] = run.blocks[0].updates  # inside: attention follows the sum
    assert update.x is run.blocks[0].carry and update.y is not run.blocks[0].result


@libraries
@pytest.mark.slow
def test_encoder_and_decoder_are_two_runs():
    import transformers

    net = transformers.T5Model(
        transformers.T5Config(
            vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, use_cache=False
        )
    )
    ids = torch.randint(0, 61, (2, 7))
    graph = graph_of(net, input_ids=ids, decoder_input_ids=ids[:, :5])
    encoder, decoder = checked(passed(graph, "raised"))
    assert (len(encoder), len(decoder)) == (3, 3)
    assert "rms_norm" in {v.name for v in decoder.shared}  # what the encoder gives


@libraries
def test_the_way_up_of_a_u_net_is_given_what_the_way_down_left():
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    runs = checked(passed(graph_of(net, torch.randn(1, 3, 8, 8), torch.tensor([3])), "raised"))
    assert runs and any(b.given for r in runs for b in r.blocks)
