"""How every program ends: one line, quiet in a pipe, printable on any terminal and in any locale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment
from trainer.errors import ConfigError, exit_clearly, printable

PROGRAM = """
import sys
from trainer.errors import ConfigError, exit_clearly

@exit_clearly
def main():
    {body}
    return 0

sys.exit(main())
"""


def run(body: str, *, reader: str = "cat", **variables: str) -> tuple[int, str, str]:
    """Exit code of the program, what the reader of its stdout passed on, and its stderr."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        env=environment(**variables),
    )
    passed = subprocess.run(["sh", "-c", reader], stdin=program.stdout, capture_output=True, check=False)
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()
    told = program.stderr.read().decode()
    program.stderr.close()
    return program.wait(timeout=30), passed.stdout.decode(), told


@pytest.mark.parametrize(
    "body",
    [
        "[print(number) for number in range(100_000)]",
        "print('a line'); import time; time.sleep(0.5)",  # written when it ends, into a pipe that is closed
        "print('x' * 200_000); raise SystemExit(0)",  # as --help does
    ],
)
def test_a_pipe_that_is_closed_is_no_failure_to_tell_of(body: str) -> None:
    _, _, told = run(body, reader="head -c 1 >/dev/null; exec <&-; sleep 0.2" if "sleep" not in body else "true")
    assert told == ""


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, ASCII, {}])
def test_a_name_that_a_locale_cannot_print_is_printed_otherwise(locale: dict[str, str]) -> None:
    code, passed, told = run(r"print('caf\udce9 \u2192'); raise ConfigError('run \udce9')", **locale)
    assert (code, told) == (2, "error: run \\udce9\n")
    assert passed.startswith("caf\\udce9 ")


def test_escape_sequences_of_others_are_not_printed_raw(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_clearly
    def main() -> int:
        raise ConfigError("tensor \x1b]0;owned\x07\x9b31m\nerror: another\r line \u202e café")

    assert main() == 2
    assert capsys.readouterr().err == (
        "error: tensor \\x1b]0;owned\\x07\\x9b31m\\nerror: another\\r line \\u202e café\n"
    )


def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @exit_clearly
    def main() -> int:
        (tmp_path / "nothing").read_bytes()
        return 0

    assert main() == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothing'}: No such file or directory\n"


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    @exit_clearly
    def main() -> int:
        return len(json.loads("1"))

    with pytest.raises(TypeError):
        main()


def test_text_of_several_lines_keeps_them() -> None:
    assert printable("a\tb\nc\x1b") == "a\tb\nc\\x1b"
