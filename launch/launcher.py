"""`accelerate launch` with defaults for all options, which exits with its workers' exit code instead of a traceback.

    ddpm-launch --num_processes 8 train --config configs/lsun256.toml
    ddpm-launch sample --run runs/lsun256 --n 50000

Takes the options of `accelerate launch`, and as the script a path, -m MODULE, or one of train, sample, evaluate and
convert. Options set neither on the command line nor in a file of `accelerate config` have Accelerate's defaults,
without its warning: one process per GPU, or one. On a single machine the port is any free one, and no folder is made in
/tmp.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_SCRIPTS = ("train", "sample", "evaluate", "convert")
_OTHER_LAUNCHES = ("cpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")


def main(argv: Sequence[str] | None = None) -> int:
    """Launch and wait; returns the exit code of the worker that failed first, 128 + N after a signal N, else 0."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    # Ctrl-C reaches the workers too, which save and exit; the launcher waits for them.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    _shut_down_at_one_signal()
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as failure:  # of a single process
        return _shell_code(failure.returncode)
    except ChildFailedError as failure:  # of several processes
        _, first = failure.get_first_failure()
        return _shell_code(first.exitcode)
    except SignalException as stopped:
        return _shell_code(-stopped.sigval)
    except (ValueError, ImportError, OSError) as error:  # incompatible options, a missing library, a port in use
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Accelerate's own arguments, with defaults filled in; argparse exits the program where they are invalid."""
    parser = launch_command_parser()
    parser.prog = "ddpm-launch"
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments: argparse.Namespace = parser.parse_args(argv)
    if arguments.training_script in _SCRIPTS and not (arguments.module or arguments.no_python):
        arguments.module = True
        arguments.training_script = f"trainer.{arguments.training_script}"
    if arguments.log_dir is None:
        arguments.log_dir = os.devnull
    if arguments.config_file is None and not os.path.isfile(default_config_file):  # noqa: PTH113  # it is a str
        _fill_in(arguments)
    return arguments


def _shut_down_at_one_signal() -> None:
    """Make torch's launcher ignore signals that follow the one at which it shuts its workers down.

    Its handler raises an exception wherever the program is: a second signal (a scheduler sends one to every process, a
    script hands one on) breaks the shutdown off, and its threads, which were not ended, then keep the launcher alive.
    """
    shut_down = api._terminate_process_handler

    def shut_down_once(signum: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(each, signal.SIG_IGN)
        shut_down(signum, frame)

    api._terminate_process_handler = shut_down_once


def _fill_in(arguments: argparse.Namespace) -> None:
    if arguments.num_processes is None:
        arguments.num_processes = max(1, torch.cuda.device_count())
    for name, value in {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.num_processes > 1 and not any(getattr(arguments, name) for name in _OTHER_LAUNCHES):
        arguments.multi_gpu = True  # in Accelerate several processes, also on CPUs
    if arguments.main_process_port is None and arguments.num_machines == 1:
        arguments.main_process_port = 0


def _shell_code(code: int) -> int:
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
