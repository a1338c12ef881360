"""The objectives of the three phases, under the name that other people's code imports them by."""

from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective

__all__ = ["EndToEndObjective", "HiddenObjective", "MixingObjective"]
