"""The real training worker that kills itself at commit points.

python -m tests.matrix.worker FAULTS_FOLDER WORKER_ARGUMENTS...
"""

from __future__ import annotations

import sys
from pathlib import Path

from node_agent.worker.__main__ import main
from tests.matrix.arming import arm

if __name__ == "__main__":
    faults = Path(sys.argv[1])
    arm(faults / "points.json", faults / "marks")
    sys.exit(main(sys.argv[2:]))
