"""Golden counts of programs written by hand, each of which can be counted with pencil and paper."""

import jax
import jax.numpy as jnp
import pytest

from restkv_jax.planning.collectives import Collective
from restkv_jax.planning.counting import count
from restkv_jax.planning.hlo import parse, shapes_of

LOOP = """
HloModule loop, is_scheduled=true

%body (p: (s32[], bf16[256,512], bf16[512,512])) -> (s32[], bf16[256,512], bf16[512,512]) {
  %p = (s32[]{:T(128)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/bf16[512,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[512,512]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(1)} add(%i, %one)
  %y = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} MATMUL, metadata={op_name="jit(f)/while/body/dot_general"}
  ROOT %t = (s32[], bf16[256,512], bf16[512,512]) tuple(%next, %y, %w)
}

%condition (p.1: (s32[], bf16[256,512], bf16[512,512])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} LIMIT
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: bf16[256,512], w.1: bf16[512,512], n: s32[]) -> bf16[256,512] {
  %a = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w.1 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[]{:T(128)} constant(3)
  %state = (s32[], bf16[256,512], bf16[512,512]) tuple(%start, %a, %w.1)
  %loop = (s32[], bf16[256,512], bf16[512,512]) while(%state), condition=%condition, body=%body
  ROOT %out = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=1
}
"""
DOT = "dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
CONVOLUTION = "convolution(%x, %w), dim_labels=bf_io->bf"
WEIGHTS, PRODUCT = 2 * 512 * 512, 2 * 256 * 512 * 512


def loop(matmul=DOT, limit="constant(13)"):
    return LOOP.replace("MATMUL", matmul).replace("LIMIT", limit)


def entry(*lines, others=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n{others}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize("matmul", [DOT, CONVOLUTION])
def test_a_product_in_a_loop_counts_as_often_as_the_loop_turns(matmul):
    found = count(loop(matmul))
    assert (found.operations, found.read, found.unknown_loops) == (10 * PRODUCT, 10 * (WEIGHTS + 8), ())
    assert found.written == 0  # the activations stay in the chip's vector memory


def test_a_loop_whose_turns_depend_on_data_is_named():
    found = count(loop(limit="get-tuple-element(%p.1), index=0"), unknown_turns=4)
    assert (found.unknown_loops, found.operations) == (("loop",), 4 * PRODUCT)


def test_what_the_compiler_notes_of_a_loop_is_believed():
    noted = loop(limit="get-tuple-element(%p.1), index=0").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert count(noted).operations == 7 * PRODUCT


def test_a_loop_of_several_turns_in_one_counts_them_once():
    assert count(loop().replace("constant(1)", "constant(2)")).operations == 5 * PRODUCT


ALL_REDUCE = "ROOT %sum = bf16[4,1024]{1,0} all-reduce(%a), channel_id=1, replica_groups=GROUPS, to_apply=%add"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("mesh['data'=2,'model'=4] {'model'}, use_global_device_ids=true", 4),
        ("mesh['axis_0'=8] {'axis_0'}", 8),
    ],
)
def test_an_all_reduce_sends_twice_what_all_but_one_have(groups, size):
    found = count(entry("%a = bf16[4,1024]{1,0} parameter(0)", ALL_REDUCE.replace("GROUPS", groups)))
    assert found.collectives == (Collective("all-reduce", 8192, size, 1),)
    assert found.sent() == 2 * (size - 1) / size * 8192


def test_an_all_reduce_of_one_device_is_none():
    assert not count(
        entry("%a = bf16[4,1024]{1,0} parameter(0)", ALL_REDUCE.replace("GROUPS", "{{0},{1}}"))
    ).collectives


def test_a_reduce_scatter_and_an_all_gather_send_what_an_all_reduce_does():
    divided = count(
        entry(
            "%a = f32[4,1024]{1,0} parameter(0)",
            "%part = f32[1,1024]{1,0} reduce-scatter(%a), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add",
            "%start = (f32[1,1024]{1,0}, f32[4,1024]{1,0}) all-gather-start(%part), replica_groups=[1,4]<=[4]",
            "ROOT %whole = f32[4,1024]{1,0} all-gather-done(%start)",
        )
    )
    assert {c.kind: c.bytes for c in divided.collectives} == {"reduce-scatter": 16384, "all-gather": 16384}
    assert divided.sent() == Collective("all-reduce", 16384, 4).sent


SCATTERING = """
%all-reduce-scatter (whole: bf16[1024,128]) -> bf16[128,128] {
  %whole = bf16[1024,128]{1,0} parameter(0)
  %sum = bf16[1024,128]{1,0} all-reduce(%whole), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  %id = s32[] partition-id()
  ROOT %part = bf16[128,128]{1,0} dynamic-slice(%sum, %id, %zero), dynamic_slice_sizes={128,128}
}
"""


def test_an_all_reduce_that_is_fused_with_its_slice_is_a_reduce_scatter():
    found = count(
        entry(
            "%a = bf16[1024,128]{1,0} parameter(0)",
            "ROOT %part = bf16[128,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter",
            others=SCATTERING,
        )
    )
    assert found.collectives == (Collective("reduce-scatter", 2 * 1024 * 128, 8, 1),)


SLICING = """
%fused (param_0: f32[32,8,128], param_1: s32[]) -> f32[8,128] {
  %param_0 = f32[32,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %same = f32[8,128]{1,0:T(8,128)} bitcast(%part)
}
"""


def test_a_fusion_reads_what_it_slices():
    found = count(
        entry(
            "%a = f32[32,8,128]{2,1,0:T(8,128)} parameter(0)",
            "%i = s32[]{:S(6)} parameter(1)",
            "ROOT %layer = f32[8,128]{1,0:T(8,128)} fusion(%a, %i), kind=kLoop, calls=%fused",
            others=SLICING,
        )
    )
    assert (found.read, found.written) == (4096, 4096)


UPDATING = """
%fused (param_0: bf16[32,1088,128], param_1: bf16[1,1,128], param_2: s32[]) -> bf16[32,1088,128] {
  %param_0 = bf16[32,1088,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[1,1,128]{2,1,0:T(1,128)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = bf16[32,1088,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0, %param_1, %i, %i, %i)
}
"""


def test_an_update_in_place_writes_what_it_puts():
    found = count(
        entry(
            "%cache = bf16[32,1088,128]{2,1,0:T(8,128)(2,1)} parameter(0)",
            "%new = bf16[1,1,128]{2,1,0:T(1,128)S(1)} parameter(1)",
            "%i = s32[]{:S(6)} parameter(2)",
            "ROOT %next = bf16[32,1088,128]{2,1,0:T(8,128)(2,1)} fusion(%cache, %new, %i), kind=kLoop, calls=%fused",
            others=UPDATING,
        )
    )
    assert (found.read, found.written) == (0, 256)


BRANCHES = """
%nothing (x: f32[64,64]) -> f32[64,64] {
  ROOT %x = f32[64,64]{1,0} parameter(0)
}

%product (y: f32[64,64]) -> f32[64,64] {
  %y = f32[64,64]{1,0} parameter(0)
  ROOT %yy = f32[64,64]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize("taken", [1.0, 0.5])
def test_a_conditional_counts_its_heaviest_branch_as_often_as_it_is_taken(taken):
    lines = (
        "%a = f32[64,64]{1,0} parameter(0)",
        "%is = pred[] parameter(1)",
        "ROOT %r = f32[64,64]{1,0} conditional(%is, %a, %a), branch_computations={%nothing, %product}",
    )
    assert count(entry(*lines, others=BRANCHES), taken=taken).operations == taken * 2 * 64**3


def test_a_copy_into_vector_memory_reads_and_does_not_write():
    found = count(
        entry(
            "%a = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(0)",
            "%start = (bf16[1024,128]{1,0:S(1)}, bf16[1024,128]{1,0}, u32[]{:S(2)}) copy-start(%a)",
            "ROOT %done = bf16[1024,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)",
        )
    )
    assert (found.read, found.written) == (2 * 1024 * 128, 0)


def test_a_kernel_reads_the_share_of_its_operands_that_is_said():
    lines = (
        "%pool = bf16[64,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)",
        'ROOT %context = f32[4,128]{1,0:T(4,128)} custom-call(%pool), custom_call_target="tpu_custom_call"',
    )
    found = count(entry(*lines), kernel_reads=lambda shape: 1 / 32 if shape.dims == (64, 16, 128) else 1.0)
    assert (found.read, found.written) == (2 * 64 * 16 * 128 / 32, 4 * 4 * 128)


def test_tiles_pad_what_lies_in_memory():
    padded, transposed, plain = shapes_of(
        "(bf16[2,1088,64]{2,1,0:T(8,128)(2,1)}, f32[100,8]{0,1:T(8,128)}, s32[3]{0:T(128)})"
    )
    assert (padded.bytes, padded.plain_bytes) == (2 * 2 * 1088 * 128, 2 * 2 * 1088 * 64)
    assert (transposed.bytes, plain.bytes) == (4 * 128 * 8, 12)


def test_a_window_counts_where_it_meets_the_input():
    # a batched product as a TPU writes it: 4 heads by a window of 4 that meets one element for each output
    lines = (
        "%a = bf16[4,128,64]{2,1,0} parameter(0)",
        "%b = bf16[4,32,64]{2,1,0} parameter(1)",
        "ROOT %r = f32[4,128,32]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, "
        "dim_labels=0bf_0oi->0bf",
    )
    assert count(entry(*lines)).operations == 2 * 4 * 128 * 32 * 64


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_f {}")


def test_a_program_that_xla_compiled_costs_what_it_says_times_its_turns():
    x, w = jnp.ones((64, 96), jnp.float32), jnp.ones((96, 96), jnp.float32)

    def turn(x, _):
        return jnp.tanh(x @ w), None

    once = jax.jit(lambda x: x @ w).lower(x).compile()
    often = (
        jax.jit(lambda x, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, 12)[0]).lower(x, w).compile()
    )
    assert count(once.as_text()).operations == once.cost_analysis()["flops"] == 2 * 64 * 96 * 96
    assert count(often.as_text()).operations == 12 * 2 * 64 * 96 * 96


def test_splash_attention_reads_the_keys_once_for_every_query_head_and_block():
    line = (
        "ROOT %splash_mha_fwd_segmented.3 = (bf16[8,2048,128]{2,1,0:T(8,128)(2,1)}, f32[8,2048,128]{2,1,0:T(8,128)}) "
        'custom-call(%q, %k, %v), custom_call_target="tpu_custom_call"'
    )
    lines = (
        "%q = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)} parameter(0)",
        "%k = bf16[2,8192,128]{2,1,0:T(8,128)(2,1)} parameter(1)",
        "%v = bf16[2,8192,128]{2,1,0:T(8,128)(2,1)} parameter(2)",
        line,
    )
    queries, keys = 2 * 8 * 2048 * 128, 2 * 2 * 8192 * 128
    whole = count(entry(*lines))
    assert whole.read == queries + 2 * keys * 4 * 2 and whole.operations == 4 * 8 * 2048 * 8192 * 128
    assert whole.written == queries + 2 * queries
    causal = count(entry(*lines), seen=0.5)  # 4.5 of 8 blocks
    assert causal.read == queries + 2 * keys * 4 * 2 * 4.5 / 8
    assert causal.operations == whole.operations * 4.5 / 8


def test_a_computation_of_another_core_ends_with_the_name_of_its_thread():
    other = (
        "%gathered (x: f32[64]) -> f32[64] {\n  %x = f32[64]{0} parameter(0)\n"
        '  ROOT %y = f32[64]{0} negate(%x)\n}, execution_thread="sparsecore"\n'
    )
    module = parse(entry("%a = f32[8]{0} parameter(0)", "ROOT %b = f32[8]{0} negate(%a)", others=other))
    assert list(module.computations) == ["gathered", "main"] and module.computations["main"].root.name == "b"


def test_a_kernel_that_says_what_it_costs():
    config = 'backend_config={"custom_call_config":{"cost_estimate":{"bytes_accessed":"9000","flops":"77"}}}'
    lines = (
        "%keys = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)",
        f'ROOT %scores = f32[8,128]{{1,0:T(8,128)}} custom-call(%keys), custom_call_target="tpu_custom_call", {config}',
    )
    found = count(entry(*lines))
    assert (found.read, found.written, found.operations) == (9000 - 4096, 4096, 77)
