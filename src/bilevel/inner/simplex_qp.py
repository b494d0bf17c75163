"""Quadratic programs over a product of simplices, and their derivatives."""

import jax
import jax.numpy as jnp
import jax.scipy as jsp

_MAX_STEPS = 50
_BACK_OFF = 0.995  # a step goes no further than this part of the way to the boundary


@jax.custom_jvp
def simplex_qp(matrix: jax.Array, linear: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The minimum of a quadratic over matrices whose rows lie in the unit simplex.

        min over B of ½ ⟨B, M B⟩ + ⟨Q, B⟩     B ≥ 0,  B 1 = 1

    by a primal-dual interior-point method with Mehrotra's predictor and corrector. Given Z, the multipliers
    of B ≥ 0, a Newton step needs a Cholesky factor of M + diag(Z_k / B_k) for each column k, and one of the
    sum of their inverses, [n, n]: never the [nm, nm] system. The derivative is that of the equations

        M B + Q − Z + ν 1ᵀ = 0,   B 1 = 1,   B ∘ Z = what is left of it at the end (1e-18, in float32 1e-10)

    by the implicit function theorem, to any order, forward and reverse: one more such system. Where an
    element and its multiplier are both about zero the solution has a kink, and this is a slope in between.

    Args:
        matrix: M `[n, n]`, symmetric and positive definite.
        linear: Q `[n, m]`.

    Returns:
        B and Z, `[n, m]`, both positive; ⟨B, Z⟩ is the duality gap. NaN when M is not positive definite.

    Cost: some 15 steps of (m + 1) n³ / 3.

    Reference: Mehrotra, On the implementation of a primal-dual interior point method, 1992; Amos, Kolter,
    OptNet, 2017 (the derivative).

    >>> b, z = simplex_qp(jnp.eye(1), jnp.array([[0.0, 0.5, 9.0]]))
    >>> [round(float(element), 3) for element in b[0]], bool(jnp.sum(b * z) < 1e-5)
    ([0.75, 0.25, 0.0], True)
    """
    b, z, _, _ = _interior_point(matrix, linear, 1e-18 if linear.dtype == jnp.float64 else 1e-10)
    return b, z


@simplex_qp.defjvp
def _derivative(primals, tangents):
    matrix, linear = primals
    matrix_dot, linear_dot = tangents
    b, z = simplex_qp(matrix, linear)
    ratio = z / b

    def system(unknown):
        b_dot, nu_dot = unknown[:, :-1], unknown[:, -1:]
        forces = matrix @ b_dot + ratio * b_dot + nu_dot
        return jnp.concatenate([forces, b_dot.sum(1, keepdims=True)], 1)

    solve = _factor(*jax.lax.stop_gradient((matrix, ratio)))
    # In one array, [n, m + 1]: the rule of the linear solve wants all of it to vary or none.
    rate = jnp.pad(-(matrix_dot @ b + linear_dot), ((0, 0), (0, 1)))
    b_dot = jax.lax.custom_linear_solve(system, rate, lambda _, r: solve(r), symmetric=True)[:, :-1]
    return (b, z), (b_dot, -ratio * b_dot)


def _factor(matrix, ratio):
    """Solve `M b_k + ratio_k ∘ b_k + ν = r_k` for each column k, `B 1 = p`; both sides are `[n, m + 1]`."""
    n, m = ratio.shape
    eye = jnp.eye(n, dtype=ratio.dtype)

    def inverse(diagonal):
        half = jsp.linalg.solve_triangular(jnp.linalg.cholesky(matrix + jnp.diag(diagonal)), eye, lower=True)
        return half.T @ half

    inverses = jax.vmap(inverse, 1)(ratio)  # [m, n, n]
    total = jsp.linalg.cho_factor(inverses.sum(0), lower=True)

    def solve(right):
        r, p = right[:, :m], right[:, m]
        alone = jnp.einsum("kij,jk->ik", inverses, r)
        nu = jsp.linalg.cho_solve(total, alone.sum(1) - p)
        return jnp.concatenate([alone - jnp.einsum("kij,j->ik", inverses, nu), nu[:, None]], 1)

    return solve


def _interior_point(matrix, linear, tolerance):
    """B, Z and ν near the solution, and how many steps it took."""
    n, m = linear.shape
    matrix, linear = jax.lax.stop_gradient((matrix, linear))

    def going(state):
        (b, z, _), step = state
        return (jnp.mean(b * z) > tolerance) & (step < _MAX_STEPS)

    def advance(state):
        (b, z, nu), step = state
        residual = matrix @ b + linear - z + nu[:, None]
        mean = jnp.mean(b * z)
        solve = _factor(matrix, z / b)

        def direction(product):
            """The step towards B ∘ Z + its first-order change = `product`."""
            right = jnp.concatenate([-residual + product / b - z, 1 - b.sum(1, keepdims=True)], 1)
            found = solve(right)
            b_dot = found[:, :-1]
            return b_dot, (product - b * z - z * b_dot) / b, found[:, -1]

        b_dot, z_dot, _ = direction(jnp.zeros_like(b))
        length = jnp.minimum(_to_boundary(b, b_dot), _to_boundary(z, z_dot))
        ahead = jnp.mean((b + length * b_dot) * (z + length * z_dot))
        b_dot, z_dot, nu_dot = direction((ahead / mean) ** 3 * mean - b_dot * z_dot)
        length = _BACK_OFF * jnp.minimum(_to_boundary(b, b_dot), _to_boundary(z, z_dot))
        moved = b + length * b_dot, z + length * z_dot, nu + length * nu_dot
        return moved, step + 1

    b = jnp.full((n, m), 1 / m, linear.dtype)
    slope = matrix @ b + linear
    nu = 1 + jnp.max(jnp.abs(slope)) - slope.min(1)
    start = (b, slope + nu[:, None], nu)
    (b, z, nu), steps = jax.lax.while_loop(going, advance, (start, 0))
    return b, z, nu, steps


def _to_boundary(x, direction):
    """The longest step of at most 1 that keeps x ≥ 0."""
    return jnp.minimum(1, jnp.min(jnp.where(direction < 0, -x / direction, jnp.inf)))
