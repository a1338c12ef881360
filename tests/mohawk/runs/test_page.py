"""The report as one page: what its verdict says, that it needs nothing beside it, and what a browser shows of it."""

import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mohawk.cli import main
from mohawk.core.json_files import write_json
from mohawk.measures.consistency import PATHS
from mohawk.runs.figures import BLUE, save, subplots
from mohawk.runs.page import Finished, to_html
from mohawk.runs.verdict import verdict
from tests.helpers.browser import BROWSER, browse

pytestmark = pytest.mark.usefixtures("pictures_as_shipped")

NASTY = "<script>document.title = 'ran'</script><img src=http://elsewhere.test/x.png> & \"so\" on"


def compared(ratio, kl=0.25):
    return dict(
        tokens=1234, teacher_perplexity=20.0, student_perplexity=20.0 * ratio, perplexity_ratio=ratio, kl=kl,
        top1_agreement=0.625,
    )  # fmt: skip


def made_results(name="one", ratio=1.25):
    """results.json of a run whose teacher keeps 1000 bytes a token, its student 500 and another 400,000."""

    def decoding(fixed, each, speeds):
        return [
            {"context": n, "tokens_per_s": speed, "state_bytes": fixed + each * n}
            for n, speed in zip((512, 4096), speeds, strict=True)
        ]

    return {
        "teacher": "models/tiny",
        "architecture": "LlamaForCausalLM with 2 attention layers -> HybridForCausalLM with 1 mamba2 and 1 attention",
        "parameters": {"teacher": 1000, "student": 1100},
        "dtypes": {"teacher": "float32", "student": "float32"},
        "evaluation": {
            "before": {"held_out": compared(9.0)},
            "end_to_end": {"held_out": compared(ratio, ratio / 5), "evaluation": compared(ratio + 0.25)},
        },
        "decoding": {
            "teacher": decoding(0, 1000, (20.0, 10.0)),
            "student": decoding(400_000, 500, (12.0, 15.0)),
        },
        "consistency": dict.fromkeys(PATHS, 1e-6),
        "phases": {
            "end_to_end": dict(
                steps=5, tokens=36000, seconds=7200.0, first_tenth=3.0, last_tenth=1.0, skipped_steps=2
            )
        },
        "continuations": {"prompt": "Say", "teacher": NASTY, "student": f"{name} {NASTY}"},
        "plots": ["plots/losses.png"],
        "machine": {"versions": {"torch": "2.0"}, "device": "cpu", "devices": ["cpu: one"], "system": "Linux"},
        "recipe": {},
    }  # fmt: skip


def make_run(folder, **about):
    """A folder as a finished run's, with a plot that is a blue square."""
    results = made_results(folder.name, **about)
    write_json(folder / "results.json", results)
    (folder / "recipe.yaml").write_text(f"# {NASTY}\nteacher: models/tiny\n")
    figure, axes = subplots(1, 1, width=4, height=3)
    axes[0][0].set_facecolor(BLUE)
    save(figure, folder / "plots" / "losses.png")
    return folder


def said(results):
    return {line.asks: line for line in verdict(results)}


def test_a_verdict_says_in_five_lines_what_was_measured():
    lines = said(made_results())
    assert list(lines) == ["fit to use", "given up", "gained", "pays", "cost"]
    assert lines["fit to use"].state == "good" and "7 ways" in lines["fit to use"].says
    assert "perplexity 20.00 became 25.00 (1.25 x), KL 0.25 nats, the same top token at 62.5%" in lines["given up"].says
    assert "another source perplexity 20.00 became 30.00 (1.50 x)" in lines["given up"].says  # of the last stage alone
    # after 4096 tokens: 4,096,000 bytes against 2,448,000, 1.673 times as many; 15 tokens a second against 10
    assert "2.4 MB instead of 4.1 MB (1.7 x smaller), and decoding is 1.5 x as fast" in lines["gained"].says
    # 1000 n > 400,000 + 500 n from n = 800 on
    assert "smaller from 800 tokens on" in lines["pays"].says
    assert "faster from somewhere between 512 and 4,096 tokens on" in lines["pays"].says
    assert "36,000 training tokens in 2 hours on cpu" in lines["cost"].says and "2 steps" in lines["cost"].says


def test_a_verdict_does_not_invent_a_gain():
    results = made_results()
    results["decoding"]["student"] = copy.deepcopy(results["decoding"]["teacher"])
    lines = said(results)
    assert "(no smaller), and decoding is about as fast" in lines["gained"].says
    assert "its state is smaller at none of the contexts measured (to 4,096 tokens)" in lines["pays"].says
    results["decoding"]["student"] = [
        dict(speed, state_bytes=10, tokens_per_s=99.0) for speed in results["decoding"]["teacher"]
    ]
    assert said(results)["pays"].says.count("from 512 tokens on, the shortest context measured") == 2


def test_what_was_not_measured_is_told_as_such():
    results = made_results()
    results |= {"decoding": {"teacher": [], "student": []}, "consistency": {}, "evaluation": {}, "phases": {}}
    lines = said(results)
    assert lines["fit to use"].state == "plain" and "not known" in lines["fit to use"].says
    assert [lines[name].says for name in ("given up", "gained", "pays")] == ["not measured"] * 3
    assert lines["cost"].says.startswith("no training")


@pytest.mark.parametrize("off", [1e-3, float("nan")])
def test_broken_decoding_comes_first_however_good_the_likelihood(off):
    results = made_results(ratio=1.0)
    results["consistency"]["steps"] = off
    first = verdict(results)[0]
    assert first.state == "bad" and first.says.startswith("NO: decoding is broken (prefill and steps")


class Seen(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_page_needs_nothing_beside_it_and_runs_nothing(tmp_path):
    folder = make_run(tmp_path / "one")
    page = to_html([Finished(folder, made_results(), NASTY)])
    seen = Seen(page)
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "object", "base"}
    addresses = [value for _, found in seen.tags for key, value in found.items() if key in ("src", "href")]
    assert len(addresses) == 1 and addresses[0].startswith("data:image/png;base64,")
    assert not [name for _, found in seen.tags for name in found if name.startswith("on")]
    assert seen.text.count(NASTY) == 3  # both continuations and the recipe, as they are
    assert not re.search(r"url\(|@import", page)


def test_the_command_writes_one_run_or_several(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", ratio=1.5)
    assert main(["report", "first"]) == 0
    assert "first/report.html" in capsys.readouterr().out
    alone = Seen((first / "report.html").read_text())
    assert "Side by side" not in alone.text and "fit to use" in alone.text
    assert main(["report", "first", "second", "--output", "both.html"]) == 0
    both = Seen((tmp_path / "both.html").read_text())
    assert both.text.count("fit to use") == 2
    images = [found["src"] for tag, found in both.tags if tag == "img"]
    assert [image[:20] for image in images] == ["data:image/svg+xml;b"] * 2 + ["data:image/png;base6"] * 2
    beside = both.text.partition("Side by side")[2].partition("Machine")[0]
    assert "first25.0020.001.2500.25062.5%\nsecond30.0020.001.5000.30062.5%" in beside  # cells of the last stage
    assert "second1,10036,0002 h 0 min2.4 MB15.0 tokens/s" in beside
    (second / "results.json").unlink()
    for given, line in (
        (["first", "first"], "is named twice"),
        (["second"], "second has no whole results.json yet"),
        (["nowhere"], "nowhere is not a run's folder"),
        (["first", "--output", "."], "is a folder; give the name of a file"),
    ):
        capsys.readouterr()
        assert main(["report", *given]) == 2
        assert line in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_and_prints_the_page(tmp_path):
    from matplotlib.image import imread

    make_run(tmp_path / "first"), make_run(tmp_path / "second", ratio=1.5)
    page = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "first"), str(tmp_path / "second"), "--output", str(page)]) == 0
    shot, pdf = tmp_path / "shot.png", tmp_path / "page.pdf"
    dom = browse(
        page, tmp_path, "--dump-dom", f"--screenshot={shot}", "--window-size=1200,5000", f"--print-to-pdf={pdf}",
        "--no-pdf-header-footer",
    )  # fmt: skip
    assert Seen(dom).text.count(NASTY) == 6 and "<title>2 runs</title>" in dom
    blue = np.array([int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    assert (np.abs(imread(shot)[..., :3] - blue).max(-1) < 0.02).sum() > 2 * 100_000  # both runs' plots are there
    assert pdf.read_bytes().startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) <= 8


def test_figures_of_each_token_have_tables_of_their_own():
    from mohawk.runs.tables import agreement_tables

    found = compared(1.25) | dict(
        kl_error=0.05, log_ratio_error=0.1, worst_kl=7.0, top5_overlap=0.8, acceptance=0.75, accepted=[0.75, None],
        teacher_accuracy=0.5, student_accuracy=0.4, teacher_confidence=0.6, student_confidence=0.7,
        teacher_calibration=0.1, student_calibration=0.3,
    )  # fmt: skip
    agreement, calibration = agreement_tables({"held_out": found, "evaluation": compared(2.0)})  # of an earlier version
    assert agreement[1] == ["", "held-out text of the training source"]
    shown = dict(agreement[2])
    # 1.25 exp(-+ 1.96 x 0.1), 0.25 -+ 1.96 x 0.05
    assert shown["perplexity ratio, 95 % interval"] == "1.028 to 1.521"
    assert shown["KL, 95 % interval"] == "0.152 to 0.348" and shown["KL of the worst token"] == "7.000"
    assert shown["kept of 1 drafted"] == "0.75" and shown["kept of 2 drafted"] == "-"
    assert calibration[2][1] == ["held-out text of the training source", "student", "40.0%", "70.0%", "30.0%"]


def test_what_was_found_again_and_written_is_in_the_verdict_the_tables_and_pictures(tmp_path):
    from matplotlib.image import imread

    from mohawk.runs.plots import plot_positions, plot_retrieval
    from mohawk.runs.tables import behaviour_tables, layer_table

    def writes(repeated):
        return {"length": 11.5, "ended": 0.25, "repeated": repeated, "perplexity": 3.5}

    needle = {
        "lengths": [512, 1024], "depths": [0.0, 1.0], "asked": [12, 4], "teacher": [[1.0, 0.5], [1.0, 1.0]],
        "student": [[0.5, 0.5], [0.0, 0.0]], "difference": -0.375, "difference_error": 0.05,
    }  # fmt: skip
    bins = [dict(first=1, last=127, tokens=254, teacher=20.0, student=25.0, ratio=1.25)]
    found = {
        "retrieval": {"needle": needle},
        "positions": {"held_out": bins},
        "written": {
            "prompts": 8, "tokens": 60, "teacher": writes(0.1), "student": writes(0.75),
            "same": {"first": 2.5, "scores": {"BLEU": 12.0}},
        },
    }  # fmt: skip
    told = said(made_results() | {"behaviour": found})["given up"].says
    assert "words found again in long texts: -38 ± 10 points among sentences about nothing" in told
    assert "it repeats 75% of what it writes (the teacher 10%)" in told
    retrieved, positions, written, same = behaviour_tables(found)
    # of 24 answers at 512 and 8 at 1024: the teacher 18 + 8 = 26, the student 12
    assert retrieved[2] == [
        ["among sentences about nothing", "512 to 1,024", "32", "81.2%", "37.5%", "-37.5 ± 9.8 points"]
    ]
    assert positions[2] == [["1 to 127", "254", "20.00", "25.00", "1.250"]]
    assert written[2][1] == ["student", "11.5", "25.0%", "75.0%", "3.500"] and same[2][1] == ["BLEU", "12.0"]
    target = tmp_path / "retrieval.png"
    assert plot_retrieval({"needle": needle}, target) and plot_positions({"held_out": bins}, tmp_path / "positions.png")
    assert imread(target).shape[1] > 1000
    assert plot_retrieval({}, target) is None and not target.exists()
    layers = [{"layer": 0, "stayed": True}, {"layer": 1, "stayed": False}]
    assert layer_table(layers)[2] == [["attention stayed", "0"], ["replaced", "1"]]
    layers = [layer | {"kl": 0.026, "recall": 0.125, "recalled": 0.69} for layer in layers]
    assert layer_table(layers)[2][1] == ["1", "replaced", "0.026", "12.5% (of 69.0%)"]


def test_what_each_layer_costs_is_of_the_run_that_its_mixer_was_trained_in(tmp_path):
    from types import SimpleNamespace

    from mohawk.runs.report import layer_costs

    def selected(run, student, kl):
        recall = {"accuracy": 0.5, "loss": 1.0, "values": 16}
        path = [{"kl": 0.0, "recall": recall | {"accuracy": 0.75}}]
        layers = [{"layer": i, "kl": kl + i, "recall": recall} for i in (0, 1, 2)]
        found = {"settings": {"student": student}, "rankings": {"kl": {"order": [], "path": path}}, "layers": layers}
        write_json(tmp_path / run / "selection.json", found)

    config = SimpleNamespace(layer_types=["linear_attention", "full_attention", "linear_attention"])
    assert layer_costs(tmp_path, SimpleNamespace()) == []
    assert [layer["stayed"] for layer in layer_costs(tmp_path, config)] == [False, True, False]
    assert not any("kl" in layer for layer in layer_costs(tmp_path, config))
    selected("main", "aa", 10.0), selected("other", "bb", 20.0)
    about = {"run": str(tmp_path / "main"), "student": "aa", "attention": [1]}
    about["others"] = [{"run": str(tmp_path / "other"), "student": "bb", "layers": [2]}]
    write_json(tmp_path / "composed.json", about)
    assert [layer["kl"] for layer in layer_costs(tmp_path, config)] == [10.0, 11.0, 22.0]
    assert layer_costs(tmp_path, config)[0] == {
        "layer": 0, "stayed": False, "kl": 10.0, "recall": 0.5, "recalled": 0.75
    }  # fmt: skip
    selected("other", "cc", 20.0)  # its mixers were trained again since
    assert "kl" not in layer_costs(tmp_path, config)[2]
