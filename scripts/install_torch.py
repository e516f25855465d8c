"""Installs PyTorch for the tests that compare with `transformers`' models, unless it would bring CUDA libraries.

Those are gigabytes, and the tests run on the CPU. Where only such a build is offered, install PyTorch's CPU build by
hand as its site tells, or do without: the tests that need it are skipped.
"""

import importlib.util
import json
import subprocess
import sys

REQUIREMENT = "torch==2.13.0"
CUDA = ("nvidia-", "cuda-")


def main() -> None:
    """Installs it, or says why not; never fails."""
    if importlib.util.find_spec("torch") is not None:
        return
    try:
        packages = resolve(REQUIREMENT)
    except (subprocess.CalledProcessError, ValueError):
        print(f"{REQUIREMENT} is not to be had for this Python and platform: tests against it will be skipped")
        return
    cuda = sorted(name for name in packages if name.startswith(CUDA))
    if cuda:
        print(f"{REQUIREMENT} would bring {len(cuda)} CUDA packages here: tests against it will be skipped")
        return
    subprocess.run([*pip(), "install", "--quiet", REQUIREMENT], check=False)


def resolve(requirement: str) -> list[str]:
    """Names of the packages that installing `requirement` would install; nothing is installed."""
    command = [*pip(), "install", "--quiet", "--dry-run", "--report", "-", requirement]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [item["metadata"]["name"].lower() for item in json.loads(report)["install"]]


def pip() -> list[str]:
    """The command of this Python's pip."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check"]


if __name__ == "__main__":
    main()
