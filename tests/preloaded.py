"""Imported by the server of `tests.harness.launch` after all else, so that each process that it forks begins sooner."""

import gc

from trainer.config import Config

Config.of_kinds(None, None)  # pydantic reads the source for the fields' descriptions
gc.collect()
gc.freeze()  # a rank collects garbage once before it trains; what has been imported is none
