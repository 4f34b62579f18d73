"""The check for an RTX 3090: it finds every kernel, and what is wrong with one."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moejax.engine.kernels._parts import Launch, Part, launch
from moejax.qwen_moe import QwenMoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_kernels_sm86 as check
import triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

CONFIG = QwenMoeConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    norm_topk_prob=False,
)
KERNELS = {"qkv", "attention", "output", "router", "route", "experts", "down", "remember", "head"}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the compiler is not installed"
)


def apply(body, x, *, name="twice", num_warps=4, num_stages=1, rows=1):
    """One kernel of `rows` programs that reads `x` and writes an array like it."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    part = Part(rows, body, (x,), (shape,))
    _, [(y,)] = launch(name, [part], Launch(num_warps, num_stages))
    return y


def twice(program, x_ref, y_ref):
    y_ref[program] = 2 * x_ref[program]


def thrice(program, x_ref, y_ref):
    y_ref[program] = 3 * x_ref[program]


def modules_of(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return triton_kernels.triton_modules(triton_kernels.lower_for_cuda(jax.jit(function), *arrays))


def only_module(body, shape, num_warps=4):
    (module,) = modules_of(lambda x: apply(body, x, num_warps=num_warps), shape).values()
    return module


def test_kernels_are_found_with_their_settings():
    modules = modules_of(
        lambda x: apply(thrice, apply(twice, x), name="thrice", num_warps=8, num_stages=2), (4, 64)
    )
    assert set(modules) == {"twice", "thrice"}
    assert (modules["twice"].num_warps, modules["twice"].num_stages) == (4, 1)
    assert (modules["thrice"].num_warps, modules["thrice"].num_stages) == (8, 2)
    assert "tt.func public @twice" in modules["twice"].ttir
    assert "tt.store" in modules["twice"].ttir


def test_a_kernel_within_functions_and_loops_is_found_once():
    inner = jax.jit(lambda x: apply(twice, x))

    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (inner(x), None), x, length=3)
        return inner(inner(x))

    assert list(modules_of(program, (4, 64))) == ["twice"]


def test_different_kernels_of_one_name_are_told_apart():
    modules = modules_of(
        lambda x: apply(twice, apply(thrice, apply(twice, x), name="twice"), num_warps=2), (4, 64)
    )
    assert set(modules) == {"twice", "twice.2", "twice.3"}
    assert len(set(modules.values())) == 3


def test_a_program_without_kernels_has_none():
    assert modules_of(lambda x: 2 * x, (4, 64)) == {}


@pytest.mark.parametrize(
    ("strategy", "scope", "batch_size", "is_replayed"),
    [("lru", "layer", 1, False), ("intelligent", "layer", 3, False), ("lfu", "pool", 1, True)],
)
def test_all_kernels_of_a_decode_step_are_found(strategy, scope, batch_size, is_replayed):
    case = check.Case(strategy, scope, 4, batch_size, 32, is_replayed)
    modules = triton_kernels.triton_modules(check.lower_decode(CONFIG, case))
    more = {"combine"} if batch_size > 1 else set()
    assert {name.partition(".")[0] for name in modules} == KERNELS | more


@needs_triton
def test_a_plain_kernel_passes_on_both_targets():
    module = only_module(twice, (4, 64))
    for capability in check.TARGETS:
        compiled = triton_kernels.compile_kernel(module, capability)
        assert compiled.capability == capability
        assert 0 < compiled.registers < 64
        assert compiled.spill_bytes == compiled.shared_bytes == 0
        assert compiled.hopper == compiled.faults == ()


@needs_triton
def test_a_tile_too_large_for_its_warps_spills():
    def body(program, x_ref, y_ref):
        x = x_ref[:, :]
        y_ref[:, :] = x / (1 + jnp.sum(x * x))

    compiled = triton_kernels.compile_kernel(only_module(body, (8, 2048), num_warps=1), 86)
    assert compiled.spill_bytes > triton_kernels.MOST_SPILL_BYTES
    assert compiled.faults == (f"spills {compiled.spill_bytes} bytes",)


@needs_triton
def test_shared_memory_of_large_products_is_too_much_for_a_3090():
    def body(program, x_ref, y_ref):
        x = x_ref[:, :]
        y_ref[:, :] = dot(x, x)

    module = only_module(body, (128, 128), num_warps=8)
    compiled = triton_kernels.compile_kernel(module, 86)
    assert compiled.shared_bytes > triton_kernels.MOST_SHARED_BYTES
    assert any("shared memory" in fault for fault in compiled.faults)


def dot(x, y):
    return (triton.dot if hasattr(triton, "dot") else pl.dot)(x, y)


@needs_triton
def test_a_kernel_that_does_not_compile_is_a_fault():
    module = only_module(twice, (4, 64))
    broken = module._replace(ttir=module.ttir.replace("tt.store", "tt.restore"))
    (fault,) = check.judge(broken, 86)["faults"]
    assert "sm_86" in fault


def test_hopper_instructions_are_recognised():
    ptx = """
        wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
        cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd3];
        cp.async.cg.shared.global [%r1], [%rd1], 16; // wgmma and tensormap are only mentioned
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    """
    assert triton_kernels.hopper_instructions(ptx) == ("cp.async.bulk", "wgmma")


def test_limits_are_those_of_the_target():
    compiled = triton_kernels.Compiled(86, 40, 64, 99 * 1024, ())
    assert compiled.faults == ()
    assert compiled._replace(spill_bytes=68).faults == ("spills 68 bytes",)
    big = compiled._replace(shared_bytes=99 * 1024 + 1, hopper=("wgmma",))
    assert big.faults == ("asks for 101377 bytes of shared memory", "uses wgmma")
    assert big._replace(capability=90).faults == ()
    assert big._replace(capability=90, spill_bytes=68).faults == ("spills 68 bytes",)


@pytest.fixture
def with_one_kernel(monkeypatch):
    """Every case launches the same kernel, which takes 86 registers on sm_86 and 90 on sm_90."""
    module = triton_kernels.TritonModule("module {}", 4, 1)
    monkeypatch.setattr(check, "lower_decode", lambda config, case: case)
    monkeypatch.setattr(check, "triton_modules", lambda lowered: {"route": module})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def answer(spill_bytes):
        monkeypatch.setattr(
            check,
            "compile_kernel",
            lambda module, capability: triton_kernels.Compiled(
                capability, capability, spill_bytes, 64, ()
            ),
        )

    return answer


OPTIONS = ["--strategies", "lru", "--batch-sizes", "1", "--slots", "8"]


def test_each_kernel_is_shown_once_for_each_target(with_one_kernel, capsys):
    with_one_kernel(0)
    assert check.main(OPTIONS) == 0
    assert capsys.readouterr().out.splitlines() == [
        "kernel  target  warps  registers  spill_bytes  shared_bytes  hopper",
        "route   sm_86   4      86         0            64            -",
        "route   sm_90   4      90         0            64            -",
    ]


def test_a_fault_is_shown_and_fails_the_check(with_one_kernel, capsys):
    with_one_kernel(100)
    assert check.main(OPTIONS) == 1
    assert capsys.readouterr().out.count("FAULT: spills 100 bytes") == 2
    assert check.main([*OPTIONS, "-o", "json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [(row["target"], row["faults"]) for row in rows] == [
        ("sm_86", ["spills 100 bytes"]),
        ("sm_90", ["spills 100 bytes"]),
    ]
    assert rows[0]["case"]["strategy"] == "lru"


def test_a_program_that_cannot_be_lowered_fails_the_check(with_one_kernel, capsys, monkeypatch):
    def lower(config, case):
        if case.is_replayed:
            raise NotImplementedError("no rule for sort\nin a kernel")
        return case

    with_one_kernel(0)
    monkeypatch.setattr(check, "lower_decode", lower)
    assert check.main([*OPTIONS, "--scopes", "layer"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith("FAULT: not lowered: no rule for sort")


def test_cases_cover_every_strategy_and_every_setting():
    options = check.read_options([])
    cases = list(check.cases(options))
    assert len(set(cases)) == len(cases)
    assert {case.strategy for case in cases} == {*check.STRATEGIES} - {"top_k"}
    for field in ("slots", "positions", "batch_size"):
        wanted = {"slots": options.slots, "positions": options.positions}
        found = {getattr(case, field) for case in cases}
        assert found == set(wanted.get(field, options.batch_sizes))
    assert all(case.is_replayed for case in cases if case.strategy == "oracle")


def test_without_a_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check.main([]) == 2
    assert "pip install triton" in capsys.readouterr().err


def test_a_model_the_kernels_cannot_run_is_refused(with_one_kernel, capsys, tmp_path):
    with_one_kernel(0)
    assert check.main(["--model", "mixtral-8x7b"]) in (2, 4)
    assert "error: " in capsys.readouterr().err


def test_an_unknown_strategy_is_refused(capsys):
    with pytest.raises(SystemExit):
        check.read_options(["--strategies", "lru,belady"])
    assert "belady" in capsys.readouterr().err
