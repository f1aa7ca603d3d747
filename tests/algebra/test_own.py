"""A structure and a curvature of one's own, which no file of the package knows."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import laplode as lp
from laplode._algebra.forms import BlockForm, DenseForm, DiagonalForm
from laplode._algebra.structure import AbstractCurvature, AbstractStructure


class AbsoluteHessian(AbstractCurvature):
    """The exact Hessian with the absolute values of its eigenvalues."""

    name: ClassVar[str] = "absolute"
    signed: ClassVar[bool] = True

    def dense(self, at):
        found = lp.Hessian().dense(at)
        values, vectors = jnp.linalg.eigh(found.matrix)
        return DenseForm(((vectors * jnp.abs(values)) @ vectors.T)[None], found.defect)

    def blocks(self, at):
        whole = self.dense(at).matrix
        return BlockForm(tuple(DenseForm(whole[a:b, a:b][None], 0.0) for *_, a, b in at.flow.parameters.leaves))

    def diagonal(self, at):
        return DiagonalForm(jnp.diagonal(self.dense(at).matrix)[None])

    def leading(self, at, rank):
        return self.dense(at)


class TwoBlocks(AbstractStructure):
    """The parameters before a place in θ, and those after it."""

    place: int = eqx.field(static=True)
    name: ClassVar[str] = "two_blocks"

    def form(self, curvature, at):
        whole = curvature.dense(at).written_out()
        parts = (slice(0, self.place), slice(self.place, None))
        return BlockForm(tuple(DenseForm(whole.parts[:, part, part], 0.0) for part in parts))

    def num_bytes(self, sizes, signed):
        return lp.Full().num_bytes(sizes, signed)

    def build(self, form, local, regularization):
        return lp.BlockDiagonal().build(form, local, regularization)


def found(case, **strategies):
    posterior = lp.laplace(*case, progress=False, **strategies)
    tuned = lp.maximize_evidence(posterior, progress=False)
    predicted = lp.predict(posterior, case.problem.data.ts, key=jax.random.key(0), num_samples=20, progress=False)
    return posterior.marginal_std(), posterior.log_evidence, tuned.log_evidence, predicted.f


def test_a_structure_of_ones_own(growth):
    """The rates and the gain of `growth` are its two leaves, and so are these two blocks."""
    for ours, theirs in zip(
        found(growth, structure=TwoBlocks(2)), found(growth, structure="block_diagonal"), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_a_curvature_of_ones_own(growth):
    """Where the exact Hessian is positive definite it is the same, in every structure; as a part of it, it is all."""
    for structure, like in (("full", "full"), ("low_rank", "full"), ("block_diagonal",) * 2, ("diagonal",) * 2):
        own = lp.laplace(*growth, curvature=AbsoluteHessian(), structure=structure, progress=False)
        exact = lp.laplace(*growth, structure=like, progress=False)
        np.testing.assert_allclose(own.marginal_std(), exact.marginal_std(), rtol=1e-8)
