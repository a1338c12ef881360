"""Drafts: the teacher's own text in greedy, its own distribution in sampling, and going back in caches with states."""

import itertools

import pytest
import torch

from mohawk.cli import main
from mohawk.generation.speculative import Track, distributions, judge, speculate
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.models.conftest import tiny_teacher

FULL = {"use_sliding_window": False, "sliding_window": None}


def hybrid(teacher, layers, mixer, noise=0.05):
    """A student that is near its teacher, and away from its start."""
    torch.manual_seed(1)
    student = hybrid_from_teacher(teacher, layers, mixer).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * noise * parameter.std(correction=0))
    return student


def alone(model, prompt, count):
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2", "gated_delta", "kimi_delta"])
def test_greedy_is_the_teachers_own_text(mixer):
    teacher = tiny_teacher("qwen3", **FULL)
    near, far = hybrid(teacher, [0, 2], mixer), hybrid(teacher, [0, 1, 2, 3], mixer, noise=1.0)
    for prompt, student in (([3, 4, 5, 6], near), ([3], far)):
        text = alone(teacher, prompt, 10)
        told = speculate(Track(teacher), Track(student), prompt, max_new_tokens=10, drafted=3)
        assert told.tokens == text and told.read_again == 0
        # a teacher with states has to read again what was kept
        told = speculate(Track(student), Track(teacher), prompt, max_new_tokens=10, drafted=3)
        assert told.tokens == alone(student, prompt, 10) and (told.read_again > 0 or told.accepted == 0)
    same = speculate(Track(near), Track(near), [3, 4, 5], max_new_tokens=8, drafted=3)
    assert same.accepted == same.drafted == 6 and same.rounds == 2 and same.read_again == 0
    ended = speculate(Track(teacher), Track(near), [3], max_new_tokens=10, ends=[text[3]])
    assert ended.tokens == text[: text.index(text[3]) + 1]


def test_states_are_what_they_were():
    """Back to any length that was kept, and on from there, as if nothing else had been read."""
    for family, layers in (("qwen3", [0, 2]), ("qwen3", [0, 1, 2, 3]), ("mistral", [1])):
        model = hybrid(tiny_teacher(family), layers, "mamba2")
        track = Track(model)
        for token in range(3, 9):
            track.read([token], 1)
            track.remember()
        assert track.back_to(4) == 0 and track.tokens == [3, 4, 5, 6]
        track.remember()
        got = track.read([20, 21, 22], 3)
        ids = torch.tensor([[3, 4, 5, 6, 20, 21, 22]])
        with torch.inference_mode():
            expected = model(input_ids=ids, use_cache=False).logits[0, -3:].double()
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        assert track.back_to(5) == 1 and track.tokens == [3, 4, 5, 6, 20]
        torch.testing.assert_close(track.read([21], 1), expected[1:2], rtol=0, atol=2e-5 * float(expected.abs().max()))


class Table:
    """A model of few tokens whose next one depends on the last one alone."""

    def __init__(self, logits):
        self.logits, self.vocab, self.tokens = logits, len(logits), []

    def read(self, ids, keep):
        self.tokens += ids
        return self.logits[self.tokens[-keep:]]

    def remember(self):
        """There is no state."""

    def back_to(self, length):
        del self.tokens[length:]
        return 0


@pytest.mark.parametrize(
    ("sizes", "temperature", "top_p"), [((3, 3), 1.0, 1.0), ((3, 4), 0.7, 1.0), ((4, 3), 1.3, 0.8)]
)
def test_samples_are_the_teachers(sizes, temperature, top_p):
    """How often each text of three tokens comes, against its exact probability, where the draft is far off and may have
    more or fewer tokens."""
    generator = torch.Generator().manual_seed(0)
    teacher, draft = (torch.randn(size, size, generator=generator, dtype=torch.float64) * 1.5 for size in sizes)
    if sizes[1] > sizes[0]:
        draft[:, sizes[0] :] -= 1.0
    p = distributions(teacher, temperature, top_p)
    exact = {
        text: float(p[0, text[0]] * p[text[0], text[1]] * p[text[1], text[2]])
        for text in itertools.product(range(sizes[0]), repeat=3)
    }
    assert sum(exact.values()) == pytest.approx(1)
    count, found, passed = 1500, dict.fromkeys(exact, 0), 0
    for _ in range(count):
        made = speculate(
            Table(teacher), Table(draft), [0], max_new_tokens=3, drafted=2, temperature=temperature, top_p=top_p,
            generator=generator,
        )  # fmt: skip
        found[tuple(made.tokens)] += 1
        passed += made.accepted
    assert all(found[text] == 0 for text, chance in exact.items() if chance == 0)
    common = [text for text, chance in exact.items() if count * chance >= 5]
    rare = 1 - sum(exact[text] for text in common), count - sum(found[text] for text in common)
    cells = [(exact[text], found[text]) for text in common] + [rare] * (count * rare[0] >= 5)
    chi2 = sum((seen - count * chance) ** 2 / (count * chance) for chance, seen in cells)
    # mean and deviation of chi-square; the seed is fixed, and what is not the teacher's is far beyond
    freedom = len(cells) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5, (chi2, freedom)
    assert 0 < passed < 2 * count


def test_a_token_is_judged_as_the_paper_has_it():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    q = [torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)]
    passed, replaced = 0, []
    for seed in range(2000):
        made = judge(p, q, [2], torch.Generator().manual_seed(seed))
        passed += len(made) == 2
        replaced += [made[0]] if len(made) == 1 else []
    assert passed / 2000 == pytest.approx(0.2 / 0.5, abs=0.04)
    assert set(replaced) == {0}  # all that the teacher has more of


def test_generate_with_a_draft(tmp_path, tokenizer, capsys):
    teacher = tiny_teacher("qwen3", vocab_size=258, bos_token_id=256, eos_token_id=257, **FULL)
    teacher.save_pretrained(tmp_path / "teacher")
    hybrid(teacher, [0, 2], "mamba2").save_pretrained(tmp_path / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(tmp_path / name)
    line = ["generate", str(tmp_path / "teacher"), "--prompt", "The quick", "--max-new-tokens", "12"]
    assert main(line) == 0
    plain = capsys.readouterr().out
    assert main([*line, "--draft", str(tmp_path / "student"), "--draft-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert said.out == plain
    assert "saved: 12 tokens in" in said.err and "alone, 12 steps at" in said.err
    assert main([*line, "--draft-tokens", "3"]) == 2
    assert "--draft-tokens is of --draft MODEL" in capsys.readouterr().err
    assert main([*line, "--draft", str(tmp_path / "nowhere")]) == 2
    assert "--draft: " in capsys.readouterr().err
