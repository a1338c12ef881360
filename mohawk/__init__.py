"""Turn a Transformer checkpoint into a hybrid of attention and layers with a state of fixed size, by MOHAWK.

Every public name is an attribute of this package and is imported when first used, so that `import mohawk` is
cheap and `from mohawk import kd_loss` needs torch alone.
"""

import os

TYPE_CHECKING = False  # to checkers it is true; typing itself takes long to import, and a Ctrl-C meanwhile is not ours

__version__ = "0.2.0"

_HERE = os.path.dirname(os.path.abspath(__file__))
if not all(os.path.isdir(os.path.join(_HERE, folder)) for folder in ("kernels", "models", "recipes")):
    # In a source checkout these are links to the folders beside this one. Where git has made text files of them (on
    # Windows, without core.symlinks), the folders are looked for there.
    # They carry no __init__.py, because with one ./kernels would shadow Hugging Face's `kernels` package for whatever
    # is started from the repository root, and transformers would import it.
    __path__.append(os.path.dirname(_HERE))

if TYPE_CHECKING:
    from mohawk.conversion.footprint import Hardware
    from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective
    from mohawk.conversion.recipe import Recipe
    from mohawk.conversion.run import convert
    from mohawk.data.masking import Masking
    from mohawk.data.next_tokens import next_labels
    from mohawk.distillation.recipe import DistillRecipe
    from mohawk.distillation.run import distill
    from mohawk.kernels.causal_conv1d.interface import causal_conv1d
    from mohawk.kernels.delta.interface import gated_delta_rule, gated_delta_step
    from mohawk.kernels.kd.interface import kd_loss, linear_kd_loss
    from mohawk.kernels.kd.teachers import (
        TAIDSchedule,
        TeacherHidden,
        TeacherLogits,
        TeacherMixture,
        TeacherSamples,
        TeacherTAID,
        TeacherTopK,
    )
    from mohawk.kernels.mixing.interface import mixing_distance, mixing_matrix
    from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, SSDMixing
    from mohawk.kernels.ssd.interface import ssd, ssd_step
    from mohawk.losses.distiller import KnowledgeDistiller, OwnLoss
    from mohawk.losses.heads import Head
    from mohawk.losses.hf_trainer import DistillationTrainer
    from mohawk.losses.layers.attention_match import AttentionMatch
    from mohawk.losses.layers.hidden_match import HiddenMatch, layer_map
    from mohawk.losses.layers.matching import Matching, match_attention, match_hidden, match_relations
    from mohawk.losses.layers.relation_match import RelationMatch
    from mohawk.losses.on_policy import OnPolicy
    from mohawk.losses.rationale_router import RationaleRouter, RoutedRationales
    from mohawk.losses.rationales import RationaleDistiller
    from mohawk.losses.schedules import Ramp
    from mohawk.models.cutting.cuts import Cut, cut, keep_layers
    from mohawk.models.cutting.sizes import Sizes
    from mohawk.models.delta_mixer import GatedDeltaMixer, KimiDeltaMixer
    from mohawk.models.formats.bamba import from_bamba, to_bamba
    from mohawk.models.formats.gguf import write_gguf
    from mohawk.models.formats.granite import to_granite
    from mohawk.models.formats.qwen3_5 import to_qwen3_5
    from mohawk.models.formats.released import load_released, save_released, to_released
    from mohawk.models.from_teacher import hybrid_from_teacher
    from mohawk.models.hybrid import HybridForCausalLM
    from mohawk.models.hybrid_config import HybridConfig
    from mohawk.models.mixers import DiscreteMamba2Mixer, Mamba2Mixer
    from mohawk.pruning.importance import Importance, measure_importance
    from mohawk.pruning.minitron import MinitronPruner
    from mohawk.pruning.recipe import PruneRecipe
    from mohawk.pruning.run import prune
    from mohawk.pruning.vocabulary import trim_vocabulary
    from mohawk.teacher_cache.reader import CachedRows, TeacherCache
    from mohawk.training.advance import Advance

_PUBLIC = {
    "Advance": "mohawk.training.advance",
    "AttentionMatch": "mohawk.losses.layers.attention_match",
    "AttentionMixing": "mohawk.kernels.mixing.operands",
    "CachedRows": "mohawk.teacher_cache.reader",
    "Cut": "mohawk.models.cutting.cuts",
    "DeltaMixing": "mohawk.kernels.mixing.operands",
    "DiscreteMamba2Mixer": "mohawk.models.mixers",
    "DistillRecipe": "mohawk.distillation.recipe",
    "DistillationTrainer": "mohawk.losses.hf_trainer",
    "EndToEndObjective": "mohawk.conversion.objectives",
    "GatedDeltaMixer": "mohawk.models.delta_mixer",
    "Hardware": "mohawk.conversion.footprint",
    "Head": "mohawk.losses.heads",
    "HiddenMatch": "mohawk.losses.layers.hidden_match",
    "HiddenObjective": "mohawk.conversion.objectives",
    "HybridConfig": "mohawk.models.hybrid_config",
    "HybridForCausalLM": "mohawk.models.hybrid",
    "Importance": "mohawk.pruning.importance",
    "KimiDeltaMixer": "mohawk.models.delta_mixer",
    "KnowledgeDistiller": "mohawk.losses.distiller",
    "Mamba2Mixer": "mohawk.models.mixers",
    "Masking": "mohawk.data.masking",
    "Matching": "mohawk.losses.layers.matching",
    "MinitronPruner": "mohawk.pruning.minitron",
    "MixingObjective": "mohawk.conversion.objectives",
    "OnPolicy": "mohawk.losses.on_policy",
    "OwnLoss": "mohawk.losses.distiller",
    "PruneRecipe": "mohawk.pruning.recipe",
    "Ramp": "mohawk.losses.schedules",
    "RationaleDistiller": "mohawk.losses.rationales",
    "RationaleRouter": "mohawk.losses.rationale_router",
    "Recipe": "mohawk.conversion.recipe",
    "RelationMatch": "mohawk.losses.layers.relation_match",
    "RoutedRationales": "mohawk.losses.rationale_router",
    "SSDMixing": "mohawk.kernels.mixing.operands",
    "Sizes": "mohawk.models.cutting.sizes",
    "TAIDSchedule": "mohawk.kernels.kd.teachers",
    "TeacherCache": "mohawk.teacher_cache.reader",
    "TeacherHidden": "mohawk.kernels.kd.teachers",
    "TeacherLogits": "mohawk.kernels.kd.teachers",
    "TeacherMixture": "mohawk.kernels.kd.teachers",
    "TeacherSamples": "mohawk.kernels.kd.teachers",
    "TeacherTAID": "mohawk.kernels.kd.teachers",
    "TeacherTopK": "mohawk.kernels.kd.teachers",
    "causal_conv1d": "mohawk.kernels.causal_conv1d.interface",
    "convert": "mohawk.conversion.run",
    "cut": "mohawk.models.cutting.cuts",
    "distill": "mohawk.distillation.run",
    "from_bamba": "mohawk.models.formats.bamba",
    "gated_delta_rule": "mohawk.kernels.delta.interface",
    "gated_delta_step": "mohawk.kernels.delta.interface",
    "hybrid_from_teacher": "mohawk.models.from_teacher",
    "kd_loss": "mohawk.kernels.kd.interface",
    "keep_layers": "mohawk.models.cutting.cuts",
    "layer_map": "mohawk.losses.layers.hidden_match",
    "linear_kd_loss": "mohawk.kernels.kd.interface",
    "load_released": "mohawk.models.formats.released",
    "match_attention": "mohawk.losses.layers.matching",
    "match_hidden": "mohawk.losses.layers.matching",
    "match_relations": "mohawk.losses.layers.matching",
    "measure_importance": "mohawk.pruning.importance",
    "mixing_distance": "mohawk.kernels.mixing.interface",
    "mixing_matrix": "mohawk.kernels.mixing.interface",
    "next_labels": "mohawk.data.next_tokens",
    "prune": "mohawk.pruning.run",
    "save_released": "mohawk.models.formats.released",
    "ssd": "mohawk.kernels.ssd.interface",
    "ssd_step": "mohawk.kernels.ssd.interface",
    "to_bamba": "mohawk.models.formats.bamba",
    "to_granite": "mohawk.models.formats.granite",
    "to_qwen3_5": "mohawk.models.formats.qwen3_5",
    "to_released": "mohawk.models.formats.released",
    "trim_vocabulary": "mohawk.pruning.vocabulary",
    "write_gguf": "mohawk.models.formats.gguf",
}

__all__ = [
    "Advance",
    "AttentionMatch",
    "AttentionMixing",
    "CachedRows",
    "Cut",
    "DeltaMixing",
    "DiscreteMamba2Mixer",
    "DistillRecipe",
    "DistillationTrainer",
    "EndToEndObjective",
    "GatedDeltaMixer",
    "Hardware",
    "Head",
    "HiddenMatch",
    "HiddenObjective",
    "HybridConfig",
    "HybridForCausalLM",
    "Importance",
    "KimiDeltaMixer",
    "KnowledgeDistiller",
    "Mamba2Mixer",
    "Masking",
    "Matching",
    "MinitronPruner",
    "MixingObjective",
    "OnPolicy",
    "OwnLoss",
    "PruneRecipe",
    "Ramp",
    "RationaleDistiller",
    "RationaleRouter",
    "Recipe",
    "RelationMatch",
    "RoutedRationales",
    "SSDMixing",
    "Sizes",
    "TAIDSchedule",
    "TeacherCache",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherMixture",
    "TeacherSamples",
    "TeacherTAID",
    "TeacherTopK",
    "causal_conv1d",
    "convert",
    "cut",
    "distill",
    "from_bamba",
    "gated_delta_rule",
    "gated_delta_step",
    "hybrid_from_teacher",
    "kd_loss",
    "keep_layers",
    "layer_map",
    "linear_kd_loss",
    "load_released",
    "match_attention",
    "match_hidden",
    "match_relations",
    "measure_importance",
    "mixing_distance",
    "mixing_matrix",
    "next_labels",
    "prune",
    "save_released",
    "ssd",
    "ssd_step",
    "to_bamba",
    "to_granite",
    "to_qwen3_5",
    "to_released",
    "trim_vocabulary",
    "write_gguf",
]


if not TYPE_CHECKING:  # checkers know the names above, and that there are no others

    def __getattr__(name: str):
        if name not in _PUBLIC:
            raise AttributeError(f"module 'mohawk' has no attribute {name!r}")
        import importlib

        try:
            value = getattr(importlib.import_module(_PUBLIC[name]), name)
        except ImportError as error:
            from mohawk.core.extras import explain

            if (line := explain(error, f"mohawk.{name}")) is None:
                raise
            raise ImportError(line, name=error.name) from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
