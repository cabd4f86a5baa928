"""Templates render as their text says, from fresh and from kept bytecode, once for equal holes."""

from __future__ import annotations

import jinja2
import pytest

from effc.codegen import templates
from effc.codegen.store import Store, cache_dir


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    made = tmp_path / "templates"
    made.mkdir()
    return made


def kept():
    return {key for key, _ in Store(cache_dir()).manifests(templates.KIND)}


def test_bytecode_is_kept_by_the_text_of_the_template(folder):
    (folder / "t.j2").write_text("a {{ x }}")
    assert templates.render(folder, "t.j2", {"x": 1}) == "a 1"
    first = kept()
    assert len(first) == 1
    templates.environment.cache_clear()
    templates._rendered.cache_clear()
    assert templates.render(folder, "t.j2", {"x": 2}) == "a 2"
    assert kept() == first
    templates.environment.cache_clear()
    (folder / "t.j2").write_text("b {{ x }}")
    assert templates.render(folder, "t.j2", {"x": 3}) == "b 3"
    assert len(kept()) == 2


def test_holes_differ_by_type_too(folder):
    (folder / "t.j2").write_text("{{ x }}")
    shown = [templates.render(folder, "t.j2", {"x": x}) for x in (1, True, 1.0, "1")]
    assert shown == ["1", "True", "1.0", "1"]


def test_a_hole_that_is_not_filled_is_an_error(folder):
    (folder / "t.j2").write_text("{{ x }}")
    with pytest.raises(jinja2.UndefinedError, match="'x' is undefined"):
        templates.render(folder, "t.j2", {})


def test_a_cache_folder_that_cannot_be_written_costs_time_only(folder, monkeypatch):
    blocked = folder / "file"
    blocked.write_text("")
    monkeypatch.setenv("EFFC_CACHE_DIR", str(blocked))
    (folder / "t.j2").write_text("{{ x }}")
    assert templates.render(folder, "t.j2", {"x": 5}) == "5"
