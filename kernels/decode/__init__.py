"""All of a decoding step that lies between a mixer's projections, on states that are updated in place."""

from mohawk.kernels.decode.interface import delta_decode_step, ssd_decode_step

__all__ = ["delta_decode_step", "ssd_decode_step"]
