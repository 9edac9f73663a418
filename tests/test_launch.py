"""What a run of the suite settles before its backends are imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lyra.conformance.launch import THREADS

ASK = """
from threadpoolctl import threadpool_info
from lyra.conformance.launch import make_session
make_session(["torch"], profile="smoke", seed=0, spec=None)
print(*{pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
@pytest.mark.parametrize(
    ("given", "used"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "2"}, "2"), ({"OMP_NUM_THREADS": "2"}, "2")]
)
def test_the_oracle_has_one_thread_unless_the_user_gives_it_more(given: dict[str, str], used: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in THREADS} | given
    asked = subprocess.run([sys.executable, "-P", "-c", ASK], env=environment, capture_output=True, text=True)
    assert asked.stdout.strip() == used, asked.stderr


LIST = """
import sys
from lyra.conformance.property_index import all_properties
assert len(all_properties()) > 100
print(*sorted({"torch", "transformers", "jax"} & sys.modules.keys()))
"""


def test_the_properties_are_found_without_a_framework() -> None:
    """A run that asks Hugging Face nothing, of a backend without PyTorch, does not wait for either."""
    found = subprocess.run([sys.executable, "-P", "-c", LIST], capture_output=True, text=True)
    assert found.stdout == "\n", found.stdout + found.stderr
