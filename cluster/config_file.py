"""The cluster's configuration from a YAML file and overrides: where text becomes the classes of `cluster.config`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .config import ClusterConfig, EngineConfig, PlanConfig, RouterConfig, WorkerConfig
from .config_schema import HIDDEN, ConfigError, assign, hints, parse, unknown_key
from .types import Role

MAX_FILE_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 10_000
_ASKED = frozenset({"workload", "hardware", "profile", "gpus_per_node"})
"""What a question for `tandem plan` has and a cluster's file has not."""


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Reads cluster.yaml. `overrides` maps dotted paths to values that win over the file's.

    The file's keys are ClusterConfig's, with these conveniences: `model` at the top sets the engine's and the router's;
    `plan` is the router's `PlanConfig`, what a plan predicted of this cluster;
    `prefill`, `decode` and `mixed` are counts or sections `{workers: N, engine: {…}}` whose engine keys win over
    `engine`; sizes may carry units (`kv_cache_bytes: 512MiB`); `paced_profile` and `kv_scales` are looked for beside
    the file first.
    Raises ConfigError, also for a file that cannot be read.
    """
    data = read_yaml(path)
    if isinstance(data, Mapping):
        if not {"router", "engine"} & data.keys() and _ASKED & data.keys():
            allowed = "a cluster's; tandem plan --config FILE --output plan.yaml makes one of a question such as this"
            raise ConfigError("config", str(path), allowed)
        data = _with_files_beside(data, Path(path).parent)
    return _cluster_config({} if data is None else data, overrides or {})


def read_yaml(path: str | Path, what: str = "config") -> Any:
    """The value in a YAML file, None if it is empty. Raises ConfigError, under the name `what`, for a file that cannot
    be read, is larger than MAX_FILE_BYTES, nested too deeply, or gives a key twice in one section.
    """
    try:
        if Path(path).is_file() and Path(path).stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(what, str(path), f"a file of at most {MAX_FILE_BYTES} bytes")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(what, str(path), f"a readable YAML file ({why})") from None
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(what, str(path), " ".join(f"valid YAML ({error})".split())) from None


def build_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """The cluster's config from an optional file and overrides by dotted path, e.g. `{"engine.device": "paced"}`."""
    return _cluster_config({}, overrides or {}) if path is None else load_config(path, overrides)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one section, which YAML forbids and PyYAML lets pass, and a file
    that aliases would unfold to more than MAX_VALUES values or that is nested deeper than MAX_DEPTH.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._unfolded: dict[int, int] = {}
        """By node: how many values it stands for; a node that is missing is being read."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth >= MAX_DEPTH:
            raise ConfigError("config", "nested too deeply", f"at most {MAX_DEPTH} levels")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or id(node) in self._unfolded:
            return node
        if node.end_mark is None:
            raise ConfigError("config", "an alias inside its own value", "aliases of what stands before them")
        inside = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        count = 1 + sum(self._unfolded.get(id(child), 0) for child in inside if isinstance(child, yaml.Node))
        if count > MAX_VALUES:
            raise ConfigError("config", "aliases that unfold to too much", f"at most {MAX_VALUES} values")
        self._unfolded[id(node)] = count
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen:
                where = f"line {key_node.start_mark.line + 1}"
                raise ConfigError(key, None, "each key once in a section", problem=f"is given twice ({where})")
            seen.add(str(key))
        return super().construct_mapping(node, deep)


_OF_ALL = ("security", "insecure")
_AT_THE_TOP = (*_OF_ALL, "plan")
_FILES = ("paced_profile", "kv_scales")
_FILLED_IN = ("worker_id", "role", "engine", "port", "kv_port", "routers", *_OF_ALL)


def _cluster_config(data: Any, overrides: Mapping[str, Any]) -> ClusterConfig:
    if not isinstance(data, Mapping):
        raise ConfigError("configuration", data, "a section of keys and values")
    tree: dict[str, Any] = copy.deepcopy(dict(data))
    _check_keys(tree)
    for dotted, value in overrides.items():
        _assign(tree, dotted, value)
    engine = dict(_section(tree, "engine"))
    router = dict(_section(tree, "router"))
    model = tree.pop("model", None)
    if model is not None:
        engine["model"] = router["model"] = model
    elif "model" in engine:
        router.setdefault("model", engine["model"])
    elif "model" in router:
        engine["model"] = router["model"]
    plan = tree.pop("plan", None)
    if plan is not None:
        router["plan"] = parse(PlanConfig, plan, "plan")
    tree["engine"], tree["router"] = engine, router
    for role in Role:
        _expand_pool(tree, role.value, engine)
    tree["worker"] = {**_section(tree, "worker"), "worker_id": "worker", "role": Role.MIXED}
    return parse(ClusterConfig, tree)


def _with_files_beside(section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same with the path of every one of `_FILES` that lies in `folder`, in the sections below too."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            found[key] = _with_files_beside(value, folder)
        elif key in _FILES and isinstance(value, str) and (folder / value).is_file():
            found[key] = str(folder / value)
        else:
            found[key] = value
    return found


def _check_keys(tree: Mapping[str, Any]) -> None:
    """Refuses keys that a file may not hold: unknown ones at the top, and what the cluster fills in by itself."""
    known = [name for name in hints(ClusterConfig) if not name.endswith("_engine")] + ["model", "plan"]
    for key in tree:
        if key not in known:
            raise unknown_key(str(key), str(key), known)
    for section, cls, filled_in in (("worker", WorkerConfig, _FILLED_IN), ("router", RouterConfig, _AT_THE_TOP)):
        allowed = [name for name in hints(cls) if name not in filled_in]
        for key in _section(tree, section):
            if section == "router" and key == "plan":
                raise ConfigError("router.plan", HIDDEN, "plan at the top")
            if key in _OF_ALL:
                raise ConfigError(f"{section}.{key}", HIDDEN, f"{key} at the top, where it holds for all members")
            if key not in allowed:
                raise unknown_key(f"{section}.{key}", str(key), allowed)


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(name, section, "a section of keys and values")
    return section


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """As `config_schema.assign`; a number for a pool that has a section is its `workers`."""
    is_pool = dotted in set(Role) and isinstance(tree.get(dotted), Mapping)
    assign(tree, f"{dotted}.workers" if is_pool else dotted, value)


def _expand_pool(tree: dict[str, Any], role: str, engine: Mapping[str, Any]) -> None:
    """`prefill: {workers: 2, engine: {…}}` to `prefill: 2` and `prefill_engine`, whose keys win over `engine`'s."""
    pool = tree.get(role)
    if not isinstance(pool, Mapping):
        return
    for key in pool:
        if key not in ("workers", "engine"):
            raise unknown_key(f"{role}.{key}", str(key), ["workers", "engine"])
    own = dict(_section(pool, "engine"))
    if own:
        try:
            tree[f"{role}_engine"] = parse(EngineConfig, {**engine, **own}, f"{role}.engine")
        except ConfigError as error:
            # A wrong key of the shared section is that section's fault, not this pool's.
            shared = error.field.removeprefix(f"{role}.")
            raise (
                error if shared.removeprefix("engine.") in own else ConfigError(shared, error.value, error.allowed)
            ) from None
    workers = pool.get("workers", 0 if role == Role.MIXED else 1)
    tree[role] = workers
