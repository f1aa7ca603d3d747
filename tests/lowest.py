"""Prints the lowest versions that pyproject.toml allows, as constraints for pip."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for line in project["dependencies"]:
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate():
        (lowest,) = (each.version for each in requirement.specifier if each.operator == ">=")
        print(f"{requirement.name}=={lowest}")
