"""exp, tanh and erf of a vector: polynomials over `simd`, the same for every caller."""

from __future__ import annotations

from .simd import (
    absolute,
    add,
    copysign,
    divide,
    fma,
    full,
    maximum,
    minimum,
    multiply,
    negative,
    power_of_two,
    rint,
    subtract,
    to_int,
    where_less,
    zeros,
)
from .target import kernel

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP_LOWEST, _EXP_HIGHEST = -87.33654, 88.72283
"""Below, exp is subnormal and becomes 0; above, infinite."""


@kernel(inline=True)
def exp(x):
    """e ** x within 2 ulp; 0 below -87.3 (and for -inf), inf above 88.7. Cephes' expf: x = n ln 2 + r."""
    clamped = minimum(maximum(x, full(_EXP_LOWEST)), full(_EXP_HIGHEST))
    n = rint(multiply(clamped, full(_LOG2_E)))
    r = fma(n, full(-_LN2_LOW), fma(n, full(-_LN2_HIGH), clamped))
    p = fma(full(1.9875691500e-4), r, full(1.3981999507e-3))
    p = fma(p, r, full(8.3334519073e-3))
    p = fma(p, r, full(4.1665795894e-2))
    p = fma(p, r, full(1.6666665459e-1))
    p = fma(p, r, full(5.0000001201e-1))
    p = add(fma(p, multiply(r, r), r), full(1.0))
    half = rint(multiply(n, full(0.5)))  # 2 ** 128 is no float32: two factors
    y = multiply(multiply(p, power_of_two(to_int(half))), power_of_two(to_int(subtract(n, half))))
    y = where_less(full(_EXP_HIGHEST), x, full(float("inf")), y)
    return where_less(x, full(_EXP_LOWEST), zeros(), y)


@kernel(inline=True)
def tanh(x):
    """Hyperbolic tangent, within 3 ulp: x + x^3 p(x^2) below 0.625 (Cephes' tanhf), 1 - 2 / (e^2|x| + 1) above."""
    a = absolute(x)
    z = multiply(x, x)
    p = fma(full(-5.70498872745e-3), z, full(2.06390887954e-2))
    p = fma(p, z, full(-5.37397155531e-2))
    p = fma(p, z, full(1.33314422036e-1))
    p = fma(p, z, full(-3.33332819422e-1))
    small = fma(multiply(p, z), x, x)
    large = subtract(full(1.0), divide(full(2.0), add(exp(add(a, a)), full(1.0))))
    return copysign(where_less(a, full(0.625), small, large), x)


@kernel(inline=True)
def erf(x):
    """The error function, absolute error below 3e-7: Abramowitz and Stegun 7.1.26, a series below 0.5."""
    a = absolute(x)
    z = multiply(x, x)
    s = fma(full(-7.5757575757e-4), z, full(4.6296296296e-3))
    s = fma(s, z, full(-2.3809523809e-2))
    s = fma(s, z, full(1.0e-1))
    s = fma(s, z, full(-3.3333333333e-1))
    small = multiply(multiply(fma(s, z, full(1.0)), x), full(1.1283791671))
    t = divide(full(1.0), fma(full(0.3275911), a, full(1.0)))
    p = fma(full(1.061405429), t, full(-1.453152027))
    p = fma(p, t, full(1.421413741))
    p = fma(p, t, full(-0.284496736))
    p = fma(p, t, full(0.254829592))
    large = subtract(full(1.0), multiply(multiply(p, t), exp(negative(z))))
    return copysign(where_less(a, full(0.5), small, large), x)
