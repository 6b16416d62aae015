"""The attention kernel, run on CPUs by Pallas's interpreter, against plain products; and when it is taken."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxrlhf import attention, model, roofline, splash

B, H, G, K = 2, 4, 2, 16


def architecture(family: str = "llama", **changes) -> model.Architecture:
    sizes = {"vocab_size": 19, "layers": 2, "width": 64, "heads": H, "kv_heads": G, "head_width": K, "ff_width": 24}
    return model.Architecture(**(sizes | {"max_positions": 1024} | model.FAMILIES[family] | changes))


def texts(length: int) -> np.ndarray:
    """A text with padding on both sides, and three packed of which the second has continuations."""
    mask_BT = np.ones((B, length), np.float32)
    mask_BT[0, :9], mask_BT[0, -length // 5 :] = 0, 0
    for share, own in ((0.2, 2), (0.3, 2.25), (0.5, 2.5), (0.75, 3), (0.96, 0)):
        mask_BT[1, int(share * length) :] = own
    return mask_BT


def inputs(length: int, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    return tuple(jnp.asarray(rng.normal(size=(B, length, n, K)), dtype) for n in (H, G, G))


def gradients(attend, q, k, v, mask_BT):
    """What `attend(q, k, v, seen)` returns, and gradients of a weighted sum of it over real positions."""
    weight = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def total(q, k, v, mask_BT):
        out = attend(q, k, v, model.causal(mask_BT))
        return (jnp.where(mask_BT[..., None, None] > 0, out, 0) * weight).sum(), out

    (_, out), found = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v, jnp.asarray(mask_BT))
    return np.asarray(out), [np.asarray(x) for x in found]


# 300 is padded to 384 and one block; 643 to two blocks of 384; 1,000 to two of 512, which take keys 256 at a time.
@pytest.mark.parametrize(("length", "family"), [(300, "llama"), (643, "gemma2"), (1000, "llama")])
def test_the_kernel_is_plain_attention_in_values_and_gradients(length, family):
    arch, mask_BT = architecture(family), texts(length)
    kernel = partial(splash.attention, arch, "kept", interpret=True)
    out, found = gradients(kernel, *inputs(length), mask_BT)
    wanted, true = gradients(partial(attention.plain, arch), *inputs(length), mask_BT)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[mask_BT > 0], wanted[mask_BT > 0], atol=1e-5)
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert not a[mask_BT == 0].any()  # nothing leaks into padding


def test_half_precision_errs_no_more_than_plain_attention_does():
    arch, mask_BT = architecture(), texts(300)
    _, exact = gradients(partial(attention.plain, arch), *inputs(300), mask_BT)
    half = inputs(300, jnp.bfloat16)
    _, plain = gradients(partial(attention.plain, arch), *half, mask_BT)
    _, kernel = gradients(partial(splash.attention, arch, "kept", interpret=True), *half, mask_BT)
    for a, b, true in zip(kernel, plain, exact, strict=True):
        error, allowed = (np.abs(x.astype(np.float32) - true).mean() for x in (a, b))
        assert error < 1.2 * allowed


def test_a_query_sees_what_its_code_says_whichever_way_the_block_lies():
    mask_BT = jnp.asarray([[1, 1, 1.25, 1.5, 1.5, 2, 2, 0]])
    text_BT, gap_BT = splash._codes(model.causal(mask_BT))
    assert text_BT.tolist() == [[0, 0, 0, 0, 0, 5, 5, 7]]
    key = jnp.arange(6, dtype=jnp.int32)
    query = gap_BT[0, :, None] + jnp.zeros_like(key)  # a block of 8 queries by 6 keys
    wanted = np.array(model.causal(mask_BT)[0, :, :6])
    wanted[5:, :5], wanted[7, 5:] = True, True  # what texts, not codes, keep apart
    keys = jnp.broadcast_to(key, (8, 6))
    assert splash._seen(query, keys).tolist() == wanted.tolist()
    assert splash._seen(query.T, keys.T).tolist() == wanted.T.tolist()


def calls(f, *arguments) -> int:
    """How many kernels a function has, traced anew."""
    return str(jax.make_jaxpr(lambda *x: f(*x))(*arguments)).count("pallas_call")


@pytest.mark.parametrize(
    ("kernels", "rows", "length", "options", "dtype"),
    [
        (1, 47, 300, {}, jnp.bfloat16),
        (0, 46, 300, {}, jnp.bfloat16),  # 66 MB of scores; 64 MiB are 67
        (1, 64, 300, {"windows": (0, 300)}, jnp.bfloat16),  # sees all keys
        (1, 64, 300, {"attn_softcap": 50.0}, jnp.bfloat16),
        (0, 64, 300, {"windows": (0, 299)}, jnp.bfloat16),
        (0, 99, 255, {}, jnp.bfloat16),
        (0, 1, 8193, {}, jnp.bfloat16),
        (0, 64, 300, {}, jnp.float32),
    ],
)
def test_tpus_take_the_kernel_where_it_fits(monkeypatch, kernels, rows, length, options, dtype):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    attend = partial(attention.attention, architecture(**options))
    shapes = [jax.ShapeDtypeStruct((rows, length, n, K), dtype) for n in (H, G, G)]
    seen = jax.ShapeDtypeStruct((rows, length, length), jnp.bool_)
    assert calls(attend, *shapes, seen) == 0  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert calls(attend, *shapes, seen) == kernels
    picked = jax.ShapeDtypeStruct((rows, length - 1, H, K), dtype)
    assert calls(attend, picked, *shapes[1:], jax.ShapeDtypeStruct((rows, length - 1, length), jnp.bool_)) == 0
    monkeypatch.setattr(jax, "device_count", lambda: 2)  # and no mesh says how arrays lie on them
    assert calls(attend, *shapes, seen) == 0


def test_a_mesh_divides_rows_and_heads_or_there_is_no_kernel():
    arch = architecture()
    cases = [(2, 2, 2, 376, True), (2, 2, 2, 372, False), (4, 2, 1, 500, False), (1, 1, 4, 500, False)]
    for data, fsdp, tensor, rows, fits in cases:
        shapes = [jax.ShapeDtypeStruct((rows, 300, n, K), jnp.bfloat16) for n in (H, G)]
        mesh = jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
        with jax.sharding.use_abstract_mesh(mesh):
            assert splash.fits(arch, *shapes) == fits  # pyright: ignore[reportArgumentType]


def test_the_mesh_says_what_is_compiled_for_whatever_the_host_has():
    rows, axes = jax.ShapeDtypeStruct((376, 300, H, K), jnp.bfloat16), ("data", "fsdp", "tensor")
    keys = jax.ShapeDtypeStruct((376, 300, G, K), jnp.bfloat16)
    seen = jax.ShapeDtypeStruct((376, 300, 300), jnp.bool_)
    for platform, kernels in (("cpu", 0), ("tpu", 1)):
        device = jax.sharding.AbstractDevice(device_kind="any", num_cores=1, platform=platform)
        mesh = jax.sharding.AbstractMesh((2, 2, 2), axes, (AxisType.Auto,) * 3, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert calls(partial(attention.attention, architecture()), rows, keys, keys, seen) == kernels


# Devices of a process are fixed at its start.
DIVIDED = """
from functools import partial
import jax, numpy as np
import test_attention as t
from jaxrlhf import attention, config, sharding, splash
kernel = partial(splash.attention, t.architecture(), "kept", interpret=True)
inputs = [np.concatenate([x, x[::-1]]) for x in t.inputs(300)]
mask_BT = np.concatenate([t.texts(300)] * 2)
with jax.set_mesh(sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))):
    found = t.gradients(kernel, *inputs, mask_BT)
wanted = t.gradients(partial(attention.plain, t.architecture()), *inputs, mask_BT)
real = mask_BT > 0
for a, b in zip([found[0][real], *found[1]], [wanted[0][real], *wanted[1]], strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
"""


def test_rows_and_heads_divided_over_eight_devices_give_the_same():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", DIVIDED], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_flops_of_a_kernel_are_those_of_plain_products_blocks_left_out_or_not():
    """Of one block, of which no part is left out. For gradients the kernel makes scores twice more."""
    arch, length = architecture(), 384
    product = 2 * B * H * length * length * K
    mask_BT = jnp.ones((B, length), jnp.float32)
    kernel = partial(splash.attention, arch, "kept", interpret=True)
    seen = model.causal(mask_BT)
    assert roofline.flops(jax.make_jaxpr(kernel)(*inputs(length), seen)) == 2 * product
    whole = jax.grad(lambda *x: kernel(*x, seen).sum(), (0, 1, 2))
    # Each query's output times its gradient, too.
    assert roofline.flops(jax.make_jaxpr(whole)(*inputs(length))) == (2 + 4 + 3) * product + 2 * B * H * length * K


@pytest.mark.parametrize(("remat", "kept"), [("none", True), ("dots", True), ("dots_no_batch", False), ("full", False)])
def test_where_products_are_kept_so_is_what_the_kernel_takes_for_gradients(capsys, remat, kept):
    """Its output, and each query's sum of weights: without them it would run forward twice."""
    kernel = partial(splash.attention, architecture(), attention.KEPT, interpret=True)
    seen = model.causal(jnp.ones((B, 300), jnp.float32))
    block = jax.checkpoint(lambda *x: kernel(*x, seen) ** 2, policy=model.REMAT[remat])
    jax.ad_checkpoint.print_saved_residuals(block, *inputs(300))
    saved = capsys.readouterr().out
    assert (f"f32[{B},{H},384,{K}]" in saved, f"f32[{B},{H},384] " in saved) == (kept, kept)
