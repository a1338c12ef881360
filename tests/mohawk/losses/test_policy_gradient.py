"""MiniLLM's gradient: against reverse KL of all sequences there are, and against the paper's formula written out."""

import itertools

import pytest
import torch

from mohawk.losses.distiller import KnowledgeDistiller, OwnLoss
from mohawk.losses.on_policy import OnPolicy
from mohawk.losses.policy_gradient import later_rewards, policy_term


def test_rewards_of_later_tokens():
    """By loops: of two samples in a row, of one of one token, of none."""
    g = torch.Generator().manual_seed(0)
    labels = torch.full((3, 9), -100)
    labels[0, 1:5], labels[0, 6:9], labels[1, 3] = 7, 8, 2
    reward = torch.randn(3, 9, generator=g)
    reward[labels == -100] = float("nan")  # read only where there is a label
    samples = [(0, range(1, 5)), (0, range(6, 9)), (1, range(3, 4))]
    for kind in ("normalized", "sum"):
        expected = torch.zeros(3, 9, dtype=torch.float64)
        for row, places in samples:
            for t in places:
                later = [reward[row, k].item() for k in places if k > t]
                if later:
                    expected[row, t] = sum(later) / (len(later) if kind == "normalized" else 1)
        torch.testing.assert_close(later_rewards(reward, labels, kind), expected)


def test_its_expectation_is_the_gradient_of_the_sequences_reverse_kl():
    """Over all sequences of three words out of three, with a distribution for each prefix; float64."""
    words, length = 3, 3
    prefixes = [one for n in range(length) for one in itertools.product(range(words), repeat=n)]
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(len(prefixes), words, dtype=torch.float64, generator=g) for _ in range(2))
    z.requires_grad_()
    log_q, log_p = z.log_softmax(-1), t.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)  # of each step
    whole = surrogate = normalized = 0.0
    for sequence in itertools.product(range(words), repeat=length):
        at = [prefixes.index(sequence[:n]) for n in range(length)]
        ids = torch.tensor(sequence)
        ours, theirs = log_q[at].gather(1, ids[:, None]).T, log_p[at].gather(1, ids[:, None]).T
        probability = ours.sum().exp()
        whole = whole + probability * (ours - theirs).sum()
        one = {kind: policy_term(-ours, theirs, ids[None], kind).sum() for kind in ("sum", "normalized")}
        assert one["sum"] == one["normalized"] == 0
        surrogate = surrogate + probability.detach() * (kl[at].sum() + one["sum"])
        normalized = normalized + probability.detach() * (kl[at].sum() + one["normalized"])
    truth, got, other = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (whole, surrogate, normalized))
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(surrogate, whole)  # the value stays the divergence's
    assert (other - truth).norm() > 0.01 * truth.norm()


def test_the_distillers_gradient_by_hand(make_llama):
    """Each sampled token: KL of its step - (mean of log p - log q of its sample's later tokens) x log q of it."""
    student, teacher = make_llama(seed=1).double(), make_llama(seed=2).double()
    on_policy = OnPolicy(student, share=1.0, max_new_tokens=5, prompt_tokens=2, eos_token_id=[])
    options = {"divergence": "reverse_kl", "kd_weight": 0.5, "on_policy": on_policy}
    own = {1: OwnLoss(ce_weight=1.0)}
    distiller = KnowledgeDistiller(teacher, student, policy_gradient="normalized", own_losses=own, **options)
    plain = KnowledgeDistiller(teacher, student, own_losses=own, **options)
    ids = torch.randint(2, 250, (3, 8))
    batch = {"input_ids": ids, "labels": ids, "source": torch.tensor([0, 1, 0])}
    batch["attention_mask"] = torch.ones_like(ids)
    made = distiller.prepare(batch, 0)
    loss = distiller.loss(made)
    torch.testing.assert_close(loss.detach(), plain.loss(made).detach())
    given = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    log_q, log_p = (model(**given).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    labels = made["labels"][:, 1:]
    terms = []
    for row in (0, 2):
        places = (labels[row] != -100).nonzero().flatten().tolist()
        assert len(places) == 5
        ours, theirs = (x[row].gather(-1, labels[row].clamp(min=0)[:, None])[:, 0] for x in (log_q, log_p))
        for t in places:
            later = [(theirs[k] - ours[k]).detach() for k in places if k > t]
            kl = (log_q[row, t].exp() * (log_q[row, t] - log_p[row, t])).sum()
            terms.append(kl - (sum(later) / len(later) * ours[t] if later else 0.0))
    text = -log_q[1].gather(-1, labels[1][:, None]).mean()
    expected = 0.5 * torch.stack(terms).mean() + text
    parameters = [p for p in student.parameters() if p.requires_grad]
    got, truth, without = (
        torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, expected, plain.loss(made))
    )
    for one, other in zip(got, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert sum((a - b).norm() for a, b in zip(got, without, strict=True)) > 1e-3


def test_what_has_no_such_gradient_is_refused(make_llama):
    student, teacher = make_llama(seed=1), make_llama(seed=2)

    def distiller(policy_gradient="normalized", sampling=None, **options):
        asked = {"divergence": "reverse_kl", **options}
        samples = OnPolicy(student, eos_token_id=[], **{"share": 1.0, **(sampling or {})})
        KnowledgeDistiller(teacher, student, on_policy=samples, policy_gradient=policy_gradient, **asked)

    distiller()
    for options, words in (
        ({"policy_gradient": "mean"}, "got 'mean'; allowed: normalized, sum, None"),
        ({"divergence": "forward_kl"}, "it is that of reverse_kl"),
        ({"temperature": 2.0}, "at the temperature 2.0"),
        ({"confidence": True}, "beside confidence"),
        ({"sampling": {"share": 0.5}}, r"give on_policy=OnPolicy\(..., share=1\)"),
        ({"sampling": {"temperature": 0.7}}, r"give on_policy=OnPolicy\(..., share=1\)"),
    ):
        with pytest.raises(ValueError, match=rf"^policy_gradient: [^\n]*{words}[^\n]*$"):
            distiller(**options)
