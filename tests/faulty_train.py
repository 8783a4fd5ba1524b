"""trainer/train.py for real launchers, with the fault that the environment describes in the first attempt."""

import json
import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests.faults import FAULT, Fault  # noqa: E402
from trainer.train import main  # noqa: E402

if __name__ == "__main__":
    fault = Fault(**json.loads(os.environ[FAULT]))
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0 and rank == fault.rank:
        fault.inject()
    if attempt > 0 and rank == 0:
        time.sleep(1)  # the last to come: whoever believes what the dead have left in the store has read it by now
    sys.exit(main())
