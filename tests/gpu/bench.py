"""`make bench-gpu`: the GPU kernels against the libraries people use, on the GPU at hand.

Each `bench_*.py` beside this file has `cases(device) -> Iterator[list[Case]]`: lists of implementations of the same
thing, ours first, built only when their turn comes, so that one shape's memory is free before the next one's.
Libraries that are not installed are left out. Random inputs; every case is first held against torch.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """The command. Returns its exit status: 0 also where there is no GPU, and nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "only", nargs="*", help="files to run: attention for bench_attention.py; all of them by default"
    )
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing new after this long")
    parser.add_argument("--tune", action="store_true", help="time other tilings instead, where a file has them")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 0
    sys.path.insert(0, str(HERE))
    import measure

    until = time.monotonic() + 60 * options.minutes
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {measure.machine()}")
    bounds = measure.measure_bounds()
    print(
        f"copy {bounds.copy_bytes_per_s / 1e9:.0f} GB/s (read + written), "
        f"bf16 product {bounds.products_per_s / 1e12:.0f} TFLOP/s"
    )
    names = options.only or sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    for name in names:
        module = importlib.import_module(f"bench_{name}")
        if options.tune:
            for line in getattr(module, "tune", lambda device: iter(()))(torch.device("cuda")):
                print(line, flush=True)
                if time.monotonic() > until:
                    break
            continue
        lines: list[tuple[str, ...]] = []
        for cases in module.cases(torch.device("cuda")):
            if time.monotonic() > until:
                print(f"{name}: out of time, the rest is left out (--minutes {options.minutes:g})")
                break
            lines += measure.rows(cases, bounds)
            torch.cuda.empty_cache()
        print(f"\n{name}\n{measure.table(lines)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
