"""Rates of a predator and its prey, with informative priors: hare and lynx pelts, 1900-1920.

A Lotka-Volterra model with log-normal noise, all of it inferred: four rates, both initial states, both noise scales,
with the priors of B. Carpenter, "Predator-prey population dynamics: the Lotka-Volterra model in Stan" (2018). The
posterior is a Gaussian in the logarithms; draws from a t distribution of its shape are weighed against the true one.
Writes rates.png and rates.nc.
"""

import argparse
from pathlib import Path

import arviz_stats
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro.distributions as dist

import laplode

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", ".jax_cache")  # what is compiled is kept for the next run
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
matplotlib.use("Agg")


class LotkaVolterra(eqx.Module):
    """Thousands of pelts; hares are born and eaten, lynx die and feed."""

    birth: jax.Array
    hunt: jax.Array
    death: jax.Array
    feed: jax.Array

    def __call__(self, t, y, args):
        hare, lynx = y
        return jnp.stack([(self.birth - self.hunt * lynx) * hare, (self.feed * hare - self.death) * lynx])


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("."), help="folder for rates.png and rates.nc")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--quick", action="store_true", help="few draws, to see that everything runs")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

table = np.genfromtxt(Path(__file__).with_name("hare_lynx.csv"), delimiter=",", skip_header=4)
years, counts = table[:, 0], table[:, 1:]
model = laplode.NeuralODE(LotkaVolterra(*map(jnp.array, (0.5, 0.03, 0.8, 0.03))), y0=counts[0], scale=[0.3, 0.3])
priors = laplode.NamedPriors(
    {
        "vector_field.birth": dist.TruncatedNormal(1.0, 0.5, low=0.0),
        "vector_field.hunt": dist.TruncatedNormal(0.05, 0.05, low=0.0),
        "vector_field.death": dist.TruncatedNormal(1.0, 0.5, low=0.0),
        "vector_field.feed": dist.TruncatedNormal(0.05, 0.05, low=0.0),
        "y0": dist.LogNormal(jnp.log(10.0), 1.0),
        "scale": dist.LogNormal(-1.0, 1.0),
    }
)
problem = laplode.Problem(laplode.Trajectories(years, counts), laplode.LogNormal(), priors)

fit = laplode.refine(model, problem)
posterior = laplode.laplace(fit.model, problem)
print(posterior.diagnostics)

drawn = {
    "method": laplode.Sampled(df=5),
    "resample": True,
    "num_samples": 400 if options.quick else 4000,
    "key": jax.random.key(options.seed),
}
draws = laplode.predict(posterior, years, **drawn)
curves = laplode.predict(posterior, np.linspace(1900, 1920, 161), **drawn)
print(f"Pareto k\u0302 {draws.khat:.2f}")
tree = laplode.to_datatree(posterior, draws, curves, coords={"channel": ["hare", "lynx"]})
tree.to_netcdf(options.out / "rates.nc")
print(arviz_stats.summary(tree, kind="stats", round_to=4))

picture = laplode.plot_trajectories(tree, labels={"time": "year", "y": "pelts (thousands)"})
for ax in picture.viz["plot"].values.flat:
    ax.set_xticks([1900, 1905, 1910, 1915, 1920])
picture.savefig(options.out / "rates.png", dpi=110)
