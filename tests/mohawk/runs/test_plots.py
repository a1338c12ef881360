import json

import numpy as np
import pytest

from mohawk.runs.plots import Heads, plot_evaluation, plot_losses, plot_mixing_matrices

pytestmark = pytest.mark.usefixtures("pictures_as_shipped")


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    image = imread(path)[..., :3]
    assert image.shape[0] > 200 and image.shape[1] > 300
    return image


def write_metrics(path, losses):
    with path.open("w") as file:
        for phase, values in losses.items():
            for i, loss in enumerate(values):
                file.write(json.dumps({"phase": phase, "step": i + 1, "tokens": 512 * (i + 1), "loss": loss}) + "\n")


def test_losses_of_every_phase_side_by_side(tmp_path, monkeypatch):
    titles = []
    from matplotlib.axes import Axes

    original = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **k: (titles.append(text), original(self, text, **k)))
    falling = [10 / (i + 1) for i in range(60)]
    losses = {"end_to_end": [2.0, None, 1.0], "mixing": falling, "hidden": [-1.0, 0.0, 1.0]}
    write_metrics(tmp_path / "metrics.jsonl", losses)
    target = plot_losses(tmp_path / "metrics.jsonl", tmp_path / "plots" / "losses.png", {"mixing": "a distance"})
    assert titles == ["phase 1: matrices", "phase 2: hidden states", "phase 3: end to end"]
    three = pixels(target)
    write_metrics(tmp_path / "metrics.jsonl", {"mixing": falling})
    one = pixels(plot_losses(tmp_path / "metrics.jsonl", tmp_path / "one.png"))
    assert abs(three.shape[1] - 3 * one.shape[1]) <= 3  # to the rounding of each to pixels
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"losses.png", ".losses.png.sha256"}


def test_labels_and_figures_of_losses_are_in_the_picture_and_not_on_the_curve(tmp_path, monkeypatch):
    import mohawk.runs.plots

    figures = []
    monkeypatch.setattr(mohawk.runs.plots, "save", lambda figure, target: figures.append(figure))
    write_metrics(tmp_path / "metrics.jsonl", {"a": [10 - i / 8 for i in range(60)], "b": [1.0, 2.0, 3.0]})
    means = ("9.688 → 2.938, means of a tenth", "1 → 3")
    label = "forward KL + cross entropy + hidden + attention per token"
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "a.png", {"a": label, "b": "KL"})
    (figure,) = figures
    figure.canvas.draw()
    page = figure.bbox
    for axis, text, ends in zip(figure.axes, (label, "KL"), means, strict=True):
        assert axis.yaxis.label.get_text().replace("\n", " ") == text
        (said,) = [t for t in axis.texts if "→" in t.get_text()]
        assert said.get_text() == ends
        box, panel = said.get_window_extent(), axis.get_window_extent()
        assert box.y0 >= panel.y1 and box.y1 <= axis.title.get_window_extent().y0
        for inside in (box, axis.yaxis.label.get_window_extent(), axis.title.get_window_extent()):
            assert page.x0 <= inside.x0 and inside.x1 <= page.x1 and page.y0 <= inside.y0 and inside.y1 <= page.y1


@pytest.mark.parametrize("losses", [{"mixing": [1.0]}, {"mixing": [None, None]}, {"mixing": [None] * 40}])
def test_losses_that_say_little_still_draw(tmp_path, losses):
    write_metrics(tmp_path / "metrics.jsonl", losses)
    pixels(plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png"))


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert plot_losses(tmp_path / "metrics.jsonl", tmp_path / "a.png") is None
    assert plot_evaluation({}, tmp_path / "b.png") is None
    assert plot_evaluation({"before": {}}, tmp_path / "b.png") is None
    assert plot_mixing_matrices([], tmp_path / "c.png") is None
    assert list(tmp_path.iterdir()) == []


def found(perplexity, kl=0.1):
    return {"teacher_perplexity": 20.0, "student_perplexity": perplexity, "kl": kl, "top1_agreement": 0.5}


def test_evaluation_draws_what_there_is(tmp_path):
    both = {"held_out": found(3e4), "evaluation": found("inf", "nan")}
    stages = {"before": both, "end_to_end": {"held_out": found(25.0), "evaluation": found(30.0)}}
    full = pixels(plot_evaluation(stages, tmp_path / "full.png"))
    held_out = {stage: {"held_out": texts["held_out"]} for stage, texts in stages.items()}
    part = pixels(plot_evaluation(held_out, tmp_path / "part.png"))
    assert full.shape != part.shape or not np.array_equal(full, part)
    pixels(plot_evaluation({"before": {"evaluation": found(3.0, kl=0.0)}}, tmp_path / "one.png"))


def test_heat_maps_show_faint_structure_and_both_signs(tmp_path):
    n = 40
    teacher = np.tril(np.full((n, n), 1e-3))
    teacher[:, 0] = 0.9
    wild = np.tril(np.full((n, n), -1e4))
    image = pixels(plot_mixing_matrices([Heads("layer 1, head 0", teacher, wild, teacher)], tmp_path / "a.png"))
    colours = {tuple(np.round(c, 2)) for c in image.reshape(-1, 3)}
    assert any(r > 0.3 and g < 0.1 and b < 0.2 for r, g, b in colours)  # the peak, dark red
    assert any(b > 0.3 and r < 0.1 for r, g, b in colours)  # negative, dark blue
    faint = [c for c in colours if c[0] > 0.9 and 0.7 < c[2] < 0.93 and c[0] - c[2] > 0.05]
    assert faint  # a thousandth is neither white nor red
    without = pixels(plot_mixing_matrices([Heads("x", teacher, wild)] * 2, tmp_path / "b.png"))
    assert without.shape[0] > 1.5 * image.shape[0] and without.shape[1] < image.shape[1]


def test_a_logarithmic_axis_has_plain_numbers_and_enough_of_them():
    from matplotlib.figure import Figure

    from mohawk.runs.figures import log_axis

    def labels(values):
        axis = Figure(dpi=100).subplots()
        axis.plot(values)
        log_axis(axis)
        axis.figure.canvas.draw()
        low, high = axis.get_ylim()
        shown = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        return axis.get_yscale(), [label.get_text() for place, label in shown if low <= place <= high]

    assert labels([42.0, 180.0]) == ("log", ["50", "70", "100", "150"])
    assert labels([0.0, 0.45, 8.0]) == ("log", ["0.5", "1", "2", "5"])
    scale, few = labels([2.1, 2.3])  # no tick of a logarithmic axis lies between
    assert scale == "linear" and len(few) > 3
