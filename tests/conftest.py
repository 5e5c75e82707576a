"""What all tests share: few compute threads, the demo model fetched once, the data that lies beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch, numpy's BLAS or tokenizers are imported, here and in every process that a test starts.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from tandem.cluster.models.fetch import default_cache_dir  # noqa: E402
from tandem.cluster.models.reference import ModelError, ModelFiles, resolve_model  # noqa: E402

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Where fetched models are kept: the user's cache, so that a run downloads at most once per machine."""
    return default_cache_dir()


@pytest.fixture(scope="session")
def smollm2(model_cache: Path) -> ModelFiles:
    """SmolLM2-135M-Instruct, fetched where it is not cached. Where that fails it skips, in CI it is an error."""
    try:
        return resolve_model("smollm2-135m", cache_dir=model_cache)
    except ModelError as error:
        if "could not download" in str(error) and "CI" not in os.environ:
            pytest.skip(f"SmolLM2 is neither cached nor can it be fetched: {error}")
        raise


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Workloads, prompts and published measurements beside the repository (../shared/data)."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: prompts, workloads and measurements come beside the repository, not in it")
    return path
