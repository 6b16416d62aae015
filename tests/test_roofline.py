"""FLOPs by hand, traffic of programs written by hand, and what a loop's length does to a real one."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf import hlo, model, roofline, sft
from jaxrlhf.split import split
from jaxrlhf.types import SftBatch

B, T, V, D, H, G, K, F, L = 3, 12, 48, 32, 4, 2, 8, 64, 4


def sft_flops(freeze: float, remat: str = "none") -> float:
    arch = model.Architecture(
        vocab_size=V,
        layers=L,
        width=D,
        heads=H,
        kv_heads=G,
        head_width=K,
        ff_width=F,
        max_positions=T,
        remat=remat,
        **model.FAMILIES["llama"],
    )
    frozen, top = jax.eval_shape(lambda: split(model.init(arch, jax.random.key(0)), freeze))
    batch = SftBatch(*(jax.ShapeDtypeStruct((B, T), d) for d in (jnp.int32, jnp.float32, jnp.float32)))
    gradient = jax.jit(jax.grad(lambda t, f, b: sft.loss(arch, f, t, b)[0]))
    return roofline.flops(gradient.trace(top, frozen, batch).jaxpr)


def test_flops_of_sft_by_hand():
    block = 2 * B * T * (2 * D * H * K + 2 * D * G * K + 3 * D * F) + 2 * (2 * B * T * T * H * K)
    head = 2 * B * T * D * V
    # Forward once; backward twice of what is trained, whose inputs have gradients too; of a frozen head, once.
    assert sft_flops(0.5) == L * block + 2 * (L // 2) * block + 2 * head
    assert sft_flops(0.0) == 3 * L * block + 3 * head
    # All kept but nothing computed twice, and the other way round: the last product of a block need not be.
    again = sft_flops(0.0, "full") - sft_flops(0.0)
    assert L * (block - 2 * B * T * F * D) <= again <= L * block


def test_a_while_loop_counts_up_to_its_bound_and_a_branch_once():
    def decode(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda s: (s[0] < 7) & ~(s[1] > 9).all(), lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[
            1
        ]

    def either(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    x = jax.ShapeDtypeStruct((5, 5), jnp.float32)
    assert roofline.flops(jax.jit(decode).trace(x).jaxpr) == 7 * 2 * 5**3
    assert roofline.flops(jax.jit(either).trace(x).jaxpr) == 2 * 2 * 5**3


def chain(x: jax.Array) -> jax.Array:
    """A loop of up to 7 steps, the rest of them on half of the rows, and a loop of its own of 3."""
    step, x = jax.lax.while_loop(lambda s: (s[0] < 7) & (s[1].max() > 0.5), lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))
    _, half = jax.lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] + 1, s[1] @ x), (step, x[::2]))
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1] @ x)), (0, half))[1]


def test_a_loop_that_goes_on_where_another_stopped_counts_as_part_of_it():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert roofline.flops(jax.jit(chain).trace(x).jaxpr) == 7 * 2 * 64**3 + 3 * 2 * 32 * 64 * 64
    text = jax.jit(chain).lower(x).compile().as_text()
    computations, entry = hlo._parse(text)
    loops = [
        hlo._goes_on(computations, computations[entry], x, re.search(r"condition=%([\w.-]+)", x.rest)[1])
        for x in computations[entry].instructions.values()
        if x.opcode == "while"
    ]
    assert sorted(loops) == [False, False, True]


def test_a_while_loop_without_a_bound_is_an_error():
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda s: (s > 0).all(), lambda s: s @ s, x))
    with pytest.raises(ValueError, match="no bound"):
        roofline.flops(endless.trace(jnp.ones((2, 2))).jaxpr)


def test_the_least_time_by_each_limit():
    chip = roofline.Chip(flops=4e12, hbm=1.0, hbm_rate=2e9, ici_rate=0.5e9)
    assert roofline.seconds(chip, 1e12, 3e9, 1e9) == {"compute": 0.25, "hbm": 1.5, "ici": 2.0}


PROGRAM = """\
HloModule hand, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %p = bf16[8,16]{1,0:T(8,128)} parameter(0)
  %gather.1 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  ROOT %begun = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%finish (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %gather.2 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  ROOT %ended = bf16[32,16]{1,0:S(1)} custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.3 (p: f32[8,4]) -> f32[1,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %whole = f32[8,4]{1,0} all-reduce(%p), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %own = f32[1,4]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={1,4}
}

%layer (stack: f32[6,10,10], i: s32[]) -> f32[10,10] {
  %stack = f32[6,10,10]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,10,10]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,10,10}
  ROOT %flat = f32[10,10]{1,0} bitcast(%one)
}

%body (s: (s32[], f32[6,10,10], bf16[8,16])) -> (s32[], f32[6,10,10], bf16[8,16]) {
  %s = (s32[], f32[6,10,10]{2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[]{:S(4)} get-tuple-element(%s), index=0
  %stack = f32[6,10,10]{2,1,0} get-tuple-element(%s), index=1
  %rows = bf16[8,16]{1,0:S(1)} get-tuple-element(%s), index=2
  %begin = (bf16[8,16]{1,0:S(1)}, bf16[32,16]{1,0:S(1)}) fusion(%rows), kind=kCustom, calls=%start
  %weight = f32[10,10]{1,0:S(1)} fusion(%stack, %i), kind=kLoop, calls=%layer
  %end = bf16[32,16]{1,0:S(1)} fusion(%rows), kind=kCustom, calls=%finish
  ROOT %next = (s32[], f32[6,10,10]{2,1,0}, bf16[8,16]{1,0}) tuple(%i, %stack, %rows)
}

%condition (s: (s32[], f32[6,10,10], bf16[8,16])) -> pred[] {
  %s = (s32[], f32[6,10,10]{2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %six = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %six), direction=LT
}

ENTRY %main (x: f32[8,4], s: (s32[], f32[6,10,10], bf16[8,16])) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %s = (s32[], f32[6,10,10]{2,1,0}, bf16[8,16]{1,0}) parameter(1)
  %loop = (s32[], f32[6,10,10]{2,1,0}, bf16[8,16]{1,0}) while(%s), condition=%condition, body=%body
  %scattered = f32[1,4]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %sum = f32[8,4]{1,0} all-reduce(%x), channel_id=9, replica_groups={{0,1,2,3,4},{5,6,7,8,9}}, to_apply=%add
}
"""


def test_traffic_of_a_program_written_by_hand():
    found = hlo.traffic(PROGRAM)
    # A gather that starts in one fusion and ends in another is one; six layers; groups of four.
    assert found.sent["all-gather"] == 6 * (32 * 16 * 2) * 3 / 4
    # Eight chips keep a slice each: one pass. Five chips keep the sum: two.
    assert found.sent["all-reduce"] == pytest.approx((8 * 4 * 4) * 7 / 8 + 2 * (8 * 4 * 4) * 4 / 5)
    # HBM: a layer of the stack six times, not the stack; what the gather reads and writes, once; the last sum's both
    # ends, and what the scatter reads. What is S(1) lies elsewhere.
    assert found.hbm == 6 * (10 * 10 * 4 + (8 + 32) * 16 * 2) + 2 * (8 * 4 * 4) + 8 * 4 * 4


def test_a_counter_that_grows_by_twos_halves_a_loop():
    by_twos = PROGRAM.replace(
        "ROOT %next = (s32[], f32[6,10,10]{2,1,0}, bf16[8,16]{1,0}) tuple(%i,",
        "%two = s32[]{:S(4)} constant(2)\n  %more = s32[]{:S(4)} add(%i, %two)\n"
        "  ROOT %next = (s32[], f32[6,10,10]{2,1,0}, bf16[8,16]{1,0}) tuple(%more,",
    )
    assert hlo.traffic(by_twos).sent["all-gather"] == hlo.traffic(PROGRAM).sent["all-gather"] / 2


def test_a_real_loop_moves_as_much_as_it_is_long():
    def run(length: int) -> float:
        def layers(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 64), (length, 64, 64))]
        return hlo.traffic(jax.jit(layers).lower(*shapes).compile().as_text()).hbm

    short, middle, long = run(10), run(20), run(40)
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.02)
    assert (middle - short) / 10 >= 2 * math.prod((64, 64)) * 4  # its weights and its states, at least


def test_a_loop_without_a_bound_in_its_condition_is_an_error():
    with pytest.raises(ValueError, match="no bound"):
        hlo.traffic(PROGRAM.replace("%six = s32[]{:T(128)} constant(6)", "%six = s32[] parameter(1)"))
