"""The posterior as a distribution of NumPyro."""

from typing import Any

import jax
import numpyro.distributions as dist
from jaxtyping import Array, Float

from .._algebra.precision import AbstractPrecision


class Gaussian(dist.Distribution):
    """Normal(mean, Λ⁻¹), for NumPyro."""

    _support = dist.constraints.real_vector
    pytree_data_fields = ("mean_vector", "structure")

    def __init__(
        self, mean_vector: Float[Array, " P"], structure: AbstractPrecision, *, validate_args: bool | None = None
    ):
        self.mean_vector, self.structure = mean_vector, structure
        super().__init__(event_shape=mean_vector.shape, validate_args=validate_args)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()):
        key_normal = jax.random.split(key)[1]
        normals = jax.random.normal(key_normal, (*sample_shape, *self.event_shape))
        return self.mean_vector + self.structure.root_product(normals)

    def log_prob(self, value: Any, intermediates: Any = None):
        return self.structure.log_prob(value - self.mean_vector)

    @property
    def mean(self):
        return self.mean_vector

    @property
    def variance(self):
        return self.structure.variance()
