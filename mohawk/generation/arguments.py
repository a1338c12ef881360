"""Arguments of commands that ask models: which prompts, how many at once."""

from __future__ import annotations

import argparse

from mohawk.core.command import number


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How prompts are read."""
    reading = parser.add_argument_group("prompts")
    reading.add_argument(
        "--field", default="prompt", metavar="NAME", help="field of each row that holds the prompt; default: prompt"
    )
    reading.add_argument(
        "--format", metavar="FORMAT", help="text (lines), paragraphs, jsonl or parquet; default: by suffix"
    )
    reading.add_argument("--split", default="train", metavar="NAME", help="split of a hub dataset; default: train")
    reading.add_argument("--subset", metavar="NAME", help="configuration name of a hub dataset")
    reading.add_argument("--limit", type=number(int, 1), metavar="N", help="only the first N; without it, all the rest")


def add_batches(local: argparse._ArgumentGroup) -> None:
    """Where and how a local model runs."""
    local.add_argument("--batch-size", type=number(int, 1), metavar="N", help="sequences at once; default: 8")
    local.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "auto"), help="default: auto; cpu: float32"
    )
    local.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto")


def add_requests(remote: argparse._ArgumentGroup) -> None:
    """How an endpoint is asked."""
    remote.add_argument("--concurrency", type=number(int, 1), metavar="N", help="requests at once; default: 8")
    remote.add_argument(
        "--timeout",
        type=number(float, 0.1),
        metavar="S",
        help="seconds of silence before a request is given up (5 times that in all); default: 120",
    )
    remote.add_argument(
        "--retries", type=number(int, 0), metavar="N", help="how often one request is tried again; default: 6"
    )
    remote.add_argument(
        "--request", metavar="JSON", help='more fields of each request, null drops one: {"top_k": 20, "logprobs": null}'
    )
