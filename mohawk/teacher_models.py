"""The teachers that `KnowledgeDistiller` takes, under the name that other people's code imports them by."""

from mohawk.losses.aligned import AlignedTeacher
from mohawk.losses.teachers import Answer, AverageTeacher, CachedTeacher, Ensemble, ModelTeacher

__all__ = ["AlignedTeacher", "Answer", "AverageTeacher", "CachedTeacher", "Ensemble", "ModelTeacher"]
