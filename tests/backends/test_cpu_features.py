"""Features come from flags, levels can be lowered and not raised, and AMX is asked for politely."""

import subprocess

import pytest

from effc.backends.cpu import features
from effc.backends.cpu.features import (
    CpuFeatures,
    UnsupportedCpu,
    cache_sizes,
    compile_flags,
    describe,
    detect,
    lacking,
    planning_for,
    request_amx,
)
from effc.codegen.toolchain import find_toolchain

HASWELL = "sse2 avx avx2 fma f16c bmi1 bmi2 popcnt abm"
SERVER = (
    f"{HASWELL} avx512f avx512cd avx512bw avx512dq avx512vl avx_vnni gfni avx512_vnni avx512vbmi "
    "avx512_vbmi2 avx512_bitalg avx512_vpopcntdq avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16"
)


def cpuinfo(flags, model="Some CPU", cores=1):
    block = "processor\t: {}\nmodel name\t: {}\nphysical id\t: 0\ncore id\t\t: {}\nflags\t\t: {}\n"
    return "\n".join(block.format(n, model, n, flags) for n in range(cores))


def test_this_machine_is_described():
    cpu = detect()
    if isinstance(cpu, UnsupportedCpu):
        pytest.skip(f"needs an x86-64 CPU: {cpu.reason}")
    assert cpu.level in features.LEVELS and cpu.capability().startswith(f"x86_64+{cpu.level}")
    assert 1 <= cpu.cores <= cpu.threads
    assert 8 << 10 <= cpu.l1d <= cpu.l2
    assert cpu.flags(find_toolchain()) is not None


def test_level_and_extensions_come_from_the_flags():
    old, mid, new = (describe(cpuinfo(f)) for f in ("sse2 ssse3", HASWELL, SERVER))
    assert [c.level for c in (old, mid, new)] == ["default", "avx2", "avx512"]
    assert [c.vector_bits for c in (old, mid, new)] == [128, 256, 512]
    assert old.capability() == "x86_64+default" and old.flags() == ()
    assert mid.capability() == "x86_64+avx2+bmi1+bmi2+popcnt+abm"
    assert new.has("amx_bf16") and new.has("avx512_fp16") and not mid.has("avx_vnni")


def test_a_model_name_says_nothing():
    named = describe(cpuinfo(SERVER, model="Rocket Lake"))
    assert named.capability() == describe(cpuinfo(SERVER)).capability()


def test_a_level_needs_all_of_its_flags():
    assert describe(cpuinfo(HASWELL.replace("f16c", ""))).level == "default"
    assert describe(cpuinfo(SERVER.replace("avx512vl", ""))).level == "avx2"


def test_flags_are_spelled_for_the_compiler():
    assert describe(cpuinfo(HASWELL)).flags() == (
        "-mavx", "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt",
    )  # fmt: skip
    flags = describe(cpuinfo(SERVER)).flags()
    assert "-mavx512vnni" in flags and "-mamx-tile" in flags
    assert flags[-1] == "-mprefer-vector-width=512"
    assert not any(flag.startswith("-march") for flag in flags)


def test_the_compiler_knows_the_flags_of_every_level():
    toolchain = find_toolchain()
    for level in features.LEVELS:
        assert toolchain.supported(compile_flags(level)) == compile_flags(level)


def test_flags_turn_on_what_they_name(tmp_path):
    toolchain = find_toolchain()
    command = [*toolchain.command, *compile_flags("avx512"), "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("__AVX2__", "__FMA__", "__F16C__", "__AVX512F__", "__AVX512VL__"):
        assert f"#define {name} 1\n" in macros


@pytest.mark.parametrize(
    "asked, level", [("avx2", "avx2"), ("default", "default"), ("AVX512", "avx512"), ("", "avx512")]
)
def test_the_level_can_be_lowered(asked, level):
    cpu = describe(cpuinfo(SERVER), asked)
    assert (cpu.level, cpu.notes) == (level, ())
    assert cpu.has("amx_tile") == (level == "avx512")
    assert cpu.has("avx_vnni") == (level != "default")


def test_the_level_cannot_be_raised():
    cpu = describe(cpuinfo(HASWELL), "avx512")
    assert cpu.level == "avx2"
    assert [str(n) for n in cpu.notes] == ["avx512 was asked for, this CPU has avx2"]


def test_an_unknown_level_is_noted():
    cpu = describe(cpuinfo(HASWELL), "sse9")
    assert cpu.level == "avx2"
    assert [str(n) for n in cpu.notes] == [
        "unknown CPU level 'sse9'; fix: use default, avx2, avx512"
    ]


def test_effc_cpu_wins_over_torchs_variable(monkeypatch):
    if isinstance(detect(), UnsupportedCpu):
        pytest.skip("needs an x86-64 CPU")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert detect().level == "default"
    monkeypatch.setenv("EFFC_CPU", "avx2")
    assert detect().level in ("avx2", "default")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    monkeypatch.setenv("EFFC_CPU", "default")
    assert detect().level == "default"


def test_amx_counts_only_when_the_kernel_grants_it():
    granted = describe(cpuinfo(SERVER), amx=lambda: None)
    refused = describe(cpuinfo(SERVER), amx=lambda: "the kernel refuses (Operation not supported)")
    assert granted.has("amx_int8") and granted.notes == ()
    assert not any(name.startswith("amx") for name in refused.extensions)
    assert [n.kind for n in refused.notes] == ["no-amx"]
    assert refused.capability() != granted.capability()


def test_amx_is_not_asked_for_without_tiles_or_below_its_level():
    def never():
        raise AssertionError("asked")

    assert describe(cpuinfo(HASWELL), amx=never).level == "avx2"
    assert describe(cpuinfo(SERVER), "avx2", amx=never).level == "avx2"


def test_asking_for_amx_does_no_harm():
    assert request_amx() is None or "kernel" in request_amx() or "system call" in request_amx()


def test_another_machine_gets_a_reason(monkeypatch):
    monkeypatch.setattr(features.platform, "machine", lambda: "aarch64")
    features._detect.cache_clear()
    found = detect()
    features._detect.cache_clear()
    assert isinstance(found, UnsupportedCpu) and not found
    assert found.reason == "this machine is aarch64, the cpu target is x86-64" and found.fix
    assert isinstance(describe("Features : fp asimd"), UnsupportedCpu)


def test_cache_sizes_are_read_or_assumed(tmp_path):
    for i, (level, kind, size) in enumerate(
        [
            ("1", "Data", "48K"),
            ("1", "Instruction", "32K"),
            ("2", "Unified", "2M"),
            ("3", "?", "??"),
        ]
    ):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert cache_sizes(str(tmp_path)) == {"L1d": 48 << 10, "L2": 2 << 20}
    assert cache_sizes(str(tmp_path / "none")) == {}
    cpu = describe(cpuinfo(HASWELL), caches=cache_sizes(str(tmp_path)))
    assert isinstance(cpu, CpuFeatures) and (cpu.l1d, cpu.l2, cpu.l3) == (
        48 << 10,
        2 << 20,
        8 << 20,
    )


@pytest.mark.parametrize(
    ("built", "here", "lacks"),
    [
        (HASWELL, HASWELL, ()),
        ("sse2", HASWELL, ()),
        (HASWELL, SERVER, ()),
        (HASWELL, "sse2", ("avx2", "bmi1", "bmi2", "popcnt", "abm")),
        (SERVER, SERVER.replace("amx_int8", ""), ("amx_int8",)),
        (SERVER, f"{SERVER} more", ()),
        (f"{HASWELL} avx_vnni", HASWELL, ("avx_vnni",)),
    ],
)
def test_what_code_of_another_cpu_needs(built, here, lacks):
    capability = describe(cpuinfo(built)).capability()
    assert lacking(capability, describe(cpuinfo(here))) == lacks


@pytest.mark.parametrize("capability", ["", "riscv64+v", "x86_64", "x86_64+avx9"])
def test_code_of_an_unknown_cpu_needs_what_is_not_here(capability):
    assert lacking(capability, describe(cpuinfo(SERVER))) == (capability,)


def test_a_plan_can_be_made_for_another_cpu():
    other, mine = describe(cpuinfo(SERVER)), detect()
    with planning_for(other):
        assert detect() is other
    assert detect() is mine
