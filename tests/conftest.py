"""What all tests share: few compute threads, the demo model fetched once, the data that lies beside the repository; and
which of them go to one process where several run them side by side (pytest-xdist, `--dist loadgroup`).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# Before torch, numpy's BLAS or tokenizers are imported, here and in every process that a test starts.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# What a shell starts in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tandem.cluster.models.fetch import default_cache_dir  # noqa: E402
from tandem.cluster.models.reference import ModelError, ModelFiles, resolve_model  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "common"))  # modules that tests of several folders share

ON_RAY = (
    "test_broken_model.py",
    "test_command.py",
    "test_endings.py",
    "test_ranks_on_two_nodes.py",
    "test_ray_cluster.py",
    "test_ray_ranks.py",
)
"""They start a Ray, which gives up after 30 s: not several at a time on a few cores."""
LONG_FIRST = ("soak", "integration", "faults", "property")
"""Folders whose tests wait for timers: begun first, so that no process is left with one of them in the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests: the tests of a file go to one, with its module's fixtures; so do those
    on Ray, and those that want the same large model in memory.
    """
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_turn)


def _group(item: pytest.Item) -> str:
    if item.path.name in ON_RAY:
        return "ray"
    if "oracle" in getattr(item, "fixturenames", ()):
        return "oracle"
    return str(item.path.relative_to(REPOSITORY / "tests"))


def _turn(item: pytest.Item) -> tuple[bool, int]:
    folder = item.path.relative_to(REPOSITORY / "tests").parts[0]
    turn = LONG_FIRST.index(folder) if folder in LONG_FIRST else len(LONG_FIRST)
    return item.path.name not in ON_RAY, turn


@pytest.fixture(scope="session", autouse=True)
def _own_clusters(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Clusters of these tests are found by these tests only, and those of whoever runs them are not."""
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("run"))


class Authority:
    """Signs certificates that are good for a day, for tests of TLS; files in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])
        self.ca = str(folder / "ca.pem")
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self._write(self.ca, self._sign(self._name, self._key.public_key(), constraints, ()))

    def issue(self, name: str, *hosts: str) -> tuple[str, str]:
        """Paths of a certificate for those hosts (this machine's loopback if none is named) and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=False, path_length=None)
        cert = self._sign(subject, key.public_key(), constraints, hosts or ("127.0.0.1", "localhost"))
        paths = str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key")
        self._write(paths[0], cert)
        plain = serialization.NoEncryption()
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        Path(paths[1]).write_bytes(key.private_bytes(encoding, form, plain))
        return paths

    def _sign(self, subject: x509.Name, key: Any, constraints: x509.BasicConstraints, hosts: Sequence[str]) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number(), now - day, now + day)
        builder = builder.add_extension(constraints, critical=True)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
        return builder.sign(self._key, hashes.SHA256())

    @staticmethod
    def _write(path: str, cert: Any) -> None:
        Path(path).write_bytes(cert.public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs the certificates of the tests' members."""
    return Authority(tmp_path_factory.mktemp("authority") / "ours")


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Somebody else's."""
    return Authority(tmp_path_factory.mktemp("authority") / "theirs")


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
