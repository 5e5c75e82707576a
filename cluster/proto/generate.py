"""Makes the committed protobuf code: `python -m tandem.cluster.proto.generate [folder]` (grpcio-tools needed).

protoc writes absolute imports; inside a package they must be relative, so that nothing called `tandem_v1_pb2` has to
lie on anyone's `sys.path`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROTOS = ("tandem_v1.proto", "tandem_internal_v1.proto")


def generate(target: Path) -> None:
    """Writes `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` for every proto file into `target`."""
    from grpc_tools import protoc

    for proto in PROTOS:
        arguments = [f"-I{HERE}", f"--python_out={target}", f"--pyi_out={target}", f"--grpc_python_out={target}", proto]
        if protoc.main(["protoc", *arguments]) != 0:
            raise RuntimeError(f"protoc failed on {proto}")
    for path in target.glob("*_pb2_grpc.py"):
        text = re.sub(r"^import (\w+_pb2) as", r"from . import \1 as", path.read_text(), flags=re.MULTILINE)
        path.write_text(text)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
