"""The configurations that are installed with the package: `--config cifar10` finds them outside a clone, too."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent / "configs"  # in a clone a link to the repository's


def shipped() -> dict[str, Path]:
    """By name, sorted."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.toml"))}


def located(path: Path) -> Path:
    """The file itself where there is one, else the shipped configuration of that name, else `path` as it is."""
    return path if path.is_file() else shipped().get(str(path), path)


def first_comment(path: Path) -> str:
    """What a configuration says of itself in its first line."""
    with path.open() as stream:
        return stream.readline().removeprefix("#").strip()
