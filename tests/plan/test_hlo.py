"""The text of small programs, by hand; and of programs compiled here, against what they were written to do."""

import jax
import jax.numpy as jnp
import pytest

from l2m_jax.plan.hlo import Array, Module

TEXT = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused (p0: f32[5,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[5,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
}

%body (state: (s32[], f32[5,8], f32[16])) -> (s32[], f32[5,8], f32[16]) {
  %state = (s32[], f32[5,8]{1,0}, /*index=2*/f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[5,8]{1,0} get-tuple-element(%state), index=1
  %sums = f32[16]{0} get-tuple-element(%state), index=2
  %row = f32[1,8]{1,0} fusion(%table, %i), kind=kLoop, calls=%fused
  %gather-start = (f32[1,8]{1,0}, f32[2,8]{1,0}) all-gather-start(%row), replica_groups={{0,1}}, dimensions={0}
  %more = bf16[16]{0} custom-call(%sums), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/dot"}
  %gather-done = f32[2,8]{1,0} all-gather-done(%gather-start)
  ROOT %next = (s32[], f32[5,8]{1,0}, /*index=2*/f32[16]{0}) tuple(%i, %table, %sums)
}

%condition (state: (s32[], f32[5,8], f32[16])) -> pred[] {
  %state = (s32[], f32[5,8]{1,0}, /*index=2*/f32[16]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[5,8], y: f32[16]) -> f32[16] {
  %x = f32[5,8]{1,0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[5,8]{1,0}, /*index=2*/f32[16]{0}) tuple(%zero, %x, %y)
  %loop = (s32[], f32[5,8]{1,0}, /*index=2*/f32[16]{0}) while(%start), condition=%condition, body=%body TRIPS
  %z = f32[16]{0} get-tuple-element(%loop), index=2
  %reduce-start = f32[16]{0} all-reduce-start(%z), replica_groups={{0,1}}, to_apply=%sum
  ROOT %reduce-done = f32[16]{0} all-reduce-done(%reduce-start)
}
"""
KNOWN = TEXT.replace(" TRIPS", ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{}}')
UNKNOWN = TEXT.replace(" TRIPS", "")


def test_collectives_count_as_often_as_their_loop_runs():
    gather, reduce = Module.parse(KNOWN).collectives
    assert gather == (
        "all-gather",
        2 * 8 * 4,
        5,
        True,
    )  # of the result, though the start returns operand and result
    assert reduce == ("all-reduce", 16 * 4, 1, False)
    assert Module.parse(UNKNOWN, unknown_trips=3).collectives[0].count == 3


def test_traffic_is_what_a_slice_takes_and_not_the_array_it_is_taken_from():
    # Each round: a slice read and written, a gather's row and table, a product's f32[16] and bf16[16].
    slice_bytes, gather, product = 2 * 8 * 4 + 4, 8 * 4 + (1 + 2) * 8 * 4, 16 * 4 + 16 * 2
    reduce = 2 * 16 * 4
    assert Module.parse(KNOWN).traffic == 5 * (slice_bytes + gather + product) + reduce


PRODUCTS = """HloModule jit_g

%fused (p0: f32[4,8], p1: f32[8,2], p2: s32[4,1], p3: bf16[9,2]) -> bf16[9,2] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[8,2]{1,0} parameter(1)
  %p2 = s32[4,1]{1,0} parameter(2)
  %p3 = bf16[9,2]{1,0} parameter(3)
  %dot = f32[4,2]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %low = bf16[4,2]{1,0} convert(%dot)
  ROOT %scatter = bf16[9,2]{1,0} scatter(%p3, %p2, %low), to_apply=%sum, metadata={op_name="jit(g)/take/scatter-add"}
}

ENTRY %main (x: f32[4,8], y: f32[8,2], i: s32[4,1], z: bf16[9,2], a: bf16[3,5,6], b: bf16[3,7,6]) -> bf16[9,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,2]{1,0} parameter(1)
  %i = s32[4,1]{1,0} parameter(2)
  %z = bf16[9,2]{1,0} parameter(3)
  %a = bf16[3,5,6]{2,1,0} parameter(4)
  %b = bf16[3,7,6]{2,1,0} parameter(5)
  %gemm = (f32[3,5,7]{2,1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}
  %kept = bf16[9,2]{1,0} scatter(%z, %i, %z), unique_indices=true, to_apply=%sum
  ROOT %out = bf16[9,2]{1,0} fusion(%x, %y, %i, %kept), kind=kLoop, calls=%fused
}
"""


def test_products_and_scatters_also_within_fusions():
    module = Module.parse(PRODUCTS)
    assert module.products == [("bf16", 2 * 3 * 5 * 7 * 6, 1), ("f32", 2 * 4 * 2 * 8, 1)]
    assert module.scatters == [
        (Array("bf16", (9, 2)), True, "scatter"),
        (Array("bf16", (9, 2)), False, "jit(g)/take/scatter-add"),
    ]


def test_products_of_a_compiled_program():
    def f(x, y):
        return jax.lax.scan(lambda c, _: (c @ y, None), x, length=5)[0]

    text = jax.jit(f).lower(jnp.ones((64, 128)), jnp.ones((128, 128))).compile().as_text()
    counted = sum(p.flops * p.count for p in Module.parse(text).products)
    assert counted == 5 * 2 * 64 * 128 * 128


def test_custom_calls_kernels_and_buffers():
    module = Module.parse(KNOWN)
    assert module.custom_calls == {"__cublas$gemm": 5}
    assert module.kernels == 5 * 3 + 1
    largest = module.buffers()
    assert largest[0][0] in (Array("f32", (16,)), Array("f32", (2, 8)))
    assert (Array("bf16", (16,)), "jit(f)/dot") in largest
    assert all(array != Array("f32", (5, 8)) for array, _ in largest)  # a parameter


def test_a_reduce_scatter_counts_what_it_starts_from():
    text = """ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %scatter = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    assert Module.parse(text).collectives == [("reduce-scatter", 8 * 4, 1, False)]


@pytest.mark.parametrize(
    ("dtype", "bits"), [("f32", 32), ("bf16", 16), ("s8", 8), ("f8e4m3fn", 8), ("pred", 8)]
)
def test_bytes_of_an_array(dtype, bits):
    assert Array(dtype, (3, 5)).bytes == 15 * bits / 8


def test_a_sum_over_devices_in_a_compiled_loop():
    def f(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(jnp.tanh(c), "d"), None), x, length=7)[0]

    compiled = jax.pmap(f, axis_name="d").lower(jnp.ones((4, 3, 5))).compile()
    (found,) = Module.parse(compiled.as_text()).collectives
    assert (found.kind, found.bytes, found.count) == ("all-reduce", 3 * 5 * 4, 7)
