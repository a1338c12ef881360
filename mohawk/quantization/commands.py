"""The command of quantization."""

from __future__ import annotations

import argparse

from mohawk.core.command import Command, path
from mohawk.core.extras import need


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, metavar="RUN", help="a finished run's folder")
    parser.add_argument(
        "--to", required=True, nargs="+", metavar="FORMAT",
        help="int8, int4, fp8 (torchao), gguf-bf16, gguf-q8_0, gguf-q4_0; several are measured beside each other",
    )  # fmt: skip


def _quantize(options: argparse.Namespace) -> None:
    files = all(name.startswith("gguf-") for name in options.to)
    need("convert" if files else "quantize", "`mohawk quantize`")
    from mohawk.quantization.run import quantize_run

    quantize_run(options.run, options.to)


COMMANDS = [
    Command("quantize", "write a run's student with weights in fewer bits, and measure it", _add_quantize, _quantize),
]
