"""Products with parameters: the same as `jax.lax.dot_general`, with gradients that CPUs take fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import products, roofline

# Of an input and a matrix, and which axes of these are multiplied: wide, narrow, into heads, out of heads, as an output
# head does.
CASES = [
    ((3, 5, 7), (7, 9), ((2,), (0,))),
    ((3, 5, 7), (7, 4), ((2,), (0,))),
    ((3, 5, 8), (8, 2, 3), ((2,), (0,))),
    ((3, 5, 2, 3), (2, 3, 4), ((2, 3), (0, 1))),
    ((3, 5, 7), (9, 7), ((2,), (1,))),
]


def drawn(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), dtype)


def value(product, given, dtype=None, **more):
    """A number that hangs on every product, and not alike."""
    x, w, axes = given
    out = product(x, w, (axes, ((), ())), preferred_element_type=dtype, **more).astype(jnp.float32)
    return (jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)).sum()


@pytest.mark.parametrize(("x_shape", "w_shape", "axes"), CASES)
@pytest.mark.parametrize(
    ("dtype", "preferred", "rounding"),
    [("float32", None, 1e-5), ("bfloat16", None, 2e-2), ("bfloat16", "float32", 2e-2)],
)
def test_values_and_gradients_are_those_of_the_plain_product(x_shape, w_shape, axes, dtype, preferred, rounding):
    x, w = drawn(x_shape, 0, dtype), drawn(w_shape, 1, dtype)

    def found(product):
        of = lambda x, w: value(product, (x, w, axes), preferred)  # noqa: E731
        return jax.jit(jax.value_and_grad(of, (0, 1)))(x, w)

    for a, b in zip(
        jax.tree.leaves(found(products.dot_general)), jax.tree.leaves(found(jax.lax.dot_general)), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0, atol=rounding * scale)


def test_members_of_an_ensemble_have_their_own_gradients():
    x, w = drawn((4, 3, 7), 0), drawn((4, 7, 9), 1)
    grad = jax.grad(lambda x, w: value(products.dot_general, (x, w, ((1,), (0,)))), (0, 1))
    together = jax.vmap(grad)(x, w)
    for i in range(4):
        for a, b in zip(together, grad(x[i], w[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x_shape", "w_shape", "axes"), CASES)
def test_no_product_is_done_for_a_gradient_that_nobody_asks_for(x_shape, w_shape, axes):
    x, w = drawn(x_shape, 0), drawn(w_shape, 1)
    of = lambda x, w: value(products.dot_general, (x, w, axes))  # noqa: E731
    once = roofline.flops(jax.make_jaxpr(of)(x, w))
    counts = [roofline.flops(jax.make_jaxpr(jax.grad(of, which))(x, w)) / once for which in (0, 1, (0, 1))]
    assert counts == [2, 2, 3]


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "axes"),
    [
        ((64, 128), (128, 256), ((1,), (0,))),
        ((64, 256), (256, 128), ((1,), (0,))),
        ((64, 128), (256, 128), ((1,), (1,))),
    ],
)
def test_on_cpus_no_product_sums_over_the_first_axis_of_its_left_side(x_shape, w_shape, axes):
    """In the compiled program: XLA's fast products sum over the last, and others take up to twice as long."""
    x, w = drawn(x_shape, 0), drawn(w_shape, 1)

    def text(product):
        return jax.jit(jax.grad(lambda x, w: value(product, (x, w, axes)), (0, 1))).lower(x, w).compile().as_text()

    assert products.platform() == "cpu"
    assert "lhs_contracting_dims={0}" not in text(products.dot_general)
    assert "lhs_contracting_dims={0}" in text(jax.lax.dot_general)


@pytest.mark.parametrize("more", [{"dtype": "bfloat16"}, {"precision": jax.lax.Precision.HIGHEST}])
def test_what_is_not_of_one_type_or_asks_for_precision_is_left_to_jax(more):
    x, w = drawn((3, 7), 0), drawn((7, 4), 1, more.pop("dtype", "float32"))

    def text(product):
        of = lambda x, w: value(product, (x, w, ((1,), (0,))), **more)  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(of, (0, 1)))(x, w))

    assert text(products.dot_general) == text(jax.lax.dot_general)
