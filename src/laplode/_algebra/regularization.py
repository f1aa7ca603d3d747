"""What becomes of negative eigenvalues."""

import dataclasses
import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# ---- From a curvature and a prior


class Regularized(eqx.Module):
    """What regularization did to the curvature: `count` eigenvalues changed, the largest change, and their sum."""

    kind: str = eqx.field(static=True)
    count: int
    largest: float
    total: float

    def __str__(self) -> str:
        return f"{self.kind}: {self.count} eigenvalues, by at most {self.largest:.3g}, {self.total:.3g} in all"


@dataclasses.dataclass(frozen=True)
class Regularize:
    """A change of eigenvalues, with its name."""

    kind: str
    function: Callable[[np.ndarray], np.ndarray]

    def __call__(self, eigenvalues: np.ndarray) -> tuple[np.ndarray, int, Regularized | None]:
        """The eigenvalues after it, how many were negative beyond rounding, and what was changed."""
        rounding = eigenvalues.size * np.finfo(float).eps * np.abs(eigenvalues).max()
        num_negative = int(np.sum(eigenvalues < -rounding))
        changed = self.function(eigenvalues) if num_negative else eigenvalues
        change = np.abs(changed - eigenvalues)
        if not np.any(change):
            return changed, num_negative, None
        count = int(np.sum(change > rounding))
        return changed, num_negative, Regularized(self.kind, count, float(change.max()), float(change.sum()))


# ---- Strings become functions here, at the door, and nowhere else

_REGULARIZATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clip": lambda eigenvalues: np.maximum(eigenvalues, 0),
    "abs": np.abs,
    "jitter": lambda eigenvalues: eigenvalues - min(eigenvalues.min(), 0),
    "none": lambda eigenvalues: eigenvalues,
}


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_eigenvalues(function: Callable[[Array], Array], matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """A symmetric matrix with its eigenvalues changed; differentiable also where eigenvalues coincide."""
    return _with_eigenvalues_forward(function, matrix)[0]


def _with_eigenvalues_forward(function, matrix):
    eigenvalues, vectors = jnp.linalg.eigh(matrix)
    return (vectors * function(eigenvalues)) @ vectors.T, (eigenvalues, vectors)


def _with_eigenvalues_backward(function, kept, cotangent):
    # Daleckii and Krein (1965): in the eigenvectors, the derivative is a product with divided differences.
    eigenvalues, vectors = kept
    changed = function(eigenvalues)
    gap = eigenvalues[:, None] - eigenvalues
    apart = jnp.abs(gap) > 1e-9 * jnp.max(jnp.abs(eigenvalues))
    slope = jax.vmap(jax.grad(function))(eigenvalues)
    divided = jnp.where(apart, (changed[:, None] - changed) / jnp.where(apart, gap, 1), slope[:, None])
    inner = vectors.T @ (cotangent + cotangent.T) @ vectors / 2
    return (vectors @ (divided * inner) @ vectors.T,)


_with_eigenvalues.defvjp(_with_eigenvalues_forward, _with_eigenvalues_backward)
