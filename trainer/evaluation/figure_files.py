"""The files of a figure: a PNG, and a JSON with its settings; names are unique to the settings."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.images import Pixels
from trainer.drawing.trained import Trained
from trainer.errors import ConfigError
from trainer.sampling.request import ReverseRequest
from trainer.telemetry.pictures import save_png

_LONGEST_PART = 48  # of a name's part; file systems allow 255 bytes for a name


class FigureFile:
    """NAME-step-...-WEIGHTS[-RESPACING][-VARIANCE][-FILES]-seed-N-DIGEST.png, by default in RUN/evaluation.

    made_by: further settings that determine the figure. The digest covers all settings, so figures of equal names are
    equal. Raises ConfigError where `out` does not end in .png.
    """

    def __init__(
        self,
        trained: Trained,
        reverse: ReverseRequest,
        *,
        name: str,
        made_by: Mapping[str, Any],
        out: Path | None,
    ) -> None:
        self.about: dict[str, Any] = {
            "figure": name,
            "checkpoint": str(trained.checkpoint),
            "step": trained.step,
            "weights": trained.weights,
            "respacing": reverse.respacing,
            "steps": trained.denoiser.diffusion.timesteps,
            "variance": trained.variance,
            **trained.conditioned.identity,
            **made_by,
        }
        content = {**self.about, "checkpoint": trained.fingerprint}  # independent of its location
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        parts = [name, *trained.name_parts, *reverse.name_parts]
        if "files" in made_by:
            parts.append("-".join(Path(file).stem for file in made_by["files"]))
        parts += [f"seed-{made_by['seed']}", self.digest]
        self.path = out or trained.folder.path / "evaluation" / f"{'-'.join(map(_slug, parts))}.png"
        self.numbers = self.path.with_suffix(".json")
        if self.path.suffix != ".png":
            raise ConfigError(f"--out {out}: should end in .png; the numbers go into a .json beside it")

    def check(self) -> None:
        """Raise ConfigError where a different figure, or another kind of file, would be overwritten."""
        if not self.path.exists() and not self.numbers.exists():
            return
        try:
            made = json.loads(self.numbers.read_bytes())
        except (OSError, ValueError, RecursionError):
            made = None
        if not isinstance(made, dict) or made.get("digest") != self.digest:
            raise ConfigError(
                f"--out {self.path}: is there already, and another request made it (see {self.numbers}); "
                "choose another name",
                agreed=True,
            )

    def write(self, picture: Pixels, *, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write both files. picture: as for `save_png`; rows: an entry of the JSON for each row."""
        save_png(self.path, picture)
        content = {**self.about, "digest": self.digest, "rows": list(rows)}
        self.numbers.write_text(json.dumps(content, indent=1) + "\n")


def _slug(part: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+]+", "-", part)[:_LONGEST_PART].strip("-.")
