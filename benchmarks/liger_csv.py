"""Results in the columns that the plotting script of Liger Kernel reads (benchmark/benchmarks_visualizer.py there)."""

from __future__ import annotations

import csv
import json
import pathlib

COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "liger_version",
)  # fmt: skip
MODES = {"both": "full", "forward": "forward", "backward": "backward"}


def write(path: pathlib.Path, benchmark: str, rows: list[dict], about: dict) -> None:
    """Times in ms, of the whole and its parts, and peak memory in MB, of each row that was measured. What a row is of
    beside its place on the axis is in `extra_benchmark_config_str`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in (row for row in rows if "seconds" in row):
            same = {
                "kernel_name": benchmark,
                "kernel_provider": row["name"].split(", n ")[0] if "at" in row else row["name"],
                "x_name": row.get("axis", "shape"),
                "x_label": row.get("axis", "shape"),
                "x_value": row.get("at", row["table"]),
                "extra_benchmark_config_str": json.dumps({"table": row["table"]}),
                "gpu_name": about["device"],
                "timestamp": row["date"],
                "liger_version": about.get("liger_kernel") or "",
            }
            for part, mode in MODES.items():
                if part in row["quantiles"]:
                    low, middle, high = (1000 * x for x in row["quantiles"][part])
                    writer.writerow(
                        same
                        | {"kernel_operation_mode": mode, "metric_name": "speed", "metric_unit": "ms"}
                        | {"y_value_20": low, "y_value_50": middle, "y_value_80": high}
                    )
            memory = dict.fromkeys(("y_value_20", "y_value_50", "y_value_80"), row["mib"])
            writer.writerow(
                same | {"kernel_operation_mode": "full", "metric_name": "memory", "metric_unit": "MB"} | memory
            )
