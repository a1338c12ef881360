"""The examples of encoders, and of encoders with decoders: each loss falls."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["encoder_distillation", "t5_distillation", "whisper_distillation"])
def test_losses_fall(name, capsys):
    losses = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](steps=4)
    parts = [losses[:4], losses[4:]] if name == "encoder_distillation" else [losses]
    assert all(part[-1] < part[0] for part in parts)
    assert capsys.readouterr().out.startswith("loss of each step: ")
