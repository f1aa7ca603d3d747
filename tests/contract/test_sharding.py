"""Work spread over several devices and several processes gives what one device gives.

The number of devices is settled when JAX starts: each test runs this file as a program of its own.
"""

import os
import socket
import subprocess
import sys
import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
import laplode._curvature.hessian as hessian_module
from laplode._curvature.hessian import _hessian_rows
from laplode._devices import _ALONG as ALONG, _EVERYWHERE as EVERYWHERE, _placed, _spread, check_mesh
from laplode._solve.objective import NegativeLogLikelihood


class Bent(eqx.Module):
    weights: jax.Array
    rate: jax.Array

    def __call__(self, t, y, args):
        return jnp.tanh(self.weights @ y) * args - self.rate * y


class Decay(eqx.Module):
    """In closed form, so that little compiles."""

    rate: jax.Array
    mix: jax.Array

    def __call__(self, ts, y0, args):
        return jnp.exp(-self.rate * ts[:, None] * args) * (self.mix @ y0)


# Times, observations and initial states: no number of trajectories that devices could share evenly.
N, T = 3, 6


def problem():
    rng = np.random.default_rng(0)
    ts, y0 = np.linspace(0, 2, T), 1 + rng.random((N, 2))
    return lp.Problem(
        lp.Trajectories(ts, rng.normal(size=(N, T, 2)), y0, np.linspace(0.5, 1.0, N)), lp.Gaussian(0.5), 1.0
    )


def field():
    weights = np.random.default_rng(1).normal(size=(2, 2))
    coarse = dict(solver=diffrax.Heun(), stepsize_controller=diffrax.PIDController(1e-3, 1e-4), max_steps=64)
    return lp.NeuralODE(Bent(jnp.asarray(weights), jnp.asarray([0.3, 0.5])), **coarse)


def closed():
    return Decay(jnp.array([0.3, 0.5]), jnp.array([[1.0, 0.2], [-0.3, 0.8]]))


def answers(mesh, *, all_of_them: bool) -> dict[str, np.ndarray]:
    """Numbers of every kind of work that a mesh takes."""
    key, data = jax.random.key(0), problem().data
    run = lambda model, **options: lp.laplace(model, problem(), mesh=mesh, progress=False, **options)
    predict = lambda posterior, **options: lp.predict(
        posterior, data.ts, num_samples=5, key=key, mesh=mesh, progress=False, **options
    )
    factored, exact = run(closed(), curvature="ggn", structure="low_rank"), run(closed())
    linearized = predict(factored)
    found = {
        "jacobian": factored.form.factor,
        "bands": linearized.covariance(),
        "draws": linearized.f,
        "hessian": exact.form.matrix,
        "evidence": exact.log_evidence,
    }
    if all_of_them:
        sampled, geodesic = predict(exact, method="sampled"), predict(exact, method="geodesic", weigh=False)
        hessian_module._FEW_PARAMETERS = 0  # the Hessian by local pieces
        found |= {
            "solves": sampled.f,
            "weights": sampled.log_p,
            "geodesics": geodesic.f,
            "sensitivities": run(field(), curvature="ggn", structure="low_rank").form.factor,
            "local": run(field()).form.matrix,
        }
    return {name: np.asarray(value) for name, value in found.items()}


def bytes_held(mesh, tangents: int) -> int:
    """What a device works in while it pushes its part of so many tangents, all at once."""
    around = lp.curvature_products(closed(), problem()).flow
    shared = (NegativeLogLikelihood(around, problem()), around.parameters.vector, tangents)
    indices = jnp.arange(tangents) % around.parameters.size
    arguments = (_placed(mesh, EVERYWHERE, shared), _placed(mesh, ALONG, indices), None)
    lowered = _spread.lower(mesh, _hessian_rows, *arguments)
    return lowered.compile().compiled.memory_analysis().temp_size_in_bytes


def run_job(kind: str, out: str, address: str, number: int) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    warnings.simplefilter("ignore", lp.LaplodeWarning)  # the model is not fitted
    if kind == "processes":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=2, process_id=number)
        assert jax.process_count() == 2 and jax.local_device_count() == 1
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    found = answers(mesh, all_of_them=kind == "devices")
    if kind == "devices":
        assert jax.device_count() == 4
        four, one = check_mesh(mesh), check_mesh(jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("all",)))
        found["held"] = np.array([bytes_held(four, 256), bytes_held(one, 256)])
    np.savez(f"{out}.{number}.npz", **found)


@pytest.fixture(scope="module")
def alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        few = hessian_module._FEW_PARAMETERS
        try:
            return answers(None, all_of_them=True)
        finally:
            hessian_module._FEW_PARAMETERS = few


def start(tmp_path, kind: str, number: int = 0, address: str = "", devices: int = 1):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, __file__, kind, str(tmp_path / "found"), address, str(number)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def ended(tmp_path, processes) -> list[dict[str, np.ndarray]]:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [dict(np.load(tmp_path / f"found.{number}.npz")) for number in range(len(processes))]


def assert_same(found, alone):
    for name, value in found.items():
        expected = alone[name]
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-10 * scale, err_msg=name)


def test_four_devices(alone, tmp_path):
    (found,) = ended(tmp_path, [start(tmp_path, "devices", devices=4)])
    four, one = found.pop("held")
    assert set(found) == set(alone)
    assert_same(found, alone)
    # Each has a quarter of the tangents.
    assert four < 0.3 * one, (four, one)


def test_two_processes(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [start(tmp_path, "processes", number, address) for number in range(2)]
    for found in ended(tmp_path, processes):
        assert len(found) == 5
        assert_same(found, alone)


def test_what_a_mesh_is_no_use_for(growth, growth_posterior):
    mesh = jax.make_mesh((1,), ("all",))
    run = lambda **options: lp.laplace(*growth, progress=False, **options)
    with pytest.raises(lp.LaplodeError, match=r"`mesh` must be a jax.sharding.Mesh"):
        run(mesh=4)
    with pytest.raises(lp.LaplodeError, match=r"`mesh` must be a jax.sharding.Mesh"):
        lp.predict(growth_posterior, growth.problem.data.ts, key=jax.random.key(0), mesh="all")
    with pytest.raises(lp.LaplodeError, match=r"`mesh` goes with .* each product waits for the one before"):
        run(structure="low_rank", mesh=mesh)


def test_a_mesh_of_one(growth, growth_posterior, quiet):
    mesh = jax.make_mesh((1,), ("all",))
    posterior = quiet(*growth, mesh=mesh)
    assert_same({"hessian": posterior.form.matrix}, {"hessian": growth_posterior.form.matrix})
    options = dict(ts=growth.problem.data.ts, method="sampled", weigh=False, num_samples=3, key=jax.random.key(0))
    alone, found = (lp.predict(growth_posterior, **options, mesh=m, progress=False) for m in (None, mesh))
    assert_same({"solves": found.f}, {"solves": alone.f})


if __name__ == "__main__":
    run_job(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
