"""`mohawk inspect --matrices`: what it draws, against transformers' own attention weights; what it says and refuses."""

import errno
import io
import re

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import mohawk.inspection.pictures as page_module
from mohawk.cli import main
from mohawk.conversion.recipe import Recipe
from mohawk.core.folders import is_complete
from mohawk.inspection.pictures import head_picture
from mohawk.kernels.mixing.interface import mixing_distance, mixing_matrix
from mohawk.kernels.mixing.operands import AttentionMixing, SSDMixing
from mohawk.kernels.mixing.reference import dense_matrix
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.kernels.test_mixing_memory import peak_bytes
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.usefixtures("pictures_as_shipped")

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. "


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_llama, tokenizer):
    """A teacher, a run whose student has Mamba-2 in layers 1 and 2 and other keys in layer 3, and a text."""
    folder = tmp_path_factory.mktemp("inspect")
    teacher = make_llama(num_hidden_layers=4)
    student = hybrid_from_teacher(teacher, ssm_layers=[1, 2])
    with torch.no_grad():
        student.model.layers[3].self_attn.k_proj.weight.mul_(1.5)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "run" / "student")
    (folder / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    recipe = {"teacher": str(folder / "teacher"), "data": {"train": [str(folder / "text.txt")]}, "device": "cpu"}
    Recipe.from_dict({**recipe, "output": str(folder / "run")}).save(folder / "run" / "recipe.yaml")
    return folder


def inspect(place, *arguments, model="run", text="text.txt") -> int:
    return main(["inspect", str(place / model), "--matrices", str(place / text), *map(str, arguments)])


def eager(model, tokenizer, tokens, text=TEXT * 4):
    """(attention weights per layer, hidden states per layer) by transformers' own eager attention."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation(before)
    return [a[0].double() for a in out.attentions], out.hidden_states


def table(page) -> dict[int, list[str]]:
    """Of each line of the page's table the texts of its cells."""
    rows = re.findall(r"<tr.*?>(.*?)</tr>", page.read_text(encoding="utf-8"))[1:]
    cells = [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for row in rows]
    return {int(row[0]): row for row in cells}


def test_a_run_has_a_picture_for_each_layer_that_differs(place, tokenizer, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "drawn"
    assert inspect(place, "--tokens", 60, "--output", output) == 0
    teacher = AutoModelForCausalLM.from_pretrained(place / "teacher")
    student = AutoModelForCausalLM.from_pretrained(place / "run" / "student")
    attention, hidden = eager(teacher, tokenizer, 60)
    # layer 3 of a teacher with the student's keys makes the student's matrix of the teacher's hidden states
    teacher.model.layers[3].self_attn.k_proj.load_state_dict(student.model.layers[3].self_attn.k_proj.state_dict())
    expected = {3: eager(teacher, tokenizer, 60)[0][3]}
    for i in (1, 2):
        layer = student.model.layers[i]
        with torch.no_grad():
            expected[i] = dense_matrix(layer.self_attn.mixing(layer.input_layernorm(hidden[i])))[0].double()

    lines = table(output / "index.html")
    assert [line[1] for line in lines.values()] == ["attention", "mamba2", "mamba2", "attention, trained further"]
    assert lines[0][2] == "the teacher's own"
    for i, own in expected.items():
        distance = (own - attention[i]).norm(dim=(1, 2))
        share = distance / attention[i].norm(dim=(1, 2))
        assert float(lines[i][2]) == pytest.approx(float(distance.mean()), rel=6e-3), "three digits"
        assert float(lines[i][3].rstrip("%")) == pytest.approx(100 * float(share.mean()), rel=6e-3)
        # least squares, head by head: how much of the teacher's matrix no multiple of the student's is
        a, s = attention[i].flatten(1), own.flatten(1)
        scale = (a * s).sum(1, keepdim=True) / s.square().sum(1, keepdim=True)
        rest = (scale * s - a).norm(dim=1) / a.norm(dim=1)
        assert float(lines[i][5].rstrip("%")) == pytest.approx(100 * float(rest.mean()), rel=6e-3)
        spread = [float(x.rstrip("%")) for x in lines[i][4].split(" to ")]
        assert spread == pytest.approx([100 * float(share.min()), 100 * float(share.max())], rel=6e-3)
    names = sorted(path.name for path in output.iterdir())
    assert names == ["MANIFEST.json", "index.html", "layer_01.png", "layer_02.png", "layer_03.png"]
    page = (output / "index.html").read_text(encoding="utf-8")
    assert re.findall('href="(.*?)"', page) == names[2:] and "the first 60 tokens of text.txt" in page
    assert "script" not in page and "http" not in page
    assert is_complete(output)
    out = capsys.readouterr().out
    assert out.count("layer ") == 3 and f"written to {output / 'index.html'}" in out
    # a layer that is asked for is drawn, and an earlier page gives way to this one
    assert inspect(place, "--layers", 0, 2, "--tokens", 20, "--output", output) == 0
    assert sorted(path.name for path in output.glob("*.png")) == ["layer_00.png", "layer_02.png"]
    assert table(output / "index.html")[0][2:6] == ["0", "0%", "0% to 0%", "0%"]


@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_a_students_scale_is_told_apart_from_its_shape(scale):
    """A student of the teacher's matrix times a number, and one of another shape: the same whatever the number is."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 12, 4).unbind(0)
    teacher = AttentionMixing(q, k)
    C, B, decay = torch.randn(1, 12, 2, 4), torch.randn(1, 12, 2, 4), -torch.rand(1, 12, 2)
    other = SSDMixing(C * scale, B, decay)
    shape = head_picture(SSDMixing(C, B, decay), other, 0, (0, 12))
    assert shape.rest == pytest.approx(0, abs=1e-3) and shape.distance == pytest.approx(abs(scale - 1) * shape.norm)
    a, s = (mixing_matrix(m, heads=[0])[0, 0].double().flatten() for m in (teacher, other))
    least = torch.linalg.lstsq(s[:, None], a[:, None]).solution[0, 0]
    found = head_picture(teacher, other, 0, (0, 12))
    assert found.rest == pytest.approx(float((least * s - a).norm() / a.norm()), rel=1e-5)
    assert head_picture(teacher, SSDMixing(C * 0, B, decay), 0, (0, 12)).rest == 1.0


def test_a_picture_of_256_positions_has_a_pixel_for_each(place, tmp_path):
    (tmp_path / "long.txt").write_text(TEXT * 8)
    line = ["inspect", str(place / "teacher"), "--matrices", str(tmp_path / "long.txt"), "--layers", "2"]
    assert main([*line, "--output", str(tmp_path / "whole")]) == 0
    assert main([*line, "--output", str(tmp_path / "rows"), "--rows", "128", "256"]) == 0
    lower = np.tri(256, dtype=bool)
    inside = slice(4, 252)  # spines and ticks lie on the border
    for folder, seen in (("whole", lower), ("rows", lower[128:].repeat(2, 0))):
        image = imread(tmp_path / folder / "layer_02.png")[..., :3]
        assert image.shape == (64 + 40 + 256 + 40, 4 * (64 + 256 + 8 + 8 + 64), 3)
        panel = image[104:360, 64:320]
        grey = np.abs(panel - np.array([0xEA, 0xEE, 0xF2]) / 255).max(-1) < 0.01
        assert (grey == ~seen)[inside, inside].all()


@pytest.mark.parametrize(
    "family",
    ["llama_wide_heads", "mistral", "qwen3", "gemma2", "olmo2", "phi", "phi4_mini", "gemma3", "granite", "qwen3_moe"],
)
def test_a_transformer_alone(family, tmp_path, tokenizer, capsys):
    model = tiny_teacher(family, vocab_size=258, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(TEXT)
    assert inspect(tmp_path, "--tokens", 30, "--output", tmp_path / "m", model="model", text="text") == 0
    attention, _ = eager(model, tokenizer, 30, TEXT)
    lines = table(tmp_path / "m" / "index.html")
    for i, matrix in enumerate(attention):
        assert float(lines[i][2]) == pytest.approx(float(matrix.norm(dim=(1, 2)).mean()), rel=6e-3)
    assert "layer 1: attention, mean ‖A‖ " in capsys.readouterr().out


def test_a_teacher_in_bfloat16_from_a_gpu_and_standard_input(place, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(place / "run" / "student", dtype=torch.bfloat16).float()
    student.save_pretrained(tmp_path / "run" / "student")
    recipe = Recipe.load(place / "run" / "recipe.yaml", ["teacher.dtype=bfloat16", "device=cuda"])
    recipe.save(tmp_path / "run" / "recipe.yaml")
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert main(["inspect", str(tmp_path / "run"), "--matrices", "-", "--tokens", "12"]) == 0
    page = tmp_path / "run" / "plots" / "matrices" / "index.html"
    assert "the first 12 tokens of standard input" in page.read_text(encoding="utf-8")
    # the same in float32, from the student and a named teacher
    options = ["--teacher", place / "teacher", "--tokens", 12, "--output", tmp_path / "exact"]
    assert inspect(place, *options, model="run/student") == 0
    rounded, exact = table(page), table(tmp_path / "exact" / "index.html")
    assert rounded[0] == exact[0] and exact[0][2] == "the teacher's own"
    for i in (1, 2, 3):
        assert float(rounded[i][2]) == pytest.approx(float(exact[i][2]), rel=0.05)


@pytest.fixture(scope="module")
def mixings():
    torch.manual_seed(0)
    seq = 600
    theirs = AttentionMixing(torch.randn(1, 4, seq, 8) * 2, torch.randn(1, 2, seq, 8))
    C, B = torch.randn(1, seq, 4, 8), torch.randn(1, seq, 4, 8)
    return theirs, SSDMixing(C, B, -torch.rand(1, seq, 4) / 9, torch.rand(1, seq, 4) / 9)


def test_norms_are_those_of_the_matrices(mixings, monkeypatch):
    theirs, own = mixings
    distances = mixing_distance(own, theirs, reduction="none")[0]
    shares = mixing_distance(own, theirs, reduction="none", metric="relative")[0]
    for entries in (1 << 22, 4000):  # in one go, and in strips
        monkeypatch.setattr(page_module, "ENTRIES", entries)
        head = head_picture(theirs, own, 2, (0, 600))
        assert head.distance == pytest.approx(float(distances[2]), rel=1e-5)
        assert head.distance / head.norm == pytest.approx(float(shares[2]), rel=1e-5)
        part = head_picture(theirs, own, 1, (100, 431))
        a, s = (mixing_matrix(m, heads=[1])[0, 0, 100:431].double() for m in (theirs, own))
        assert part.norm == pytest.approx(float(a.norm()), rel=1e-5)
        assert part.student_norm == pytest.approx(float(s.norm()), rel=1e-5)
        assert part.distance == pytest.approx(float((s - a).norm()), rel=1e-5)
    alone = head_picture(theirs, None, 1, (100, 431))
    assert alone.norm == part.norm and alone.student is alone.difference is alone.distance is None


@pytest.mark.parametrize("rows", [(0, 600), (0, 256), (599, 600), (300, 600), (7, 290)])
def test_a_point_is_the_entry_of_the_largest_size(mixings, rows):
    theirs, own = mixings
    first, last = rows
    head = head_picture(theirs, own, 3, rows)
    a, s = (mixing_matrix(m, heads=[3])[0, 0].numpy() for m in (theirs, own))
    tall, broad = -(-(last - first) // 256), -(-last // 256)
    for picture, matrix in ((head.teacher, a), (head.student, s), (head.difference, s - a)):
        assert picture.shape == (-(-(last - first) // tall), -(-last // broad)) and max(picture.shape) <= 256
        for r, c in ((0, 0), (-1, 0), (-1, -1), (len(picture) // 2, 1), (len(picture) // 3, 100)):
            r, c = r % picture.shape[0], c % picture.shape[1]
            top, left = first + r * tall, c * broad
            block = matrix[top : min(top + tall, last), left : min(left + broad, last)]
            if left > min(top + tall, last) - 1:
                assert np.isnan(picture[r, c]), "no row of the block sees a column of it"
            else:
                assert picture[r, c] == pytest.approx(block.flat[np.abs(block).argmax()], abs=1e-6)


def test_memory_is_strips_not_matrices(monkeypatch):
    monkeypatch.setattr(page_module, "ENTRIES", 1 << 17)
    q, C = torch.randn(1, 2, 2048, 8), torch.randn(1, 2048, 2, 8)
    theirs, own = AttentionMixing(q, q), SSDMixing(C, C, -torch.rand(1, 2048, 2))
    assert peak_bytes(lambda: head_picture(theirs, own, 1, (0, 2048))) < 4 * 2048**2 / 2


def test_whole_or_absent(place, tmp_path, monkeypatch, capsys):
    output = tmp_path / "drawn"
    assert inspect(place, "--layers", 1, "--tokens", 8, "--output", output) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    drawn, plot_layer = [], page_module.plot_layer

    def full_disk(*arguments):
        if drawn:
            raise OSError(errno.ENOSPC, "No space left on device")
        drawn.append(plot_layer(*arguments))

    monkeypatch.setattr(page_module, "plot_layer", full_disk)
    capsys.readouterr()
    for folder in (output, tmp_path / "new"):
        drawn.clear()
        assert inspect(place, "--tokens", 8, "--output", folder) == 2
        assert capsys.readouterr().err.endswith(f"--output: {folder} cannot be written (No space left on device)\n")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert list(tmp_path.iterdir()) == [output]


def test_mistakes_are_one_line(place, tmp_path, make_llama, tokenizer, capsys):
    from mohawk.core.folders import write_whole

    (tmp_path / "short.txt").write_text("x")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "file").write_text("")
    with write_whole(tmp_path / "whole") as folder:
        (folder / "model.safetensors").write_text("somebody's student")
    other = make_llama(num_hidden_layers=3)
    other.save_pretrained(tmp_path / "other")
    run, text = place / "run", place / "text.txt"
    cases = [
        ([run, tmp_path / "nowhere"], "nowhere cannot be read (No such file or directory); give a text file, or -"),
        ([run, tmp_path], "cannot be read (Is a directory)"),
        ([run, tmp_path / "binary"], "is not text in UTF-8"),
        ([run, tmp_path / "short.txt"], "is too short: got 1 of the at least 2 tokens a matrix needs"),
        ([run, text, "--layers", 1, 4], "--layers: got 4; the model has layers 0 to 3"),
        ([run, text, "--rows", 5, 5], "--rows: got 5 5; allowed: two positions, the first below the second"),
        ([run, text, "--rows", 5, 9, "--tokens", 8], "--rows: got 5 9, but --tokens cuts the text to 8"),
        ([run, text, "--rows", 5, 9999], f"--rows: got 5 9999, but {text} has only {len(TEXT) * 4} tokens"),
        ([run, text, "--output", tmp_path / "file"], "is a file; give a folder"),
        ([run, text, "--output", tmp_path / "file" / "in"], "in cannot be written (File exists)"),
        ([run, text, "--output", tmp_path], "holds other files; choose another folder"),
        ([run, text, "--output", tmp_path / "whole"], "holds other files; choose another folder"),
        ([run, text, "--teacher", tmp_path / "gone"], "gone does not exist"),
        ([run, text, "--teacher", tmp_path / "other"], "has 4 layers of width 32 and 4 heads, but its teacher"),
        ([run, text, "--teacher", run / "student"], "student is a hybrid; a teacher's matrices are drawn of llama"),
        (
            [run / "student", text],
            "student is a hybrid without its run; name the model it was made from with --teacher",
        ),
        ([tmp_path / "gone", text], "gone does not exist"),
    ]
    for (model, source, *options), words in cases:
        where = [] if "--output" in options else ["--output", tmp_path / "out"]
        assert main(["inspect", *map(str, (model, "--matrices", source, *options, *where))]) == 2, words
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and words in lines[0], (words, error)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial-*"))
    assert (tmp_path / "whole" / "model.safetensors").read_text() == "somebody's student"
    assert main(["inspect", str(run), "--rows", "1", "2"]) == 2
    assert capsys.readouterr().err == "error: --rows is of --matrices TEXT; give a text, or leave it out\n"
