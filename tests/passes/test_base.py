"""Passes and pipelines: text both ways, options, facts, plug-ins, and what a context keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from effc.ir import Graph, Input, NearMiss, Op, PassError, PipelineError, Tensor, algebraic, no
from effc.ir.rewrite import op as ops
from effc.ir.types import f32
from effc.passes import base
from effc.passes.base import (
    PASSES,
    Context,
    Numerics,
    Pass,
    Pipeline,
    bounded,
    exact,
    find_pass,
    load_plugins,
    lossy,
)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The registered passes, without what a test adds."""
    before = dict(PASSES)
    yield
    PASSES.clear()
    PASSES.update(before)
    load_plugins.cache_clear()


@pytest.fixture
def passes() -> None:
    """Three passes with options of every kind."""

    @dataclass(frozen=True)
    class PruneForTest(Pass):
        """Keep the strongest groups."""

        name, numerics = "prune-for-test", lossy("relative_l2")
        needs: ClassVar = ("constant-weights",)
        gives: ClassVar = ("group-sparse-weights",)
        group: int = 8
        keep: float = 0.5
        metric: str = "l2"
        symmetric: bool = True
        limit: int | None = None
        which: int | str = "all"

    @dataclass(frozen=True)
    class FreezeForTest(Pass):
        """Make weights constant."""

        name = "freeze-for-test"
        gives: ClassVar = ("constant-weights",)

    @dataclass(frozen=True)
    class PackForTest(Pass):
        """Pack what is sparse."""

        name = "pack-for-test"
        needs: ClassVar = ("group-sparse-weights",)


def said(text: str) -> str:
    with pytest.raises(PipelineError) as e:
        Pipeline.parse(text)
    return str(e.value)


# ------------------------------------------------------------------ text

ROUND_TRIPS = [
    "freeze-for-test",
    "freeze-for-test,prune-for-test,pack-for-test",
    "prune-for-test{group=4}",
    "freeze-for-test,prune-for-test{group=4,keep=0.25,metric=max,symmetric=False,limit=3,which=2}",
    "prune-for-test{keep=1e-05}",
    "prune-for-test{group=-1,which=first}",
]


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_pipelines_print_as_they_were_written(passes: None, text: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_spaces_defaults_and_empty_items_go_away(passes: None) -> None:
    text = " freeze-for-test , prune-for-test { group = 8 , keep = 1 , symmetric } , "
    assert str(Pipeline.parse(text)) == "freeze-for-test,prune-for-test{keep=1.0}"
    assert Pipeline.parse("").passes == () and str(Pipeline(())) == ""


def test_a_pipeline_is_a_value(passes: None) -> None:
    pipeline = Pipeline.parse("freeze-for-test,pack-for-test")
    assert [p.name for p in pipeline] == ["freeze-for-test", "pack-for-test"]
    assert hash(pipeline) == hash(Pipeline.parse("freeze-for-test,pack-for-test"))
    assert pipeline != Pipeline.parse("pack-for-test,freeze-for-test")


def test_options_have_the_type_of_their_field(passes: None) -> None:
    (made,) = Pipeline.parse("prune-for-test{keep=1,metric=4,limit=None,which=4}")
    assert (made.keep, type(made.keep)) == (1.0, float)  # an int is a float
    assert (made.metric, made.limit, made.which) == ("4", None, 4)


# ------------------------------------------------------------------ refusals


def test_an_unknown_pass_names_the_nearest(passes: None) -> None:
    assert said("prune-for-tests") == (
        "unknown pass 'prune-for-tests'\n  fix   did you mean 'prune-for-test'?"
    )


REFUSED = {
    "prune-for-test{grop=4}": (
        "prune-for-test has no option 'grop'\n  fix   did you mean 'group'?"
    ),
    "freeze-for-test{group=4}": (
        "freeze-for-test has no option 'group'\n  fix   freeze-for-test has no options"
    ),
    "prune-for-test{group=4.5}": "prune-for-test: option group must be int, not '4.5'",
    "prune-for-test{group=True}": "prune-for-test: option group must be int, not 'True'",
    "prune-for-test{group=many}": "prune-for-test: option group must be int, not 'many'",
    "prune-for-test{keep=True}": "prune-for-test: option keep must be float, not 'True'",
    "prune-for-test{symmetric=1}": "prune-for-test: option symmetric must be bool, not '1'",
    "prune-for-test{limit=1.5}": (
        "prune-for-test: option limit must be int or NoneType, not '1.5'"
    ),
    "prune-for-test{group=4": "unbalanced braces in pipeline 'prune-for-test{group=4'",
    "prune-for-test}": "unbalanced braces in pipeline 'prune-for-test}'",
    "prune for test": "not a pass: 'prune for test'\n  fix   write name or name{option=value,...}",
    "freeze-for-test;pack-for-test": (
        "not a pass: 'freeze-for-test;pack-for-test'\n  fix   write name or name{option=value,...}"
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_text_that_is_no_pipeline(passes: None, text: str) -> None:
    assert said(text) == REFUSED[text]


def test_an_order_that_cannot_work_is_refused(passes: None) -> None:
    Pipeline.parse("freeze-for-test,prune-for-test,pack-for-test").check()
    with pytest.raises(PipelineError) as e:
        Pipeline.parse("prune-for-test,freeze-for-test").check()
    assert e.value.what == "prune-for-test needs constant-weights, which no pass before it gives"
    assert e.value.fix is not None and "freeze-for-test" in e.value.fix
    del PASSES["prune-for-test"]
    with pytest.raises(PipelineError) as e:
        Pipeline.parse("pack-for-test").check()
    assert str(e.value) == (
        "pack-for-test needs group-sparse-weights, which no pass before it gives"
    )


# ------------------------------------------------------------------ declaring a pass


@pytest.mark.parametrize("name", ["FoldNorm", "fold_norm", "-fold", "fold-", "fold--norm", "2fold"])
def test_names_are_kebab_case(name: str) -> None:
    with pytest.raises(PassError, match=f"^pass name '{name}' is not kebab-case$"):
        type("Made", (Pass,), {"name": name})


def test_a_name_is_taken_once(passes: None) -> None:
    with pytest.raises(PassError) as e:

        @dataclass(frozen=True)
        class Other(Pass):
            """Another pass of the name."""

            name = "prune-for-test"

    assert str(e.value) == f"pass 'prune-for-test' is already registered by {__name__}"


def test_a_module_may_be_loaded_again() -> None:
    for _ in range(2):
        made = type("Again", (Pass,), {"name": "again-for-test", "__module__": "elsewhere"})
    assert PASSES["again-for-test"] is made


def test_a_pass_without_run_says_so() -> None:
    class Lazy(Pass):
        """Does nothing.

        And says so at length.
        """

    with pytest.raises(NotImplementedError, match="Lazy declares no run"):
        Lazy().run(Graph((), (), ()), Context())
    assert Lazy().title == "Does nothing."


def test_numerics_say_what_they_promise() -> None:
    shown = [exact(), exact("rounding"), bounded("max_abs", 0.001), lossy("relative_l2")]
    assert list(map(str, shown)) == [
        "exact (bit-equal)",
        "exact (rounding)",
        "bounded(max_abs <= 0.001)",
        "lossy(relative_l2)",
    ]
    assert exact() == Numerics("exact") and Pass.numerics == exact()
    with pytest.raises(KeyError):
        exact("roughly")


@pytest.mark.parametrize("cls", [c for c in PASSES.values() if c.__module__.startswith("effc.")])
def test_every_pass_has_a_sentence_and_a_text_that_comes_back(cls: type[Pass]) -> None:
    made = cls()
    assert made.title.endswith(".") and len(made.title) < 100
    assert Pipeline.parse(str(made)) == Pipeline((made,))
    assert made.numerics.kind in ("exact", "bounded", "lossy")


# ------------------------------------------------------------------ plug-ins


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a distribution with entry points into a folder on sys.path."""

    def install(module: str, source: str, **entries: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        listed = "".join(f"{k.replace('_', '-')} = {v}\n" for k, v in entries.items())
        (info / "entry_points.txt").write_text(f"[{base.GROUP}]\n{listed}")

    monkeypatch.syspath_prepend(tmp_path)
    load_plugins.cache_clear()
    yield install
    for name in [n for n in sys.modules if n.startswith("effc_plugin_for_test")]:
        del sys.modules[name]


SOURCE = '''
from dataclasses import dataclass
from effc.passes.base import Pass

@dataclass(frozen=True)
class Polish(Pass):
    """Polish the graph."""
    name = "polish-for-test"
    rounds: int = 1
'''


@pytest.mark.parametrize("target", ["effc_plugin_for_test", "effc_plugin_for_test:Polish"])
def test_an_entry_point_registers_a_pass(plugin, target: str) -> None:
    """An entry names a module to import, or the class itself."""
    plugin("effc_plugin_for_test", SOURCE, polish_for_test=target)
    assert "polish-for-test" not in PASSES
    assert str(Pipeline.parse("polish-for-test{rounds=2}")) == "polish-for-test{rounds=2}"
    assert "polish-for-test" in load_plugins()
    assert find_pass("polish-for-test").__module__ == "effc_plugin_for_test"


def test_plugins_are_loaded_once(plugin) -> None:
    plugin("effc_plugin_for_test", SOURCE, polish="effc_plugin_for_test")
    first = find_pass("polish-for-test")
    assert find_pass("polish-for-test") is first


def test_a_plugin_that_cannot_be_imported_is_named(plugin) -> None:
    plugin("effc_plugin_for_test", "import no_such_module_anywhere", broken="effc_plugin_for_test")
    with pytest.raises(PassError) as e:
        Pipeline.parse("whatever-for-test")
    assert str(e.value) == (
        "plug-in 'broken' (effc_plugin_for_test) cannot be imported\n"
        "  why   No module named 'no_such_module_anywhere'\n"
        "  fix   repair or uninstall effc_plugin_for_test"
    )


def test_a_plugin_may_not_take_the_name_of_another_pass(plugin, passes: None) -> None:
    source = SOURCE.replace("polish-for-test", "prune-for-test")
    plugin("effc_plugin_for_test", source, polish="effc_plugin_for_test")
    with pytest.raises(PassError, match="pass 'prune-for-test' is already registered by"):
        find_pass("prune-for-test")


# ------------------------------------------------------------------ the context

X = Input("x", Tensor((4,), f32))
ONE = algebraic("mul(x, 1) => x", lambda op, x: op.mul(x, 1), lambda op, x: x)


def products(*numbers: float) -> Graph:
    return Graph.of((X,), [ops.mul(ops.exp(X), n) for n in numbers])


def test_rewriting_twice_adds_up() -> None:
    ctx = Context()
    graph = ctx.rewrite(products(1, 2), [ONE])
    ctx.rewrite(products(1, 1, 3), [ONE])
    stats = ctx.stats["mul(x, 1) => x"]
    assert stats.hits == 3 and stats.attempts == 3 + 4
    assert [m.reason for m in stats.misses] == ["expected 1, found 2", "expected 1, found 3"]
    assert len(ctx.touched) == 3 and [o.name for o in graph.outputs] == ["exp", "mul"]


def test_passes_without_rules_report_the_same_way() -> None:
    ctx = Context()
    graph = products(2)
    node: Op = graph.nodes[-1]
    ctx.counted("Drop", "a => b")
    ctx.counted("Drop", "a => b", 2)
    ctx.missed("Drop", "a => b", NearMiss("Drop", graph, node, 1, True, no("it is {}", "needed")))
    ctx.note("nothing to do")
    assert ctx.stats["Drop"].hits == 3 and ctx.notes == ["nothing to do"]
    assert [m.reason for m in ctx.stats["Drop"].misses] == ["it is needed"]


def test_substituting_counts_what_it_touched() -> None:
    ctx = Context()
    graph = products(2)
    new = ops.neg(graph.nodes[0])
    after = ctx.substitute(graph, {graph.nodes[1]: new})
    assert [n.name for n in after.nodes] == ["exp", "neg"] and ctx.touched == [new]
    assert ctx.substitute(graph, {}) is graph


def test_a_context_answers_yes_unless_a_target_is_given() -> None:
    assert Context().supports(ops.exp(X)) and Context().sample_inputs is None
