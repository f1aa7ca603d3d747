"""The check of the solver's tolerance against the curvature at tight ones, known from elsewhere."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp

KEY = jax.random.key(0)


class Oscillator(eqx.Module):
    stiffness: jax.Array
    friction: jax.Array

    def __call__(self, t, y, args):
        return jnp.stack([y[1], -self.stiffness * jnp.sin(y[0]) - self.friction * y[1]])


def posterior_of(controller, quiet, **options):
    field = Oscillator(jnp.array(2.0), jnp.array(0.1))
    model = lp.NeuralODE(field, solver=diffrax.Bosh3(), stepsize_controller=controller, dt0=0.05, max_steps=1024)
    ts = np.linspace(0, 6, 9)
    ys = np.stack([np.cos(1.3 * ts), -np.sin(1.3 * ts)], axis=1)
    return quiet(model, lp.Problem(lp.Trajectories(ts, ys, [1.0, 0.0]), lp.Gaussian(0.1), 1.0), **options)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_the_change_is_that_of_the_matrices(quiet, curvature):
    """In expectation over probes, the norm of the whitened difference of two posteriors."""
    options = dict(curvature=curvature, regularization="abs")
    loose = posterior_of(diffrax.PIDController(1e-2, 1e-3), quiet, **options)
    tight = posterior_of(diffrax.PIDController(1e-4, 1e-5), quiet, **options)
    matrix = lambda p: np.asarray(p.form.matrix)
    root = np.linalg.inv(np.linalg.cholesky(np.asarray(loose.precision())))
    expected = np.linalg.norm(root @ (matrix(tight) - matrix(loose)) @ root.T)
    with pytest.warns(lp.LaplodeWarning, match="the tolerance of the solver is too loose .*rtol=0.01"):
        found = lp.check_tolerance(loose, num_probes=400, key=jax.random.key(1))
    assert expected > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0.15)
    if curvature == "ggn":  # and the tighter one is right; products of Hessians take longer to compile
        assert lp.check_tolerance(posterior_of(diffrax.PIDController(1e-5, 1e-6), quiet, **options), key=KEY) < 1e-2


def test_what_has_no_tolerance_is_refused(quiet, growth_posterior):
    with pytest.raises(lp.LaplodeError, match="`posterior` is of a Growth, whose solver laplode does not know"):
        lp.check_tolerance(growth_posterior, key=KEY)
    loose = posterior_of(diffrax.PIDController(1e-3, 1e-4), quiet, curvature="ggn")
    rest = lambda p: p.flow.parameters.rest.stepsize_controller
    with pytest.raises(lp.LaplodeError, match=r"have no tolerance \(ConstantStepSize\)"):
        lp.check_tolerance(eqx.tree_at(rest, loose, diffrax.ConstantStepSize()), key=KEY)
    with pytest.raises(lp.LaplodeError, match="with max_steps = 1024 the solve does not arrive"):
        lp.check_tolerance(eqx.tree_at(rest, loose, diffrax.PIDController(1e-9, 1e-10)), key=KEY)
