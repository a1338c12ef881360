"""The learning rate over a phase: up, level, down to zero (warmup-stable-decay; MiniCPM, arXiv 2404.06395)."""


def learning_rate_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """What the peak learning rate is multiplied by in a step.

    Args:
        step: counted from 0.
        steps: of the phase.
        warmup, decay: shares of the steps in which the rate rises from zero, and falls to zero after the last step.
    """
    rising = round(warmup * steps)
    falling = min(round(decay * steps), steps - rising)
    if step < rising:
        return step / rising
    if step < steps - falling:
        return 1.0
    return max(0.0, 1.0 - (step - (steps - falling)) / max(1, falling))
