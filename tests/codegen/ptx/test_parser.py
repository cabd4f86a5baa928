"""PTX text to structure, and what is said where it cannot be read or translated."""

import pytest

from effc.codegen.ptx import PtxError, load, parse
from effc.codegen.ptx.parser import instructions

from .harness import HEAD, entry


def test_instructions_print_as_they_were_written():
    lines = [
        "@!%p1 ld.global.v2.b32 {%r1, %r2}, [%q0+16];",
        "setp.lt.and.s32 %p0|%p1, %r1, -5, !%p2;",
        "mov.b32 %r1, 0f3F800000;",
        "st.shared.u32 [%r1], _;",
    ]
    body = parse(entry("\n".join(lines))).functions["k"]
    assert [str(i) for i in instructions(body)][-len(lines) - 1 : -1] == lines


def test_inner_scopes_have_registers_and_labels_of_their_own():
    body = "{ .reg .b32 x; mov.u32 x, 1; L: bra L; }\n{ .reg .b32 x; mov.u32 x, 2; L: bra L; }"
    found = [str(i) for i in instructions(parse(entry(body)).functions["k"])]
    moves = [f for f in found if f.startswith("mov.u32 x")]
    jumps = [f for f in found if f.startswith("bra")]
    assert len(set(moves)) == len(set(jumps)) == 2


def test_lines_and_source_lines_go_with_instructions():
    text = entry(".loc 1 42 7\nmov.u32 %r0, 1;") + '.file 1 "model.py"\n'
    where = [
        i.location
        for i in instructions(parse(text).functions["k"])
        if i.operands[-1:] and str(i.operands[-1]) == "1"
    ]
    assert str(where[0]).startswith("model.py:42 (PTX line ")


def test_inlined_lines_are_those_of_the_call():
    """Of the outermost one. LLVM counts on through inline assembly; its first line is right."""
    body = """
.loc 1 51 32
.loc 2 216 16, function_name $S, inlined_at 1 51 32
.loc 2 196 12, function_name $S, inlined_at 2 216 16
mov.u32 %r0, 1;
// begin inline asm
.loc 1 17 10
mov.u32 %r1, 1;
.loc 1 18 10
mov.u32 %r2, 1;
// end inline asm
.loc 1 60 1
mov.u32 %r3, 1;"""
    text = entry(body) + '.file 1 "model.py"\n.file 2 "library.py"\n'
    found = [i.location for i in instructions(parse(text).functions["k"]) if "1;" in str(i)]
    assert [(w.file, w.source_line) for w in found[-4:]] == [
        ("model.py", line) for line in (51, 17, 17, 60)
    ]
    assert found[-1].line == text.split("mov.u32 %r3")[0].count("\n") + 1


def test_debug_sections_are_passed_over():
    text = (
        entry("")
        + ".section .debug_info\n{\n.b8 1\n.b32 .debug_abbrev\n}\n.section .debug_macinfo { }\n"
    )
    assert parse(text).entries == ("k",)


def test_unknown_opcodes_are_listed_with_their_places():
    text = (
        entry(".loc 1 7 0\nwgmma.fence.sync.aligned;\ntcgen05.alloc.b32 [%r0], 3;")
        + '.file 1 "m.py"\n'
    )
    with pytest.raises(PtxError) as error:
        load(text)["k"].build()
    said = str(error.value)
    assert "cannot translate wgmma.fence.sync.aligned" in said
    assert "m.py:7 (PTX line" in said and "fix" in said
    assert "also" in said and "tcgen05.alloc.b32" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + "hello", "expected a function or variable"),
        (HEAD.replace("64", "32"), "compile for 64-bit addresses"),
        (entry("mov.u32 %r0 1;"), "expected ',' or ';'"),
        (entry("mov.u32 %r0, `;"), "cannot read '`;'"),
        (entry("").replace("ret;\n}", "ret;"), "does not end"),
    ],
)
def test_text_that_cannot_be_read(text, said):
    with pytest.raises(PtxError) as error:
        parse(text)
    assert said in str(error.value) and "line" in str(error.value)


def test_missing_label_symbol_and_function():
    for body, said in (
        ("bra NOWHERE;", "jump to NOWHERE"),
        ("mov.u64 %d0, nothing;", "the symbol nothing is not defined"),
        ("call.uni other;", "other is defined nowhere"),
    ):
        with pytest.raises(PtxError, match=said):
            load(entry(body))["k"].build()


def test_equal_text_gives_equal_code():
    text = entry("add.u32 %r0, %t, 1;\nbar.sync 0;")
    assert load(text)["k"].source == load(text)["k"].source
