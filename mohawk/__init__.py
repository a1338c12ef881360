"""Turn a Transformer checkpoint into a hybrid of attention and Mamba-2 layers by the MOHAWK method.

Every public name is an attribute of this package and is imported when first used, so that `import mohawk` is
cheap and `from mohawk import kd_loss` needs torch alone.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HERE = os.path.dirname(os.path.abspath(__file__))
if not all(os.path.isdir(os.path.join(_HERE, folder)) for folder in ("kernels", "models", "recipes")):
    # In a source checkout these are links to the folders beside this one. Where git has made text files of them (on
    # Windows, without core.symlinks), the folders are looked for there.
    # They carry no __init__.py, because with one ./kernels would shadow Hugging Face's `kernels` package for whatever
    # is started from the repository root, and transformers would import it.
    __path__.append(os.path.dirname(_HERE))

if TYPE_CHECKING:
    from mohawk.attention_match import AttentionMatch
    from mohawk.distillation import KnowledgeDistiller
    from mohawk.distillation_trainer import DistillationTrainer
    from mohawk.features import HiddenMatch, layer_map
    from mohawk.heads import Head
    from mohawk.importance import Importance, measure_importance
    from mohawk.kernels.causal_conv1d import causal_conv1d
    from mohawk.kernels.kd_loss import kd_loss, linear_kd_loss
    from mohawk.kernels.kd_teachers import (
        TAIDSchedule,
        TeacherHidden,
        TeacherLogits,
        TeacherMixture,
        TeacherSamples,
        TeacherTAID,
        TeacherTopK,
    )
    from mohawk.kernels.mixing import AttentionMixing, SSDMixing
    from mohawk.kernels.mixing_distance import mixing_distance
    from mohawk.kernels.mixing_matrix import mixing_matrix
    from mohawk.kernels.ssd import ssd, ssd_step
    from mohawk.matchings import match_attention, match_hidden
    from mohawk.minitron import MinitronPruner
    from mohawk.models.bamba import from_bamba, to_bamba
    from mohawk.models.cuts import Cut, cut, keep_layers
    from mohawk.models.from_teacher import hybrid_from_teacher
    from mohawk.models.hybrid import HybridConfig, HybridForCausalLM
    from mohawk.models.mixers import DiscreteMamba2Mixer, Mamba2Mixer
    from mohawk.models.released import load_released, save_released, to_released
    from mohawk.on_policy import OnPolicy
    from mohawk.rationales import RationaleDistiller
    from mohawk.teacher_cache import CachedRows, TeacherCache
    from mohawk.vocabulary import trim_vocabulary

_PUBLIC = {
    "AttentionMatch": "mohawk.attention_match",
    "CachedRows": "mohawk.teacher_cache",
    "DistillationTrainer": "mohawk.distillation_trainer",
    "Head": "mohawk.heads",
    "HiddenMatch": "mohawk.features",
    "KnowledgeDistiller": "mohawk.distillation",
    "RationaleDistiller": "mohawk.rationales",
    "TeacherCache": "mohawk.teacher_cache",
    "layer_map": "mohawk.features",
    "match_attention": "mohawk.matchings",
    "match_hidden": "mohawk.matchings",
    "causal_conv1d": "mohawk.kernels.causal_conv1d",
    "kd_loss": "mohawk.kernels.kd_loss",
    "linear_kd_loss": "mohawk.kernels.kd_loss",
    "TAIDSchedule": "mohawk.kernels.kd_teachers",
    "TeacherHidden": "mohawk.kernels.kd_teachers",
    "TeacherLogits": "mohawk.kernels.kd_teachers",
    "TeacherMixture": "mohawk.kernels.kd_teachers",
    "TeacherSamples": "mohawk.kernels.kd_teachers",
    "TeacherTAID": "mohawk.kernels.kd_teachers",
    "TeacherTopK": "mohawk.kernels.kd_teachers",
    "AttentionMixing": "mohawk.kernels.mixing",
    "SSDMixing": "mohawk.kernels.mixing",
    "mixing_matrix": "mohawk.kernels.mixing_matrix",
    "mixing_distance": "mohawk.kernels.mixing_distance",
    "ssd": "mohawk.kernels.ssd",
    "ssd_step": "mohawk.kernels.ssd",
    "from_bamba": "mohawk.models.bamba",
    "to_bamba": "mohawk.models.bamba",
    "hybrid_from_teacher": "mohawk.models.from_teacher",
    "HybridConfig": "mohawk.models.hybrid",
    "HybridForCausalLM": "mohawk.models.hybrid",
    "DiscreteMamba2Mixer": "mohawk.models.mixers",
    "Mamba2Mixer": "mohawk.models.mixers",
    "load_released": "mohawk.models.released",
    "save_released": "mohawk.models.released",
    "to_released": "mohawk.models.released",
    "MinitronPruner": "mohawk.minitron",
    "OnPolicy": "mohawk.on_policy",
    "Cut": "mohawk.models.cuts",
    "cut": "mohawk.models.cuts",
    "keep_layers": "mohawk.models.cuts",
    "Importance": "mohawk.importance",
    "measure_importance": "mohawk.importance",
    "trim_vocabulary": "mohawk.vocabulary",
}

__all__ = [
    "AttentionMatch",
    "AttentionMixing",
    "CachedRows",
    "Cut",
    "DiscreteMamba2Mixer",
    "DistillationTrainer",
    "Head",
    "HiddenMatch",
    "HybridConfig",
    "HybridForCausalLM",
    "Importance",
    "KnowledgeDistiller",
    "Mamba2Mixer",
    "MinitronPruner",
    "OnPolicy",
    "RationaleDistiller",
    "SSDMixing",
    "TAIDSchedule",
    "TeacherCache",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherMixture",
    "TeacherSamples",
    "TeacherTAID",
    "TeacherTopK",
    "causal_conv1d",
    "cut",
    "from_bamba",
    "hybrid_from_teacher",
    "kd_loss",
    "keep_layers",
    "layer_map",
    "linear_kd_loss",
    "load_released",
    "match_attention",
    "match_hidden",
    "measure_importance",
    "mixing_distance",
    "mixing_matrix",
    "save_released",
    "ssd",
    "ssd_step",
    "to_bamba",
    "to_released",
    "trim_vocabulary",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mohawk' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    except ImportError as error:
        from mohawk.extras import explain

        if (line := explain(error, f"mohawk.{name}")) is None:
            raise
        raise ImportError(line, name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
