import sys
from pathlib import Path

PEERS = Path(__file__).parents[2] / "peers"
if str(PEERS) not in sys.path:
    sys.path.insert(0, str(PEERS))  # scripts, not a package
