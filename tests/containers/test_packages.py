"""What is installed in the images: what requirements.lock names, in these versions, and no more."""

import json
import subprocess
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from tests.containers.conftest import CPU, compose
from tests.lock import locked_here

IMAGES = ("superlink", "supernode", "eval")
# pip is the base image's: it installs all others, and nothing of ours calls it later.
NOT_LOCKED = {"pip"}
# Only `prepare`, or only who develops, has a use for these.
OF_PREPARE = {"datasets", "flwr-datasets", "gguf", "matplotlib", "pillow"}
OF_TORCH = {"torch", "transformers", "peft", "bitsandbytes", "setuptools"}
OF_DEVELOPERS = {"pytest", "pytest-xdist", "mypy", "ruff", "pip-audit", "ray"}
LIST = """
import json
from importlib.metadata import distributions
print(json.dumps([(d.metadata["Name"], d.version) for d in distributions()]))
"""


def python(image: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python of this image, in a container without a network."""
    configured = compose("--profile", "eval", "config", "--format", "json", files=CPU)
    services: dict[str, Any] = json.loads(configured.stdout)["services"]
    name = services["supernode-00" if image == "supernode" else image]["image"]
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python3", name]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def packages(images: None) -> dict[str, dict[str, str]]:
    """Image -> package -> version without its build (torch's +cpu)."""
    found = {}
    for image in IMAGES:
        done = python(image, "-c", LIST)
        assert done.returncode == 0, done.stderr
        listed: list[tuple[str, str]] = json.loads(done.stdout)
        found[image] = {str(canonicalize_name(n)): version.split("+")[0] for n, version in listed}
        assert len(found[image]) == len(listed), "a package is there twice"
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_every_package_is_locked_and_of_the_locked_version(
    packages: dict[str, dict[str, str]], image: str
) -> None:
    locked = locked_here()
    assert packages[image]["flwr"] == locked["flwr"]
    other = {
        name: f"{version}, locked {locked.get(name)}"
        for name, version in packages[image].items()
        if name not in NOT_LOCKED and locked.get(name) != version
    }
    assert other == {}


@pytest.mark.parametrize("image", IMAGES)
def test_the_packages_fit_each_other(images: None, image: str) -> None:
    done = python(image, "-m", "pip", "--disable-pip-version-check", "check")
    assert (done.stdout, done.returncode) == ("No broken requirements found.\n", 0), done.stderr


def test_no_image_holds_what_only_another_needs(packages: dict[str, dict[str, str]]) -> None:
    assert packages["supernode"].keys() >= OF_PREPARE | OF_TORCH
    assert packages["eval"].keys() >= OF_TORCH
    assert not packages["eval"].keys() & OF_PREPARE
    assert not packages["superlink"].keys() & (OF_PREPARE | OF_TORCH)
    for image in IMAGES:
        assert not packages[image].keys() & OF_DEVELOPERS
