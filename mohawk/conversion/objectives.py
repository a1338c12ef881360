"""The three phases of MOHAWK (arXiv 2408.10189, section 3) as training objectives.

1. `MixingObjective`: each layer's semiseparable matrix against the teacher's attention matrix.
2. `HiddenObjective`: each layer's output against the teacher's, given the teacher's input.
3. `EndToEndObjective`: the student's next-token distribution against the teacher's.

In phases 1 and 2 every layer sees the teacher's own hidden state, so layers are independent: each layer's loss is
yielded, and back-propagated by the trainer, before the next layer is computed. One layer's graph is alive at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawk.data.next_tokens import next_labels
from mohawk.kernels.kd.interface import linear_kd_loss
from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.losses.heads import Head
from mohawk.models.families import decoder_layers, family_of, mixer_input_norm
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.mixers import MIXERS
from mohawk.models.sharding import prefetch, reshard, run_in, stay_whole, whole_head
from mohawk.models.state_mixer import StateMixer
from mohawk.models.teacher_forcing import AttentionRecord, LayerCall, layer_calls, record, recording_attention
from mohawk.training.objective import Objective
from mohawk.training.weight_decay import parameter_groups


class PhaseObjective(Objective[HybridForCausalLM]):
    """A student, a frozen teacher, and the losses that pull one to the other."""

    teacher: PreTrainedModel

    def __init__(self, student: HybridForCausalLM, teacher: PreTrainedModel):
        super().__init__()
        self.student = student
        reshard(student)  # what trains are the parts
        # the teacher is neither trained nor saved with the student, so it is kept out of the module tree
        self.__dict__["teacher"] = teacher.requires_grad_(False).eval()
        self.layers = student.config.ssm_layers
        self.family = family_of(student.config)
        student.requires_grad_(False)
        for _, parameter in self.trained():
            parameter.requires_grad_(True)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (in the student) and parameters that this phase trains."""
        raise NotImplementedError

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict]:
        """AdamW's groups."""
        return parameter_groups(self.trained(), learning_rate, weight_decay)

    def _mixer_norms(self, output: bool = True) -> tuple[str, ...]:
        """Names of the norms that only the mixer's path reads: in front of it and, if asked, behind it.

        Where attention and MLP share the norm in front (Phi), it is the MLP's as well and not among them.
        """
        norms = (None if self.family.parallel else self.family.input_norm, self.family.output_norm if output else None)
        return tuple(name for name in norms if name is not None)

    def _trained_in_layers(self, wanted) -> Iterator[tuple[str, nn.Parameter]]:
        """wanted: of a layer's index and the name of a parameter in it."""
        for i in self.layers:
            layer = decoder_layers(self.student)[i]
            for name, parameter in layer.named_parameters():
                if wanted(i, name):
                    yield f"model.layers.{i}.{name}", parameter


class LayerwiseObjective(PhaseObjective):
    """Walks the teacher's layers; `layer_loss` compares one layer of the student given the teacher's hidden state.

    walk: the layers that this process walks, up to the last one that is replaced; with a `stage` its own.
    """

    walk: range

    def __init__(self, student: HybridForCausalLM, teacher: PreTrainedModel):
        super().__init__(student, teacher)
        self.walk = range(self.layers[-1] + 1)
        stay_whole(decoder_layers(student), True)  # each layer's backward pass comes right after its forward pass

    def apart(self) -> dict[str, list[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {f"layer_{i}": [] for i in self.layers}
        for name, parameter in self.trained():
            found[f"layer_{name.split('.')[2]}"].append(parameter)  # of model.layers.3.norm
        return found

    def has(self, loss: str) -> bool:
        return int(loss.removeprefix("layer_")) in self.walk

    def losses(self, **batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        segment_ids = batch["segment_ids"]
        layers, own = decoder_layers(self.teacher), decoder_layers(self.student)
        with recording_attention(self.teacher):
            hidden, calls = self._first(batch)
            for i in self.walk:
                call = calls[i]
                if i != self.walk[-1]:
                    prefetch(layers[i + 1])
                if i in self.layers:
                    prefetch(own[i])
                with torch.no_grad(), record(layers[i].self_attn) as attention:
                    after = layers[i](hidden, *call.args, **call.kwargs)
                if self.stage is not None and i == self.walk[-1]:
                    self.stage.send(after)
                if i in self.layers:
                    loss = run_in(own[i], self.layer_loss, own[i], hidden, after, attention, call, segment_ids)
                    yield f"layer_{i}", loss / len(self.layers)
                    del loss
                hidden = after
                del attention, after

    def _first(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[LayerCall]]:
        """What the first layer of the walk is given, and how each layer of the teacher is called."""
        inputs = batch["input_ids"], batch["position_ids"]
        if self.stage is None:
            found = run_in(self.teacher, layer_calls, self.teacher, *inputs)
            reshard(self.teacher)  # of an embedding that is the head too
            return found
        embedded = None
        if self.walk[0] > 0:
            embedding: Any = self.teacher.get_input_embeddings()
            shape = *batch["input_ids"].shape, embedding.weight.shape[1]
            embedded = torch.zeros(shape, dtype=embedding.weight.dtype, device=batch["input_ids"].device)
        hidden, calls = layer_calls(self.teacher, *inputs, embedded)
        return self.stage.receive(hidden), calls

    def layer_loss(
        self,
        layer: nn.Module,
        before: Tensor,
        after: Tensor,
        attention: AttentionRecord,
        call,
        segment_ids: Tensor,
    ) -> Tensor:
        """Scalar loss of one student layer; `before` and `after` are the teacher's hidden states (b, n, D)."""
        raise NotImplementedError


class MixingObjective(LayerwiseObjective):
    """Phase 1: mean over batch and heads of the distance between mixing matrices.

    Trains what the matrix depends on: the layer's input norm and, in a Mamba-2 mixer, in_proj (its rows for B, C and
    the decay get gradients, the others none), conv, D and the decay's parameters; in a gated delta rule's the
    projections of queries, keys and gates (rows of values get none), conv and the decay's parameters. A norm that the
    MLP reads too stays the teacher's, since nothing here would notice what its change does to the MLP.
    """

    def __init__(self, student: HybridForCausalLM, teacher: PreTrainedModel, metric: str = "frobenius"):
        super().__init__(student, teacher)
        self.metric = metric

    def trained(self):
        config, norms = self.student.config, self._mixer_norms(output=False)
        kept_out = {i: MIXERS[config.mixer_of(i)].outside_matrix for i in self.layers}
        return self._trained_in_layers(
            lambda i, name: (
                name.startswith(norms)
                or (name.startswith("self_attn.") and name.removeprefix("self_attn.") not in kept_out[i])
            )
        )

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict]:
        # in_proj and conv also hold rows this phase gives no gradient: weight decay would pull them to zero
        return super().parameter_groups(learning_rate, 0.0)

    def count(self, batch):
        return len(batch["input_ids"])

    def layer_loss(self, layer, before, after, attention, call, segment_ids):
        mixing = layer.self_attn.mixing(mixer_input_norm(layer)(before), segment_ids=segment_ids)
        return mixing_distance(mixing, attention.mixing(segment_ids), metric=self.metric)


class HiddenObjective(LayerwiseObjective):
    """Phase 2: mean over real tokens of the L2 norm of the difference in hidden states.

    `match` "block_output" compares the whole layer with the teacher's hidden state after it; "mixer_output" compares
    the mixer with the teacher's attention output. Trains the mixer, its norms and, if asked, the MLP and its norms; a
    norm that both read only where the whole layer is compared.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: PreTrainedModel,
        match: str = "block_output",
        train_mlp: bool = False,
    ):
        self.match, self.train_mlp = match, train_mlp
        super().__init__(student, teacher)

    def trained(self):
        whole = self.match == "block_output"
        prefixes = ("self_attn.", *self._mixer_norms(output=whole))
        if whole and self.family.parallel:
            prefixes += (self.family.input_norm,)
        if self.train_mlp:
            prefixes += (f"{self.family.mlp}.", *self.family.mlp_norms)
        return self._trained_in_layers(lambda i, name: name.startswith(prefixes))

    def count(self, batch):
        return int((batch["segment_ids"] >= 0).sum())

    def layer_loss(self, layer, before, after, attention, call, segment_ids):
        if self.match == "mixer_output":
            mixer: StateMixer = layer.self_attn
            output, _ = mixer(mixer_input_norm(layer)(before), segment_ids=segment_ids)
            target = attention.output
        else:
            output = layer(before, *call.args, **{**call.kwargs, "segment_ids": segment_ids})
            target = after
        real = segment_ids >= 0
        norms = torch.linalg.vector_norm(output.float() - target.float(), dim=-1)
        return (norms * real).sum() / real.sum().clamp(min=1)


class EndToEndObjective(PhaseObjective):
    """Phase 3: divergence of the student's next-token distribution from the teacher's, mean over real tokens.

    `train`: "all", "all_but_mlp" or "mixers" (the replaced layers' mixers and their norms only).
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: PreTrainedModel,
        train: str = "all_but_mlp",
        divergence: str = "forward_kl",
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
    ):
        self.train_what = train
        super().__init__(student, teacher)
        stay_whole(decoder_layers(student), False)
        self.divergence, self.temperature = divergence, temperature
        self.kd_weight, self.ce_weight = kd_weight, ce_weight

    def trained(self):
        if self.train_what == "mixers":
            norms = {*self._mixer_norms(), self.family.input_norm} - {None}
            return self._trained_in_layers(lambda i, name: name.startswith(("self_attn.", *norms)))
        named = self.student.named_parameters()
        if self.train_what == "all_but_mlp":
            return ((name, p) for name, p in named if f".{self.family.mlp}." not in name)
        return named

    def losses(self, **batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            teacher = run_in(self.teacher, self._teacher_hidden, batch)
        with whole_head(self.teacher):
            loss = run_in(self.student, self._loss, teacher, batch)
        yield self.divergence, loss

    def _teacher_hidden(self, batch: dict[str, Tensor]) -> Tensor:
        body: Any = getattr(self.teacher, "body", self.teacher.model)  # a hybrid can be a teacher too
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        return body(**inputs, use_cache=False).last_hidden_state

    def _loss(self, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
        student = self.student.body(**inputs, use_cache=False).last_hidden_state
        # position t predicts token t + 1; the loss makes float32 logits of the dtype it is given, which is autocast's
        return linear_kd_loss(
            **Head.of(self.student).student(student[:, :-1]),
            teacher=Head.of(self.teacher).teacher(teacher[:, :-1]),
            labels=next_labels(batch)[:, :-1],
            divergence=self.divergence,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
        )
