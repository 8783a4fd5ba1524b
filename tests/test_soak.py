"""The soak (tests/soak.py) sees what it is to see: a wrong bit, a wrong image, a claim without a checkpoint."""

import dataclasses
import random
import shutil
from pathlib import Path

import pytest

from tests.soak_compare import Trained, differences, false_claims, same_draws, whole_steps
from tests.soak_faults import draw_blow, draw_fault
from tests.soak_job import Drawn
from tests.yesterday import FOLDER

STEP, EPOCH = 10, 4
DRAWS = {position: Drawn(sample=position % EPOCH, pixels=1, t=2, noise=3) for position in range(2 * EPOCH)}
LOSSES = {step: 1 / step for step in range(1, STEP + 1)}


@pytest.fixture
def whole() -> Trained:
    return Trained(FOLDER / "plain", DRAWS, LOSSES)


@pytest.fixture
def interrupted(tmp_path: Path) -> Trained:
    return Trained(Path(shutil.copytree(FOLDER / "plain", tmp_path / "run")), dict(DRAWS), dict(LOSSES))


def compared(run: Trained, whole: Trained, *, exact: bool = True, forgotten: frozenset[int] = frozenset()) -> list[str]:
    return differences(run, whole, last_step=STEP, epoch=EPOCH, forgotten=set(forgotten), exact=exact)


def flip_last_bit(run: Path) -> None:
    (part,) = (run / "checkpoints").glob(f"step-*{STEP}/part-*")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_the_same_run_has_no_differences(interrupted: Trained, whole: Trained) -> None:
    assert compared(interrupted, whole) == []


def test_one_bit_of_the_state_is_a_difference(interrupted: Trained, whole: Trained) -> None:
    flip_last_bit(interrupted.run)
    (found,) = compared(interrupted, whole)
    assert "state of step 10" in found
    assert compared(interrupted, whole, exact=False) == []  # where sums were taken in another order


def test_a_loss_is_compared_to_the_bit_or_closely(interrupted: Trained, whole: Trained) -> None:
    near = dataclasses.replace(interrupted, losses={**LOSSES, 3: LOSSES[3] + 1e-6})
    far = dataclasses.replace(interrupted, losses={**LOSSES, 3: float("nan")})
    assert len(compared(near, whole)) == 1
    assert compared(near, whole, exact=False) == []
    assert len(compared(far, whole, exact=False)) == 1


def test_a_missing_loss_is_a_difference_unless_the_soak_took_it(interrupted: Trained, whole: Trained) -> None:
    del interrupted.losses[4]  # type: ignore[attr-defined]
    assert compared(interrupted, whole) == ["step 4: no loss is logged"]
    assert compared(interrupted, whole, forgotten=frozenset({4})) == []


def test_an_image_twice_in_an_epoch_is_a_difference(interrupted: Trained, whole: Trained) -> None:
    twice = {**DRAWS, 1: dataclasses.replace(DRAWS[1], sample=0)}
    found = compared(dataclasses.replace(interrupted, draws=twice), dataclasses.replace(whole, draws=twice))
    assert found == ["epoch 0: 3 images, should be 4, each once"]


def test_other_noise_and_a_missing_position_are_differences(interrupted: Trained, whole: Trained) -> None:
    other = {**DRAWS, 1: dataclasses.replace(DRAWS[1], noise=4)}
    assert len(compared(dataclasses.replace(interrupted, draws=other), whole)) == 1
    assert same_draws([(1, DRAWS[1])], dict(other))
    missing = {position: drawn for position, drawn in DRAWS.items() if position != 7}
    assert compared(dataclasses.replace(interrupted, draws=missing), whole)[0].startswith("position 7: None")


def test_a_marker_without_a_whole_checkpoint_is_a_false_claim(interrupted: Trained) -> None:
    def claims(code: int) -> list[str]:
        return false_claims(interrupted.run, since=0, exit_code=code, last_step=STEP)

    run = interrupted.run
    (run / "DONE").unlink(missing_ok=True)
    assert claims(0) == ["exit code 0, but neither DONE nor STOPPED"]
    (run / "DONE").write_text(f"step {STEP}\n")
    assert claims(0) == []
    flip_last_bit(run)
    assert STEP not in whole_steps(run)
    assert len(claims(0)) == 1
    (run / "DONE").rename(run / "STOPPED")
    assert len(claims(1)) == 1


def test_the_seed_decides() -> None:
    def plans(seed: int) -> list[str]:
        pick = random.Random(seed)
        return [str(draw(pick, 4)) for draw in (draw_blow, draw_fault) for _ in range(20)]

    assert plans(1) == plans(1) != plans(2)
