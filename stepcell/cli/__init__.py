"""Command line: one module per command, imported when the command is called."""

from __future__ import annotations

import importlib
from typing import Any

import click

from stepcell import __version__
from stepcell.cli.common import command_error
from stepcell.cli.console import accept_every_name, logs_printed, print_error
from stepcell.display import displayed

__all__ = ["main"]

COMMANDS = {
    "export": "Export a trained checkpoint as a single-step ONNX model.",
    "fuse": "Convert an ONNX file that another program exported.",
    "build": "Build a float16 TensorRT engine from an exported model.",
    "run": "Run the step loop over a clip, a folder of frames, an array or a camera.",
    "map": "Run the step loop over a corpus of clips in several processes, and resume it.",
    "verify": "Prove a model over many steps, states fed back, against its reference.",
    "bench": "Time models side by side, for several numbers of streams.",
    "quantize": "Convert the convolutions of an exported model to int8.",
    "compare": "Compare two outputs frame by frame: arrays, clips or folders.",
    "triton-repo": "Write a repository for Triton Inference Server: streams of many clients.",
    "inspect": "Print the inputs, outputs and states of a model or engine.",
    "events": "Print what an event file holds, and draw it.",
    "kernels": "Compile the fused gate kernels for any GPU, without one.",
    "doctor": "List what works on this machine, and how to add what is missing.",
}


class _LazyGroup(click.Group):
    """A group that imports the module of a command when it is called, so that `run` does not import torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"stepcell.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        accept_every_name()
        try:
            with logs_printed():
                return super().invoke(ctx)
        except click.ClickException as error:  # quotes arguments, which may be URLs
            vars(error)["message"] = displayed(error.message)
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(130)  # the exit code of shells; click would use 1
        except Exception as error:
            failure = command_error(error)
            print_error(failure)
            ctx.exit(failure.exit_code)


_HELP = """Take a trained recurrent vision model to an edge GPU, one step at a time.

\b
stepcell export checkpoint.safetensors -o model.onnx
stepcell build  model.onnx -o model.engine
stepcell run    model.onnx --input clip.mp4 --output out.mp4

Exit codes: 0 ok, 1 failure, 2 usage, 3 verification mismatch, 4 incompatible engine,
5 missing dependency or plugin, 6 device or memory.
"""


@click.group(
    cls=_LazyGroup, help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="stepcell")
def main() -> None:
    """The command `stepcell`."""
