"""Theophylline in twelve people after one oral dose: a mixed-effects model, from CSV to figure.

One compartment with first-order absorption. Each person has an absorption rate, an elimination rate and a volume,
scattered log-normally around typical ones. The spread of each is a prior precision, and the evidence finds it, with the
noise. Writes theophylline.png and theophylline.nc.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pandas as pd

import laplode

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", ".jax_cache")  # what is compiled is kept for the next run
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
matplotlib.use("Agg")

RATES = ("absorption", "elimination", "volume")
UNITS = ("1/h", "1/h", "l/kg")


class Absorption(eqx.Module):
    """Drug in the gut (mg/kg) and its concentration in the blood (mg/l).

    `typical` holds the logarithms of absorption (1/h), elimination (1/h) and volume (l/kg); the other three, how each
    person differs from them.
    """

    typical: jax.Array
    absorption: jax.Array
    elimination: jax.Array
    volume: jax.Array

    def __call__(self, t, y, args):
        person = args["person"]
        own = jnp.stack([self.absorption[person], self.elimination[person], self.volume[person]])
        absorption, elimination, volume = jnp.exp(self.typical + own)
        gut, concentration = y
        return jnp.stack([-absorption * gut, absorption * gut / volume - elimination * concentration])


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("."), help="folder for theophylline.png and theophylline.nc")
parser.add_argument("--quick", action="store_true", help="fewer rounds of the evidence, to see that everything runs")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

table = pd.read_csv(Path(__file__).with_suffix(".csv"), comment="#")
people = [rows for _, rows in table.groupby("subject")]
ts = np.stack([rows["time"] for rows in people])
seen = np.stack([rows["concentration"] for rows in people])
dose = np.array([rows["dose"].iloc[0] for rows in people])
number = np.arange(len(people))
data = laplode.Trajectories(
    ts, seen[..., None], y0=np.stack([dose, np.zeros_like(dose)], axis=1), args={"person": number}
)

field = Absorption(jnp.log(jnp.array([1.5, 0.1, 0.5])), *(jnp.zeros(len(people)) for _ in RATES))
model = laplode.NeuralODE(field, observe=lambda y, args: y[1:])
# Typical values are wide open; how people differ has a precision for each of the three, which starts at 1 / 0.3².
prior = laplode.NamedPriors({"vector_field.typical": dist.Normal(0.0, 3.0)}, rest=1 / 0.3**2)
problem = laplode.Problem(data, laplode.Gaussian(1.0), prior)

fit = laplode.refine(model, problem)
posterior = laplode.laplace(fit.model, problem, curvature="ggn")
# The precision of a leaf is the spread between people, the noise is that of the assay.
posterior = laplode.maximize_evidence(posterior, precision="leaf", online=True, rounds=3 if options.quick else 50)

spread = {name: 1 / np.sqrt(getattr(posterior.problem.prior.rest.precision.vector_field, name)) for name in RATES}
typical, std = np.asarray(posterior.mean[:3]), np.asarray(posterior.marginal_std()[:3])
for i, (name, unit) in enumerate(zip(RATES, UNITS, strict=True)):
    low, high = np.exp(typical[i] + 1.645 * std[i] * np.array([-1, 1]))
    print(f"{name:12} {np.exp(typical[i]):.3g} {unit} (90% {low:.3g} to {high:.3g}), between people {spread[name]:.0%}")
print(f"noise {posterior.problem.likelihood.scale[0]:.2f} mg/l, evidence {posterior.log_evidence:.1f} nats")

key_forecast, key_observed, key_tree = jax.random.split(jax.random.key(0), 3)
grid = np.linspace(0, 25, 101)
forecast = laplode.predict(posterior, grid, key=key_forecast)
observed = laplode.predict(posterior, ts, key=key_forecast)
tree = laplode.to_datatree(posterior, observed, forecast, key=key_tree, coords={"channel": ["theophylline"]})
tree.to_netcdf(options.out / "theophylline.nc")

low, high = np.quantile(forecast.y[..., 0], [0.05, 0.95], axis=0)
inner_low, inner_high = np.quantile(forecast.f[..., 0], [0.05, 0.95], axis=0)
figure, axes = plt.subplots(3, 4, figsize=(9.5, 6.2), sharex=True, sharey=True, layout="constrained")
for i, ax in enumerate(axes.flat):
    ax.fill_between(grid, low[i], high[i], color="#0072B2", alpha=0.18, lw=0, label="90% of new measurements")
    ax.fill_between(
        grid, inner_low[i], inner_high[i], color="#0072B2", alpha=0.45, lw=0, label="90% of the concentration"
    )
    ax.plot(ts[i], seen[i], "o", color="black", ms=3.5, label="measured")
    ax.set_title(f"person {i + 1}, {dose[i]:.2f} mg/kg", fontsize=9)
axes.flat[0].set_xlim(0, 25)
axes.flat[0].set_ylim(0, None)
figure.supxlabel("time after the dose (h)", fontsize=10)
figure.supylabel("theophylline (mg/l)", fontsize=10)
figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
figure.savefig(options.out / "theophylline.png", dpi=110)
